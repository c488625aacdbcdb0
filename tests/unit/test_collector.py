"""The collector's rules on plain callables: filter, dynamic sampling, surplus, ages, counts. Real engines: tests/system."""

import gc
import logging
import pickle
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eureka_megatron.config import make_config
from eureka_megatron.rollout.collector import Collector
from eureka_megatron.rollout.engine import request_seeds
from eureka_megatron.types import Group, Picture, Prompt, Rollout

SAMPLES = 4


class Numbers:
    """A stream of prompts named 0, 1, 2, …; the answer is how many of the four samples shall be right."""

    def __init__(self, right: list[int]) -> None:
        self.right, self.place = right, 0

    def next(self, n: int) -> list[Prompt]:
        places = range(self.place, self.place + n)
        self.place += n
        return [
            Prompt(str(i), "", str(self.right[i % len(self.right)]), np.arange(3), np.zeros((3, 3), int))
            for i in places
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Pool(SimpleNamespace):
    """Samples "right" as often as the answer says."""

    def __init__(self) -> None:
        super().__init__(version=0, calls=[])

    def generate(self, prompts: Any, *, n: int, **options: Any) -> list[Group]:
        self.calls.append({"n": n, "prompts": len(prompts)} | options)
        return [Group(p, tuple(self._rollout(k < int(p.answer), k) for k in range(n))) for p in prompts]

    def _rollout(self, right: bool, k: int) -> Rollout:
        text = "right" if right else "wrong"
        return Rollout(
            np.arange(k + 1), np.zeros(k + 1, np.float32), text, "length" if k == 3 else "stop", self.version
        )


def judge(samples: list[dict[str, Any]]) -> list[dict[str, float]]:
    rights = [float(sample["response"] == "right") for sample in samples]
    return [{"accuracy": right, "format": 1.0, "total": right + 0.5} for right in rights]


def make(right: list[int], prompts_per_step: int = 4, **rule: Any) -> tuple[Collector, Pool, Numbers]:
    config = make_config(
        {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "rollout": {"samples_per_prompt": SAMPLES, "temperature": 0.7, "max_response_tokens": 99},
            "training": {"prompts_per_step": prompts_per_step, "responses_per_update": SAMPLES},
            "algorithm": {"filter": rule},
        }
    )
    pool, stream = Pool(), Numbers(right)
    return Collector(pool, judge, stream, config), pool, stream


def ids(groups: list[Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def test_groups_outside_the_bounds_are_dropped_and_sampling_goes_on_until_there_are_enough() -> None:
    collector, pool, _ = make([0, 2, 4, 1])  # of each four, two are mixed
    groups = collector.collect(0)
    assert ids(groups) == ["1", "3", "5", "7"]
    assert len(pool.calls) == 2
    assert collector.metrics["filter/all_wrong"] == 2
    assert collector.metrics["filter/mixed"] == 4
    assert collector.metrics["filter/all_right"] == 2
    assert collector.metrics["filter/kept"] == 4
    assert collector.metrics["rollout/generation_batches"] == 2
    assert collector.metrics["train/accuracy_rewards_original"] == pytest.approx((0 + 2 + 4 + 1) / 16)


def test_the_mean_of_each_part_of_the_rewards_is_over_all_responses_of_the_step() -> None:
    collector, *_ = make([0, 2, 4, 1])
    collector.collect(0)
    assert collector.metrics["rewards/accuracy"] == (0 + 2 + 4 + 1) / 16
    assert collector.metrics["rewards/format"] == 1.0
    assert collector.metrics["rollout/reward"] == collector.metrics["rewards/accuracy"] + 0.5
    assert "rewards/total" not in collector.metrics


def test_bounds_are_inclusive() -> None:
    collector, *_ = make([0, 1, 3, 4], lower=0.25, upper=0.75, prompts_per_step=2)
    assert ids(collector.collect(0)) == ["1", "2"]


def test_rewards_reach_their_own_rollouts() -> None:
    collector, *_ = make([2])
    for group in collector.collect(0):
        assert [rollout.rewards["accuracy"] for rollout in group.rollouts] == [1, 1, 0, 0]
        assert [rollout.text for rollout in group.rollouts] == ["right", "right", "wrong", "wrong"]
        assert group.rewards("total").tolist() == [1.5, 1.5, 0.5, 0.5]


def test_surplus_groups_wait_for_the_next_step_with_their_version() -> None:
    collector, pool, _ = make([0, 2, 2, 2])  # three of four are kept: six after two batches
    assert ids(collector.collect(0)) == ["1", "2", "3", "5"]
    assert collector.metrics["filter/in_buffer"] == 2
    pool.version = 1
    groups = collector.collect(1)
    assert ids(groups) == ["6", "7", "9", "10"]
    assert [group.rollouts[0].weight_version for group in groups] == [0, 0, 1, 1]
    assert collector.metrics["filter/from_buffer"] == 2
    assert collector.metrics["rollout/generation_batches"] == 1


def test_groups_older_than_the_limit_are_dropped_and_counted() -> None:
    collector, pool, _ = make([0, 2, 2, 2])
    collector.collect(0)
    pool.version = 2  # the limit is one version
    groups = collector.collect(1)
    assert {group.rollouts[0].weight_version for group in groups} == {2}
    assert collector.metrics["filter/dropped_old"] == 2
    assert collector.metrics["filter/from_buffer"] == 0


def test_generation_is_bounded_and_what_there_is_is_used() -> None:
    collector, pool, _ = make([0, 0, 0, 2], max_generation_batches=3)
    assert ids(collector.collect(0)) == ["3", "7", "11"]
    assert len(pool.calls) == 3
    assert collector.metrics["filter/skipped"] == 0


def test_a_step_with_too_few_groups_is_skipped_with_a_warning_that_names_the_filter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    collector, pool, _ = make([0, 0, 4, 2], max_generation_batches=2, min_groups=3)
    with caplog.at_level(logging.WARNING):
        assert collector.collect(5) == []
    assert "step 5 skipped: algorithm.filter (0.1 <= accuracy <= 0.9) left 2 groups" in caplog.text
    assert "4 all wrong, 2 mixed, 2 all right" in caplog.text
    assert collector.metrics["filter/skipped"] == 1
    assert ids(collector.collect(6)) == ["3", "7", "11", "15"]  # the two are not lost
    assert len(pool.calls) == 4


@pytest.mark.parametrize("rule", [{"enabled": False}, {"freezing_steps": 3}])
def test_without_the_filter_every_group_is_kept_but_counted(rule: dict[str, Any]) -> None:
    collector, pool, _ = make([0, 4], **rule)
    assert ids(collector.collect(3)) == ["0", "1", "2", "3"]
    assert len(pool.calls) == 1
    assert (collector.metrics["filter/all_wrong"], collector.metrics["filter/all_right"]) == (2, 2)


def test_the_filter_acts_once_the_step_exceeds_freezing_steps() -> None:
    collector, *_ = make([0, 2], freezing_steps=3)
    assert ids(collector.collect(3)) == ["0", "1", "2", "3"]
    assert ids(collector.collect(4)) == ["5", "7", "9", "11"]


def test_a_resumed_collector_goes_on_as_if_nothing_had_happened() -> None:
    collector, *_ = make([0, 2, 2, 2])
    collector.collect(0)
    state = pickle.loads(pickle.dumps(collector.state_dict()))
    expected = collector.collect(1)
    resumed, pool, _ = make([0, 2, 2, 2])
    resumed.load_state_dict(state)
    assert ids(resumed.collect(1)) == ids(expected)
    seeds = [call["seed"] for call in pool.calls]
    assert len(seeds) == 1


def test_every_batch_of_every_step_has_its_own_seed_and_a_repeated_run_the_same() -> None:
    def seeds() -> list[int]:
        collector, pool, _ = make([0, 0, 0, 2])
        collector.collect(0)
        collector.collect(1)
        return [call["seed"] for call in pool.calls]

    assert len(set(seeds())) == 8
    assert seeds() == seeds()


def test_sampling_options_come_from_the_configuration() -> None:
    collector, pool, _ = make([2])
    collector.collect(0)
    call = {key: value for key, value in pool.calls[0].items() if key not in ("seed", "seen")}
    assert call == {"n": SAMPLES, "prompts": 4, "temperature": 0.7, "top_p": 1.0, "max_tokens": 99}


def test_evaluation_judges_without_touching_filter_buffer_or_stream() -> None:
    collector, pool, stream = make([0, 2, 2, 2])
    collector.collect(0)
    place, state = stream.place, collector.state_dict()
    prompts = Numbers([1, 0]).next(6)
    figures = collector.evaluate(prompts, n=2)
    assert figures == {
        "accuracy": 3 / 12,
        "format": 1.0,
        "total": 0.75,
        "response_length": 1.5,
        "truncated": 0.0,
        "samples": 12.0,
    }
    assert pool.calls[-1]["temperature"] == 1.0
    assert (stream.place, collector.state_dict()) == (place, state)
    assert collector.evaluate(prompts, n=2) == figures
    assert pool.calls[-1]["seed"] == pool.calls[-2]["seed"]
    assert collector.evaluate([]) == {"samples": 0.0}


def test_an_evaluation_forgets_its_prompts_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the test set, and figures and seeds are those of all prompts at once."""
    monkeypatch.setattr("eureka_megatron.rollout.collector.EVALUATION_BYTES", 5 * 3 * 56 * 56 + 4000)
    collector, pool, _ = make([2])
    alive: list[weakref.ref] = []
    most, seeds = 0, []

    def decoded(number: int) -> Prompt:
        picture = Picture("k", Image.new("RGB", (56, 56)), (1, 4, 4), torch.zeros(16, 1176), *[np.arange(4)] * 4)
        alive.append(weakref.ref(picture.image))
        return Prompt(f"p{number % 7}", "", str(number % 3), np.arange(3), np.zeros((3, 3), int), (picture,), (0,))

    sample = pool.generate

    def generate(prompts: Any, *, seed: int, seen: Counter[str], **options: Any) -> list[Group]:
        nonlocal most
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        assert not any(len(picture.patches_PD) for prompt in prompts for picture in prompt.pictures)
        seeds.extend(request_seeds(prompts, seed, seen))
        return sample(prompts, **options)

    pool.generate = generate
    figures = collector.evaluate(map(decoded, range(40)), n=2)
    assert (len(alive), most) == (40, 6)  # a part, and the one that did not go into it
    assert len(pool.calls) == 8
    parts = list(seeds)
    seeds.clear()
    monkeypatch.setattr("eureka_megatron.rollout.collector.EVALUATION_BYTES", 2**40)
    assert collector.evaluate(map(decoded, range(40)), n=2) == figures
    assert len(pool.calls) == 9
    assert seeds == parts
    assert len(set(seeds)) == 40
