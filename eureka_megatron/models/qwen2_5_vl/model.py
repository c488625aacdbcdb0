"""Qwen2.5-VL as one pipeline chunk: vision tower and embedding on the first stage, the text layers, final norm and head on the last.

What leaves the last stage is the final hidden state of the whole row, not logits: `rl.logprobs` turns it into log-probabilities in chunks,
so that [tokens, vocabulary] is never held.

Shapes: T rows of the packed micro-batch, t = T / tensor-parallel size under sequence parallelism else T, H hidden, V vocabulary.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eureka_megatron.layout import Execution
from eureka_megatron.models.qwen2_5_vl.attention import RMSNorm, Segments
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, check_layout
from eureka_megatron.models.qwen2_5_vl.rope import Rotation, text_angles
from eureka_megatron.models.qwen2_5_vl.specs import check_backend, layer_spec
from eureka_megatron.models.qwen2_5_vl.transformer_config import text_transformer_config, vision_transformer_config
from eureka_megatron.models.qwen2_5_vl.vision import VisionTower
from eureka_megatron.parallel.collectives import gather_units
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.types import MicroBatch, VisionBatch


class QwenVLModel(LanguageModule):
    """One chunk. Parameter names are those of the table in weights/table.py.

    Args:
        config, vision_config: shared by all chunks of this rank.
        backend: what the layers are made of; "local" or "te".
        chunk: v of `parallel.layout.virtual_pipeline`. On stage p of P it is part v·P + p of the model. Example, 8 layers, P 2, two chunks:

            stage 0   embed 0 1 │ 4 5            stage 1   2 3 │ 6 7 head
    """

    def __init__(
        self,
        hf_config: QwenVLConfig,
        parallel: Parallel,
        config: TransformerConfig,
        vision_config: TransformerConfig,
        *,
        backend: str = "local",
        chunk: int = 0,
    ) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config=config, pg_collection=groups)
        self.hf_config, self.parallel, self.backend = hf_config, parallel, backend
        self.vision_parallel = parallel.layout.vision_parallel
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel.first_stage and chunk == 0
        self.post_process = parallel.last_stage and chunk == parallel.layout.virtual_pipeline - 1
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        if parallel.layout.virtual_pipeline > 1:
            self.vp_stage = chunk
        text = hf_config.text_config
        if self.pre_process:
            tower_groups = groups if self.vision_parallel == "tensor" else _alone(groups)
            self.vision = VisionTower(vision_config, hf_config.vision_config, tower_groups, backend)
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=text.vocab_size,
                max_sequence_length=text.max_position_embeddings,
                position_embedding_type="mrope",
                scatter_to_sequence_parallel=False,  # vision embeddings are placed first, then the row is scattered
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(AttnMaskType.causal, backend)]
                * get_num_layers_to_build(config, self.vp_stage, parallel.pipeline.rank),
                layer_norm=RMSNorm,
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                text.hidden_size,
                text.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Say of every parameter whether it is split over TP: norms must count replicas once and shards each.

        Megatron marks weights only while it initialises them, which this package never lets it do; unmarked shards would be counted
        on one rank alone, and clipping would be wrong without an error.
        """
        split = {tensor_parallel.ColumnParallelLinear: 0, tensor_parallel.VocabParallelEmbedding: 0}
        split[tensor_parallel.RowParallelLinear] = 1
        for module in self.modules():
            if type(module) in split and module.weight is not None:
                module.weight.tensor_model_parallel = True
                module.weight.partition_dim = split[type(module)]
                module.weight.partition_stride = 1
        if self.vision_parallel == "tensor":
            return
        # The tower is whole on every rank although it is made of the same modules.
        for parameter in self.vision.parameters() if self.pre_process else ():
            parameter.tensor_model_parallel = False
            # On GPUs atomics make equal gradients drift apart; gloo has no average, and CPU kernels are deterministic.
            # Ranks that share the pictures have different gradients, which train/step.py adds.
            parameter.average_gradients_across_tp_domain = (
                self.parallel.device.type == "cuda" and self.vision_parallel == "replicated"
            )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the stage before (called by Megatron's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """→ on the last stage the final hidden states [T', H] of this rank's rows; before it [t, 1, H] for the next stage.

        T' is T, or T / context-parallel size.
        """
        text = self.hf_config.text_config
        share = batch.context
        positions = batch.positions_3T if share is None else batch.positions_3T[:, share.rows_t]
        angles = text_angles(positions, text.head_dim, text.rope_theta, text.mrope_section)
        hidden = self._embed(batch) if self.pre_process else None
        if hidden is not None and self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            # Megatron's checkpoint is re-entrant: without an input that needs a gradient, layers behind frozen embeddings get none.
            hidden.requires_grad_()
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=Segments(
                batch.cu_seqlens,
                Rotation.of(angles, self.config.params_dtype),
                share,
                lengths_B=batch.segments,
                prefixes_B=batch.prefixes,
            ),
        )
        if not self.post_process:
            return hidden
        # Each rank is about to use all rows with its part of the vocabulary, so gradients of the rows are partial sums over TP.
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return hidden.squeeze(1)

    def _embed(self, batch: MicroBatch) -> Tensor:
        """Token embeddings of this rank's rows with the vision embeddings placed by explicit index: [t, 1, H]."""
        share = batch.context
        tokens = batch.tokens_T if share is None else batch.tokens_T[share.rows_t]
        hidden = self.embedding(input_ids=tokens[None], position_ids=None)
        if batch.vision is not None:
            units = self._pictures(batch.vision).to(hidden.dtype)
            shown = batch.vision.shown_2L
            source, placement = (batch.vision.source_E, batch.vision.placement_E) if shown is None else shown.unbind()
            hidden = hidden.squeeze(1).index_copy(0, placement, units.index_select(0, source))[:, None]
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden

    def _pictures(self, vision: VisionBatch) -> Tensor:
        """[U, O]: computed here, or by each tensor-parallel rank for its share of the pictures."""
        if vision.units_R is None:
            return self.vision(vision)
        own = vision.units_R[self.parallel.tensor.rank]
        size = self.hf_config.vision_config.out_hidden_size
        # A rank without a picture does not run the tower, but it does enter the gathering.
        units = self.vision(vision) if own else self.embedding.word_embeddings.weight.new_zeros(0, size)
        return gather_units(units, vision.units_R, self.parallel.tensor)

    def output_weight(self) -> Tensor:
        """[V / tensor-parallel size, H] on the last stage: the head's own weight, or the tied embedding."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


def _alone(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """Groups of this rank alone. Dense models have one expert a rank, so Megatron's expert-parallel group is just that."""
    assert groups.ep.size() == 1
    return ProcessGroupCollection(tp=groups.ep, cp=groups.ep, pp=groups.ep, ep=groups.ep)


def build_model(hf_config: QwenVLConfig, parallel: Parallel, execution: Execution = Execution()) -> list[QwenVLModel]:
    """The pipeline chunks of this rank (`parallel.layout.virtual_pipeline` of them), weights not initialised; load them next.

    With FP8, rows must align to `transformer_config.fp8_rows`.

    Raises:
        ConfigError: the layout does not fit the model, or the backend cannot run here.
    """
    check_backend(execution, parallel)
    check_layout(hf_config, parallel.layout)
    configs = (
        text_transformer_config(hf_config, parallel, execution),
        vision_transformer_config(hf_config, parallel, execution),
    )
    return [
        QwenVLModel(hf_config, parallel, *configs, backend=execution.backend, chunk=chunk)
        for chunk in range(parallel.layout.virtual_pipeline)
    ]
