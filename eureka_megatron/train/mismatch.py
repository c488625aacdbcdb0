"""How far the trainer's log-probabilities are from the engine's on fresh rollouts: the figure of the whole system's health.

Rollouts kept from an earlier step were sampled from other weights: they differ, and should. Texts and pictures apart, because they fail for
different reasons: a wrong position or a wrong tower shows in the latter alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.parallel import runtime
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.rl.losses import reduce_metrics
from eureka_megatron.types import MicroBatch, Sample

TAIL_TOKENS = 100  # the tail is what one token in so many reaches: the 99th percentile


def mismatch(
    batches: Sequence[MicroBatch], samples: Sequence[Sample], parallel: Parallel, tokens: float
) -> dict[str, float]:
    """|trainer − engine| in nats over the fresh response tokens of all data-parallel ranks; collective among them.

    Every token counts once, so the figures depend on the layout only by rounding. The host waits once, for all of them.

    Args:
        batches, samples: of this rank's share.
        tokens: learned ones of all ranks, fresh or not: bounds what the tail has to be looked for in.

    Returns:
        "logprob_abs_diff_max", 0 where nothing is compared; then as far as there are such tokens "mismatch/text" and "mismatch/pictures" (means
        over sequences without and with pictures) and "mismatch/tail" (99th percentile).
    """
    device = parallel.device
    sums_4 = torch.zeros(4, dtype=torch.float64, device=device)  # text: sum, tokens; pictures: sum, tokens
    largest = torch.zeros((), dtype=torch.float64, device=device)
    rows: list[Tensor] = []
    for gap_T, shown_T, counted_T in _differences(batches, samples, device):
        for place, chosen_T in ((0, counted_T & ~shown_T), (2, counted_T & shown_T)):
            sums_4[place] += torch.where(chosen_T, gap_T, 0.0).sum(dtype=torch.float64)
            sums_4[place + 1] += chosen_T.sum()
        largest = torch.maximum(largest, torch.where(counted_T, gap_T, 0.0).max().double())
        rows.append(torch.where(counted_T, gap_T, -1.0))
    # Whatever rank they are on, the tokens of the tail are among the largest that each has.
    most = -(-int(tokens) // TAIL_TOKENS)
    top = _largest(torch.cat(rows) if rows else torch.zeros(0, device=device), most)
    if parallel.data.size > 1:
        dist.all_reduce(sums_4, group=parallel.data.group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel.data.group)
        parts = [torch.empty_like(top) for _ in range(parallel.data.size)]
        dist.all_gather(parts, top, group=parallel.data.group)
        top = _largest(torch.cat(parts), most)
    place_1 = ((sums_4[1] + sums_4[3]) / TAIL_TOKENS).ceil().clamp(min=1).long().view(1) - 1
    ones = torch.ones_like(largest)
    numbers = reduce_metrics(  # pairs of a sum and what it is divided by; all in one copy to the host
        [
            {
                "text": sums_4[:2],
                "pictures": sums_4[2:],
                "texts": torch.stack((sums_4[1], ones)),
                "shown": torch.stack((sums_4[3], ones)),
                "tail_max": top.index_select(0, place_1),
                "gap_max": largest,
            }
        ]
    )
    found = {"logprob_abs_diff_max": numbers["gap_max"]}
    if numbers["texts"]:
        found["mismatch/text"] = numbers["text"]
    if numbers["shown"]:
        found["mismatch/pictures"] = numbers["pictures"]
    return found | ({"mismatch/tail": numbers["tail_max"]} if numbers["texts"] or numbers["shown"] else {})


def _differences(
    batches: Sequence[MicroBatch], samples: Sequence[Sample], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each micro-batch that has both: differences fp32 [T], whether the row's sample shows a picture, whether it counts."""
    for batch in batches:
        if batch.rollout_logprobs_T is None or batch.old_logprobs_T is None:
            continue
        fresh = torch.tensor([*(samples[i].weight_lag == 0 for i in batch.sample_indices), False])  # the last: padding
        counted = batch.mask_T.bool() & fresh[batch.sequence_ids_T]
        old, sampled, shown, counted = (
            runtime.to_device(values, device)
            for values in (batch.old_logprobs_T, batch.rollout_logprobs_T, batch.has_image_T, counted)
        )
        yield (old - sampled).abs(), shown, counted


def _largest(values: Tensor, count: int) -> Tensor:
    """The largest so many, in order; −1 where there are fewer."""
    found = values.new_full((count,), -1.0)
    kept = values.topk(min(count, len(values))).values
    found[: len(kept)] = kept
    return found
