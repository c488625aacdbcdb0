"""Does a response keep the agreed form: one <think> part, then one <answer> part (MM-EUREKA's format reward).

Searches by position only: no regular expression that could run away on a megabyte of tags.
"""

THINK_MODES = ("required", "optional")


def is_well_formed(response: str, *, think: str = "required", strict_ends: bool = False) -> bool:
    """Exactly one <think>…</think>, then with only white space between exactly one <answer>…</answer>, both non-empty.

    think        "required", or "optional" (the 32B prompt has no think part): a response without any think tag needs
                 just the answer pair; a response with one is held to the whole form
    strict_ends  forbid text before the first and after the last tag

    As in the original, a blank counts as content and text around the tags is allowed.
    """
    if think not in THINK_MODES:
        raise ValueError(f"think must be one of {', '.join(THINK_MODES)}, got {think!r}")
    answer = _single_pair(response, "answer")
    if answer is None:
        return False
    start, end = answer
    if not (think == "optional" and "<think>" not in response and "</think>" not in response):
        thought = _single_pair(response, "think")
        if thought is None or thought[1] > start or response[thought[1] : start].strip():
            return False
        start = thought[0]
    return not strict_ends or not (response[:start].strip() or response[end:].strip())


def _single_pair(response: str, tag: str) -> tuple[int, int] | None:
    """Start and end of the only <tag>…</tag>, tags included; None unless each tag occurs once and encloses something."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if response.count(opening) != 1 or response.count(closing) != 1:
        return None
    start, stop = response.index(opening), response.index(closing)
    return (start, stop + len(closing)) if stop > start + len(opening) else None
