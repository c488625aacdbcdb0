"""Do two answers say the same? Text, options, quantities, lists, equations, inequalities, intervals, expressions.

The order is: equal text; units (may be missing, must not differ); words by text alone; structure (lists, equations,
intervals …) down to expressions, which `expression` evaluates exactly. Only what that grammar does not know goes to
math-verify, in both argument orders, and only when it is short and holds nothing that can blow up.

Left out: conversion of units and rounding ("0.33" for 1/3), which a fair examiner may debate; here they do not count.
"""

import contextlib
import functools
import itertools
import logging
import re

import mpmath

from eureka_megatron.rewards import choice, expression, extract, intervals, units
from eureka_megatron.rewards.arithmetic import Unbounded, Unsupported

_GENOTYPE = re.compile(r"(?:([A-Za-z])(?i:\1))+")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_CHEMICAL = re.compile(r"(?:\d*(?:[A-Z][a-z]?|[()])(?:_\{?\d{1,3}\}?|\d{1,3})?){1,20}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]*\}|\\[a-zA-Z]+")
_MATRIX = re.compile(r"\\begin\{(p|v|V)matrix\}((?:(?!\\begin).)*)\\end\{\1matrix\}", re.DOTALL)
_NAMED = re.compile(
    r"\\(?:angle|triangle|overline|overrightarrow|vec|odot|widehat|parallelogram|square)\s*\{?\s*[A-Za-z]+'?"
)
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|[A-Za-z0-9])")
_AND_OR = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])|或|和|且")
_WORDS_ONLY = re.compile(r"[A-Za-z\s\u4e00-\u9fff]+")
_RUN = re.compile(r"[A-Za-z]{2,}")
# Runs of three and more letters are words, unless they are a product of usual variables.
_PRODUCTS = tuple(frozenset(group) for group in ("abc", "xyz", "pqr", "mnk", "ijk"))
_SHORT_WORDS = {"no", "up", "on", "is", "it", "to", "of", "we", "he"}
_TOGETHER = re.compile(r"(?<![A-Za-z])and(?![A-Za-z])|且")
_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[或和且]")
_CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RELATION = re.compile(r"\\leq|\\geq|\\neq|(?<![\\<>])[<>=]|\\(?:approx|equiv|sim|cong)(?![a-zA-Z])")
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|overrightarrow|vec|odot|widehat)\s*)?\{?\s*(?:[A-Za-z]{1,2}|\\[a-zA-Z]+)'*\s*\}?"
    r"(?:\s*_\s*(?:\{[^{}]*\}|\w))?(?:\s*\(\s*[A-Za-z]\s*\))?"
)
_POINT_NAME = re.compile(r"^(?:\\vec\s*)?[A-Z]'*(?:_\{?\d\}?)?\s*(?=[(\[])")
_HEAVY = re.compile(r"\\(?:sum|prod|int|iint|lim|oint|det)(?![a-zA-Z])")
_DANGER = re.compile(
    r"\^\s*\{?\s*\(?\s*-?\s*[\d.]{4,}"  # exponents of four digits
    r"|\^[^^]{0,40}\^[^^]{0,40}\^|\*\*[^*]{0,40}\*\*"  # towers
    r"|\^\s*\{[^{}]{0,20}\^"
    r"|\d{3,}\s*!|!\s*!|\d{100,}"
    r"|[-+*/^_=|!,(\[{~]{9,}|(?:\\[a-zA-Z]+\s*){8,}|[^\x20-\x7e]"  # piles of signs; anything but printable ASCII
    r"|\\(?:input|include|write|read|def|let|csname|usepackage)"
)
_MATH_VERIFY_CHARACTERS = 300
_MATH_VERIFY_NESTING = 8  # its parser is exponential in nested brackets
_ANSWER_CHARACTERS = 20_000  # whoever writes more between the answer tags gives no answer


def matches(answer: object, span: str) -> bool:
    """Whether the text between the answer tags gives the gold answer."""
    if len(span) > _ANSWER_CHARACTERS:
        return False
    gold = extract.gold(answer)
    if not gold or len(gold) > _MATH_VERIFY_CHARACTERS * 4:
        return False
    options = choice.gold_letters(gold)
    if options is not None:
        if choice.letters(span) == options:
            return True
        if len(options) == 1:
            (letter,) = options
            said = () if choice.denies(span) else extract.candidates(span)
            return any(candidate == gold or candidate.upper() == letter for candidate in said)
    return any(equal(gold, candidate) for candidate in extract.candidates(span))


@functools.lru_cache(maxsize=8192)
def equal(gold: str, prediction: str) -> bool:
    """Whether two canonical answers are equal."""
    if same_text(gold, prediction):
        return True
    if len(prediction) > 4 * _MATH_VERIFY_CHARACTERS:
        return False
    try:
        return _equal_quantities(gold, prediction)
    except Unbounded:
        return False
    except Unsupported:
        return _math_verify(gold, prediction)


def same_text(gold: str, prediction: str) -> bool:
    """Equal up to blanks, and for words up to letter case; a genotype or formula keeps its case."""
    left, right = _SPACE.sub("", gold), _SPACE.sub("", prediction)
    if left == right:
        return bool(left)
    if _CHEMICAL.fullmatch(left) and _CHEMICAL.fullmatch(right) and "_" in left + right:
        return re.sub(r"[_{}]", "", left) == re.sub(r"[_{}]", "", right)  # H_2O and H2O
    if left.casefold() != right.casefold() or not is_wordy(gold):
        return False
    return all(_natural_case(word) for word in itertools.chain(gold.split(), prediction.split()))


def _natural_case(word: str) -> bool:
    letters = re.sub(r"[^A-Za-z]", "", word)
    if len(letters) > 1 and _GENOTYPE.fullmatch(letters):
        return False
    return letters.islower() or letters.isupper() or letters.istitle() or not letters


def is_wordy(text: str) -> bool:
    """Whether the answer is (partly) a word, to be compared as text: never a product of letters (AAS is not ASA)."""
    if _CJK.search(_AND_OR.sub(" ", text)):
        return True
    text = _COMMAND.sub(" ", _NAMED.sub(" ", _SUBSCRIPT.sub(" ", text)))
    for run in _RUN.findall(_AND_OR.sub(" ", text)):
        if run.casefold() in _SHORT_WORDS:
            return True
        if len(run) >= 3 and not any(frozenset(run) <= product for product in _PRODUCTS):
            return True
    return False


def _equal_quantities(gold: str, prediction: str) -> bool:
    (gold_value, gold_unit), (value, unit) = (_percent(*units.split(text)) for text in (gold, prediction))
    if gold_unit is not None and unit is not None and gold_unit != unit:
        return False
    if gold_unit is not None or unit is not None:
        if same_text(gold_value, value):
            return True
        if is_wordy(gold_value) or is_wordy(value):
            return False
    elif is_wordy(gold_value) or is_wordy(value):
        return _equal_words(gold_value, value)
    if _equal_lists(gold_value, value):
        return True
    if (gold_unit is None) != (unit is None):  # 3m against m*3: the letter was no unit
        with contextlib.suppress(Unsupported):
            if expression.equal(gold, prediction):
                return True
    # A missing percent sign is a missing unit; the other way round it would be another value.
    return gold_value.endswith("%") and "%" not in value and unit is None and _equal_lists(gold_value[:-1], value)


def _percent(value: str, unit: str | None) -> tuple[str, str | None]:
    return (f"{value}%", None) if unit == "%" else (value, unit)


def _equal_words(gold: str, prediction: str) -> bool:
    """Words: text without articles and markup, or the right side of "Area = 12"."""
    if _bare_words(gold) == _bare_words(prediction) and same_text(_bare_words(gold), _bare_words(prediction)):
        return True
    for named, other in ((prediction, gold), (gold, prediction)):
        name, sign, value = named.partition("=")
        if sign and "=" not in other and _WORDS_ONLY.fullmatch(name) and not is_wordy(other):
            return equal(other, value.strip()) if named is prediction else equal(value.strip(), other)
    return same_text(_bare_words(gold), _bare_words(prediction))


def _bare_words(text: str) -> str:
    text = re.sub(r"[{}\\_$\"',;.!?()-]", " ", text)
    text = re.sub(r"^(?:an?|the)\s+(?=[A-Za-z]{2})", "", " ".join(text.split()), flags=re.IGNORECASE)
    return text


# --- structure ---


def _equal_lists(gold: str, prediction: str) -> bool:
    gold_items, items = split_list(gold), split_list(prediction)
    if len(gold_items) != len(items):  # the braces of a set may be missing
        gold_items, items = _opened_set(gold_items), _opened_set(items)
    region = intervals.region(gold_items, together=bool(_TOGETHER.search(gold)))
    other = intervals.region(items, together=bool(_TOGETHER.search(prediction)))
    if region is not None and other is not None:
        return intervals.same(region, other)
    if len(gold_items) == len(items) == 1:
        return _equal_single(gold_items[0], items[0])
    gold_items, items = _without_common_name(gold_items), _without_common_name(items)
    gold_items, items = _opened_tuple(gold_items, items), _opened_tuple(items, gold_items)
    if len(gold_items) != len(items):
        return False
    for named, bare in ((gold_items, items), (items, gold_items)):
        # Values of different unknowns against bare values: "x=1, y=2" is 1, 2 in this order.
        if all("=" in item for item in named) and not any(sign in item for item in bare for sign in "=<>"):
            values = [item.partition("=")[2].strip() for item in named]
            pairs = zip(values, bare, strict=True) if named is gold_items else zip(bare, values, strict=True)
            return all(_equal_single(*pair) for pair in pairs)
    left = list(items)
    for item in gold_items:
        found = next((other for other in left if same_text(item, other) or _equal_single(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def split_list(text: str) -> list[str]:
    """Items between top-level commas, semicolons, "and", "or"; 1,234 is one number; a \\pm b is two items."""
    if _THOUSANDS.fullmatch(text):
        return [text]
    items: list[str] = []
    depth = start = position = 0
    while position < len(text):
        character = text[position]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0:
            match = _SEPARATOR.match(text, position)
            if match:
                items.append(text[start:position])
                position = start = match.end()
                continue
        position += 1
    items.append(text[start:])
    # A list in plain braces or "x1 = 1, x2 = 2" stays as it is; only empty pieces (", and") go.
    items = [item.strip() for item in items if item.strip()]
    return list(itertools.chain.from_iterable(_plus_minus(item) for item in items)) or [text]


def _plus_minus(item: str) -> list[str]:
    if "\\pm" not in item and "\\mp" not in item:
        return [item]
    if item.count("\\pm") + item.count("\\mp") > 3 or any(item.startswith(bracket) for bracket in "([{"):
        raise Unsupported("plus-minus in a structure")
    upper = item.replace("\\pm", "+").replace("\\mp", "-")
    lower = item.replace("\\pm", "-").replace("\\mp", "+")
    return [re.sub(r"=\s*\+", "=", upper).lstrip("+ "), lower]


def _without_common_name(items: list[str]) -> list[str]:
    """x = 1, x = 2 (also x_1 = 1, x_2 = 2) as 1, 2; different names stay."""
    names, values = [], []
    for item in items:
        name, equals, value = item.partition("=")
        if equals and _NAME.fullmatch(name.strip()):
            names.append(_SUBSCRIPT.sub("", name).replace(" ", ""))
            values.append(value.strip())
        else:
            values.append(item)
    if len(set(names)) > 1 or (names and len(items) == 1):
        return items
    return values


def _opened_set(items: list[str]) -> list[str]:
    inner = intervals.bracketed(items[0]) if len(items) == 1 else None
    return split_list(inner[1]) if inner and inner[0] == "\\{" and "|" not in inner[1] else items


def _opened_tuple(items: list[str], other: list[str]) -> list[str]:
    """(1, 2) as its elements when the other side gives them one by one with their names (x = 1, y = 2)."""
    if len(items) == 1 and len(other) > 1 and (inner := intervals.bracketed(items[0])) and inner[0] + inner[2] == "()":
        names = [item.partition("=") for item in other]
        elements = split_list(inner[1])
        if len(elements) == len(other) and all(name[1] for name in names):
            return [f"{name[0]}={element}" for name, element in zip(names, elements, strict=True)]
    return items


def _equal_single(gold: str, prediction: str) -> bool:
    gold_parts, parts = _relations(gold), _relations(prediction)
    if len(gold_parts) == 1 and len(parts) == 1:
        return _equal_values(gold, prediction)
    signs = set(gold_parts[1::2]) | set(parts[1::2])
    if signs <= {"=", "\\approx"}:
        return _equal_equations(gold_parts[::2], parts[::2])
    return _equal_inequalities(gold_parts, parts)


def _relations(text: str) -> list[str]:
    """Sides and signs in turn: "a<b" gives ["a", "<", "b"]; signs inside brackets do not count."""
    parts: list[str] = []
    start = depth = position = 0
    while position < len(text):
        character = text[position]
        depth += (character in "([{") - (character in ")]}")
        match = _RELATION.match(text, position) if depth == 0 else None
        if match:
            parts += [text[start:position].strip(), match[0]]
            position = start = match.end()
        else:
            position += 1
    return [*parts, text[start:].strip()]


def _equal_equations(gold: list[str], sides: list[str]) -> bool:
    if len(sides) > 1 and len(gold) == 1:
        constants = [side for side in sides if _is_number(side)]
        if len(constants) > 1 and not all(expression.equal(side, constants[0]) for side in constants):
            return False  # 2*3 = 5 states something false
        return _equal_values(gold[0], sides[-1]) or (not _is_named(sides[0]) and _equal_values(gold[0], sides[0]))
    if len(gold) > 1 and len(sides) == 1:
        return (_is_named(gold[0]) or _is_number(gold[0])) and _equal_values(gold[-1], sides[0])
    first, last = (gold[0], gold[-1]), (sides[0], sides[-1])
    if all(_is_named(side) for side in (gold[0], sides[0])) and _plain(gold[0]) == _plain(sides[0]):
        return _equal_values(gold[-1], sides[-1])
    if first == last or first == last[::-1]:
        return True
    return expression.proportion(f"({first[0]})-({first[1]})", f"({last[0]})-({last[1]})") is not None


def _is_named(side: str) -> bool:
    return bool(_NAME.fullmatch(side)) or is_wordy(side)


def _is_number(side: str) -> bool:
    try:
        return expression.is_constant(side)
    except Unsupported:
        return False


def _plain(text: str) -> str:
    return re.sub(r"[\s{}]", "", text)


_FLIP = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}


def _equal_inequalities(gold: list[str], parts: list[str]) -> bool:
    if len(gold) != len(parts):
        return False
    for candidate in (parts, [_FLIP.get(part, part) for part in reversed(parts)]):
        same_signs = candidate[1::2] == gold[1::2]
        if same_signs and all(_equal_values(a, b) for a, b in zip(gold[::2], candidate[::2], strict=True)):
            return True
    if len(gold) == 3:  # 2x > 6 is x > 3: the same up to a factor, whose sign may turn the relation
        factor = expression.proportion(*(f"({side[0]})-({side[2]})" for side in (gold, parts)))
        if factor is not None and not isinstance(factor, mpmath.mpc):
            return gold[1] == (parts[1] if factor > 0 else _FLIP.get(parts[1], parts[1]))
    raise Unsupported("inequalities that differ in form")


def _equal_values(gold: str, prediction: str) -> bool:
    if same_text(gold, prediction):
        return True
    gold, prediction = (_POINT_NAME.sub("", text) if "," in text else text for text in (gold, prediction))
    first, second = intervals.bracketed(gold), intervals.bracketed(prediction)
    if first and second and ("," in first[1] or "," in second[1] or first[0] == "\\{" or second[0] == "\\{"):
        return _equal_brackets(first, second)
    matrix, other_matrix = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(prediction)
    if matrix and other_matrix and matrix[1] == other_matrix[1] == "p":
        return _equal_matrices(matrix[2], other_matrix[2])
    if first and first[0] == "\\{" and second is None:  # {1, 2} against 1, 2 never arrives here; {3} against 3 does
        return _equal_values(first[1], prediction)
    (gold_value, gold_unit), (value, unit) = (_percent(*units.split(text)) for text in (gold, prediction))
    if gold_unit is not None or unit is not None:
        return (gold_unit is None or unit is None or gold_unit == unit) and expression.equal(gold_value, value)
    if ":" in gold or ":" in prediction:
        return _equal_ratios(gold, prediction)
    if _emptiness(gold) or _emptiness(prediction):
        return _emptiness(gold) and _emptiness(prediction)
    return expression.equal(gold, prediction)


def _emptiness(text: str) -> bool:
    return text.strip() == "\\emptyset"


def _equal_ratios(gold: str, prediction: str) -> bool:
    first, second = gold.split(":"), prediction.split(":")
    if len(first) != len(second):
        return len(first) + len(second) == 3 and expression.equal(gold.replace(":", "/"), prediction.replace(":", "/"))
    return all(
        expression.equal(f"({first[0]})*({b})", f"({a})*({second[0]})") for a, b in zip(first, second, strict=True)
    )


def _equal_matrices(gold: str, prediction: str) -> bool:
    rows, others = ([row.split("&") for row in text.strip(" \\").split("\\\\")] for text in (gold, prediction))
    if [len(row) for row in rows] != [len(row) for row in others]:
        return False
    cells = zip(itertools.chain(*rows), itertools.chain(*others), strict=True)
    return all(_equal_values(a.strip(), b.strip()) for a, b in cells)


def _equal_brackets(first: tuple[str, str, str], second: tuple[str, str, str]) -> bool:
    gold_items, items = split_list(first[1]), split_list(second[1])
    if (first[0], first[2]) != (second[0], second[2]) or len(gold_items) != len(items):
        return False
    if first[0] == "\\{":  # a set: any order
        left = list(items)
        for item in gold_items:
            found = next((other for other in left if _equal_single(item, other)), None)
            if found is None:
                return False
            left.remove(found)
        return True
    return all(_equal_single(a, b) for a, b in zip(gold_items, items, strict=True))


# --- math-verify ---


def _math_verify(gold: str, prediction: str) -> bool:
    """math-verify in both argument orders, for what the grammar above does not know."""
    if any(len(text) > _MATH_VERIFY_CHARACTERS or _DANGER.search(text) for text in (gold, prediction)):
        return False
    if not (_is_sound(gold) and _is_sound(prediction)):
        return False
    if set(_HEAVY.findall(prediction)) - set(_HEAVY.findall(gold)) or is_wordy(gold) or is_wordy(prediction):
        return False
    verify, parsed_gold, parsed = _verify_function(), parse_latex(gold), parse_latex(prediction)
    if not parsed_gold or not parsed:
        return False
    return any(
        verify(*pair, timeout_seconds=None, allow_set_relation_comp=True)
        for pair in ((parsed_gold, parsed), (parsed, parsed_gold))
    )


def _is_sound(text: str) -> bool:
    """Whether brackets balance (of any kind: (0, 1] is an interval) and nest no deeper than the parser can take."""
    braces = brackets = deepest = 0
    for character in text:
        braces += (character == "{") - (character == "}")
        brackets += (character in "([") - (character in ")]")
        deepest = max(deepest, braces + brackets)
    return braces == 0 and brackets == 0 and deepest <= _MATH_VERIFY_NESTING


@functools.cache
def _verify_function():
    from math_verify import verify  # imports sympy: half a second that workers spend while they start

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return verify


@functools.lru_cache(maxsize=512)
def parse_latex(text: str) -> list:
    """What math-verify reads in a formula; empty when nothing. Without its SIGALRM limit: judges have their own."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if "$" in text or not text.strip():
        return []
    found = parse(
        f"${text}$", extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    return found


def parseable_gold(answer: object) -> bool:
    """Whether the data loader may keep this label: an option, words, a formula that can be compared.

    Refused: nothing at all, only punctuation or brackets, undefined values such as 1/0, unbalanced braces, a list.
    """
    if isinstance(answer, dict | set) or answer is None or (isinstance(answer, list | tuple) and len(answer) != 1):
        return False
    text = extract.gold(answer)
    if not text or len(text) > _MATH_VERIFY_CHARACTERS * 4 or not re.search(r"[^\W_]|\\[a-zA-Z]", text):
        return False
    if choice.gold_letters(text) is not None:
        return True
    balanced = text.replace("\\{", "").replace("\\}", "")
    if balanced.count("{") != balanced.count("}"):
        return False
    try:
        expression.values(units.split(text)[0])
    except Unsupported as reason:
        return "division by zero" not in str(reason)
    return True
