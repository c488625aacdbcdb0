"""Two verdicts on a response: by the benchmark's authors, and by the original's procedure with our judge in place of its GPT-4o.

| benchmark | official | paper |
|---|---|---|
| MMK12 | none; as paper | its extraction, then one letter, else the text of one option |
| MathVista | `mathvista` | a letter by `infer_letter`; numbers as numbers; lists are never right |
| MathVerse | equal strings (the authors' quick match) | equal strings, the option's letter or text, else our judge |
| MathVision | `mathvision` | a letter by `infer_letter`, else our judge |
| OlympiadBench | `olympiadbench` | our judge, against all answers together |
| We-Math | `wemath` | the original's code has none: as official, else a letter by `infer_letter` |
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
from eureka_megatron.evaluation.verdict import Row, Verdict, field, items, number
from eureka_megatron.rewards.judge import JudgePool

BENCHMARKS = ("mmk12", "mathvista", "mathverse", "mathvision", "olympiadbench", "wemath", "counting")
_OPTION = re.compile(r"(?:^|(?<=[\s;；]))[(（]?([A-H])\s*[.、:：．)）]")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")


def judge_official(benchmark: str, row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """The authors' verdict, by their rules alone (no language model).

    Args:
        benchmark: one of BENCHMARKS; case, spaces and hyphens do not matter.
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
    return rules[named(benchmark)](row, text, extracted=extracted)


def named(benchmark: str) -> str:
    """One of BENCHMARKS, from any spelling. Raises ConfigError."""
    name = re.sub(r"[\s_-]", "", benchmark).lower()
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {benchmark!r} is unknown{nearest(name, BENCHMARKS)}")
    return name


# --- our judge ---


@functools.lru_cache(maxsize=1)
def _pool() -> JudgePool:
    pool = JudgePool(workers=1)
    atexit.register(pool.close)
    return pool


@functools.lru_cache(maxsize=4096)
def agrees(answer: str, gold: str) -> bool:
    """Whether our judge, isolated and limited, takes the answer for the gold one."""
    if answer.strip() == gold.strip() != "":
        return True
    return bool(_pool().judge([(f"<answer>{answer}</answer>", gold)], think="optional")[0]["accuracy"] > 0)


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


def _letter(answer: str) -> str | None:
    """The one letter that an answer is. Examples: "(B)", "\\text{B}.", "B" → "B"."""
    bare = _WRAPPED.sub(r"\1", answer).strip(" \n()[]{}.．。:：*$")
    return bare.upper() if len(bare) == 1 and bare.upper() in "ABCDEFGH" else None


def _mmk12(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    gold, answer = field("MMK12", row, "answer").strip(), text if extracted else paper_extraction(text)
    letter = _letter(answer)
    if letter is None:
        options = options_in(field("MMK12", row, "question"))
        named = re.match(r"\s*\(?([A-H])[).．.、:：]\s*(.*)", answer, re.DOTALL)
        plain = " ".join((named[2] if named else answer).split()).lower()
        same = [name for name, option in options.items() if " ".join(option.split()).lower() == plain]
        letter = (
            same[0] if len(same) == 1 else named[1] if named else infer_letter(answer, options) if options else None
        )
    return Verdict(letter or answer, letter is not None and letter == _letter(gold))


def _mathvista(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer, gold = text if extracted else paper_extraction(text), field("MathVista", row, "answer")
    choices = items(row.get("choices"))
    if mathvista.question_type(row) == "multi_choice":
        options = {chr(ord("A") + place): choice for place, choice in enumerate(choices)}
        letter = infer_letter(text, options) or infer_letter(answer, options)
        return Verdict(letter, letter is not None and gold in choices and letter == chr(ord("A") + choices.index(gold)))
    if row.get("answer_type") == "list":
        return Verdict(answer, False)  # the original compares with the text of None
    left, right = number(gold), number(answer)
    if left is not None and right is not None:
        whole = row.get("answer_type") == "integer"
        return Verdict(answer, left == right and (not whole or right == int(right)))
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
    if row.get("question_type") == "multi-choice" and (wanted := _letter(gold)) is not None:
        question = str(row.get("question_for_eval") or row.get("question") or "")
        options = options_in(question.partition("Choices:")[2])
        letter = _letter(answer) or infer_letter(answer, options or dict.fromkeys("ABCD", "\0"))
        return Verdict(answer, letter == wanted)
    return Verdict(answer, agrees(answer, gold))


def _mathvision(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer, gold = text if extracted else paper_extraction(text), field("MathVision", row, "answer")
    options = dict(zip(mathvision.LETTERS, items(row.get("options")), strict=False))
    if options:
        letter = infer_letter(text, options) or _letter(answer) or infer_letter(answer, options)
        return Verdict(letter, letter == gold)
    return Verdict(answer, answer.strip().lower() == gold.strip().lower() or agrees(answer, gold))


def _olympiadbench(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer, golds = text if extracted else paper_extraction(text), items(row.get("final_answer"))
    if not golds:
        field("OlympiadBench", row, "final_answer")
    return Verdict(answer, agrees(answer, ", ".join(golds)))


def _wemath(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    official = wemath.judge(row, text, extracted=extracted)
    if official.extraction is not None:
        return official
    answer = text if extracted else paper_extraction(text)
    options = options_in(field("We-Math", row, "option")) or dict.fromkeys("ABCDE", "\0")
    letter = _letter(answer) or infer_letter(answer, options)
    return Verdict(letter, letter == field("We-Math", row, "answer"))


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
