"""Losses, their gradients and the group weights against the original's recorded ones; the online filter too."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eureka_megatron.config import make_config
from eureka_megatron.rl import advantages, losses
from eureka_megatron.rl.filters import keep_groups
from eureka_megatron.rollout.collector import Collector
from eureka_megatron.types import Group, Prompt, Rollout

DATA = Path(__file__).parents[1] / "golden_data"
LOSSES = [json.loads(line) for line in (DATA / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
FILTERS = [json.loads(line) for line in (DATA / "filter.jsonl").read_text(encoding="utf-8").splitlines()]
STEPS = [row for row in LOSSES if row["kind"] in ("policy", "cpgd")]


def close(actual: Tensor, expected: object, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def flat(rows: list[list[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def run(row: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, float]]:
    """loss, gradient by log-probability and reduced metrics of a recorded training step, packed, under compat."""
    lengths = torch.tensor([len(mask) for mask in row["mask"]])
    logprobs_T = flat(row["logprobs"], dtype).requires_grad_()
    inputs = losses.LossInputs(
        logprobs_T=logprobs_T,
        old_logprobs_T=flat(row["old_logprobs"], dtype),
        advantages_T=flat(row["advantages"], dtype),
        mask_T=flat(row["mask"], dtype),
        sequence_ids_T=torch.arange(len(lengths)).repeat_interleave(lengths),
        ref_logprobs_T=flat(row["ref_logprobs"], dtype) if row["ref_logprobs"] else None,
    )
    name = "cpgd" if row["use_cpg_loss"] else "dapo" if row["use_dapo"] else "ppo_clip"
    loss, metrics = losses.policy_loss(
        name,
        inputs,
        compat="mm_eureka",
        clip_low=row["eps_clip"],
        clip_high=row["eps_clip"],
        drift_coefficient=row["policy_drift_coef"] if row["use_policy_drift"] else 0.0,
        drift_clip=row["policy_drift_clip_eps"],
        kl_coefficient=row["kl_coef"] if row["use_kl_loss"] else 0.0,
        kl_estimator=row["kl_estimator"] or "k1",
    )
    loss.backward()
    return loss.detach(), logprobs_T.grad, losses.reduce_metrics([metrics])


def compare(row: dict, expected: dict, dtype: torch.dtype) -> None:
    loss, gradient_T, metrics = run(row, dtype)
    close(loss, expected["total_loss"], dtype)
    close(gradient_T, [value for values in expected["grad"] for value in values], dtype)
    names = {"pg_loss": "pg_loss", "actor_loss": "policy_loss", "ratio_mean": "ratio", "kl_loss": "kl"}
    names |= {"ratio_clip_upper": "ratio_clip_upper", "ratio_clip_lower": "ratio_clip_lower"}
    for recorded, name in names.items():
        if recorded in expected:
            close(torch.tensor(metrics[name]), expected[recorded], dtype)


@pytest.mark.parametrize("row", [row for row in STEPS if not row["contested"]], ids=lambda row: row["id"])
def test_loss_gradient_and_metrics_are_the_originals(row: dict):
    compare(row, row["expected"], torch.float32)
    if "expected_f64" in row:
        compare(row, row["expected_f64"], torch.float64)


@pytest.mark.parametrize("row", [row for row in STEPS if row["contested"]], ids=lambda row: row["id"])
def test_contested_steps_come_out_as_they_should(row: dict):
    if row["should"] == {"finite": True}:
        loss, gradient_T, metrics = run(row, torch.float32)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient_T).all()
        assert all(math.isfinite(value) for value in metrics.values())
        assert (gradient_T[flat(row["mask"], torch.float32) == 0] == 0).all()
    else:
        compare(row, row["should"], torch.float32)


@pytest.mark.parametrize("row", [row for row in LOSSES if row["kind"] == "kl"], ids=lambda row: row["id"])
def test_kl_estimates_are_the_originals(row: dict):
    dtype = torch.bfloat16 if "bfloat16" in row.get("note", "") else torch.float32
    logprobs, ref = torch.tensor(row["logprobs"], dtype=dtype), torch.tensor(row["ref_logprobs"], dtype=dtype)
    expected = [[float(value) for value in values] for values in row["expected"]["kl"]]
    actual = advantages.kl_estimate(logprobs, ref, row["kl_estimator"])
    mask = torch.ones_like(actual) if row["mask"] is None else torch.tensor(row["mask"])
    close(torch.where(mask > 0, actual, 0.0), expected)


@pytest.mark.parametrize("row", [row for row in LOSSES if row["kind"].endswith("weight")], ids=lambda row: row["id"])
def test_group_weights_are_the_originals(row: dict):
    rewards_GN = torch.tensor(row["rewards"])
    if row["kind"] == "adora_weight":
        lengths_GN = torch.tensor(row["response_lengths"])
        weights = advantages.adora_weights(rewards_GN, lengths_GN, row["lamda"], truncated_GN=lengths_GN >= 4094)
    else:
        weights = row["lamda"] * advantages.clip_filter_weights(rewards_GN, row["clip_eps"])
    close(weights, row["expected"]["weights"])


def kept(accuracy: list, row: dict, step: int, compat: str | None) -> list[int]:
    if not row["enable_accuracy_filter"] or step <= row["freezing_filter_steps"]:
        return list(range(len(accuracy)))
    bounds = {"lower": row["accuracy_lower_bound"], "upper": row["accuracy_upper_bound"]}
    return keep_groups(torch.tensor(accuracy), compat=compat, **bounds).nonzero().flatten().tolist()


@pytest.mark.parametrize("row", [row for row in FILTERS if row["kind"] == "filter"], ids=lambda row: row["id"])
def test_kept_groups_are_the_originals(row: dict):
    if "kept_prompts" in row["expected"]:
        assert kept(row["accuracy"], row, row["global_step"], "mm_eureka") == row["expected"]["kept_prompts"]
    right = row["should"] if row["contested"] else row["expected"]
    assert kept(row["accuracy"], row, row["global_step"], None) == right["kept_prompts"]


class Prompts:
    """A stream of numbered prompts, and a pool whose responses' "text" is the recorded accuracy."""

    version = 0

    def __init__(self, accuracy_by_step: list) -> None:
        self.groups = [group for step in accuracy_by_step for group in step]
        self.place = 0

    def next(self, n: int) -> list[Prompt]:
        self.place += n
        return [Prompt(str(i), "", "", np.arange(1), np.zeros((3, 1), int)) for i in range(self.place - n, self.place)]

    def generate(self, prompts: list[Prompt], **_: object) -> list[Group]:
        def rollout(accuracy: float) -> Rollout:
            return Rollout(np.arange(1), np.zeros(1, np.float32), str(accuracy), "stop", 0)

        return [Group(prompt, tuple(map(rollout, self.groups[int(prompt.id)]))) for prompt in prompts]


def trained_steps(row: dict, compat: str | None) -> tuple[list[list[int]], list[int]]:
    """What the collector trains on in each step (numbers of responses), and how many responses wait afterwards."""
    size, n = row["rollout_batch_size"], row["n_samples_per_prompt"]
    rule = {
        "enabled": row["enable_accuracy_filter"],
        "lower": row["accuracy_lower_bound"],
        "upper": row["accuracy_upper_bound"],
        "freezing_steps": row["freezing_filter_steps"],
        "max_generation_batches": 1,  # the original trains or goes on after every batch
        "min_groups": size,
    }
    config = make_config(
        {
            "model": {"path": "m"},
            "data": {"train": "d"},
            "rollout": {"samples_per_prompt": n},
            "training": {"prompts_per_step": size, "responses_per_update": n},
            "algorithm": {"filter": rule, "compat": compat},
        }
    )
    source = Prompts(row["accuracy_by_step"])

    def judge(samples: list[dict]) -> list[dict[str, float]]:
        return [{"accuracy": float(sample["response"]), "total": 0.0} for sample in samples]

    collector = Collector(source, judge, source, config)
    trained, waiting = [], []
    for step in row["expected"]["steps"]:
        groups = collector.collect(step["global_step"])
        trained.append([int(group.prompt.id) * n + k for group in groups for k in range(n)])
        waiting.append(int(collector.metrics["filter/in_buffer"]) * n)
    return trained, waiting


@pytest.mark.parametrize("row", [row for row in FILTERS if row["kind"] == "accumulate"], ids=lambda row: row["id"])
def test_what_piles_up_and_is_trained_on_is_the_originals(row: dict):
    steps = row["expected"]["steps"]
    for accuracy, step in zip(row["accuracy_by_step"], steps, strict=True):
        assert kept(accuracy, row, step["global_step"], "mm_eureka") == step["kept_prompts"]
    trained, waiting = trained_steps(row, "mm_eureka")
    assert trained == [step.get("trained_responses", []) for step in steps]
    assert waiting == [step["buffered_after"] for step in steps]
    if row["contested"]:  # surplus_thrown_away
        assert row["should"] == {"no_kept_response_lost": True}
        n, size = row["n_samples_per_prompt"], row["rollout_batch_size"]
        trained, waiting = trained_steps(row, None)
        keep = [
            number * size * n + prompt * n + k
            for number, (accuracy, step) in enumerate(zip(row["accuracy_by_step"], steps, strict=True))
            for prompt in kept(accuracy, row, step["global_step"], None)
            for k in range(n)
        ]
        done = [response for responses in trained for response in responses]
        assert done == keep[: len(done)], "in their order, none left out"
        assert len(done) + waiting[-1] == len(keep)
