"""Causal attention of one packed row whose tokens are shared among context-parallel ranks.

Keys and values are gathered, queries stay: with grouped-query attention keys and values are a small part of the row, and one collective
forward and one backward are all there is to it (as in Llama 3, arXiv:2407.21783, section 3.3.2). Each rank owns chunks r and
2·size − 1 − r of every sequence, so that all have the same number of scores to compute.

Shapes: T rows of the packed row, t = T / ranks rows of this rank, N query and K key-value heads of this rank, D head size.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from eureka_megatron.types import ContextShare


@dataclass(frozen=True)
class QueryChunk:
    """Queries `start … end` of this rank's rows; they end where the first `keys` rows from `first` on of the packed row end."""

    start: int
    end: int
    first: int
    keys: int


def query_chunks(segments: list[int], share: ContextShare) -> list[QueryChunk]:
    """Two a sequence, in the order of this rank's rows; `segments` are the sequences' lengths."""
    chunks, first, start = [], 0, 0
    for length in segments:
        size = length // (2 * share.size)
        for place in (share.rank, 2 * share.size - 1 - share.rank):
            if size:
                chunks.append(QueryChunk(start, start + size, first, (place + 1) * size))
                start += size
        first += length
    return chunks


def gather_context(rows_t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows end to end [T, …]; the gradient of each is summed over the ranks, for each uses them for its own queries."""
    return gather_from_sequence_parallel_region(rows_t, tensor_parallel_output_grad=True, group=group)


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: list[int], share: ContextShare, group: dist.ProcessGroup
) -> Tensor:
    """query [t, N, D], key and value [t, K, D] of this rank's rows → [t, N, D]. Causal within each of the `segments`."""
    pair = gather_context(torch.cat((key, value), dim=-1), group)  # one collective for both
    order = share.order_T
    chunks = query_chunks(segments, share)
    if query.is_cuda and query.dtype != torch.float32:
        return _flash(query, pair, chunks, order)
    parts = []
    for chunk in chunks:
        keys, values = pair.index_select(0, order[chunk.first : chunk.first + chunk.keys]).chunk(2, dim=-1)
        parts.append(_one(query[chunk.start : chunk.end], keys, values))
    return torch.cat(parts)


def _one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[q, N, D] against [k, K, D], the last query seeing all k keys."""
    q, k = len(query), len(key)
    # Query i is row k − q + i of its sequence.
    mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)
    heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    return out[0].transpose(0, 1)


def _flash(query: Tensor, pair: Tensor, chunks: list[QueryChunk], order: Tensor) -> Tensor:
    """The same by variable-length flash attention, which aligns causality at the end of the keys. Not yet run on hardware."""
    from eureka_megatron.models.qwen2_5_vl.varlen import varlen_attention  # seconds to import: only where it is used

    rows = torch.cat([order[chunk.first : chunk.first + chunk.keys] for chunk in chunks])
    key, value = pair.index_select(0, rows).chunk(2, dim=-1)

    def cumulative(lengths: list[int]) -> Tensor:
        return F.pad(torch.tensor(lengths, device=query.device).cumsum(0), (1, 0)).int()

    queries, keys = [chunk.end - chunk.start for chunk in chunks], [chunk.keys for chunk in chunks]
    return varlen_attention(
        query, key, value, cumulative(queries), cumulative(keys), max(queries), max(keys), causal=True
    )
