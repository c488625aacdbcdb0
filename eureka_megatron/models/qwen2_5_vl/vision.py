"""The vision tower: patches in window order → one embedding a merge unit, in window order.

Windowed attention in most blocks, attention over whole frames in `fullatt_block_indexes`. Patches arrive permuted (types.Picture), so
nothing is permuted here; whoever places the embeddings undoes the order by index. Example: one frame of 4 × 6 patches, merge 2, windows
of 2 units' side (4 patches):

    unit in reading order   0 1 | 2      window order   0 1 3 4 | 2 5      cu_windows [0, 16, 24]
                            3 4 | 5      (4 patches each)                  cu_frames  [0, 24]

Shapes: P patches, D values of a patch, H hidden, U = P / merge² units, O size of the text model's hidden state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

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

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Each layer's own: Megatron's default takes what stands in a plain list for whole on every rank."""
        states: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, MegatronModule)
            states |= layer.sharded_state_dict(f"{prefix}layers.{number}.", **options)
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
        return output.squeeze(1)


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
        if isinstance(batch.units_UO, Tensor):
            return batch.units_UO
        return self.merger(batch.hidden_PH[:, None] if isinstance(batch.hidden_PH, Tensor) else self.encode(batch))

    def encode(self, batch: VisionBatch) -> Tensor:
        """→ [P, 1, H], what leaves the blocks and enters the merger."""
        hidden: Tensor = self.patch_embed(batch.patches_PD)[:, None]
        rotation = Rotation.of(vision_angles(batch.coordinates_P2, self.config.kv_channels), torch.float32)
        windows = Segments(batch.cu_windows, rotation, lengths_B=batch.windows)
        frames = Segments(batch.cu_frames, rotation, lengths_B=batch.frames)
        run: Callable[..., Tensor] = _run
        if self.config.recompute_granularity == "full" and self.training:
            # The variant that is not re-entrant finds out by itself whether anything needs a gradient: the input does not
            # where only later parts are trained. Without dropout there is no random state to bring back.
            run = partial(checkpoint, _run, use_reentrant=False, preserve_rng_state=False)
        for index, layer in enumerate(self.decoder.layers):
            hidden = run(layer, hidden, frames if index in self.vision.fullatt_block_indexes else windows)
        return hidden


def _run(layer: torch.nn.Module, hidden: Tensor, segments: Segments) -> Tensor:
    return layer(hidden, attention_mask=None, packed_seq_params=segments)[0]
