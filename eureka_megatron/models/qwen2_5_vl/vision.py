"""The vision tower: patches in window order → one embedding a merge unit, in window order.

Windowed attention in most blocks, attention over whole frames in `fullatt_block_indexes`. Patches arrive permuted (types.Picture), so
nothing is permuted here; whoever places the embeddings undoes the order by index.

Shapes: P patches, D values of a patch, H hidden, U = P / merge² units, O size of the text model's hidden state.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eureka_megatron.models.qwen2_5_vl.attention import RMSNorm, Segments
from eureka_megatron.models.qwen2_5_vl.config import VisionConfig
from eureka_megatron.models.qwen2_5_vl.rope import Rotation, vision_angles
from eureka_megatron.models.qwen2_5_vl.specs import layer_spec
from eureka_megatron.models.qwen2_5_vl.transformer_config import VISION_NORM_EPS
from eureka_megatron.types import VisionBatch


class VisionBlocks(torch.nn.Module):
    """The list of layers; Megatron's TransformerBlock gives all layers the same segments, this tower needs two kinds."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection, backend: str) -> None:
        super().__init__()
        spec = layer_spec(AttnMaskType.no_mask, backend)
        self.layers = torch.nn.ModuleList(
            build_module(spec, config=config, layer_number=number + 1, pg_collection=groups)
            for number in range(config.num_layers)
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Each layer's own: Megatron's default takes what stands in a plain list for whole on every rank."""
        states: dict = {}
        for number, layer in enumerate(self.layers):
            states |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)
        return states


class Merger(MegatronModule):
    """RMSNorm, then merge² neighbouring patches side by side through two linears with exact GELU: [P, 1, H] → [U, O]."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.merged = vision.hidden_size * vision.spatial_merge_size**2
        options = {"config": config, "init_method": config.init_method, "skip_bias_add": False, "tp_group": groups.tp}
        self.norm = RMSNorm(config, vision.hidden_size, VISION_NORM_EPS)
        self.linear_fc1 = ColumnParallelLinear(self.merged, self.merged, gather_output=False, **options)
        self.linear_fc2 = RowParallelLinear(
            self.merged, vision.out_hidden_size, bias=True, input_is_parallel=True, **options
        )

    def forward(self, hidden: Tensor) -> Tensor:
        units = self.norm(hidden).view(-1, 1, self.merged)
        output, _ = self.linear_fc2(torch.nn.functional.gelu(self.linear_fc1(units)[0]))
        return output[:, 0]


class VisionTower(MegatronModule):
    """See the module's docstring. `groups` has the tensor-parallel group of the tower (this rank alone when replicated)."""

    def __init__(
        self, config: TransformerConfig, vision: VisionConfig, groups: ProcessGroupCollection, backend: str
    ) -> None:
        super().__init__(config=config)
        self.vision = vision
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.patch_embed = torch.nn.Linear(
            vision.patch_values, vision.hidden_size, bias=False, dtype=config.params_dtype, device=device
        )
        self.decoder = VisionBlocks(config, groups, backend)
        self.merger = Merger(config, vision, groups)

    def forward(self, batch: VisionBatch) -> Tensor:
        """→ [U, O], the embeddings of the distinct pictures in window order; of frozen parts that were computed before, no more."""
        if batch.units_UO is not None:
            return batch.units_UO
        return self.merger(self.encode(batch) if batch.hidden_PH is None else batch.hidden_PH[:, None])

    def encode(self, batch: VisionBatch) -> Tensor:
        """→ [P, 1, H], what leaves the blocks and enters the merger."""
        hidden = self.patch_embed(batch.patches_PD)[:, None]
        rotation = Rotation.of(vision_angles(batch.coordinates_P2, self.config.kv_channels), torch.float32)
        windows = Segments(batch.cu_windows, rotation, lengths_B=batch.windows)
        frames = Segments(batch.cu_frames, rotation, lengths_B=batch.frames)
        for index, layer in enumerate(self.decoder.layers):
            segments = frames if index in self.vision.fullatt_block_indexes else windows
            if self.config.recompute_granularity == "full" and self.training:
                # The variant that is not re-entrant finds out by itself whether anything needs a gradient: the input does not
                # where only later parts are trained. Without dropout there is no random state to bring back.
                hidden = checkpoint(_run, layer, hidden, segments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = _run(layer, hidden, segments)
        return hidden


def _run(layer: torch.nn.Module, hidden: Tensor, segments: Segments) -> Tensor:
    return layer(hidden, attention_mask=None, packed_seq_params=segments)[0]
