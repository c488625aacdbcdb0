"""Each stage of the judge by its own table of examples (docs/rewards.md tells the stages)."""

import re
from pathlib import Path

import pytest

from eureka_megatron.rewards import choice, expression, extract, regions, score, structure, symbolic, units
from eureka_megatron.rewards.examine import compare
from eureka_megatron.rewards.normalise import canonical

NORMALISED = {
    "（１，２）": "(1,2)",
    "∠A＝６０°": r"\angle A=60^\circ",
    "x²⁺ⁿ+x₁": "x^{2+n}+x_{1}",
    "3½": r"3\frac{1}{2}",
    "√23": r"\sqrt 23",
    "AB∥CD": r"AB\parallel CD",
    "AB//CD": r"AB\parallel CD",
    "1∶3": "1:3",
    "12㎡": "12 m^2",
    r"18\text{ cm²}": "18 cm^{2}",
    r"125\textnormal{ miles}": "125 miles",
    r"10,\!080": "10,080",
    r"48,\! 250": "48,250",
    r"48\,250": "48,250",
    "3{,}14": "3.14",
    "1{,}234": "1,234",
    "1.234,56": "1234.56",
    r"12^{\text{th}}": "12",
    r"\left(1,\dfrac{1}{2}\right]": r"(1,\frac{1}{2} ]",
    r"x\\le 2": r"x\leq 2",
    r"\begin{cases}x=1\\y=2\end{cases}": "(x=1 and y=2)",
    r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.": "(x=1 and y=2)",
    r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)": r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\begin{bmatrix}1\\2\end{bmatrix}": r"\begin{pmatrix}1\\2\end{pmatrix}",
    "35°30'": r"(35+30/60+0/3600)^\circ",
    "①、②": "①,②",
}  # fmt: skip


@pytest.mark.parametrize(("written", "canonical_text"), NORMALISED.items())
def test_normalisation_gives_one_spelling_and_leaves_it_alone(written: str, canonical_text: str):
    assert canonical(written) == canonical_text
    assert canonical(canonical_text) == canonical_text


READ = {
    "So the answer is: x = 5": ["x = 5", "So the answer is: x = 5"],
    "答案：７": ["7"],
    r"\boxed{4} and \boxed{6}": ["4, 6"],
    r"First we get \boxed{3}, then $\boxed{7}$ cm": ["7 cm", "3, 7"],
    r"(1) $\boxed{30^\circ}$ (2) $\boxed{5}$": [r"(1) 30^\circ (2) 5"],
    "x = 1\ny = 2": ["x = 1, y = 2"],
    "A. Wait, actually B": ["B"],
    "5, not 6": ["5"],
    "不是A，而是B": ["B"],
    "the point (3,-4)": ["(3,-4)"],
    "n=5 because 3 is not possible": ["n=5"],
    "Two steps. The area is $3$ cm^2.": ["3 cm^2"],
    "5 (rounded)": ["5"],
    r"$x=5$": ["x=5"],
}  # fmt: skip
DENIED = (
    "x cannot be 3",
    "The answer is not $3$.",
    r"it isn't $\boxed{3}$",
    "3 is wrong",
    "答案不是3",
    "$3$ is not it",
)


@pytest.mark.parametrize(("answer", "wanted"), READ.items())
def test_extraction_finds_the_final_value(answer: str, wanted: list[str]):
    assert set(wanted) <= set(extract.readings(answer))


@pytest.mark.parametrize("answer", DENIED)
def test_what_is_denied_is_no_reading(answer: str):
    assert "3" not in extract.readings(answer)


def test_the_span_is_the_last_complete_pair_or_a_box_where_that_is_allowed():
    assert extract.answer_span("<answer>1</answer> <answer>2</answer> <answer>3") == "2"
    assert extract.answer_span(r"\boxed{3}") is None
    assert extract.answer_span(r"\boxed{3}, so \boxed{\frac{1}{2}}", untagged="boxed") == r"\boxed{\frac{1}{2}}"
    assert extract.answer_span(r"\boxed{3} and \boxed{4}", untagged="boxed") == r"\boxed{3, 4}"


OPTIONS = {
    "B": "B", "(b)": "B", "B. 12 cm": "B", "选B": "B", "故选：B．": "B", "A, C": "AC", "(A)(C)": "AC", "A和C": "AC",
    "The correct option is C": "C", "Answer: (C) 12 cm": "C", "bus": None, "not A": None, "an apple": None, "A or B": "AB",
}  # fmt: skip


@pytest.mark.parametrize(("answer", "letters"), OPTIONS.items())
def test_options_are_letters_that_stand_alone(answer: str, letters: str | None):
    assert choice.letters(answer) == (None if letters is None else frozenset(letters))


QUANTITIES = {
    "12 cm": ("12", "centimeters"), "12 cm^{2}": ("12", "square centimeters"), "$5": ("5", "dollars"), "60^\\circ": ("60", "degrees"),
    "5 m\\cdot s^{-1}": ("5", "meters per second"), "60千米/时": ("60", "km/h"), "12 元/千克": ("12", "yuan per kg"), "3 L": ("3", "dm^3"),
    "20 percent": ("20", "%"), "9:00 a.m.": ("9:00", "am"), "5 N\\cdot m": ("5", "J"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "value_and_unit"), QUANTITIES.items())
def test_quantities_split_into_value_and_unit(answer: str, value_and_unit: tuple[str, str]):
    assert units.split(answer) == (value_and_unit[0], units.unit(value_and_unit[1]))


@pytest.mark.parametrize("answer", ["x", "(a+b)h", "3 million", "x+3m", "2x", "AB"])
def test_a_letter_may_be_no_unit(answer: str):
    assert units.split(answer) == (answer, None)


EQUAL = [
    ("1/2", "50%"), ("1 1/2", r"\frac{3}{2}"), (r"0.1\overline{6}", "1/6"), (r"\sqrt 23", "23^{1/2}"), (r"\sqrt2/2", r"\frac{1}{\sqrt{2}}"),
    ("e^{16}-1", r"-1+\exp(16)"), (r"\sin 30^\circ", "1/2"), (r"\sin(30)^\circ", "1/2"), (r"\binom{5}{2}", "10"), ("x^2-4", "(x-2)(x+2)"),
    (r"\log_2 8", "3"), (r"\sqrt[3]{-8}", "-2"), ("(-8)^{1/3}", "-2"), (r"\cos 2x", r"1-2\sin^2 x"), ("1/2x", "x/2"), (r"180^\circ-\alpha", r"180-\alpha"),
    (r"\angle ABC", r"\angle CBA"), ("f(x)+1", "1+f(x)"), (r"-2\frac13", "-7/3"), ("1 000 4/9", "9004/9"), ("|x-1|", "|1-x|"), (r"e^{i\pi}", "-1"),
]  # fmt: skip
UNEQUAL = [
    ("1/3", "0.333"), ("|x|", "x"), ("f(2)", "f(3)"), (r"\angle 1", r"\angle 2"), (r"\overrightarrow{AB}", r"\overrightarrow{BA}"),
    ("3.14", r"\pi"), ("x^2", "2x"), ("12345678901234567890123456789", "12345678901234567890123456788"), ("1e-7", "2e-7"),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right", "equal"), [(*p, True) for p in EQUAL] + [(*p, False) for p in UNEQUAL])
def test_expressions_are_equal_by_value(left: str, right: str, equal: bool):
    assert expression.equal(left, right) == equal


@pytest.mark.parametrize("text", ["1/0", "9^{9^{9^9}}", "3000!", "(" * 100 + "1", "1" * 50, "x=1", "", "11 6/6", "0^0"])
def test_what_has_no_value_or_no_bound_is_unsupported(text: str):
    with pytest.raises(expression.Unsupported):
        expression.values(text)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"-4\leq x\leq 9", r"x\in [-4,9]"),
        (r"k<1 and k\neq 0", r"(-\infty,0)\cup (0,1)"),
        (r"0<g(x)<5", "(0,5)"),
        (r"\{x|x<1 or x>3\}", r"(-\infty,1)\cup (3,\infty)"),
        (r"x\geq -4 and x\leq 9", "[-4,9]"),
        ("x>a", r"(a,+\infty)"),
        (r"[1,2]\cup [2,3)", "[1,3)"),
    ],
)
def test_regions_are_sets_of_numbers(left: str, right: str):
    assert regions.parse(left).numbers == regions.parse(right).numbers


@pytest.mark.parametrize("answer", ["x=1, y=2", "1, 2", "(2,1)", "x>1, y>2", "2x>6", "(1+i,2)", "AB>CD, 3"])
def test_what_is_no_region(answer: str):
    assert regions.parse(answer) is None


def test_lists_and_parts_are_split_where_they_should():
    assert structure.items("1,234") == ["1,234"]
    assert structure.items("(1,2), (3,4)") == ["(1,2)", "(3,4)"]
    assert structure.items(r"1\pm\sqrt 2") == [r"1+\sqrt 2", r"1-\sqrt 2"]
    assert structure.items("y=2x+1(0<x<5)") == ["y=2x+1", "(0<x<5)"]
    assert structure.parts("(1) 30^\\circ; (2) 5") == ["30^\\circ", "5"]
    assert structure.parts("a) 3 b) 4") == ["3", "4"]
    assert structure.parts("f(1)+f(2)") == structure.parts("(1)(2)") == structure.parts("(2) 5") == []


@pytest.mark.parametrize(
    ("gold", "prediction", "word"),
    [
        ("no", "yes", "words"),
        ("34_5", "34_6", "base"),
        ("1", r"\sum_{k=1}^{9}k", "sum"),
        ("x", "(x" * 9 + ")" * 9, "brackets"),
        ("x", "((x)", "brackets"),
        ("x", "2^{99999}", "expensive"),
    ],
)
def test_math_verify_is_not_asked_what_it_answers_wrongly(gold: str, prediction: str, word: str):
    assert word in symbolic.objection(gold, prediction)
    assert not symbolic.agrees(gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        (r"\sum_{k=1}^{n}k", r"\sum_{k=1}^{n}(k+0)"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&\sqrt 4\end{pmatrix}"),
        (r"\int_0^1 x dx", r"\int_0^1 x dx"),
    ],
)
def test_math_verify_judges_what_the_core_does_not_know(gold: str, prediction: str):
    assert compare(canonical(gold), canonical(prediction)).right


@pytest.mark.parametrize(
    ("answer", "gold", "accuracy", "stage"),
    [
        ("12", "12", 1.0, "text"),
        ("B. 12", "B", 1.0, "option"),
        ("0.5", r"\frac12", 1.0, "exact"),
        ("12 m", "12 cm", 0.0, "exact"),
        (r"\sum_{k=1}^{n}(k+0)", r"\sum_{k=1}^{n}k", 1.0, "math-verify"),
        ("", "5", 0.0, "extraction"),
    ],
)
def test_a_verdict_says_which_stage_gave_it(answer: str, gold: str, accuracy: float, stage: str):
    verdict = score(f"<think>t</think><answer>{answer}</answer>", gold, explain=True)
    assert (verdict["accuracy"], verdict["stage"]) == (accuracy, stage)
    assert verdict["why"]


def test_rounding_and_conversion_are_named_switches():
    def accuracy(answer: str, gold: str, **options: str) -> float:
        return score(f"<think>t</think><answer>{answer}</answer>", gold, **options)["accuracy"]

    for answer, gold in (
        ("1.4142", r"\sqrt2"),
        ("0.08333333", r"\frac{1}{12}"),
        ("(0.6,2.6667]", r"(\frac35,\frac83]"),
    ):
        assert (accuracy(answer, gold), accuracy(answer, gold, decimals="rounded")) == (0.0, 1.0)
    for answer, gold in (("0.33", r"\frac13"), ("1.4143", r"\sqrt2"), ("1.4142", "1.5")):
        assert accuracy(answer, gold, decimals="rounded") == 0.0
    for answer, gold in (("100 cm", "1 m"), ("3.6 km/h", "1 m/s"), ("2 hours", "120 min")):
        assert (accuracy(answer, gold), accuracy(answer, gold, units="converted")) == (0.0, 1.0)
    for answer, gold in (("100 kg", "1 m"), ("10 cm", "1 m"), ("1 cm", "1 m")):
        assert accuracy(answer, gold, units="converted") == 0.0
    with pytest.raises(ValueError, match="'exact' or 'rounded'"):
        accuracy("1", "1", decimals="loose")


def _documented() -> list[tuple[str, list[str], list[str]]]:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = page.partition("## By examples")[2].partition("\n\n## ")[0].splitlines()
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows if row.startswith("| `")]
    spans = [[[span.replace("\\|", "|") for span in re.findall("`([^`]+)`", cell)] for cell in row] for row in cells]
    return [(gold[0], right, wrong) for gold, right, wrong in spans]


@pytest.mark.parametrize(("gold", "right", "wrong"), _documented())
def test_the_examples_of_the_documentation_are_true(gold: str, right: list[str], wrong: list[str]):
    verdicts = {
        answer: score(f"<think>t</think><answer>{answer}</answer>", gold)["accuracy"] for answer in right + wrong
    }
    assert verdicts == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)


def test_every_row_of_the_documentation_is_read():
    assert len(_documented()) > 25
