"""Credit, from judged rewards to the advantage of every token.

`credit_responses` gives one number a response, on the driver. Where tokens of one response come to differ (KL in the reward, discounted
returns), `credit_tokens` makes them from it on the trainer ranks, once the log-probabilities of the old policy and of the reference are
known. Whoever comes last whitens. The arithmetic is that of `rl.advantages`.

Shapes: G groups, N samples a group, T rows of a micro-batch, S sequences in it. A micro-batch holds whole sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eureka_megatron.rl import advantages
from eureka_megatron.rl.advantages import LOG_RATIO_LIMIT, MM_EUREKA_REWARD_CLIP, AllReduce, whiten
from eureka_megatron.types import MicroBatch


@dataclass(frozen=True)
class Shaping:
    """What is done to the responses' values.

    Attributes:
        kl_coefficient: β > 0 takes β · kl from every token's reward.
        kl_estimator: k1, k2 or k3, of the old policy against the reference.
        gamma: discount of what comes later, per learned token.
        whitened: to mean 0 and variance 1 over all learned tokens of the batch.
        compat: "mm_eureka" or None, see `advantages.compute`.
    """

    kl_coefficient: float = 0.0
    kl_estimator: str = "k1"
    gamma: float = 1.0
    whitened: bool = False
    compat: str | None = None

    @property
    def needed(self) -> bool:
        """Whether tokens of one response come to differ; otherwise `credit_responses` has whitened them, too."""
        return self.kl_coefficient > 0 or self.gamma != 1.0


def credit_responses(
    estimator: str,
    rewards_GN: Tensor,
    *,
    lengths_GN: Tensor,
    truncated_GN: Tensor,
    shaping: Shaping,
    options: Mapping[str, Any],
) -> Tensor:
    """[G, N]: what each response is credited with on each of its tokens. Whitening weighs a response by its tokens.

    Args:
        estimator: a name of `advantages.compute`, which the other arguments are for, too.
        options: fields of `advantages.GroupOptions`; under compat rewards are clipped as in the original unless they say otherwise.
    """
    if shaping.compat == "mm_eureka":
        options = {"reward_clip": MM_EUREKA_REWARD_CLIP, **options}
    values_GN = advantages.compute(
        estimator, rewards_GN, lengths_GN=lengths_GN, truncated_GN=truncated_GN, compat=shaping.compat, **options
    )
    if shaping.whitened and not shaping.needed:
        values_GN = whiten(values_GN, lengths_GN, compat=shaping.compat)
    return values_GN


def credit_tokens(batches: list[MicroBatch], shaping: Shaping, all_reduce: AllReduce | None = None) -> list[MicroBatch]:
    """The micro-batches with advantages token by token; unchanged when nothing asks for that. See `shape`."""
    if not shaping.needed:
        return batches
    old, ref = (_on_host([getattr(batch, name) for batch in batches]) for name in ("old_logprobs_T", "ref_logprobs_T"))
    inputs = [
        ShapingInputs(batch.advantages_T, batch.mask_T, batch.sequence_ids_T, old_T, ref_T)
        for batch, old_T, ref_T in zip(batches, old, ref, strict=True)
    ]
    shaped = shape(inputs, shaping, all_reduce)
    return [replace(batch, advantages_T=values_T) for batch, values_T in zip(batches, shaped, strict=True)]


def _on_host(values: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """A value for each micro-batch; all in one copy, for which the host has to wait."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return [None] * len(values)
    return torch.cat(known).cpu().split([len(value) for value in known])


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
        old_T, ref_T = batch.old_logprobs_T, batch.ref_logprobs_T
        if old_T is None or ref_T is None:
            raise ValueError("KL in the reward needs old and reference log-probabilities")
        kl_T = advantages.kl_estimate(old_T, ref_T, shaping.kl_estimator, limit=LOG_RATIO_LIMIT)
    rewards_T = advantages.token_rewards(
        values_S, batch.mask_T, ids_T, kl_T=kl_T, kl_coefficient=shaping.kl_coefficient
    )
    return advantages.token_returns(rewards_T, batch.mask_T, ids_T, gamma=shaping.gamma)
