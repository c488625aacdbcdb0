"""Collectives with the gradients this package needs, on top of torch.distributed."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.parallel.runtime import Axis


def gather_units(own_uO: Tensor, units_R: Sequence[int], axis: Axis) -> Tensor:
    """[U, O]: the embeddings of all ranks, rank after rank; ranks may have different numbers, also none.

    Every rank must use the result alike, so that its gradient is the same on all of them (it is where the text model is tensor parallel:
    scattered rows gather their gradients). Each then keeps its part; nothing is summed.

    Args:
        own_uO: this rank's embeddings, units_R[axis.rank] of them.
    """
    return _GatherUnits.apply(own_uO, tuple(units_R), axis)


class _GatherUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, units: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.start, ctx.count = sum(units[: axis.rank]), units[axis.rank]
        # One size for all: uneven gathers are not available on every backend.
        padded = own.new_zeros(max(units), own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in units]
        dist.all_gather(parts, padded, group=axis.group)
        return torch.cat([part[:count] for part, count in zip(parts, units, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[ctx.start : ctx.start + ctx.count], None, None


def gather_rows(own_t: Tensor, order_T: Tensor, axis: Axis) -> Tensor:
    """[T, …] in the order of the packed row, from the rows [T / size, …] of each rank.

    Every rank must use the result alike; the gradient of its own rows is then complete, nothing is summed.

    Args:
        order_T: where each row stands when the ranks' rows are laid end to end (types.ContextShare).
    """
    return _GatherRows.apply(own_t, axis).index_select(0, order_T)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, axis: Axis) -> Tensor:
        ctx.start, ctx.count = axis.rank * len(own), len(own)
        parts = [torch.empty_like(own) for _ in range(axis.size)]
        dist.all_gather(parts, own.contiguous(), group=axis.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[ctx.start : ctx.start + ctx.count], None
