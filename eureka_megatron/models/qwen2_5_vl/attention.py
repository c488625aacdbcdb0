"""Norm and core attention of the `local` backend: plain torch, exact for packed rows, on CPU and GPU.

Megatron's own local parts do not serve: `WrappedTorchNorm` refuses sequence parallelism, and `DotProductAttention` takes no packing and
masks with −10000.

Shapes: T packed tokens, N query heads and K key-value heads of this rank, D head size, B segments side by side, L longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl.context import QueryPlan, attend, query_plan
from eureka_megatron.models.qwen2_5_vl.rope import Rotation
from eureka_megatron.models.qwen2_5_vl.varlen import Spans, varlen_attention
from eureka_megatron.parallel.runtime import to_device
from eureka_megatron.types import ContextShare

# Score elements up to which CPU attention is written out: 64 MiB in fp32.
PLAIN_SCORES = 1 << 24


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, computed in fp32. The signature is that of Megatron's layer specs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.eps = eps
        # Under sequence parallelism each rank sees a part of the sequence: finalize_model_grads sums such gradients over TP.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@dataclass(frozen=True)
class Segments:
    """What core attention needs to know of the rows: how each is rotated, and who attends to whom.

    Block-diagonal: rows cu_seqlens[i] … cu_seqlens[i+1] attend only among themselves. Passed through Megatron's layers where a
    `PackedSeqParams` goes. Example: segments of 3, 7 and 2 tokens side by side, in buckets of like length.

        cu_seqlens  0     3             10  12          buckets  rows_BL [[3 4 5 6 7 8 9]], [[10 11 11], [0 1 2]]
        rows        0 1 2 3 4 5 6 7 8 9 10 11                    11 repeated is padding; `places` of the second: 0 1 3 4 5
    """

    # int32 [B+1]
    cu_seqlens: Tensor
    # of the rows that are here
    rotation: Rotation
    # which rows are here, when context-parallel ranks share them
    share: ContextShare | None = None
    # keeps Megatron from reshaping the row
    qkv_format: str = "sbhd"
    # of the segments, known on the host; None: the device is asked, and stalls
    lengths_B: tuple[int, ...] | None = None

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.cu_seqlens.diff().tolist()) if self.lengths_B is None else self.lengths_B

    @cached_property
    def queries(self) -> QueryPlan:
        """Of this rank's rows, when they are shared."""
        assert self.share is not None
        return query_plan(self.lengths, self.share)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments of like length side by side, so that padding stays under a third of the work."""
        starts = accumulate(self.lengths, initial=0)
        order = sorted((length, start) for length, start in zip(self.lengths, starts, strict=False) if length)
        buckets = []
        while order:
            longest = order[-1][0]
            alike = [item for item in order if item[0] * 3 >= longest * 2]
            order = order[: len(order) - len(alike)]
            buckets.append(_bucket(alike, longest, self.cu_seqlens.device))
        return buckets

    @cached_property
    def inverse_T(self) -> Tensor:
        """Where each row of the packed sequence stands in the buckets' tokens laid end to end."""
        return torch.argsort(torch.cat([bucket.rows_BL.flatten()[bucket.places] for bucket in self.buckets]))


@dataclass(frozen=True)
class Bucket:
    """B segments padded to L. Padding repeats the segment's last row; what it computes is dropped."""

    # int64: which row of the packed sequence
    rows_BL: Tensor
    # bool [B, 1, 1, L], None when nothing is padded
    key_mask: Tensor | None
    # int64: flat indices, within B·L, of real tokens
    places: Tensor


def _bucket(segments: list[tuple[int, int]], longest: int, device: torch.device) -> Bucket:
    """Worked out on the host, in numpy: the device would have to be asked how many places there are, and a fake one would not know."""
    lengths = np.array([length for length, _ in segments])[:, None]
    starts = np.array([start for _, start in segments])[:, None]
    column = np.arange(longest)
    valid = column < lengths

    def moved(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    mask = None if valid.all() else moved(valid[:, None, None, :])
    return Bucket(moved(starts + np.minimum(column, lengths - 1)), mask, moved(valid.reshape(-1).nonzero()[0]))


class SegmentAttention(MegatronModule):
    """Rotary embedding and scaled dot-product attention within segments, causal or full by the layer's mask type."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", "only self-attention occurs in Qwen2.5-VL"
        self.causal = attn_mask_type == AttnMaskType.causal
        self.context_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packed_seq_params: Segments, **_: Any
    ) -> Tensor:
        """query [T, 1, N, D] and key [T, 1, K, D] not yet rotated, value [T, 1, K, D] → [T, 1, N·D]."""
        query, key = packed_seq_params.rotation(query), packed_seq_params.rotation(key)
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if packed_seq_params.share is not None:
            context = attend(query, key, value, packed_seq_params.queries, self.context_group)
        elif query.is_cuda and query.dtype != torch.float32:
            context = self._flash(query, key, value, packed_seq_params)
        else:
            context = self._padded(query, key, value, packed_seq_params)
        return context.flatten(1)[:, None]

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        spans = Spans(segments.cu_seqlens, max(segments.lengths))
        return varlen_attention(query, key, value, spans, spans, causal=self.causal)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        def side_by_side(x: Tensor, bucket: Bucket) -> Tensor:
            # index_select, not x[rows]: its backward is an index_add, far cheaper on a CPU than an accumulating index_put.
            return x.index_select(0, bucket.rows_BL.flatten()).unflatten(0, bucket.rows_BL.shape).transpose(1, 2)

        parts = []
        for bucket in segments.buckets:
            heads, keys, values = (side_by_side(x, bucket) for x in (query, key, value))
            rows, longest = bucket.rows_BL.shape
            small = not query.is_cuda and rows * longest**2 * query.shape[1] <= PLAIN_SCORES
            out = (self._plain if small else self._fused)(heads, keys, values, bucket)
            parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.places))
        return torch.cat(parts).index_select(0, segments.inverse_T)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """query [B, N, L, D], key and value [B, K, L, D] → [B, N, L, D]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            # Causal attention needs no key mask: padding stands behind every real token.
            attn_mask=None if self.causal else bucket.key_mask,
            is_causal=self.causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """The same, written out: for short segments torch's CPU kernel, its backward above all, takes twice as long."""
        batch, heads, length, size = query.shape
        groups = key.shape[1]
        # Query heads that share a key head stand side by side: [B, K, N/K · L, D] against [B, K, L, D].
        scores = (query.reshape(batch, groups, -1, size) * size**-0.5) @ key.transpose(-1, -2)
        scores = scores.view(batch, heads, length, length).float()  # softmax in fp32, as the fused kernels do
        if self.causal:
            scores = scores + torch.full((length, length), float("-inf"), device=scores.device).triu(1)
        elif bucket.key_mask is not None:
            scores = scores.masked_fill(~bucket.key_mask, float("-inf"))
        weights = scores.softmax(-1).to(value.dtype).view(batch, groups, -1, length)
        return (weights @ value).view(batch, heads, length, size)
