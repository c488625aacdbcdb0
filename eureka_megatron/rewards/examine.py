"""Is the answer right, as a fair examiner would say: extraction → normalisation → options → exact core → math-verify.

A verdict names the stage that gave it and why, so that disputed ones can be looked at.
"""

import functools
import re
from typing import NamedTuple

from eureka_megatron.rewards import choice, expression, extract, text, units
from eureka_megatron.rewards.exact import Comparison
from eureka_megatron.rewards.expression import Unbounded, Unsupported

_MAX_ANSWER_CHARACTERS = 20_000  # whoever writes more between the answer tags gives no answer


class Verdict(NamedTuple):
    """stage: "extraction", "option", "text", "exact" or "math-verify"."""

    right: bool
    stage: str
    why: str


def examine(
    response: str, answer: object, *, untagged: str = "reject", rounded: bool = False, converted: bool = False
) -> Verdict:
    """The verdict on a response; for the options see `ScoringRules`, whose decimals are `rounded` and units `converted` here."""
    span = extract.answer_span(extract.strip_end_tokens(response), untagged=untagged)
    if span is None or len(span) > _MAX_ANSWER_CHARACTERS:
        return Verdict(False, "extraction", "no <answer>…</answer>" if span is None else "the answer is too long")
    gold = extract.gold(answer)
    if not gold or len(gold) > extract.MAX_STATEMENT_CHARACTERS:
        return Verdict(False, "extraction", "the gold answer is empty or too long")
    readings = extract.readings(span)
    options = choice.gold_letters(gold)
    if options is not None:
        chosen = choice.letters(span)
        if chosen == options or len(options) > 1 or chosen:
            said = "".join(sorted(chosen or ())) or "none"
            return Verdict(chosen == options, "option", f"{said} chosen, {gold} wanted")
    if options is not None and (told := re.match(r"[(\[]?[A-J][)\].:]\s*(.+)", gold)):
        gold = told[1]  # the option's text in place of its letter
    verdicts = []
    for reading in readings:
        verdicts.append(compare(gold, reading, rounded, converted))
        if verdicts[-1].right:
            return verdicts[-1]
    return verdicts[0] if verdicts else Verdict(False, "extraction", "nothing between the tags can be read")


@functools.lru_cache(maxsize=8192)
def compare(gold: str, prediction: str, rounded: bool = False, converted: bool = False) -> Verdict:
    """Whether two canonical answers are equal."""
    if text.same(gold, prediction):
        return Verdict(True, "text", f"{prediction} is {gold}")
    comparison = Comparison(rounded=rounded, converted=converted)
    try:
        right = len(prediction) <= extract.MAX_STATEMENT_CHARACTERS and comparison.equal(gold, prediction)
    except Unbounded as error:
        return Verdict(False, "exact", str(error))
    why = comparison.why or next(filter(None, comparison.asked), None)
    said = f"{prediction} is {'' if right else 'not '}{gold}{f' ({why})' if why else ''}"
    return Verdict(right, "math-verify" if comparison.asked else "exact", said)


def parseable_gold(answer: object) -> bool:
    """Whether the data loader may keep this label: an option, words, a formula that can be compared.

    Refused: nothing at all, only punctuation or brackets, undefined values such as 1/0, unbalanced braces, a list.
    """
    if isinstance(answer, dict | set) or answer is None or (isinstance(answer, list | tuple) and len(answer) != 1):
        return False
    gold = extract.gold(answer)
    if not gold or len(gold) > extract.MAX_STATEMENT_CHARACTERS or not re.search(r"[^\W_]|\\[a-zA-Z]", gold):
        return False
    if choice.gold_letters(gold) is not None:
        return True
    balanced = gold.replace("\\{", "").replace("\\}", "")
    if balanced.count("{") != balanced.count("}"):
        return False
    try:
        expression.values(units.split(gold)[0])
    except Unsupported as reason:
        return "division by zero" not in str(reason)
    return True
