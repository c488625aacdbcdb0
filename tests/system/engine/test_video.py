"""Videos through a real vLLM engine and the native trainer: the same tokens, positions and log-probabilities."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.data.batch import make_batch
from eureka_megatron.data.samples import training_sample
from eureka_megatron.types import Batch, Prompt, Sample
from tests.helpers.engines import load_reference, module_source, run_config, score
from tests.helpers.ranks import run_ranks
from tests.helpers.videos import video_prompts

pytestmark = pytest.mark.system

OPTIONS: dict[str, Any] = {"n": 2, "temperature": 1.0, "top_p": 1.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def prompts(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    return video_prompts(tiny_dir, tmp_path_factory.mktemp("clips"))


def trainer_logprobs(rank: int, directory: str, samples: list[Sample], layout: dict, max_tokens: int) -> Any:
    from eureka_megatron.layout import Layout
    from eureka_megatron.parallel.runtime import init_parallel
    from eureka_megatron.train.trainer import PolicyTrainer

    world = torch.distributed.get_world_size()
    parallel = init_parallel(Layout(**layout), rank=rank, world_size=world)
    trainer = PolicyTrainer(directory, parallel, max_tokens_per_micro_batch=max_tokens)
    found = trainer.logprobs(samples)
    return None if found is None else [values.numpy() for values in found]


def by_trainer(
    directory: Path, pairs: list[tuple[Prompt, np.ndarray]], ranks: int = 1, **options: Any
) -> list[np.ndarray]:
    """Log-probabilities of the response tokens of each pair."""
    samples = [training_sample(prompt, tokens_R) for prompt, tokens_R in pairs]
    max_tokens = options.pop("max_tokens", 4096)
    found = run_ranks(trainer_logprobs, ranks, str(directory), samples, options, max_tokens)
    values = next(one for one in found[::-1] if one is not None)
    return [one[len(prompt.tokens_S) :] for one, (prompt, _) in zip(values, pairs, strict=True)]


def learn(rank: int, directory: str, batch: Batch) -> dict[str, float]:
    """One update of the policy, as `eureka train` does it, at TP 2 with sequence parallelism. → its metrics."""
    from eureka_megatron.layout import Layout
    from eureka_megatron.parallel.runtime import init_parallel
    from eureka_megatron.train.trainer import PolicyTrainer

    section = OptimizerSection(lr=1e-4)
    parallel = init_parallel(Layout(tensor=2, sequence_parallel=True), rank=rank)
    trainer = PolicyTrainer(directory, parallel, optimizer=section)
    trainer.start_phase(section, 10)
    return trainer.train(batch, "ppo_clip", {})[0]


def worst(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def pairs(pool: Any, prompts: list[Prompt]) -> list[tuple[Prompt, Any]]:
    groups = pool.generate(prompts, **OPTIONS, seed=3)
    return [(group.prompt, rollout) for group in groups for rollout in group.rollouts]


@pytest.fixture(scope="module")
def ours(pairs: list[tuple[Prompt, Any]], tiny_dir: Path) -> list[np.ndarray]:
    return by_trainer(tiny_dir, [(prompt, rollout.tokens_R) for prompt, rollout in pairs])


def test_vllm_gives_videos_the_positions_of_the_data_layer(pool: Any, prompts: list[Prompt]) -> None:
    import ray

    for prompt in prompts:
        found = ray.get(pool.actors[0].positions.remote(prompt))
        np.testing.assert_array_equal(found[:, :-1], prompt.positions_3S)
        assert (found[:, -1] == prompt.next_position).all()
    assert prompts[0].next_position != prompts[1].next_position  # equal frames, told apart by vLLM's caches


def test_sampled_logprobs_are_those_of_the_trainer(pairs: list[tuple[Prompt, Any]], ours: list[np.ndarray]) -> None:
    difference = worst(ours, [rollout.logprobs_R for _, rollout in pairs])
    print(f"trainer against vLLM, sampled tokens: {difference:.1e}")
    assert difference <= 1e-5  # measured 9.5e-7


def test_scores_of_given_responses_are_those_of_the_trainer(
    pool: Any, pairs: list[tuple[Prompt, Any]], ours: list[np.ndarray]
) -> None:
    scores = score(pool, [prompt for prompt, _ in pairs], [rollout.tokens_R for _, rollout in pairs])
    difference = worst(ours, scores)
    print(f"trainer against vLLM, given tokens: {difference:.1e}")
    assert difference <= 1e-5  # measured 9.5e-7


def test_layout_and_packing_change_nothing(
    pairs: list[tuple[Prompt, Any]], ours: list[np.ndarray], tiny_dir: Path
) -> None:
    chosen = [(prompt, rollout.tokens_R) for prompt, rollout in pairs]
    longest = max(len(prompt.tokens_S) + len(tokens_R) for prompt, tokens_R in chosen)
    for ranks, options in ((1, {"max_tokens": longest}), (2, {"tensor": 2, "sequence_parallel": True})):
        difference = worst(by_trainer(tiny_dir, chosen, ranks, **dict(options)), ours)
        print(f"{options}: {difference:.1e}")
        assert difference <= 1e-5  # measured 9.5e-7


def test_reinforcement_learning_uses_the_rollouts_it_was_given(
    pool: Any, prompts: list[Prompt], tiny_dir: Path
) -> None:
    groups = pool.generate(prompts, **OPTIONS, seed=4)
    judged = [
        replace(group, rollouts=tuple(replace(r, rewards={"total": float(n)}) for n, r in enumerate(group.rollouts)))
        for group in groups
    ]
    config = run_config(tiny_dir)
    config = config.model_copy(update={"training": config.training.model_copy(update={"responses_per_update": 12})})
    metrics = run_ranks(learn, 2, str(tiny_dir), make_batch(judged, config, 0, 0))[0]
    assert metrics["logprob_abs_diff_max"] <= 1e-5  # measured 9.5e-7
    assert metrics["grad_norm"] > 0


def test_after_a_changed_vision_tower_the_same_videos_agree_again(
    pool: Any, pairs: list[tuple[Prompt, Any]], ours: list[np.ndarray], tiny_dir: Path, tmp_path: Path
) -> None:
    import shutil

    from eureka_megatron.sync.ray_transfer import send_weights

    model = load_reference(tiny_dir)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visual" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    shutil.copytree(tiny_dir, tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf")
    version = pool.version + 1
    pool.weights_sent(send_weights(module_source(model), pool.actors, version=version, is_sender=True, bucket_mib=64))
    chosen = [(prompt, rollout.tokens_R) for prompt, rollout in pairs]
    now = by_trainer(tmp_path / "hf", chosen)
    assert worst(now, ours) > 1e-3
    difference = worst(now, score(pool, [prompt for prompt, _ in chosen], [tokens_R for _, tokens_R in chosen]))
    print(f"after the sync: {difference:.1e}")
    assert difference <= 1e-5  # measured 4.8e-7
