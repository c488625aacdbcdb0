"""The statement an answer makes: from the text between the answer tags to a few renderings of its final value.

All candidates of one answer are readings of the same statement (with and without a lead-in, with the unit that stands
behind the formula), never alternatives the response hedges between: those stay together as one list.
"""

import re

from eureka_megatron.rewards import latex, units

_MAX_CHARACTERS = 4000
_MARKUP = re.compile(r"<br\s*/?>|</?(?:answer|b|p|i|strong|em|div|span)>|\*\*(?!\d)|(?<!\d)\*\*", re.IGNORECASE)
_LEAD_IN = re.compile(
    r"^.*?(?<![A-Za-z])(?:is|are|equals?|be|get|have|obtain|give|gives|choose)(?:\s+equal\s+to)?\s*:?\s+(?=\S)"
    r"|^.*?(?:[A-Za-z\u4e00-\u9fff]\s*:\s*)(?=\S)"
    r"|^.*?(?:答案|结果|因此|所以|故|得|解)(?:是|为|等于|选|得)?\s*[:,]?\s*(?=\S)"
    r"|^.*(?:等于|为|是)\s*(?=\S)",
    re.IGNORECASE,
)
_OPENER = re.compile(r"^(?:so|thus|hence|therefore|then|finally|answer|it|they|this|that)\s*,?\s+(?=\S)", re.IGNORECASE)
_JOIN = re.compile(r"^(?:\s|,|;|and|or|和|或|与|及)*$", re.IGNORECASE)
_APPROXIMATELY = re.compile(r"^(?:\\approx|≈|about|approximately|约)\s*", re.IGNORECASE)


def candidates(span: str) -> list[str]:
    """Canonical renderings of the final value, best first; empty when there is nothing to judge."""
    span = _MARKUP.sub(" ", span).strip()
    parts = latex.boxed(span)
    if parts:
        return _renderings(latex.unbox(_with_unit(span, parts)))
    if len(span) > _MAX_CHARACTERS:
        return []
    parts = latex.math_segments(span)
    if not parts:
        return _renderings(span)
    texts = [_with_unit(span, parts)]
    plain = latex.strip_math_delimiters(span)
    # Little prose around the formula: the whole is the value ("x = $5$", "$3$ or $-3$").
    return _unique([*texts, *(_renderings(plain) if len(plain) < 200 else [])])


def _joined(text: str, parts: list[tuple[int, int, str]]) -> str:
    """The last part, together with those before it that only commas and conjunctions separate from it."""
    values = [parts[-1][2]]
    for before, after in zip(reversed(parts[:-1]), reversed(parts[1:]), strict=True):
        between = re.sub(r"\\[()\[\]]|\$", " ", text[before[1] : after[0]])
        if not between.strip() or not _JOIN.match(between):
            break
        values.insert(0, before[2])
    return ", ".join(values)


def _with_unit(text: str, parts: list[tuple[int, int, str]]) -> str:
    """The joined formula plus a unit that stands right behind it, as in $5$ cm."""
    value = _joined(text, parts)
    behind = text[parts[-1][1] :][:40].lstrip("$").removeprefix("\\)").removeprefix("\\]")
    behind = latex.canonical(behind.split("$")[0].split("\\(")[0]).rstrip(".")
    is_unit = behind and len(behind.split()) <= 3 and units.split(f"1 {behind}")[0] == "1"
    if is_unit and units.split(latex.canonical(value))[1] is None:
        return f"{value} {behind}"
    return value


def _renderings(text: str) -> list[str]:
    texts = [text]
    rest = text
    for _ in range(3):  # "So the answer is: x = 5" peels to "x = 5"
        match = _OPENER.match(rest) or _LEAD_IN.match(rest)
        if match is None or match.end() >= len(rest):
            break
        rest = rest[match.end() :]
        texts.append(rest)
    return _unique(texts)


def _unique(texts: list[str]) -> list[str]:
    cleaned = (tidy(latex.canonical(text)) for text in texts)
    return list(dict.fromkeys(text for text in cleaned if text))


def tidy(text: str) -> str:
    """Without surrounding quotes, a closing full stop, or a word for "about"."""
    text = text.strip().strip('"`').strip()
    text = re.sub(r"^\\(?:displaystyle|therefore|boxed)\s*", "", text)
    text = _APPROXIMATELY.sub("", text)
    while text.endswith((".", "!", ";", ",", "\\\\")) and not re.search(r"\d\s*!$", text):
        text = (text[:-2] if text.endswith("\\\\") else text[:-1]).rstrip()
    return text


def gold(answer: object) -> str:
    """The label as canonical text: outer delimiters, box and full stop removed. A list of one is its element."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    text = str(answer).strip()
    if parts := latex.boxed(text):
        text = latex.unbox(_joined(text, parts)) if len(text) < _MAX_CHARACTERS else text
    if latex.math_segments(text):
        text = latex.strip_math_delimiters(text)
    return tidy(latex.canonical(text))
