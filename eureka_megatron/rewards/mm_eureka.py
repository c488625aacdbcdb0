"""The original's reward, for `compat="mm_eureka"`: its rules as golden/README.md puts them in words, defects included.

Written from those rules and checked against recorded outputs. Known defects kept: no answer tags judges everything,
an unparseable gold gives 1, verify is called with its arguments reversed, tags stay glued to the answer text, only A-D
are options and any text that holds the gold letter and no other of a-d is right.
"""

import re

from eureka_megatron.rewards import format as form
from eureka_megatron.rewards.extract import strip_end_tokens

_ASSISTANT = "<|im_start|>assistant\n"
_OPTIONS = "abcd"
# The patterns inside math-verify are quadratic and worse in the number of dollars; an answer has no use for more.
_MAX_CHARACTERS = 20_000


def judge(response: str, answer: object, query: str | None = None) -> tuple[float, bool]:
    """(accuracy, well formed) as the original computes them."""
    if query is not None:
        _, marker, response = query.partition(_ASSISTANT)
        if not marker:
            return 0.0, False
    response = strip_end_tokens(response)
    if not response:
        return 0.0, False
    return _accuracy(response, answer), form.is_well_formed(response)


def _accuracy(response: str, answer: object) -> float:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    one_line = re.search(r"<answer>.*?</answer>", response) if len(response) <= 10 * _MAX_CHARACTERS else None
    text = one_line[0] if one_line else response.rsplit("<answer>", 1)[-1]
    gold = parse(f"${answer}$", parsing_timeout=None)
    if not gold:
        return 1.0
    if len(text) > _MAX_CHARACTERS:
        return 0.0
    kinds = [StringExtractionConfig(), LatexExtractionConfig(), ExprExtractionConfig()]
    prediction = parse(text, extraction_config=kinds, parsing_timeout=None)
    if verify(prediction, gold, timeout_seconds=None):
        return 1.0
    student = text.replace("<answer>", "").replace("</answer>", "").strip().lower()
    for value in gold:
        letter = str(value).lower()
        is_option = len(letter) == 1 and letter in _OPTIONS
        if is_option and letter in student and not any(other in student for other in _OPTIONS if other != letter):
            return 1.0
    return 0.0
