r"""The exact core: do two canonical answers say the same? Lists, solutions, regions, equations, quantities, expressions.

A comparison goes from the outside in, and each view says yes, no, or that it does not apply:

    "(1) 30^\circ; (2) 5"             numbered parts, in order
    "x<1 or x>3", "(-\infty,1)\cup…"  regions, as sets of numbers
    "p=2,q=7;p=3,q=7", "(2,7),(3,7)"  solutions: values of unknowns, against tuples in the unknowns' order
    "3, -1", "\{1,2\}", "\pm 3"       lists, in any order
    "y=2x+1", "\angle A=60^\circ"     relations: equal up to a factor, or the value of what is named
    "12 cm^2", "(1,2)", "3:4"         quantities, tuples, ratios, and at the bottom expressions by their values

What the bottom cannot evaluate goes to math-verify. By default nothing is rounded and no unit converted.
"""

import itertools
import re
from collections.abc import Callable

from eureka_megatron.rewards import expression, regions, structure, symbolic, text, units
from eureka_megatron.rewards.expression import Unbounded, Unsupported

_CIRCLED = re.compile(r"(?:[\u2460-\u2473]|[\s,;.()和与及]|and)+")
_REGION = re.compile(r"[<>\]\[]|\\(?:leq|geq|neq|cup|infty|in|mathbb)|R|real|实数")
_GEOMETRY = {
    "\\parallel": ("parallel", "平行"), "\\perp": ("perpendicular", "垂直"), "\\sim": ("similar", "相似"), "\\cong": ("congruent", "全等"),
}  # fmt: skip
_NAMES = re.compile(
    r"(?:\\(?:frac|angle|triangle|sin|cos|tan|overline|overrightarrow|vec|widehat|[a-z]+)(?![a-z])|[A-Za-z]'*|[|(){}+:/,\s-])+"
)
_WORDS = re.compile(r"[A-Za-z\s\u4e00-\u9fff\\']+")
_CURVE = re.compile(r"(?=.*x)(?=.*y).*[xyz]\)?\s*\^.*")  # x^2+y^2=1 gives no value
_FUNCTION_CALL = re.compile(
    r"(?<![A-Za-z])[A-Za-z](?:_\{?\w+\}?)?\s*\([^()]*\)|\\angle\s*\d|_\s*(?:\{[^{}]*\}|\w|\\triangle\s*[A-Z]+)"
)
_MATRIX = re.compile(r"\\begin\{([pvV])matrix\}((?:(?!\\begin).)*)\\end\{\1matrix\}", re.DOTALL)
_BASE = re.compile(
    r"\(?\s*([\dA-Fa-f]+)\s*\)?\s*(?:_\s*\{?\s*\(?\s*(?:base\s*)?(\d+|[a-z]+)\s*\)?\s*\}?|\(?\s*base\s*(\w+)\s*\)?)"
)
_PERCENT = units.unit("%")
_NUMERALS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_BLANKS = re.compile(";")
_PROOF = re.compile(r"(?:证明)?(?:过程)?(?:略|见解析|如下)|proof omitted|omitted", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|never|cannot)\b|[不非]")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
_DECIMAL_COMMA = re.compile(r"^(-?\d+),(\d+)$")
_DIGITS = re.compile(r"-?\d*\.(\d+)")
_MAX_QUESTIONS = 6  # to math-verify for one answer: a list is compared item by item


class Comparison:
    """One comparison, with the words for its verdict.

    Attributes:
        rounded: a decimal of at least four digits equals what it rounds.
        converted: 1 m is 100 cm.
        why: the view that decided, or what speaks against equality.
        asked: for every question to math-verify, what spoke against asking it.
    """

    def __init__(self, *, rounded: bool = False, converted: bool = False) -> None:
        self.rounded, self.converted, self.why = rounded, converted, ""
        self.asked: list[str | None] = []

    def equal(self, gold: str, prediction: str) -> bool:
        """Whether both say the same. Raises Unbounded for what nobody should try to compute."""
        if text.same(gold, prediction):
            return True
        for view, why in self._views:
            if (verdict := view(self, gold, prediction)) is not None:
                self.why = self.why or why
                return verdict
        return self._lists(gold, prediction)

    def otherwise(self, gold: str, prediction: str) -> bool:
        """What math-verify says."""
        self.asked.append(symbolic.objection(gold, prediction))
        return len(self.asked) <= _MAX_QUESTIONS and symbolic.agrees(gold, prediction)

    # --- several things: each view gives a verdict, or None where it does not apply ---

    def _circled(self, gold: str, prediction: str) -> bool | None:
        if not (_CIRCLED.fullmatch(gold) and _CIRCLED.fullmatch(prediction)):
            return None
        left, right = (re.findall("[\u2460-\u2473]", side) for side in (gold, prediction))
        return sorted(left) == sorted(right) and bool(left)

    def _parts(self, gold: str, prediction: str) -> bool | None:
        left, right = structure.parts(gold), structure.parts(prediction)
        if not left and not right:
            return None
        left, right = left or structure.items(gold), right or structure.items(prediction)
        return self._in_order(left, right)

    def _in_order(self, left: list[str], right: list[str]) -> bool:
        proofs = [[bool(_PROOF.fullmatch(part)) for part in side] for side in (left, right)]
        pairs = [pair for pair, *proof in zip(zip(left, right, strict=False), *proofs, strict=False) if not all(proof)]
        return len(left) == len(right) and all(self.equal(*pair) for pair in pairs)

    def _regions(self, gold: str, prediction: str) -> bool | None:
        if not _REGION.search(gold + prediction):
            return None
        left, right = regions.parse(gold), regions.parse(prediction)
        if (left and left.sure and right is None) or (right and right.sure and left is None):
            pair = structure.bracketed(prediction if left else gold)
            if pair and len(structure.items(pair[1], loose=True)) == 2:
                return self._no("its ends are not in order")
        if left is None or right is None or not (left.sure or right.sure):
            return None
        if left.name and right.name and left.name != right.name:
            return False
        return bool(left.numbers == right.numbers) or (None if self.rounded else False)

    def _solutions(self, gold: str, prediction: str) -> bool | None:
        """Values of unknowns against such values, or against bare values and tuples in the order of the unknowns."""
        left_items, right_items = structure.items(gold), structure.items(prediction)
        left, right = structure.assignments(left_items), structure.assignments(right_items)
        if left and right:
            if len(left) == len(right) == len(left[0]) == len(right[0]) == 1:
                return None
            return _matched(left, right, self._same_solution)
        named, bare = (left, right_items) if left else (right, left_items)
        if not named or any(structure.RELATION.search(item) for item in bare):
            return None
        count = len(named[0])
        if len(named) == count == 1 or any(len(solution) != count for solution in named):
            return None
        orders = [list(named[0])] + ([sorted(named[0])] if set(named[0]) <= set("xyzt") else [])
        tuples = [structure.elements(item) for item in bare]
        if len(named) == 1 and len(bare) == count:  # x=1, y=2 against 1, 2
            tuples = [bare]
        elif count == 1:
            tuples = [[item] for item in structure.opened(bare)]
        for order in orders:
            rows = [[solution.get(name, "") for name in order] for solution in named]
            pair = (rows, tuples) if left else (tuples, rows)
            if _matched(*pair, self._same_row):
                return True
        return False

    def _same_solution(self, a: dict[str, str], b: dict[str, str]) -> bool:
        return a.keys() == b.keys() and all(self._single(value, b[name]) for name, value in a.items())

    def _same_row(self, a: list[str], b: list[str]) -> bool:
        return len(a) == len(b) and all(self._single(*pair) for pair in zip(a, b, strict=True))

    def _lists(self, gold: str, prediction: str) -> bool:
        left, right = structure.items(gold), structure.items(prediction)
        if len(left) != len(right):
            left, right = structure.opened(left), structure.opened(right)
        if {len(left), len(right)} == {1, 2} and self._decimal_comma(gold, prediction):
            return True
        if len(left) != len(right):  # the same value in several forms counts once
            left, right = self._distinct(left), self._distinct(right)
        if len(left) == len(right) == 1:
            return self._single(left[0], right[0])
        blanks = structure.split(gold, _BLANKS) if ";" in gold and "=" not in gold else []  # to fill in
        if len(left) == len(right) == len(blanks):
            return self._in_order(left, right)
        return _matched(left, right, self._single)

    def _distinct(self, values: list[str]) -> list[str]:
        found: list[str] = []
        for value in values[:12]:
            if not any(self._single(other, value) for other in found):
                found.append(value)
        return found + values[12:]

    def _decimal_comma(self, gold: str, prediction: str) -> bool:
        """2,5 against a single 2.5: as a list it could not be meant."""
        if not self._same_units(units.split(gold)[1], units.split(prediction)[1]):
            return False
        values = [_DECIMAL_COMMA.sub(r"\1.\2", units.split(side)[0]) for side in (gold, prediction)]
        return all(re.fullmatch(r"-?\d+\.\d+", value) for value in values) and self._values(*values)

    _views = (
        (_circled, "by the numbers picked"),
        (_parts, "part by part"),
        (_regions, "as sets of numbers"),
        (_solutions, "as values of unknowns"),
    )

    def _no(self, why: str) -> bool:
        self.why = why
        return False

    # --- one thing ---

    def _single(self, gold: str, prediction: str) -> bool:
        if text.same(gold, prediction):
            return True
        left, right = (structure.split(side, structure.RELATION, keep=True) for side in (gold, prediction))
        if len(right) == 3 and right[1] in _GEOMETRY and gold.casefold() in _GEOMETRY[right[1]]:
            return True
        if len(left) == len(right) == 1:
            return self._quantities(gold, prediction)
        signs = set(left[1::2]) | set(right[1::2])
        if signs <= {"=", "\\approx"}:
            return self._equations(_precise(left), _precise(right), (gold, prediction))
        if len(left) == len(right) == 3 and left[1] == right[1] and left[1] in _GEOMETRY:
            return _same_geometry(left, right)
        if signs & _GEOMETRY.keys():
            return False
        return self._inequalities(left, right) or self.otherwise(gold, prediction)

    def _equations(self, gold: list[str], sides: list[str], whole: tuple[str, str]) -> bool:
        if len(gold) == 1:
            if any(text.is_wordy(side) and _DENIAL.search(side) for side in sides):
                return self._no("it is denied")
            mixed = any(text.is_wordy(side) and not _WORDS.fullmatch(side) for side in sides[:-1])
            if mixed or _CURVE.fullmatch(sides[0]):
                return False
            constants = [side for side in sides if expression.is_constant(side)]
            if any(not self._values(side, constants[0]) for side in constants[1:]):
                return self._no("it states something false")  # 2*3 = 5
            ends = sides[-1:] if _is_named(sides[0]) else [sides[-1], sides[0]]
            return any(self._quantities(gold[0], end) for end in ends)
        if len(sides) == 1:
            named = [other for side, other in (gold[::-1], gold) if _is_named(side)] if len(gold) == 2 else [gold[-1]]
            plain = gold[-1:] if all(map(expression.is_constant, gold)) else []
            return any(self._quantities(value, sides[0]) for value in named or plain)
        first, last = (gold[0], gold[-1]), (sides[0], sides[-1])
        if _is_named(gold[0]) and _is_named(sides[0]) and (_same_name(gold[0], sides[0])):
            return self._quantities(gold[-1], sides[-1])
        for a, b in ((sides[0], sides[-1]), (sides[-1], sides[0])):  # AB = 5 and 5 = BA; m:n = 3:5
            if _is_named(gold[0]) and _is_named(a) and not text.is_wordy(a + gold[0]) and self._known(gold[0], a):
                return self._quantities(gold[-1], b)
        if all(map(text.is_reaction, whole)):
            return False  # its direction counts
        if first in (last, last[::-1]):
            return True
        sides = [f"({a})-({b})" for a, b in (first, last)]
        # y = 6/x is xy = 6: neither has a solution at 0, so both may be multiplied.
        factors = ("", *re.findall(r"(?:/|\}\s*\{)\s*\(?([a-z])(?![a-z])", " ".join(sides)))
        try:
            return any(
                expression.proportion(*pair) is not None
                for factor in dict.fromkeys(factors)
                for pair in (sides, [f"({sides[0]}){factor}", sides[1]], [sides[0], f"({sides[1]}){factor}"])
            )
        except Unbounded:
            raise
        except Unsupported:
            return self.otherwise(*whole)

    def _known(self, gold: str, prediction: str) -> bool:
        try:
            return expression.equal(gold, prediction)
        except Unsupported:
            return False

    def _inequalities(self, gold: list[str], parts: list[str]) -> bool:
        if len(gold) != len(parts) or len(gold) == 1:
            return False
        for candidate in (parts, [regions.MIRROR.get(part, part) for part in reversed(parts)]):
            same_signs = candidate[1::2] == gold[1::2]
            if same_signs and all(self._quantities(a, b) for a, b in zip(gold[::2], candidate[::2], strict=True)):
                return True
        if len(gold) == 3:  # 2x > 6 is x > 3: the same up to a factor, whose sign may turn the relation
            try:
                factor = expression.proportion(*(f"({side[0]})-({side[2]})" for side in (gold, parts)))
            except Unbounded:
                raise
            except Unsupported:
                return False
            if factor is not None and not isinstance(factor, expression.MP.mpc):
                return gold[1] == (parts[1] if factor > 0 else regions.MIRROR.get(parts[1], parts[1]))
        return False

    def _quantities(self, gold: str, prediction: str) -> bool:
        if text.same(gold, prediction):
            return True
        base, other = _BASE.fullmatch(gold), _BASE.fullmatch(prediction)
        if any(found and found[1][0].isdigit() for found in (base, other)):
            return bool(base and other and _same_base(base, other)) or self._no("another number base, or none")
        if (found := self._structures(gold, prediction)) is not None:
            return found
        (gold_value, gold_unit), (value, unit) = units.split(gold), units.split(prediction)
        if not self._same_units(gold_unit, unit):
            return self._no("another unit")
        if _PERCENT in (gold_unit, unit) and gold_unit != unit:
            # 25% is 0.25; its sign may be missing in the answer only.
            if gold_unit == _PERCENT and self._values(gold_value, value):
                return True
            sides = ((gold_value, gold_unit), (value, unit))
            return self._values(*(f"({number})/100" if of == _PERCENT else number for number, of in sides))
        if self.converted and gold_unit and unit and gold_unit.factor != unit.factor:
            value = f"({value})*({unit.factor})/({gold_unit.factor})"
        if text.is_wordy(gold_value) or text.is_wordy(value):
            return text.same_words(gold_value, value)
        if (gold_unit or unit) and (found := self._structures(gold_value, value)) is not None:
            return found
        # 3m against m*3: the letter was no unit.
        return self._values(gold_value, value) or (gold_unit != unit and self._known(gold, prediction))

    def _same_units(self, gold: units.Unit | None, unit: units.Unit | None) -> bool:
        """A missing unit is forgiven."""
        if gold is None or unit is None or gold == unit:
            return True
        if not (units.is_known(gold) or units.is_known(unit)):  # 40 students and 40人 are counted in two languages
            return gold.powers[0][0].isascii() != unit.powers[0][0].isascii()
        return self.converted and gold.powers == unit.powers

    def _structures(self, gold: str, prediction: str) -> bool | None:
        gold, prediction = (structure.POINT_NAME.sub("", side) if "," in side else side for side in (gold, prediction))
        first, second = structure.bracketed(gold), structure.bracketed(prediction)
        sets = [side is not None and side[0] == "\\{" for side in (first, second)]
        if first and second and sets[0] == sets[1] and ("," in first[1] + second[1] or sets[0]):
            left, right = structure.items(first[1], loose=True), structure.items(second[1], loose=True)
            if (first[0], first[2]) != (second[0], second[2]) or len(left) != len(right):
                return False
            if first[0] == "\\{":
                return _matched(left, right, self._single)
            return all(self._single(a, b) for a, b in zip(left, right, strict=True))
        if sets[0] != sets[1]:  # {(1,2)} and (1,2)
            of_set = first if sets[0] else second
            assert of_set is not None
            content = of_set[1]
            if len(structure.items(content, loose=True)) == 1 and "|" not in content and content != "\\emptyset":
                return self._single(*((content, prediction) if sets[0] else (gold, content)))
            return False if first and second else None
        if ("," in gold) != ("," in prediction):  # a column is a vector as (1,2) is
            gold, prediction = map(structure.column_as_tuple, (gold, prediction))
            if "," in gold and "," in prediction:
                return self._structures(gold, prediction)
        matrix, another = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(prediction)
        if matrix and another:  # by their cells; of determinants math-verify knows more
            return (matrix[1] == another[1] == "p" and self._matrices(matrix[2], another[2])) or None
        if ":" in gold or ":" in prediction:
            return self._ratios(gold, prediction)
        empty = [side == "\\emptyset" for side in (gold, prediction)]
        return all(empty) if any(empty) else None

    def _matrices(self, gold: str, prediction: str) -> bool:
        rows, others = ([row.split("&") for row in side.strip(" \\").split("\\\\")] for side in (gold, prediction))
        if [len(row) for row in rows] != [len(row) for row in others]:
            return False
        cells = zip(itertools.chain(*rows), itertools.chain(*others), strict=True)
        return all(self._single(a.strip(), b.strip()) for a, b in cells)

    def _ratios(self, gold: str, prediction: str) -> bool | None:
        (gold, gold_unit), (prediction, unit) = units.split(gold), units.split(prediction)
        if text.is_wordy(gold) or text.is_wordy(prediction):
            return None
        first, second = gold.split(":"), prediction.split(":")
        clocks = [bool(_CLOCK.fullmatch(side.replace(" ", ""))) for side in (gold, prediction)]
        if any(re.fullmatch(r"\s*0\d*\s*", part) for part in first + second) or (gold_unit or unit):
            return all(clocks) and self._same_units(gold_unit, unit) and [*map(int, first)] == [*map(int, second)]
        if len(first) != len(second):
            return len(first) + len(second) == 3 and self._values(gold.replace(":", "/"), prediction.replace(":", "/"))
        pairs = zip(first, second, strict=True)
        return all(self._values(f"({first[0]})*({b})", f"({a})*({second[0]})") for a, b in pairs)

    def _values(self, gold: str, prediction: str) -> bool:
        """Expressions by their values; math-verify for what the grammar does not know."""
        if text.same(gold, prediction):
            return True
        try:
            left, right = expression.values(gold), expression.values(prediction)
        except Unbounded:
            raise
        except Unsupported as reason:
            return "division by zero" not in str(reason) and self.otherwise(gold, prediction)
        if expression.equal(gold, prediction):
            return True
        digits = _DIGITS.fullmatch(prediction) or _DIGITS.fullmatch(gold)
        if not (self.rounded and digits and len(left) == len(right) == 1 and len(digits[1]) > 3):
            return False
        return bool(abs(left[0] - right[0]) <= expression.MP.mpf(f"0.5e-{len(digits[1])}"))


def _precise(relations: list[str]) -> list[str]:
    r"""The sides of x = 1/3 \approx 0.33 without what is only about equal."""
    alone = len(relations) == 3 and not expression.is_constant(relations[0])
    pairs = zip(relations[1::2], relations[2::2], strict=True)
    return [relations[0], *(side for sign, side in pairs if sign == "=" or alone)]


def _is_named(side: str) -> bool:
    r"""Whether this names a quantity, whose value can be given alone: x, AB, f(2), |CD|, \frac{EF}{GH}, m:n; not 2x, x+y."""
    if structure.NAME.fullmatch(side) or (text.is_wordy(side) and _WORDS.fullmatch(side)):
        return True
    bare = _FUNCTION_CALL.sub("A", side)
    unknowns = set(re.findall(r"(?<![\\A-Za-z])[xyz](?![A-Za-z])", bare))
    one_thing = len(unknowns) < 2 or any(mark in bare for mark in (":", ",", "/", "\\frac"))
    return one_thing and bool(_NAMES.fullmatch(bare))


def _same_name(a: str, b: str) -> bool:
    """Also x_1 for x, and f(x) for y."""
    short, long = sorted((re.sub(r"\\(?:vec|overrightarrow)(?![a-z])|[\s{}]", "", side) for side in (a, b)), key=len)
    if short.startswith("y") and re.fullmatch(rf"[a-z]{short[1:]}\(x\)", long):
        return True
    return short == long or (short in "xyztVS" and long.partition("_")[0] == short)


def _same_base(a: re.Match, b: re.Match) -> bool:
    (digits, base), (others, other) = ((m[1].lstrip("0").upper(), m[2] or m[3]) for m in (a, b))
    return digits == others and _NUMERALS.get(base, base) == _NUMERALS.get(other, other)


def _same_geometry(gold: list[str], parts: list[str]) -> bool:
    r"""AB\parallel CD is DC\parallel BA; \triangle ABC\cong\triangle DEF keeps which corner goes with which."""
    left, right = ([re.sub(r"\\[a-z]+|[\s{}]", "", side) for side in sides[::2]] for sides in (gold, parts))
    if gold[1] in ("\\parallel", "\\perp"):
        return sorted("".join(sorted(side)) for side in left) == sorted("".join(sorted(side)) for side in right)
    if len({len(side) for side in left + right}) != 1:
        return False
    corners = set(zip(*left, strict=True))
    return corners in (set(zip(*right, strict=True)), set(zip(*right[::-1], strict=True)))


def _matched(left: list, right: list, same: Callable[..., bool]) -> bool:
    """Whether both hold the same things in any order."""
    rest = list(right)
    for wanted in left:
        found = next((index for index, other in enumerate(rest) if same(wanted, other)), None)
        if found is None:
            return False
        rest.pop(found)
    return not rest
