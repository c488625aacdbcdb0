"""Number regions: intervals, unions, inequalities in one variable and set-builder notation, in one representation."""

import re

from eureka_megatron.rewards import expression
from eureka_megatron.rewards.arithmetic import Unsupported

# (opening bracket, low, high, closing bracket)
Interval = tuple[str, str, str, str]
_OPENING = ("\\{", "(", "[", "\\langle")
_CLOSING = ("\\}", ")", "]", "\\rangle")
_VARIABLE = re.compile(r"[a-zA-Z](?:_\{?\w\}?)?|\\(?:alpha|beta|theta|lambda|mu|omega|phi)")
_MEMBER = re.compile(r"^[a-zA-Z](?:_\{?\w\}?)?\s*(?:\\in(?![a-zA-Z])|=)\s*(?=[(\[\\])")
_BUILDER = re.compile(r"^\\\{\s*[a-zA-Z](?:\s*\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|R))?\s*[|:]\s*(.*)\\\}$")
_SIGN = re.compile(r"(\\leq|\\geq|\\neq|<|>)")
_MIRROR = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "\\neq": "\\neq"}
_INFINITY = re.compile(r"^([-+]?)\s*\\infty$")


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, content, closing) when one pair of brackets, of either kind, encloses the whole text."""
    text = text.strip()
    opening = next((mark for mark in _OPENING if text.startswith(mark)), None)
    closing = next((mark for mark in _CLOSING if text.endswith(mark)), None)
    if opening is None or closing is None or len(text) <= len(opening) + len(closing):
        return None
    content = text[len(opening) : len(text) - len(closing)]
    depth = 0
    for character in content:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
    return (opening, content.strip(), closing) if depth == 0 else None


def region(items: list[str], *, together: bool = False) -> list[Interval] | None:
    """The union that the items describe (intervals, inequalities); None when they are something else.

    ["x<1", "x>3"] gives the two rays; ["(-1,2)"] one interval, though it may be a point: same brackets compare alike.
    together: "x > -1 and x < 2" are two rays that hold at once, so their intersection.
    """
    found: list[Interval] = []
    for item in items:
        if builder := _BUILDER.match(item):
            item = builder[1].strip()
        item = _MEMBER.sub("", item)
        for piece in re.split(r"\\cup(?![a-zA-Z])", item):
            part = _from_inequality(piece) or _from_brackets(piece)
            if part is None:
                return None
            found += part
    if together and len(found) == 2:
        up = [one for one in found if _INFINITY.match(one[2])]
        down = [one for one in found if _INFINITY.match(one[1])]
        if len(up) == len(down) == 1 and up != down:
            return [(up[0][0], up[0][1], down[0][2], down[0][3])]
    return found


def _from_brackets(text: str) -> list[Interval] | None:
    inner = bracketed(text)
    if inner is None or inner[0] not in ("(", "[") or inner[2] not in (")", "]"):
        return None
    ends = _top_level_commas(inner[1])
    if len(ends) != 2 or not all(end.strip() for end in ends):
        return None
    return [_interval(inner[0], ends[0], ends[1], inner[2])]


def _top_level_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _interval(opening: str, low: str, high: str, closing: str) -> Interval:
    low, high = low.strip(), high.strip()
    # A bracket at infinity says nothing: always open.
    return ("(" if _INFINITY.match(low) else opening, low, high, ")" if _INFINITY.match(high) else closing)


def _from_inequality(text: str) -> list[Interval] | None:
    parts = [part.strip() for part in _SIGN.split(text)]
    if len(parts) == 3:
        left, sign, right = parts
        if not _VARIABLE.fullmatch(left):
            left, sign, right = right, _MIRROR[sign], left
        if not _VARIABLE.fullmatch(left) or not _is_constant(right):
            return None
        if sign == "\\neq":
            return [("(", "-\\infty", right, ")"), ("(", right, "\\infty", ")")]
        if sign in ("<", "\\leq"):
            return [("(", "-\\infty", right, "]" if sign == "\\leq" else ")")]
        return [("[" if sign == "\\geq" else "(", right, "\\infty", ")")]
    if len(parts) == 5 and _VARIABLE.fullmatch(parts[2]) and _is_constant(parts[0]) and _is_constant(parts[4]):
        low, first, _, second, high = parts
        if {first, second} <= {">", "\\geq"}:
            low, first, second, high = high, _MIRROR[second], _MIRROR[first], low
        if {first, second} <= {"<", "\\leq"}:
            return [_interval("[" if first == "\\leq" else "(", low, high, "]" if second == "\\leq" else ")")]
    return None


def _is_constant(text: str) -> bool:
    try:
        return expression.is_constant(text)
    except Unsupported:
        return False


def same(first: list[Interval], second: list[Interval]) -> bool:
    """Equal as sets of intervals, in any order. Raises Unsupported when an end cannot be evaluated."""
    left = list(second)
    for wanted in first:
        found = next((other for other in left if _same_interval(wanted, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _same_interval(a: Interval, b: Interval) -> bool:
    return a[0] == b[0] and a[3] == b[3] and expression.equal(a[1], b[1]) and expression.equal(a[2], b[2])
