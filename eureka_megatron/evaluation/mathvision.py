"""MathVision by its authors' rules: an extraction by strings, an equality that evaluates LaTeX and rounds to two decimals.

So 1:1 equals 1, and 0.333 equals 1/3. The authors evaluate with Python's `eval`; here `symbolic` reads the LaTeX, isolated and limited.
"""

from __future__ import annotations

import re

from eureka_megatron.evaluation import symbolic
from eureka_megatron.evaluation.verdict import Row, Verdict, absent, field, items, number

LETTERS = "ABCDE"
_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_BOX = re.compile(r"oxed{(.*)}", re.DOTALL)
_DROPPED = (" ", "\\,", "\n", "\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3")
_UNITS = ("{units}", "units", "{km}", "km")
_PLAIN = re.compile(r"-?\d+(\.\d+)?")


def judge(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    """Correct if the extraction equals the gold answer, or the text of the gold option."""
    gold = field("MathVision", row, "answer")
    answer = text if extracted else extract(text)
    options = items(row.get("options"))
    place = LETTERS.find(gold) if len(gold) == 1 else -1
    option = options[place] if 0 <= place < len(options) else ""
    if not options and not absent(row.get("gold_text")):
        option = str(row["gold_text"])
    return Verdict(answer, equal(gold, answer) or equal(option, answer))


def extract(response: str) -> str:
    """The answer in the authors' normal form. Examples: "… is (C)." → "c", "\\boxed{\\dfrac{1}{2}}" → "\\frac{1}{2}"."""
    text = response.strip()
    for letter in LETTERS:
        ends, starts = (f" {letter}.", f" ({letter})."), (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.endswith(ends) or text.startswith(starts):
            text = letter
    last = text.split("is ")[-1].rstrip(".")
    if number(last) is not None:
        text = last
    if "oxed{" not in text:
        for phrase in _PHRASES:
            text = _behind(_behind(text, phrase), phrase.replace("the", "The"))
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.rsplit("oxed{", 1)[1]
    return _unwrapped(_cleaned(_content(text)))


def _behind(text: str, phrase: str) -> str:
    found = text.split(phrase)[-1].strip()
    return found.split("\n")[0].split(". ")[0] if phrase in text else found


def _content(text: str) -> str:
    """What stands in the box and behind the last sign of equality, without spaces and units."""
    text = text.lower().replace("{}", "")
    if boxes := _BOX.findall(text):
        text = boxes[-1]
    if text.find("}") >= 0 and (text.find("{") < 0 or text.find("}") < text.find("{")):
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1]
    text = text.replace(" ", "").replace("\\,", "").replace("∞", "\\infty").replace("+\\infty", "\\infty")
    text = text.replace("\\\\", "\\")
    for part in (*_DROPPED, *_UNITS):
        text = text.replace(part, "")
    return text.replace("bmatrix", "pmatrix")


def _cleaned(text: str) -> str:
    text = text.replace("\\!", "").replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for part in ("^{\\circ}", "^\\circ", "\\$", "$"):
        text = text.replace(part, "")
    text = text.split("\\text{ ")[0].replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    for sign in ("=", "\\approx"):
        if text.count(sign) == 1:
            text = text.split(sign)[1]
    if "sqrt" in text:
        text = _braced_fractions(_braced_roots(text))
    if text == "0.5":
        return "\\frac{1}{2}"
    if found := re.fullmatch(r"(-?\d+)/(-?\d+)", text):
        return f"\\frac{{{int(found[1])}}}{{{int(found[2])}}}"
    return text


def _braced_roots(text: str) -> str:
    """\\sqrt3 → \\sqrt{3}"""
    return re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text)


def _braced_fractions(text: str) -> str:
    """\\frac12 → \\frac{1}{2}, \\frac1{x} → \\frac{1}{x}"""
    head, *parts = text.split("\\frac")
    for part in parts:
        if part.startswith("{"):
            head += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            head += "\\frac{" + part[0] + "}" + (part[1:] if part[1] == "{" else "{" + part[1] + "}" + part[2:])
    return head


def _unwrapped(text: str) -> str:
    for left, right in ("()", "{}"):
        for letter in "abcde":
            text = text.replace(left + letter + right, letter)
    return text.rstrip(".").lstrip(":").strip()


def equal(gold: str, answer: str) -> bool:
    gold, answer = gold.lower(), answer.lower()
    if not gold.replace(" ", "") or not answer.replace(" ", ""):
        return False
    if gold.strip() == answer.strip():
        return True
    left, right = _tuple(gold), _tuple(answer)
    if left is not None or right is not None:
        return (left or gold) == (right or answer)
    if _PLAIN.fullmatch(gold) and _PLAIN.fullmatch(answer):
        return round(float(gold), 2) == round(float(answer), 2)
    return symbolic.ask("rounded", gold, answer)


def _tuple(text: str) -> str | None:
    """(…,…) and […,…] with each element evaluated and rounded; None: neither, or an element that has no value."""
    if len(text) < 2 or text[0] + text[-1] not in ("()", "[]"):
        return None
    parts = text[1:-1].split(",")
    if len(parts) < 2:
        return None
    found = []
    for part in parts:
        keeps = "infty" in part or part in ("a", "-a")
        value = part if keeps else symbolic.rounded(part)
        if value is None:
            return None
        found.append(str(value))
    return text[0] + ",".join(found) + text[-1]
