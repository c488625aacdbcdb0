"""MathVista by its authors' rules: an extraction becomes a prediction in the answer's own form, which must equal the answer as a string.

The authors extract by a language model; what their rules can extract without one is done here, the rest by the original's extraction
(`extraction.paper_extraction`), and a run may bring extractions of its own (`extracted=True`).
"""

from __future__ import annotations

import re

from eureka_megatron.evaluation.extraction import paper_extraction
from eureka_megatron.evaluation.verdict import Row, Verdict, field, items, number, optional

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def judge(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    extraction = text if extracted else extract(row, text)
    prediction = normalised(row, extraction)
    return Verdict(extraction, prediction is not None and prediction == gold(row))


def gold(row: Row) -> str:
    """The answer as published, which is text; a table may have made a number of it (7.0 for "7")."""
    text = field("MathVista", row, "answer")
    as_published = isinstance(row["answer"], str) or question_type(row) == "multi_choice"
    return text if as_published else normalised(row, text) or text


def question_type(row: Row) -> str:
    given = optional(row, "question_type").replace("-", "_")
    return given or ("multi_choice" if items(row.get("choices")) else "free_form")


def extract(row: Row, response: str) -> str:
    if not response:
        return ""
    if question_type(row) == "multi_choice" and response in items(row.get("choices")):
        return response
    kind = optional(row, "answer_type")
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
    """Levenshtein's: the least number of insertions, deletions and replacements. Example: "abc", "axcd" → 2.

    A column of the usual table in two whole numbers, one bit a cell (Myers 1999, Hyyrö 2003): a response of 100,000 characters takes no time.
    """
    if not right:
        return len(left)
    full, last = (1 << len(right)) - 1, 1 << (len(right) - 1)
    places: dict[str, int] = {}
    for place, character in enumerate(right):
        places[character] = places.get(character, 0) | 1 << place
    more, less, found = full, 0, len(right)  # where a cell is one more, one less than the cell above it
    for character in left:
        same = places.get(character, 0)
        diagonal = (((same & more) + more) ^ more) | same | less
        grows, falls = less | (full & ~(diagonal | more)), diagonal & more
        found += bool(grows & last) - bool(falls & last)
        grows = (grows << 1) | 1
        more = full & ((falls << 1) | ~(diagonal | grows))
        less = full & grows & diagonal
    return found
