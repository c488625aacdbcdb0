"""The online filter's bounds are inclusive and exact."""

import pytest
import torch

from eureka_megatron.rl.filters import keep_groups, outcome_counts


@pytest.mark.parametrize("samples", [5, 8, 10, 16, 20, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_count_is_kept_exactly_between_the_inclusive_bounds(samples: int, dtype: torch.dtype):
    rights = torch.arange(samples + 1)
    accuracy_GN = (torch.arange(samples) < rights[:, None]).to(dtype)
    for low in range(samples + 1):
        for high in range(low, samples + 1):
            kept_G = keep_groups(accuracy_GN, lower=low / samples, upper=high / samples)
            assert kept_G.tolist() == [low <= right <= high for right in rights.tolist()]


def test_eight_of_ten_lies_on_a_bound_of_four_fifths_but_not_for_the_original():
    accuracy_GN = torch.tensor([[1.0] * 8 + [0.0] * 2])
    assert keep_groups(accuracy_GN, lower=0.2, upper=0.8).tolist() == [True]
    assert keep_groups(accuracy_GN, lower=0.2, upper=0.8, compat="mm_eureka").tolist() == [False]


def test_crossed_bounds_keep_nothing():
    assert not keep_groups(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), lower=0.9, upper=0.1).any()


def test_true_counts_of_outcomes():
    accuracy_GN = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    assert outcome_counts(accuracy_GN) == {"all_wrong": 1, "mixed": 1, "all_right": 2}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="groups, samples"):
        keep_groups(torch.zeros(2), lower=0.1, upper=0.9)
    with pytest.raises(ValueError, match="mm_eureka"):
        keep_groups(torch.zeros(2, 2), lower=0.1, upper=0.9, compat="original")
