"""math-verify, for what the exact core does not know: in both argument orders, for short and harmless input only.

It runs where `score` runs: in a judge process with limits on time and memory during training. Its own SIGALRM limits are
off, for they work in a main thread only.
"""

import functools
import logging
import re
from typing import Any

from eureka_megatron.rewards import text

logging.getLogger("math_verify").setLevel(logging.ERROR)  # for mm_eureka, too
_MAX_CHARACTERS = 300
_MAX_NESTING = 8  # its parser is exponential in nested brackets
_HEAVY = re.compile(r"\\(?:sum|prod|int|iint|lim|oint|det)(?![a-zA-Z])")
_BASE = re.compile(r"\d\s*_\s*\{?\s*\(?\d")
_FORMULA = re.compile(r"(?<![\\a-zA-Z])[A-Za-z]+\d")
_DANGER = re.compile(
    r"\^\s*\{?\s*\(?\s*-?\s*[\d.]{4,}"  # exponents of four digits
    r"|\^[^^]{0,40}\^[^^]{0,40}\^|\*\*[^*]{0,40}\*\*"  # towers
    r"|\^\s*\{[^{}]{0,20}\^"
    r"|\d{3,}\s*!|!\s*!|\d{100,}"
    r"|[-+*/^_=|!,(\[{~]{9,}|(?:\\[a-zA-Z]+\s*){8,}"  # piles of signs
    r"|\\(?:input|include|write|read|def|let|csname|usepackage)"
)


def agrees(gold: str, prediction: str) -> bool:
    """Whether math-verify finds two canonical answers equal, and nothing speaks against asking it."""
    if objection(gold, prediction):
        return False
    from math_verify import verify  # imports sympy: half a second that workers spend while they start

    parsed_gold, parsed = parse(gold), parse(prediction)
    return bool(parsed_gold and parsed) and any(
        verify(*pair, timeout_seconds=None, allow_set_relation_comp=True)
        for pair in ((parsed_gold, parsed), (parsed, parsed_gold))
    )


def objection(gold: str, prediction: str) -> str | None:
    """Why math-verify is not asked: input that could blow up, or that it is known to take for equal when it is not."""
    for answer in (gold, prediction):
        if len(answer) > _MAX_CHARACTERS or _DANGER.search(answer):
            return "too long or too expensive"
        if not _is_sound(answer):
            return "brackets that do not close, or too many"
        if text.is_wordy(answer):
            return "words, which it would read as products of letters"
        if _BASE.search(answer):
            return "a number base, which it would drop"
        if _FORMULA.search(answer):
            return "a number behind a letter, as in CO2, which it would read as a product"
    if set(_HEAVY.findall(prediction)) - set(_HEAVY.findall(gold)):
        return "a sum or an integral that the gold answer does not have"
    return None


def _is_sound(answer: str) -> bool:
    """Whether brackets balance (of any kind: (0, 1] is an interval) and nest no deeper than the parser can take."""
    braces = brackets = deepest = 0
    for character in answer:
        braces += (character == "{") - (character == "}")
        brackets += (character in "([") - (character in ")]")
        deepest = max(deepest, braces + brackets)
    return braces == 0 and brackets == 0 and deepest <= _MAX_NESTING


@functools.lru_cache(maxsize=512)
def parse(formula: str) -> list[Any]:
    """What math-verify reads in a formula; empty when nothing."""
    from math_verify import LatexExtractionConfig, parse

    if "$" in formula or not formula.strip():
        return []
    kinds = [LatexExtractionConfig()]
    return parse(f"${formula}$", extraction_config=kinds, fallback_mode="no_fallback", parsing_timeout=None)
