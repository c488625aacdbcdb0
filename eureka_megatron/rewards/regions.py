r"""Number regions: intervals, unions, inequalities in one unknown and set-builder notation, as sympy's sets.

    "x<1 or x>3", "(-\infty,1)\cup(3,\infty)", "\{x|x<1或x>3\}", "x\in(-\infty,1)\cup(3,\infty)"
    "k<1 and k\neq 0" is (-\infty,0)\cup(0,1); "0<g(x)<5" is (0,5) for g(x)

The ends are the values of expressions, exact to 50 digits; an end with a letter has its value at a fixed random point.
"""

import re
from typing import Any, NamedTuple

from eureka_megatron.rewards import expression, structure
from eureka_megatron.rewards.expression import MP, Unsupported

_NAME = re.compile(
    r"[A-Za-z]'*(?:_\{?\w+\}?)?(?:\([a-z]\))?|\\(?:alpha|beta|theta|lambda|mu|omega|phi)|[A-Z]{2}|\|[A-Z]{2}\||\\angle\s*[A-Z]+"
)
_REALS = r"(?:(?:\\mathbb)?\s*\{\s*R\s*\}|R(?![A-Za-z]))"
_IS_REAL = re.compile(rf"(?:[a-z]\s*\\in\s*)?{_REALS}|(?:all|any) real numbers?|全体实数|一切实数|实数集")
_REAL_TOO = re.compile(rf",?\s*\(?\s*[a-z]\s*\\in\s*{_REALS}\s*\)?$|^[a-z]\s*\\in\s*{_REALS}\s*(?:,|and|且)\s*")
_MEMBER = re.compile(r"([A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?)\s*(\\in(?![a-zA-Z])|=)\s*(?=[(\[\\])")
_BUILDER = re.compile(rf"\\\{{\s*([a-zA-Z])(?:\s*\\in\s*{_REALS})?\s*[|:;]\s*(.*)\\\}}")
_ANY = re.compile(r"\\cup(?![a-zA-Z])|(?<![A-Za-z])(?:or|union)(?![A-Za-z])|或")
_ALL = re.compile(r"\\cap(?![a-zA-Z])|(?<![A-Za-z])(?:and|but)(?![A-Za-z])|[,;]|[且和与]")
_SIGN = re.compile(r"\\leq|\\geq|\\neq|<|>|=")
MIRROR = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_ABSOLUTE = re.compile(r"\|\s*([a-z])\s*\|\s*(<|>|\\leq|\\geq)\s*([^<>=|]+)")
_COMMA = re.compile(r"[,;]")


class Region(NamedTuple):
    """numbers: a sympy set. name: of the unknown, where it is given; sure: it can be nothing else, as (1,2) can."""

    numbers: Any
    name: str | None
    sure: bool


def parse(answer: str) -> Region | None:
    """The region that the text describes, None when it is something else."""
    try:
        return _read(answer.strip()) if len(answer) <= 300 else None
    except Unsupported:
        return None


def _read(answer: str) -> Region:
    if _IS_REAL.fullmatch(answer):
        return Region(_interval("-\\infty", False, "\\infty", False), None, True)
    answer = _REAL_TOO.sub("", answer)
    if match := _BUILDER.fullmatch(answer):
        return Region(_read(match[2].strip()).numbers, match[1], True)
    if (match := _MEMBER.match(answer)) and (match[2] != "=" or not _SIGN.search(answer[match.end() :])):
        inner = _read(answer[match.end() :])
        return Region(inner.numbers, match[1], inner.sure or match[2] != "=")
    if match := _ABSOLUTE.fullmatch(answer):  # |x|>5 is x>5 or x<-5
        name, sign, end = match.groups()
        other = f"{name}{MIRROR[sign]}-({end})"
        return _joined([_inequality(f"{name}{sign}{end}"), _inequality(other)], at_once=sign in ("<", "\\leq"))
    for separator, at_once in ((_ANY, False), (_ALL, True)):
        pieces = [piece for piece in structure.split(answer, separator) if piece]
        if len(pieces) > 1:
            return _joined([_point(piece) or _read(piece) for piece in pieces[:8]], at_once)
    return _inequality(answer)


def _joined(regions: list[Region], at_once: bool) -> Region:
    """Inequalities that hold at once; when they never do ("x<1, x>3"), or for intervals side by side, their union."""
    from sympy import Intersection, S, Union

    names = {region.name for region in regions if region.name}
    if len(names) > 1:
        raise Unsupported("several unknowns")
    numbers = S.EmptySet
    if at_once and all(region.name for region in regions):
        numbers = Intersection(*(region.numbers for region in regions))
    if numbers is S.EmptySet:
        numbers = Union(*(region.numbers for region in regions))
    return Region(numbers, next(iter(names), None), any(region.sure for region in regions))


def _inequality(answer: str) -> Region:
    parts = structure.split(answer, _SIGN, keep=True)
    if len(parts) == 1:
        return _brackets(answer)
    if len(parts) == 3 and parts[1] in (*MIRROR, "\\neq"):
        name, sign, end = parts
        if not _NAME.fullmatch(name) or (_NAME.fullmatch(end) and sign in ("<", "\\leq")):  # b < a is read as a > b
            name, sign, end = end, MIRROR.get(sign, sign), name
        below = _interval("-\\infty", False, end, sign == "\\leq")
        above = _interval(end, sign == "\\geq", "\\infty", False)
        numbers = below.union(above) if sign == "\\neq" else above if sign in (">", "\\geq") else below
    elif len(parts) == 5:
        low, first, name, second, high = parts
        if {first, second} <= {">", "\\geq"}:
            low, first, second, high = high, MIRROR[second], MIRROR[first], low
        if not {first, second} <= {"<", "\\leq"}:
            raise Unsupported("signs of two directions")
        numbers = _interval(low, first == "\\leq", high, second == "\\leq")
    else:
        raise Unsupported("no inequality")
    if not _NAME.fullmatch(name):
        raise Unsupported("not solved for an unknown")
    return Region(numbers, re.sub(r"[{}\s]", "", name), True)


def _brackets(answer: str) -> Region:
    inner = structure.bracketed(answer)
    ends = structure.split(inner[1], _COMMA) if inner and inner[0] in "([" and inner[2] in ")]" else []
    if len(ends) != 2 or inner is None:
        raise Unsupported("no interval")
    sure = inner[0] + inner[2] in ("(]", "[)") or "\\infty" in inner[1]
    return Region(_interval(ends[0], inner[0] == "[", ends[1], inner[2] == "]"), None, sure)


def _point(answer: str) -> Region | None:
    """x=1 beside inequalities, or {1} beside intervals."""
    name, sign, value = answer.partition("=")
    inner = structure.bracketed(answer)
    if inner and inner[0] == "\\{" and expression.is_constant(inner[1]):
        return Region(_interval(inner[1], True, inner[1], True), None, False)
    if sign and _NAME.fullmatch(name.strip()) and expression.is_constant(value):
        return Region(_interval(value, True, value, True), name.strip(), False)
    return None


def _interval(low: str, has_low: bool, high: str, has_high: bool) -> Any:
    from sympy import Interval, S

    # A bracket at infinity says nothing: always open.
    found = Interval(_end(low), _end(high), not has_low or "\\infty" in low, not has_high or "\\infty" in high)
    if found is S.EmptySet:
        raise Unsupported("an interval whose ends are not in order")
    return found


def _end(answer: str) -> Any:
    from sympy import Rational, oo

    value = expression.values(answer)[0]
    if isinstance(value, MP.mpc):
        raise Unsupported("a complex end")
    return Rational(MP.nstr(value, 50)) if MP.isfinite(value) else oo if value > 0 else -oo
