"""A real vLLM engine as a Ray actor: what it samples, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eureka_megatron.errors import UserError
from tests.helpers.engines import (
    Prompts,
    load_reference,
    noise_picture,
    reference_logprobs,
    run_config,
    score,
    worst,
)

pytestmark = pytest.mark.system

OPTIONS: dict[str, Any] = {"n": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def prompts(tiny_dir: Path) -> Prompts:
    return Prompts(tiny_dir)


@pytest.fixture(scope="module")
def reference(tiny_dir: Path) -> Any:
    return load_reference(tiny_dir)


@pytest.fixture(scope="module")
def data(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from eureka_megatron.data.dataset import load_dataset
    from eureka_megatron.data.processor import Processor
    from eureka_megatron.demo.counting import write_counting

    folder = tmp_path_factory.mktemp("counting")
    processor = Processor(
        tiny_dir, min_pixels=28 * 28, max_pixels=640 * 28 * 28, max_prompt_tokens=128, system_prompt="none"
    )
    return load_dataset(write_counting(folder, train=12, test=4).train, processor)


def test_sampled_logprobs_equal_transformers(pool: Any, prompts: Prompts, reference: Any, tiny_dir: Path) -> None:
    mixture = prompts.mixture()
    for temperature in (1.0, 0.6, 2.0, 1.0):
        groups = pool.generate(mixture, **OPTIONS | {"temperature": temperature}, seed=5)
        assert [len(group.rollouts) for group in groups] == [4, 4, 4]
        difference = worst(reference, tiny_dir, mixture, groups, temperature)
        print(f"largest difference to transformers at temperature {temperature}: {difference:.2e}")
        assert difference <= 1e-5  # measured 9.6e-7
    narrow = pool.generate(mixture, **OPTIONS | {"temperature": 0.6, "top_p": 0.3}, seed=5)  # what evaluation may ask
    assert worst(reference, tiny_dir, mixture, narrow, 0.6) <= 1e-5
    greedy = pool.generate(mixture, **OPTIONS | {"n": 1, "temperature": 0}, seed=5)
    assert worst(reference, tiny_dir, mixture, greedy) <= 1e-5


def test_scores_of_given_responses_equal_transformers(
    pool: Any, prompts: Prompts, reference: Any, tiny_dir: Path
) -> None:
    mixture = prompts.mixture()
    responses = [np.array([300, 12, 44, 9]), np.array([7]), np.arange(50, 80)]
    for temperature in (0.5, 1.0):
        scores = score(pool, mixture, responses, temperature)
        for prompt, tokens_R, found in zip(mixture, responses, scores, strict=True):
            assert found.dtype == np.float32
            expected = reference_logprobs(reference, tiny_dir, prompt, tokens_R, temperature)
            assert np.abs(found - expected).max() <= 1e-5


def test_equal_seeds_give_equal_responses_whatever_the_order(pool: Any, prompts: Prompts) -> None:
    mixture = prompts.mixture()
    first = pool.generate(mixture, **OPTIONS, seed=1)
    again = pool.generate(mixture[::-1], **OPTIONS, seed=1)[::-1]
    other = pool.generate(mixture, **OPTIONS, seed=2)
    assert _tokens(first) == _tokens(again)
    assert _tokens(first) != _tokens(other)


def test_samples_of_one_prompt_differ_even_when_it_comes_twice(pool: Any, prompts: Prompts, tiny_dir: Path) -> None:
    # Published sampling defaults would make all of them the likeliest tokens: they must not reach a rollout.
    assert json.loads((tiny_dir / "generation_config.json").read_text())["top_k"] == 1
    prompt = prompts.mixture()[0]
    responses = _tokens(pool.generate([prompt, prompt], **OPTIONS, seed=1))
    flat = [tuple(tokens) for group in responses for tokens in group]
    assert len(set(flat)) == 8


def test_vision_special_tokens_are_never_sampled(pool: Any, prompts: Prompts) -> None:
    # An untrained model gives each of its 400 tokens about equal chances: 4 banned ones would come some 80 times here.
    vision = {
        prompts.tokenizer.convert_tokens_to_ids(f"<|{n}|>")
        for n in ("vision_start", "vision_end", "image_pad", "video_pad")
    }
    groups = pool.generate(prompts.mixture(), **OPTIONS | {"n": 50, "max_tokens": 60, "temperature": 2.0}, seed=3)
    sampled = np.concatenate([rollout.tokens_R for group in groups for rollout in group.rollouts])
    assert len(sampled) > 5000
    assert not vision.intersection(sampled.tolist())


def test_a_response_ends_with_its_end_token_or_at_the_limit(pool: Any, prompts: Prompts, tiny_dir: Path) -> None:
    listed = json.loads((tiny_dir / "generation_config.json").read_text())["eos_token_id"]
    ends = {prompts.tokenizer.convert_tokens_to_ids("<|im_end|>"), *(listed if isinstance(listed, list) else [listed])}
    groups = pool.generate(prompts.mixture(), **OPTIONS | {"n": 40, "max_tokens": 60}, seed=4)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        stopped = rollout.finish_reason == "stop"
        assert (int(rollout.tokens_R[-1]) in ends) == stopped
        assert not ends.intersection(rollout.tokens_R[:-1].tolist())
        assert stopped or len(rollout.tokens_R) == 60
        assert len(rollout.logprobs_R) == len(rollout.tokens_R)
        assert rollout.weight_version == pool.version
        assert "<|im_end|>" not in rollout.text


def test_tokens_that_vllm_expands_differently_are_refused(pool: Any, prompts: Prompts) -> None:
    prompt = prompts.mixture()[0]
    other_size = replace(prompt, pictures=(noise_picture(1, 4, 4),))
    short = replace(other_size, pictures=(replace(other_size.pictures[0], unit_order_U=np.arange(9)),))
    with pytest.raises(UserError, match=r"prompt one: vLLM expands it to \d+ tokens, tokens_S has \d+"):
        pool.generate([short], **OPTIONS, seed=0)


def test_a_prompt_without_room_for_a_response_is_refused(pool: Any, prompts: Prompts) -> None:
    long = prompts.make("long", "circles " * 600)
    with pytest.raises(UserError, match=r"prompt long has .* tokens and leaves no room"):
        pool.generate([long], **OPTIONS, seed=0)


def test_vision_tokens_in_a_given_response_are_refused(pool: Any, prompts: Prompts) -> None:
    with pytest.raises(UserError, match="vision special tokens"):
        score(pool, prompts.mixture()[:1], [np.array([5, prompts.placeholder])])


def test_the_processors_prompts_give_transformers_logprobs(pool: Any, data: Any, tiny_dir: Path) -> None:
    """Its expanded tokens are vLLM's, its pictures pass vLLM's image processor unchanged."""
    prompts = [data[index] for index in range(6)]
    groups = pool.generate(prompts, n=2, temperature=1.0, top_p=1.0, max_tokens=24, seed=0)
    assert all(group.prompt is prompt for group, prompt in zip(groups, prompts, strict=True))
    reference = load_reference(tiny_dir)
    assert worst(reference, tiny_dir, prompts, groups) <= 1e-5
    rollout = groups[0].rollouts[0]
    scores = score(pool, [prompts[0]], [rollout.tokens_R])[0]
    assert np.abs(scores - reference_logprobs(reference, tiny_dir, prompts[0], rollout.tokens_R)).max() <= 1e-5


def test_groups_are_collected_with_rewards_from_judge_processes(pool: Any, data: Any, tiny_dir: Path) -> None:
    from eureka_megatron.data.dataset import PromptStream
    from eureka_megatron.rewards import Rewarder, RewardRules
    from eureka_megatron.rollout.collector import Collector

    with Rewarder(RewardRules(workers=1)) as judges:
        config = run_config(tiny_dir, {"algorithm": {"filter": {"freezing_steps": 0}}}, max_response_tokens=24)
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


def _tokens(groups: Any) -> list[list[list[int]]]:
    return [[rollout.tokens_R.tolist() for rollout in group.rollouts] for group in groups]
