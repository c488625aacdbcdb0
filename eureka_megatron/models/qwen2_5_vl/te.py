"""The `te` backend: parts of Transformer Engine for both towers. Importing this module imports Transformer Engine.

**Not yet run on hardware**: written from the sources of Megatron-Core 0.16.1 and Transformer Engine 2.11; tests/gpu compares it with `local`.

- The norm before a linear is fused into it, and with it the all-gather of sequence parallelism.
- Core attention is Transformer Engine's choice among FlashAttention and cuDNN for packed rows ("thd"). Megatron's own way into "thd" is not
  taken: its rotary code slices angles sequence by sequence and rotates in the states' dtype. `Segments` keep Megatron in its plain
  layout, and the reshaping happens here, after the rotation, which is the same as in `local`.
- Context parallelism and shared prompts are this package's (`context.attend`); Transformer Engine is told of neither.
- FP8 is for the text decoder's linears only: the vision MLP's width (3420) and a picture's patches are no multiples of 16.
"""

import copy
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl.attention import Segments
from eureka_megatron.models.qwen2_5_vl.context import attend


class SegmentDotProductAttention(TEDotProductAttention):
    """Rotary embedding and Transformer Engine's attention within segments, causal or full by the layer's mask type."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        **options: Any,
    ) -> None:
        self_contained = copy.copy(config)
        self_contained.context_parallel_size = 1
        super().__init__(
            self_contained, layer_number, attn_mask_type, attention_type, pg_collection=pg_collection, **options
        )
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType,
        *,
        packed_seq_params: Segments,
        **_: Any,
    ) -> Tensor:
        """query [T, 1, N, D] and key [T, 1, K, D] not yet rotated, value [T, 1, K, D] → [T, 1, N·D]."""
        segments = packed_seq_params
        query, key = segments.rotation(query).squeeze(1), segments.rotation(key).squeeze(1)
        value = value.squeeze(1)
        if not segments.alone:
            group = self.context_group if segments.share is not None else None
            context = attend(query, key, value, segments.queries, group).flatten(1)
        else:
            context = super().forward(
                query, key, value, None, attn_mask_type=attn_mask_type, packed_seq_params=packed(segments)
            )
        return context[:, None]


def packed(segments: Segments) -> PackedSeqParams:
    """The segments in Megatron's record, for attention alone."""
    # Kernels are chosen anew for every new bound on the lengths, so it moves in steps (Transformer Engine's own are the same).
    longest = -(-max(segments.lengths) // 64) * 64
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_kv=segments.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


# Norm, column-parallel linear behind it, row-parallel linear, core attention: see specs.layer_spec.
PARTS = (IdentityOp, TELayerNormColumnParallelLinear, TERowParallelLinear, SegmentDotProductAttention)
