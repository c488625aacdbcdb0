"""Trainer against engine: means, the tail and the largest difference are those of all tokens, however these are spread over ranks."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_ranks

RANKS = 2


def made(rows: range) -> tuple[list[Any], list[Any]]:
    """Micro-batches of two sequences each, the first a text, the second with a picture, and their samples; every third sample is old."""
    batches, samples = [], []
    for row in rows:
        random = np.random.default_rng(row)
        sizes = random.integers(30, 60, 2).tolist()
        ids = torch.tensor([0] * sizes[0] + [1] * sizes[1] + [-1] * 3)
        sampled = torch.tensor(random.normal(size=len(ids)), dtype=torch.float32)
        batches.append(
            SimpleNamespace(
                sample_indices=(len(samples), len(samples) + 1),
                sequence_ids_T=ids,
                mask_T=(ids >= 0).float() * torch.tensor(random.random(len(ids)) > 0.3),
                has_image_T=ids == 1,
                rollout_logprobs_T=sampled,
                old_logprobs_T=sampled + torch.tensor(random.normal(size=len(ids)) * 1e-3, dtype=torch.float32),
            )
        )
        samples += [SimpleNamespace(weight_lag=int((2 * row + place) % 3 == 0)) for place in range(2)]
    return batches, samples


def on_a_rank(rank: int, shares: list[range], tokens: float) -> dict[str, float]:
    from eureka_megatron.layout import Layout
    from eureka_megatron.parallel.runtime import init_parallel
    from eureka_megatron.train.mismatch import mismatch

    return mismatch(*made(shares[rank]), init_parallel(Layout(), rank=rank, world_size=len(shares)), tokens)


def by_hand(rows: range) -> tuple[dict[str, float], float]:
    """(figures, learned tokens), by numpy over all tokens at once."""
    gaps: dict[bool, list[float]] = {False: [], True: []}
    learned = 0.0
    for batch, pair in ((batch, samples[2 * k : 2 * k + 2]) for batches, samples in [made(rows)] for k, batch in enumerate(batches)):  # fmt: skip
        learned += float(batch.mask_T.sum())
        for place, sample in enumerate(pair):
            chosen = (batch.mask_T > 0) & (batch.sequence_ids_T == place)
            if sample.weight_lag == 0:
                gaps[place == 1] += (batch.old_logprobs_T - batch.rollout_logprobs_T).abs()[chosen].tolist()
    every = sorted(gaps[False] + gaps[True], reverse=True)
    return {
        "logprob_abs_diff_max": every[0],
        "mismatch/text": float(np.mean(gaps[False])),
        "mismatch/pictures": float(np.mean(gaps[True])),
        "mismatch/tail": every[-(-len(every) // 100) - 1],
    }, learned


@pytest.mark.parametrize("shares", [[range(11)], [range(9), range(9, 11)]], ids=["one rank", "two ranks"])
def test_the_figures_are_those_of_all_fresh_tokens_at_any_layout(shares: list[range]) -> None:
    expected, learned = by_hand(range(11))
    for found in run_ranks(on_a_rank, len(shares), shares, learned):
        assert found == pytest.approx(expected, rel=1e-12)
        assert found["mismatch/tail"] < found["logprob_abs_diff_max"]


def test_what_there_is_nothing_of_is_left_out() -> None:
    from eureka_megatron.train.mismatch import mismatch

    parallel: Any = SimpleNamespace(device=torch.device("cpu"), data=SimpleNamespace(size=1))
    (batch,), samples = made(range(1, 2))
    assert mismatch([], [], parallel, 1.0) == {"logprob_abs_diff_max": 0.0}
    batch.has_image_T[:] = False
    assert mismatch([batch], samples, parallel, 100.0).keys() == {
        "logprob_abs_diff_max",
        "mismatch/text",
        "mismatch/tail",
    }
