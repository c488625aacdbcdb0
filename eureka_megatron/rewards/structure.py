r"""How a canonical answer is put together: pieces between separators, numbered parts, brackets, values of unknowns.

"3, -1 or 1\pm\sqrt 2"     items "3", "-1", "1+\sqrt 2", "1-\sqrt 2"
"(1) 30^\circ; (2) 5"      parts "30^\circ", "5"
"p=2,q=7;p=3,q=7"          assignments {p: 2, q: 7}, {p: 3, q: 7}
"""

import itertools
import re

from eureka_megatron.rewards import text

_SEPARATOR = re.compile(r"[,;]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[或和且与及]")
_LOOSE_SEPARATOR = re.compile(r"[;]|,(?!\d{3}(?!\d))|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[或和且与及]")
_PART = re.compile(
    r"(?<![A-Za-z_^])(?<!\\sqrt )(?:(?i:part)\s*|第\s*)?\(\s*(\d|[a-e]|i{1,3}|iv|v|I{1,3}|IV|V)\s*\)(?:小?[问题])?|([\u2460-\u2469])"
    r"|(?<![\w.])([1-9])\.(?!\d)|(?<!\w)([a-e])\)|(?i:part|question)\s*([1-9a-e])\s*[:.]"
)
_ORDERS = ("123456789", "abcde", ("i", "ii", "iii", "iv", "v"), ("I", "II", "III", "IV", "V"), "①②③④⑤⑥⑦⑧⑨")
POINT_NAME = re.compile(r"^(?:\\(?:vec|overrightarrow)\s*)?\{?[A-Za-z]{1,2}\}?'*(?:_\{?\w\}?)?\s*=?\s*(?=[(\[])")
_SET_NAME = re.compile(r"^[^=<>{}]*=\s*(?=\\\{)")
_COLUMN = re.compile(r"\\begin\{pmatrix\}((?:(?!\\begin|&).)*)\\end\{pmatrix\}", re.DOTALL)
_CONDITION = re.compile(r"(?<=[\w)}\]])\s*(\([^()]*(?:<|>|\\leq|\\geq|\\neq)[^()]*\))$")
_OPENING = ("\\{", "(", "[")
_CLOSING = ("\\}", ")", "]")
NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|overrightarrow|vec|odot|widehat)\s*)?\{?\s*(?:[A-Za-z]{1,2}|[A-Z]{3,4}|\\[a-zA-Z]+)'*\s*\}?"
    r"(?:\s*_\s*(?:\{[^{}]*\}|\d+|\w))?(?:\s*\(\s*[A-Za-z\d]{1,2}\s*\))?"
)
RELATION = re.compile(
    r"\\leq|\\geq|\\neq|(?<![\\<>])[<>=]|\\(?:approx|equiv|sim|cong|parallel|perp|in|Rightarrow)(?![a-zA-Z])"
)


def split(text: str, separator: re.Pattern[str], *, keep: bool = False) -> list[str]:
    """The pieces between separators outside of brackets, of any kind for "(0,1]" is one; keep: separators as well."""
    pieces: list[str] = []
    depth = start = position = 0
    while position < len(text):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        match = separator.match(text, position) if depth == 0 else None
        if match and match.end() > position:
            pieces += [text[start:position].strip(), match[0]] if keep else [text[start:position].strip()]
            position = start = match.end()
        else:
            position += 1
    return [*pieces, text[start:].strip()]


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, content, closing) when one pair of brackets, of either kind, encloses the whole text."""
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


def items(answer: str, *, loose: bool = False) -> list[str]:
    r"""Items between commas, semicolons, "and", "or" outside of brackets; 1,234 is one number; a \pm b is two items.

    loose: 1,234 may be two numbers, for it stands in brackets.
    """
    inner = bracketed(answer)
    if inner and inner[0] == "(" and " and " in inner[1] and RELATION.search(inner[1]):
        answer = inner[1]  # a system of equations
    answer = _CONDITION.sub(r", \1", answer)
    pieces = [piece for piece in split(answer, _SEPARATOR if loose else _LOOSE_SEPARATOR) if piece]
    if not loose and any(re.search(r"(?<!\d)(?:\d{4,}|0),\d{3}(?!\d)", piece) for piece in pieces):
        pieces = [piece for piece in split(answer, _SEPARATOR) if piece]
    return list(itertools.chain.from_iterable(_signed(piece) for piece in pieces)) or [answer]


def _signed(item: str) -> list[str]:
    if ("\\pm" not in item and "\\mp" not in item) or item.count("\\pm") + item.count("\\mp") > 3:
        return [item]
    upper, lower = (item.replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+"))
    return [re.sub(r"(^|[=(,])\s*\+\s*", r"\1", upper), lower]


def parts(answer: str) -> list[str]:
    """The contents of (1) … (2) …, a) … b) …, ① … ② … when the text is so numbered from its start; otherwise nothing."""
    for style, order in itertools.product(range(1, _PART.groups + 1), _ORDERS):
        marks: list[re.Match[str]] = []
        for mark in _PART.finditer(answer):
            if mark.lastindex == style and len(marks) < len(order) and mark[style] == order[len(marks)]:
                marks.append(mark)
        if len(marks) < 2 or marks[0].start():
            continue
        ends = [*(mark.start() for mark in marks[1:]), len(answer)]
        pieces = [answer[mark.end() : end].strip(" ,;.:") for mark, end in zip(marks, ends, strict=True)]
        return [re.sub(r"(?:,|;|\band\b)\s*$", "", piece).strip() for piece in pieces] if all(pieces) else []
    return []


def opened(values: list[str]) -> list[str]:
    r"""\{1,2\} as 1, 2: the braces of a set may be missing."""
    inner = bracketed(_SET_NAME.sub("", values[0])) if len(values) == 1 else None
    return items(inner[1]) if inner and inner[0] == "\\{" and "|" not in inner[1] else values


def column_as_tuple(answer: str) -> str:
    r"""\begin{pmatrix}1\\2\end{pmatrix} as (1,2); anything else as it is."""
    column = _COLUMN.fullmatch(answer)
    cells = column[1].strip(" \\").split("\\\\") if column else []
    return f"({','.join(cell.strip() for cell in cells)})" if column else answer


def elements(item: str) -> list[str]:
    inner = bracketed(POINT_NAME.sub("", item))
    return items(inner[1], loose=True) if inner and inner[0] + inner[2] == "()" else [item]


def assignments(pieces: list[str], counting: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Values by unknown, a new solution where an unknown comes again; empty when an item assigns nothing.

    Subscripts that only count (m_1=11, m_2=3) say nothing; those of a_1=2, a_5=10 do.

    x=1, y=2 and x_1=1, y_1=2, x_2=3, y_2=4 and (a,b)=(2,9) and x=1, x=3 (two solutions)
    """
    found: list[dict[str, str]] = [{}]
    names: list[str] = []
    if counting is None:
        subscripts = sorted(set(re.findall(r"_\s*\{?\s*(\d)(?!\d)", " ".join(pieces))))
        counts = len(subscripts) > 1 and subscripts == list("123456789"[: len(subscripts)])
        counting = ("", *subscripts) if counts else ("",)
    for piece in pieces:
        inner = bracketed(piece)
        if inner and inner[0] == "(" and "=" in inner[1]:
            inside = assignments(items(inner[1]), counting)
            if not inside:
                return []
            found += inside
            continue
        sides = split(piece, RELATION, keep=True)
        if not (len(sides) == 1 and names) and (len(sides) != 3 or sides[1] != "="):
            return []
        names, values = elements(sides[0]) if len(sides) == 3 else names, elements(sides[-1])  # x=1 or 2
        if len(names) != len(values) or (len(names) == 1 and sides[-1] != values[0]):
            names, values = [sides[0]], [sides[-1]]
        for name, value in zip(names, values, strict=True):
            if not NAME.fullmatch(name) or text.is_wordy(name):
                return []
            root, _, subscript = re.sub(r"[\s{}]", "", name).partition("_")
            key = root if subscript in counting else f"{root}_{subscript}"
            if key in found[-1]:
                found.append({})
            found[-1][key] = value
    return [solution for solution in found if solution]
