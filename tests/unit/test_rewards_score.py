"""`rewards.score`: the answer's value, the form of the response, and the total."""

import pytest

from eureka_megatron.rewards import ScoringRules, parseable_gold, score
from eureka_megatron.rewards.format import is_well_formed


def accuracy(answer_text: str, gold: object, **options: object) -> float:
    return score(f"<think>t</think><answer>{answer_text}</answer>", gold, **options)["accuracy"]


def test_total_is_the_sum_of_its_weighted_parts():
    response = "<think>2+2</think>\n<answer>4</answer>"
    assert score(response, "4") == {"accuracy": 1.0, "format": 0.5, "total": 1.5}
    assert score(response, "5") == {"accuracy": 0.0, "format": 0.5, "total": 0.5}
    assert score("4", "4") == {"accuracy": 0.0, "format": 0.0, "total": 0.0}
    assert score(response, "4", weights={"format": 0.1})["total"] == pytest.approx(1.1)


def test_untagged_boxed_judges_the_last_balanced_box():
    text = r"First \boxed{3}, then $\boxed{\frac{1}{2}}$."
    assert score(text, r"\frac12", untagged="boxed")["accuracy"] == 1.0
    assert score(text, "3", untagged="boxed")["accuracy"] == 0.0
    assert score(text, r"\frac12")["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("response", "think", "strict_ends", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "required", False, True),
        ("x <think>a</think> \n <answer>b</answer> y", "required", False, True),
        ("x <think>a</think> \n <answer>b</answer> y", "required", True, False),
        (" <think>a</think><answer>b</answer>\n", "required", True, True),
        ("<think>a</think> so <answer>b</answer>", "required", False, False),
        ("<think></think><answer>b</answer>", "required", False, False),
        ("<think>a</think><answer></answer>", "required", False, False),
        ("<answer>b</answer><think>a</think>", "required", False, False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "required", False, False),
        ("<answer>b</answer>", "required", False, False),
        ("<answer>b</answer>", "optional", False, True),
        ("<think>a<answer>b</answer>", "optional", False, False),
        ("<think>a</think><answer>b</answer>", "optional", True, True),
    ],
)
def test_form_of_a_response(response: str, think: str, strict_ends: bool, expected: bool):
    assert is_well_formed(response, think=think, strict_ends=strict_ends) is expected


def test_unknown_options_name_the_valid_ones():
    with pytest.raises(ValueError, match="required, optional"):
        score("x", "y", think="maybe")
    with pytest.raises(ValueError, match="mm_eureka"):
        score("x", "y", compat="original")
    with pytest.raises(ValueError, match="boxed"):
        score("x", "y", untagged="all")


def test_rules_may_come_as_a_record_or_as_keywords_but_not_as_both():
    response = "<answer>0.3333</answer>"
    options = {"think": "optional", "decimals": "rounded", "weights": {"format": 0.25}, "repetition": 0.5}
    assert score(response, "1/3", rules=ScoringRules(**options)) == score(response, "1/3", **options)
    assert score(response, "1/3", **options) == {"accuracy": 1.0, "format": 0.25, "repetition": 0.0, "total": 1.25}
    with pytest.raises(TypeError, match="not both: units"):
        score(response, "1/3", rules=ScoringRules(), units="converted")
    with pytest.raises(TypeError, match="thinking"):
        score(response, "1/3", thinking=True)


def test_score_is_reachable_without_importing_torch():
    import subprocess
    import sys

    code = "import sys; import eureka_megatron.rewards.worker, eureka_megatron.rewards.judge; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    "gold", ["12", "A", "ACD", r"\frac{1}{2}", "增加", "AAS", "12 cm", "$5$", 12, 0.5, "(1,2)", "x>3"]
)
def test_ordinary_labels_are_parseable(gold: object):
    assert parseable_gold(gold)


@pytest.mark.parametrize(
    "gold", ["", " ", "$$", "\\", "{", "?", "[]", "()", "-", "1/0", "0/0", None, {"answer": "5"}, [1, 2]]
)
def test_labels_without_a_value_are_refused(gold: object):
    assert not parseable_gold(gold)
