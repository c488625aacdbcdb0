"""Advantages against closed forms in float64, group weights, returns, and whitening that is global over ranks."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from eureka_megatron.rl import advantages

REWARDS = torch.tensor([[1.5, 0.5, 0.5, 0.0], [0.5, 0.5, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3], [1.5, 1.5, 0.0, 1.0]])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def naive(name: str, row: list[float]) -> list[float]:
    n, mean = len(row), sum(row) / len(row)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in row) / (n - 1))
    return {
        "grpo": [(reward - mean) / (std + 1e-9) for reward in row],
        "dr_grpo": [reward - mean for reward in row],
        "rloo": [reward - (sum(row) - reward) / (n - 1) for reward in row],
        "reinforce_baseline": [reward - mean for reward in row],
        "reinforce_pp": row,
    }[name]


@pytest.mark.parametrize("name", advantages.NAMES)
def test_estimators_equal_their_formulas(name: str):
    rewards_GN = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([naive(name, row) for row in rewards_GN.tolist()], dtype=torch.float64)
    torch.testing.assert_close(advantages.compute(name, rewards_GN), expected, **EXACT)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_has_no_advantage(name: str, dtype: torch.dtype):
    for value, samples in itertools.product((0.1, 0.3, 0.6, 1.1, 1.5), (2, 3, 7, 8, 16)):
        assert (advantages.compute(name, torch.full((2, samples), value, dtype=dtype)) == 0).all()


def test_the_originals_rounding_noise_is_there_under_compat_only():
    rewards_GN = torch.full((1, 6), 0.6)
    # How large the noise is depends on the order of torch's sums: 0.9 here, up to 120 in the golden data.
    assert advantages.compute("grpo", rewards_GN, compat="mm_eureka").abs().max() > 0.1
    clipped = advantages.compute("grpo", rewards_GN, compat="mm_eureka", reward_clip=(-0.1, 0.1))
    assert clipped.abs().max() == pytest.approx(0.1)
    assert advantages.compute("grpo", rewards_GN).abs().max() == 0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift(name: str):
    values = advantages.compute(name, REWARDS.double())
    torch.testing.assert_close(values.sum(1), torch.zeros(4, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(advantages.compute(name, REWARDS.double() + 3), values, rtol=1e-7, atol=1e-7)


def test_adora_damps_groups_whose_right_answers_are_short():
    rewards_GN = torch.tensor([[1.5, 0.0], [1.5, 0.0], [0.5, 0.0], [1.5, 1.5], [1.5, 0.5]])
    lengths_GN = torch.tensor([[100, 200], [200, 100], [1, 2], [9, 9], [300, 4096]])
    weights = advantages.adora_weights(rewards_GN, lengths_GN, 0.1)
    # Short and right: damped. Longer than the wrong: 1. Nothing right: 1. Nothing wrong: infinite mean, damped.
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.1, 1.0, 1.0, 0.1, 0.1]))
    truncated_GN = lengths_GN == 4096
    weights = advantages.adora_weights(rewards_GN[4:], lengths_GN[4:], 0.1, truncated_GN=truncated_GN[4:])
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.1]))  # the truncated wrong answer does not count
    shaped = advantages.compute("rloo", rewards_GN[:2], lengths_GN=lengths_GN[:2], adora=0.1)
    torch.testing.assert_close(shaped, torch.tensor([[0.15, -0.15], [1.5, -1.5]]))


def test_clip_filter_weight_counts_the_groups_that_differ():
    local = advantages.clip_filter_weights(REWARDS, 3.0)
    torch.testing.assert_close(local[:, 0], torch.tensor([2.0, 1.0, 1.0, 2.0]))
    assert advantages.clip_filter_weights(REWARDS, 1.5).max() == 1.5
    assert (advantages.clip_filter_weights(REWARDS[1:3], 3.0) == 1).all()


def test_adora_wins_over_the_clip_filter():
    both = advantages.compute("rloo", REWARDS, lengths_GN=torch.ones(4, 4), adora=0.1, clip_filter=3.0)
    torch.testing.assert_close(both, advantages.compute("rloo", REWARDS, lengths_GN=torch.ones(4, 4), adora=0.1))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_token_returns_are_discounted_sums_inside_each_sequence(gamma: float):
    generator = torch.Generator().manual_seed(1)
    lengths = (4, 1, 6)
    ids_T = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    mask_T = torch.tensor([0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0])
    rewards_S = torch.randn(3, generator=generator, dtype=torch.float64)
    kl_T = torch.randn(11, generator=generator, dtype=torch.float64)
    rewards_T = advantages.token_rewards(rewards_S, mask_T, ids_T, kl_T=kl_T, kl_coefficient=0.2)
    returns_T = advantages.token_returns(rewards_T, mask_T, ids_T, gamma=gamma)
    for sequence in range(3):
        positions = [t for t in range(11) if ids_T[t] == sequence and mask_T[t]]
        total = 0.0
        for step, t in enumerate(reversed(positions)):
            total = -0.2 * float(kl_T[t]) + (float(rewards_S[sequence]) if step == 0 else gamma * total)
            assert float(returns_T[t]) == pytest.approx(total, rel=1e-12)
    assert (returns_T[mask_T == 0] == 0).all()
    assert (rewards_T[mask_T == 0] == 0).all()


def test_a_sequence_without_valid_tokens_gets_nothing_and_harms_nobody():
    ids_T, mask_T = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    rewards_T = advantages.token_rewards(torch.tensor([5.0, 2.0]), mask_T, ids_T)
    assert rewards_T.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert advantages.token_returns(rewards_T, mask_T, ids_T).tolist() == [0.0, 0.0, 2.0, 2.0]
    assert advantages.token_returns(rewards_T, torch.zeros(4), ids_T).tolist() == [0.0] * 4


def test_whitening_has_mean_zero_and_variance_one_over_valid_tokens():
    generator = torch.Generator().manual_seed(2)
    values_T, mask_T = torch.randn(50, generator=generator).double() * 3 + 7, (torch.arange(50) % 3 > 0).double()
    white_T = advantages.whiten(values_T, mask_T)
    valid = white_T[mask_T > 0]
    assert float(valid.mean()) == pytest.approx(0, abs=1e-12)
    assert float(valid.var(correction=0)) == pytest.approx(1, rel=1e-12)
    assert (white_T[mask_T == 0] == 0).all()


def test_whitening_over_ranks_equals_whitening_of_everything():
    """Two ranks with unequal shares; the callable stands for a sum over them."""
    generator = torch.Generator().manual_seed(3)
    values_T = torch.randn(40, generator=generator).double()
    mask_T = (torch.rand(40, generator=generator) > 0.3).double()
    shares = (slice(0, 11), slice(11, 40))

    def statistics(rank: int) -> list[Tensor]:
        value, mask = values_T[shares[rank]], mask_T[shares[rank]]
        return [torch.stack([(value * mask).sum(), mask.sum()]), value, mask]

    total = statistics(0)[0] + statistics(1)[0]
    mean = total[0] / total[1]
    squares = sum(((part[1] - mean).square() * part[2]).sum() for part in map(statistics, range(2)))
    whole = advantages.whiten(values_T, mask_T)
    for share in shares:
        answers = iter([total, squares])
        part = advantages.whiten(values_T[share], mask_T[share], all_reduce=lambda _, answers=answers: next(answers))
        torch.testing.assert_close(part, whole[share], **EXACT)


def test_whitening_responses_by_their_length_equals_whitening_their_tokens():
    values_GN, lengths_GN = REWARDS.double(), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9, 3]])
    tokens_T = values_GN.flatten().repeat_interleave(lengths_GN.flatten())
    by_token = advantages.whiten(tokens_T, torch.ones_like(tokens_T))
    by_response = advantages.whiten(values_GN, lengths_GN).flatten().repeat_interleave(lengths_GN.flatten())
    torch.testing.assert_close(by_response, by_token, **EXACT)


def test_equal_values_whiten_to_zero():
    assert (advantages.whiten(torch.full((5,), 2.0), torch.ones(5)) == 0).all()


def test_which_estimators_are_whitened():
    assert [name for name in advantages.NAMES if advantages.is_whitened(name)] == ["reinforce_baseline", "reinforce_pp"]
    assert not advantages.is_whitened("grpo", "mm_eureka")
    assert advantages.is_whitened("rloo", "mm_eureka")


def test_bad_input_names_what_would_be_right():
    with pytest.raises(ValueError, match="grpo, dr_grpo, rloo"):
        advantages.compute("ppo", REWARDS)
    with pytest.raises(ValueError, match="at least 2"):
        advantages.compute("rloo", REWARDS[:, :1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'group_counts'"):
        advantages.compute("rloo", REWARDS, group_counts=(1, 1))
    with pytest.raises(ValueError, match="lengths_GN"):
        advantages.compute("grpo", REWARDS, adora=0.1)
    with pytest.raises(ValueError, match="mm_eureka"):
        advantages.compute("grpo", REWARDS, compat="original")
    with pytest.raises(ValueError, match="k1, k2, k3"):
        advantages.kl_estimate(REWARDS, REWARDS, "k4")
