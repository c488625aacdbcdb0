"""The arithmetic of credit: group estimators and weights, KL estimates, token rewards and returns, whitening.

`compute` works per group, before any value is spread over tokens; the functions below it work on tokens. `rl.shaping` puts them together.

Sources: GRPO arXiv:2402.03300, Dr. GRPO arXiv:2503.20783, RLOO arXiv:2402.14740, REINFORCE++ arXiv:2501.03262, ADORA
(adaptive rollout adjustment) and the clip-filter weight of CPGD (arXiv:2505.12504) as MM-EUREKA implements them.

Left out: the value function and generalised advantages; nothing in the rule-based recipes uses them.

Shape suffixes: G groups (prompts), N samples of a group, T packed tokens of many sequences, S sequences.
"""

import math
from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]

NAMES = ("grpo", "dr_grpo", "rloo", "reinforce_baseline", "reinforce_pp")
# Nats. Every exponential of a difference of log-probabilities that a run takes stops here, as verl's do: e^20 = 5e8 says "far apart" as well
# as e^100 does, which overflows float32 (from 88.7 on) and turns the whole update into NaN. Beyond it the gradient is zero. The original and
# TRL have no such bound; within it nothing differs from them.
LOG_RATIO_LIMIT = 20.0
# MM-EUREKA clips the shaped reward of every estimator to this range before it is spread over tokens.
MM_EUREKA_REWARD_CLIP = (-10.0, 10.0)
# The original's hard-coded "reached the length limit" in ADORA: 4096 response tokens less two.
_MM_EUREKA_LENGTH_LIMIT_TOKENS = 4094


class GroupOptions(TypedDict, total=False):
    """Optional parts of `compute`, by keyword.

    Attributes:
        adora: weight of groups whose correct answers are no longer than the wrong ones (original: 0.1).
        clip_filter: largest weight of CPGD's clip-filter; `adora` wins over it.
        reward_clip: clips the result to (low, high); the original uses (-10, 10).
    """

    adora: float | None
    clip_filter: float | None
    reward_clip: tuple[float, float] | None


def compute(
    name: str,
    rewards_GN: Tensor,
    *,
    lengths_GN: Tensor | None = None,
    truncated_GN: Tensor | None = None,
    compat: str | None = None,
    **options: Unpack[GroupOptions],
) -> Tensor:
    """Advantages of every sample, one number each, same shape and dtype as `rewards_GN`. Example: grpo on [[1.5, 0.5]] gives [[0.7071, -0.7071]].

    With w the group weight and R a group's total rewards: grpo w (R - mean) / (std + 1e-9), unbiased std; dr_grpo R - mean;
    rloo w (R - mean of the others); reinforce_baseline w (R - mean); reinforce_pp w R. Estimators that `is_whitened` names are to be
    whitened over all valid tokens afterwards (`whiten`).

    Args:
        name: one of NAMES.
        lengths_GN: response lengths in tokens; needed by `adora`.
        truncated_GN: bool, responses cut at the length limit; ADORA leaves them out of the wrong answers' mean length.
        compat: "mm_eureka": the original's arithmetic, in the dtype that comes in, rounding noise of groups with equal rewards
            included, and its fixed limit of 4094 tokens in ADORA.
        options: see GroupOptions.

    Raises:
        ValueError: an unknown name or compat, rewards that are not floating [G, N], too few samples, or `adora` without lengths.
        TypeError: an unknown option.
    """
    if unknown := sorted(options.keys() - GroupOptions.__annotations__.keys()):
        raise TypeError(f"compute() got an unexpected keyword argument {unknown[0]!r}")
    _check(name, rewards_GN, compat)
    reward_GN = rewards_GN.double() if compat is None else rewards_GN
    centred_GN = reward_GN - reward_GN.mean(dim=1, keepdim=True)
    if name == "reinforce_pp":
        shaped_GN = reward_GN
    elif name == "rloo":
        others_GN = reward_GN.sum(dim=1, keepdim=True) - reward_GN
        shaped_GN = reward_GN - others_GN / (reward_GN.shape[1] - 1)
    elif name == "grpo":
        shaped_GN = centred_GN / (reward_GN.std(dim=1, keepdim=True) + 1e-9)
    else:
        shaped_GN = centred_GN
    if compat is None and name != "reinforce_pp":
        # Equal rewards carry no signal; without this, rounding noise in the mean is divided by 1e-9.
        equal_G = reward_GN.amax(dim=1) == reward_GN.amin(dim=1)
        shaped_GN = torch.where(equal_G[:, None], 0.0, shaped_GN)
    adora, clip_filter, reward_clip = options.get("adora"), options.get("clip_filter"), options.get("reward_clip")
    if name != "dr_grpo" and adora is not None:
        if lengths_GN is None:
            raise ValueError("adora compares response lengths: give lengths_GN")
        if compat == "mm_eureka":
            truncated_GN = lengths_GN >= _MM_EUREKA_LENGTH_LIMIT_TOKENS
        shaped_GN = adora_weights(reward_GN, lengths_GN, adora, truncated_GN=truncated_GN) * shaped_GN
    elif name != "dr_grpo" and clip_filter is not None:
        shaped_GN = clip_filter_weights(reward_GN, clip_filter) * shaped_GN
    if reward_clip is not None:
        shaped_GN = shaped_GN.clamp(*reward_clip)
    return shaped_GN.to(rewards_GN.dtype)


def is_whitened(name: str, compat: str | None = None) -> bool:
    """Whether the estimator's advantages are whitened over all valid tokens (the original: all but grpo)."""
    return name != "grpo" if compat == "mm_eureka" else name in ("reinforce_baseline", "reinforce_pp")


def _check(name: str, rewards_GN: Tensor, compat: str | None) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown advantage estimator {name!r}; known: {', '.join(NAMES)}")
    if compat not in (None, "mm_eureka"):
        raise ValueError(f"unknown compat {compat!r}; known: 'mm_eureka' or None")
    if rewards_GN.ndim != 2 or not rewards_GN.dtype.is_floating_point:
        raise ValueError(
            f"rewards_GN must be floating [groups, samples], got {rewards_GN.dtype} {list(rewards_GN.shape)}"
        )
    if rewards_GN.shape[1] < 2 and name in ("grpo", "rloo"):
        raise ValueError(
            f"{name} compares the samples of a prompt and needs at least 2 of them, got {rewards_GN.shape[1]}; "
            "raise the samples per prompt or use reinforce_pp"
        )


def adora_weights(
    rewards_GN: Tensor, lengths_GN: Tensor, lamda: float, *, truncated_GN: Tensor | None = None
) -> Tensor:
    """ADORA weights: lamda for a group with a correct answer whose longest correct answer is not longer than the mean
    of its wrong, untruncated ones (no such answer: infinite mean); 1 for every other group.

    A reward above 0.5 is correct: the total reward counts, so the format reward alone (0.5) is not. Lengths in tokens.
    """
    length_GN = lengths_GN.to(rewards_GN.dtype)
    right_GN = rewards_GN > 0.5
    wrong_GN = ~right_GN if truncated_GN is None else ~right_GN & ~truncated_GN
    longest_right_G = length_GN.masked_fill(~right_GN, 0.0).amax(dim=1)
    wrong_count_G = wrong_GN.sum(dim=1)
    wrong_mean_G = (length_GN * wrong_GN).sum(dim=1) / wrong_count_G.clamp(min=1)
    wrong_mean_G = wrong_mean_G.masked_fill(wrong_count_G == 0, float("inf"))
    easy_G = right_GN.any(dim=1) & (longest_right_G <= wrong_mean_G)
    weight_G = torch.where(easy_G, lamda, 1.0).to(rewards_GN.dtype)
    return weight_G[:, None].expand_as(rewards_GN)


def clip_filter_weights(rewards_GN: Tensor, largest: float) -> Tensor:
    """CPGD's clip-filter-like weights: of G groups one with unequal rewards gets min(largest, G / unequal groups), others 1."""
    unequal_G = rewards_GN.amax(dim=1) != rewards_GN.amin(dim=1)
    unequal = int(unequal_G.sum())
    weight = min(largest, len(rewards_GN) / unequal) if unequal else 1.0
    return torch.where(unequal_G, weight, 1.0).to(rewards_GN.dtype)[:, None].expand_as(rewards_GN)


def kl_estimate(logprobs_T: Tensor, ref_logprobs_T: Tensor, kind: str, *, limit: float = math.inf) -> Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, in at least float32; any shape.

    d = logprobs - ref_logprobs; k1: d; k2: d^2 / 2; k3: exp(-d) - 1 + d (http://joschu.net/blog/kl-approx.html).

    Args:
        limit: nats; k3 does not grow further, and has no gradient, where d < -limit. Losses and shaped rewards give LOG_RATIO_LIMIT,
            under compat too; without it, as in the original, k3 is infinite from d = -88.8 on. Nothing else needs a bound.

    Raises:
        ValueError: an unknown kind.
    """
    wide = torch.promote_types(logprobs_T.dtype, torch.float32)
    d_T = logprobs_T.to(wide) - ref_logprobs_T.to(wide)
    if kind == "k1":
        return d_T
    if kind == "k2":
        return d_T.square() / 2
    if kind == "k3":
        d_T = d_T.clamp(min=-limit)
        return torch.exp(-d_T) - 1 + d_T
    raise ValueError(f"unknown KL estimator {kind!r}; known: k1, k2, k3")


def token_rewards(
    rewards_S: Tensor,
    mask_T: Tensor,
    sequence_ids_T: Tensor,
    *,
    kl_T: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> Tensor:
    """Reward of every token: -kl_coefficient * kl, plus the sequence's reward on its last valid token; outside the mask 0.

    Args:
        mask_T: 1 on response tokens.
        sequence_ids_T: which of the S sequences a token belongs to, in ascending order.
        kl_coefficient: 0 or below counts as 0, as in the original.
    """
    valid_T = mask_T.bool()
    if kl_T is not None and kl_coefficient > 0:
        reward_T = torch.where(valid_T, -kl_coefficient * kl_T.to(rewards_S.dtype), 0.0)
    else:
        reward_T = torch.zeros(mask_T.shape, dtype=rewards_S.dtype, device=mask_T.device)
    position_T = torch.arange(mask_T.numel(), device=mask_T.device)
    last_S = torch.full((rewards_S.numel(),), -1, device=mask_T.device, dtype=position_T.dtype)
    last_S = last_S.scatter_reduce(0, sequence_ids_T[valid_T].long(), position_T[valid_T], "amax")
    has_token_S = last_S >= 0
    return reward_T.index_add(0, last_S[has_token_S], rewards_S[has_token_S])


def token_returns(token_rewards_T: Tensor, mask_T: Tensor, sequence_ids_T: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted reward-to-go inside each sequence, over valid tokens only; tokens outside the mask get 0.

    A hole in the mask is skipped: gamma counts valid tokens. (The original counts the hole and gives it a return.)
    """
    valid_T = mask_T.bool()
    reward_V, ids_V = token_rewards_T[valid_T], sequence_ids_T[valid_T].long()
    returns_T = torch.zeros_like(token_rewards_T)
    if reward_V.numel() == 0:
        return returns_T
    # Rows of one sequence each, pushed to the right edge, so that one reverse sweep serves all sequences.
    _, row_V, length_R = torch.unique_consecutive(ids_V, return_inverse=True, return_counts=True)
    longest = int(length_R.max())
    start_R = length_R.cumsum(0) - length_R
    column_V = torch.arange(ids_V.numel(), device=ids_V.device) - start_R[row_V] + (longest - length_R[row_V])
    grid_RL = reward_V.new_zeros(length_R.numel(), longest)
    grid_RL[row_V, column_V] = reward_V
    if gamma == 1.0:
        grid_RL = grid_RL.flip(1).cumsum(1).flip(1)
    else:
        for column in range(longest - 2, -1, -1):
            grid_RL[:, column] += gamma * grid_RL[:, column + 1]
    returns_T[valid_T] = grid_RL[row_V, column_V]
    return returns_T


def whiten(
    values: Tensor, weights: Tensor, *, all_reduce: AllReduce | None = None, compat: str | None = None
) -> Tensor:
    """(x - mean) * rsqrt(max(variance, 1e-8)), with mean and population variance over all valid tokens of the batch.

    Args:
        values: any shape.
        weights: same shape, the number of valid tokens a value stands for: the mask when values are per token, the response
            lengths when a value is a whole sequence's advantage. Where the weight is 0 the result is 0.
        all_reduce: sums a small float64 tensor over data-parallel ranks; then every rank uses the global statistics.
        compat: "mm_eureka" adds the original's 1e-8 to the result.
    """
    reduce = all_reduce or (lambda tensor: tensor)
    wide, weight = values.double(), weights.double()
    total, count = reduce(torch.stack([(wide * weight).sum(), weight.sum()]))
    mean = total / count.clamp(min=1)
    variance = reduce(((wide - mean).square() * weight).sum()) / count.clamp(min=1)
    result = (wide - mean) * torch.rsqrt(variance.clamp(min=1e-8))
    if compat == "mm_eureka":
        result = result + 1e-8
    return torch.where(weight > 0, result, 0.0).to(values.dtype)
