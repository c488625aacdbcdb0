"""Penalties on how a response is written: repetition and over-length. Both are <= 0 and are added to the total."""

import re
from collections.abc import Hashable, Sequence

# Han, kana, their punctuation, Thai, Lao, Burmese, Khmer.
_WITHOUT_BLANKS = r"\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_ITEM = re.compile(rf"[{_WITHOUT_BLANKS}]|[^\s{_WITHOUT_BLANKS}]{{1,40}}(?![^\s{_WITHOUT_BLANKS}])|\S")


def repetition_penalty(tokens: str | Sequence[Hashable], *, max_penalty: float, ngram: int = 20) -> float:
    """-max_penalty times the share of repeated n-grams: 0 when all are different, near -max_penalty when all are one.

    tokens: token ids, or text. An item of text is a word where words stand between blanks (English, Korean, Vietnamese …),
    and a character where they do not (Chinese, Japanese, Thai, Lao, Khmer, Burmese); of a word of more than 40
    characters, which no language has, every character is one: "1+1+1+1…", "abcabcabc…". Fewer than `ngram` items: 0.
    """
    items = _ITEM.findall(tokens) if isinstance(tokens, str) else list(tokens)
    total = len(items) - ngram + 1
    if total < 1 or max_penalty == 0:
        return 0.0
    distinct = len({hash(tuple(items[start : start + ngram])) for start in range(total)})
    return -max_penalty * (1 - distinct / total)


def overlong_penalty(length_tokens: int, *, max_response_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft over-long punishment (arXiv:2503.14476, eq. 13): 0 up to max - buffer, linear to -1 at max, then -1."""
    if not 0 < buffer_tokens <= max_response_tokens:
        raise ValueError(f"buffer_tokens must lie in 1..{max_response_tokens}, got {buffer_tokens}")
    excess_tokens = length_tokens - (max_response_tokens - buffer_tokens)
    return -min(max(excess_tokens / buffer_tokens, 0.0), 1.0)
