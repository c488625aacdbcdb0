r"""Which options a multiple-choice answer picks: A, (A), A. 12 cm, 选B, \boxed{A}, ACD, A and C, B is correct …

Letters are never taken out of other words ("bus" is not B), and several letters are a set.
"""

import re

from eureka_megatron.rewards import extract
from eureka_megatron.rewards.normalise import canonical
from eureka_megatron.rewards.structure import parts

_SEPARATOR = r"(?:\s*(?:,|;|/|&|\band\b|\bor\b|[和或及与])\s*|\s+)+"
_ONE = r"[(\[]?\s*[A-Za-z]\s*[)\]]?"
_LISTED = re.compile(rf"[(\[{{]?\s*({_ONE}(?:{_SEPARATOR}{_ONE})*)\s*[)\]}}]?\s*[.,:;!]?", re.IGNORECASE)
_JOINED = re.compile(r"[(\[{]?\s*([A-Z]{2,10})\s*[)\]}]?\.?")
_WORDS = re.compile(r"\b(?:and|or)\b", re.IGNORECASE)
_CALLED = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:options?|choices?|answers?|(?:答案|应|故)?选择?项?)\s*:?\s*(?=[(\[]?[A-Z])|(?<=[A-Z])\s*(?:选项|[两三四]?项|正确)+$|\s+(?:is|are)\s+(?:all\s+)?(?:correct|right|true)$",
    re.IGNORECASE,
)
_WITH_TEXT = re.compile(
    r"[(\[]\s*([A-Za-z])\s*[)\]]\s*\S|([A-Za-z])\s*[.:)]\s*\S|([A-Z])(?:[\s,]\s*[\d\\$-]|\s*,\s*[a-z]+ [a-z])"
)
_MORE_OPTIONS = re.compile(r"(?<![A-Za-z\\])[(\[]?([A-Z])\s*[.:)]\s")
_STANDALONE = re.compile(r"(?<![A-Za-z\d\\'_^=+*/-])([A-Z])(?![A-Za-z\d'_^=+*/])")
_ARTICLE = re.compile(r"(?<![A-Za-z])A (?!is\b|are\b|and\b|or\b|because\b|since\b|as\b|matches\b|fits\b)[a-z]")
_CHOSEN = re.compile(r"(?:答案|选项|故选|应选|选)[是为:\s]*([A-Z])\.?")
_CLAUSE = re.compile(r"[,;.]\s*(?!\d)|\b(?:but|so|while|whereas)\b")


def letters(span: str) -> frozenset[str] | None:
    """Upper-case letters of the options that the text between the answer tags picks, or None when it picks none."""
    said = extract.settled(span)
    if len(said) > extract.MAX_STATEMENT_CHARACTERS:
        said = extract.sentences(said)[-1]
    for reading in extract.readings(span):
        reading = _CALLED.sub("", reading).replace("*", "").replace(")(", ") (").strip(" \"'")
        if (picked := _listed(reading)) is not None:
            return picked
        if match := _WITH_TEXT.match(reading):
            return frozenset([next(filter(None, match.groups())).upper(), *_MORE_OPTIONS.findall(reading)])
    if extract.boxes(said) or len(said) > extract.MAX_STATEMENT_CHARACTERS:
        return None
    clauses = [clause for clause in _CLAUSE.split(canonical(extract.undelimited(said))) if not extract.denies(clause)]
    articles = _ARTICLE.sub("", " , ".join(clauses))
    standing = set(_STANDALONE.findall(articles)) - {"I"}
    return frozenset(standing) if len(standing) == 1 else None


def _listed(text: str) -> frozenset[str] | None:
    """A, (b), A, C and D, (A) (C), ACD; None for anything else, a word or a letter that comes twice among them."""
    if match := _JOINED.fullmatch(text):
        return frozenset(match[1]) if len(set(match[1])) == len(match[1]) else None
    match = _LISTED.fullmatch(text)
    return frozenset(re.findall("[A-Z]", _WORDS.sub(" ", match[1]).upper())) if match else None


def gold_letters(gold: str) -> frozenset[str] | None:
    """The options a gold answer names, or None when it is no option: one capital, capitals in order, A,C, (A), A. text."""
    text = canonical(gold).replace(")(", ") (")
    text = re.sub(r"(?<=[(\[]) | (?=[)\]])", "", text)
    if parts(text):  # (I) 2; (II) 3
        return None
    if re.fullmatch(r"[(\[]?[A-Ja-df-h][)\]]?\.?", text):
        return _listed(text)
    if (match := _JOINED.fullmatch(text)) and list(match[1]) == sorted(set(match[1])) and match[1][-1] <= "J":
        return frozenset(match[1])
    listed = _listed(text) or frozenset() if re.search(r"[A-Z]", text) and _LISTED.fullmatch(text) else frozenset()
    if len(listed) > 1 and max(listed) <= "J":
        return listed
    match = re.match(r"[(\[]?([A-J])[)\].:]\s*\S", text) or _CHOSEN.fullmatch(text)
    return frozenset(match[1]) if match else None
