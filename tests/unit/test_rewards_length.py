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


LOOPS = {
    "Chinese": "我们再检查一次，得到同样的结果。",
    "Japanese": "もう一度確認すると、同じ結果になります。",
    "Thai": "ตรวจสอบอีกครั้งได้ผลลัพธ์เหมือนเดิม",
    "Korean": "다시 한번 확인하면 같은 결과가 나온다. ",
    "English": "wait, let me check that again: it is the same. ",
    "a formula": "1+1+1+",
    "one letter": "a",
    "mixed": "所以 $x=5$，再算一次 area = 12。",
}


@pytest.mark.parametrize("language", LOOPS)
def test_a_loop_is_penalised_in_every_language(language: str):
    assert repetition_penalty(LOOPS[language] * 200, max_penalty=1.0) < -0.9


def test_prose_and_formulas_that_go_on_are_free():
    chinese = (
        "如图，在平行四边形中，对角线相交于点，点在边上，连接并延长交于点。由平行线的性质可知两个内错角相等，又因为对顶角相等，"
        "所以两个三角形全等，从而得到对应边相等。因此四边形的对角线互相平分，它是平行四边形。接下来求面积：底边长为六，高为四，面积等于二十四。"
    )
    english = "The diagonals of a parallelogram bisect each other, so the triangles on both sides are congruent."
    formula = "\\frac{-b\\pm\\sqrt{b^2-4ac}}{2a}=" + "+".join(f"x_{{{n}}}^{n}" for n in range(60))
    for text in (chinese, english, formula, chinese + english + formula):
        assert repetition_penalty(text, max_penalty=1.0) > -0.02


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
