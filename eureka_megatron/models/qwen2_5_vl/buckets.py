"""Attention of packed rows by batches of chunks of like length, in plain torch: what CPUs run, and GPUs in fp32.

A chunk is a run of queries that stand side by side. They see the same keys `before`, a shared prompt or what stands before the chunk in its
sequence, and of their own rows those up to themselves (without causality all):

    chunk of 2 queries, 3 keys before         before        own
                                              k0 k1 k2      q0
                                              k0 k1 k2      q0 q1

Shapes: T rows, F places in buckets, N query heads, G key-value heads of this rank, R = N / G, D head size; in a bucket B chunks side by side, L
queries of the longest of them, P keys before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eureka_megatron.parallel.runtime import to_device

# Score elements up to which CPU attention is written out: 64 MiB in fp32.
PLAIN_SCORES = 1 << 24


@dataclass(frozen=True)
class Bucket:
    """B chunks that see the same keys before, padded to L queries by their last row. What padding computes is dropped."""

    chunks: int
    longest: int
    # bool [B, L], None when nothing is padded
    padding_BL: Tensor | None
    # int64: which rows, of all that there are, stand before; None: none
    before_P: Tensor | None


@dataclass(frozen=True)
class Order:
    """From packed rows to the buckets' places laid end to end, and back. Segments of 3, 7 and 2 rows:

    buckets   [[3 4 5 6 7 8 9]], [[0 1 2], [10 11 11]]     rows_F 3 4 5 6 7 8 9 0 1 2 10 11 11     padding_X 12
    """

    rows_F: Tensor
    places_T: Tensor
    padding_X: Tensor


@dataclass(frozen=True)
class Buckets:
    parts: tuple[Bucket, ...]
    # None: the rows lie so already
    order: Order | None


def make_buckets(queries: Sequence[int], device: torch.device, before: Sequence[np.ndarray] | None = None) -> Buckets:
    """Chunks of like length side by side, so that padding stays under a third of the work.

    Worked out on the host, in numpy: the device would have to be asked how many places there are, and a fake one would not know.

    Args:
        queries: of each chunk; the chunks lie end to end.
        before: int64, of each chunk, the rows it sees before its own; None: there are none.
    """
    starts = list(accumulate(queries, initial=0))
    seen = [b""] * len(queries) if before is None else [rows.tobytes() for rows in before]
    left = sorted((n for n, length in enumerate(queries) if length), key=lambda n: (seen[n], queries[n], starts[n]))
    parts, rows = [], []

    def moved(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    while left:
        longest = queries[left[-1]]
        alike = [n for n in left if seen[n] == seen[left[-1]] and 3 * queries[n] >= 2 * longest]
        chosen = set(alike)
        left = [n for n in left if n not in chosen]
        lengths, first = (np.array([values[n] for n in alike])[:, None] for values in (queries, starts))
        column = np.arange(longest)
        padding_BL = column >= lengths
        own = before[alike[0]] if before is not None else np.zeros(0, np.int64)
        parts.append(
            Bucket(
                len(alike),
                longest,
                moved(padding_BL) if padding_BL.any() else None,
                moved(own) if len(own) else None,
            )
        )
        rows.append((first + np.minimum(column, lengths - 1), padding_BL))
    rows_F, padding_F = (np.concatenate([part[place].ravel() for part in rows]) for place in (0, 1))
    if len(rows_F) == starts[-1] and (rows_F == np.arange(len(rows_F))).all():
        return Buckets(tuple(parts), None)
    real = np.flatnonzero(~padding_F)
    places_T = real[np.argsort(rows_F[real])]
    return Buckets(tuple(parts), Order(moved(rows_F), moved(places_T), moved(np.flatnonzero(padding_F))))


def attend_in_buckets(
    query: Tensor, key: Tensor, value: Tensor, pair: Tensor | None, buckets: Buckets, *, causal: bool
) -> Tensor:
    """query [T, N, D], key and value [T, G, D] → [T, N, D].

    Args:
        pair: [U, G, 2 D], keys and values of the rows that stand before some chunk; None: none do.
    """
    order, parts = buckets.order, []
    if order is not None:
        query, key, value = (_ToBuckets.apply(x, order.rows_F, order.places_T) for x in (query, key, value))
    sizes = [bucket.chunks * bucket.longest for bucket in buckets.parts]
    for bucket, heads, keys, values in zip(buckets.parts, *(x.split(sizes) for x in (query, key, value)), strict=True):
        before = _Taken.apply(pair, bucket.before_P) if bucket.before_P is not None else None
        seen = bucket.longest + (0 if before is None else len(before))
        small = not query.is_cuda and len(heads) * seen * query.shape[1] <= PLAIN_SCORES
        parts.append((_plain if small else _fused)(heads, keys, values, before, bucket, causal))
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found if order is None else _FromBuckets.apply(found, order)


# torch's own gradient of index_select adds element by element. These know that every row is taken once, and that padding gets no gradient: its
# results are dropped, and no other query sees its keys.


class _ToBuckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_F: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        return x.index_select(0, rows_F)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _FromBuckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.places_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].index_select(0, ctx.order.rows_F).index_fill_(0, ctx.order.padding_X, 0), None


class _Taken(torch.autograd.Function):
    """x[rows], each row once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], gradient), None


def _fused(query: Tensor, key: Tensor, value: Tensor, before: Tensor | None, bucket: Bucket, causal: bool) -> Tensor:
    """query [B · L, N, D], key and value [B · L, G, D], before [P, G, 2 D] → [B · L, N, D]."""
    shape = bucket.chunks, bucket.longest
    heads, keys, values = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
    mask = None
    if before is not None:
        early = before.transpose(0, 1).expand(bucket.chunks, -1, -1, -1).chunk(2, dim=-1)
        keys, values = (torch.cat(pieces, dim=2) for pieces in zip(early, (keys, values), strict=True))
        mask = torch.ones(bucket.longest, keys.shape[2], dtype=torch.bool, device=query.device).tril(len(before))
    elif bucket.padding_BL is not None and not causal:  # else it stands behind every real query
        mask = ~bucket.padding_BL[:, None, None]
    out = F.scaled_dot_product_attention(
        heads,
        keys,
        values,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)


def _plain(query: Tensor, key: Tensor, value: Tensor, before: Tensor | None, bucket: Bucket, causal: bool) -> Tensor:
    """The same, written out: for short chunks torch's CPU kernel, its backward above all, takes twice as long.

    All chunks' queries see the keys before in one product, [B · R · L, D] against [P, D] of each key head.
    """
    chunks, longest, groups, size = bucket.chunks, bucket.longest, key.shape[1], query.shape[2]
    # Query heads that share a key head stand side by side.
    heads = query.view(chunks, longest, groups, -1, size).permute(2, 0, 3, 1, 4).reshape(groups * chunks, -1, size)
    keys, values = (x.view(chunks, longest, groups, size).permute(2, 0, 1, 3).flatten(0, 1) for x in (key, value))
    hidden = torch.zeros(1, 1, device=query.device, dtype=query.dtype)
    if causal:
        hidden = torch.full((longest, longest), float("-inf"), device=query.device, dtype=query.dtype).triu(1)
        hidden = hidden.repeat(heads.shape[1] // longest, 1)
    elif bucket.padding_BL is not None:
        hidden = torch.zeros(bucket.padding_BL.shape, device=query.device, dtype=query.dtype)
        hidden = hidden.masked_fill(bucket.padding_BL, float("-inf"))[:, None].repeat(groups, 1, 1)
    scores = torch.baddbmm(hidden, heads, keys.transpose(1, 2), alpha=size**-0.5)
    if before is None:
        out = torch.bmm(_softmax(scores), values)
    else:
        keys_P, values_P = before.transpose(0, 1).chunk(2, dim=-1)
        folded = heads.view(groups, -1, size)  # [G, B · R · L, D]
        early = torch.baddbmm(hidden[:1, :1], folded, keys_P.transpose(1, 2), alpha=size**-0.5)
        weights = _softmax(torch.cat((early.view(*scores.shape[:2], -1), scores), dim=-1))
        early, own = weights.split((len(before), longest), dim=-1)
        out = torch.bmm(early.reshape(groups, -1, len(before)), values_P).view(heads.shape)
        out = torch.baddbmm(out, own, values)
    return out.view(groups, chunks, -1, longest, size).permute(1, 3, 0, 2, 4).reshape(query.shape)


def _softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(-1).to(scores.dtype)  # in fp32, as the fused kernels do
