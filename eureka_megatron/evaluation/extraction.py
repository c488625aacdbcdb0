"""How the original gets from a response to an answer, before any judge.

Source: ../shared/evaluation in the project's documents; MM-EUREKA's evaluation scripts and the copy of VLMEvalKit's letter rule in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = "\\boxed{"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def paper_extraction(response: str) -> str:
    """The first <answer> pair's content, else the last balanced \\boxed{}'s, else the whole response.

    Example: "so <answer> 3 </answer> or \\boxed{4}" → "3".
    """
    if found := _ANSWER.search(response):
        return found[1].strip()
    boxes = boxed(response)
    return boxes[-1].strip() if boxes else response


def boxed(text: str, *, strict: bool = False) -> list[str]:
    """Contents of all balanced \\boxed{…} outside of one another, in order.

    strict: raise ValueError when one does not close.
    """
    ends, found, start = _closings(text), [], text.find(_BOX)
    while start >= 0:
        inside = start + len(_BOX)
        end = ends.get(inside)
        if end is None and strict:
            raise ValueError("a box does not close")
        if end is not None:
            found.append(text[inside:end])
        start = text.find(_BOX, inside if end is None else end)
    return found


def _closings(text: str) -> dict[int, int]:
    """Where each brace closes, by the place behind the one that opens; what never closes is left out. In one pass: responses may be long."""
    found, opened = {}, []
    for mark in re.finditer("[{}]", text):
        if mark[0] == "{":
            opened.append(mark.end())
        elif opened:
            found[opened.pop()] = mark.start()
    return found


def infer_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text names (VLMEvalKit's rule of early 2025, which the original has): "Z" for a refusal, None for none or several.

    One option letter as a word of its own, else the one option whose text occurs. Known defect, kept: the article "A" counts as option A.
    """
    if any(phrase in text for phrase in _REFUSALS):
        return "Z"
    words = text.translate(_SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    small = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in small]
    return named[0] if len(named) == 1 else None
