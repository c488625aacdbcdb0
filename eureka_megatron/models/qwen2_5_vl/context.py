"""Causal attention of one packed row whose tokens are shared among context-parallel ranks.

Keys and values are gathered, queries stay: with grouped-query attention keys and values are a small part of the row, and one collective
forward and one backward are all there is to it (as in Llama 3, arXiv:2407.21783, section 3.3.2). Each rank owns chunks r and
2·size − 1 − r of every sequence, so that all have the same number of scores to compute.

Shapes: T rows of the packed row, t = T / ranks rows of this rank, N query and K key-value heads of this rank, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl.varlen import Spans, varlen_attention
from eureka_megatron.parallel.runtime import to_device
from eureka_megatron.types import ContextShare


@dataclass(frozen=True)
class QueryPlan:
    """This rank's queries in chunks, two a sequence, each with the keys it sees; the last query of a chunk sees the last of its keys.

    Lengths are known on the host and there once a micro-batch: every layer uses the same plan. Example: one sequence of 8 tokens on two
    ranks, four chunks of 2.

        rank 0, chunks 0 and 3:  queries  0 1 · · · · 6 7     keys of chunk 0: 0 … 1,  of chunk 3: 0 … 7
        rank 1, chunks 1 and 2:  queries  · · 2 3 4 5 · ·     keys of chunk 1: 0 … 3,  of chunk 2: 0 … 5
    """

    # rows of each chunk, in the order of this rank's rows
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    # int64 [sum of keys]: where the chunks' keys stand when the ranks' rows are laid end to end
    rows: Tensor
    # the same lengths on the device
    query_spans: Spans
    key_spans: Spans


def query_plan(segments: Sequence[int], share: ContextShare) -> QueryPlan:
    """For a packed row of sequences of these lengths."""
    queries, keys, rows, first = [], [], [], 0
    for length in segments:
        size = length // (2 * share.size)
        for place in (share.rank, 2 * share.size - 1 - share.rank):
            if size:
                queries.append(size)
                keys.append((place + 1) * size)
                rows.append(share.order_T[first : first + keys[-1]])
        first += length

    def spans(lengths: list[int]) -> Spans:
        cu = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), share.order_T.device)
        return Spans(cu, max(lengths, default=0))

    return QueryPlan(tuple(queries), tuple(keys), torch.cat(rows), spans(queries), spans(keys))


def attend(query: Tensor, key: Tensor, value: Tensor, plan: QueryPlan, group: dist.ProcessGroup) -> Tensor:
    """query [t, N, D], key and value [t, K, D] of this rank's rows → [t, N, D]. Causal within each sequence of the plan."""
    # All ranks' rows end to end, in one collective for both; the gradient of each row is summed over the ranks that use it.
    pair = torch.cat((key, value), dim=-1)
    pair = gather_from_sequence_parallel_region(pair, tensor_parallel_output_grad=True, group=group)
    on_gpu = query.is_cuda and query.dtype != torch.float32
    return (_flash if on_gpu else _chunks)(query, pair, plan)


def _chunks(query: Tensor, pair: Tensor, plan: QueryPlan) -> Tensor:
    """Chunk by chunk, against keys and values of all ranks' rows."""
    parts = []
    for own, rows in zip(query.split(plan.queries), plan.rows.split(plan.keys), strict=True):
        keys, values = pair.index_select(0, rows).chunk(2, dim=-1)
        parts.append(_chunk(own, keys, values))
    return torch.cat(parts)


def _chunk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[q, N, D] against [k, K, D], the last query seeing all k keys."""
    q, k = len(query), len(key)
    # Query i is row k − q + i of its sequence.
    mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)
    heads, keys, values = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _flash(query: Tensor, pair: Tensor, plan: QueryPlan) -> Tensor:
    """The same by variable-length flash attention, which aligns causality at the end of the keys. Not yet run on hardware."""
    key, value = pair.index_select(0, plan.rows).chunk(2, dim=-1)
    return varlen_attention(query, key, value, plan.query_spans, plan.key_spans, causal=True)
