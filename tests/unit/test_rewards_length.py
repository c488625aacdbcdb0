"""Penalties on repetition and on length."""

import pytest

from eureka_megatron.rewards import score
from eureka_megatron.rewards.length import overlong_penalty, repetition_penalty


def test_repetition_is_the_share_of_repeated_n_grams():
    assert repetition_penalty(list(range(100)), max_penalty=1.0) == 0.0
    assert repetition_penalty([7] * 101, max_penalty=1.0, ngram=2) == pytest.approx(-0.99)
    assert repetition_penalty([1, 2, 3, 1, 2, 3], max_penalty=0.5, ngram=3) == pytest.approx(-0.5 * 0.25)
    assert repetition_penalty("a b a b a b", max_penalty=1.0, ngram=2) == pytest.approx(-3 / 5)
    assert repetition_penalty([1, 2], max_penalty=1.0) == 0.0
    assert repetition_penalty([1] * 100, max_penalty=0.0) == 0.0


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (3596, 0), (3846, -0.5), (4096, -1), (9999, -1)])
def test_overlong_falls_linearly_over_the_buffer(length: int, penalty: float):
    assert overlong_penalty(length, max_response_tokens=4096, buffer_tokens=500) == pytest.approx(penalty)


def test_a_buffer_longer_than_the_response_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.100"):
        overlong_penalty(5, max_response_tokens=100, buffer_tokens=101)


def test_penalties_are_components_of_the_total():
    response = "<think>" + "la " * 50 + "</think><answer>4</answer>"
    verdict = score(
        response,
        "4",
        repetition=0.8,
        repetition_ngram=5,
        length_tokens=90,
        max_response_tokens=100,
        overlong_buffer_tokens=20,
        weights={"overlong": 0.5},
    )
    assert verdict["repetition"] == pytest.approx(-0.8 * 45 / 47, abs=0.05)
    assert verdict["overlong"] == pytest.approx(-0.25)
    assert verdict["total"] == pytest.approx(1.5 + verdict["repetition"] + verdict["overlong"])
    assert score(response, "4", weights={"accuracy": 2.0}) == {"accuracy": 1.0, "format": 0.5, "total": 2.5}
