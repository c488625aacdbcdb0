"""The judge on answers whose truth is known by construction (tests/helpers/answers.py), and on answers written and judged by hand."""

from pathlib import Path

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


def examined() -> list[tuple[str, str, bool]]:
    """(gold, answer, right) of examined.txt: "# category", "= gold", "+ right answer", "- wrong answer"; ⏎ is a line end."""
    page = (Path(__file__).parents[1] / "golden_data" / "examined.txt").read_text(encoding="utf-8")
    cases, gold = [], ""
    for line in filter(None, page.splitlines()):
        kind, text = line[0], line[2:].replace("⏎", "\n")
        if kind == "=":
            gold = text
        elif kind in "+-":
            cases.append((gold, text, kind == "+"))
    return cases


def test_answers_written_by_hand_without_a_look_at_the_judge():
    """Measured on 2917: 5.8 % of the right ones missed (numbers in words, dates, translations, functions told in prose), no wrong one rewarded."""
    cases = examined()
    verdicts = [bool(score(f"<think>t</think><answer>{text}</answer>", gold)["accuracy"]) for gold, text, _ in cases]
    missed = [case for case, verdict in zip(cases, verdicts, strict=True) if case[2] and not verdict]
    rewarded = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict and not case[2]]
    assert len(cases) > 2900
    assert len(missed) <= 0.07 * sum(right for *_, right in cases), missed
    assert rewarded == []
