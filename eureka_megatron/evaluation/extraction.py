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


def boxed(text: str) -> list[str]:
    """Contents of all balanced \\boxed{…} outside of one another, in order."""
    found, start = [], text.find(_BOX)
    while start >= 0:
        inside = start + len(_BOX)
        end = closing(text, inside)
        if end is None:
            start = text.find(_BOX, inside)
        else:
            found.append(text[inside:end])
            start = text.find(_BOX, end)
    return found


def closing(text: str, inside: int) -> int | None:
    """Where the brace closes that was opened before `inside`; None: nowhere."""
    depth = 1
    for place in range(inside, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    return None


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
