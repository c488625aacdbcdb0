r"""Number regions: intervals, unions, inequalities in one unknown and set-builder notation, in one representation.

"x<1 or x>3", "(-\infty,1)\cup(3,\infty)", "\{x|x<1或x>3\}", "x\in(-\infty,1)\cup(3,\infty)"
"k<1 and k\neq 0" is (-\infty,0)\cup(0,1); "0<g(x)<5" is (0,5) for g(x)
"""

import re
from dataclasses import dataclass

from eureka_megatron.rewards import expression, text

_NAME = re.compile(
    r"[A-Za-z]'*(?:_\{?\w+\}?)?(?:\([a-z]\))?|\\(?:alpha|beta|theta|lambda|mu|omega|phi)|[A-Z]{2}|\|[A-Z]{2}\||\\angle\s*[A-Z]+"
)
_MEMBER = re.compile(r"^([A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?)\s*(?:\\in(?![a-zA-Z])|=)\s*(?=[(\[\\])")
_BUILDER = re.compile(r"^\\\{\s*([a-zA-Z])(?:\s*\\in\s*(?:\\mathbb\{R\}|R))?\s*[|:;]\s*(.*)\\\}$")
_REAL = re.compile(
    r"(?:[a-z]\s*\\in\s*)?(?:\\mathbb\s*\{\s*R\s*\}|R)|(?:all|any) real numbers?|全体实数|一切实数|实数集"
)
_REAL_TOO = re.compile(
    r",?\s*\(?\s*[a-z]\s*\\in\s*(?:\\mathbb\s*\{\s*R\s*\}|R)\s*\)?\s*$|^[a-z]\s*\\in\s*(?:\\mathbb\s*\{\s*R\s*\}|R)\s*(?:,|and|且)\s*"
)
_ANY = re.compile(r"\\cup(?![a-zA-Z])|(?<![A-Za-z])(?:or|union)(?![A-Za-z])|或")
_ALL = re.compile(r"\\cap(?![a-zA-Z])|(?<![A-Za-z])(?:and|but)(?![A-Za-z])|[,;]|[且和与]")
_SIGN = re.compile(r"\\leq|\\geq|\\neq|<|>|=")
_MIRROR = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
_COMMA = re.compile(r"[,;]")


@dataclass(frozen=True)
class Interval:
    """low and high as text; whether they belong to it."""

    low: str
    has_low: bool
    high: str
    has_high: bool


@dataclass(frozen=True)
class Region:
    """A union of intervals. name: of the unknown, where it is given; sure: it can be nothing else, as (1,2) can."""

    intervals: tuple[Interval, ...]
    name: str | None = None
    sure: bool = True

    @property
    def is_constant(self) -> bool:
        return all(expression.is_constant(end) for one in self.intervals for end in (one.low, one.high))


def parse(answer: str) -> Region | None:
    """The region that the text describes; None when it is something else or its ends would have to be compared."""
    answer = answer.strip()
    if _REAL.fullmatch(answer):
        return Region((Interval("-\\infty", False, "\\infty", False),))
    answer = _REAL_TOO.sub("", answer)
    if match := _BUILDER.match(answer):
        inner = parse(match[2])
        return None if inner is None else Region(inner.intervals, match[1])
    if (match := _MEMBER.match(answer)) and not _SIGN.search(answer[match.end() :]):
        inner = parse(answer[match.end() :])
        return None if inner is None else Region(inner.intervals, match[1], sure="\\in" in match[0] or inner.sure)
    for separator, joined in ((_ANY, _united), (_ALL, _at_once)):
        pieces = [piece for piece in text.split(answer, separator) if piece]
        if len(pieces) > 1:
            found = [parse(piece) or _point(piece) for piece in pieces]
            return joined([region for region in found if region]) if all(found) else None
    return _from_inequality(answer) or _from_brackets(answer)


def _united(regions: list[Region]) -> Region | None:
    names = {region.name for region in regions if region.name}
    intervals = _merged([interval for region in regions for interval in region.intervals])
    sure = any(region.sure for region in regions)
    return Region(tuple(intervals), min(names, default=None), sure) if len(names) < 2 else None


def _at_once(regions: list[Region]) -> Region | None:
    """Inequalities that hold together; when they never do ("x<1, x>3"), or for intervals side by side, their union."""
    union = _united(regions)
    if union is None or not all(region.name for region in regions):
        return union
    left = list(regions[0].intervals)
    for region in regions[1:]:
        pairs = [_common(a, b) for a in left for b in region.intervals]
        if None in pairs:
            return None
        left = [interval for interval in pairs if interval and not _is_empty(interval)]
    return Region(tuple(_merged(left)), union.name) if left else union


def _from_brackets(answer: str) -> Region | None:
    inner = text.bracketed(answer)
    if inner is None or inner[0] not in "([" or inner[2] not in ")]":
        return None
    ends = text.split(inner[1], _COMMA)
    if len(ends) != 2 or not all(ends):
        return None
    # A bracket at infinity says nothing: always open.
    has_low, has_high = (mark in "[]" and "\\infty" not in end for mark, end in zip(inner[::2], ends, strict=True))
    sure = inner[0] + inner[2] in ("(]", "[)") or "\\infty" in inner[1]
    return Region((Interval(ends[0], has_low, ends[1], has_high),), sure=sure)


def _from_inequality(answer: str) -> Region | None:
    parts = text.split(answer, _SIGN, keep=True)
    if len(parts) == 3 and parts[1] != "=":
        left, sign, right = parts
        if not _NAME.fullmatch(left):
            left, sign, right = right, _MIRROR.get(sign, sign), left
        if not _NAME.fullmatch(left) or not _is_end(right):
            return None
        above, below = (
            Interval(right, sign == "\\geq", "\\infty", False),
            Interval("-\\infty", False, right, sign == "\\leq"),
        )
        return Region((below, above) if sign == "\\neq" else (above,) if sign in (">", "\\geq") else (below,), left)
    if len(parts) == 5 and _NAME.fullmatch(parts[2]) and _is_end(parts[0]) and _is_end(parts[4]):
        low, first, name, second, high = parts
        if {first, second} <= {">", "\\geq"}:
            low, first, second, high = high, _MIRROR[second], _MIRROR[first], low
        if {first, second} <= {"<", "\\leq"}:
            return Region((Interval(low, first == "\\leq", high, second == "\\leq"),), name)
    return None


def _point(answer: str) -> Region | None:
    """x=1 beside inequalities, or {1} beside intervals."""
    name, sign, value = answer.partition("=")
    if sign and _NAME.fullmatch(name.strip()) and expression.is_constant(value):
        return Region((Interval(value, True, value, True),), name.strip(), sure=False)
    inner = text.bracketed(answer)
    if inner and inner[0] == "\\{" and expression.is_constant(inner[1]):
        return Region((Interval(inner[1], True, inner[1], True),), sure=False)
    return None


def _is_end(answer: str) -> bool:
    """A number or an expression that can bound a region: a > 2b is none of one unknown, x > a is."""
    return expression.is_constant(answer) or bool(re.fullmatch(r"-?\d*[a-z]", answer))


def _less(a: str, b: str) -> bool | None:
    """a < b; None when that is not known."""
    if not (expression.is_constant(a) and expression.is_constant(b)):
        return None if "\\infty" not in a + b else a.startswith("-\\infty") or b in ("\\infty", "+\\infty")
    left, right = expression.values(a)[0], expression.values(b)[0]
    if isinstance(left, expression.MP.mpc) or isinstance(right, expression.MP.mpc):
        return None
    return bool(left < right) and not expression.same(left, right)


def _common(a: Interval, b: Interval) -> Interval | None:
    if _less(a.low, b.low) is None or _less(a.high, b.high) is None:
        return None
    (low, has_low), (high, has_high) = (a.low, a.has_low), (a.high, a.has_high)
    if _less(a.low, b.low):
        low, has_low = b.low, b.has_low
    elif not _less(b.low, a.low):
        has_low = a.has_low and b.has_low
    if _less(b.high, a.high):
        high, has_high = b.high, b.has_high
    elif not _less(a.high, b.high):
        has_high = a.has_high and b.has_high
    return Interval(low, has_low, high, has_high)


def _is_empty(interval: Interval) -> bool:
    return bool(_less(interval.high, interval.low)) or (
        _less(interval.low, interval.high) is False and not (interval.has_low and interval.has_high)
    )


def _merged(intervals: list[Interval]) -> list[Interval]:
    """In order, with those that touch made one; as given when the ends cannot be ordered."""
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    if len(intervals) > 8 or not all(expression.is_constant(end) for end in ends):
        return intervals
    value = {end: expression.values(end)[0] for end in ends}
    if any(isinstance(number, expression.MP.mpc) for number in value.values()):
        return intervals
    found: list[Interval] = []
    for one in sorted(intervals, key=lambda one: (value[one.low], not one.has_low)):
        last = found[-1] if found else None
        touches = last and (
            _less(one.low, last.high) or (not _less(last.high, one.low) and (last.has_high or one.has_low))
        )
        if last is None or not touches:
            found.append(one)
            continue
        high = one if _less(last.high, one.high) or (one.has_high and not _less(one.high, last.high)) else last
        found[-1] = Interval(last.low, last.has_low, high.high, high.has_high)
    return found
