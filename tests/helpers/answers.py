"""Answers whose truth is known by construction, to measure the accuracy judge without its own tables or tests.

`constructed` draws questions from the kinds (values, what equals them and what does not: answer_kinds, answer_algebra, answer_words), then
spells and wraps gold and answer as data sets and models do. None of that changes a value, so a verdict that changes with it is an error.

    python -m tests.helpers.answers --seed 1 --count 3000 --show 5
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.helpers import answer_algebra, answer_words  # noqa: F401  they register their kinds
from tests.helpers.answer_kinds import KINDS, Question, put

RIGHT_SHARE = 0.6
# fmt: off
SYMBOLS = {
    r"\pm": "±", r"\times": "×", r"\cdot": "·", r"\le": "≤", r"\ge": "≥", r"\ne": "≠", r"\cup": "∪", r"\cap": "∩", r"\infty": "∞", r"\in": "∈",
    r"\pi": "π", r"\angle": "∠", r"\triangle": "△", r"\parallel": "∥", r"\perp": "⊥", r"\sim": "∽", r"\cong": "≌", r"\emptyset": "∅",
    r"\Omega": "Ω", r"\mid": "|", r"\mathbb{R}": "R", r"\mathbb{Z}": "Z", r"\sin": "sin", r"\cos": "cos", r"\tan": "tan", r"\ln": "ln",
    r"\log": "log", r"\arctan": "arctan", r"\quad": " ",
}
LATEX = {  # a spelling in LaTeX, and others of the same meaning, both as re.sub takes them
    r"\\frac(?=\{)": (r"\\dfrac", r"\\tfrac", r"\\cfrac"), r"\\frac\{(\d)\}\{(\d)\}": (r"\\frac\1\2", r"\\frac{\1}\2"), r"\\sqrt\{(\d)\}": (r"\\sqrt\1",),
    r"\\le(?![a-z])": (r"\\leq", r"\\leqslant", "≤"), r"\\ge(?![a-z])": (r"\\geq", r"\\geqslant", "≥"), r"\\ne(?![a-z])": (r"\\neq", r"\\not=", "≠"),
    r"\^\\circ": (r"^{\\circ}", "°", r"\\degree", r"^{\\,\\circ}"), r"\\infty": (r"\\infty ", "∞"), r"\\pm(?![a-z])": ("±",), r"\\times(?![a-z])": ("×",),
    r"\\parallel(?![a-z])": ("//", "∥", r"\\| "), r"\\sim(?![a-z])": ("∽", "∼", r"\\backsim "), r"\\cong(?![a-z])": ("≌", "≅"),
    r"\\emptyset": (r"\\varnothing", "∅"), r"\\mathbb\{([RZ])\}": (r"\\mathbf{\1}", r" \1"), r"\\mid(?![a-z])": ("|", r"\\,|\\,", ":"),
    r"\\text\{ ([^{} ]*)\}": (r"\\mathrm{~\1}", r"~\\mathrm{\1}", r"\\,\\text{\1}", r"\\textrm{ \1}", r"\\ \\text{\1}", r"\\;\\mathrm{\1}"),
    r"(?<![\\{]),(?! |\\|\d{3})": (", ", r",\\,", r",\\ ", r",\\;"), r"(?<![<>:=\\])=(?!=)": (" = ", r"\\,=\\,"),
    r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}": (r"\\left(\\begin{matrix}\1\\end{matrix}\\right)", r"\\begin{bmatrix}\1\\end{bmatrix}"),
}
FULL_WIDTH = {"(": "（", ")": "）", ",": "，", ";": "；", "=": "＝", "<": "＜", ">": "＞", "+": "＋", ":": "："}
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
DELIMITED = ("${}$", "$${}$$", r"\({}\)", r"\[{}\]", "\\[\n{}\n\\]", "$ {} $", "**${}$**")
BOXED = (r"\boxed{{}}", r"$\boxed{{}}$", r"\[\boxed{{}}\]", "$$\n\\boxed{{}}\n$$", r"\fbox{${}$}", r"\boxed{ {} }", r"**$\boxed{{}}$**")
WORDS = (r"\text{{}}", r"\boxed{{}}", r"\boxed{\text{{}}}", r"$\text{{}}$", r"$\boxed{\text{{}}}$")
ENGLISH = (
    "The answer is {}", "The answer is {}.", "The final answer is {}.", "Therefore, the answer is {}.", "Answer: {}", "**Answer:** {}",
    "Final answer: {}", "**Final Answer**\n\n{}", "So the answer is:\n{}", "Hence, the answer is: {}.", "answer: {}", "the correct answer is {}.",
    "Since triangle ABC has a right angle at C, we can solve for it.\n\nThe answer is {}.", "Step 1: read the 3 lengths in the figure.\nStep 2: compute.\n\n{}",
)
CHINESE = (
    "答案：{}", "答案：{}。", "答案是{}。", "答案为：{}", "故答案为：{}.", "故答案为{}。", "因此，答案是{}。", "综上，答案为 {}", "所以答案是：{}。", "最终答案：{}",
    "**答案：** {}", "【答案】{}", "故答案为：\n{}", "由图可知，△ABC是直角三角形，所以答案为{}。",
)
# fmt: on
LIST = re.compile(r"[$\n,;，；或]| or | and ")
CHINESE_SIGN, ENGLISH_WORD = re.compile(r"[一-鿿]"), re.compile(r"(?<![\\a-z{])[a-z]{4,}")
SENTENCE = re.compile(r"(?i)[a-z]{3,} .*[.。]$|\b(is|are|so|since|the answer)\b|故选|答案|选项|[一-鿿]{2}.*[是为]|，得")
ONLY_LATEX = re.compile(
    r"\\(begin|overline|dot|binom|vec|overrightarrow|mathrm|mathbf|boxed|langle|prime|text\{(?:st|nd|rd|th|base )|!)|\{,\}"
)
ENDS = ("", "", "", ".", "。", "\n", " ")
THOUGHTS = (
    "t",
    "We compute step by step.",
    "So it is {}.",
    r"Perhaps \boxed{7}? No.",
    "由题意可得，解之即可。",
    "最后得到{}。",
)  # any value may stand there


@dataclass(frozen=True)
class Case:
    """One judged answer. Example: Case("ratios", "3:5", "<think>…</think><answer>5:3</answer>", False, "swapped")."""

    category: str
    gold: str
    response: str
    right: bool
    note: str


def constructed(count: int, seed: int) -> list[Case]:
    """`count` cases, the same for the same seed, the categories in turn, about 60 of 100 of them right."""
    draw = Random(seed)
    names = list(KINDS)
    return [_case(draw, names[number % len(names)]) for number in range(count)]


def _case(draw: Random, category: str) -> Case:
    question = KINDS[category](draw)
    gold_form = draw.choice([*question.forms, *question.golds])
    right = draw.random() < RIGHT_SHARE
    if right:
        note, form = "equal", draw.choice([*question.forms, *question.right])
    else:
        note, form = draw.choice([*question.wrong, *_wrong_of_any_kind(draw, question)])
    answer, presented = _presented(draw, form, question)
    thought = put(draw.choice(THOUGHTS), draw.choice((gold_form, form)))
    response = f"<think>{thought}</think>{draw.choice(('', chr(10)))}<answer>{answer}</answer>"
    return Case(category, _gold(draw, gold_form), response, right, f"{note}; {presented}")


def _wrong_of_any_kind(draw: Random, question: Question) -> list[tuple[str, str]]:
    """Sometimes, answers that are wrong for any question: its denial, and none."""
    if draw.random() > 0.15:
        return []
    wrong = [("none", draw.choice(("cannot be determined", "无法确定", "I don't know", "")))]
    form = question.forms[0]
    if question.deniable and 1 < len(form) < 16 and not LIST.search(form):
        wrong += [
            ("denied", put(word, form))
            for word in (("不是{}",) if CHINESE_SIGN.search(form) else ("not {}", "It is not {}."))
        ]
    return wrong


def _gold(draw: Random, form: str) -> str:
    spelt = _spelt(draw, form)
    wrap = (
        draw.choice(("${}$", "${}$", "${}$", r"\({}\)", "$${}$$")) if _is_math(spelt) and draw.random() < 0.4 else "{}"
    )
    return put(wrap, spelt)


def _presented(draw: Random, form: str, question: Question) -> tuple[str, str]:
    """The form as a model writes it, and in a word how."""
    spelt = _spelt(draw, form)
    if SENTENCE.search(form):  # it leads in by itself
        return spelt, "a sentence"
    wrap = "{}"
    if not re.search(r"[$\n]|\\boxed|\\\(|\*\*", spelt) and draw.random() < 0.6:
        if _is_math(spelt):
            wrap = draw.choice((draw.choice(BOXED), draw.choice(DELIMITED)))
        else:
            wrap = draw.choice((r"\boxed{{}}", "**{}**") if re.search(r"[\\_^{]", spelt) else (*WORDS, "**{}**"))
    text, how = put(wrap, spelt), wrap.replace("\n", r"\n")
    if draw.random() < 0.45:
        leads = [*draw.choice((ENGLISH, CHINESE))]
        if question.leads and ("=" not in form or "=" in question.forms[0]) and draw.random() < 0.4:
            leads = [*question.leads]
        if CHINESE_SIGN.search(spelt) or ENGLISH_WORD.search(spelt):  # its language
            chinese = bool(CHINESE_SIGN.search(spelt))
            leads = [lead for lead in leads if bool(CHINESE_SIGN.search(lead)) == chinese] or [
                *(CHINESE if chinese else ENGLISH)
            ]
        lead = draw.choice(leads)
        return put(lead.rstrip(".。") if text.endswith((".", "。")) else lead, text), f"{how}; {lead!r}"
    end = draw.choice(ENDS)
    return (text.rstrip(".。") if end in (".", "。") else text) + end, f"{how}; ends {end!r}" if end else how


def _is_math(text: str) -> bool:
    """Whether the text may stand between dollars: no bare words, no lines, no dollars, no bare 10^10."""
    bare = re.sub(r"\\(text|mathrm|textrm|begin|end)\{[^{}]*\}|\\[a-zA-Z]+", "", text)
    return not re.search(r"[一-鿿、，；（。？]|[a-z]{4,}|[$\n]|[\^_]-?\d\d|\b(or|and|to|not|[Tt]he)\b", bare)


def _spelt(draw: Random, form: str) -> str:
    """The form in one of its spellings: LaTeX, or plain text with signs of Unicode, ASCII or full width."""
    if "$" in form:
        return form
    if not ONLY_LATEX.search(form) and draw.random() < 0.45:
        return _plain(draw, form)
    for pattern, others in LATEX.items():
        if draw.random() < 0.3:
            form = re.sub(pattern, draw.choice(others), form)
    if "(" in form and draw.random() < 0.2 and not re.search(r"\\sqrt\[|left|begin|boxed|text|base|[^\x00-\x7f]", form):
        form = re.sub(r"(\\\{|[(\[])", r"\\left\1", re.sub(r"(\\\}|[)\]])", r"\\right\1", form))
    return form


def _plain(draw: Random, form: str) -> str:
    """The form without LaTeX. Example: "\\frac{\\sqrt{3}}{2}" as "√3/2" or "sqrt(3)/2"."""
    ascii_root, raised = draw.random() < 0.25, draw.random() < 0.5

    def power(match: re.Match) -> str:
        return f"^{match[1]}" if re.fullmatch(r"\d+|[a-z]", match[1]) else f"^({match[1]})"

    def root(match: re.Match) -> str:
        if ascii_root:
            return f"sqrt({match[1]})"
        return f"√{match[1]}" if re.fullmatch(r"\d+|[a-z]", match[1]) else f"√({match[1]})"

    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", form.replace(r"^\circ", "°").replace(r"\,", ""))
    text = re.sub(r"(\\[a-z]+)\\sqrt", r"\1 \\sqrt", text)
    before = ""
    while before != text:
        before = text
        text = re.sub(r"\^\{([^{}]*)\}", power, text)
        text = re.sub(r"_\{([^{}]*)\}(?=(\w?))", lambda m: f"_{m[1]} " if m[2] else f"_{m[1]}", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", root, re.sub(r"\\sqrt\[3\]\{(\d+)\}", r"∛\1", text))
        text = re.sub(r"(\d|\\(?:ln|sin|cos|tan|arctan) ?)?\\frac\{([^{}]*)\}\{([^{}]*)\}(?=(.?))", _slashed, text)
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    for command, sign in SYMBOLS.items():
        apart = sign + " " if sign.isascii() and sign.isalpha() else sign
        text = re.sub(re.escape(command) + r"(?![a-zA-Z]) ?(?=[a-zA-Z\d])", apart, text)
        text = re.sub(re.escape(command) + r"(?![a-zA-Z]) ?", sign, text)
    if raised:
        text = re.sub(r"\^(-?\d+)(?!\d)", lambda m: m[1].translate(SUPERSCRIPTS), re.sub(r"\^\((-\d+)\)", r"^\1", text))
        text = re.sub(r"(?<=[a-z\d])_(\d+)", lambda m: m[1].translate(SUBSCRIPTS), text)
    if draw.random() < 0.2:
        text = text.replace("-", "−")
    if draw.random() < 0.15 and not (ENGLISH_WORD.search(text) or re.search(r"\d[,:]\d\d", text)):
        text = "".join(FULL_WIDTH.get(sign, sign) for sign in text)
    elif draw.random() < 0.4:
        text = re.sub(r"(?<=\S)([=<>≤≥∪∈])(?=\S)", r" \1 ", re.sub(r",(?=\S)(?!\d{3})(?!\})", ", ", text))
    return text


def _slashed(match: re.Match) -> str:
    """A fraction on one line; a factor that follows it gets it in parentheses, a whole number before it a space."""
    whole, top, bottom, after = match[1], match[2], match[3], match[4]
    top = f"({top})" if re.search(r".[+\-±]|ln|log|sin|cos", top) else top
    bottom = bottom if re.fullmatch(r"\d+|[a-zπ]|√\d+|sqrt\(\d+\)|\\pi", bottom) else f"({bottom})"
    slashed = f"{top}/{bottom}"
    if whole and "\\" in whole:
        return f"{whole}({slashed})"
    if whole:
        return f"{whole} {slashed}"
    return f"({slashed})" if re.match(r"[a-z√π\\]", after) else slashed


def report(cases: list[Case], verdicts: list[bool], show: int, out: Callable[[str], object] = print) -> None:
    """Misses (right answers refused) and false rewards (wrong ones paid) in percent: in all, by category, then `show` examples of each."""
    failed: dict[tuple[str, bool], list[Case]] = defaultdict(list)
    for case, verdict in zip(cases, verdicts, strict=True):
        if case.right != verdict:
            failed[case.category, case.right].append(case)
    names = sorted({case.category for case in cases})
    for name in ["all", *names]:
        figures = []
        for right in (True, False):
            total = sum(case.right == right and name in ("all", case.category) for case in cases)
            wrong = sum(len(failed[each, right]) for each in names if name in ("all", each))
            figures.append(f"{100 * wrong / max(total, 1):5.1f} % ({wrong}/{total})")
        out(f"{name:24} misses {figures[0]:18} false rewards {figures[1]}")
    for name in names:
        for right, title in ((True, "missed"), (False, "paid though wrong")):
            for case in failed[name, right][:show]:
                answer = case.response.partition("<answer>")[2].removesuffix("</answer>")
                out(f"{name}, {title}: {case.gold!r} | {answer!r} | {case.note}")


def main() -> None:
    from eureka_megatron.rewards import JudgePool

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--show", type=int, default=5, help="examples of each category and kind of error")
    parser.add_argument("--category", default="", help="only categories with this in their name")
    parser.add_argument("--list", action="store_true", help="print the cases, judge nothing")
    args = parser.parse_args()
    cases = [case for case in constructed(args.count, args.seed) if args.category in case.category]
    if args.list:
        for case in cases:
            answer = case.response.partition("<answer>")[2].removesuffix("</answer>")
            print(f"{'right' if case.right else 'WRONG'} {case.category}: {case.gold!r} | {answer!r} | {case.note}")
        return
    with JudgePool(2) as pool:
        verdicts = [verdict["accuracy"] == 1 for verdict in pool.judge([(case.response, case.gold) for case in cases])]
        print(f"{len(cases)} cases of seed {args.seed}, {pool.timeouts} broke the time limit")
    report(cases, verdicts, args.show)


if __name__ == "__main__":
    main()
