"""Attention of packed rows by batches of chunks of like length, in plain torch: what CPUs run, and GPUs in fp32.

A chunk is a run of queries that stand side by side, with the keys it sees. The last of its keys are its queries' own rows; those before are seen
by all of its queries: a shared prompt, or what stands before the chunk in its sequence.

    chunk of 2 queries that sees 5 keys       before        own
                                              k0 k1 k2      q0
                                              k0 k1 k2      q0 q1

Shapes: T rows, N query heads and K key-value heads of this rank, D head size, B chunks side by side, L queries of the longest of them, P keys
before its own, M = P + L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eureka_megatron.parallel.runtime import to_device

# Score elements up to which CPU attention is written out: 64 MiB in fp32.
PLAIN_SCORES = 1 << 24


@dataclass(frozen=True)
class Bucket:
    """B chunks padded to L queries. Padding repeats the chunk's last row; what it computes is dropped.

    Example: segments of 3, 7 and 2 rows side by side, in buckets of like length.

        rows_BL [[3 4 5 6 7 8 9]],  [[0 1 2], [10 11 11]]        11 repeated is padding; `places` of the second: 0 1 2 3 4
    """

    # int64: which rows are the queries
    rows_BL: Tensor
    # int64: which rows are the keys; None: the queries' own
    keys_BM: Tensor | None
    # bool, broadcast to [B, 1, L, M]: who sees whom. With no keys before the own it tells padding alone, and is None without any
    mask: Tensor | None
    # int64: flat indices, within B · L, of queries that are no padding
    places: Tensor


@dataclass(frozen=True)
class Buckets:
    """All chunks of a row."""

    parts: tuple[Bucket, ...]
    # int64: where each query stands in the buckets' places laid end to end
    inverse_T: Tensor


def make_buckets(
    queries: Sequence[int],
    device: torch.device,
    keys: Sequence[int] | None = None,
    rows: np.ndarray | None = None,
) -> Buckets:
    """Chunks of like length side by side, so that padding stays under a third of the work.

    Worked out on the host, in numpy: the device would have to be asked how many places there are, and a fake one would not know.

    Args:
        queries: of each chunk; the chunks lie end to end.
        keys: that each chunk sees, its own included; None: its own alone.
        rows: int64 [sum of keys]: which rows they are, chunk by chunk.
    """
    starts = list(accumulate(queries, initial=0))
    before = [0] * len(queries) if keys is None else [k - q for k, q in zip(keys, queries, strict=True)]
    ends = list(accumulate(queries if keys is None else keys))
    left = [number for number, length in enumerate(queries) if length]
    left.sort(key=lambda number: (queries[number] + before[number], starts[number]))
    parts, firsts = [], []
    while left:
        like = left[-1]
        alike = [n for n in left if _near(queries[n], queries[like]) and _near(before[n], before[like])]
        left = [n for n in left if n not in set(alike)]
        lengths = np.array([queries[n] for n in alike])
        own = np.array([starts[n] for n in alike])
        pieces = [rows[ends[n] - queries[n] - before[n] : ends[n]] for n in alike] if rows is not None else None
        parts.append(_bucket(lengths, own, [before[n] for n in alike], pieces, device))
        firsts += [np.arange(starts[n], starts[n] + queries[n]) for n in alike]
    return Buckets(tuple(parts), to_device(torch.from_numpy(np.argsort(np.concatenate(firsts))), device))


def _near(length: int, other: int) -> bool:
    """Within a factor of 3/2; none is near none alone."""
    return 2 * max(length, other) <= 3 * min(length, other)


def _bucket(
    lengths: np.ndarray, starts: np.ndarray, before: list[int], pieces: list[np.ndarray] | None, device: torch.device
) -> Bucket:
    """Of chunks that start at these rows. `pieces`: the keys of each, None for its own alone."""
    column = np.arange(lengths.max())
    valid_BL = column < lengths[:, None]
    inside_BL = np.minimum(column, lengths[:, None] - 1)
    rows_BL = starts[:, None] + inside_BL
    most = max(before)
    keys_BM = None
    if pieces is not None:
        own_BL = np.array([piece[-length] for piece, length in zip(pieces, lengths, strict=True)])[:, None] + inside_BL
        keys_BM = own_BL
        if most:
            index_P = np.arange(most)
            first = [piece[np.minimum(index_P, count - 1)] for piece, count in zip(pieces, before, strict=True)]
            keys_BM = np.concatenate((np.stack(first), own_BL), axis=1)
    mask = None if valid_BL.all() else valid_BL[:, None, None]
    if most:
        seen_BP = np.arange(most) < np.array(before)[:, None]
        seen_BP = seen_BP[:1] if seen_BP.all() else seen_BP
        causal = np.tri(len(column), dtype=bool)
        shape = (len(seen_BP), 1, len(column))
        mask = np.concatenate(
            (
                np.broadcast_to(seen_BP[:, None, None], (*shape, most)),
                np.broadcast_to(causal, (*shape, len(column))),
            ),
            axis=-1,
        )

    def moved(values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), device)

    return Bucket(
        moved(rows_BL),
        None if keys_BM is None else moved(keys_BM),
        None if mask is None else moved(mask),
        moved(valid_BL.reshape(-1).nonzero()[0]),
    )


def attend_in_buckets(query: Tensor, key: Tensor, value: Tensor, buckets: Buckets, *, causal: bool) -> Tensor:
    """query [T, N, D], key and value [U, K, D] → [T, N, D]."""

    def side_by_side(x: Tensor, rows: Tensor) -> Tensor:
        # index_select, not x[rows]: its backward is an index_add, far cheaper on a CPU than an accumulating index_put.
        return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)

    parts = []
    for bucket in buckets.parts:
        keys_BM = bucket.rows_BL if bucket.keys_BM is None else bucket.keys_BM
        heads, keys, values = (
            side_by_side(x, rows) for x, rows in ((query, bucket.rows_BL), (key, keys_BM), (value, keys_BM))
        )
        scores = keys_BM.numel() * bucket.rows_BL.shape[1] * query.shape[1]
        small = not query.is_cuda and scores <= PLAIN_SCORES
        out = (_plain if small else _fused)(heads, keys, values, _mask(bucket, causal), causal)
        parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.places))
    return torch.cat(parts).index_select(0, buckets.inverse_T)


def _mask(bucket: Bucket, causal: bool) -> Tensor | None:
    """None where causality says all: padding stands behind every real query."""
    before = bucket.keys_BM is not None and bucket.keys_BM.shape != bucket.rows_BL.shape
    return bucket.mask if before or not causal else None


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """query [B, N, L, D], key and value [B, K, M, D] → [B, N, L, D]."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The same, written out: for short chunks torch's CPU kernel, its backward above all, takes twice as long."""
    batch, heads, length, size = query.shape
    groups, seen = key.shape[1:3]
    # Query heads that share a key head stand side by side: [B, K, N/K · L, D] against [B, K, M, D].
    scores = (query.reshape(batch, groups, -1, size) * size**-0.5) @ key.transpose(-1, -2)
    scores = scores.view(batch, heads, length, seen).float()  # softmax in fp32, as the fused kernels do
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif causal:
        scores = scores + torch.full((length, seen), float("-inf"), device=scores.device).triu(1)
    weights = scores.softmax(-1).to(value.dtype).view(batch, groups, -1, seen)
    return (weights @ value).view(batch, heads, length, size)
