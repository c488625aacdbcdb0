"""Advantages against the original's recorded ones: reward shaping, KL in the reward, returns, whitening."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eureka_megatron.rl import advantages

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "golden_data" / "advantages.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
NAMES = {
    "group_norm": "grpo",
    "rloo": "rloo",
    "reinforce_baseline": "reinforce_baseline",
    "reinforce": "reinforce_pp",
}
SHAPE = [row for row in ROWS if row["kind"] == "shape"]
TOKENS = [row for row in ROWS if row["kind"] == "tokens"]


def close(actual: Tensor, expected: list, dtype: torch.dtype) -> None:
    """The README's tolerances: 1e-5 for what was recorded in float32, 1e-7 in float64."""
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def shaped(row: dict, dtype: torch.dtype, compat: str | None, **options: object) -> Tensor:
    lengths = row["response_lengths"]
    rewards_GN = torch.tensor(row["rewards"], dtype=dtype)
    lengths_GN = torch.tensor(lengths, dtype=dtype).reshape(rewards_GN.shape)
    return advantages.compute(
        NAMES[row["estimator"]],
        rewards_GN,
        lengths_GN=lengths_GN,
        adora=row["adora_lamda"] if row["use_adora"] else None,
        clip_filter=row["clip_filter_like_weight_clip_eps"] if row["use_clip_filter_like_weight"] else None,
        compat=compat,
        **options,
    )


def recordings(row: dict) -> list[tuple[torch.dtype, dict]]:
    """What to compare with, per dtype. Delicate cases only in float64."""
    chosen = [] if row["numerically_delicate"] else [(torch.float32, row["expected"])]
    return chosen + ([(torch.float64, row["expected_f64"])] if "expected_f64" in row else [])


@pytest.mark.parametrize("row", [row for row in SHAPE if not row["contested"]], ids=lambda row: row["id"])
def test_shaped_rewards_are_the_originals(row: dict):
    for dtype, expected in recordings(row):
        close(shaped(row, dtype, "mm_eureka"), expected["shaped_rewards"], dtype)


@pytest.mark.parametrize("row", [row for row in SHAPE if not row["contested"]], ids=lambda row: row["id"])
def test_the_default_differs_from_the_original_only_in_its_defects(row: dict):
    """Without compat the 4094-token limit becomes "truncated"; nothing else moves in uncontested cases."""
    truncated_GN = torch.tensor(row["response_lengths"]) >= 4094
    close(
        shaped(row, torch.float64, None, truncated_GN=truncated_GN),
        row["expected_f64"]["shaped_rewards"],
        torch.float64,
    )


@pytest.mark.parametrize("row", [row for row in SHAPE if row["contested"]], ids=lambda row: row["id"])
def test_groups_of_equal_rewards_get_zero(row: dict):
    result_GN = shaped(row, torch.float32, None)
    for group, should in zip(row["contested_groups"], row["should"]["shaped_rewards_of_contested_groups"], strict=True):
        assert result_GN[group].tolist() == should


@pytest.mark.parametrize("row", [row for row in ROWS if row["kind"] == "packed"], ids=lambda row: row["id"])
def test_packed_token_rewards_and_returns_are_the_originals(row: dict):
    counts = row["num_actions"]
    ids_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mask_T = torch.ones_like(ids_T)
    rewards_S = torch.tensor(row["shaped_rewards"])
    if row["reward_clip_range"]:
        rewards_S = rewards_S.clamp(*row["reward_clip_range"])
    kl_T = torch.tensor([value for values in row["kl"] for value in values])
    rewards_T = advantages.token_rewards(rewards_S, mask_T, ids_T, kl_T=kl_T, kl_coefficient=row["kl_coef"])
    close(rewards_T, [value for values in row["expected"]["token_rewards"] for value in values], torch.float32)
    returns_T = advantages.token_returns(rewards_T, mask_T, ids_T, gamma=row["gamma"])
    close(returns_T, [value for values in row["expected"]["returns"] for value in values], torch.float32)


def token_case(row: dict, dtype: torch.dtype, compat: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """returns_T, whitened_T, mask_T, kl_T of a case, through the public helpers."""
    masks = row["action_masks"]
    ids_T = torch.arange(len(masks)).repeat_interleave(torch.tensor([len(mask) for mask in masks]))
    mask_T = torch.tensor([value for mask in masks for value in mask])
    clip = tuple(row["reward_clip_range"]) if row["reward_clip_range"] else None
    rewards_S = shaped(row, dtype, compat, reward_clip=clip).flatten()
    kl_T = torch.zeros(mask_T.numel(), dtype=dtype)
    if row["ref_logprobs"] and not row["use_kl_loss"]:
        flat = [torch.tensor([v for values in row[key] for v in values]) for key in ("logprobs", "ref_logprobs")]
        kl_T = advantages.kl_estimate(flat[0], flat[1], row["kl_estimator"]).to(dtype)
    rewards_T = advantages.token_rewards(rewards_S, mask_T, ids_T, kl_T=kl_T, kl_coefficient=row["kl_coef"])
    returns_T = advantages.token_returns(rewards_T, mask_T, ids_T, gamma=row["gamma"])
    return returns_T, advantages.whiten(returns_T, mask_T, compat=compat), mask_T, kl_T


@pytest.mark.parametrize("row", [row for row in TOKENS if not row["contested"]], ids=lambda row: row["id"])
def test_token_advantages_are_the_originals(row: dict):
    for dtype, expected in recordings(row):
        returns_T, whitened_T, _, kl_T = token_case(row, dtype, "mm_eureka")
        close(returns_T, [value for values in expected["returns"] for value in values], dtype)
        assert advantages.is_whitened(NAMES[row["estimator"]], "mm_eureka") == ("buffer_advantages" in expected)
        if "buffer_advantages" in expected:
            close(whitened_T, [value for values in expected["buffer_advantages"] for value in values], dtype)
        if "info_kl" in expected:
            counts = [len(mask) for mask in row["action_masks"]]
            close(torch.stack([part.mean() for part in kl_T.split(counts)]), expected["info_kl"], torch.float32)


@pytest.mark.parametrize("row", [row for row in TOKENS if row["contested"]], ids=lambda row: row["id"])
def test_contested_token_advantages_come_out_as_they_should(row: dict):
    returns_T, whitened_T, mask_T, _ = token_case(row, torch.float32, None)
    if row["contested_reason"] == "zero_variance_noise":
        samples = row["n_samples_per_prompt"]
        for group in row["contested_groups"]:
            start = sum(len(mask) for mask in row["action_masks"][: group * samples])
            end = sum(len(mask) for mask in row["action_masks"][: (group + 1) * samples])
            assert (returns_T[start:end] == row["should"]["returns_of_contested_groups"]).all()
    else:  # a hole in the mask: no token is lost from the end, and the hole itself gets nothing
        assert row["contested_reason"] == "mask_holes_trim_the_end"
        assert returns_T.numel() == sum(len(mask) for mask in row["action_masks"])
        assert (returns_T[mask_T == 0] == 0).all()
        assert (whitened_T[mask_T == 0] == 0).all()
        assert (returns_T[mask_T == 1] != 0).all()
