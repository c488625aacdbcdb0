"""Answers as models write them, judged by both rules: expected by hand from the published rules, never from running the code.

golden_data/answers.jsonl holds the answers, answers_rows.jsonl the made-up rows that they answer.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from eureka_megatron.errors import UserError
from eureka_megatron.evaluation import BENCHMARKS, judge_official, judge_paper, wemath_scores
from eureka_megatron.evaluation.judging import benchmark_named
from eureka_megatron.evaluation.mathvista import distance

GOLDEN = Path(__file__).resolve().parents[1] / "golden_data"
JUDGES = {"official": judge_official, "paper": judge_paper}


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


ROWS = {row["key"]: row for row in lines("answers_rows")}


def judged(line: dict[str, Any], kind: str, row: dict[str, Any] | None = None) -> dict[str, Any]:
    """The verdict, with the fields that the line names."""
    of = ROWS[line["row"]]
    extracted = line.get("extracted", False)
    verdict = JUDGES[kind](of["benchmark"], of["row"] if row is None else row, line["text"], extracted=extracted)
    return {name: getattr(verdict, name) for name in line[kind]}


def test_answers_are_judged_as_by_hand() -> None:
    answers = lines("answers")
    counts = Counter(ROWS[line["row"]]["benchmark"] for line in answers)
    assert len(answers) >= 700
    assert len(counts) == 6
    assert min(counts.values()) >= 60
    wrong = [
        f"{line['row']}, {kind}: {line['text']!r} gives {found}, not {line[kind]} ({line['why']})"
        for line in answers
        for kind in JUDGES
        if (found := judged(line, kind)) != line[kind]
    ]
    assert not wrong, "\n".join(wrong)


def shape_of_a_table(row: dict[str, Any]) -> dict[str, Any]:
    """As pandas hands out what parquet holds: arrays for lists, NaN for nothing, numpy's numbers."""
    made = {}
    for name, value in row.items():
        if isinstance(value, list):
            made[name] = np.array(value, dtype=object)
        elif isinstance(value, bool | int):
            made[name] = np.array([value])[0]
        else:
            made[name] = np.float64("nan") if value is None else value
    return made


def shape_of_text(row: dict[str, Any]) -> dict[str, Any]:
    """As tab-separated text and JSON hold it: lists and structures as their text, nothing as nothing between tabs."""
    return {
        name: json.dumps(value) if isinstance(value, list | dict) else "" if value is None else str(value)
        for name, value in row.items()
    }


def shape_of_arrow(row: dict[str, Any]) -> dict[str, Any]:
    return {name: pa.scalar(value) for name, value in row.items()}


@pytest.mark.parametrize("shape", [shape_of_a_table, shape_of_text, shape_of_arrow])
def test_a_row_says_the_same_in_every_shape(shape: Any) -> None:
    answers = [line for line in lines("answers") if len(line["text"]) < 60][::4]
    for line in answers:
        row = shape(ROWS[line["row"]]["row"])
        for kind in JUDGES:
            assert judged(line, kind, row) == line[kind], (row, line)


def test_numbers_in_place_of_text() -> None:
    """A table makes a number of a column that holds nothing else."""
    whole = {"answer": 7.0, "question_type": "free_form", "answer_type": "integer", "precision": pd.NA, "choices": None}
    real = {"answer": np.float64(1.5), "question_type": "free_form", "answer_type": "float", "precision": np.float64(1)}
    for judge in JUDGES.values():
        assert judge("MathVista", whole, "<answer>7</answer>").correct
        assert not judge("MathVista", whole, "<answer>8</answer>").correct
        assert judge("MathVista", real, "<answer>1.5</answer>").correct
        assert judge("MathVision", {"answer": np.int64(28), "options": np.array([])}, "\\boxed{28}").correct
        assert judge("OlympiadBench", {"final_answer": np.array([42]), "error": np.nan}, "\\boxed{42}").correct
        assert judge("OlympiadBench", {"final_answer": "[0,1]", "error": "nan"}, "\\boxed{[0,1]}").correct, (
            "an interval"
        )
        assert not judge("OlympiadBench", {"final_answer": "[0,1]", "error": pd.NaT}, "\\boxed{0,1}").correct
    with pytest.raises(UserError, match="MathVista: the row has no 'answer'"):
        judge_official("MathVista", {"answer": "", "answer_type": "integer"}, "7")


SPELLINGS = {
    "mmk12": ["MMK12", "mm-k12", "FanqingM/MMK12", "MMK12 test"],
    "mathvista": ["MathVista", "mathvista_testmini", "AI4Math/MathVista", "MathVista_MINI", "mathvista_testmini_cot"],
    "mathverse": ["MathVerse", "MathVerse testmini", "mathverse_testmini_vision_only", "AI4Math/MathVerse", "MathVerse_MINI"],
    "mathvision": ["MathVision", "MATH-V", "Math-Vision", "MathLLMs/MathVision", "mathvision_test"],
    "olympiadbench": ["OlympiadBench", "olympiad-bench", "Hothan/OlympiadBench", "olympiadbench_test_en", "OlympiadBench OE_TO_maths_en_COMP"],
    "wemath": ["WeMath", "We-Math", "we math", "We-Math/We-Math", "wemath_testmini_thinking", "WeMath_COT"],
    "counting": ["counting"],
}  # fmt: skip


def test_benchmarks_are_known_by_any_spelling() -> None:
    assert set(SPELLINGS) == set(BENCHMARKS)
    for benchmark, names in SPELLINGS.items():
        assert [benchmark_named(name) for name in names] == [benchmark] * len(names)
    for name in ("", "math", "mathvistas", "MathVerse-Pro", "we"):
        with pytest.raises(UserError, match="is unknown"):
            benchmark_named(name)


HOSTILE = [
    "word " * 20_000,
    "<answer>" + "9" * 100_000 + "</answer>",
    "\\boxed{" + "\\frac{" * 3000 + "1" + "}{2}" * 3000 + "}",
    "\\boxed{" + "(" * 50_000 + "}",
    "\\boxed{10^{10^{10}}}",
    "\\boxed{99999999!}",
    "\\boxed{factorial(99999999)}",
    "<answer>__import__('os').system('touch {mark}')</answer>",
    "\\boxed{open('{mark}','w')}",
    "[" * 100_000,
    "\\boxed{" + "1," * 40_000 + "1}",
    "$" * 100_000,
    "A" * 100_000,
    "<answer>(" + "A) (" * 20_000 + "</answer>",
    "The answer is " * 7_000,
    "答案" * 50_000,
]


def test_hostile_answers_end_soon_and_are_wrong() -> None:
    """Nothing in them is run. Measured at most 2 s for one; an isolated process gives up after 5 s and starts again."""
    # Not pytest's folder: its number may be the very answer (`/tmp/pytest-of-root/pytest-18/...`, and 18 is choice C).
    mark = Path("/tmp/eureka-an-answer-was-run")
    mark.unlink(missing_ok=True)
    for key in ("k_frac", "v_color", "v_int", "e_area", "m_nums", "o_expr", "w_area"):
        of = ROWS[key]
        for text in HOSTILE:
            text = text.replace("{mark}", str(mark))
            for judge in JUDGES.values():
                for extracted in (False, True):
                    verdict = judge(of["benchmark"], of["row"], text, extracted=extracted)
                    # The closest choice is the authors' rule for whatever there is.
                    assert not verdict.correct or of["benchmark"] == "MathVista", (key, text[:80], verdict)
    assert not mark.exists()


def test_the_fast_distance_is_the_tables() -> None:
    def by_table(left: str, right: str) -> int:
        row = list(range(len(right) + 1))
        for number, a in enumerate(left, 1):
            before, row[0] = row[0], number
            for place, b in enumerate(right, 1):
                before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (a != b))
        return row[-1]

    draw = random.Random(5)
    for _ in range(400):
        left, right = ("".join(draw.choices("abc√", k=draw.randrange(12))) for _ in range(2))
        assert distance(left, right) == by_table(left, right), (left, right)


def steps(problem: str, number: int, right: str) -> list[tuple[dict[str, Any], bool]]:
    """Rows of a problem: its steps' verdicts, then the whole's, as 1 and 0."""
    keys = [f"{number}steps_{step}" for step in range(1, number + 1)] + [f"{number}steps_multi"]
    return [
        ({"ID": problem, "key": key, "knowledge concept": concept, "answer": "A"}, one == "1")
        for key, concept, one in zip(keys, [*["area", "angle", "length"][:number], "area;angle"], right, strict=True)
    ]


def test_wemaths_figures_by_hand() -> None:
    """Eight problems, five of two steps and three of three: steps' verdicts, then the whole's.

             strict  loose                     strict  loose
        11 1   CM      CM         111 1          CM      CM
        10 1   RM      CM         001 1          RM      CM
        00 1   RM      RM         110 0          IK      IK
        11 0   IG      IG
        01 0   IK      IK

    Steps right: 2+1+0+2+1 of 10, 3+1+2 of 9. Wholes right: 3 of 5, 2 of 3. Area, the first step: 1 1 0 1 0 1 0 1 of 8; angle, the second:
    1 0 0 1 1 1 0 1 of 8; length, the third of three: 1 1 0 of 3.
    """
    cases = ["111", "101", "001", "110", "010", "1111", "0011", "1100"]
    rows, right = zip(*[p for n, case in enumerate(cases) for p in steps(str(n), len(case) - 1, case)], strict=True)
    scores = wemath_scores(rows, np.array(right))
    assert scores["accuracy"] == pytest.approx(17 / 27)
    assert scores["strict"] == {
        "IK": 2, "IG": 1, "CM": 2, "RM": 3,
        "IK_rate": 2 / 8, "IG_rate": 1 / 8, "CM_rate": 2 / 8, "RM_rate": 3 / 5, "score": 2.5 / 8,
    }  # fmt: skip
    assert scores["loose"] == {
        "IK": 2, "IG": 1, "CM": 4, "RM": 1,
        "IK_rate": 2 / 8, "IG_rate": 1 / 8, "CM_rate": 4 / 8, "RM_rate": 1 / 5, "score": 4.5 / 8,
    }  # fmt: skip
    assert (scores["S1"], scores["S2"], scores["S3"]) == (pytest.approx(12 / 19), 3 / 5, pytest.approx(2 / 3))
    assert scores["concepts"] == {"angle": 5 / 8, "area": 5 / 8, "length": pytest.approx(2 / 3)}


def test_wemaths_rote_rate_without_a_whole_right_is_nought() -> None:
    """No whole is right: the authors divide by zero, here it is 0. Two problems: all steps right, one step right."""
    rows, right = zip(*steps("a", 2, "110"), *steps("b", 3, "0100"), strict=True)
    for kind in ("strict", "loose"):
        found = wemath_scores(rows, right)[kind]
        assert (found["IG"], found["IK"], found["CM"], found["RM"], found["RM_rate"]) == (1, 1, 0, 0, 0.0)
        assert found["score"] == 0.25
