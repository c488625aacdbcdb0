"""Kinds of answers for `answers.constructed`: names and words, options, relations, ratios, parts and short derivations."""

import math
import re
from fractions import Fraction
from random import Random

from tests.helpers.answer_kinds import Question, apart, frac, kind, near, proper, put

# fmt: off


@kind
def named_values(draw: Random) -> Question:
    """A gold that names its quantity, the value without the name, and the other way round."""
    value = draw.randint(11, 80)
    name, unit, others = draw.choice((
        ("x", "", ("x = {}", "the value of x is {}", "解得x={}")), ("k", "", ("k = {}", "k的值为{}")),
        (r"\angle ABC", r"^\circ", (r"\angle CBA={}^\circ", "∠ABC = {}°", "∠ABC的度数是{}°")),
        ("|CD|", "", ("CD={}", "线段CD的长为{}")), ("AB", r"\text{ cm}", ("AB = {} cm", "AB的长是{}厘米")),
        (r"S_{\triangle ABC}", "", (r"S_{\triangle ABC} = {}", "△ABC的面积为{}")),
        ("f(2)", "", ("f(2) = {}",)), ("a_{10}", "", ("a_{10} = {}",)), (r"\tan A", "", (r"\tan A = {}",)), ("m+n", "", ("m + n = {}",)),
    ))
    form = f"{name}={value}{unit}"
    wrong = [*near(value, f"{name}={{}}{unit}"), *near(value)[:3],
             ("another value besides", f"{name}={value}{unit} or {name}={value + 4}{unit}"), ("other relation", f"{name}>{value}{unit}")]
    return Question([form], wrong, golds=[f"{value}{unit}"], right=[f"{value}{unit}", str(value), *(put(other, value) for other in others)])


@kind
def named_pairs(draw: Random) -> Question:
    (a, b), (first, second) = apart(draw, 2, 2, 15), draw.choice((("a", "b"), ("m", "n"), ("p", "q"), ("x", "y")))
    forms = [f"({first},{second})=({a},{b})", f"{first}={a},{second}={b}"]
    wrong = [("swapped", f"({first},{second})=({b},{a})"), ("swapped", f"{first}={b},{second}={a}"), ("swapped", f"({b},{a})"),
             ("one left out", f"{first}={a}"), ("one other", f"{first}={a},{second}={b + 1}"),
             ("sign", f"({first},{second})=({a},{-b})"), ("added up", f"{first}+{second}={a + b}")]
    right = [f"{second}={b},{first}={a}", f"{first}={a}，{second}={b}", rf"{first}={a}\text{{ and }}{second}={b}",
             f"$({first},{second})=({a},{b})$", f"{first} = {a} and {second} = {b}", rf"{first}={a},\quad {second}={b}"]
    return Question(forms, wrong, right=[*right, f"({a},{b})"])


@kind
def ratios(draw: Random) -> Question:
    a, b = draw.choice([(a, b) for a in range(1, 14) for b in range(2, 14) if math.gcd(a, b) == 1])
    c = draw.choice([each for each in range(1, 9) if each not in (a, b)])
    if draw.random() < 0.3:
        wrong = [("swapped", f"{b}:{a}:{c}"), ("one left out", f"{a}:{b}"), ("reversed", f"{c}:{b}:{a}"), ("one other", f"{a}:{b}:{c + 1}")]
        return Question([f"{a}:{b}:{c}"], wrong, right=[f"{a} : {b} : {c}", f"AB:BC:CA={a}:{b}:{c}", f"{a}：{b}：{c}", f"{a}∶{b}∶{c}"])
    wrong = [("swapped", f"{b}:{a}"), ("swapped", frac(Fraction(b, a))), ("one other", f"{a + 1}:{b}"), ("one other", f"{a}:{b + 1}"),
             ("part of the whole", f"{a}:{a + b}"), ("squared", f"{a * a}:{b * b}")]
    golds = [f"AB:CD={a}:{b}", rf"m:n={a}:{b}"]
    return Question([f"{a}:{b}"], wrong, golds=golds, right=[f"{a} : {b}", f"{a}：{b}", f"{a}∶{b}", f"{a} to {b}", rf"\frac{{{a}}}{{{b}}}",
        f"{a}/{b}"])


@kind
def parts(draw: Random) -> Question:
    """Marked parts, each with its own value; a right answer has them all."""
    texts = [str(draw.randint(10, 11)), frac(proper(draw)), rf"{draw.randint(2, 9)}\sqrt{{{draw.choice((2, 3, 5))}}}",
             rf"{draw.randint(12, 88)}^\circ", f"x={draw.randint(2, 9)}", draw.choice("ABCD")]  # no two of one value
    values = draw.sample(texts, draw.choice((2, 2, 3)))
    other = str(draw.randint(61, 99))

    def marked(mark: str, between: str, those: list[str]) -> str:
        return between.join(mark.format("①②③"[at] if mark == "{}" else at + 1) + value for at, value in enumerate(those))

    forms = [marked("({}) ", "; ", values), marked("（{}）", "；", values), marked("({}) ", "\n", values)]
    right = [marked("({}) ", ", ", values), marked("{}", "；", values), "\n".join(f"({at + 1}) ${value}$" for at, value in enumerate(values)),
             marked("（{}）", "\n", values), marked("({})", " ", values),
             "\n".join(rf"({at + 1}) \boxed{{{value}}}" for at, value in enumerate(values)),
             "; ".join(f"({at + 1}) the answer is ${value}$" for at, value in enumerate(values)), marked("Part {}: ", "\n", values)]
    swapped, changed, styles = [values[1], values[0], *values[2:]], [*values[:-1], other], (("({}) ", "; "), ("（{}）", "；"), ("{}", " "),
        ("({}) ", "\n"))
    wrong = [(note, marked(*draw.choice(styles), those)) for note,
             those in (("swapped", swapped), ("last other", changed), ("first other", [other, *values[1:]]), ("last left out", values[:-1]))]
    return Question(forms, [*wrong, ("one alone", values[-1]), ("one alone", values[0]),
                            ("all other", marked("({}) ", "; ", [other] * len(values)))], right=right)


@kind
def blanks(draw: Random) -> Question:
    """Two blanks without marks, filled in order; values of different kinds, so that order is never the question."""
    first, second = str(draw.randint(2, 60)), draw.choice((frac(proper(draw)), rf"{draw.randint(2, 9)}\sqrt{{3}}",
                                                           rf"{draw.randint(61, 88)}^\circ"))
    forms = [f"{first}; {second}", f"{first}；{second}", f"{first}, {second}"]
    right = [rf"\boxed{{{first}}}, \boxed{{{second}}}", f"{first}，{second}", f"${first}$, ${second}$", rf"\boxed{{{first}, {second}}}",
             f"{first}\n{second}", f"${first}$；${second}$", rf"\boxed{{{first}}} and \boxed{{{second}}}"]
    wrong = [("one left out", first), ("one left out", second), ("one other", f"{int(first) + 1}; {second}"),
             ("one other", f"{first}, {int(first) + 200}"), ("one too many", f"{first}, {second}, {int(first) + 200}"),
             ("one box alone", rf"\boxed{{{second}}}")]
    return Question(forms, wrong, right=right)


@kind
def options(draw: Random) -> Question:
    letter = draw.choice("ABCD")
    rest = [each for each in "ABCD" if each != letter]
    other, third = draw.sample(rest, 2)
    content, elsewhere = draw.sample((str(draw.randint(2, 90)), f"{draw.randint(20, 150)}°", rf"{draw.randint(2, 9)}\sqrt{{2}}", "菱形",
                                      "a square", f"{draw.randint(91, 99)} cm"), 2)
    styles = ("{}", "({})", "{}.", "{})", r"\text{{}}", r"\mathrm{{}}", r"\boxed{{}}", r"\boxed{\text{{}}}", "**{}**", "Option {}",
              "The correct option is {}.", "The correct choice is **{}**.", "故选：{}", "故选{}。", "故选：{}.",
              "选{}", "答案选{}", "选项{}正确。", "The answer is ({}).", "I choose {}.", "（{}）", "So the correct answer is option {}", "{}选项",
              "**({})**", "$({})$", "$\\boxed{\\textbf{({})}}$", "A triangle has three sides, so the answer is {}.", "因此正确答案是{}。")
    held = ("{}. " + content, "({}) " + content, "{}: " + content, "{}、" + content, "The correct option is {}: " + content + ".",
            r"\text{{}. }" + content, "**{}. " + content + "**")
    form, full = draw.choice(styles), draw.choice(held)
    wrong = [("other option", put(form, other)), ("other option", put(draw.choice(styles), third)),
             ("other option", put(full, other).replace(content, elsewhere)), ("two options", f"{letter} and {other}"),
             ("two options", f"{letter}{third}"), ("two options", f"{letter}, {other}"),
             ("this one ruled out", f"{letter} is incorrect, so the answer is {other}."), ("this one ruled out", f"选项{letter}错误，故选{other}。"),
             ("all options", "ABCD")]
    right = [put(style, letter) for style in (*styles, *held)] + [f"{other} is wrong, so the answer is {letter}.",
        f"{other}、{third}错误，故选{letter}。", f"{letter} is correct, while {other} and {third} are not.", chr(ord(letter) + 0xFEE0)]
    return Question([letter], wrong, golds=[f"({letter})", put(held[0], letter)] if draw.random() < 0.4 else [], right=right)


@kind
def several_options(draw: Random) -> Question:
    letters = sorted(draw.sample("ABCD", draw.choice((2, 3))))
    missing = [each for each in "ABCD" if each not in letters]
    styles = ("", ",", ", ", "、", " and ", "，", " ")
    wrong = [("one left out", draw.choice(styles).join(letters[1:])), ("one left out", "".join(letters[:-1])),
             ("one too many", "".join(sorted([*letters, missing[0]]))),
             ("one other", draw.choice(styles).join(sorted([*letters[1:], missing[-1]]))),
             ("the others", "".join(missing)), ("one too many", f"The correct options are {', '.join([*letters, missing[0]])}.")]
    right = [style.join(letters) for style in styles] + ["".join(letters[::-1]),
                                                         f"The correct options are {', '.join(letters[:-1])} and {letters[-1]}.",
                                                         f"故选：{''.join(letters)}.", rf"\boxed{{\text{{{''.join(letters)}}}}}",
                                                         f"选项{'、'.join(letters)}正确", f"({'), ('.join(letters)})"]
    return Question(["".join(letters), ",".join(letters)], wrong, right=right)


SHAPES = (  # what is meant, other ways to say it, what is something else
    ("isosceles triangle", ("Isosceles triangle", "an isosceles triangle", "isosceles", "Triangle ABC is an isosceles triangle."),
     ("scalene triangle", "a right triangle", "obtuse triangle")),
    ("rhombus", ("a rhombus", "Rhombus", "Quadrilateral ABCD is a rhombus.", "It is a rhombus"), ("rectangle", "a trapezoid", "kite")),
    ("square", ("a square", "Square", "The shape is a square."), ("rectangle", "circle", "a triangle")),
    ("parallelogram", ("a parallelogram", "The quadrilateral is a parallelogram.", "Parallelogram"), ("trapezoid", "a triangle", "pentagon")),
    ("Bob", ("bob", "Bob is the fastest.", "Bob.", "It is Bob."), ("Alice", "Tom", "Alice is the fastest.")),
    ("increasing", ("Increasing", "increasing.", "It is increasing."), ("decreasing", "constant", "It is decreasing.")),
    ("Evelyn", ("Evelyn", "EVELYN", "Evelyn is the oldest"), ("Carla", "Briana", "Angela is the oldest")),
    ("linear", ("Linear", "It is linear"), ("quadratic", "exponential", "nonlinear")),
    ("even", ("Even", "It is even", "even."), ("odd", "It is odd", "neither")),
    ("red", ("Red", "The red one", "red."), ("blue", "green", "The blue one")),
    ("菱形", ("四边形ABCD是菱形", "是菱形", "它是菱形。"), ("矩形", "四边形ABCD是梯形", "三角形")),
    ("等腰三角形", ("△ABC是等腰三角形", "等腰三角形。"), ("直角三角形", "△ABC是钝角三角形", "不等边三角形")),
    ("等腰直角三角形", ("△ABC是等腰直角三角形", "等腰直角三角形。"), ("等腰三角形", "直角三角形", "△ABC是等边三角形")),
    ("平行四边形", ("四边形ABCD为平行四边形", "平行四边形。"), ("梯形", "四边形ABCD为梯形", "三角形")),
    ("小明", ("小明跑得快", "小明。", "是小明"), ("小红", "小刚", "小红跑得快")),
    ("甲", ("甲。", "甲更稳定", "是甲", "甲的成绩更稳定"), ("乙", "乙更稳定", "乙的成绩更稳定")),
    ("第二象限", ("点P在第二象限", "第二象限。", "第二象限内"), ("第三象限", "点P在第一象限", "第四象限")),
    ("相交", ("直线与圆相交", "相交。"), ("相切", "相离", "直线与圆相切")),
    ("增大", ("y随x的增大而增大", "增大。"), ("减小", "y随x的增大而减小", "不变")),
    ("圆柱", ("这个几何体是圆柱", "圆柱体", "圆柱。"), ("圆锥", "球", "这个几何体是圆锥")),
)
DENIALS = {"": ("not {}", "It is not {}.", "It isn't {}"), "chinese": ("不是{}", "并非{}", "它不是{}。")}


@kind
def words(draw: Random) -> Question:
    main, right, wrong = draw.choice(SHAPES)
    denials = DENIALS["chinese" if re.search(r"[一-鿿]", main) else ""]
    return Question([main], [("other word", word) for word in wrong] * 2 + [("denied", put(denial, main)) for denial in denials], right=right)


@kind
def yes_or_no(draw: Random) -> Question:
    tables = (
        ("Yes", ("yes", "Yes.", "Yes, it is.", "YES", "Yes, because the two triangles are congruent."),
         ("No", "no.", "No, it is not.", "No, because the sides differ.")),
        ("No", ("no", "No.", "No, it is not.", "NO", "No, because the sum of the angles is not 180°."),
         ("Yes", "yes.", "Yes, it is.", "Yes, because they are equal.")),
        ("True", ("true", "True.", "The statement is true."), ("False", "false", "The statement is false.", "not true")),
        ("False", ("false", "False.", "The statement is false."), ("True", "true", "The statement is true.")),
        ("是", ("是。", "是的", "是的。"), ("不是", "否", "不是。")), ("正确", ("正确。", "该说法正确", "这个说法是正确的"), ("错误", "不正确", "该说法错误")),
        ("能", ("能。", "能够", "可以"), ("不能", "不能。", "不可以")), ("相等", ("相等。", "它们相等", "两者相等"), ("不相等", "它们不相等", "不相等。")),
        ("不能", ("不能。", "不能够"), ("能", "可以", "能。")), ("成立", ("成立。", "结论成立", "仍然成立"), ("不成立", "结论不成立", "不成立。")),
        ("错误", ("错误。", "该说法错误"), ("正确", "该说法正确")),
    )
    main, right, wrong = draw.choice(tables)
    return Question([main], [("the opposite", word) for word in wrong], right=right, deniable=False)


@kind
def relations(draw: Random) -> Question:
    p, q, r = draw.choice((("AB", "CD", "EF"), ("DE", "BC", "AC"), ("l_1", "l_2", "l_3"), ("a", "b", "c")))
    n = draw.randint(2, 5)
    tables = (
        ((rf"{p}\parallel {q}", f"{p}//{q}"), (rf"{q}\parallel {p}", f"{p}∥{q}", f"{p} // {q}", f"{p} ∥ {q}", f"{p}平行于{q}",
                                               f"{p} is parallel to {q}"),
                                               (rf"{p}\perp {q}", f"{p}={q}", rf"{p}\parallel {r}", f"{p}⊥{q}", f"{p}不平行于{q}", f"{p}∥{r}")),
        ((rf"{p}\perp {q}",), (rf"{q}\perp {p}", f"{p}⊥{q}", f"{p} ⊥ {q}", f"{p} is perpendicular to {q}", f"{p}垂直于{q}"),
         (rf"{p}\parallel {q}", f"{p}//{q}", rf"{p}\perp {r}", f"{p}={q}", f"{p} is not perpendicular to {q}")),
        ((r"\triangle ABC\sim\triangle DEF",), (r"\triangle DEF\sim\triangle ABC", "△ABC∽△DEF", "△ABC ∼ △DEF", "△ABC ~ △DEF",
                                                r"\triangle BCA\sim\triangle EFD", "△ABC与△DEF相似"),
                                                (r"\triangle ABC\cong\triangle DEF", r"\triangle ABC\sim\triangle DGH", "△ABC≌△DEF",
                                                 "△ABD∽△DEF")),
        ((r"\triangle ABC\cong\triangle DEF",), (r"\triangle DEF\cong\triangle ABC", "△ABC≌△DEF", "△ABC≅△DEF",
                                                 r"\triangle CBA\cong\triangle FED", "△ABC ≌ △DEF"),
                                                 (r"\triangle ABC\sim\triangle DEF", r"\triangle ABC\cong\triangle DEG", "△ABC∽△DEF",
                                                  "△ABC≌△DGF")),
        ((r"\angle 1=\angle 2",), (r"\angle 2=\angle 1", "∠1=∠2", "∠1 = ∠2"),
         (r"\angle 1=\angle 3", r"\angle 1>\angle 2", "∠1≠∠2", r"\angle 1+\angle 2=90^\circ")),
        ((r"\angle 1+\angle 2=180^\circ",), (r"\angle 2+\angle 1=180^\circ", "∠1+∠2=180°", "∠1 + ∠2 = 180°"),
         (r"\angle 1+\angle 2=90^\circ", r"\angle 1=\angle 2", "∠1+∠3=180°", "∠1-∠2=180°")),
        ((f"{p}={n}{q}",), (f"{n}{q}={p}", rf"{p}={n}\cdot {q}", f"{p} = {n}{q}"),
         (f"{q}={n}{p}", f"{p}={q}", f"{p}={n + 1}{q}", f"{p}>{n}{q}", f"{p}={n}{r}")),
        (("a<b<c",), ("c>b>a", "a < b < c"), ("a>b>c", "a<c<b", "b<a<c", "a<b")), (("a>b",), ("b<a", "a > b"), ("a<b", "a=b", r"a\ge b")),
        ((f"{p}={q}",), (f"{q}={p}", f"{p} = {q}", f"${p}={q}$"), (f"{p}={r}", rf"{p}\ne {q}", f"{p}>{q}", rf"{p}\perp {q}")),
        (("y_1>y_2",), ("y_2<y_1", "y_{1}>y_{2}", "y₁>y₂"), ("y_1<y_2", "y_1=y_2", "y_2>y_1")),
        ((">",), ("$>$", "＞", "\\gt"), ("<", "=", "$<$")), (("<",), ("$<$", "＜", "\\lt"), (">", "=", "$>$")),
        (("=",), ("$=$", "＝"), ("<", ">", r"\ne")),
    )
    forms, right, wrong = draw.choice(tables)
    return Question(forms, [("other relation", form) for form in wrong], right=right)


@kind
def clock_times(draw: Random) -> Question:
    hour, minute = draw.randint(1, 10), draw.choice(range(10, 60, 5))
    time, half = f"{hour}:{minute}", draw.choice(("AM", "PM"))
    other = "PM" if half == "AM" else "AM"
    wrong = [("other hour", f"{hour + 1}:{minute}"), ("other minute", f"{hour}:{(minute + 20) % 60 or 10:02}"), ("hour alone", str(hour)),
             ("minutes alone", f":{minute}"), ("read as a number", f"{hour}{minute}")]
    if draw.random() < 0.5:
        return Question([time], wrong, right=[f"{hour}:{minute}", f"{hour}时{minute}分", f"{hour}：{minute}", f"{hour}点{minute}分",
                                              f"${hour}:{minute}$", f"{hour} : {minute}"])
    wrong = [*wrong[:2], ("other half of the day", f"{time} {other}"), ("other half of the day", f"{time} {other[0].lower()}.m."),
             ("other hour", f"{hour + 1}:{minute} {half}")]
    return Question([f"{time} {half}"], wrong, right=[f"{time} {half.lower()}", f"{time} {half[0].lower()}.m.", rf"{time}\text{{ {half}}}",
                                                      f"{time}{half}", rf"{time}\text{{ {half.lower()[0]}.m.}}"])


@kind
def ordinals(draw: Random) -> Question:
    names = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
    at = draw.randint(2, 8)
    short = {each: f"{each + 1}{('st', 'nd', 'rd')[each] if each < 3 else 'th'}" for each in range(9)}
    other = draw.choice([each for each in range(9) if each != at])
    return Question([short[at]], [("other place", short[other]), ("other place", names[other]), ("other place", f"the {short[other]}")],
                    right=[f"the {short[at]}", names[at], f"the {names[at]}", f"The {short[at]}", rf"{at + 1}^{{\text{{{short[at][1:]}}}}}"])


@kind
def workings(draw: Random) -> Question:
    """A short derivation inside the answer: what it ends with counts."""
    a, b = draw.choice(((3, 4), (6, 8), (5, 12), (8, 15)))
    c = round(math.hypot(a, b))
    n, m = apart(draw, 2, 3, 30)
    tables = (
        (c, f"AB^2={a * a}+{b * b}={c * c}, so AB={c}", f"AB={c}, so the perimeter is {a}+{b}+{c}={a + b + c}"),
        (n * m, rf"{n}\times {m}={n * m}", rf"{n * m}-{n}={n * m - n}"),
        (n + m, f"{n}+{m}={n + m}", f"{n + m}+{m}={n + 2 * m}"), (n, f"x+{m}={n + m}, so x={n}", f"x={n}, so x+{m} = {n + m}"),
        (n, f"由x+{m}={n + m}，得x={n}", f"由x={n}，得x+{m}={n + m}"),
        (a * b // 2, rf"S=\frac{{1}}{{2}}\times {a}\times {b}={a * b // 2}", rf"S=\frac{{1}}{{2}}\times {a}\times {b}={a * b // 2 + 1}"),
        (180 - n - 60, f"∠A=180°-60°-{n}°={180 - n - 60}°", f"∠A=180°-{180 - n - 60}°={n + 60}°"),
        (n, rf"x = \frac{{{n * m}}}{{{m}}} = {n}", rf"x = \frac{{{n}}}{{{m}}} \times {m * 2} = {2 * n}"),
        (n, f"Since the two sides are equal and AB = {n}, we have CD = {n}.", f"Since AB = {n} and BC = {m}, we have AC = {n + m}."),
    )
    value, right, wrong = draw.choice(tables)
    return Question([f"{value}" + ("°" if "°" in right else "")], [("ends with another", wrong), *near(value)],
                    right=[right, f"{right}\n\nThe answer is {value}.", f"{right}\n\n答案：{value}", rf"{right}" + "\n\n" + rf"\boxed{{{value}}}"])
