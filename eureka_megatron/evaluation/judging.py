"""Two verdicts on a response: by the benchmark's authors, and by the original's procedure with our judge in place of its GPT-4o.

| benchmark | official | paper |
|---|---|---|
| MMK12 | none; as paper | its extraction, then one letter, else the text of one option |
| MathVista | `mathvista` | the option in tags or box, else by `infer_letter`; numbers as numbers; lists are never right |
| MathVerse | equal strings (the authors' quick match) | equal strings, the option's letter or text, else our judge |
| MathVision | `mathvision` | the option in tags or box, else by `infer_letter`; our judge where there are no options |
| OlympiadBench | `olympiadbench` | our judge, against all answers together, with the row's unit and tolerance |
| We-Math | `wemath` | the original's code has none: as official behind "Answer", else as MathVision |
| counting | the demo's reward | our judge |
"""

from __future__ import annotations

import atexit
import functools
import re
from collections.abc import Callable, Mapping

from eureka_megatron.errors import ConfigError, nearest
from eureka_megatron.evaluation import mathvision, mathvista, olympiadbench, wemath
from eureka_megatron.evaluation.extraction import infer_letter, paper_extraction
from eureka_megatron.evaluation.options import bare_letter, chosen, options_in
from eureka_megatron.evaluation.verdict import Row, Verdict, field, items, number, optional
from eureka_megatron.rewards import units
from eureka_megatron.rewards.judge import JudgePool
from eureka_megatron.rewards.normalise import canonical

BENCHMARKS = ("mmk12", "mathvista", "mathverse", "mathvision", "olympiadbench", "wemath", "counting")
_ALIASES = {**{name: name for name in BENCHMARKS}, "mathv": "mathvision", "olympiad": "olympiadbench"}
# Splits, versions and configurations, as data sets and other tools' task names have them.
_PARTS = re.compile(
    r"(?:testmini|test|mini|train|en|cn|zh|cot|format|solution|thinking|vision(?:only|intensive|dominant)|text(?:dominant|lite|only)"
    r"|oe|tp|mm|to|maths|physics|comp|cee)*"
)
_TRUE_NORTH = re.compile(r"(°|\^\s*\{?\s*\\circ\s*\}?|\bdegrees)\s*(?:\\(?:mathrm|text)\s*\{\s*T\s*\}|T)(?![A-Za-z])")
_CALLED = re.compile(r"^\s*\$?\s*[A-Z]?[a-z]{3,}[a-z ]*\$?\s*=\s*\$?(?=[^=]+$)|\$\s*$")
_QUANTITY_CHARACTERS = 400


def judge_official(benchmark: str, row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """The authors' verdict, by their rules alone (no language model).

    Args:
        benchmark: one of BENCHMARKS in any spelling, see `benchmark_named`.
        row: in the published schema.
        text: the whole response; with `extracted` what was already extracted from it.

    Raises:
        UserError: an unknown benchmark, or a row without a column that the rule needs.
    """
    return _judged(_OFFICIAL, benchmark, row, text, extracted)


def judge_paper(benchmark: str, row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """The original's verdict, with rules where it asks GPT-4o. Arguments and errors as `judge_official`."""
    return _judged(_PAPER, benchmark, row, text, extracted)


def _judged(
    rules: Mapping[str, Callable[..., Verdict]], benchmark: str, row: Row, text: str, extracted: bool
) -> Verdict:
    return rules[benchmark_named(benchmark)](row, text, extracted=extracted)


@functools.cache
def benchmark_named(name: str) -> str:
    """Which of BENCHMARKS a name means: any case and signs, an owner before it, splits behind it, "MATH-V". Raises ConfigError for none.

    Examples: "AI4Math/MathVista", "MathVerse testmini", "We-Math", "olympiadbench_test_en" → "mathvista", "mathverse", "wemath", "olympiadbench".
    """
    plain = re.sub(r"[\W_]", "", name.rpartition("/")[2]).lower()
    for known in sorted(_ALIASES, key=len, reverse=True):
        if plain.startswith(known) and _PARTS.fullmatch(plain, len(known)):
            return _ALIASES[known]
    raise ConfigError(f"benchmark {name!r} is unknown{nearest(plain, BENCHMARKS)}")


# --- our judge ---


@functools.lru_cache(maxsize=1)
def _pool() -> JudgePool:
    pool = JudgePool(workers=1)
    atexit.register(pool.close)
    return pool


@functools.lru_cache(maxsize=4096)
def agrees(answer: str, gold: str, of_units: str = "same") -> bool:
    """Whether our judge, isolated and limited, takes the answer for the gold one. `of_units`: `ScoringRules.units`."""
    if answer.strip() == gold.strip() != "":
        return True
    return bool(
        _pool().judge([(f"<answer>{answer}</answer>", gold)], think="optional", units=of_units)[0]["accuracy"] > 0
    )


def _option(text: str, options: Mapping[str, str], extracted: bool) -> str | None:
    """The letter that a response picks, where the original looks for one in the whole response before it extracts.

    What stands in the answer tags or a box comes first here: in the original the article of "A triangle …" outvotes "<answer>B</answer>".
    """
    answer = text if extracted else paper_extraction(text)
    if answer.strip() and (extracted or answer != text):
        letter = chosen(answer, options, agrees)
        if letter is not None or number(answer) is not None:
            return letter
    return infer_letter(text, options) or chosen(answer, options, agrees)


def _mmk12(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    gold, answer = field("MMK12", row, "answer").strip(), text if extracted else paper_extraction(text)
    letter = bare_letter(answer) or chosen(answer, options_in(field("MMK12", row, "question")), agrees)
    return Verdict(letter or answer, letter is not None and letter == bare_letter(gold))


def _mathvista(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer, gold = text if extracted else paper_extraction(text), mathvista.gold(row)
    choices = items(row.get("choices"))
    if mathvista.question_type(row) == "multi_choice":
        options = {chr(ord("A") + place): choice for place, choice in enumerate(choices)}
        distinct = {chr(ord("A") + choices.index(choice)): choice for choice in choices}
        letter = _option(text, distinct if bare_letter(answer) is None else options, extracted)
        # Of two equal choices (three rows have such) the original takes the first one's letter for the right one.
        return Verdict(letter, gold in choices and letter == chr(ord("A") + choices.index(gold)))
    if optional(row, "answer_type") == "list":
        return Verdict(answer, False)  # the original compares with the text of None
    left, right = number(gold), number(answer)
    if left is not None and right is not None:
        return Verdict(answer, left == right)
    return Verdict(answer, agrees(answer, gold))


def _mathverse_official(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer = text if extracted else paper_extraction(text)
    answer = answer.removeprefix("Extracted Answer: ").strip()
    return Verdict(answer, answer == field("MathVerse", row, "answer").strip())


def _mathverse(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    official = _mathverse_official(row, text, extracted=extracted)
    answer, gold = official.extraction or "", field("MathVerse", row, "answer").strip()
    if official.correct:
        return official
    if optional(row, "question_type").replace("_", "-") == "multi-choice":
        question = optional(row, "question_for_eval") or optional(row, "question")
        options = options_in(question.partition("Choices:")[2] or question)
        letter = chosen(answer, options or dict.fromkeys("ABCD", "\0"), _agrees_converted)
        if (wanted := bare_letter(gold)) is not None:
            return Verdict(answer, letter == wanted)
        if letter in options:  # a gold answer that is an option's text
            return Verdict(answer, agrees(options[letter], gold))
    return Verdict(answer, _agrees_converted(answer, gold))


def _agrees_converted(answer: str, gold: str) -> bool:
    """As MathVerse's authors have it: 50 cm is 0.5 m. A bearing's T may be missing (053^\\circ T), and V may stand for "Volume $=3 $"."""
    answer, gold = (_TRUE_NORTH.sub(r"\1", text) for text in (answer, gold))
    return any(agrees(answer, one, "converted") for one in dict.fromkeys((gold, _CALLED.sub("", gold))))


def _mathvision(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer, gold = text if extracted else paper_extraction(text), field("MathVision", row, "answer").strip()
    options = dict(zip(mathvision.LETTERS, items(row.get("options")), strict=False))
    if options:
        letter = _option(text, options, extracted)
        return Verdict(letter, letter == gold)
    return Verdict(answer, answer.strip().lower() == gold.lower() or agrees(answer, gold))


def _olympiadbench(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """Against all answers together. A unit that the row names may stand with the answer, a tolerance that it gives is granted."""
    answer, golds = text if extracted else paper_extraction(text), olympiadbench.golds(row)
    gold, unit, tolerance = ", ".join(golds), optional(row, "unit").strip().strip("$"), olympiadbench.tolerances(row)
    measured = len(golds) == len(tolerance) == 1 and tolerance[0] > olympiadbench.EXACT
    if len(answer) > _QUANTITY_CHARACTERS or not (unit or measured):
        return Verdict(answer, agrees(answer, gold))
    value, own = units.split(canonical(answer))
    if unit:
        unit = canonical(unit)
        if agrees(answer, f"{gold.strip().strip('$')} {unit}", "converted"):
            return Verdict(answer, True)
        wanted = units.unit(unit)
        if own is not None and own.powers == wanted.powers and own.factor != wanted.factor:  # 5 cm for 5 m
            return Verdict(answer, False)
    near = measured and olympiadbench.near(gold.replace("$", ""), value.replace("$", ""), tolerance[0])
    return Verdict(answer, near or agrees(answer, gold))


def _wemath(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """The authors' letter where the response has their "Answer"; else the tags', the box's or the words'."""
    gold, (_, marked, tail) = field("We-Math", row, "answer").strip(), text.rpartition("Answer")
    if (letter := None if extracted else wemath.extract(text)) is None or not marked:
        options = options_in(field("We-Math", row, "option")) or dict.fromkeys("ABCDE", "\0")
        letter = bare_letter(tail) or _option(text, options, extracted)
    return Verdict(letter, letter == gold)


def _counting_official(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """The demo's own reward: an answer counts behind a closed thought only."""
    if extracted:
        return _counting(row, text, extracted=True)
    found = _pool().judge([(text, field("counting", row, "answer"))], think="required")[0]
    return Verdict(paper_extraction(text), bool(found["accuracy"] > 0))


def _counting(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer = text if extracted else paper_extraction(text)
    return Verdict(answer, agrees(answer, field("counting", row, "answer")))


_OFFICIAL: dict[str, Callable[..., Verdict]] = {
    "mmk12": _mmk12,
    "mathvista": mathvista.judge,
    "mathverse": _mathverse_official,
    "mathvision": mathvision.judge,
    "olympiadbench": olympiadbench.judge,
    "wemath": wemath.judge,
    "counting": _counting_official,
}
_PAPER: dict[str, Callable[..., Verdict]] = {
    "mmk12": _mmk12,
    "mathvista": _mathvista,
    "mathverse": _mathverse,
    "mathvision": _mathvision,
    "olympiadbench": _olympiadbench,
    "wemath": _wemath,
    "counting": _counting,
}
