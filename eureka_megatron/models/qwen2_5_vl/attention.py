"""Norm and core attention of the `local` backend: plain torch, exact for packed rows, on CPU and GPU.

Megatron's own local parts do not serve: `WrappedTorchNorm` refuses sequence parallelism, and `DotProductAttention` takes no packing and
masks with −10000.

Shapes: T packed tokens, N query heads and K key-value heads of this rank, D head size, B segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from eureka_megatron.models.qwen2_5_vl.buckets import Buckets, attend_in_buckets, make_buckets
from eureka_megatron.models.qwen2_5_vl.context import QueryPlan, attend, query_plan
from eureka_megatron.models.qwen2_5_vl.rope import Rotation
from eureka_megatron.models.qwen2_5_vl.varlen import Spans, varlen_attention
from eureka_megatron.types import ContextShare


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
        if x.is_cuda or x.dtype != torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """In few passes over x: torch has one kernel on GPUs, but a dozen operations on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (norms.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """With n = x · scale: weights get Σ g n over rows, x gets scale · (g w − n · mean(g w n))."""
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        products = gradient * normed
        means = (products @ weight)[..., None] / x.shape[-1]
        to_weight = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return torch.mul(gradient, weight, out=products).addcmul_(normed, means, value=-1).mul_(scale), to_weight, None


@dataclass(frozen=True)
class Segments:
    """What core attention needs to know of the rows: how each is rotated, and who attends to whom.

    Rows cu_seqlens[i] … cu_seqlens[i+1] attend among themselves, and to the prompt that their segment continues, if there is one. Passed
    through Megatron's layers where a `PackedSeqParams` goes. Example: a prompt of 3 tokens, two responses to it, and a sequence of its own.

        cu_seqlens    0     3       7    9     12          a response sees   0 1 2 and of its own rows those up to itself
        rows          0 1 2 3 4 5 6 7 8 9 10 11
        prefixes_B    (0, 0) (0, 3) (0, 3) (0, 0)
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
    # (first row, rows) of what all rows of a segment see besides their own; empty: no segment sees anything else
    prefixes_B: tuple[tuple[int, int], ...] = ()

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.cu_seqlens.diff().tolist()) if self.lengths_B is None else self.lengths_B

    @property
    def alone(self) -> bool:
        """Whether all rows are here and every segment attends to itself only."""
        return self.share is None and not self.prefixes_B

    @cached_property
    def queries(self) -> QueryPlan:
        """Of this rank's rows, when they are shared or continue others."""
        return query_plan(self.lengths, self.share, self.prefixes_B, device=self.cu_seqlens.device)

    @cached_property
    def buckets(self) -> Buckets:
        """Of segments that are alone."""
        return make_buckets(self.lengths, self.cu_seqlens.device)


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
        # Squeezed, not indexed: the gradient of an index is a tensor of zeros and a copy into it.
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if not packed_seq_params.alone:
            context = attend(query, key, value, packed_seq_params.queries, self._sharing(packed_seq_params))
        elif query.is_cuda and query.dtype != torch.float32:
            context = self._flash(query, key, value, packed_seq_params)
        else:
            context = self._padded(query, key, value, packed_seq_params)
        return context.flatten(1)[:, None]

    def _sharing(self, segments: Segments) -> ProcessGroup | None:
        """Those who have the other rows."""
        return self.context_group if segments.share is not None else None

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        spans = Spans(segments.cu_seqlens, max(segments.lengths))
        return varlen_attention(query, key, value, spans, spans, causal=self.causal)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        return attend_in_buckets(query, key, value, None, segments.buckets, causal=self.causal)
