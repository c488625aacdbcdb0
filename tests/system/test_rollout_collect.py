"""Data → rollouts → rewards → filter with every real part: processor, engine, judges. One engine for the module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engines import load_reference, private_ray, reference_logprobs, run_config, worst

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def pool(tiny_dir: Path) -> Iterator[Any]:
    from eureka_megatron.rollout.pool import RolloutPool

    with private_ray():
        pool = RolloutPool(run_config(tiny_dir, max_response_tokens=24))
        pool.start()
        yield pool
        pool.shutdown()


@pytest.fixture(scope="module")
def data(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from eureka_megatron.data.counting import write_counting
    from eureka_megatron.data.dataset import load_dataset
    from eureka_megatron.data.processor import Processor

    folder = tmp_path_factory.mktemp("counting")
    processor = Processor(
        tiny_dir, min_pixels=28 * 28, max_pixels=640 * 28 * 28, max_prompt_tokens=128, system_prompt="none"
    )
    return load_dataset(write_counting(folder, train=12, test=4).train, processor)


def test_the_processors_prompts_give_transformers_logprobs(pool: Any, data: Any, tiny_dir: Path) -> None:
    """Its expanded tokens are vLLM's, its pictures pass vLLM's image processor unchanged."""
    prompts = [data[index] for index in range(6)]
    groups = pool.generate(prompts, n=2, temperature=1.0, top_p=1.0, max_tokens=24, seed=0)
    assert all(group.prompt is prompt for group, prompt in zip(groups, prompts, strict=True))
    reference = load_reference(tiny_dir)
    assert worst(reference, tiny_dir, prompts, groups) <= 1e-5
    rollout = groups[0].rollouts[0]
    scores = pool.score([prompts[0]], [rollout.tokens_R])[0]
    assert np.abs(scores - reference_logprobs(reference, tiny_dir, prompts[0], rollout.tokens_R)).max() <= 1e-5


def test_groups_are_collected_with_rewards_from_judge_processes(pool: Any, data: Any) -> None:
    from eureka_megatron.data.dataset import PromptStream
    from eureka_megatron.rewards.judge import JudgePool
    from eureka_megatron.rollout.collector import Collector

    with JudgePool(workers=1) as judges:
        config = pool.config.model_copy(deep=True)
        frozen = config.algorithm.filter.model_copy(update={"freezing_steps": 0})
        config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"filter": frozen})})
        collector = Collector(pool, judges.judge, PromptStream(data), config)
        groups = collector.collect(0)  # the filter does not act yet
        assert len(groups) == 4
        for group in groups:
            assert [set(rollout.rewards) >= {"accuracy", "format", "total"} for rollout in group.rollouts] == [
                True,
                True,
            ]
        assert collector.metrics["filter/all_wrong"] == 4  # an untrained model
        assert collector.metrics["rollout/tokens_per_second"] > 0
        assert collector.collect(1) == []
        assert collector.metrics["rollout/generation_batches"] == 10
        figures = collector.evaluate([data[index] for index in range(4)])
    assert figures["samples"] == 4
    assert figures["accuracy"] == 0
