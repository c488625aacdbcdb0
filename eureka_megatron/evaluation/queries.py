"""What a model is asked: the query of a row, by the words of each benchmark's authors, and the pictures that stand before it.

The texts are the authors' own, to the letter, since published scores can only be reproduced with the words they were measured with: MathVista's
hints, MathVerse's `query_cot`, OlympiadBench's competition prompt, We-Math's template (sources: docs/evaluation.md). As in MM-EUREKA all
pictures come first, the text after them, and markers such as <image1> stay in the text. The system prompt is the processor's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from eureka_megatron.data.chat import Address
from eureka_megatron.errors import UserError
from eureka_megatron.evaluation.judging import benchmark_named
from eureka_megatron.evaluation.mathvista import question_type
from eureka_megatron.evaluation.verdict import Row, absent, field, items

_COT = "Please first conduct reasoning, and then answer the question and provide "
_COT_SEEN = "According to the question shown in the image, please first conduct reasoning, and then answer the question and provide "
_ENDINGS = {
    "multi-choice": "the correct option letter, e.g., A, B, C, D, at the end.",
    "free-form": "the final value, e.g., 1, 2.5, 300, at the end.",
}
_HINTS = {
    ("integer", None): ("an integer answer", "value, e.g., 1, 2, 3"),
    ("float", 1): ("a floating-point number with one decimal place", "value, e.g., 1.2, 1.3, 1.4"),
    ("float", 2): ("a floating-point number with two decimal places", "value, e.g., 1.23, 1.34, 1.45"),
    ("list", None): ("a Python list as an answer", "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]"),
}
_KINDS = {
    "Numerical": "a numerical value",
    "Expression": "an expression",
    "Equation": "an equation",
    "Interval": "an interval",
}
_WEMATH = """Now, we require you to solve a multiple-choice math question.
Please briefly describe your thought process and provide the final answer(option).
Question: {question}
Option: {option}
Regarding the format, please answer following the template below, and be sure to include two <> symbols:
<Thought process>: <<your thought process>>
<Answer>: <<your option>>"""


def query(benchmark: str, row: Row) -> str:
    """The text of the user's turn. Raises UserError that names a column which the row lacks."""
    return _QUERIES[benchmark_named(benchmark)](row)


def pictures(benchmark: str, row: Row) -> list[Address]:
    """Addresses of the row's pictures, or their bytes, in the order in which they are shown; none: a question of text alone."""
    found = [picture for column in _columns(benchmark_named(benchmark), row) for picture in _several(row.get(column))]
    return [picture for picture in found if picture]


def message(benchmark: str, row: Row) -> list[dict[str, Any]]:
    """The chat of a row: one user's turn, pictures first. A row of MM-EUREKA's form (`message`) is its own chat."""
    if row.get("message") is not None:
        return row["message"]
    shown = [{"type": "image", "image": picture} for picture in pictures(benchmark, row)]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": query(benchmark, row)}]}]


def _columns(benchmark: str, row: Row) -> list[str]:
    """Where a row holds its pictures. `decoded_image` goes before `image`, which is then the path it once had."""
    if benchmark == "olympiadbench" and (
        numbered := [f"image_{n}" for n in range(1, 10) if not absent(row.get(f"image_{n}"))]
    ):
        return numbered
    order = ("decoded_image", "image", "images", "image_path")
    return [next((name for name in order if not absent(row.get(name))), "image")]


def _several(value: Any) -> list[Address]:
    """A picture or several, as files hold them: bytes, a path, base64, a struct of bytes and path, or a list of these (or its text)."""
    if absent(value):
        return []
    if isinstance(value, dict):
        return _several(value.get("bytes") or value.get("path"))
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                return [one for part in ast.literal_eval(text) for one in _several(part)]
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise UserError(f"the picture column holds {text[:60]!r}, which is no list") from None
        return [_base64(text)] if text else []
    return [one for part in value for one in _several(part)]


def _base64(text: str) -> str:
    """What VLMEvalKit's tables hold, base64 without a head, as a data URL; anything else as it is."""
    looks = len(text) > 255 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}", text) is not None
    return f"data:image/png;base64,{text}" if looks and not text.startswith("data:") else text


# --- the six, and the demo's ---


def _plain(name: str) -> Callable[[Row], str]:
    return lambda row: field(name, row, "question")


def _mathvista(row: Row) -> str:
    question = field("MathVista", row, "question")
    if not absent(row.get("query")):
        return str(row["query"])
    if question.startswith("Hint: "):  # VLMEvalKit's tables hold the whole query there
        return question
    multiple = question_type(row) == "multi_choice"
    if multiple:
        hint = "and provide the correct option letter, e.g., A, B, C, D, at the end."
    else:
        kind = field("MathVista", row, "answer_type")
        precision = int(float(row["precision"])) if kind == "float" and not absent(row.get("precision")) else None
        if (kind, precision) not in _HINTS:
            raise UserError(
                f"MathVista: a free-form row has answer_type {kind!r} and precision {row.get('precision')!r}"
            )
        wanted, form = _HINTS[kind, precision]
        hint = f"requiring {wanted} and provide the final {form}, at the end."
    unit = "" if absent(row.get("unit")) or not row["unit"] else f" (Unit: {row['unit']})"
    lines = [f"Hint: Please answer the question {hint}", f"Question: {question}{unit}"]
    if choices := items(row.get("choices")):
        lines += ["Choices:", *(f"({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(choices))]
    return "\n".join(lines)


def _mathverse(row: Row) -> str:
    if not absent(row.get("query_cot")):
        return str(row["query_cot"])
    kind = field("MathVerse", row, "question_type")
    if kind not in _ENDINGS:
        raise UserError(f"MathVerse: question_type {kind!r}; multi-choice and free-form are known")
    question = row.get("question")
    if absent(question) or not str(question).strip():
        return _COT_SEEN + _ENDINGS[kind]
    return f"{_COT}{_ENDINGS[kind]}\nQuestion: {question}"


def _mathvision(row: Row) -> str:
    options = items(row.get("options"))
    shown = (
        ""
        if not options or options == list("ABCDE")
        else "\n".join(f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options))
    )
    return field("MathVision", row, "question") + "\n" + (shown + "\n" if shown else "")


def _olympiadbench(row: Row) -> str:
    """English open-ended questions, as their authors ask them."""
    subject = str(row.get("subject") or row.get("source") or "").lower()
    subject = "Physics" if "physics" in subject else "Math"
    several, unit = _true(row.get("is_multiple_answer")), not absent(row.get("unit")) and str(row["unit"]).strip()
    answer = "\\boxed{multiple answers connected with commas}" if several else "\\boxed{answer}"
    note = ", note that the unit of the answer should not be included in \\boxed{}" if unit else ""
    context = row.get("context")
    return (
        f"The following is an open-ended problem from an International {subject} competition. "
        f"{_answer_type(field('OlympiadBench', row, 'answer_type'), several)}Please calculate the answer according to the given requirements "
        "and the information provided. Please use LaTeX format to represent the variables and formulas used in the solution process and "
        f'results. Please end your solution with "So the final answer is {answer}{"(unit)" if unit else ""}." and give the result '
        f"explicitly{note}.\n"
        + (f"{context}\n" if subject == "Physics" and not absent(context) and str(context).strip() else "")
        + field("OlympiadBench", row, "question")
    )


def _answer_type(types: str, several: bool) -> str:
    """The sentence that says what kind of answer is wanted; none for tuples and what a person must judge."""
    if "Need_human_evaluate" in types or "Tuple" in types:
        return ""
    names = [name.partition("-")[0].strip() for name in types.split(",")]
    known = [_KINDS.get(name, name) for name in names]
    if not several:
        return f"The answer of The problem should be {known[0]}. "
    if len(set(known)) == 1:
        return f"The problem has multiple answers, each of them should be {known[0]}. "
    return f"The problem has multiple answers, with the answers in order being {', '.join(known)}. "


def _true(value: Any) -> bool:
    return value.strip().lower() == "true" if isinstance(value, str) else not absent(value) and bool(value)


def _wemath(row: Row) -> str:
    return _WEMATH.format(question=field("We-Math", row, "question"), option=field("We-Math", row, "option"))


_QUERIES: dict[str, Callable[[Row], str]] = {
    "mmk12": _plain("MMK12"),
    "mathvista": _mathvista,
    "mathverse": _mathverse,
    "mathvision": _mathvision,
    "olympiadbench": _olympiadbench,
    "wemath": _wemath,
    "counting": _plain("counting"),
}
