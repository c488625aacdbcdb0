"""From judged groups to the batch the trainer learns from: advantages (`rl.shaping`), spread over tokens, cut into optimizer steps.

The whole global batch is here, in one process, so whitening and every denominator are global by construction.
"""

from collections.abc import Sequence

import numpy as np
import torch

from eureka_megatron.config import AlgorithmSection, RunConfig
from eureka_megatron.data.samples import training_sample
from eureka_megatron.rl.advantages import is_whitened
from eureka_megatron.rl.shaping import Shaping, credit_responses
from eureka_megatron.types import Batch, Group


def make_batch(groups: Sequence[Group], config: RunConfig, step: int, weight_version: int) -> Batch:
    """All rollouts of the groups as samples with advantages, shuffled into updates of `training.responses_per_update`.

    Groups are shuffled whole, so that responses to one prompt come into one update, where they share its rows; only a group at the border of two
    updates is divided. The shuffle depends only on `run.seed` and `step`, so that a resumed run repeats it. `weight_version` is that of the trainer's
    present weights: groups kept from an earlier step lie behind it.
    """
    values_GN = credit_responses(
        config.algorithm.advantage,
        torch.tensor(np.array([group.rewards("total") for group in groups])),
        lengths_GN=torch.tensor([[len(rollout.tokens_R) for rollout in group.rollouts] for group in groups]).double(),
        truncated_GN=torch.tensor([[r.finish_reason == "length" for r in group.rollouts] for group in groups]),
        shaping=shaping_of(config.algorithm),
        options=config.algorithm.advantage_options,
    )
    samples = [
        training_sample(
            group.prompt,
            rollout.tokens_R,
            advantage=advantage,
            logprobs_R=rollout.logprobs_R,
            weight_lag=weight_version - rollout.weight_version,
        )
        for group, row in zip(groups, values_GN.tolist(), strict=True)
        for rollout, advantage in zip(group.rollouts, row, strict=True)
    ]
    count, size = values_GN.shape[1], config.training.responses_per_update
    order = np.random.default_rng((config.run.seed, step)).permutation(len(groups))
    places = (order[:, None] * count + np.arange(count)).ravel().tolist()
    updates = [tuple(places[start : start + size]) for start in range(0, len(places), size)]
    return Batch(samples=tuple(samples), updates=tuple(updates), scheduled=step * updates_per_step(config))


def updates_per_step(config: RunConfig) -> int:
    """Optimizer steps of a full rollout step, all passes."""
    training = config.training
    responses = training.prompts_per_step * config.rollout.samples_per_prompt
    return -(-responses // training.responses_per_update) * training.passes


def shaping_of(algorithm: AlgorithmSection) -> Shaping:
    """The configuration's choices, for `rl.shaping` on both sides: the driver's responses and the trainer's tokens."""
    return Shaping(
        kl_coefficient=algorithm.kl_coefficient if algorithm.kl_in == "reward" else 0.0,
        kl_estimator=algorithm.kl_estimator,
        gamma=algorithm.gamma,
        whitened=is_whitened(algorithm.advantage, algorithm.compat),
        compat=algorithm.compat,
    )


def mean_return(batch: Batch) -> float:
    """Mean over responses of what they are credited with: the shaped reward (the original's `return`)."""
    return float(np.mean(_credits(batch)))


def _credits(batch: Batch) -> list[float]:
    return [sample.advantages_S[sample.mask_S > 0].mean() for sample in batch.samples]


def distributions(groups: Sequence[Group], batch: Batch) -> dict[str, np.ndarray]:
    """One value a response that is trained on, for histograms; an advantage is the mean over the response's tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "rewards": np.array([rollout.rewards["total"] for rollout in rollouts]),
        "response_lengths": np.array([len(rollout.tokens_R) for rollout in rollouts]),
        "advantages": np.array(_credits(batch)),
    }


def rewards_differ(groups: Sequence[Group], config: RunConfig) -> float:
    """Share of the groups that teach: their responses earned unequal rewards. reinforce_pp compares all groups with each other."""
    totals = [group.rewards("total") for group in groups]
    if config.algorithm.advantage == "reinforce_pp":
        totals = [np.concatenate(totals)]
    return float(np.mean([np.ptp(row) > 0 for row in totals]))


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the groups trained on look like, under the original's names."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    lengths = np.array([len(rollout.tokens_R) for rollout in rollouts], dtype=np.float64)
    totals = np.array([len(group.prompt.tokens_S) + len(r.tokens_R) for group in groups for r in group.rollouts])
    accuracy = np.array([rollout.rewards["accuracy"] for rollout in rollouts])
    metrics = {
        "train/reward": float(np.mean([rollout.rewards["total"] for rollout in rollouts])),
        "train/accuracy_rewards": float(accuracy.mean()),
        "train/format_rewards": float(np.mean([rollout.rewards.get("format", 0.0) for rollout in rollouts])),
        "train/response_length": float(lengths.mean()),
        "train/total_length": float(totals.mean()),
        "train/truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
    }
    for name, chosen in (("correct", accuracy > 0.5), ("wrong", accuracy <= 0.5)):
        if chosen.any():
            metrics[f"train/{name}_response_length"] = float(lengths[chosen].mean())
    return metrics


def age_metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """How old the responses are when the trainer, whose weights are of this version, learns from them: updates since they were begun."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    ages = [weight_version - rollout.weight_version for rollout in rollouts]
    return {
        "rollout/age_mean": float(np.mean(ages)),
        "rollout/age_max": float(max(ages)),
        # share that was begun with older weights than it was finished with
        "rollout/carried_over": float(np.mean([bool(rollout.switches) for rollout in rollouts])),
    }
