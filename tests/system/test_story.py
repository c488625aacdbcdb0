"""The whole system together: Megatron ranks at TP 2 with sequence parallelism, a vLLM engine, Ray, real rollouts and real updates.

One set of processes for the module. What the parts do alone is tested elsewhere; here they must agree with each other.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eureka_megatron.config import OptimizerSection, RunConfig
from eureka_megatron.data.batch import make_batch
from eureka_megatron.data.samples import training_sample
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.demo.story import demo_config
from eureka_megatron.rollout.engine import Engine
from eureka_megatron.rollout.pool import RolloutPool
from eureka_megatron.run.run import Run
from eureka_megatron.types import Sample
from tests.helpers.engines import score

pytestmark = pytest.mark.system
PROMPTS = 12


class ForgetfulEngine(Engine):
    """The real engine, but on request it goes on serving the encoder's old embeddings after an update, as vLLM alone would."""

    keep = False

    def keep_encoder_cache(self, keep: bool) -> None:
        self.keep = keep

    def drop_caches(self) -> None:
        if not self.keep:
            super().drop_caches()
        else:
            self._llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("story")
    write_counting(folder / "data", train=60, test=20)
    build_published(folder / "model", seed=3, randomize_all=True)
    return demo_config(
        folder, ["training.prompts_per_step=4", "training.responses_per_update=16", "tracking.wandb=disabled"]
    )


@pytest.fixture(scope="module")
def run(one_ray: None, config: RunConfig) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        forgetful = partial(RolloutPool, engine_class=ForgetfulEngine)
        patch.setattr("eureka_megatron.run.run.RolloutPool", forgetful)
        with Run(config) as run:
            run.trainer.start_phase(config.optimizer, 100)
            yield run


def rollouts(run: Run) -> list[Any]:
    prompts = [run.train_data[index] for index in range(PROMPTS)]
    return run.pool.generate(prompts, n=2, temperature=1.0, top_p=1.0, max_tokens=24, seed=1)


def trainer_logprobs(run: Run, samples: list[Sample]) -> list[np.ndarray]:
    """Of every token, index 0: 0, from the ranks that have them."""
    answers = run.trainer._all("trainer.logprobs", samples)
    return [values.numpy() for values in next(answer for answer in answers if answer is not None)]


def largest_difference(run: Run, groups: list[Any]) -> float:
    """Trainer against engine, over the tokens of the groups' responses, each with its present weights."""
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    samples = [training_sample(prompt, rollout.tokens_R) for prompt, rollout in pairs]
    by_trainer = trainer_logprobs(run, samples)
    by_engine = score(run.pool, [prompt for prompt, _ in pairs], [rollout.tokens_R for _, rollout in pairs])
    return max(
        float(np.abs(ours[len(prompt.tokens_S) :] - theirs).max())
        for (prompt, _), ours, theirs in zip(pairs, by_trainer, by_engine, strict=True)
    )


def supervised_step(run: Run) -> None:
    """A large step on all weights, the vision tower's too."""
    run.trainer.start_phase(OptimizerSection(lr=3e-3, schedule="constant", warmup_ratio=0.0), 1)
    run.trainer.sft([training_sample(group.prompt, group.rollouts[0].tokens_R) for group in rollouts(run)])


def test_sampled_logprobs_are_those_of_the_trainer(run: Run) -> None:
    groups = rollouts(run)
    sampled = np.concatenate([rollout.logprobs_R for group in groups for rollout in group.rollouts])
    samples = [training_sample(group.prompt, rollout.tokens_R) for group in groups for rollout in group.rollouts]
    starts = [len(group.prompt.tokens_S) for group in groups for _ in group.rollouts]
    ours = np.concatenate([v[start:] for v, start in zip(trainer_logprobs(run, samples), starts, strict=True)])
    difference = float(np.abs(ours - sampled).max())
    print(f"trainer against vLLM, sampled tokens: {difference:.1e}")
    assert difference <= 1e-5  # measured 1.9e-6


def test_after_a_changed_vision_tower_the_same_pictures_agree_again(run: Run) -> None:
    groups = rollouts(run)  # fills every cache of the engine with these pictures
    supervised_step(run)
    assert largest_difference(run, groups) > 1e-2, "the step must have changed something"
    figures = run.sync_weights(check=True)
    difference = largest_difference(run, groups)
    print(f"after the sync: {difference:.1e}; sync took {figures['sync/seconds']:.3f} s")
    assert difference <= 1e-5  # measured 1.9e-6


def test_and_they_do_not_when_the_encoder_cache_is_kept(run: Run) -> None:
    import ray

    groups = rollouts(run)
    supervised_step(run)
    ray.get(run.pool.actors[0].keep_encoder_cache.remote(True))
    try:
        run.sync_weights()
        assert largest_difference(run, groups) > 1e-3
    finally:
        ray.get(run.pool.actors[0].keep_encoder_cache.remote(False))
    run.sync_weights()
    assert largest_difference(run, groups) <= 1e-5


def test_one_step_of_reinforcement_learning_uses_the_rollouts_it_was_given(run: Run, config: RunConfig) -> None:
    everything = config.algorithm.filter.model_copy(update={"enabled": False})
    algorithm = config.algorithm.model_copy(update={"filter": everything})
    run.collector._config = config.model_copy(update={"algorithm": algorithm})
    groups = run.collector.collect(0)
    metrics = run.learn(make_batch(groups, config, 0, run.weight_version))
    assert metrics["train/logprob_abs_diff_max"] <= 1e-5  # measured 1.9e-6
    assert metrics["train/global_step"] == 2  # 4 prompts × 8 responses in updates of 16
    run.sync_weights(check=True)


def test_the_export_holds_the_trainers_weights(run: Run, tmp_path: Path) -> None:
    """transformers, loading the export, computes the trainer's log-probabilities."""
    import torch
    from transformers import AutoModelForImageTextToText

    from eureka_megatron.data.model_inputs import reading_order

    run.export(tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    group = rollouts(run)[0]
    sample = training_sample(group.prompt, group.rollouts[0].tokens_R)
    tokens = torch.from_numpy(sample.tokens_S)[None]
    with torch.no_grad():
        logits = model(
            input_ids=tokens,
            pixel_values=torch.cat([reading_order(picture) for picture in sample.pictures]),
            image_grid_thw=torch.tensor([picture.grid_thw for picture in sample.pictures]),
            mm_token_type_ids=(tokens == model.config.image_token_id).int(),
        ).logits[0]
    theirs = logits[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    ours = trainer_logprobs(run, [sample])[0][1:]
    assert float(np.abs(ours - theirs).max()) <= 1e-5  # measured 1.9e-6
