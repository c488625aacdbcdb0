"""What a rule says of a response, and how the rules read a row."""

from __future__ import annotations

import ast
import json
import math
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
    return str(value)


def absent(value: Any) -> bool:
    """None, or the NaN that a table's empty cell becomes."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def items(value: Any) -> list[str]:
    """A list column as a list of texts: a list, an array, or the text of one as tables and JSON hold it; nothing is an empty list."""
    if absent(value):
        return []
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):  # literals only, never code
            try:
                found = read(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(found, list | tuple):
                return [str(item) for item in found]
        return [value] if value.strip() else []
    return [str(item) for item in value]


def number(text: str) -> float | None:
    """What Python's float reads, surrounding space included."""
    try:
        return float(text)
    except ValueError:
        return None
