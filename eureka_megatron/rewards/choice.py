"""Which options a multiple-choice answer picks: A, (A), A., A. 12 cm, 选B, \\boxed{A}, ACD, A and C …

Letters are never taken out of other words ("bus" is not B), and beyond D too. Several letters are a set.
"""

import re

from eureka_megatron.rewards.extract import boxes, unboxed, undelimited
from eureka_megatron.rewards.normalise import canonical

_SEPARATOR = r"(?:\s*(?:,|;|/|&|\band\b|\bor\b|和|或|及|与)\s*|\s+)"
_ONE = r"[(\[]?\s*[A-Za-z]\s*[)\]]?"
_ALONE = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?\s*[.,:;!]?")
_LISTED = re.compile(rf"[(\[{{]?\s*({_ONE}(?:{_SEPARATOR}(?:and\s+|or\s+)?{_ONE})+)\s*[)\]}}]?\.?", re.IGNORECASE)
_JOINED = re.compile(r"[(\[{]?\s*([A-Z]{2,10})\s*[)\]}]?\.?")
_WITH_TEXT = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]\s*\S|([A-Za-z])\s*[.:)]\s*\S|([A-Z])\s+[\d\\$-]")
_MORE_OPTIONS = re.compile(r"(?<![A-Za-z\\])[(\[]?([A-Z])\s*[.:)]\s")
_PREFIXED = re.compile(
    r"(?:(?:answer|option|choice|choose|select|pick)s?\s*(?:is|are|would be|should be)?|答案|选择|选项|故选|应选|选|為|为|是)"
    r"\s*[:]?\s*(?:option\s+|choice\s+|选项?|是|为)*\s*[(\[]?\s*([A-Za-z])\s*[)\]]?(?![A-Za-z\d'])"
    r"((?:\s*(?:,|;|&|and\b|or\b|和|或|\s)+\s*[(\[]?(?:[B-Z]|A(?=\s*(?:[,.;)]|$)))[)\]]?(?![A-Za-z\d']))*)",
    re.IGNORECASE,
)
_PREFIXED_JOINED = re.compile(
    r"(?:[Aa]nswers?|[Oo]ptions?|[Cc]hoices?|答案|选择|选项|故选|应选|选)\s*(?:is|are|为|是)?\s*:?\s*[(\[]?"
    r"(?=[A-H]{2,8}(?![A-Za-z\d]))(?!\w*([A-H])\w*\1)([A-H]{2,8})"
)
_RULED_OUT = re.compile(r"\s*(?:is|are)\s+(?:not|wrong|incorrect|false|n't)|\s*(?:不|错)", re.IGNORECASE)
_STANDALONE = re.compile(r"(?<![A-Za-z\d\\'_^=+*/-])([A-Z])(?![A-Za-z\d'_^=+*/])")
_ARTICLE = re.compile(r"(?<![A-Za-z])A (?!is\b|are\b|and\b|or\b|because\b|since\b|as\b|matches\b|fits\b)[a-z]")
_ARTICLE_AHEAD = re.compile(r"[Aa] (?!is\b|are\b|and\b|or\b|because\b|since\b|as\b|matches\b|fits\b)[a-z]")
_NEGATION = re.compile(
    r"\b(?:not|no|none|neither|nor|wrong|incorrect|false|except|cannot|isn't|aren't|never)\b|n't\b|不|错|非|无",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[,;.]\s*(?!\d)|\bbut\b|\bso\b")
_WHILE = re.compile(r"[,;]?\s*\b(?:while|whereas)\b.*$", re.IGNORECASE)
_LETTERS = re.compile(r"[A-Za-z]")
_ANSWER_LIMIT = 2000


def letters(text: str) -> frozenset[str] | None:
    """Upper-case letters of the options the text picks, or None when it picks none."""
    if len(text) > _ANSWER_LIMIT:
        return None
    if parts := boxes(text):
        text = parts[-1][2]  # the box is the answer, whatever is said around it
    text = canonical(unboxed(undelimited(text))).replace("*", "").replace(")(", ") (").strip(" \"'")
    if match := _ALONE.fullmatch(text):
        return frozenset(match[1].upper())
    if match := _JOINED.fullmatch(text):
        return frozenset(match[1]) if len(set(match[1])) == len(match[1]) else None
    if match := _LISTED.fullmatch(text):
        bare = re.sub(r"\b(?:and|or)\b", " ", match[1], flags=re.IGNORECASE)
        return frozenset(letter.upper() for letter in _LETTERS.findall(bare))
    if match := _WITH_TEXT.match(text):
        first = next(group for group in match.groups() if group)
        return frozenset([first.upper(), *_MORE_OPTIONS.findall(text)])
    return _from_sentence(text)


def _from_sentence(text: str) -> frozenset[str] | None:
    if match := _PREFIXED_JOINED.search(text):
        return frozenset(match[2]) if not _NEGATION.search(text[: match.end()]) else None
    named: set[str] = set()
    for match in _PREFIXED.finditer(text):
        if _NEGATION.search(_CLAUSE.split(text[: match.end()])[-1]) or _RULED_OUT.match(text, match.end()):
            return None
        if not _ARTICLE_AHEAD.match(text, match.start(1)):  # "the answer is a triangle" names no option
            further = re.sub(r"\b(?:and|or)\b", " ", match[2], flags=re.IGNORECASE)
            named |= {match[1].upper(), *(letter.upper() for letter in _LETTERS.findall(further))}
    if named:
        return frozenset(named)
    if any(_NEGATION.search(clause) for clause in _CLAUSE.split(_WHILE.sub("", text))):
        return None
    text = _WHILE.sub("", text)
    articles = {match.start() for match in _ARTICLE.finditer(text)}
    standing = {match[1] for match in _STANDALONE.finditer(text) if match.start() not in articles and match[1] != "I"}
    return frozenset(standing) if len(standing) == 1 else None


def denies(text: str) -> bool:
    """Whether the text holds a negation, so that a letter in it may be the one ruled out."""
    return len(text) <= _ANSWER_LIMIT and bool(_NEGATION.search(text))


def gold_letters(gold: str) -> frozenset[str] | None:
    """The options a gold answer names, or None when it is no option: one capital, capitals in order, A,C, (A), A. text."""
    text = canonical(gold).replace(")(", ") (")
    if re.fullmatch(r"[(\[]?[A-Ja-df-h][)\]]?\.?", text):
        return frozenset(_LETTERS.findall(text.upper()))
    if (match := _JOINED.fullmatch(text)) and list(match[1]) == sorted(set(match[1])) and match[1][-1] <= "J":
        return frozenset(match[1])
    if (match := _LISTED.fullmatch(text)) and re.search(r"[A-Z]", text):
        found = _LETTERS.findall(re.sub(r"\b(?:and|or)\b", " ", match[1], flags=re.IGNORECASE))
        if all("A" <= letter <= "J" for letter in found):
            return frozenset(found)
    if match := re.match(r"[(\[]?([A-J])[)\].:]\s*\S", text):
        return frozenset(match[1])
    if match := re.fullmatch(r"(?:答案|选项|故选|应选|选)[是为:\s]*([A-Z])\.?", text):
        return frozenset(match[1])
    return None
