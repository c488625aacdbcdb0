"""The reward of one response: accuracy, form, penalties, and their weighted total."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from eureka_megatron.rewards import format as form
from eureka_megatron.rewards import length
from eureka_megatron.rewards.examine import Verdict, examine
from eureka_megatron.rewards.response import Rewards

DEFAULT_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 0.5, "repetition": 1.0, "overlong": 1.0}
_CHOICES = {
    "compat": (None, "mm_eureka"),
    "untagged": ("reject", "boxed"),
    "decimals": ("exact", "rounded"),
    "units": ("same", "converted"),
}


class ScoringOptions(TypedDict, total=False):
    """The fields of `ScoringRules`, as keywords of `score`."""

    compat: str | None
    think: str
    strict_ends: bool
    untagged: str
    decimals: str
    units: str
    weights: Mapping[str, float] | None
    repetition: float
    repetition_ngram: int
    max_response_tokens: int | None
    overlong_buffer_tokens: int | None


@dataclass(frozen=True)
class ScoringRules:
    """How responses are scored.

    Attributes:
        compat: "mm_eureka": the original's rules, defects included (ALGORITHMS.md lists them).
        think: "required" | "optional": whether the form needs a <think> part.
        strict_ends: the form forbids text outside the tags.
        untagged: without a complete <answer> pair: "reject" gives 0, "boxed" judges the last \\boxed{} (evaluation).
        decimals: "exact" | "rounded": a decimal of at least four places equals the value that it rounds.
        units: "same" | "converted": 1 m equals 100 cm; a missing unit is forgiven in both.
        weights: of accuracy, format, repetition, overlong; what is missing keeps DEFAULT_WEIGHTS.
        repetition: largest penalty for repeated n-grams of `repetition_ngram` items (see rewards.length); 0: none.
        overlong_buffer_tokens: DAPO's penalty grows over the last so many tokens before `max_response_tokens`.

    Raises:
        ValueError: a choice is none of those above.
    """

    compat: str | None = None
    think: str = "required"
    strict_ends: bool = False
    untagged: str = "reject"
    decimals: str = "exact"
    units: str = "same"
    weights: Mapping[str, float] | None = None
    repetition: float = 0.0
    repetition_ngram: int = 20
    max_response_tokens: int | None = None
    overlong_buffer_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"unknown {name} {value!r}; known: {' or '.join(map(repr, choices))}")


def score(
    response: str,
    answer: object,
    *,
    rules: ScoringRules | None = None,
    length_tokens: int | None = None,
    query: str | None = None,
    explain: bool = False,
    **options: Unpack[ScoringOptions],
) -> dict[str, Any]:
    """Rewards of one response: accuracy in {0, 1}, the other components as they enter the total, and the total.

    Example: score("<think>2+2</think><answer>4</answer>", "4") gives {"accuracy": 1.0, "format": 0.5, "total": 1.5}.

    Args:
        response: what the model wrote, without the prompt; end tokens may be there.
        answer: the gold answer, any JSON value.
        rules: or, in its place, its fields as keywords.
        length_tokens: of the response, for the penalty "overlong".
        query: the whole chat text, under compat only: the original cuts the response out of it.
        explain: adds "stage" and "why": which stage of the judge gave the accuracy (docs/rewards.md), in words.

    Raises:
        TypeError: an unknown keyword, or both rules and keywords.
        ValueError: an option has an unknown value.
    """
    if rules is not None and options:
        raise TypeError(f"score() takes rules or their fields, not both: {', '.join(options)}")
    rules = rules or ScoringRules(**options)
    weight = {**DEFAULT_WEIGHTS, **(rules.weights or {})}
    if rules.compat == "mm_eureka":
        from eureka_megatron.rewards import mm_eureka

        accuracy, well_formed = mm_eureka.judge(response, answer, query)
        verdict = Verdict(bool(accuracy), "mm_eureka", "the original's rules")
    else:
        rounded, converted = rules.decimals == "rounded", rules.units == "converted"
        verdict = examine(response, answer, untagged=rules.untagged, rounded=rounded, converted=converted)
        well_formed = form.is_well_formed(response, think=rules.think, strict_ends=rules.strict_ends)
    accuracy = float(verdict.right)
    parts = {"accuracy": accuracy, "format": weight["format"] * float(well_formed)}
    parts |= penalties(response, length_tokens, rules)
    # Accuracy stays the bare verdict, which the online filter compares with its bounds; its weight acts on the total.
    total = sum(parts.values()) + (weight["accuracy"] - 1) * accuracy
    return {**parts, "total": total, **({"stage": verdict.stage, "why": verdict.why} if explain else {})}


def penalties(response: str, length_tokens: int | None, rules: ScoringRules) -> Rewards:
    """ "repetition" and "overlong" as they enter the total, both <= 0; only those that the rules ask for."""
    weight, parts = {**DEFAULT_WEIGHTS, **(rules.weights or {})}, {}
    if rules.repetition:
        penalty = length.repetition_penalty(response, max_penalty=rules.repetition, ngram=rules.repetition_ngram)
        parts["repetition"] = weight["repetition"] * penalty
    most, buffer = rules.max_response_tokens, rules.overlong_buffer_tokens
    if length_tokens is not None and most is not None and buffer is not None:
        penalty = length.overlong_penalty(length_tokens, max_response_tokens=most, buffer_tokens=buffer)
        parts["overlong"] = weight["overlong"] * penalty
    return parts
