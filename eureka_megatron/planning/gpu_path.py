"""The way that the trainer takes on a GPU, taken on fake tensors without one: the same branches, the same tensors made and kept.

A CPU build of torch aborts on fake CUDA tensors under autograd, so a rehearsal's tensors say that they are on the CPU, and what asks for their
device would choose the CPU's way. Here stands everything that asks, and nothing else:

    attention                  torch's variable-length flash attention, whose operator knows shapes without a kernel
    head                       bf16 products with fp32 results (`torch.mm(…, out_dtype=…)`)
    norms                      CUDA's fused kernel, which keeps its input and a number a row
    rotation                   compiled: one kernel, which keeps nothing
    activation                 Megatron's fused function, which keeps its input alone; compiled, so nothing stands between input and output
    Adam                       by lists of tensors, with its temporary ones, as torch chooses on CUDA
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from eureka_megatron.models.qwen2_5_vl import attention, context, rope, transformer_config
from eureka_megatron.rl import logprobs

WINDOW = (112 // 14) ** 2  # patches of a window of the published towers


class Attentions:
    """Floating-point operations of variable-length attention, causal and by segment, which shapes alone do not tell.

    The lengths are those that the caller of the kernel knows; the backward pass finds them by its row boundaries.
    """

    def __init__(self) -> None:
        # By the storage of the queries' boundaries: (query, key) pairs that are computed, and whether these are windows of the tower.
        self._known: dict[int, tuple[int, bool]] = {}
        self.in_windows = 0  # operations

    def note(self, tensor: Tensor, queries: tuple[int, ...], keys: tuple[int, ...], causal: bool) -> None:
        """Queries see the keys at the end of theirs. Example, causal: 2 queries of 4 keys are 3 + 4 = 7 pairs, 4 of 4 are 10."""
        pairs = sum(q * k - (q * (q - 1) // 2 if causal else 0) for q, k in zip(queries, keys, strict=True))
        self._known[tensor.untyped_storage()._cdata] = pairs, not causal and max(queries) <= WINDOW

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, *_: Any, **__: Any) -> int:
        return self._operations(4, query, cu)  # scores, and their product with the values

    def backward(self, gradient: Tensor, query: Tensor, *others: Any, **__: Any) -> int:
        cu = others[4]  # behind key, value, output and log-sum-exp
        return self._operations(10, query, cu)  # the scores again, and two products for each of the two forward

    def _operations(self, each: int, query: Tensor, cu: Tensor) -> int:
        pairs, windows = self._known[cu.untyped_storage()._cdata]
        number = each * pairs * query.shape[1] * query.shape[2]
        self.in_windows += number if windows else 0
        return number

    def formulas(self) -> dict[Any, Callable[..., int]]:
        """For FlopCounterMode's `custom_mapping`."""
        import torch.nn.attention.varlen  # registers the operators

        def raw(method: Callable[..., int]) -> Callable[..., int]:
            def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
                return method(*args, **kwargs)

            formula._get_raw = True  # type: ignore[attr-defined]
            return formula

        operators = torch.ops.torch_attn
        return {operators._varlen_attn: raw(self.forward), operators._varlen_attn_backward: raw(self.backward)}


class FusedNorm(torch.autograd.Function):
    """What CUDA's fused RMSNorm reads, writes and keeps. Its values are not the norm's: only fake tensors pass through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return gradients[0] + x, weight.clone()


def _fused_swiglu(y: Tensor) -> Tensor:
    return torch.add(*y.chunk(2, dim=-1))


def _fused_swiglu_back(gradient: Tensor, y: Tensor) -> Tensor:
    return y.clone()


def _fused_rotation(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.clone()


@contextmanager
def as_on_gpu(attentions: Attentions) -> Iterator[None]:
    """While active, bf16 models compute as on a GPU."""
    common, flash = transformer_config._common, attention.SegmentAttention._flash

    def padded(self: Any, query: Tensor, key: Tensor, value: Tensor, segments: Any) -> Tensor:
        attentions.note(segments.cu_seqlens, segments.lengths, segments.lengths, self.causal)
        return flash(self, query, key, value, segments)

    def chunks(query: Tensor, key: Tensor, value: Tensor, pair: Tensor, plan: Any) -> Tensor:
        attentions.note(plan.query_spans.cu, plan.queries, plan.keys, True)
        return context._flash(query, pair, plan)

    def fused(parallel: Any, execution: Any) -> dict[str, Any]:
        return common(parallel, execution) | {"bias_activation_fusion": True, "bias_dropout_fusion": True}

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out_dtype=torch.float32)

    optimizer = import_module("torch.optim.optimizer")
    listed = [*optimizer._foreach_supported_types, FakeTensor]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention.SegmentAttention, "_padded", padded))
        stack.enter_context(mock.patch.object(context, "_chunks", chunks))
        stack.enter_context(mock.patch.object(transformer_config, "_common", fused))
        stack.enter_context(mock.patch.object(logprobs, "_product", product))
        stack.enter_context(
            mock.patch.object(attention.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))
        )
        stack.enter_context(mock.patch.object(rope, "_rotated", _fused_rotation))
        stack.enter_context(mock.patch.object(fused_bias_swiglu, "swiglu", _fused_swiglu))
        stack.enter_context(mock.patch.object(fused_bias_swiglu, "swiglu_back", _fused_swiglu_back))
        stack.enter_context(
            mock.patch.object(optimizer, "_get_foreach_kernels_supported_devices", return_value=["cpu"])
        )
        stack.enter_context(mock.patch.object(optimizer, "_foreach_supported_types", listed))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
