r"""One spelling for what means the same: Unicode signs, full-width forms, LaTeX variants, systems, thousands.

`canonical` gives ASCII where possible, LaTeX commands for signs, \text{} unwrapped, one blank between words. Everything
here is linear in the length of the text: positions and simple patterns, nothing that can backtrack far.

    "（１，２）" → "(1,2)"    "18\text{ cm²}" → "18 cm^{2}"    "10,\!080" → "10,080"    "√23" → "\sqrt 23"
    "\begin{cases}x=1\\y=2\end{cases}" → "(x=1 and y=2)"       "AB∥CD", "AB//CD" → "AB\parallel CD"
"""

import functools
import re
import unicodedata
from collections.abc import Callable

_COMMANDS = {
    "times": "×✕", "cdot": "·⋅∙", "pm": "±", "mp": "∓", "infty": "∞", "leq": "≤⩽≦", "geq": "≥⩾≧", "neq": "≠",
    "cup": "∪⋃", "cap": "∩", "emptyset": "∅Ø", "in": "∈", "sqrt": "√", "angle": "∠", "triangle": "△▲", "perp": "⊥⟂",
    "parallel": "∥∥‖", "cong": "≌≅", "sim": "∽∼", "approx": "≈≒", "Rightarrow": "⇒", "odot": "⊙",
    "Gamma": "Γ", "Delta": "Δ∆", "Theta": "Θ", "Lambda": "Λ", "Sigma": "Σ", "Phi": "Φ", "Psi": "Ψ", "Omega": "ΩΩ",
}  # fmt: skip
_SIGNS = str.maketrans(
    {sign: f"\\{name} " for name, signs in _COMMANDS.items() for sign in signs}
    | {chr(code): f"\\{unicodedata.name(chr(code)).split()[-1].lower().replace('lamda', 'lambda')} " for code in range(0x3B1, 0x3CA)}
    | {chr(code): f"\\mathrm{{{unicodedata.normalize('NFKC', chr(code)).replace('2', '^2').replace('3', '^3')}}}" for code in range(0x3371, 0x33E0)}
    | dict.fromkeys("−–—‐‑‒", "-") | dict.fromkeys("÷∕", "/") | dict.fromkeys("\u200b\u200c\u200d\ufeff\x00", "")
    | dict.fromkeys("°º˚", "^\\circ ") | dict.fromkeys("“”„", '"') | dict.fromkeys("‘’′", "'")
    | {"∛": "\\sqrt[3]", "↑": "", "↓": "", "→": "\\rightarrow ", "∶": ":", "℃": "^\\circ C", "℉": "^\\circ F", "、": ",", "。": ".", "【": "[", "】": "]", "″": "''", "ℝ": "\\mathbb{R}"}
)  # fmt: skip
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_SCRIPTS = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-n" * 2)
_SCRIPT = re.compile(f"([{_SUPERSCRIPTS}]+)|[{_SUBSCRIPTS}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_COMPATIBLE = re.compile(r"[^\x00-\x7f\u2460-\u24ff]+")  # circled numbers and letters stay

_SUFFIX = r"(?![a-zA-Z])"
_LINE_BREAK = re.compile(r"\\\\\s*(?=[a-z]\s*=)")  # x=3\\y=-2
_ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z]{2})")  # \\le outside of a system is \le
_Rules = list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]
# Spellings with a backslash, in the order applied.
_LATEX: _Rules = [
    (re.compile(r"~(?=\s*\\triangle)"), r"\\sim "),
    (re.compile(r",\s*\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3}(?!\d))|(?<=\d)(?:\\[,;: ]|\\!|~)+(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), "."),  # 3{,}14 and no thousands: a decimal comma
    (re.compile(rf"\\(?:left|right|middle|[bB]ig{{1,2}}[lrm]?|displaystyle|textstyle|limits|nolimits|rm|bf|it|bold|boldsymbol|mathbf|mathit|mathsf|pmb|hfill|hline|therefore|because|uparrow|downarrow){_SUFFIX}"), " "),
    (re.compile(rf"(?<!\\)\\(?:[,;:!> ]|quad{_SUFFIX}|qquad{_SUFFIX})|~|\\[hv]space\{{[^{{}}]*\}}|\\phantom\{{[^{{}}]*\}}"), " "),
    (re.compile(rf"\\[dtc]frac{_SUFFIX}"), r"\\frac"),
    (re.compile(rf"\\overrightarrow{_SUFFIX}"), r"\\vec"),
    (re.compile(r"\\x(?:longequal|rightarrow)\s*(?:\[[^\]]*\])?\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"), "="),
    (re.compile(rf"\\[dt]binom{_SUFFIX}"), r"\\binom"),
    (re.compile(rf"\\(?:le|leqslant|leqq){_SUFFIX}"), r"\\leq "),
    (re.compile(rf"\\(?:ge|geqslant|geqq){_SUFFIX}"), r"\\geq "),
    (re.compile(rf"\\ne{_SUFFIX}|\\not\s*="), r"\\neq "),
    (re.compile(rf"\\lt{_SUFFIX}"), "<"),
    (re.compile(rf"\\gt{_SUFFIX}"), ">"),
    (re.compile(rf"\\(?:varnothing|O){_SUFFIX}|\\\{{\s*\\\}}"), r"\\emptyset "),
    (re.compile(rf"\\(?:mid|vert|lvert|rvert){_SUFFIX}"), "|"),
    (re.compile(rf"\\(?:lbrace|rbrace){_SUFFIX}"), lambda match: "\\{" if "l" in match[0] else "\\}"),
    (re.compile(rf"\\langle{_SUFFIX}|⟨"), "("),
    (re.compile(rf"\\rangle{_SUFFIX}|⟩"), ")"),
    (re.compile(rf"\\colon{_SUFFIX}"), ":"),
    (re.compile(rf"\\land{_SUFFIX}|\\wedge{_SUFFIX}"), " and "),
    (re.compile(rf"\\lor{_SUFFIX}|\\vee{_SUFFIX}"), " or "),
    (re.compile(rf"\\(?:backsim|thicksim){_SUFFIX}"), r"\\sim "),
    (re.compile(rf"\\bot{_SUFFIX}"), r"\\perp "),
    (re.compile(rf"\\(?:bigtriangleup|vartriangle){_SUFFIX}|\\Delta(?=\s*[A-Z]{{3}})"), r"\\triangle "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?"), lambda m: f"\\overline{{{m[1]}{m[2] or ''}{m[3] or ''}}}"),  # 0.\dot{3}
    (re.compile(r"\^\s*\{?\s*(?:\\prime\s*)+\}?"), lambda m: "'" * m[0].count("prime")),
    (re.compile(r"\\overset\{[^{}]*\}|\\(?:label|tag)\{[^{}]*\}"), " "),
    (re.compile(rf"\^\s*\{{\s*\\circ\s*\}}|\\degree{_SUFFIX}|\{{\s*\^\s*\\circ\s*\}}"), r"^\\circ "),
    (re.compile(r"\\mathrm\s*\{\s*([a-zA-Z])\s*\}(?!\s*\^)|\\(?:mathbb|mathcal)\s*([RZNQC])"), lambda m: f" {m[1]} " if m[1] else f"\\mathbb{{{m[2]}}}"),
]  # fmt: skip
_TEXT = re.compile(
    r"\\(?:text(?:normal|rm|bf|it|sf|tt)?|mathrm|mbox|hbox|operatorname\*?|ce)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_LINE = r"(?<![A-Za-z\\\\])(?:[A-Z]{2,4}|[a-z](?:_\{?\d\}?)?)(?![A-Za-z])"
_RELATIONS = {"平行": "parallel", "垂直": "perp", "相似": "sim", "全等": "cong", "similar": "sim", "congruent": "cong"}
_POWERS = {"thousand": 3, "万": 4, "million": 6, "亿": 8, "billion": 9}
# Spellings without one.
_PLAIN: _Rules = [
    (re.compile(r"(?<=\d)\s*\n\s*(?=\d)"), ", "),
    (re.compile(r"\.{3,}"), r"\\ldots "),
    (re.compile(r"(?<![\\\w^}])\{(\s*[a-zA-Z]\s*(?:\\in[^{}|]*)?[|:][^{}]*)\}"), r"\\{\1\\}"),
    (re.compile(r"<=|=<"), r"\\leq "),
    (re.compile(r">="), r"\\geq "),
    (re.compile(r"(?<![\d)])!="), r"\\neq "),
    (re.compile(r"(?<![A-Za-z])per cent(?![A-Za-z])"), "percent"),
    (re.compile(r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|ln|log|lg|exp|pi|arcsin|arccos|arctan)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?:the )?empty set|空集"), r"\\emptyset "),
    (re.compile(rf"({_LINE})\s*(?://|\\?\|\||\\\|| is (?:parallel|perpendicular) to |平行于|垂直于)\s*(?={_LINE})"), lambda m: f"{m[1]}\\{'perp' if 'perp' in m[0] or '垂' in m[0] else 'parallel'} "),
    (re.compile(rf"((?:\\triangle\s*)?{_LINE})\s*[与和]\s*((?:\\triangle\s*)?{_LINE})\s*(?:互相)?(平行|垂直|相似|全等)"), lambda m: f"{m[1]}\\{_RELATIONS[m[3]]} {m[2]}"),
    (re.compile(r"^(\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)$"), r"\1:\2"),
    (re.compile(r"(?<=\d)\s*比\s*(?=\d)"), ":"),
    (re.compile(r"负(?=\d|\\)"), "-"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"(?<![A-Za-z0-9\\])([xy])([12])(?![\w.])|(?<![A-Za-z\\])([a-z])([12])(?=\s*[=<>])"), lambda m: f"{m[1] or m[3]}_{m[2] or m[4]}"),
    # n and k count periods alike; the n of n\pi r^2/360 counts degrees.
    (re.compile(r"(?<![A-Za-z\\])n(?=\s*\\pi.*(?<![A-Za-z])n\s*\\in\s*(?:\\mathbb)?\s*\{?\s*Z)"), "k"),
    (re.compile(r"([一二三四五六七八九十]{1,2})分之([一二三四五六七八九十]{1,2})"), lambda m: f"\\frac{{{_count(m[2])}}}{{{_count(m[1])}}}"),
    (re.compile(r"(\d+)\s*(?:小时|hours?|hrs?|h)\s*(?:and\s*)?(\d+)\s*(?:分钟?|minutes?|mins?|min)(?![a-z])"), r"(\1*60+\2) min"),
    (re.compile(r"(?<!\\)[Tt]riangle\s+(?=[A-Z]{3})"), r"\\triangle "),
    (re.compile(r"(?<=[A-Z]{3}) is (congruent|similar) to (?:the )?"), lambda m: f"\\{_RELATIONS[m[1]]} "),
    (re.compile(r"百分之([一二三四五六七八九十]{1,3})"), lambda m: f"{_count(m[1])}%"),
    (re.compile(r"百分之(\d+(?:\.\d+)?)"), r"\1%"),
    (re.compile(r"(?<=\d)\s*([mcdk]?m)([23])(?!\w)"), r" \1^\2"),  # 12cm2
    (re.compile(r"(?<=\d)又(?=\d|\\frac)"), " "),
    (re.compile(r"每([\u4e00-\u9fff]{1,2})(\d+(?:\.\d+)?)\s*([\u4e00-\u9fff]{1,3})"), r"\2\3/\1"),
    (re.compile(r"(?<=\d)\s*(万|亿|thousand|million|billion)(?![a-z])"), lambda m: f"\\times 10^{{{_POWERS[m[1]]}}} "),
    (re.compile(r"(?<=[\d}])\s*\^?\s*\{?\s*(?<=[\d\s{^}])(?:st|nd|rd|th)(?![a-zA-Z])\s*\}?"), " "),  # 12^{th}, 3rd
    (re.compile(r"(\d+)\s*(?:\^\s*\\circ\s*|度)(\d+)\s*(?:'|分)(?:\s*(\d+)\s*(?:''|秒))?"), lambda m: f"({m[1]}+{m[2]}/60+{m[3] or 0}/3600)^\\circ "),
    (re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d,.])"), lambda m: m[1].replace(".", "") + "." + m[2]),  # 1.234,56
    (re.compile(r"(?<![\d.,(\[{])(\d+),(0\d|0\d{3,})(?![\d,.])"), r"\1.\2"),  # 3,07 can be no list
    (re.compile(r"[,;]?\s*\(?\s*(?<![A-Za-z])([kn])\s*\\in\s*(?:\\mathbb)?\s*\{?\s*[ZN]\s*\}?\s*(?:[_^]?\s*\{?\s*[*+]\s*\}?)?\s*\)?"), " "),
    (re.compile(r"(?<![\\\w^}\]])\{([^{}]*(?:,|\\emptyset)[^{}]*)\}"), r"\\{\1\\}"),
    (re.compile(r"\\\{\s*([a-z])\s*[|:]\s*(\1\s*=[^<>]*)\\\}"), r"\2"),
    (re.compile(r"(?<!\d)(\d{1,2})[时点](\d{1,2})分"), lambda m: f"{m[1]}:{m[2]:0>2}"),
    (re.compile(r"(上午|下午)\s*(\d{1,2}:\d{2})"), lambda m: f"{m[2]} {'am' if m[1] == '上午' else 'pm'}"),
]  # fmt: skip
_CONDITION = re.compile(r"[\w)]\s*(?:[<>=]|\\[lgn]eq)")
_CONDITION_WORDS = re.compile(r"\\text\s*\{[^{}]*\}|\b(?:if|when|for)\b|当|若")
_ENVIRONMENT = re.compile(
    r"(?:(\\\{|[(\[|])\s*)?\\begin\s*\{(cases|array|aligned|align\*?|gathered|split|[bpvVB]?(?:small)?matrix)\}"
    r"(?:\s*\{[lcr|\s]*\})?((?:(?!\\begin).)*?)\\end\s*\{\2\}\s*([.)\]|])?", re.DOTALL,
)  # fmt: skip


def canonical(text: str) -> str:
    """The text in one spelling; see the module's examples. Kept for short texts, which come again and again."""
    return _canonical(text) if len(text) < 500 else _canonical.__wrapped__(text)


@functools.lru_cache(maxsize=8192)
def _canonical(text: str) -> str:
    if not text.isascii():
        text = _SCRIPT.sub(lambda run: f"{'^' if run[1] else '_'}{{{run[0].translate(_SCRIPTS)}}}", text)
        text = _VULGAR.sub(_fraction, text).translate(_SIGNS)
        text = _COMPATIBLE.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
    if "\\" in text or "~" in text or "{,}" in text:
        if "\\begin" not in text:
            text = _LINE_BREAK.sub(", ", _ESCAPED_TWICE.sub(r"\\", text))
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        if "\\begin" in text:
            text = _ENVIRONMENT.sub(_environment, text)
        while (unwrapped := _TEXT.sub(r" \1 ", text)) != text:
            text = unwrapped
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _count(numeral: str) -> int:
    """一 to 九十九, without the tens beyond 十."""
    tens, _, ones = numeral.rpartition("十")
    units = "零一二三四五六七八九".index(ones or "零")
    return units + (10 * ("零一二三四五六七八九".index(tens) if tens else 1) if "十" in numeral else 0)


def _fraction(sign: re.Match) -> str:
    return "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign[0]).split("⁄"))


def _environment(match: re.Match) -> str:
    """A matrix as pmatrix, a system of equations as "(first and second)"."""
    opening, name, body, closing = match.groups()
    if (name.endswith("matrix") and opening != "\\{") or (
        name == "array" and opening in ("(", "[") and closing in (")", "]")
    ):
        kind = name[0] if name[0] in "vV" else "v" if opening == closing == "|" else "p"
        outer = (opening or "", closing or "") if name.endswith("matrix") and name[0] != "m" else ("", "")
        return f"{outer[0]}\\begin{{{kind}matrix}}{body}\\end{{{kind}matrix}}{outer[1]}"
    cells = [[cell.strip(" ,;") for cell in row.split("&")] for row in body.split("\\\\") if row.strip()]
    if cells and all(len(row) == 2 and _CONDITION.search(row[1]) for row in cells):  # a function by pieces
        pieces = (f"({value}, {_CONDITION_WORDS.sub('', condition).strip(' ()')})" for value, condition in cells)
        return f"\\{{{', '.join(pieces)}\\}}"
    rows = [" ".join(row).strip(" ,;") for row in cells]
    joined = " and ".join(row for row in rows if row)
    return f"{opening if opening in ('(', '[') else ''}({joined}){closing if closing in (')', ']') else ''}"


def balanced(text: str, opening: int) -> int | None:
    """Where the brace that opens at `opening` closes; None when it does not."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "{}" and (position == 0 or text[position - 1] != "\\"):
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    return None
