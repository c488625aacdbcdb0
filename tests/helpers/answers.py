"""Answers whose truth is known by construction, to measure the accuracy judge without its own tables or tests.

`constructed` draws questions from `answer_kinds` (the values and what is equal to them), then spells, wraps and leads in both the gold
and the answer as data sets and models do: none of that changes a value, so a verdict that changes with it is the judge's error.

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
SYMBOLS = {
    r"\pm": "±", r"\times": "×", r"\cdot": "·", r"\le": "≤", r"\ge": "≥", r"\ne": "≠", r"\cup": "∪", r"\cap": "∩", r"\infty": "∞", r"\in": "∈",
    r"\pi": "π", r"\angle": "∠", r"\triangle": "△", r"\parallel": "∥", r"\perp": "⊥", r"\sim": "∽", r"\cong": "≌", r"\emptyset": "∅",
    r"\odot": "⊙", r"\theta": "θ", r"\alpha": "α", r"\beta": "β", r"\lambda": "λ", r"\Omega": "Ω", r"\mid": "|", r"\mathbb{R}": "R", r"\mathbb{Z}": "Z", r"\sin": "sin", r"\cos": "cos",
    r"\tan": "tan", r"\ln": "ln", r"\log": "log", r"\lg": "lg", r"\arctan": "arctan", r"\quad": " ",
}  # fmt: skip
# One spelling in LaTeX against others of the same meaning.
LATEX = {
    r"\\frac(?=\{)": (r"\dfrac", r"\tfrac", r"\cfrac"),
    r"\\frac\{(\d)\}\{(\d)\}": (r"\\frac\1\2", r"\\frac{\1}\2"),
    r"\\sqrt\{(\d)\}": (r"\\sqrt\1", r"\\sqrt{\1}"),
    r"\\le(?![a-z])": (r"\\leq", r"\\leqslant", "≤"),
    r"\\ge(?![a-z])": (r"\\geq", r"\\geqslant", "≥"),
    r"\\ne(?![a-z])": (r"\\neq", r"\\not=", "≠"),
    r"\^\\circ": (r"^{\\circ}", "°", r"\\degree", r"^{\\,\\circ}"),
    r"\\parallel(?![a-z])": ("//", "∥", r"\\| "),
    r"\\sim(?![a-z])": ("∽", "∼", r"\\backsim "),
    r"\\cong(?![a-z])": ("≌", "≅"),
    r"\\emptyset": (r"\\varnothing", "∅"),
    r"\\text\{ ([^{} ]*)\}": (
        r"\\mathrm{~\1}",
        r"~\\mathrm{\1}",
        r"\\,\\text{\1}",
        r"\\textrm{ \1}",
        r"\\ \\text{\1}",
        r"\\;\\mathrm{\1}",
    ),
    r"\\mid(?![a-z])": ("|", r"\\,|\\,", ":"),
    r"\\mathbb\{([RZ])\}": (r"\\mathbf{\1}", r" \1"),
    r"\\pm(?![a-z])": ("±",),
    r"\\times(?![a-z])": ("×", r"\\times "),
    r"\\infty": (r"\\infty ", "∞"),
    r"(?<![\\{]),(?! |\\|\d{3})": (", ", r",\\,", r",\\ ", r",\\;"),
    r"(?<![<>:=\\])=(?!=)": (" = ", r"\\,=\\,"),
    r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}": (
        r"\\left(\\begin{matrix}\1\\end{matrix}\\right)",
        r"\\begin{bmatrix}\1\\end{bmatrix}",
    ),
}
FULL_WIDTH = {"(": "（", ")": "）", ",": "，", ";": "；", "=": "＝", "<": "＜", ">": "＞", "+": "＋", ":": "："}
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
DELIMITED = ("${}$", "$${}$$", r"\({}\)", r"\[{}\]", "\\[\n{}\n\\]", "$ {} $", "**${}$**")
BOXED = (
    r"\boxed{{}}",
    r"$\boxed{{}}$",
    r"\[\boxed{{}}\]",
    "$$\n\\boxed{{}}\n$$",
    r"\fbox{${}$}",
    r"\boxed{ {} }",
    r"**$\boxed{{}}$**",
)
WORDS = (r"\text{{}}", r"\boxed{{}}", r"\boxed{\text{{}}}", r"$\text{{}}$", r"$\boxed{\text{{}}}$")
ENGLISH = ("The answer is {}", "The answer is {}.", "The final answer is {}.", "Therefore, the answer is {}.", "Answer: {}", "**Answer:** {}", "Final answer: {}",
           "**Final Answer**\n\n{}", "So the answer is:\n{}", "Hence, the answer is: {}.", "answer: {}", "the correct answer is {}.", "Since triangle ABC has a right angle at C, we can solve for it.\n\nThe answer is {}.",
           "Step 1: read the 3 lengths in the figure.\nStep 2: compute.\n\n{}")  # fmt: skip
CHINESE = ("答案：{}", "答案：{}。", "答案是{}。", "答案为：{}", "故答案为：{}.", "故答案为{}。", "因此，答案是{}。", "综上，答案为 {}", "所以答案是：{}。", "最终答案：{}",
           "**答案：** {}", "【答案】{}", "故答案为：\n{}", "由图可知，△ABC是直角三角形，所以答案为{}。")  # fmt: skip
CHINESE_SIGN, ENGLISH_WORD = re.compile(r"[一-鿿]"), re.compile(r"(?<![\\a-z{])[a-z]{4,}")
SENTENCE = re.compile(r"(?i)[a-z]{3,} .*[.。]$|\b(is|are|so|since|the answer)\b|故选|答案|选项|[一-鿿]{2}.*[是为]|，得")
ENDS = ("", "", "", ".", "。", "\n", " ")


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
    thought = draw.choice(
        (
            "t",
            "We compute step by step.",
            f"So it is {gold_form}.",
            r"Perhaps \boxed{7}? No.",
            "由题意可得，解之即可。",
            f"最后得到{form}。",
        )
    )
    gold = _gold(draw, gold_form)
    return Case(
        category,
        gold,
        f"<think>{thought}</think>{draw.choice(('', chr(10)))}<answer>{answer}</answer>",
        right,
        f"{note}; {presented}",
    )


def _wrong_of_any_kind(draw: Random, question: Question) -> list[tuple[str, str]]:
    """Sometimes, one answer that is wrong for any question: its denial, or none."""
    if draw.random() > 0.15:
        return []
    short = (
        [form for form in question.forms if 1 < len(form) < 16 and not re.search(r"[$\n,;，；或]| or | and ", form)]
        if question.deniable
        else []
    )
    denials = [
        (f"denied with {word!r}", put(word, form))
        for form in short[:1]
        for word in (("不是{}",) if CHINESE_SIGN.search(form) else ("not {}", "It is not {}."))
    ]
    return [*denials, ("none", draw.choice(("cannot be determined", "无法确定", "I don't know", "")))]


def _gold(draw: Random, form: str) -> str:
    spelt = _spelt(draw, form)
    return (
        put(draw.choice(("${}$", "${}$", "${}$", r"\({}\)", "$${}$$")), spelt)
        if _is_math(spelt) and draw.random() < 0.4
        else spelt
    )


def _presented(draw: Random, form: str, question: Question) -> tuple[str, str]:
    """The form as a model writes it, and in a word how."""
    spelt = _spelt(draw, form)
    if SENTENCE.search(form):  # it leads in by itself
        return spelt, "a sentence"
    wrap = "{}"
    if not re.search(r"[$\n]|\\boxed|\*\*", spelt) and draw.random() < 0.6:
        wrap = draw.choice(
            (draw.choice(BOXED), draw.choice(DELIMITED))
            if _is_math(spelt)
            else ((r"\boxed{{}}", "**{}**") if re.search(r"[\\_^{]", spelt) else (*WORDS, "**{}**"))
        )
    text, how = put(wrap, spelt), wrap.replace("\n", r"\n")
    if draw.random() < 0.45:
        general = (
            CHINESE
            if CHINESE_SIGN.search(spelt)
            else ENGLISH
            if ENGLISH_WORD.search(spelt)
            else draw.choice((ENGLISH, CHINESE))
        )
        own = question.leads if "=" not in form or any("=" in each for each in question.forms) else ()
        lead = draw.choice(own if own and draw.random() < 0.4 else general)
        return put(lead.rstrip(".。") if text.endswith((".", "。")) else lead, text), f"{how}; {lead!r}"
    end = draw.choice(ENDS)
    return (text.rstrip(".。") if end in (".", "。") else text) + end, f"{how}; ends {end!r}" if end else how


def _is_math(text: str) -> bool:
    """Whether the text may stand between dollars: no bare words, no lines, no dollars."""
    bare = re.sub(r"\\(text|mathrm|textrm|begin|end)\{[^{}]*\}|\\[a-zA-Z]+", "", text)
    return not re.search(r"[一-鿿、，；（。？]|[a-z]{4,}|[$\n]|\b(or|and|to|not|[Tt]he)\b", bare)


def _spelt(draw: Random, form: str) -> str:
    """The form in one of its spellings: LaTeX, or plain text with signs of Unicode, ASCII or full width."""
    if "$" in form:
        return form
    if (
        not re.search(
            r"\\(begin|overline|dot|binom|vec|overrightarrow|mathrm|boxed|langle|overset|prime|text\{(?:st|nd|rd|th|base )|!)|\{,\}",
            form,
        )
        and draw.random() < 0.45
    ):
        return _plain(draw, form)
    for pattern, others in LATEX.items():
        if draw.random() < 0.3:
            other = draw.choice(others)
            form = re.sub(pattern, other if r"\\" in other or r"\1" in other else other.replace("\\", r"\\"), form)
    if draw.random() < 0.2 and not re.search(r"\\sqrt\[|left|begin|boxed|text|[^\x00-\x7f]", form) and "(" in form:
        form = re.sub(
            r"\\\{",
            r"\\left\\{",
            re.sub(r"\\\}", r"\\right\\}", re.sub(r"([(\[])", r"\\left\1", re.sub(r"([)\]])", r"\\right\1", form))),
        )
    return form


def _plain(draw: Random, form: str) -> str:
    """The form without LaTeX. Example: "\\frac{\\sqrt{3}}{2}" as "√3/2" or "sqrt(3)/2"."""
    ascii_root, raised = draw.random() < 0.25, draw.random() < 0.5
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", form.replace(r"^\circ", "°").replace(r"\,", ""))
    before = ""
    while before != text:
        before = text
        text = re.sub(
            r"\^\{([^{}]*)\}", lambda m: f"^{m[1]}" if re.fullmatch(r"\d+|[a-z]", m[1]) else f"^({m[1]})", text
        )
        text = re.sub(r"_\{([^{}]*)\}(?=(\w?))", lambda m: f"_{m[1]} " if m[2] else f"_{m[1]}", text)
        text = re.sub(r"\\sqrt\[3\]\{(\d+)\}", r"∛\1", text)
        root = (
            (lambda m: f"sqrt({m[1]})")
            if ascii_root
            else (lambda m: f"√{m[1]}" if re.fullmatch(r"\d+|[a-z]", m[1]) else f"√({m[1]})")
        )
        text = re.sub(r"\\sqrt\{([^{}]*)\}", root, text)
        text = re.sub(r"(\d|\\(?:ln|sin|cos|tan|arctan) ?)?\\frac\{([^{}]*)\}\{([^{}]*)\}(?=(.?))", _slashed, text)
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    for command, sign in SYMBOLS.items():
        text = re.sub(
            re.escape(command) + r"(?![a-zA-Z]) ?(?=(\w?))",
            lambda m, sign=sign: sign + (" " if m[1] and m[1] != "_" and sign.isalpha() and sign.isascii() else ""),
            text,
        )
    if raised:
        text = re.sub(r"\^(-?\d+)(?!\d)", lambda m: m[1].translate(SUPERSCRIPTS), re.sub(r"\^\((-\d+)\)", r"^\1", text))
        text = re.sub(r"(?<=[a-z\d])_(\d+)", lambda m: m[1].translate(SUBSCRIPTS), text)
    if draw.random() < 0.2:
        text = text.replace("-", "−")
    if draw.random() < 0.15:
        text = "".join(FULL_WIDTH.get(sign, sign) for sign in text) if not re.search(r"\d[,:]\d\d", text) else text
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
    return f"({slashed})" if re.match(r"[a-z√π\\]", after) and after != " " else slashed


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
            wrong = sum(
                len(those) for (category, kind), those in failed.items() if kind == right and name in ("all", category)
            )
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
