"""Every loss against its formula written naively in float64, with autograd; and the laws the module promises.

Naive means: one Python loop per token, no masks, no packing, no clamp of log-ratios.
"""

import math

import pytest
import torch
from torch import Tensor

from eureka_megatron.rl.advantages import LOG_RATIO_LIMIT, kl_estimate
from eureka_megatron.rl.losses import CORRECTIONS, LOSSES, LossInputs, policy_loss, reduce_metrics

LENGTHS = (5, 1, 7, 3)
AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum_norm")
NORM_TOKENS = 11.0
# Measured maximum over all cases below: 2.3e-16 relative. float64 sums in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def batch(seed: int = 0, spread: float = 0.4, **changes: object) -> LossInputs:
    """Four sequences of prompt and response tokens; log-ratios wide enough that every clip is hit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)

    old_T = -normal(1.0).abs() - 0.1
    ids_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    mask_T = (torch.rand(sum(LENGTHS), generator=generator) > 0.25).double()
    mask_T[[0, 5, 6, 13]] = 1.0  # no sequence is empty
    fields: dict = {
        "logprobs_T": (old_T + normal(spread)).requires_grad_(),
        "old_logprobs_T": old_T,
        "advantages_T": normal(1.0),
        "mask_T": mask_T,
        "sequence_ids_T": ids_T,
        "ref_logprobs_T": old_T + normal(0.3),
        "rollout_logprobs_T": old_T + normal(0.5),
        "entropy_T": normal(1.0).abs().requires_grad_(),
        "has_image_T": ids_T % 2 == 0,
    }
    return LossInputs(**(fields | changes))


def tokens_of(inputs: LossInputs) -> list[list[int]]:
    """Positions of the response tokens of each sequence."""
    where = [[] for _ in LENGTHS]
    for t, (sequence, valid) in enumerate(zip(inputs.sequence_ids_T.tolist(), inputs.mask_T.tolist(), strict=True)):
        if valid:
            where[sequence].append(t)
    return where


def naive_aggregate(values: dict[int, Tensor], where: list[list[int]], kind: str) -> Tensor:
    if kind == "token_mean":
        return sum(values[t] for tokens in where for t in tokens) / sum(len(tokens) for tokens in where)
    per_sequence = [sum(values[t] for t in tokens) for tokens in where]
    if kind == "seq_mean":
        return sum(total / len(tokens) for total, tokens in zip(per_sequence, where, strict=True)) / len(where)
    return sum(per_sequence) / (len(where) * NORM_TOKENS)


def naive_token_loss(name: str, inputs: LossInputs, low: float, high: float, dual: float | None) -> dict[int, Tensor]:
    """The formulas of ALGORITHMS.md, token by token."""
    losses: dict[int, Tensor] = {}
    for tokens in tokens_of(inputs):
        gaps = torch.stack([inputs.logprobs_T[t] - inputs.old_logprobs_T[t] for t in tokens])
        for t, gap in zip(tokens, gaps, strict=True):
            logprob, old, advantage = inputs.logprobs_T[t], inputs.old_logprobs_T[t], inputs.advantages_T[t]
            ratio = torch.exp(gap)
            if name == "gspo":
                ratio = torch.exp(gaps.mean()).detach() * torch.exp(logprob - logprob.detach())
            if name == "cispo":
                losses[t] = -ratio.clamp(0, 1 + high).detach() * advantage * logprob
            elif name == "cpgd" and advantage > 0:
                losses[t] = -torch.minimum(logprob, math.log(1 + high) + old) * advantage
            elif name == "cpgd":
                losses[t] = -torch.maximum(logprob, math.log(1 - low) + old) * advantage
            else:
                losses[t] = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
                if dual is not None and advantage < 0:
                    losses[t] = torch.minimum(losses[t], -dual * advantage)
    return losses


def gradients(loss: Tensor, inputs: LossInputs) -> list[Tensor]:
    wanted = [inputs.logprobs_T, inputs.entropy_T]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_the_formula(name: str, aggregation: str, dual_clip: float | None):
    low, high = 0.15, 0.3
    for seed in range(5):
        inputs = batch(seed)
        options = {"clip_low": low, "clip_high": high, "dual_clip": dual_clip, "drift_coefficient": 0.0}
        loss, metrics = policy_loss(name, inputs, aggregation=aggregation, sequence_norm_tokens=NORM_TOKENS, **options)
        naive = naive_aggregate(naive_token_loss(name, inputs, low, high, dual_clip), tokens_of(inputs), aggregation)
        torch.testing.assert_close(loss, naive, **EXACT)
        torch.testing.assert_close(gradients(loss, inputs)[0], gradients(naive, inputs)[0], **EXACT)
        assert reduce_metrics([metrics])["policy_loss"] == pytest.approx(float(naive.detach()), rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_drift_and_entropy_terms_equal_their_formulas(estimator: str, aggregation: str):
    inputs = batch(1)
    options = {"aggregation": aggregation, "sequence_norm_tokens": NORM_TOKENS, "drift_coefficient": 0.0}
    extra = {"kl_coefficient": 0.3, "kl_estimator": estimator, "entropy_coefficient": 0.2}
    plain, _ = policy_loss("cpgd", inputs, **options)
    full, metrics = policy_loss("cpgd", inputs, **(options | extra | {"drift_coefficient": 0.05, "drift_clip": 0.3}))
    kl, drift, entropy = {}, {}, {}
    where = tokens_of(inputs)
    for t in (t for tokens in where for t in tokens):
        d = inputs.logprobs_T[t] - inputs.ref_logprobs_T[t]
        kl[t] = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
        ratio = torch.exp(inputs.logprobs_T[t] - inputs.old_logprobs_T[t]).detach()
        drift[t] = (ratio - 1).clamp(max=0.3) * inputs.logprobs_T[t]
        entropy[t] = inputs.entropy_T[t]
    terms = [naive_aggregate(values, where, aggregation) for values in (kl, drift, entropy)]
    naive = plain + 0.3 * terms[0] + 0.05 * terms[1] - 0.2 * terms[2]
    torch.testing.assert_close(full, naive, **EXACT)
    for ours, theirs in zip(gradients(full, inputs), gradients(naive, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    reduced = reduce_metrics([metrics])
    assert reduced["kl"] == pytest.approx(terms[0].item(), rel=1e-12)
    assert reduced["policy_loss"] == pytest.approx((plain + 0.05 * terms[1]).item(), rel=1e-12)


@pytest.mark.parametrize("correction", ["token_tis", "sequence_tis", "mask"])
def test_rollout_correction_weighs_each_token_without_a_gradient_of_its_own(correction: str):
    inputs, bound = batch(2), 1.6
    loss, _ = policy_loss("ppo_clip", inputs, correction=correction, correction_bound=bound)
    where = tokens_of(inputs)
    values = naive_token_loss("ppo_clip", inputs, 0.2, 0.2, None)
    for tokens in where:
        gaps = {t: float(inputs.old_logprobs_T[t] - inputs.rollout_logprobs_T[t]) for t in tokens}
        for t in tokens:
            ratio = math.exp(sum(gaps.values()) if correction == "sequence_tis" else gaps[t])
            inside = 1 / bound <= ratio <= bound
            values[t] = values[t] * (ratio * inside if correction == "mask" else min(ratio, bound))
    naive = naive_aggregate(values, where, "token_mean")
    torch.testing.assert_close(loss, naive, **EXACT)
    torch.testing.assert_close(gradients(loss, inputs)[0], gradients(naive, inputs)[0], **EXACT)


def test_rollout_diagnostics_split_text_and_image_sequences():
    inputs = batch(3)
    metrics = reduce_metrics([policy_loss("ppo_clip", inputs)[1]])
    for suffix, wanted in (("", (0, 1, 2, 3)), ("_image", (0, 2)), ("_text", (1, 3))):
        positions = [t for sequence in wanted for t in tokens_of(inputs)[sequence]]
        errors = [math.exp(abs(float(inputs.old_logprobs_T[t] - inputs.rollout_logprobs_T[t]))) for t in positions]
        assert metrics[f"mult_prob_error{suffix}"] == pytest.approx(sum(errors) / len(errors))
        assert metrics[f"mult_prob_error{suffix}_max"] == pytest.approx(max(errors))
        assert metrics[f"mult_prob_error_share{suffix}"] == pytest.approx(sum(e > 1.05 for e in errors) / len(errors))


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_gradient_is_the_policy_gradient(name: str):
    """At ratio 1 every loss has the gradient of -mean(A log pi)."""
    base = batch(4)
    logprobs_T = base.old_logprobs_T.clone().requires_grad_()
    inputs = batch(4, logprobs_T=logprobs_T)
    # GSPO and the rest agree only where a token's gradient is its own: advantages constant within a sequence.
    inputs = LossInputs(**{**inputs.__dict__, "advantages_T": inputs.advantages_T[inputs.sequence_ids_T]})
    loss, _ = policy_loss(name, inputs, aggregation="token_mean")
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    torch.testing.assert_close(gradient_T, -inputs.advantages_T * inputs.mask_T / inputs.mask_T.sum(), **EXACT)


@pytest.mark.parametrize(
    ("name", "keeps_gradient"), [("ppo_clip", False), ("dapo", False), ("cpgd", False), ("cispo", True)]
)
def test_clipped_tokens_have_no_gradient_except_in_cispo(name: str, keeps_gradient: bool):
    gap_T = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    advantage_T = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logprobs_T = (gap_T - 3).requires_grad_()
    old_T = torch.full((4,), -3.0, dtype=torch.float64)
    inputs = LossInputs(logprobs_T, old_T, advantage_T, torch.ones(4), torch.zeros(4, dtype=torch.long))
    loss, _ = policy_loss(name, inputs, drift_coefficient=0.0)
    (gradient_T,) = torch.autograd.grad(loss, logprobs_T)
    clipped_T = torch.tensor([True, False, False, True])  # too high with A > 0, too low with A < 0
    assert (gradient_T[clipped_T] != 0).all() == keeps_gradient
    assert (gradient_T[~clipped_T] != 0).all()


def test_the_originals_cap_on_the_ratio_stops_the_gradient_for_every_sign():
    logprobs_T = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logprobs_T, logprobs_T.detach() - 2, torch.tensor([-1.0, -1.0]).double(), torch.ones(2), torch.arange(2)
    )
    capped, _ = policy_loss("ppo_clip", inputs, compat="mm_eureka")
    assert float(capped) == pytest.approx(3.0)
    assert torch.autograd.grad(capped, logprobs_T)[0].tolist() == [0.0, 0.0]
    plain, _ = policy_loss("ppo_clip", inputs)
    assert float(plain) == pytest.approx(math.exp(2))


def pieces(inputs: LossInputs, cuts: list[list[int]]) -> list[LossInputs]:
    """Micro-batches of whole sequences, with the global denominators of the whole batch."""
    valid_T = inputs.mask_T.bool()
    tokens, sequences = int(valid_T.sum()), len(inputs.sequence_ids_T[valid_T].unique())
    parts = []
    for chosen in cuts:
        where_T = torch.isin(inputs.sequence_ids_T, torch.tensor(chosen))
        fields = {key: value[where_T] for key, value in inputs.__dict__.items() if isinstance(value, Tensor)}
        fields["sequence_ids_T"] = torch.searchsorted(torch.tensor(chosen), fields["sequence_ids_T"])
        parts.append(LossInputs(**fields, global_tokens=tokens, global_sequences=sequences))
    return parts


FULL = {"kl_coefficient": 0.1, "entropy_coefficient": 0.01, "correction": "sequence_tis", "drift_coefficient": 0.02}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_do_not_depend_on_micro_batches(name: str, aggregation: str):
    inputs = batch(5)
    options = FULL | {"aggregation": aggregation, "sequence_norm_tokens": NORM_TOKENS}
    whole, metrics = policy_loss(name, inputs, **options)
    expected = gradients(whole, inputs)
    for cuts in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 3], [1, 2]]):
        results = [policy_loss(name, part, **options) for part in pieces(inputs, cuts)]
        loss = sum(part for part, _ in results)
        torch.testing.assert_close(loss, whole, **EXACT)
        for ours, theirs in zip(gradients(loss, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        assert reduce_metrics([part for _, part in results]) == pytest.approx(reduce_metrics([metrics]), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_outside_the_mask_never_matters(name: str):
    clean = batch(7)
    outside_T = clean.mask_T == 0
    poison = {
        key: torch.where(outside_T, float("nan"), value.detach()) if value.is_floating_point() else value
        for key, value in clean.__dict__.items()
        if isinstance(value, Tensor) and key not in ("mask_T", "sequence_ids_T", "has_image_T")
    }
    poison["logprobs_T"] = poison["logprobs_T"].requires_grad_()
    poison["entropy_T"] = poison["entropy_T"].requires_grad_()
    dirty = LossInputs(
        **{**clean.__dict__, **poison, "sequence_ids_T": torch.where(outside_T, -7, clean.sequence_ids_T)}
    )
    for aggregation in ("token_mean", "seq_mean"):
        options = FULL | {"aggregation": aggregation}
        expected, expected_metrics = policy_loss(name, clean, **options)
        loss, metrics = policy_loss(name, dirty, **options)
        torch.testing.assert_close(loss, expected, **EXACT)
        for ours, theirs in zip(gradients(loss, dirty), gradients(expected, clean), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        assert reduce_metrics([metrics]) == pytest.approx(reduce_metrics([expected_metrics]), rel=1e-12)


def test_a_batch_without_response_tokens_is_zero_and_finite():
    inputs = batch(8, mask_T=torch.zeros(sum(LENGTHS), dtype=torch.float64))
    for name in LOSSES:
        for aggregation in AGGREGATIONS:
            options = FULL | {"aggregation": aggregation, "sequence_norm_tokens": NORM_TOKENS}
            loss, metrics = policy_loss(name, inputs, **options)
            assert float(loss) == 0.0
            assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, inputs))
            assert all(math.isfinite(value) for value in reduce_metrics([metrics]).values())


@pytest.mark.parametrize("gap", [21.0, 88.8, 100.0, 1000.0])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_gap_of_any_pair_of_policies_leaves_loss_gradient_and_metrics_finite(
    name: str, estimator: str, correction: str, gap: float
):
    for compat in (None, "mm_eureka") if name in ("ppo_clip", "dapo", "cpgd") else (None,):
        for far in range(4):  # each policy in turn is far below the others, in the second token far above
            values = [torch.full((4,), -1.0) for _ in range(4)]
            values[far] = torch.tensor([-1.0 - gap, -1.0 + gap, -1.0, -math.inf])
            logprobs_T, old_T, ref_T, rollout_T = values
            logprobs_T.requires_grad_()
            mask_T = torch.tensor([1.0, 1.0, 1.0, 0.0])
            for sign in (-1.0, 1.0):
                inputs = LossInputs(
                    logprobs_T,
                    old_T,
                    torch.full((4,), sign),
                    mask_T,
                    torch.tensor([0, 0, 1, 1]),
                    ref_logprobs_T=ref_T,
                    rollout_logprobs_T=rollout_T,
                )
                options = {"kl_coefficient": 1e-3, "kl_estimator": estimator, "drift_coefficient": 0.01}
                loss, metrics = policy_loss(name, inputs, compat=compat, correction=correction, **options)
                assert torch.isfinite(loss)
                assert torch.isfinite(torch.autograd.grad(loss, logprobs_T)[0]).all()
                assert all(math.isfinite(value) for value in reduce_metrics([metrics]).values())


def test_within_its_bound_k3_and_its_gradient_are_the_formulas():
    d_T = torch.linspace(-19.9, 60.0, 300, dtype=torch.float64, requires_grad=True)
    bounded, plain = (kl_estimate(d_T, torch.zeros(300), "k3", limit=limit) for limit in (LOG_RATIO_LIMIT, math.inf))
    assert torch.equal(bounded, plain)
    assert torch.equal(*(torch.autograd.grad(value.sum(), d_T)[0] for value in (bounded, plain)))


def test_bad_input_names_what_is_missing_and_what_would_be_right():
    inputs = batch(9)
    with pytest.raises(ValueError, match="ppo_clip, dapo, gspo, cispo, cpgd"):
        policy_loss("ppo", inputs)
    with pytest.raises(ValueError, match="unknown loss option 'clip'"):
        policy_loss("ppo_clip", inputs, clip=0.2)
    with pytest.raises(ValueError, match="token_mean, seq_mean"):
        policy_loss("ppo_clip", inputs, aggregation="mean")
    with pytest.raises(ValueError, match="sequence_norm_tokens"):
        policy_loss("ppo_clip", inputs, aggregation="seq_sum_norm")
    with pytest.raises(ValueError, match="rollout_logprobs_T"):
        policy_loss("ppo_clip", batch(9, rollout_logprobs_T=None), correction="token_tis")
    with pytest.raises(ValueError, match="ref_logprobs_T"):
        policy_loss("ppo_clip", batch(9, ref_logprobs_T=None), kl_coefficient=0.1)
    with pytest.raises(ValueError, match="sequence_ids_T"):
        policy_loss("gspo", batch(9, sequence_ids_T=None))
    with pytest.raises(ValueError, match="has no loss 'gspo'"):
        policy_loss("gspo", inputs, compat="mm_eureka")
