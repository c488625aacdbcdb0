"""Benchmarks judged as their authors judge them, on their own published outputs; and the original's procedure, on answers written by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eureka_megatron.errors import UserError
from eureka_megatron.evaluation import Verdict, judge_official, judge_paper, wemath_scores
from eureka_megatron.evaluation.extraction import infer_letter, paper_extraction
from eureka_megatron.evaluation.judging import options_in
from eureka_megatron.evaluation.mathvista import distance

GOLDEN = Path(__file__).resolve().parents[1] / "golden_data"


def golden(name: str) -> list[dict[str, Any]]:
    with gzip.open(GOLDEN / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_mathvision_as_its_authors_extracted_and_judged() -> None:
    rows = golden("mathvision")
    verdicts = [judge_official("MathVision", {**row, "answer": row["gold"]}, row["response"]) for row in rows]
    assert [verdict.extraction for verdict in verdicts] == [row["model_answer"] for row in rows]
    # One of these, two of 3,000 in a larger sample, differ: theirs reads the beginning of what is no formula, and cannot evaluate a cosecant.
    assert sum(verdict.correct != row["correct"] for verdict, row in zip(verdicts, rows, strict=True)) <= 1


def test_mathvista_as_its_authors_judged() -> None:
    for row in golden("mathvista"):
        verdict = judge_official("mathvista", row, row["extraction"], extracted=True)
        assert verdict == Verdict(row["extraction"], row["correct"]), row


def test_olympiadbench_as_its_authors_judged() -> None:
    for gold in json.loads((GOLDEN / "olympiadbench.json").read_text(encoding="utf-8")):
        for answer in gold["Ans"]:
            error = answer.get("precision")
            row = {
                "final_answer": [gold["GT"]],
                "error": ",".join(map(str, error)) if isinstance(error, list) else error,
            }
            verdict = judge_official("OlympiadBench", row, answer["answer"])
            assert verdict.correct == answer["equal"], (gold["GT"], answer)


OFFICIAL: list[tuple[str, dict[str, Any], str, str | None, bool]] = [
    ("mathvision", {"answer": "0.333", "options": []}, "so \\boxed{\\frac{1}{3}}", "\\frac{1}{3}", True),
    ("mathvision", {"answer": "1", "options": []}, "\\boxed{1:1}", "1:1", True),
    ("mathvision", {"answer": "0.34", "options": []}, "\\boxed{1/3}", "\\frac{1}{3}", False),
    ("mathvision", {"answer": "B", "options": ["1", "2", "3", "4", "5"]}, "The final answer is 2.", "2", True),
    ("mathvision", {"answer": "B", "options": np.array(["1", "2", "3", "4", "5"])}, "I choose (B).", "b", True),
    ("mathvision", {"answer": "B", "options": "['1', '2', '3', '4', '5']"}, "\\boxed{3}", "3", False),
    ("mathvision", {"answer": "(1,2)", "options": None}, "\\boxed{(1, \\frac{4}{2})}", "(1,\\frac{4}{2})", True),
    ("mathvision", {"answer": "7", "options": []}, "", "", False),
    ("mathvision", {"answer": "7", "options": []}, "__import__('os').system('x')", "__import__('os').system('x')", False),
    ("mathvision", {"answer": "9", "options": []}, "\\boxed{9^{9^{9^{9}}}}", "9^{9^{9^{9}}}", False),
    ("mathvista", {"answer": "5", "question_type": "free_form", "answer_type": "integer"}, "5", "5", True),
    ("mathvista", {"answer": "5", "question_type": "free_form", "answer_type": "integer"}, "It is <answer>5.0</answer>", "5.0", True),
    ("mathvista", {"answer": "1.2", "question_type": "free_form", "answer_type": "float", "precision": 1.0}, "1.234", "1.234", True),
    ("mathvista", {"answer": "1.2", "question_type": "free_form", "answer_type": "float", "precision": 1.0}, "inf", "inf", False),
    ("mathvista", {"answer": "Yes", "question_type": "multi_choice", "choices": ["No", "Yes"]}, "\\boxed{(b)}", "(b)", True),
    ("mathvista", {"answer": "Yes", "choices": '["No", "Yes"]'}, 'The answer is "Yess".', "Yess", True),
    ("mathverse", {"answer": "A"}, "Extracted Answer: A", "A", True),
    ("mathverse", {"answer": "A"}, "\\boxed{B}", "B", False),
    ("olympiadbench", {"final_answer": ["3"], "error": None}, "…\nSo the final answer is \\boxed{3}", "\\boxed{3}", True),
    ("olympiadbench", {"final_answer": '["2,3"]'}, "\\boxed{3}, \\boxed{2}", "\\boxed{3}, \\boxed{2}", True),
    ("olympiadbench", {"final_answer": ["50"]}, "\\boxed{0.5}", "\\boxed{0.5}", True),
    ("olympiadbench", {"final_answer": ["[0, 1)"]}, "\\boxed{[0, 1]}", "\\boxed{[0, 1]}", False),
    ("olympiadbench", {"final_answer": ["1.5"], "error": "1e-1"}, "\\boxed{1.6}", "\\boxed{1.6}", True),
    ("olympiadbench", {"final_answer": ["1.5"]}, "\\boxed{1.6", "\\boxed{1.6", False),
    ("wemath", {"answer": "B"}, "<Thought process>: <<…>>\n<Answer>: <<B>>", "B", True),
    ("wemath", {"answer": "B"}, "Answer: (B)", None, False),
    ("wemath", {"answer": "B"}, "**Answer:** B", None, False),
    ("wemath", {"answer": "A"}, "A triangle has three sides", "A", True),
]  # fmt: skip


@pytest.mark.parametrize(("benchmark", "row", "text", "extraction", "correct"), OFFICIAL)
def test_official_verdicts(
    benchmark: str, row: dict[str, Any], text: str, extraction: str | None, correct: bool
) -> None:
    assert judge_official(benchmark, row, text) == Verdict(extraction, correct)


MMK12 = {"question": "Which is right?\nA. one\nB、two\nC．three\nD. both one and two", "answer": "B"}
CHOICES = {
    "question": "Find x.\nChoices:\nA:30^\\circ\nB:40^\\circ\nC:50^\\circ",
    "question_type": "multi-choice",
    "answer": "B",
}
PAPER: list[tuple[str, dict[str, Any], str, bool]] = [
    *[("MMK12", MMK12, text, True) for text in (
        "<think>…</think><answer>B</answer>", "\\boxed{B}", "\\boxed{\\text{B}}", "<answer> (B) </answer>", "<answer>b.</answer>", "<answer>two</answer>",
        "<answer>B. two</answer>", "<answer>B、two</answer>", "**B**", "Therefore the correct option is B.", "<answer>\\boxed{B}</answer>",
    )],
    *[("MMK12", MMK12, text, False) for text in (
        "<answer>C</answer>", "<answer>three</answer>", "", "I cannot say", "<answer>A and B</answer>", "\\boxed{D}", "<answer></answer>", "<answer>A</answer> or <answer>B</answer>",
    )],
    *[("mathverse", CHOICES, text, True) for text in ("<answer>B</answer>", "<answer>(B)</answer>", "\\boxed{B}", "B: 40^\\circ", "\\boxed{40^\\circ}")],
    *[("mathverse", CHOICES, text, False) for text in ("<answer>A</answer>", "\\boxed{50^\\circ}", "")],
    ("mathverse", {"answer": "2500 \\pi", "question_type": "free-form"}, "\\boxed{2500\\pi}", True),
    ("mathverse", {"answer": "12", "question_type": "free-form"}, "<answer>12.0</answer>", True),
    ("mathverse", {"answer": "12", "question_type": "free-form"}, "<answer>13</answer>", False),
    ("mathvista", {"answer": "Yes", "question_type": "multi_choice", "choices": ["No", "Yes"]}, "The answer is (B)", True),
    ("mathvista", {"answer": "Yes", "question_type": "multi_choice", "choices": ["No", "Yes"]}, "<answer>No</answer>", False),
    ("mathvista", {"answer": "7", "question_type": "free_form", "answer_type": "integer"}, "<answer>7</answer>", True),
    ("mathvista", {"answer": "7", "question_type": "free_form", "answer_type": "integer"}, "<answer>8</answer>", False),
    ("mathvista", {"answer": "[1, 2]", "question_type": "free_form", "answer_type": "list"}, "<answer>[1, 2]</answer>", False),
    ("mathvision", {"answer": "C", "options": ["A", "B", "C", "D", "E"]}, "\\boxed{C}", True),
    ("mathvision", {"answer": "C", "options": ["1", "2", "3", "4", "5"]}, "<answer>3</answer>", True),
    ("mathvision", {"answer": "28", "options": []}, "<answer>28</answer>", True),
    ("mathvision", {"answer": "28", "options": []}, "\\boxed{27}", False),
    ("olympiadbench", {"final_answer": ["\\frac{1}{2}"]}, "\\boxed{0.5}", True),
    ("olympiadbench", {"final_answer": ["x+1"]}, "<answer>1+x</answer>", True),
    ("olympiadbench", {"final_answer": ["x+1"]}, "<answer>x-1</answer>", False),
    ("we-math", {"answer": "B", "option": "A. 5 cm;B. 6 cm;C. 7 cm; D. 8 cm"}, "<Answer>: <<B>>", True),
    ("we-math", {"answer": "B", "option": "A. 5 cm;B. 6 cm;C. 7 cm; D. 8 cm"}, "<answer>(B)</answer>", True),
    ("we-math", {"answer": "B", "option": "A. 5 cm;B. 6 cm;C. 7 cm; D. 8 cm"}, "It is <answer>6 cm</answer>", True),
    ("we-math", {"answer": "B", "option": "A. 5 cm;B. 6 cm;C. 7 cm; D. 8 cm"}, "<answer>7 cm</answer>", False),
    ("counting", {"answer": "3"}, "<think>1 2 3</think><answer>3</answer>", True),
    ("counting", {"answer": "3"}, "<answer>4</answer>", False),
]  # fmt: skip


@pytest.mark.parametrize(("benchmark", "row", "text", "correct"), PAPER)
def test_the_papers_verdicts(benchmark: str, row: dict[str, Any], text: str, correct: bool) -> None:
    assert judge_paper(benchmark, row, text).correct is correct


def test_the_papers_extraction() -> None:
    assert paper_extraction("<answer>1</answer><answer>2</answer> \\boxed{3}") == "1"
    assert paper_extraction("\\boxed{1} and \\boxed{ \\frac{2}{3} } and \\boxed{4") == "\\frac{2}{3}"
    assert paper_extraction("no box") == "no box"
    options = {"A": "red", "B": "blue"}
    assert infer_letter("Cannot determine the answer", options) == "Z"
    assert infer_letter("A or B", options) is None
    assert infer_letter("it is Blue", options) == "B"
    assert infer_letter("A car is blue", options) == "A", "the rule's own defect"
    assert options_in("Of point A. it is known: (A) 1 (B) 2 (C) 3") == {"A": "1", "B": "2", "C": "3"}
    assert distance("kitten", "sitting") == 3


def problem(steps: int, number: int, right: list[bool]) -> list[tuple[dict[str, str], bool]]:
    """Steps first, the whole last."""
    keys = [*map(str, range(1, steps + 1)), "multi"]
    return [
        ({"ID": str(number), "key": f"{steps}steps_{key}", "knowledge concept": f"concept {key}"}, one)
        for key, one in zip(keys, right, strict=True)
    ]


def test_wemaths_four_way_metric() -> None:
    """By hand, of six problems: mastered; rote (a step wrong); rote (all wrong); not generalised; no knowledge; three steps, one wrong, the whole right."""
    cases = [
        problem(2, 1, [True, True, True]),
        problem(2, 2, [True, False, True]),
        problem(2, 3, [False, False, True]),
        problem(2, 4, [True, True, False]),
        problem(2, 5, [False, True, False]),
        problem(3, 6, [True, True, False, True]),
    ]
    rows, right = zip(*[pair for case in cases for pair in case], strict=True)
    scores = wemath_scores(rows, [Verdict("A", one) for one in right])
    assert scores == wemath_scores(rows, right)
    counts = {kind: {name: scores[kind][name] for name in ("IK", "IG", "CM", "RM")} for kind in ("strict", "loose")}
    assert counts == {"strict": {"IK": 1, "IG": 1, "CM": 1, "RM": 3}, "loose": {"IK": 1, "IG": 1, "CM": 3, "RM": 1}}
    assert scores["strict"]["score"] == pytest.approx(1.5 / 6)
    assert scores["loose"]["score"] == pytest.approx(3.5 / 6)
    assert (scores["strict"]["RM_rate"], scores["loose"]["RM_rate"]) == (0.75, 0.25)
    assert (scores["S1"], scores["S2"], scores["S3"]) == (pytest.approx(8 / 13), 3 / 5, 1.0)
    assert scores["accuracy"] == pytest.approx(12 / 19)
    assert wemath_scores(*zip(*problem(2, 1, [True, True, False]), strict=True))["strict"]["RM_rate"] == 0.0
    with pytest.raises(UserError, match="1 problems are not whole, 1 first: steps or their question are missing"):
        wemath_scores(rows[1:], right[1:])
    with pytest.raises(UserError, match="key '4steps_1'"):
        wemath_scores([{"ID": "1", "key": "4steps_1"}], [True])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="benchmark 'mathvison' is unknown; did you mean 'mathvision'"):
        judge_official("mathvison", {}, "x")
    with pytest.raises(UserError, match="MathVision: the row has no 'answer'; found id"):
        judge_official("Math-Vision", {"id": 1}, "x")
    with pytest.raises(UserError, match="OlympiadBench: the row's 'error' is 'small'"):
        judge_official("olympiad bench", {"final_answer": ["1"], "error": "small"}, "2")


def test_judging_needs_neither_torch_nor_vllm() -> None:
    script = "import sys, eureka_megatron.evaluation as e; e.judge_official('wemath', {'answer': 'A'}, 'A'); print({'torch', 'vllm'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


ROWS: dict[str, dict[str, Any]] = {
    "mmk12": MMK12,
    "mathvista": {"answer": "1.2", "answer_type": "float", "precision": 1.0},
    "mathverse": CHOICES,
    "mathvision": {"answer": "3", "options": []},
    "olympiadbench": {"final_answer": ["x=1, (1,2)"]},
    "wemath": {"answer": "A", "option": "A. 1;B. 2"},
    "counting": {"answer": "3"},
}


@pytest.mark.parametrize(
    "text", ["", "\\boxed{" * 20000, "(" * 9, "nan", "1e999", "\\frac", "=", "\x00中$\\in $", "}{", "\\boxed{\\sqrt}"]
)
def test_no_response_raises_or_takes_long(text: str) -> None:
    for benchmark, row in ROWS.items():
        for judge in (judge_official, judge_paper):
            assert not judge(benchmark, row, text, extracted=True).correct
            judge(benchmark, row, text)
