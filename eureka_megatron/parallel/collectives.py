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
    return _Gather.apply(own_uO, tuple(units_R), axis)


def gather_rows(own_t: Tensor, order_T: Tensor, axis: Axis) -> Tensor:
    """[T, …] in the order of the packed row, from the rows [T / size, …] of each rank; used alike, as with `gather_units`.

    Args:
        order_T: where each row stands when the ranks' rows are laid end to end (types.ContextShare).
    """
    return gather_units(own_t, [len(own_t)] * axis.size, axis).index_select(0, order_T)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.start, ctx.count = sum(counts[: axis.rank]), counts[axis.rank]
        # One size for all: uneven gathers are not available on every backend.
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=axis.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[ctx.start : ctx.start + ctx.count], None, None
