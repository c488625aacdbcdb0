"""Old log-probabilities come from the first step's own forward pass where they can, and are those that samples could have brought."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.rl.shaping import Shaping
from eureka_megatron.types import Batch, Sample
from eureka_megatron.verify import made_up_samples
from tests.helpers.ranks import run_ranks

SGD = OptimizerSection(name="sgd", lr=1e-2, schedule="constant", warmup_ratio=0.0, clip_grad=0.0)
UPDATES = ((0, 3), (1, 4), (2,))


def learn(rank: int, directory: str, samples: list[Sample], layout: Layout, updates: tuple, how: dict[str, Any]) -> Any:
    """Metrics and weights after a rollout step, with old log-probabilities computed on the way or brought; micro-batches passed forward only."""
    from eureka_megatron.train import step
    from eureka_megatron.train.trainer import PolicyTrainer

    parallel = init_parallel(layout, rank=rank, world_size=torch.distributed.get_world_size())
    passed: list[int] = []
    run_schedule = step.run_schedule

    def counted(chunks: Any, batches: Any, *others: Any, forward_only: bool) -> Any:
        passed.append(len(batches) if forward_only else 0)
        return run_schedule(chunks, batches, *others, forward_only=forward_only)

    reference = directory if "shaping" in how else None
    found = []
    for bring in (False, True):
        trainer = PolicyTrainer(directory, parallel, optimizer=SGD, max_tokens_per_micro_batch=200, reference=reference)
        trainer.start_phase(SGD, 10)
        old = torch.distributed.get_world_size() > 1 or trainer.logprobs(samples)
        with mock.patch.object(step, "run_schedule", counted):
            passed.clear()
            batch = Batch(tuple(_with(samples, old) if bring else samples), updates)
            metrics = trainer.train(batch, "ppo_clip", {}, **how)
        if old is not True:  # as the run's rollouts are stored with
            began = trainer.began_with(len(samples))
            assert sorted(began) == list(range(len(samples)))
            assert trainer.began_with(2).keys() == {0, 1}
            for place, sample in enumerate(samples):
                error = np.abs((began[place].logprobs_S - old[place].numpy()) * sample.mask_S).max()
                assert error <= 1e-6  # measured 0
        weights = {name: tensor.clone() for name, tensor in trainer.hf_weights() if tensor is not None}
        found.append((metrics, weights, sum(passed)))
        if old is True:  # a pipeline's log-probabilities are on its last stage alone: compared with one rank's instead
            break
    return found


def _with(samples: list[Sample], old: list[torch.Tensor]) -> list[Sample]:
    return [replace(sample, old_logprobs_S=values.numpy()) for sample, values in zip(samples, old, strict=True)]


@pytest.fixture(scope="module")
def samples(tiny_dir: Path) -> list[Sample]:
    random = np.random.default_rng(3)
    made = made_up_samples(tiny_dir, seed=5)
    return [
        replace(
            sample,
            advantages_S=(sample.mask_S * random.normal()).astype(np.float32),
            rollout_logprobs_S=(sample.mask_S * -6).astype(np.float32),
        )
        for sample in made
    ]


@pytest.mark.parametrize(
    ("updates", "how", "forward_only"),
    [
        (((0, 1, 2, 3, 4),), {}, 0),
        (((0, 1, 2, 3, 4),), {"passes": 3}, 0),
        (UPDATES, {"passes": 2}, 2),  # micro-batches of the second and third update
        (UPDATES, {"shaping": Shaping(kl_coefficient=0.1)}, 6),  # all three, and those of the reference
    ],
)
def test_no_pass_is_made_for_what_the_first_step_computes_anyway(
    tiny_dir: Path, samples: list[Sample], updates: tuple, how: dict[str, Any], forward_only: int
) -> None:
    (found,) = run_ranks(learn, 1, str(tiny_dir), samples, Layout(), updates, how)
    (metrics, weights, passed), (others, same, brought) = found
    assert (passed, brought) == (forward_only, 3 if "shaping" in how else 0)
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
    for one, other in zip(metrics, others, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    assert metrics[0]["logprob_abs_diff_max"] > 0.1, "of all micro-batches, the first update's too"


@pytest.mark.parametrize(
    "layout", [Layout(pipeline=2), Layout(context=2), Layout(pipeline=2, virtual_pipeline=2)], ids=str
)
def test_other_layouts_find_the_same(tiny_dir: Path, samples: list[Sample], layout: Layout) -> None:
    how = {"passes": 2}
    ((one, _),) = run_ranks(learn, 1, str(tiny_dir), samples, Layout(), UPDATES, how)
    ranks = run_ranks(learn, 2, str(tiny_dir), samples, layout, UPDATES, how)
    metrics = next(found[0][0] for found in ranks if "policy_loss" in found[0][0][0])
    for own, other in zip(metrics, one[0], strict=True):
        assert own.keys() == other.keys()
        error = max(abs(own[name] - other[name]) / max(1.0, abs(other[name])) for name in own)
        print(f"{error:.1e}")
        assert error <= 2e-6  # measured 4.8e-7
