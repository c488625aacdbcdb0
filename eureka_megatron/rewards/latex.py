"""LaTeX and plain-text answers to one canonical spelling; finding \\boxed{}, math segments and tags in a response.

Everything here is linear in the length of the text: positions and simple patterns, nothing that can backtrack far.
"""

import functools
import re

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")

_UNICODE = str.maketrans(
    {
        **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
        "\u3000": " ",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u200b": "",
        "\ufeff": "",
        "\x00": "",
        "−": "-",
        "–": "-",
        "﹣": "-",
        "×": "\\times ",
        "·": "\\cdot ",
        "⋅": "\\cdot ",
        "∙": "\\cdot ",
        "÷": "/",
        "∕": "/",
        "⁄": "/",
        "π": "\\pi ",
        "∞": "\\infty ",
        "≤": "\\leq ",
        "⩽": "\\leq ",
        "≦": "\\leq ",
        "≥": "\\geq ",
        "⩾": "\\geq ",
        "≧": "\\geq ",
        "≠": "\\neq ",
        "±": "\\pm ",
        "∓": "\\mp ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∅": "\\emptyset ",
        "∈": "\\in ",
        "√": "\\sqrt ",
        "∠": "\\angle ",
        "△": "\\triangle ",
        "⊥": "\\perp ",
        "∥": "\\parallel ",
        "°": "^\\circ ",
        "º": "^\\circ ",
        "℃": "^\\circ C",
        "℉": "^\\circ F",
        "％": "%",
        "½": "\\frac{1}{2}",
        "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}",
        "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}",
        "、": ",",
        "【": "[",
        "】": "]",
        "\u2126": "\\Omega ",
        "Ω": "\\Omega ",
        "µ": "μ",
        "′": "'",
        "“": '"',
        "”": '"',
        "。": ".",
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
        **{greek: f"\\{name} " for greek, name in zip("αβγδθλμρσφω", ["alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "phi", "omega"], strict=True)},
    }
)  # fmt: skip

# Spelling variants that mean the same, in the order applied: without a backslash, then with one.
_PLAIN = [
    (re.compile(r"<=|=<"), r"\\leq "),
    (re.compile(r">="), r"\\geq "),
    (re.compile(r"!="), r"\\neq "),
    (re.compile(r"(?<![A-Za-z])per cent(?![A-Za-z])"), "percent"),
    (re.compile(r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|ln|log|lg|pi|arcsin|arccos|arctan)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"\{,\}"), ","),
]
_LATEX = [
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right|[bB]ig{1,2}[lrm]?|displaystyle|limits|nolimits)(?![a-zA-Z])"), " "),
    (re.compile(r"(?<!\\)\\(?:[,;:!> ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z]))"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:le|leqslant)(?![a-zA-Z])"), r"\\leq "),
    (re.compile(r"\\(?:ge|geqslant)(?![a-zA-Z])"), r"\\geq "),
    (re.compile(r"\\ne(?![a-zA-Z])"), r"\\neq "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:mid|vert|lvert|rvert)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\dot\s*\{?\s*(\d)\s*\}?"), r"\\overline{\1}"),  # 0.\dot{3}
    (re.compile(r"\\(begin|end)\s*\{(?:b|small|)matrix\}"), r"\\\1{pmatrix}"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\overset\{[^{}]*\}|\\(?:bold|boldsymbol|mathbf|mathit|mathsf|pmb)(?![a-zA-Z])"), " "),
]
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|textsf|mathrm|mbox|hbox|operatorname|rm)\s*\{([^{}]*)\}")
_RM_SWITCH = re.compile(r"\\(?:rm|bf|it)(?![a-zA-Z])")
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_SUPERSCRIPT_RUN = re.compile(f"[{_SUPERSCRIPTS}]+")
_FROM_SUPERSCRIPT = str.maketrans(_SUPERSCRIPTS, "0123456789+-n")
_SUBSCRIPT_DIGITS = str.maketrans({chr(0x2080 + digit): f"_{digit}" for digit in range(10)})
_SPACES = re.compile(r"\s+")
_MATH_OPENER = re.compile(r"(?<!\\)(?:\$\$|\$|\\\(|\\\[)")
_CLOSER = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}


def canonical(text: str) -> str:
    """One spelling: ASCII where possible, \\text{} unwrapped, sizing and spacing commands gone, single blanks."""
    return _canonical(text) if len(text) < 500 else _canonical.__wrapped__(text)


@functools.lru_cache(maxsize=4096)
def _canonical(text: str) -> str:
    if not text.isascii():
        text = _SUPERSCRIPT_RUN.sub(lambda run: f"^{{{run[0].translate(_FROM_SUPERSCRIPT)}}}", text)
        text = text.translate(_SUBSCRIPT_DIGITS).translate(_UNICODE)
    if "\\" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        for _ in range(3):  # \text{} may be nested, but not deeply
            unwrapped = _TEXT.sub(r" \1 ", text)
            if unwrapped == text:
                break
            text = unwrapped
        text = _RM_SWITCH.sub(" ", text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return _SPACES.sub(" ", text.replace("~", " ").replace("\x00", "")).strip()


def strip_end_tokens(response: str) -> str:
    for token in END_TOKENS:
        response = response.replace(token, "")
    return response.strip()


def answer_span(response: str) -> str | None:
    """Text of the last complete <answer>…</answer> pair; None without one."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else response[start + len("<answer>") : end].replace("</answer>", "")


def boxed(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every outermost balanced \\boxed{…} or \\fbox{…}, in order."""
    found: list[tuple[int, int, str]] = []
    position = 0
    for match in re.finditer(r"\\f?boxed?\s*\{", text):
        if match.start() < position:
            continue
        end = _closing_brace(text, match.end() - 1)
        if end is None:
            break
        found.append((match.start(), end + 1, text[match.end() : end]))
        position = end + 1
    return found


def _closing_brace(text: str, opening: int) -> int | None:
    depth = 0
    for position in range(opening, len(text)):
        character = text[position]
        if character in "{}" and (position == 0 or text[position - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return position
    return None


def unbox(text: str) -> str:
    """The text with every \\boxed{x} replaced by x, inner ones too."""
    for _ in range(4):
        parts = boxed(text)
        if not parts:
            break
        for start, end, content in reversed(parts):
            text = text[:start] + content + text[end:]
    return text


def math_segments(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of $…$, $$…$$, \\(…\\) and \\[…\\]; a dollar before a number without a partner is money."""
    found: list[tuple[int, int, str]] = []
    position = 0
    while match := _MATH_OPENER.search(text, position):
        opener, start = match[0], match.end()
        end = text.find(_CLOSER[opener], start)
        while end > 0 and opener[0] == "$" and text[end - 1] == "\\":  # an escaped dollar inside
            end = text.find(_CLOSER[opener], end + 1)
        if end < 0:
            position = start
            continue
        found.append((match.start(), end + len(opener), text[start:end]))
        position = end + len(opener)
    return found


def strip_math_delimiters(text: str) -> str:
    """The text with its math segments in place but without their delimiters."""
    for start, end, content in reversed(math_segments(text)):
        text = text[:start] + " " + content + " " + text[end:]
    return text
