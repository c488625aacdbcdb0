"""What a rollout step's micro-batches need before the first update: old and reference log-probabilities, and token-level advantages.

All functions are collective: every rank calls them with its own micro-batches, and takes the same path, for it is decided by the whole
batch's samples. Log-probabilities exist on ranks of the last stage only; elsewhere micro-batches pass unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.parallel.runtime import Parallel, to_device
from eureka_megatron.rl.losses import Metrics
from eureka_megatron.rl.shaping import Shaping, ShapingInputs, shape
from eureka_megatron.types import MicroBatch, Sample

# Micro-batches → log-probabilities of each, or an empty list on ranks that have none.
ForwardOnly = Callable[[list[MicroBatch]], list[Metrics]]


def with_logprobs(
    batches: list[MicroBatch], samples: Sequence[Sample], forward: ForwardOnly, which: str
) -> list[MicroBatch]:
    """The micro-batches with the present weights' log-probabilities as "old" or "ref" ones, unless all samples bring them."""
    if all(getattr(sample, f"{which}_logprobs_S") is not None for sample in samples):
        return batches
    parts = forward(batches)
    if not parts:
        return batches
    return [
        replace(one, **{f"{which}_logprobs_T": part["logprobs_T"]}) for one, part in zip(batches, parts, strict=True)
    ]


def engine_gap(batches: Sequence[MicroBatch], samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Largest difference between the trainer's and the engine's log-probabilities on fresh rollouts, of this rank's share; float64.

    The metric of the whole system's health. Rollouts kept from an earlier step were sampled from other weights: they differ, and should.
    """
    gap = torch.zeros((), dtype=torch.float64, device=device)
    for one in batches:
        if one.rollout_logprobs_T is None or one.old_logprobs_T is None:
            continue
        fresh = torch.tensor([*(samples[i].weight_lag == 0 for i in one.sample_indices), False])
        counted = to_device(one.mask_T.bool() & fresh[one.sequence_ids_T], device)
        difference = (to_device(one.old_logprobs_T, device) - to_device(one.rollout_logprobs_T, device)).abs()
        gap = torch.maximum(gap, torch.where(counted, difference, 0.0).max().double())
    return gap


def with_shaped_advantages(batches: list[MicroBatch], shaping: Shaping, parallel: Parallel) -> list[MicroBatch]:
    """The micro-batches with advantages token by token, see rl.shaping; unchanged when nothing asks for that."""
    if not shaping.needed or not parallel.last_stage:
        return batches
    inputs = [
        ShapingInputs(
            values_T=one.advantages_T,
            mask_T=one.mask_T,
            sequence_ids_T=one.sequence_ids_T,
            old_logprobs_T=old,
            ref_logprobs_T=ref,
        )
        for one, old, ref in zip(
            batches,
            _on_host([one.old_logprobs_T for one in batches]),
            _on_host([one.ref_logprobs_T for one in batches]),
            strict=True,
        )
    ]

    def over_data(values: Tensor) -> Tensor:
        if parallel.data.size > 1:
            moved = values.to(parallel.device)
            dist.all_reduce(moved, group=parallel.data.group)
            values = moved.to(values.device)
        return values

    return [
        replace(one, advantages_T=values)
        for one, values in zip(batches, shape(inputs, shaping, over_data), strict=True)
    ]


def _on_host(values: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """One for each micro-batch; all in one copy, for which the host has to wait."""
    if any(value is None for value in values):
        return [None] * len(values)
    return torch.cat(list(values)).cpu().split([len(value) for value in values])
