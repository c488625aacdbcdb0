"""The reward of one response: accuracy, form, penalties, and their weighted total."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from eureka_megatron.rewards import format as form
from eureka_megatron.rewards.examine import Verdict, examine
from eureka_megatron.rewards.length import Penalties

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


@dataclass(frozen=True, kw_only=True)
class ScoringRules(Penalties):
    """How responses are scored, penalties included.

    Attributes:
        compat: "mm_eureka": the original's rules, defects included (ALGORITHMS.md lists them).
        think: "required" | "optional": whether the form needs a <think> part.
        strict_ends: the form forbids text outside the tags.
        untagged: without a complete <answer> pair: "reject" gives 0, "boxed" judges the last \\boxed{} (evaluation).
        decimals: "exact" | "rounded": a decimal of at least four places equals the value that it rounds.
        units: "same" | "converted": 1 m equals 100 cm; a missing unit is forgiven in both.
        weights: of accuracy, format, repetition, overlong; what is missing keeps DEFAULT_WEIGHTS.

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
    parts |= rules.penalties(response, length_tokens, weight)
    # Accuracy stays the bare verdict, which the online filter compares with its bounds; its weight acts on the total.
    total = sum(parts.values()) + (weight["accuracy"] - 1) * accuracy
    return {**parts, "total": total, **({"stage": verdict.stage, "why": verdict.why} if explain else {})}
