"""The judge on answers whose truth is known by construction (tests/helpers/answers.py)."""

import pytest

from eureka_megatron.rewards import score
from tests.helpers.answers import constructed


@pytest.mark.parametrize("seed", [1, 2])
def test_few_right_answers_are_missed_and_hardly_a_wrong_one_is_rewarded(seed: int):
    """The bars are 3 % and 0.2 %; measured at most 0.3 % and 0.0 % over seeds 1 to 9 of 3,000."""
    cases = constructed(3000, seed)
    verdicts = [score(case.response, case.gold)["accuracy"] for case in cases]
    missed = [case for case, verdict in zip(cases, verdicts, strict=True) if case.right and not verdict]
    rewarded = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict and not case.right]
    right = sum(case.right for case in cases)
    assert len(missed) <= 0.01 * right, missed[:5]
    assert len(rewarded) <= 0.002 * (len(cases) - right), rewarded[:5]
