"""What a rule says of a response, and how the rules read a row."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eureka_megatron.errors import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Example: Verdict(extraction="28", correct=True). None: nothing could be extracted."""

    extraction: str | None
    correct: bool


def field(benchmark: str, row: Row, name: str) -> str:
    """A column that a rule needs, as text. Raises UserError that names it."""
    value = row.get(name)
    if absent(value):
        raise UserError(f"{benchmark}: the row has no {name!r}; found {', '.join(sorted(map(str, row))) or 'nothing'}")
    return str(_plain(value))


def optional(row: Row, name: str) -> str:
    """A column as text, "" where it is absent."""
    value = row.get(name)
    return "" if absent(value) else str(_plain(value))


def absent(value: Any) -> bool:
    """None, blank text, or the NaN, NA or NaT that a table's empty cell becomes."""
    value = _plain(value)
    if value is None or isinstance(value, str):
        return value is None or not value.strip()
    if hasattr(value, "__len__"):
        return False
    try:
        return bool(value != value)
    except TypeError:  # pandas' NA has no truth
        return True


def _plain(value: Any) -> Any:
    """Arrow's scalars as Python's."""
    return value.as_py() if hasattr(value, "as_py") else value


def items(value: Any, *, texts: bool = False) -> list[str]:
    """A list column as a list of texts: a list, an array, or the text of one as tables and JSON hold it; nothing is an empty list.

    texts: the text of a list of anything but texts is one item: "[1, 2]" is an interval.
    """
    if absent(value):
        return []
    value = _plain(value)
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):  # literals only, never code
            try:
                found = read(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(found, list | tuple) and not (texts and not all(isinstance(item, str) for item in found)):
                return [str(item) for item in found]
        return [value]
    if not hasattr(value, "__iter__"):
        return [str(value)]
    return [str(item) for item in map(_plain, value)]


def number(text: str) -> float | None:
    """What Python's float reads, surrounding space included."""
    try:
        return float(text)
    except ValueError:
        return None
