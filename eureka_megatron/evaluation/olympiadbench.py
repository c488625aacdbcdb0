"""OlympiadBench by its authors' judge: several answers in any order, tolerances, intervals, expressions, equations."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eureka_megatron.errors import UserError
from eureka_megatron.evaluation import symbolic
from eureka_megatron.evaluation.extraction import boxed
from eureka_megatron.evaluation.verdict import Row, Verdict, field, items, number, optional

EXACT = 1e-8
_FINAL = re.compile(r"So the final answer is (.*)")
_REPLACED = (
    ("\\left", ""), ("\\right", ""), ("∶", ":"), ("，", ","), ("$", ""), ("\\approx", "="), ("\\simeq", "="), ("\\sim", "="),
    ("^\\prime", "'"), ("^{\\prime}", "'"), ("^\\circ", ""), ("%", ""),
)  # fmt: skip
_ENDS = "\n$,.:;^_=+`!@#%&*~，。"
_UPRIGHT = re.compile(r"\\(?:mathrm|mathbf)\{~?([^{}]*)\}")
_CHINESE = re.compile(r"[\u4e00-\u9fff]+")
_OPEN, _CLOSE = "([", ")]"


def judge(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """Against the first of `final_answer`, as the authors do."""
    answer = text if extracted else extract(text)
    return Verdict(answer, equal(golds(row)[0], answer, tolerances(row)))


def golds(row: Row) -> list[str]:
    """All of `final_answer`. Raises UserError when there is none."""
    found = items(row.get("final_answer"), texts=True)
    if not found:
        field("OlympiadBench", row, "final_answer")
        raise UserError("OlympiadBench: the row's 'final_answer' is empty")
    return found


def extract(response: str) -> str:
    found = _FINAL.findall(response)
    return found[-1].strip() if found else response


def tolerances(row: Row) -> list[float]:
    """One for all answers, or one for each. Raises UserError when `error` is no number."""
    given = optional(row, "error")
    if given.lower() in ("", "nan", "none") or "Tuple" in optional(row, "answer_type"):
        return [EXACT]
    found = []
    for part in given.split(","):
        value = number(part) if part.strip() else EXACT
        if value is None:
            raise UserError(
                f"OlympiadBench: the row's 'error' is {given!r}; it must be a number, or several with commas"
            )
        found.append(value)
    return found


def equal(gold: str, answer: str, precision: Sequence[float] = (EXACT,)) -> bool:
    """The judge. `precision`: see `tolerances`; the answers may stand in any order."""
    left, right = normalised(gold), normalised(answer)
    if left is None or right is None:
        return False
    if left == right:
        return True
    wanted_items, answers = (_items(_CHINESE.sub("", text)) for text in (left, right))
    if len(wanted_items) != len(answers):
        return False
    for place, wanted in enumerate(wanted_items):
        tolerance = precision[place] if len(precision) == len(wanted_items) else precision[0]
        found = next((one for one in answers if _equal_item(wanted, one, tolerance)), None)
        if found is None:
            return False
        answers.remove(found)
    return True


def normalised(text: str) -> str | None:
    """What is judged: boxes, else what stands between dollars in the last line, else all. None: a box does not close."""
    try:
        boxes = boxed(text, strict=True)
    except ValueError:
        return None
    if boxes:
        text = ",".join(boxes)
    elif dollars := re.findall(r"\$(.*?)\$", (text.strip().splitlines() or [""])[-1]):
        text = ",".join(dollars)
    if "\\in " in text:
        text = text.split("\\in ")[1]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    return _UPRIGHT.sub(r"\1", text.strip(_ENDS + " ").strip(_ENDS))


def _items(text: str) -> list[str]:
    """Split at commas outside of brackets; ± is two items."""
    found, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    found.append(text[start:].strip())
    return [
        one
        for item in found
        if item
        for one in ([item.replace("\\pm", "+"), item.replace("\\pm", "-")] if "\\pm" in item else [item])
    ]


def _equal_item(gold: str, answer: str, tolerance: float) -> bool:
    if gold == answer != "":
        return True
    if _is_interval(gold) and _is_interval(answer):
        return _equal_intervals(gold, answer, tolerance)
    left, right = number(gold), number(answer)
    if left is not None and right is not None:
        return any(abs(left * scale - right) <= tolerance * 1.01 for scale in (0.01, 1, 100))
    if not ("=" in gold and "=" in answer) and symbolic.ask("expression", gold, answer, tolerance):
        return True
    return gold.count("=") == answer.count("=") == 1 and symbolic.ask("equation", gold, answer)


def _is_interval(text: str) -> bool:
    return len(text) > 1 and text[0] in _OPEN and text[-1] in _CLOSE


def _equal_intervals(gold: str, answer: str, tolerance: float) -> bool:
    """Unions part by part. Endpoints are expressions."""
    golds, answers = ([part.strip() for part in text.split("\\cup")] for text in (gold, answer))
    if len(golds) != len(answers):
        return False
    for one, other in zip(golds, answers, strict=True):
        if not (_is_interval(one) and _is_interval(other)) or (one[0], one[-1]) != (other[0], other[-1]):
            return False
        ends, others = one[1:-1].split(","), other[1:-1].split(",")
        if len(ends) != len(others):
            return False
        if not all(near(a.strip(), b.strip(), tolerance) for a, b in zip(ends, others, strict=True)):
            return False
    return True


def near(gold: str, answer: str, tolerance: float) -> bool:
    """Whether two formulas are the same, or their values within the tolerance."""
    left, right = number(gold), number(answer)
    if left is not None and right is not None:
        return abs(left - right) <= tolerance * 1.01
    return gold == answer or symbolic.ask("expression", gold, answer, tolerance)
