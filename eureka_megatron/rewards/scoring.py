"""The reward of one response: accuracy, form, penalties, and their weighted total."""

from collections.abc import Mapping
from typing import Any

from eureka_megatron.rewards import format as form
from eureka_megatron.rewards import length
from eureka_megatron.rewards.examine import Verdict, examine

DEFAULT_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 0.5, "repetition": 1.0, "overlong": 1.0}
_CHOICES = {
    "compat": (None, "mm_eureka"),
    "untagged": ("reject", "boxed"),
    "decimals": ("exact", "rounded"),
    "units": ("same", "converted"),
}


def score(
    response: str,
    answer: object,
    *,
    compat: str | None = None,
    think: str = "required",
    strict_ends: bool = False,
    untagged: str = "reject",
    decimals: str = "exact",
    units: str = "same",
    weights: Mapping[str, float] | None = None,
    repetition: float = 0.0,
    repetition_ngram: int = 20,
    length_tokens: int | None = None,
    max_response_tokens: int | None = None,
    overlong_buffer_tokens: int | None = None,
    query: str | None = None,
    explain: bool = False,
) -> dict[str, Any]:
    """Rewards of one response: accuracy in {0, 1}, the other components as they enter the total, and the total.

    response      what the model wrote, without the prompt; end tokens may be there
    answer        the gold answer, any JSON value
    compat        "mm_eureka": the original's rules, defects included (ALGORITHMS.md lists them)
    think         "required" | "optional": whether the form needs a <think> part
    strict_ends   the form forbids text outside the tags
    untagged      without a complete <answer> pair: "reject" gives 0, "boxed" judges the last \\boxed{} (evaluation)
    decimals      "exact" | "rounded": a decimal of at least four places equals the value that it rounds
    units         "same" | "converted": 1 m equals 100 cm; a missing unit is forgiven in both
    weights       of accuracy, format, repetition, overlong; what is missing keeps DEFAULT_WEIGHTS
    repetition    largest repetition penalty (0: off); adds the component "repetition", <= 0
    length_tokens, max_response_tokens, overlong_buffer_tokens   all three: adds the component "overlong", <= 0
    query         the whole chat text, under compat only: the original cuts the response out of it
    explain       adds "stage" and "why": which stage of the judge gave the accuracy (docs/rewards.md), in words

    Example: score("<think>2+2</think><answer>4</answer>", "4") gives {"accuracy": 1.0, "format": 0.5, "total": 1.5}.
    """
    for name, value in (("compat", compat), ("untagged", untagged), ("decimals", decimals), ("units", units)):
        if value not in _CHOICES[name]:
            known = " or ".join(repr(choice) for choice in _CHOICES[name])
            raise ValueError(f"unknown {name} {value!r}; known: {known}")
    weight = {**DEFAULT_WEIGHTS, **(weights or {})}
    if compat == "mm_eureka":
        from eureka_megatron.rewards import mm_eureka

        accuracy, well_formed = mm_eureka.judge(response, answer, query)
        verdict = Verdict(bool(accuracy), "mm_eureka", "the original's rules")
    else:
        verdict = examine(
            response, answer, untagged=untagged, rounded=decimals == "rounded", converted=units == "converted"
        )
        well_formed = form.is_well_formed(response, think=think, strict_ends=strict_ends)
    accuracy = float(verdict.right)
    parts = {"accuracy": accuracy, "format": weight["format"] * float(well_formed)}
    if repetition:
        penalty = length.repetition_penalty(response, max_penalty=repetition, ngram=repetition_ngram)
        parts["repetition"] = weight["repetition"] * penalty
    if length_tokens is not None and max_response_tokens is not None and overlong_buffer_tokens is not None:
        penalty = length.overlong_penalty(
            length_tokens, max_response_tokens=max_response_tokens, buffer_tokens=overlong_buffer_tokens
        )
        parts["overlong"] = weight["overlong"] * penalty
    # Accuracy stays the bare verdict, which the online filter compares with its bounds; its weight acts on the total.
    total = sum(parts.values()) + (weight["accuracy"] - 1) * accuracy
    return {**parts, "total": total, **({"stage": verdict.stage, "why": verdict.why} if explain else {})}
