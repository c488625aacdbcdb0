"""Token-level advantages against the formula written out, token by token."""

import math

import pytest
import torch

from eureka_megatron.rl.shaping import Shaping, ShapingInputs, shape


def batch(seed: int, lengths: tuple[int, ...], filling: int = 2) -> ShapingInputs:
    """Sequences with two prompt rows each, a value a sequence, and filling at the end."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(length + 2 for length in lengths) + filling
    mask, ids, values = [], [], []
    for number, length in enumerate(lengths):
        mask += [0, 0, *[1] * length]
        ids += [number] * (length + 2)
        values += [0, 0, *[float(torch.randn((), generator=generator))] * length]
    return ShapingInputs(
        values_T=torch.tensor(values + [0.0] * filling),
        mask_T=torch.tensor(mask + [0] * filling).float(),
        sequence_ids_T=torch.tensor(ids + [-1] * filling),
        old_logprobs_T=-torch.rand(rows, generator=generator),
        ref_logprobs_T=-torch.rand(rows, generator=generator),
    )


def written_out(one: ShapingInputs, shaping: Shaping) -> list[float]:
    """Return-to-go of each learned token by its definition."""
    found = []
    for row in range(len(one.mask_T)):
        if not one.mask_T[row]:
            continue
        later = [
            r for r in range(row, len(one.mask_T)) if one.mask_T[r] and one.sequence_ids_T[r] == one.sequence_ids_T[row]
        ]
        total = 0.0
        for place, r in enumerate(later):
            d = float(one.old_logprobs_T[r] - one.ref_logprobs_T[r])
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[shaping.kl_estimator]
            reward = -shaping.kl_coefficient * kl + (float(one.values_T[r]) if r == later[-1] else 0.0)
            total += shaping.gamma**place * reward
        found.append(total)
    return found


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_are_the_discounted_sum_of_kl_and_reward(estimator: str, gamma: float) -> None:
    shaping = Shaping(kl_coefficient=0.1, kl_estimator=estimator, gamma=gamma)
    one = batch(0, (3, 1, 5))
    (found,) = shape([one], shaping)
    assert found[one.mask_T == 0].abs().max() == 0
    assert torch.allclose(found[one.mask_T > 0], torch.tensor(written_out(one, shaping)), atol=1e-6)


def test_whitening_counts_the_tokens_of_all_micro_batches() -> None:
    shaping = Shaping(kl_coefficient=0.1, whitened=True)
    parts = [batch(1, (4, 2)), batch(2, (7,)), batch(3, ())]
    found = torch.cat([values[one.mask_T > 0] for values, one in zip(shape(parts, shaping), parts, strict=True)])
    expected = torch.tensor([value for one in parts for value in written_out(one, shaping)], dtype=torch.float64)
    expected = (expected - expected.mean()) / expected.var(unbiased=False).sqrt()
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_ranks_whiten_with_the_statistics_of_all() -> None:
    shaping = Shaping(gamma=0.5, whitened=True)
    parts = [batch(4, (4, 2)), batch(5, (7, 1))]
    whole = shape(parts, shaping)
    counts: list[torch.Tensor] = []
    alone = [shape([one], Shaping(gamma=0.5)) for one in parts]
    for own, other in ((0, 1), (1, 0)):
        values, mask = alone[other][0].double(), parts[other].mask_T.double()

        def add(tensor: torch.Tensor, values: torch.Tensor = values, mask: torch.Tensor = mask) -> torch.Tensor:
            if tensor.numel() == 2:  # sum and count first, then squared deviations from the mean that came of them
                total = tensor + torch.stack([(values * mask).sum(), mask.sum()])
                counts.append(total[0] / total[1])
                return total
            return tensor + ((values - counts[-1]).square() * mask).sum()

        (found,) = shape([parts[own]], shaping, add)
        assert torch.allclose(found, whole[own], atol=1e-6)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gap", [-1000.0, -100.0, -88.8, 100.0])
def test_kl_in_the_reward_is_finite_however_far_the_policies_are_apart(
    gap: float, estimator: str, whitened: bool
) -> None:
    one = batch(7, (3, 2))
    one.old_logprobs_T[3] = one.ref_logprobs_T[3] + gap
    one.old_logprobs_T[-1] = -math.inf
    (found,) = shape([one], Shaping(kl_coefficient=1e-3, kl_estimator=estimator, whitened=whitened))
    assert torch.isfinite(found).all()


def test_nothing_to_do_is_said_so_and_missing_log_probabilities_too() -> None:
    assert not Shaping(whitened=True).needed
    assert Shaping(gamma=0.9).needed
    one = batch(6, (3,))
    bare = ShapingInputs(one.values_T, one.mask_T, one.sequence_ids_T)
    with pytest.raises(ValueError, match="needs old and reference log-probabilities"):
        shape([bare], Shaping(kl_coefficient=0.1))
