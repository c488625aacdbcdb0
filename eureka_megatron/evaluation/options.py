"""Which option an answer picks: by its letter, by its text or value, or as VLMEvalKit infers it from the words around it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping

from eureka_megatron.evaluation.extraction import infer_letter
from eureka_megatron.evaluation.verdict import number

LETTERS = "ABCDEFGH"
_OPTION = re.compile(r"(?:^|(?<=[\s;；]))[(（]?([A-H])\s*[.、:：．)）]")
_WRAPPED = re.compile(r"\\(?:text\w*|math\w+|boxed|fbox|mbox)\s*\{([^{}]*)\}")
_BEFORE = re.compile(
    r"(?:(?:the|so|correct|right|best|final|my)\s+)*(?:options?|choices?|answers?|正确答案|答案|正确选项|选项|故选|应选|选择?)\s*(?:is|应为|应选|是|为|选)?[\s:：*]*(?=\W*[A-Ha-h](?![A-Za-z]))",
    re.IGNORECASE,
)
_BEHIND = re.compile(r"(?<=[A-H)])\s*(?:选项|项|is (?:correct|right|true)\.?|正确)$")
_AROUND = " \n\t()[]{}<>（）【】《》.．。:：,，;；!?！？*$\\~`'\""
_NAMED = re.compile(r"[\s*(（\[]*([A-H])[\s*]*[)）\].．、:：][\s*]*(.*)", re.DOTALL)
_ANOTHER = re.compile(r"^\W*[A-H](?![A-Za-z])|[(（][A-H][)）]")
_SAID = re.compile(
    r"(?:\b(?:answer|option|choice)\s*(?:is|:)|\b(?:choose|pick|select)\b|答案(?:应该)?(?:是|为|选)?|故选|应选|(?<![不能])选)[\s:：*$(（\[【<]*(?:(?:the )?(?:option|choice|选项)\s*[(（]?)?(?:\\\w+\{)?([A-H])(?![A-Za-z'])",
    re.IGNORECASE,
)
_OPENED = re.compile("<answer>", re.IGNORECASE)
_CLOSED = re.compile("</answer", re.IGNORECASE)
_STATEMENT_CHARACTERS = 200


def options_in(question: str) -> dict[str, str]:
    """Options that a question holds, in lines or split by spaces or semicolons. Example: "…\\nA. one\\nB、two" → {"A": "one", "B": "two"}.

    Of several places where they may begin ("point A. …") the last that a second option follows.
    """
    marks = list(_OPTION.finditer(question))
    for first in reversed([place for place, mark in enumerate(marks) if mark[1] == "A"]):
        chosen = [marks[first]]
        for mark in marks[first + 1 :]:
            if mark[1] == chr(ord("A") + len(chosen)):
                chosen.append(mark)
        if len(chosen) > 1:
            ends = [mark.start() for mark in chosen[1:]] + [len(question)]
            return {m[1]: question[m.end() : end].strip(" \n\t;；") for m, end in zip(chosen, ends, strict=True)}
    return {}


def bare_letter(answer: str) -> str | None:
    """The one letter that an answer is. Examples: "(B)", "\\text{B}.", "**b**", "Option B", "选B" → "B"."""
    if len(answer) > _STATEMENT_CHARACTERS:
        return None
    bare = unicodedata.normalize("NFKC", answer)
    while (inner := _WRAPPED.sub(r"\1", bare)) != bare:
        bare = inner
    bare = _BEHIND.sub("", bare.strip(_AROUND)).strip(_AROUND)
    if said := _BEFORE.match(bare):
        bare = bare[said.end() :].strip(_AROUND)
    return bare.upper() if len(bare) == 1 and bare.upper() in LETTERS else None


def chosen(answer: str, options: Mapping[str, str], agrees: Callable[[str, str], bool]) -> str | None:
    """The option that an answer picks: "Z" for a refusal, None for none or several.

    In this order: it is a letter, or its first or last line is; a letter with a text; the text or the value of one option; what `infer_letter` finds; "the answer is B".
    A number that is no option's value is none, though its digits may stand in one.

    Args:
        agrees: whether two texts are equal in value.
    """
    if opened := list(_OPENED.finditer(answer)):  # tags that the extraction does not know: cut off, or with capitals
        answer = _CLOSED.split(answer[opened[-1].end() :])[0]
    lines = answer.strip().splitlines() or [""]
    if len(alone := {bare_letter(lines[0]), bare_letter(lines[-1])} - {None}) == 1:
        return alone.pop()
    short = len(answer) <= _STATEMENT_CHARACTERS and "\n" not in answer.strip()
    named = _NAMED.match(answer)
    text = named[2] if named else answer
    plain = _plain(text)
    same = [name for name, option in options.items() if plain and _plain(option) == plain]
    if len(same) != 1 and short and (any(map(str.isdigit, text)) or "\\" in text):
        same = [name for name, option in options.items() if agrees(text, option)]
    if len(same) == 1:
        return same[0]
    if named and short:
        return None if _ANOTHER.search(text) else named[1]
    if number(plain) is not None:
        return None
    if letter := infer_letter(answer, options):
        return letter
    said = _SAID.findall(answer)
    return said[-1].upper() if said else named[1] if named else None


def _plain(text: str) -> str:
    """For comparing texts: without markup, case, blanks and a full stop."""
    while (inner := _WRAPPED.sub(r"\1", text)) != text:
        text = inner
    return "".join(text.replace("$", "").strip(" \n\t*.．。;；,，\"'`").split()).lower()
