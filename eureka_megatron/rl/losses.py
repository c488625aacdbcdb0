"""Policy losses as pure functions of one small record of packed tokens.

`policy_loss` returns a loss that is a SUM divided by a denominator of the global batch: adding it over micro-batches
and data-parallel ranks gives the loss of the whole batch, so an update does not depend on how the batch was cut. The
denominators arrive in the record; without them the local counts are used, so the function works in a notebook.

Metrics are float64 tensors, detached. A plain name holds a pair [numerator, denominator]: add pairs over micro-batches
and ranks, divide once at the end. A name that ends in `_max` holds a scalar to be reduced with max. `reduce_metrics`
does both. Names follow MM-EUREKA: policy_loss, kl, ratio, ratio_clip_upper, ratio_clip_lower, entropy.

Log-ratios are bounded to ±20 nats before any exponential (`advantages.LOG_RATIO_LIMIT` says why): importance ratios of every loss, GSPO's of
sequences, drift, rollout correction, k3, metrics. Beyond, values stay finite and the gradient through the ratio is zero.

A sequence lies whole inside one call.

Sources: PPO arXiv:1707.06347, dual clip arXiv:1912.09729, DAPO arXiv:2503.14476, Dr. GRPO arXiv:2503.20783, GSPO
arXiv:2507.18071, CISPO arXiv:2506.13585, CPGD arXiv:2505.12504, truncated importance sampling between rollout engine
and trainer: fengyao.notion.site/off-policy-rl, masking: IcePop.

Shape suffixes: T packed tokens, S sequences.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eureka_megatron.rl.advantages import LOG_RATIO_LIMIT, kl_estimate

Metrics = dict[str, Tensor]

_PROB_ERROR_ALARM = 1.05
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum_norm")
CORRECTIONS = ("off", "token_tis", "sequence_tis", "mask")


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch of packed sequences; every tensor is [T] unless its name says otherwise.

    Example, two responses of 3 and 2 tokens:
        LossInputs(logprobs_T=…, old_logprobs_T=…, advantages_T=tensor([1., 1., 1., -1., -1.]),
                   mask_T=tensor([1., 1., 1., 1., 1.]), sequence_ids_T=tensor([0, 0, 0, 1, 1]),
                   global_tokens=5, global_sequences=2)
    """

    logprobs_T: Tensor  # current policy, with gradient
    old_logprobs_T: Tensor  # trainer's log-probabilities before the update
    advantages_T: Tensor
    mask_T: Tensor  # 1 on response tokens, 0 on prompt, image and padding tokens
    sequence_ids_T: Tensor | None = None  # 0..S-1; needed by everything per sequence; any value where the mask is 0
    ref_logprobs_T: Tensor | None = None  # reference model, for the KL loss
    rollout_logprobs_T: Tensor | None = None  # the engine that sampled, for the rollout correction
    entropy_T: Tensor | None = None  # entropy in nats; with gradient when it is rewarded
    has_image_T: Tensor | None = None  # bool, the token's sequence has an image; splits the diagnostics
    # S; default: the largest id + 1, for which a GPU has to be waited for.
    sequences: int | None = None
    global_tokens: float | None = None  # response tokens of the global batch
    global_sequences: float | None = None  # sequences with at least one response token in the global batch


@dataclass(frozen=True)
class LossOptions:
    """Options shared by the losses; `DEFAULTS` holds what each loss changes.

    Attributes:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: bound c > 1 of the ratio for negative advantages.
        ratio_cap: MM-EUREKA's cap on the ratio for every sign (3.0).
        aggregation: token_mean | seq_mean (mean of per-sequence means) | seq_sum_norm (sums / a constant).
        sequence_norm_tokens: that constant: usually the longest response allowed, in tokens.
        kl_coefficient, kl_estimator, kl_aggregation: KL to the reference; aggregation None: the loss's own.
        entropy_coefficient: subtracts coefficient * entropy.
        drift_coefficient, drift_clip, drift_aggregation: CPGD policy drift: coefficient * min(sg(ratio) - 1, clip) logprob.
        correction, correction_bound: rollout correction: off | token_tis | sequence_tis | mask.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_cap: float | None = None
    aggregation: str = "token_mean"
    sequence_norm_tokens: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    kl_aggregation: str | None = None
    entropy_coefficient: float = 0.0
    drift_coefficient: float = 0.0
    drift_clip: float = 2.0
    drift_aggregation: str | None = None
    correction: str = "off"
    correction_bound: float = 2.0


DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo_clip": {},
    "dapo": {"clip_high": 0.28},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq_mean"},  # section 5.1 of the paper
    "cispo": {},
    "cpgd": {"drift_coefficient": 0.01},
}
# The original's choices: ratio capped at 3, sequence means unless dapo, token-mean drift, KL by sequence means.
_MM_EUREKA: dict[str, dict[str, Any]] = {
    "ppo_clip": {"ratio_cap": 3.0, "aggregation": "seq_mean"},
    "dapo": {"ratio_cap": 3.0, "clip_high": 0.2},
    "cpgd": {},
}
_MM_EUREKA_COMMON: dict[str, Any] = {"kl_aggregation": "seq_mean", "drift_aggregation": "token_mean"}


def policy_loss(
    name: str,
    inputs: LossInputs,
    *,
    compat: str | None = None,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """Loss of one micro-batch, already divided by the global denominator, and its metrics (see the module's docstring).

    Args:
        name: one of LOSSES.
        compat: "mm_eureka" starts from the original's choices.
        options: fields of LossOptions.

    Raises:
        ValueError: an unknown name or option, or an input that an option needs and the record lacks.
    """
    chosen = resolve_options(name, compat, **options)
    inputs = _without_outside(inputs)
    batch = _Batch(inputs, chosen)
    log_ratio_T = (inputs.logprobs_T - inputs.old_logprobs_T.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    pg_T, ratio_T = LOSSES[name](batch, log_ratio_T)
    weight_T = _correction_weights(batch)
    if weight_T is not None:
        pg_T = weight_T * pg_T
    metrics = _ratio_metrics(batch, ratio_T.detach(), compat)
    metrics |= _rollout_metrics(batch)
    if weight_T is not None:
        metrics["correction_weight"] = batch.pair(weight_T)

    loss = batch.aggregate(pg_T)
    metrics["pg_loss"] = batch.aggregate_pair(pg_T)
    if chosen.drift_coefficient:
        # The k3-like pull towards the old policy, bounded above only, as in the paper and the original.
        drift_T = (log_ratio_T.detach().exp() - 1).clamp(max=chosen.drift_clip) * inputs.logprobs_T
        loss = loss + chosen.drift_coefficient * batch.aggregate(drift_T, chosen.drift_aggregation)
        metrics["policy_drift"] = batch.aggregate_pair(drift_T, chosen.drift_aggregation)
    if inputs.ref_logprobs_T is not None:
        kl_T = kl_estimate(
            inputs.logprobs_T, inputs.ref_logprobs_T.detach(), chosen.kl_estimator, limit=LOG_RATIO_LIMIT
        )
        metrics["kl"] = batch.aggregate_pair(kl_T, chosen.kl_aggregation)
        if chosen.kl_coefficient:
            loss = loss + chosen.kl_coefficient * batch.aggregate(kl_T, chosen.kl_aggregation)
    elif chosen.kl_coefficient:
        raise ValueError("kl_coefficient is set but the record has no ref_logprobs_T")
    if inputs.entropy_T is not None:
        metrics["entropy"] = batch.pair(inputs.entropy_T)
        if chosen.entropy_coefficient:
            loss = loss - chosen.entropy_coefficient * batch.aggregate(inputs.entropy_T)
    elif chosen.entropy_coefficient:
        raise ValueError("entropy_coefficient is set but the record has no entropy_T")
    metrics["policy_loss"] = _loss_pair(metrics, chosen)
    return loss, metrics


def _without_outside(inputs: LossInputs) -> LossInputs:
    """The record with zeros outside the mask. There values may be anything, NaN included, and a product with a zero
    mask would still carry a NaN into the gradient; `where` at the entrance keeps it out of everything that follows."""
    valid_T = inputs.mask_T.bool()
    clean: dict[str, Any] = {
        name: torch.where(valid_T, value, 0.0)
        for name, value in vars(inputs).items()
        if isinstance(value, Tensor) and value.shape == valid_T.shape and value.is_floating_point()
    }
    return replace(inputs, **clean)


def resolve_options(name: str, compat: str | None = None, **options: Any) -> LossOptions:
    """LossOptions of a loss: its defaults, then the original's choices under compat, then the caller's options."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(LOSSES)}")
    known = {field.name for field in fields(LossOptions)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown loss option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    chosen = replace(LossOptions(), **DEFAULTS[name])
    if compat == "mm_eureka":
        if name not in _MM_EUREKA:
            raise ValueError(f"MM-EUREKA has no loss {name!r}; compat 'mm_eureka' knows {', '.join(_MM_EUREKA)}")
        chosen = replace(chosen, **_MM_EUREKA_COMMON, **_MM_EUREKA[name])
    elif compat is not None:
        raise ValueError(f"unknown compat {compat!r}; known: 'mm_eureka' or None")
    chosen = replace(chosen, **options)
    for kind in (chosen.aggregation, chosen.kl_aggregation, chosen.drift_aggregation):
        if kind is not None and kind not in AGGREGATIONS:
            raise ValueError(f"unknown aggregation {kind!r}; known: {', '.join(AGGREGATIONS)}")
    if chosen.correction not in CORRECTIONS:
        raise ValueError(f"unknown correction {chosen.correction!r}; known: {', '.join(CORRECTIONS)}")
    if (
        "seq_sum_norm" in (chosen.aggregation, chosen.kl_aggregation, chosen.drift_aggregation)
        and not chosen.sequence_norm_tokens
    ):
        raise ValueError("aggregation seq_sum_norm needs sequence_norm_tokens, e.g. the longest response allowed")
    return chosen


def add_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Metrics of several micro-batches (or ranks) together: pairs are added, of `_max` the larger stays."""
    total: Metrics = {}
    for part in parts:
        for key, value in part.items():
            combine = torch.maximum if key.endswith("_max") else torch.add
            total[key] = combine(total[key], value) if key in total else value
    return total


def reduce_metrics(parts: Iterable[Metrics]) -> dict[str, float]:
    """Metrics of several micro-batches (or ranks) in plain numbers: pairs are added, then divided."""
    total = add_metrics(parts)
    if not total:
        return {}
    # All in one copy: a GPU is waited for once, not once a number.
    numbers = iter(torch.cat([value.reshape(-1).double() for value in total.values()]).tolist())
    found = {}
    for key in total:
        found[key] = next(numbers)
        if not key.endswith("_max"):
            denominator = next(numbers)
            found[key] = found[key] / denominator if denominator else 0.0
    return found


class _Batch:
    """The record with what several parts of a loss share: the mask, per-sequence counts, aggregation."""

    def __init__(self, inputs: LossInputs, options: LossOptions) -> None:
        self.inputs, self.options = inputs, options
        self.valid_T = inputs.mask_T.bool()

    @cached_property
    def ids_T(self) -> Tensor:
        if self.inputs.sequence_ids_T is None:
            raise ValueError("this loss, aggregation or correction works per sequence: give sequence_ids_T")
        # Padding may carry any id; 0 is always in range and the mask keeps it out of every sum.
        return torch.where(self.valid_T, self.inputs.sequence_ids_T.long(), 0)

    @cached_property
    def counts_T(self) -> Tensor:
        """Response tokens of each token's sequence, float64; at least 1, to divide by."""
        return self.sequence_sums(self.valid_T.double()).clamp(min=1)

    def sequence_sums(self, value_T: Tensor) -> Tensor:
        """Detached sums over each whole sequence, spread back over its tokens."""
        ids_T, sequences = self.ids_T, self.inputs.sequences
        if sequences is None:
            sequences = int(ids_T.max()) + 1 if ids_T.numel() else 0
        sums_S = value_T.new_zeros(sequences).index_add(0, ids_T, torch.where(self.valid_T, value_T.detach(), 0.0))
        return sums_S[ids_T]

    def _numerator(self, value_T: Tensor, kind: str) -> Tensor:
        value_T = torch.where(self.valid_T, value_T, 0.0)
        return (value_T / self.counts_T.to(value_T.dtype) if kind == "seq_mean" else value_T).sum()

    def _denominator(self, kind: str) -> Tensor:
        """Of this micro-batch alone."""
        if kind == "token_mean":
            return self.valid_T.double().sum()
        # Each token counts 1/length of its sequence.
        return self._numerator(self.valid_T.double(), "seq_mean") * self._norm(kind)

    def _norm(self, kind: str) -> float:
        return (self.options.sequence_norm_tokens or 0.0) if kind == "seq_sum_norm" else 1.0

    def aggregate(self, value_T: Tensor, kind: str | None = None) -> Tensor:
        """The share of this micro-batch in the aggregate over the global batch."""
        kind = kind or self.options.aggregation
        given = self.inputs.global_tokens if kind == "token_mean" else self.inputs.global_sequences
        if given is None:
            return self._numerator(value_T, kind) / self._denominator(kind).clamp(min=1e-9)
        return self._numerator(value_T, kind) / (given * self._norm(kind))

    def aggregate_pair(self, value_T: Tensor, kind: str | None = None) -> Tensor:
        kind = kind or self.options.aggregation
        return torch.stack([self._numerator(value_T.detach().double(), kind), self._denominator(kind)])

    def pair(self, value_T: Tensor) -> Tensor:
        return _pair(value_T, self.valid_T)


def _pair(value_T: Tensor, chosen_T: Tensor) -> Tensor:
    """[sum, count] over the chosen tokens."""
    return torch.stack([torch.where(chosen_T, value_T.detach().double(), 0.0).sum(), chosen_T.double().sum()])


# --- the losses: (batch, log_ratio_T) -> (loss_T, ratio_T to report); one function each ---


def _clipped(batch: _Batch, ratio_T: Tensor) -> Tensor:
    """-min(r A, clip(r) A), with the optional caps."""
    options, advantage_T = batch.options, batch.inputs.advantages_T
    if options.ratio_cap is not None:
        ratio_T = ratio_T.clamp(max=options.ratio_cap)
    clipped_T = ratio_T.clamp(1 - options.clip_low, 1 + options.clip_high)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    if options.dual_clip is not None:
        bounded_T = torch.minimum(loss_T, -options.dual_clip * advantage_T)
        loss_T = torch.where(advantage_T < 0, bounded_T, loss_T)
    return loss_T


def _ppo_clip(batch: _Batch, log_ratio_T: Tensor) -> tuple[Tensor, Tensor]:
    ratio_T = log_ratio_T.exp()
    return _clipped(batch, ratio_T), ratio_T


def _gspo(batch: _Batch, log_ratio_T: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence's geometric mean ratio, in the paper's token form: its value from the sequence, its gradient from the token."""
    sequence_T = batch.sequence_sums(log_ratio_T) / batch.counts_T.to(log_ratio_T.dtype)
    ratio_T = (sequence_T + log_ratio_T - log_ratio_T.detach()).exp()
    return _clipped(batch, ratio_T), ratio_T


def _cispo(batch: _Batch, log_ratio_T: Tensor) -> tuple[Tensor, Tensor]:
    """-sg(clip(r, 0, 1 + clip_high)) A logprob: no token loses its gradient."""
    ratio_T = log_ratio_T.detach().exp()
    weight_T = ratio_T.clamp(max=1 + batch.options.clip_high)
    return -weight_T * batch.inputs.advantages_T * batch.inputs.logprobs_T, ratio_T


def _cpgd(batch: _Batch, log_ratio_T: Tensor) -> tuple[Tensor, Tensor]:
    """Clipped log-probability instead of the ratio: the gradient does not grow with the ratio."""
    inputs, options = batch.inputs, batch.options
    logprob_T, old_T = inputs.logprobs_T, inputs.old_logprobs_T.detach()
    upper_T = torch.minimum(logprob_T, old_T + math.log1p(options.clip_high))
    lower_T = torch.maximum(logprob_T, old_T + math.log1p(-options.clip_low))
    bounded_T = torch.where(inputs.advantages_T > 0, upper_T, lower_T)
    return -inputs.advantages_T * bounded_T, log_ratio_T.detach().exp()


LOSSES: dict[str, Callable[[_Batch, Tensor], tuple[Tensor, Tensor]]] = {
    "ppo_clip": _ppo_clip,
    "dapo": _ppo_clip,
    "gspo": _gspo,
    "cispo": _cispo,
    "cpgd": _cpgd,
}


# --- rollout correction ---


def _correction_weights(batch: _Batch) -> Tensor | None:
    kind, bound = batch.options.correction, batch.options.correction_bound
    if kind == "off":
        return None
    if batch.inputs.rollout_logprobs_T is None:
        raise ValueError(f"correction {kind!r} needs rollout_logprobs_T in the record")
    gap_T = (batch.inputs.old_logprobs_T - batch.inputs.rollout_logprobs_T).detach()
    if kind == "sequence_tis":
        gap_T = batch.sequence_sums(gap_T)
    weight_T = gap_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind == "mask":
        return torch.where((weight_T >= 1 / bound) & (weight_T <= bound), weight_T, 0.0)
    return weight_T.clamp(max=bound)


# --- metrics ---


def _rollout_metrics(batch: _Batch) -> Metrics:
    """Trainer against rollout engine: mean and max of exp|log-ratio|, and the share of tokens beyond 1.05."""
    if batch.inputs.rollout_logprobs_T is None:
        return {}
    gap_T = (batch.inputs.old_logprobs_T - batch.inputs.rollout_logprobs_T).detach()
    error_T = gap_T.double().abs().clamp(max=LOG_RATIO_LIMIT).exp()
    far_T = (error_T > _PROB_ERROR_ALARM).double()
    parts = {"": batch.valid_T}
    if batch.inputs.has_image_T is not None:
        has_image_T = batch.inputs.has_image_T.bool()
        parts |= {"_text": batch.valid_T & ~has_image_T, "_image": batch.valid_T & has_image_T}
    metrics: Metrics = {}
    for suffix, chosen_T in parts.items():
        worst = torch.where(chosen_T, error_T, 0.0).amax() if error_T.numel() else error_T.new_zeros(())
        metrics |= {
            f"mult_prob_error{suffix}": _pair(error_T, chosen_T),
            f"mult_prob_error_share{suffix}": _pair(far_T, chosen_T),
            f"mult_prob_error{suffix}_max": worst,
        }
    return metrics


def _ratio_metrics(batch: _Batch, ratio_T: Tensor, compat: str | None) -> Metrics:
    """Mean ratio and the shares beyond the clip range (the original: beyond 1.2 and 0.8, means of sequence means)."""
    original = compat == "mm_eureka"
    low, high = (0.2, 0.2) if original else (batch.options.clip_low, batch.options.clip_high)
    values = {
        "ratio": ratio_T,
        "ratio_clip_upper": (ratio_T > 1 + high).double(),
        "ratio_clip_lower": (ratio_T < 1 - low).double(),
    }
    if original:
        return {key: batch.aggregate_pair(value_T, "seq_mean") for key, value_T in values.items()}
    return {key: batch.pair(value_T) for key, value_T in values.items()}


def _loss_pair(metrics: Metrics, options: LossOptions) -> Tensor:
    """Policy gradient plus drift, the original's `policy_loss`; on one denominator, that of the policy gradient."""
    pair = metrics["pg_loss"]
    if "policy_drift" in metrics:
        drift, count = metrics["policy_drift"]
        scaled = options.drift_coefficient * drift * (pair[1] / count.clamp(min=1e-9))
        pair = torch.stack([pair[0] + scaled, pair[1]])
    return pair
