"""The learning rate's schedule reaches its end although the online filter leaves steps short or empty."""

from dataclasses import replace
from pathlib import Path

import pytest

from eureka_megatron.config import OptimizerSection
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Batch
from eureka_megatron.verify import made_up_samples
from tests.helpers.ranks import run_ranks

SECTION = OptimizerSection(name="sgd", lr=1e-3, schedule="linear", warmup_ratio=0.0, min_lr_ratio=0.1)


def rates(rank: int, directory: str, batches: list[Batch], horizon: int) -> list[list[float]]:
    from eureka_megatron.train.trainer import PolicyTrainer

    trainer = PolicyTrainer(directory, init_parallel(rank=rank), optimizer=SECTION)
    trainer.start_phase(SECTION, horizon)
    return [[metrics["actor_lr"] for metrics in trainer.train(batch, "ppo_clip", {})] for batch in batches]


def test_short_steps_do_not_stretch_the_schedule(tiny_dir: Path) -> None:
    samples = tuple(replace(sample, rollout_logprobs_S=None) for sample in made_up_samples(tiny_dir, pictures=((), ())))
    # Three steps of four updates were planned; the second was skipped, the third has two updates.
    full = Batch(samples, ((0,), (1,), (0,), (1,)), scheduled=0)
    short = Batch(samples, ((0,), (1,)), scheduled=8)
    found = run_ranks(rates, 1, str(tiny_dir), [full, short], 12)[0]
    expected = [[1e-3 - 9e-4 * step / 12 for step in steps] for steps in ((1, 2, 3, 4), (9, 10))]
    assert found[0] == pytest.approx(expected[0])
    assert found[1] == pytest.approx(expected[1])
