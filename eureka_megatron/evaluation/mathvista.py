"""MathVista by its authors' rules: an extraction becomes a prediction in the answer's own form, which must equal the answer as a string.

The authors extract by a language model; what their rules can extract without one is done here, the rest by the original's extraction
(`extraction.paper_extraction`), and a run may bring extractions of its own (`extracted=True`).
"""

from __future__ import annotations

import re

from eureka_megatron.evaluation.extraction import paper_extraction
from eureka_megatron.evaluation.verdict import Row, Verdict, absent, field, items, number

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def judge(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    extraction = text if extracted else extract(row, text)
    prediction = normalised(row, extraction)
    return Verdict(extraction, prediction is not None and prediction == field("MathVista", row, "answer"))


def question_type(row: Row) -> str:
    return (
        str(row["question_type"])
        if not absent(row.get("question_type"))
        else ("multi_choice" if items(row.get("choices")) else "free_form")
    )


def extract(row: Row, response: str) -> str:
    if not response:
        return ""
    if question_type(row) == "multi_choice" and response in items(row.get("choices")):
        return response
    kind = row.get("answer_type")
    if kind == "integer" and _whole(response) is not None:
        return str(_whole(response))
    if kind == "float" and number(response) is not None:
        return str(number(response))
    if found := _QUOTED.search(response):
        return found[1]
    return paper_extraction(response)


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def normalised(row: Row, extraction: str) -> str | None:
    """The prediction; None: the extraction is none of the answer's kind."""
    if question_type(row) == "multi_choice":
        return _choice(items(row.get("choices")), extraction.strip())
    kind = field("MathVista", row, "answer_type")
    if kind == "list":
        return extraction
    value = number(extraction)
    if kind not in ("integer", "float"):
        return extraction
    try:
        if kind == "integer":
            return None if value is None else str(int(value))
        return None if value is None else str(round(value, int(float(field("MathVista", row, "precision")))))
    except (OverflowError, ValueError):  # an infinite extraction
        return None


def _choice(choices: list[str], extraction: str) -> str | None:
    """By letter, else the closest text, the first of equally close ones."""
    if not choices:
        return None
    if found := _LETTER.search(extraction):
        extraction = found[1].upper()
    place = ord(extraction) - ord("A") if len(extraction) == 1 else -1
    if 0 <= place < len(choices):
        return choices[place]
    return min(choices, key=lambda choice: distance(choice, extraction))


def distance(left: str, right: str) -> int:
    """Levenshtein's: the least number of insertions, deletions and replacements. Example: "abc", "axcd" → 2."""
    row = list(range(len(right) + 1))
    for number_of_left, a in enumerate(left, 1):
        before, row[0] = row[0], number_of_left
        for place, b in enumerate(right, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (a != b))
    return row[-1]
