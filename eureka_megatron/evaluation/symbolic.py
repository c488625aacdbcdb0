"""What is equal as mathematics but not as strings: LaTeX read and evaluated in a process of its own, with limits on time and memory.

Model answers are never evaluated as code. `ask` may be called anywhere; `judge_rows` is what the isolated process runs (by way of `formulas`),
under the judges' own pool (rewards.judge), and a formula that breaks a limit is equal to nothing.
"""

from __future__ import annotations

import atexit
import functools
import re
from typing import TYPE_CHECKING, Any

from eureka_megatron.rewards.judge import JudgePool

if TYPE_CHECKING:
    import sympy

SECONDS = 5.0
_MOST_CHARACTERS = 400
_LARGEST_POWER = 1000
_DIFFERENCE = 1e-3
_SUBSCRIPT = re.compile(r"_\s*(?:(\\[a-zA-Z]+)|\{([^{}]*)\})")
_PLAIN = re.compile(r"\s*-?\d+(\.\d+)?\s*")


@functools.lru_cache(maxsize=1)
def _pool() -> JudgePool:
    pool = JudgePool(workers=1, time_limit_seconds=SECONDS, user_function=f"{__package__}.formulas:judge_rows")
    atexit.register(pool.close)
    return pool


@functools.lru_cache(maxsize=4096)
def ask(kind: str, gold: str, answer: str, tolerance: float = 0.0) -> bool:
    """Whether two formulas are equal.

    Args:
        kind: "rounded": both have values that round to the same two decimals; "expression", "equation": see `_expressions`, `_equations`.
        tolerance: of an expression without symbols.
    """
    return _value(kind, gold, answer, tolerance).get("accuracy", 0.0) > 0


def rounded(text: str) -> float | None:
    """The value, rounded to two decimals; None: it has none."""
    if _PLAIN.fullmatch(text):
        return round(float(text), 2)
    found = _value("value", text, text, 0.0)
    return found["value"] if found.get("accuracy") else None


@functools.lru_cache(maxsize=4096)
def _value(kind: str, gold: str, answer: str, tolerance: float) -> dict[str, float]:
    if max(len(gold), len(answer)) > _MOST_CHARACTERS:
        return {}
    row = {"kind": kind, "answer": gold, "response": answer, "tolerance": tolerance}
    try:
        return dict(_pool().judge([row])[0])  # type: ignore[list-item]
    except RuntimeError as error:
        if "failed on every one" not in str(error):  # else this one broke a limit
            raise
        return {}


def judge_rows(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """In the isolated process."""
    return [_judge(row["kind"], row["answer"], row["response"], row["tolerance"]) for row in rows]


def _judge(kind: str, gold: str, answer: str, tolerance: float) -> dict[str, float]:
    try:
        if kind == "value":
            value = _rounded(gold)
            return {"accuracy": 0.0, "value": 0.0} if value is None else {"accuracy": 1.0, "value": value}
        if kind == "rounded":
            left, right = _rounded(gold), _rounded(answer)
            return {"accuracy": float(left is not None and left == right)}
        return {"accuracy": float((_expressions if kind == "expression" else _equations)(gold, answer, tolerance))}
    except Exception:  # parsers raise nearly anything on what models write
        return {"accuracy": 0.0}


def _rounded(text: str) -> float | None:
    import sympy

    formula = _ratio(text)
    value = sympy.N(parse(formula))
    if value.free_symbols or not value.is_real:
        return None
    return round(float(value), 2)


def _ratio(text: str) -> str:
    """a:b as a/b, as the authors' parser has it."""
    return re.sub(r"^([^:]+):([^:]+)$", r"\\frac{\1}{\2}", text)


def _braced(text: str) -> str:
    """\\frac12 as \\frac{1}{2}: OlympiadBench's parser reads digits without braces, MathVision's does not."""
    return re.sub(r"(\\[dt]?frac\{[^{}]*\})\s*(\d)", r"\1{\2}", re.sub(r"(\\[dt]?frac)\s*(\d)", r"\1{\2}", text))


def parse(text: str) -> sympy.Basic:
    from latex2sympy2_extended import latex2sympy

    # A subscript is a name, whatever commands it is made of: the parser does not know \\odot, for one.
    text = _SUBSCRIPT.sub(lambda found: "_{" + re.sub(r"[\\\s]", "", found[1] or found[2]) + "}", text)
    return latex2sympy(text)


def _expressions(gold: str, answer: str, tolerance: float) -> bool:
    """Right sides where there is an "=". Without symbols their difference is bounded, with symbols it must vanish."""
    import sympy

    left, right = (parse(_braced(side.split("=")[-1])) for side in (gold, answer))
    if left == right:
        return True
    left, right = (_with_pi(side) for side in (left, right))
    if bool(left.free_symbols) != bool(right.free_symbols):
        return False
    if left.free_symbols:
        difference = abs(sympy.N(sympy.simplify(left - right)))
        return bool(difference < _DIFFERENCE)
    if any(_too_large(side) for side in (left, right)):
        return False
    return bool(abs(sympy.N(left) - sympy.N(right)) <= tolerance * 1.01)


def _with_pi(side: Any) -> Any:
    import sympy

    return side.subs({sympy.Symbol("pi"): sympy.pi}).subs(sympy.pi, sympy.pi.evalf())


def _too_large(side: Any) -> bool:
    import sympy

    return any(abs(sympy.N(power.exp)) > _LARGEST_POWER for power in side.atoms(sympy.Pow))


def _equations(gold: str, answer: str, tolerance: float) -> bool:
    """Both sides' differences are non-zero whole multiples of one another."""
    import sympy

    first, second = (
        parse(left) - parse(right) for left, right in (_braced(gold).split("="), _braced(answer).split("="))
    )
    for above, below in ((first, second), (second, first)):
        ratio = sympy.simplify(above / below)
        if ratio.is_Integer and ratio != 0:
            return True
    return False
