"""Words: whether canonical text is (partly) words, and whether two texts are the same words."""

import functools
import itertools
import re

_GENOTYPE = re.compile(r"(?:([A-Za-z])(?i:\1))+")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_CHEMICAL = re.compile(r"(?:(?:^|[+=])?\d*(?:[A-Z][a-z]?|[()])(?:_\{?\d{1,3}\}?|\d{1,3})?){1,30}")
_ARROW = re.compile(r"\\(?:rightarrow|to|longrightarrow)(?![a-z])|=+")
_CHARGE = re.compile(r"\^\s*\{?\d?[-+]\}?|\\(?:up|down)arrow(?![a-z])")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]*\}|\\[a-zA-Z]+")
_NAMED = re.compile(r"\\(?:angle|triangle|overline|overrightarrow|vec|odot|widehat|square)\s*\{?\s*[A-Za-z]+'?")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|[A-Za-z0-9])")
_AND_OR = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[或和且与及]")
_CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")
_RUN = re.compile(r"[A-Za-z]{2,}")
_SIGNED = re.compile(r"-?\d+(?:\.\d+)?|[<>=≠]|\\[a-z]+")
# Runs of three and more letters are words, unless they are a product of usual variables.
_PRODUCTS = tuple(frozenset(group) for group in ("abc", "xyz", "pqr", "mnk", "ijk", "rst"))
_SHORT_WORDS = {"no", "up", "on", "is", "it", "to", "of", "we", "he"}


@functools.lru_cache(maxsize=8192)
def is_wordy(text: str) -> bool:
    """Whether the answer is (partly) a word, to be compared as text: never a product of letters (AAS is not ASA)."""
    text = _AND_OR.sub(" ", text)
    if _CJK.search(text):
        return True
    for run in _RUN.findall(_COMMAND.sub(" ", _NAMED.sub(" ", _SUBSCRIPT.sub(" ", text)))):
        if run.casefold() in _SHORT_WORDS or (len(run) >= 3 and not any(frozenset(run) <= p for p in _PRODUCTS)):
            return True
    return False


def same(gold: str, prediction: str) -> bool:
    """Equal up to blanks, and for words up to letter case; a genotype or formula keeps its case."""
    left, right = _SPACE.sub("", gold), _SPACE.sub("", prediction)
    if left == right:
        return bool(left)
    if is_reaction(left) and is_reaction(right):  # in any order of what reacts, and of what it gives
        return _reaction(left) == _reaction(right)
    if _CHEMICAL.fullmatch(left) and _CHEMICAL.fullmatch(right) and "_" in left + right:
        return re.sub(r"[_{}]", "", left) == re.sub(r"[_{}]", "", right)  # H_2O and H2O
    if left.casefold() != right.casefold() or not is_wordy(gold):
        return False
    return all(_natural_case(word) for word in itertools.chain(gold.split(), prediction.split()))


def is_reaction(text: str) -> bool:
    """2H_2+O_2=2H_2O."""
    text = _ARROW.sub("=", text.replace(" ", ""))
    has_counts = re.search(r"[A-Za-z](?:_?\{?\d|\^\{?\d?[-+])", text)
    return "+" in text and "=" in text and bool(has_counts) and bool(_CHEMICAL.fullmatch(_CHARGE.sub("", text)))


def _reaction(text: str) -> list[list[str]]:
    sides = _ARROW.sub("=", _CHARGE.sub(lambda charge: charge[0].replace("+", "p"), text.replace(" ", ""))).split("=")
    return [sorted(re.sub(r"[_{}^]", "", side).split("+")) for side in sides]


def _natural_case(word: str) -> bool:
    letters = re.sub(r"[^A-Za-z]", "", word)
    if len(letters) > 1 and _GENOTYPE.fullmatch(letters):
        return False
    return letters.islower() or letters.isupper() or letters.istitle() or not letters


def same_words(gold: str, prediction: str) -> bool:
    """Equal words up to articles, markup and punctuation; numbers in them keep their sign: slope 2 is not slope -2."""
    return _SIGNED.findall(gold) == _SIGNED.findall(prediction) and same(_bare(gold), _bare(prediction))


def _bare(text: str) -> str:
    text = " ".join(re.sub(r"[{}\\_$\"',;:.!?()-]", " ", text).split())
    text = re.sub(r"^(?:an?|the)\s+(?=[A-Za-z]{2})|(?<=[A-Za-z]{3})(?<!s)s\b", "", text, flags=re.IGNORECASE)
    return re.sub(r"(?<=[\u4e00-\u9fff])[的内]$|(?<=能)够$", "", text)
