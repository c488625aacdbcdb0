r"""From a response to the readings of its final answer, as canonical text.

All readings of one answer are of the same statement (with and without a lead-in, with the unit that stands behind the
formula), never alternatives the response hedges between: those stay together as one list. What is denied is no reading.

    "So the answer is: x = 5"                    → "So the answer is: x = 5", "x = 5"
    "\boxed{4} and \boxed{6}"                    → "4, 6"
    "(1) $\boxed{30^\circ}$ (2) $\boxed{5}$"     → "(1) 30^\circ (2) 5"
    "A. Wait, actually B"                        → "B"
    "x cannot be 3"                              → "x cannot be 3", never "3"
"""

import re

from eureka_megatron.rewards import units
from eureka_megatron.rewards.normalise import balanced, canonical
from eureka_megatron.rewards.structure import parts
from eureka_megatron.rewards.text import is_wordy

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")
_MAX_CHARACTERS = 4000
MAX_STATEMENT_CHARACTERS = 1200
_MARKUP = re.compile(
    r"【(?:最终)?(?:答案|解答|解析|分析|详解)】|<br\s*/?>|</?(?:answer|b|p|i|strong|em|div|span|u)>|(?<![A-Za-z0-9)\]}])\*\*(?=\S)|(?<=\S)\*\*(?![A-Za-z0-9(\[{\\])|^#+\s",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox|box)\s*\{")
_CLOSER = {"$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_OPENER = re.compile(r"(?<!\\)(?:\$\$|\$|\\\(|\\\[)")
_JOIN = re.compile(
    r"(?:\s|[,;、，；.]|\\\\|\\q?quad|\\text\s*\{[^{}]*\}|and|or|[和或与及且]|\\[()\[\]]|\$|\(\s*\d\s*\)|（\s*\d\s*）)*",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r"^\W*(?:[(（]\s*(?:1|a|i)\s*[)）]|①|1[.)]|a\)|part\b|第)", re.IGNORECASE)

_CORRECTION = re.compile(
    r"(?:\bwait\b|\bactually\b|\bcorrection\b|\bsorry\b|\bhold on\b|\bon second thoughts?\b|\bi mean\b|\bscratch that\b|\bmake (?:that|it)\b"
    r"|(?<=[.,;—-])\s*no,|不对|更正|等等|等一下)[\s,:.!—-]*", re.IGNORECASE,
)  # fmt: skip
_CONTRAST = re.compile(
    r"(?<=\S)\s*(?:[,;(，；（—]\s*(?:and |but )?(?:not|never)\s|(?:[,;，；]\s*)?(?:rather than|instead of|而不是|而非|,不是|，不是|，并非|,并非))[^\n]*$",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(
    r"^.*(?:\bnot|不是|并非)\s*[^.,;，。；]{1,60}[,，]?\s*(?:\bbut(?: rather)?\b|而是|，是|,是)\s*", re.IGNORECASE
)
_BECAUSE = re.compile(
    r"[\s,;(]*(?:\b(?:because|since|as|which|where|for|so that|when)\b|因为|由于|理由).*$", re.IGNORECASE
)
_HEAD = re.compile(
    r"^((?i:yes|no|true|false|correct|incorrect)(?=[,.;])|[\w.]+(?= (?:is|are|was|were|has|have) )|(?:[甲乙丙丁]|小[\u4e00-\u9fff])(?![和与、,或]))"
)
_COUNTED = re.compile(
    r"(?<=[\d)}!])\s+(?:(?:(?:different|possible) )?(?:ways|outcomes|methods|arrangements|choices)|in all|in total|altogether)$|\s*[种个条人次名件只块张本天组对道位辆棵家项根株][\u4e00-\u9fff]*$|(?<=[①-⑳])\s*[都均]?是?(?:正确|对)的?$"
)
# As canonical text: √ and × are what teachers write for right and wrong.
_MARKS = {**dict.fromkeys(("\\sqrt", "✓", "✔", "对"), "正确"), **dict.fromkeys(("\\times", "✗", "✘", "错"), "错误")}
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_NUMBER = re.compile(r"(?<![A-Za-z0-9.^_{\\])[-+]?\$?\d[\d,]*(?:\.\d+)?(?:\s\d+/\d+|/\d+|:\d\d)?(?![\d{])")
_WORD = re.compile(r"\s*(?:[A-Za-z]+|[\u4e00-\u9fff]{1,3})?")
_PROSE = re.compile(r"[A-Za-z\u4e00-\u9fff\s,.;:\"$%/\d-]+(?:\^\d)?[A-Za-z\u4e00-\u9fff\s,.;]*")
_BOUND = re.compile(
    r"[<>=_^(\[{]|\b(?:than|least|most|over|under|between|about|approximately|up to|or)\b|[大小多少超低高]于|超过|不足|至[少多]|约|或|以[上下内]"
)
_ASIDE = re.compile(r"(?<=[\w}\])%])\s+\((?!.*(?:\bor\b|或|[<>=]|\\[lgn]eq))[^()]*[A-Za-z\u4e00-\u9fff][^()]*\)$")
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|can't|except|without|wrong|incorrect|false|untrue)\b|n't\b"
    r"|不(?!等式|变|同|大于|小于|超过|少于|多于|低于|高于|妨|论|管|难|规则|定|含|计|考虑|足|断|仅)|没有|并非|非(?!常|零|负|空)|错误|错的|除了",
    re.IGNORECASE | re.ASCII,
)
# What was denied before is past.
_CONCLUSION = re.compile(r"\b(?:so|hence|thus|therefore|but)\b|故|所以|因此|但", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[^\d\s])[.!?]\s+|(?<=\d)\.\s+(?=[A-Z])|[。！？\n]+")

_OPENING = re.compile(
    r"^(?:(?:so|thus|hence|therefore|then|finally|consequently|answer|final answer|(?:it|that|they)(?:'s|'re)?|this|we|choose|about|approximately|roughly|only|just|"
    r"the (?:ordered |open |closed |half-open |solution )?(?:points?|interval|set|coordinates?|vector|line|ratio|equation|number|values?|solutions?|answers?|roots?|range|vertex|pair|cent(?:er|re)|midpoint|focus)|"
    r"(?:point|interval|coordinates?|vector|line|ratio))\s*(?:of\s+)?[,:]?\s+"
    r"|(?:on|at|a total of|the(?=\s+\d))\s+"
    r"|(?:此|该|原)?(?:方程组?|不等式组?)(?=无|有)"
    r"|(?:点|区间|坐标|向量|直线|集合|答|解|约|大约|共|有|在|当|且|应填|填|会|它们|两者|二者|仍然?|(?:该|这个|此)?(?:说法|结论|命题|判断)|直线与圆|两圆|点?[A-Z]?在|(?:[A-Z]点|点[A-Z])?的?坐标|保持|应?采用|(?:[\u4e00-\u9fff]{1,6}的)?方向|选(?=[甲乙丙丁])|这样的[\u4e00-\u9fff]{1,3}(?=不?存在)|可知|由此|综上所述|综上|因此|所以|故|则|即|∴)\s*[,:]?\s*"
    r"|\\approx\s*|=\s*|\\Rightarrow\s*)(?=\S)", re.IGNORECASE,
)  # fmt: skip
_LEAD_INS = (
    re.compile(r"^.*[,;.]\s*(?:so|hence|thus|therefore|then)\b\s*,?\s*(?=\S)", re.IGNORECASE),
    re.compile(r"^.*?(?<![A-Za-z])(?:is|are|was|were|equals?|be|becomes?|get|gets|have|has|obtain|gives?|yields?|choose|find|need|takes?|costs?|by)(?:\s+equal\s+to|\s+to)?\s*:?\s+(?=\S)", re.IGNORECASE),
    re.compile(r"^.*?[A-Za-z\u4e00-\u9fff)]\s*:\s*(?=\S)"),
    re.compile(r"^.*?(?:答案|结果|解得|求得|得到|可得|得出|因此|所以|故选|应选|故|得|解|则)(?:应该|应)?(?:是|为|等于|选)?\s*[:,]?\s*(?=\S)"),
    re.compile(r"^.*(?:等于|为|是|共有?|需要?|有|随.*而)\s*:?\s*(?=\S)"),
    re.compile(r"^.*与[^,]*(?=相[切交离]$)"),
)  # fmt: skip


def strip_end_tokens(response: str) -> str:
    for token in END_TOKENS:
        response = response.replace(token, "")
    return response.strip()


def answer_span(response: str, *, untagged: str = "reject") -> str | None:
    r"""Text of the last complete <answer>…</answer> pair; without one None, or the last boxes where `untagged` is "boxed"."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return response[start + len("<answer>") : end].replace("</answer>", "")
    found = boxes(response) if untagged == "boxed" else []
    return f"\\boxed{{{_joined(response, found)[2]}}}" if found else None


def settled(span: str) -> str:
    """What the answer comes down to: without markup, what is taken back ("A. Wait, actually B") and what it is set against."""
    text = _MARKUP.sub(" ", span).strip()
    if len(text) > _MAX_CHARACTERS:
        return text
    corrected = [text[match.end() :] for match in _CORRECTION.finditer(text)]
    text = next((rest for rest in reversed(corrected) if re.search(r"[\w①-⑨]", rest)), text)
    text = _NOT_BUT.sub("", text)
    return _CONTRAST.sub("", text).strip() or text


def denies(text: str) -> bool:
    """Whether the text holds a negation."""
    return bool(_NEGATION.search(text))


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, or the text."""
    return [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()] or [text]


def readings(span: str) -> list[str]:
    """Canonical readings of the final value, best first; empty when there is nothing to judge."""
    text = settled(span)
    if boxed := boxes(text):
        return _of_boxes(text, boxed)
    if len(text) > _MAX_CHARACTERS:
        return []
    last = re.split(r"\n\s*\n", text)[-1]
    lines = [line.strip() for line in undelimited(last).splitlines() if line.strip()]
    several = ", ".join(lines) if 1 < len(lines) < 9 and max(map(len, lines)) < 60 else ""
    statements = dict.fromkeys([text, several, last, sentences(text)[-1]])
    found = [reading for statement in statements for reading in _peeled(statement)]
    if segments := math_segments(text):
        last = _joined(text, segments)
        if not _denied(text, last[0], last[1]):
            found = [*(formula := _peeled(_with_unit(text, last)))[:1], *found, *formula]
    return _unique(found)


def gold(answer: object) -> str:
    """The label as canonical text: outer delimiters, box and full stop removed. A list of one is its element."""
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    text = str(answer).strip()
    if (found := boxes(text)) and len(text) < _MAX_CHARACTERS:
        text = unboxed(", ".join(content for _, _, content in found))
    return tidy(canonical(undelimited(text)))


def _of_boxes(text: str, found: list[tuple[int, int, str]]) -> list[str]:
    last = _joined(text, found)
    whole = ", ".join(content for _, _, content in found)
    several = [undelimited(unboxed(text))] if len(found) > 1 and _NUMBERED.match(undelimited(unboxed(text))) else []
    if len(text) > _MAX_CHARACTERS or not _denied(text, last[0], last[1]):
        several += [_with_unit(text, last), *([whole] if len(found) > 1 else [])]
    return _unique([reading for statement in several for reading in _peeled(unboxed(statement))])


def _joined(text: str, found: list[tuple[int, int, str]]) -> tuple[int, int, str]:
    """The last part, together with those before it that only commas and conjunctions separate from it."""
    start, values = found[-1][0], [found[-1][2]]
    for before, after in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
        between = text[before[1] : after[0]]
        if not _JOIN.fullmatch(between):
            break
        start = before[0]
        values.insert(0, before[2])
    return start, found[-1][1], ", ".join(values)


def _with_unit(text: str, part: tuple[int, int, str]) -> str:
    """The joined formula plus a unit that stands right behind it, as in $5$ cm."""
    behind = text[part[1] :][:40].lstrip("$").removeprefix("\\)").removeprefix("\\]")
    behind = canonical(behind.split("$")[0].split("\\(")[0].split("\n")[0]).rstrip(".")
    joined = _JOIN.match(behind)  # always, if of no length
    short = 0 < len(behind.split()) <= 3 and joined is not None and joined.end() == 0
    is_unit = short and units.split(f"1 {behind}")[0] == "1"
    return f"{part[2]} {behind}" if is_unit and units.split(canonical(part[2]))[1] is None else part[2]


def _denied(text: str, start: int, end: int) -> bool:
    """Whether the sentence around a formula denies it: "The answer is not $5$", "$5$ is wrong"."""
    before = re.split(r"[.;。；\n](?!\d)|\bbut\b|,", text[max(0, start - 200) : start])[-1]
    after = _BECAUSE.sub("", re.split(r"[.;。；\n,]", text[end : end + 100])[0])
    return bool(_NEGATION.search(before) or _NEGATION.search(after))


def _peeled(text: str) -> list[str]:
    """The text, and what is left when lead-ins and reasons go, one after the other, as long as nothing is denied.

    Nothing for a text that is too long for a statement.
    """
    if not text or len(text) > MAX_STATEMENT_CHARACTERS:
        return []
    text = canonical(undelimited(text))
    found, rest = [text], _BECAUSE.sub("", text) or text
    for _ in range(5):
        if rest != found[-1]:
            found.append(rest)
        match = _OPENING.match(rest) or next((m for lead_in in _LEAD_INS if (m := lead_in.match(rest))), None)
        if match is None or match.end() >= len(rest) or parts(rest):
            break
        if denies(_CONCLUSION.split(match[0])[-1]):
            break
        rest = rest[match.end() :]
    rest = tidy(rest)
    found += [_ASIDE.sub("", rest), _COUNTED.sub("", rest)]
    if (match := _HEAD.match(text)) and (match[1].casefold() in ("yes", "no") or not denies(text[match.end() :])):
        found.insert(1, match[1])  # not the last, which is the most peeled
    if (quantity := _only_quantity(text)) is not None:
        found.append(quantity)
    if pieces := parts(rest):
        found.append("; ".join(f"({number}) {_peeled(piece)[-1]}" for number, piece in enumerate(pieces, 1)))
    return found


def _only_quantity(text: str) -> str | None:
    """The quantity of a sentence that has just one: "The beaker holds 180 g of water" → "180 g"."""
    numbers = list(_NUMBER.finditer(text))
    around = text.replace("^\\circ", "")
    if len(numbers) != 1 or not is_wordy(text) or denies(text) or _BOUND.search(around) or not _PROSE.fullmatch(around):
        return None
    number, behind = numbers[0][0], re.sub(r"^\s+(?:in (?:total|all)|altogether)\b", "", text[numbers[0].end() :])
    for length in range(min(len(behind), 30), 0, -1):  # the longest known unit behind it
        value, unit = units.split(number + behind[:length])
        ends = not behind[length : length + 1].isalpha()
        if ends and unit is not None and value == number.strip() and units.is_known(unit):
            return number + behind[:length]
    counted = _WORD.match(behind)
    return number + (counted[0] if counted else "")


def _unique(texts: list[str]) -> list[str]:
    cleaned = (tidy(canonical(text)) for text in texts)
    return list(dict.fromkeys(text for text in cleaned if text))


def tidy(text: str) -> str:
    """Without surrounding quotes, blanks, a closing full stop or an empty group."""
    text = re.sub(r"^'(.*)'$", r"\1", text.strip().strip('"`').strip())
    text = re.sub(r"^\\(?:displaystyle|therefore|boxed)(?![a-z])\s*", "", text)
    while text.endswith((".", "!", ";", ",", "\\\\", ":")) and not re.search(r"(?:\d|\b[a-z]|\))\s*!$", text):
        text = (text[:-2] if text.endswith("\\\\") else text[:-1]).rstrip()
    if (mark := _MARKS.get(text)) is not None:
        return mark
    if (word := text.casefold().removeprefix("the ")) in _ORDINALS:
        return str(_ORDINALS.index(word) + 1)
    while text.startswith("{") and balanced(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every outermost balanced \boxed{…} or \fbox{…}, in order."""
    found: list[tuple[int, int, str]] = []
    position = 0
    for match in _BOX.finditer(text):
        if match.start() < position:
            continue
        end = balanced(text, match.end() - 1)
        if end is None:
            break
        found.append((match.start(), end + 1, text[match.end() : end]))
        position = end + 1
    return found


def unboxed(text: str) -> str:
    r"""The text with every \boxed{x} replaced by x, inner ones too."""
    for _ in range(4):
        for start, end, content in reversed(boxes(text)):
            text = text[:start] + content + text[end:]
    return text


def math_segments(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of $…$, $$…$$, \(…\) and \[…\]; a dollar before a number without a partner is money."""
    found: list[tuple[int, int, str]] = []
    position = 0
    while match := _OPENER.search(text, position):
        closer, start = _CLOSER[match[0]], match.end()
        end = text.find(closer, start)
        while end > 0 and closer[0] == "$" and text[end - 1] == "\\":  # an escaped dollar inside
            end = text.find(closer, end + 1)
        position = start
        if end >= 0:
            found.append((match.start(), end + len(closer), text[start:end]))
            position = end + len(closer)
    return found


def undelimited(text: str) -> str:
    """The text with its math segments in place but without their delimiters."""
    for start, end, content in reversed(math_segments(text)):
        text = f"{text[:start]} {content} {text[end:]}"
    return text
