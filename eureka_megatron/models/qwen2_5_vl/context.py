"""Causal attention where queries see more than the rows of their own segment that are here.

Responses that share their prompt see its keys and their own. Where context-parallel ranks share the tokens of a row, keys and values are
gathered, queries stay: with grouped-query attention keys and values are a small part of the row, and one collective
forward and one backward are all there is to it (as in Llama 3, arXiv:2407.21783, section 3.3.2). Each rank owns chunks r and
2·size − 1 − r of every sequence, so that all have the same number of scores to compute.

Shapes: T rows of the packed row, t = T / ranks rows of this rank, N query and K key-value heads of this rank, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl.buckets import Buckets, attend_in_buckets, make_buckets
from eureka_megatron.models.qwen2_5_vl.varlen import Spans, varlen_attention
from eureka_megatron.parallel.mirrored import mirrored_rows, order_of
from eureka_megatron.parallel.runtime import to_device
from eureka_megatron.types import ContextShare


@dataclass(frozen=True)
class QueryPlan:
    """Queries in chunks, each with the keys it sees; the last query of a chunk sees the last of its keys.

    Lengths are known on the host and there once a micro-batch: every layer uses the same plan. Example: one sequence of 8 tokens on two
    ranks, four chunks of 2.

        rank 0, chunks 0 and 3:  queries  0 1 · · · · 6 7     keys of chunk 0: 0 … 1,  of chunk 3: 0 … 7
        rank 1, chunks 1 and 2:  queries  · · 2 3 4 5 · ·     keys of chunk 1: 0 … 3,  of chunk 2: 0 … 5

    A prompt of 3 tokens and two responses to it, of 4 and 2, on one rank: chunks of 3, 4 and 2 queries.

        rows   0 1 2 3 4 5 6 7 8     keys of chunk 0: 0 1 2,  of chunk 1: 0 1 2 3 4 5 6,  of chunk 2: 0 1 2 7 8
    """

    # rows of each chunk, in the order of this rank's rows
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    # int64 [sum of keys]: where the chunks' keys stand when the ranks' rows are laid end to end
    rows: Tensor
    # the same lengths on the device
    query_spans: Spans
    key_spans: Spans
    # of each chunk, the keys before its own; on the host
    before: tuple[np.ndarray, ...]

    @cached_property
    def buckets(self) -> Buckets:
        return make_buckets(self.queries, self.rows.device, self.before)


def query_plan(
    segments: Sequence[int],
    share: ContextShare | None = None,
    prefixes: Sequence[tuple[int, int]] = (),
    *,
    device: torch.device | None = None,
) -> QueryPlan:
    """For a packed row of segments of these lengths.

    Args:
        share: which of the rows are here; None: all.
        prefixes: (first row, rows) that each segment sees besides its own; empty: none does.
        device: of the plan's tensors; None: the share's.
    """
    ranks, rank = (1, 0) if share is None else (share.size, share.rank)
    if share is None:  # every row stands where it is
        order_T = np.arange(sum(segments))
    else:
        order_T = order_of(mirrored_rows(segments, ranks)) if share.places_T is None else share.places_T
    queries, keys, places, before, first = [], [], [], [], 0
    for number, length in enumerate(segments):
        start, count = prefixes[number] if prefixes else (0, 0)
        size = length if share is None else length // (2 * ranks)
        for place in (0,) if share is None else (rank, 2 * ranks - 1 - rank):
            if size:
                queries.append(size)
                keys.append(count + (place + 1) * size)
                own = order_T[first : first + (place + 1) * size]
                before.append(np.concatenate((order_T[start : start + count], own[: place * size])))
                places += [before[-1], own[place * size :]]
        first += length
    device = device if device is not None else (share.order_T.device if share is not None else torch.device("cpu"))

    def spans(lengths: list[int]) -> Spans:
        cu = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
        return Spans(cu, max(lengths, default=0))

    rows = to_device(torch.from_numpy(np.concatenate(places)), device)
    return QueryPlan(tuple(queries), tuple(keys), rows, spans(queries), spans(keys), tuple(before))


def attend(query: Tensor, key: Tensor, value: Tensor, plan: QueryPlan, group: dist.ProcessGroup | None) -> Tensor:
    """query [t, N, D], key and value [t, K, D] of this rank's rows → [t, N, D]. Causal within each chunk of the plan.

    Args:
        group: the ranks that have the other rows; None: all are here.
    """
    # All ranks' rows end to end, in one collective for both; the gradient of each row is summed over the ranks that use it.
    pair = torch.cat((key, value), dim=-1)
    if group is not None:
        pair = gather_from_sequence_parallel_region(pair, tensor_parallel_output_grad=True, group=group)
    if query.is_cuda and query.dtype != torch.float32:
        return _flash(query, pair, plan)
    return _chunks(query, key, value, pair, plan)


def _chunks(query: Tensor, key: Tensor, value: Tensor, pair: Tensor, plan: QueryPlan) -> Tensor:
    """Chunks of like length at once. A chunk's own keys are here; those before it are among all ranks' rows."""
    return attend_in_buckets(query, key, value, pair, plan.buckets, causal=True)


def _flash(query: Tensor, pair: Tensor, plan: QueryPlan) -> Tensor:
    """The same by variable-length flash attention, which aligns causality at the end of the keys. Not yet run on hardware."""
    key, value = pair.index_select(0, plan.rows).chunk(2, dim=-1)
    return varlen_attention(query, key, value, plan.query_spans, plan.key_spans, causal=True)
