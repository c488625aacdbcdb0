"""Penalties on how a response is written: repetition and over-length. Both are <= 0 and are added to the total."""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

_LONGEST_WORD_CHARACTERS = 100  # formulas and addresses stay one item; what is longer may be a loop without blanks
_PIECE_CHARACTERS = 4
_CHARACTER_SCRIPTS = "\u2e80-\u2fff\u3001-\u312f\u3190-\ua4cf\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff"
_PIECE_SCRIPTS = "\u0e00-\u109f\u1780-\u17ff"
_ITEM = re.compile(
    f"[{_CHARACTER_SCRIPTS}]|[{_PIECE_SCRIPTS}]{{1,{_PIECE_CHARACTERS}}}|[^\\s{_CHARACTER_SCRIPTS}{_PIECE_SCRIPTS}]+"
)


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Which penalties enter the total.

    Attributes:
        repetition: largest penalty for repeated n-grams of `repetition_ngram` items; 0: none.
        overlong_buffer_tokens: DAPO's penalty grows over the last so many tokens before `max_response_tokens`; 0: none.
    """

    repetition: float = 0.0
    repetition_ngram: int = 20
    overlong_buffer_tokens: int | None = None
    max_response_tokens: int | None = None

    def penalties(self, response: str, length_tokens: int | None, weights: Mapping[str, float]) -> dict[str, float]:
        """ "repetition" and "overlong", weighted, both <= 0; only those that are asked for."""
        parts, most, buffer = {}, self.max_response_tokens, self.overlong_buffer_tokens
        if self.repetition:
            penalty = repetition_penalty(response, max_penalty=self.repetition, ngram=self.repetition_ngram)
            parts["repetition"] = weights["repetition"] * penalty
        if length_tokens is not None and most is not None and buffer:
            penalty = overlong_penalty(length_tokens, max_response_tokens=most, buffer_tokens=buffer)
            parts["overlong"] = weights["overlong"] * penalty
        return parts


def repetition_penalty(tokens: str | Sequence[Hashable], *, max_penalty: float, ngram: int = 20) -> float:
    """-max_penalty times the share of repeated n-grams: 0 when all are different, near -max_penalty when all are one.

    tokens: token ids, or text. Fewer than `ngram` items: 0. An item of text is, by its script,
        Chinese, Japanese, Yi               a character or punctuation mark
        Thai, Lao, Burmese, Khmer, Tibetan  4 characters, about a word, from where the script begins
        any other, Korean among them        a word, number or formula up to the next blank or script of the lines above;
                                            one of more than 100 characters counts as pieces of 4
    """
    items = _items(tokens) if isinstance(tokens, str) else tokens
    total = len(items) - ngram + 1
    if total < 1 or max_penalty == 0:
        return 0.0
    grams = zip(*(islice(items, start, None) for start in range(ngram)), strict=False)
    # 64 bits of each: the n-grams of a megabyte would fill 100 megabytes and more.
    distinct = len(set(map(hash, grams)))
    return -max_penalty * (1 - distinct / total)


def _items(text: str) -> list[str]:
    items: list[str] = []
    for word in _ITEM.findall(text):
        if len(word) <= _LONGEST_WORD_CHARACTERS:
            items.append(word)
        else:
            items += (word[start : start + _PIECE_CHARACTERS] for start in range(0, len(word), _PIECE_CHARACTERS))
    return items


def overlong_penalty(length_tokens: int, *, max_response_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft over-long punishment (arXiv:2503.14476, eq. 13): 0 up to max - buffer, linear to -1 at max, then -1."""
    if not 0 < buffer_tokens <= max_response_tokens:
        raise ValueError(f"buffer_tokens must lie in 1..{max_response_tokens}, got {buffer_tokens}")
    excess_tokens = length_tokens - (max_response_tokens - buffer_tokens)
    return -min(max(excess_tokens / buffer_tokens, 0.0), 1.0)
