"""The reward of one response: accuracy, form, penalties, and their weighted total."""

from collections.abc import Mapping

from eureka_megatron.rewards import format as form
from eureka_megatron.rewards import length
from eureka_megatron.rewards.examine import examine

DEFAULT_WEIGHTS: Mapping[str, float] = {"accuracy": 1.0, "format": 0.5, "repetition": 1.0, "overlong": 1.0}


def score(
    response: str,
    answer: object,
    *,
    compat: str | None = None,
    think: str = "required",
    strict_ends: bool = False,
    untagged: str = "reject",
    weights: Mapping[str, float] | None = None,
    repetition: float = 0.0,
    repetition_ngram: int = 20,
    length_tokens: int | None = None,
    max_response_tokens: int | None = None,
    overlong_buffer_tokens: int | None = None,
    query: str | None = None,
) -> dict[str, float]:
    """Rewards of one response: accuracy in {0, 1}, the other components as they enter the total, and the total.

    response      what the model wrote, without the prompt; end tokens may be there
    answer        the gold answer, any JSON value
    compat        "mm_eureka": the original's rules, defects included (ALGORITHMS.md lists them)
    think         "required" | "optional": whether the form needs a <think> part
    strict_ends   the form forbids text outside the tags
    untagged      without a complete <answer> pair: "reject" gives 0, "boxed" judges the last \\boxed{} (evaluation)
    weights       of accuracy, format, repetition, overlong; what is missing keeps DEFAULT_WEIGHTS
    repetition    largest repetition penalty (0: off); adds the component "repetition", <= 0
    length_tokens, max_response_tokens, overlong_buffer_tokens   all three: adds the component "overlong", <= 0
    query         the whole chat text, under compat only: the original cuts the response out of it

    Example: score("<think>2+2</think><answer>4</answer>", "4") gives {"accuracy": 1.0, "format": 0.5, "total": 1.5}.
    """
    weight = {**DEFAULT_WEIGHTS, **(weights or {})}
    if compat == "mm_eureka":
        from eureka_megatron.rewards import mm_eureka

        accuracy, well_formed = mm_eureka.judge(response, answer, query)
    elif compat is None:
        accuracy = float(is_right(response, answer, untagged=untagged))
        well_formed = form.is_well_formed(response, think=think, strict_ends=strict_ends)
    else:
        raise ValueError(f"unknown compat {compat!r}; known: 'mm_eureka' or None")
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
    return {**parts, "total": sum(parts.values()) + (weight["accuracy"] - 1) * accuracy}


def is_right(response: str, answer: object, *, untagged: str = "reject") -> bool:
    """Whether the response's answer is right, as a fair examiner would say."""
    if untagged not in ("reject", "boxed"):
        raise ValueError(f"untagged must be 'reject' or 'boxed', got {untagged!r}")
    return examine(response, answer, untagged=untagged).right
