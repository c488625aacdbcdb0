"""From one number a response to a value a token, where tokens differ: KL in the reward, discounted returns, whitening over tokens.

Works on packed micro-batches, after the log-probabilities of the old policy and of the reference are known. Each holds whole sequences.

Shapes: T rows of a micro-batch, S sequences in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eureka_megatron.rl.advantages import LOG_RATIO_LIMIT, kl_estimate, token_returns, token_rewards, whiten


@dataclass(frozen=True)
class Shaping:
    """What is done to the responses' values.

    Attributes:
        kl_coefficient: β > 0 takes β · kl from every token's reward.
        kl_estimator: k1, k2 or k3, of the old policy against the reference.
        gamma: discount of what comes later, per learned token.
        whitened: to mean 0 and variance 1 over all learned tokens of the batch.
    """

    kl_coefficient: float = 0.0
    kl_estimator: str = "k1"
    gamma: float = 1.0
    whitened: bool = False
    compat: str | None = None

    @property
    def needed(self) -> bool:
        """Whether tokens of one response come to differ; otherwise whoever made the values has whitened them, too."""
        return self.kl_coefficient > 0 or self.gamma != 1.0


@dataclass(frozen=True)
class ShapingInputs:
    """One micro-batch. `values_T` carries the response's value on each of its tokens."""

    values_T: Tensor
    mask_T: Tensor
    sequence_ids_T: Tensor
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None


def shape(
    batches: Sequence[ShapingInputs], shaping: Shaping, all_reduce: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Advantages [T] of every micro-batch of this rank: returns-to-go of −β·kl with the response's value at its last token.

    Args:
        all_reduce: sums a small float64 tensor over data-parallel ranks, for whitening.

    Raises:
        ValueError: KL is asked for and a micro-batch lacks log-probabilities.
    """
    returns = [_returns(batch, shaping) for batch in batches]
    if not shaping.whitened:
        return returns
    # All tokens at once: the statistics are those of the whole batch, not of a micro-batch.
    masks = torch.cat([batch.mask_T for batch in batches])
    white = whiten(torch.cat(returns), masks, all_reduce=all_reduce, compat=shaping.compat)
    return list(white.split([len(values) for values in returns]))


def _returns(batch: ShapingInputs, shaping: Shaping) -> Tensor:
    valid_T = batch.mask_T.bool()
    ids_T = torch.where(valid_T, batch.sequence_ids_T, 0)
    sequences = int(ids_T.max()) + 1 if len(ids_T) else 0
    # Every token of a response carries the same value: writing them all is writing one.
    values_S = batch.values_T.new_zeros(sequences).index_put((ids_T[valid_T],), batch.values_T[valid_T])
    kl_T = None
    if shaping.kl_coefficient > 0:
        if batch.old_logprobs_T is None or batch.ref_logprobs_T is None:
            raise ValueError("KL in the reward needs old and reference log-probabilities")
        kl_T = kl_estimate(batch.old_logprobs_T, batch.ref_logprobs_T, shaping.kl_estimator, limit=LOG_RATIO_LIMIT)
    rewards_T = token_rewards(values_S, batch.mask_T, ids_T, kl_T=kl_T, kl_coefficient=shaping.kl_coefficient)
    return token_returns(rewards_T, batch.mask_T, ids_T, gamma=shaping.gamma)
