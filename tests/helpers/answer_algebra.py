"""Kinds of answers for `answers.constructed`: points, regions, solutions, expressions and equations."""

from fractions import Fraction
from random import Random

from tests.helpers.answer_kinds import Question, apart, differing, frac, kind, terms

# fmt: off


@kind
def points(draw: Random) -> Question:
    first, second = apart(draw, 2, -12, 12)
    x, y = (frac(Fraction(first, 7) if draw.random() < 0.15 else Fraction(first)), str(second))
    wrong = [("swapped", f"({y},{x})"), ("other sign", f"({x},{-second})"), ("second other", f"({x},{second + 1})"), ("second left out", x),
             ("third coordinate", f"({x},{y},0)"),
             ("first other", f"({first + 13},{y})"), ("another point besides", f"({x},{y}), ({y},{x})"), ("added up", str(first + second))]
    right = [f"P({x},{y})", f"({x}, {y})", f"({x}, \\ {y})", f"点A的坐标为({x},{y})", f"点P({x},{y})", f"The coordinates of A are ({x}, {y})",
             f"A=({x},{y})"]
    return Question([f"({x},{y})"], wrong, golds=[f"({x}, {y})"], right=right,
                    leads=("The point is {}.", "点B的坐标是{}", "The coordinates of B are {}."))


@kind
def lists_of_points(draw: Random) -> Question:
    a, b, c, d = apart(draw, 4, -15, 15)
    forms = [f"({a},{b}),({c},{d})", f"({a},{b})或({c},{d})", f"({a},{b}) or ({c},{d})", f"({a}, {b}) and ({c}, {d})"]
    wrong = [("one left out", f"({a},{b})"), ("mixed up", f"({a},{d}),({c},{b})"), ("one other", f"({a},{b}),({c},{d + 1})"),
             ("one too many", f"({a},{b}),({c},{d}),({a},{d})"), ("one swapped", f"({a},{b}) or ({d},{c})")]
    return Question(forms, wrong, right=[f"({c},{d}),({a},{b})", f"({c}, {d})和({a}, {b})", f"$({a},{b})$ and $({c},{d})$",
                                         rf"({c},{d})\text{{ or }}({a},{b})", f"P({a},{b})或P({c},{d})"])


@kind
def vectors(draw: Random) -> Question:
    size = draw.choice((2, 3))
    values = apart(draw, size, -9, 12)
    inner, turned = ",".join(map(str, values)), ",".join(map(str, values[1:] + values[:1]))
    name = draw.choice((r"\vec{a}", r"\overrightarrow{AB}", r"\mathbf{a}"))
    wrong = [("order", f"({turned})"), ("negated", f"({','.join(str(-each) for each in values)})"),
             ("one left out", f"({','.join(map(str, values[:-1]))})" if size > 2 else str(values[0])),
             ("one other", f"({values[0] + 1},{','.join(map(str, values[1:]))})"), ("length added", f"({inner},{sum(values)})")]
    right = [f"{name}=({inner})", rf"\langle {inner}\rangle", r"\begin{pmatrix}" + r"\\".join(map(str, values)) + r"\end{pmatrix}"]
    return Question([f"({inner})"], wrong, golds=[right[0]], right=right)


@kind
def matrices(draw: Random) -> Question:
    a, b, c, d = apart(draw, 4, -9, 14)

    def matrix(p: int, q: int, r: int, s: int, kind_of: str = "pmatrix") -> str:
        return rf"\begin{{{kind_of}}}{p}&{q}\\{r}&{s}\end{{{kind_of}}}"

    wrong = [("transposed", matrix(a, c, b, d)), ("one other", matrix(a, b, c, d + 15)), ("one sign", matrix(a, -b, c, d)),
             ("rows swapped", matrix(c, d, a, b)), ("negated", matrix(-a, -b, -c, -d)), ("a row", f"({a},{b})"),
             ("determinant", str(a * d - b * c))]
    right = [matrix(a, b, c, d, "bmatrix"), rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}", f"A={matrix(a, b, c, d)}",
             rf"\left(\begin{{array}}{{cc}}{a}&{b}\\{c}&{d}\end{{array}}\right)",
             rf"\left[\begin{{array}}{{cc}}{a} & {b}\\ {c} & {d}\end{{array}}\right]"]
    return Question([matrix(a, b, c, d)], wrong, golds=right[:1], right=right)


@kind
def rays(draw: Random) -> Question:
    """One bound: x > a as an inequality, an interval and a set."""
    bound, strict, up = draw.randint(-9, 9), draw.random() < 0.5, draw.random() < 0.5
    sign = {(True, True): ">", (False, True): r"\ge ", (True, False): "<", (False, False): r"\le "}
    this, opposite, touching = sign[strict, up], sign[strict, not up], sign[not strict, up]

    def interval(at: int, open_end: bool, upwards: bool) -> str:
        return f"{'(' if open_end else '['}{at},+\\infty)" if upwards else rf"(-\infty,{at}{')' if open_end else ']'}"

    main = interval(bound, strict, up)
    forms = [f"x{this}{bound}", main, rf"\{{x\mid x{this}{bound}\}}"]
    right = [rf"x\in{main}" if main[0] == "(" else rf"x\in {main}", f"{bound}{opposite}x", main.replace("+", ""), rf"\{{x|x{this}{bound}\}}",
             rf"x\in\{{x|x{this}{bound}\}}"]
    wrong = [("end open or closed", f"x{touching}{bound}"), ("end open or closed", interval(bound, not strict, up)),
             ("other side", f"x{opposite}{bound}"), ("other side", interval(bound, strict, not up)),
             ("other bound", f"x{this}{bound + 1}"), ("other bound", interval(bound - 2, strict, up)), ("bound alone", f"x={bound}"),
             ("not the bound", rf"x\ne {bound}"), ("everything", r"(-\infty,+\infty)")]
    if bound:
        wrong += [("other sign", f"x{this}{-bound}"), ("other sign", interval(-bound, strict, up))]
    return Question(forms, wrong, right=right, leads=("The solution set is {}.", "不等式的解集为{}", "解集是{}。", "The range of x is {}."))


@kind
def segments(draw: Random) -> Question:
    """Two bounds: a < x <= b as an inequality, an interval and a set."""
    low, high = sorted(draw.sample(range(-12, 13), 2))
    left, right_end = draw.random() < 0.5, draw.random() < 0.5  # whether the end belongs to it

    def chain(at: int, to: int, first: bool, last: bool, middle: str = "x") -> str:
        return rf"{at}{chr(92) + 'le ' if first else '<'}{middle}{chr(92) + 'le ' if last else '<'}{to}"

    def interval(at: int, to: int, first: bool, last: bool) -> str:
        return f"{'[' if first else '('}{at},{to}{']' if last else ')'}"

    ends = (left, right_end)
    main, span = chain(low, high, *ends), interval(low, high, *ends)
    more, less = (rf"{chr(92)}ge " if left else ">"), (rf"{chr(92)}le " if right_end else "<")
    apart_form = f"x{more}{low}"
    right = [rf"x\in {span}", rf"{high}{chr(92) + 'ge ' if right_end else '>'}x{more}{low}", rf"{apart_form}\text{{ and }}x{less}{high}",
             rf"{apart_form}且x{less}{high}", rf"\{{x|{main}\}}"]
    wrong = [("ends open or closed", chain(low, high, not left, right_end)), ("ends open or closed", interval(low, high, left, not right_end)),
             ("ends open or closed", interval(low, high, not left, not right_end)),
             ("other bound", chain(low, high + 1, *ends)), ("other bound", interval(low - 1, high, *ends)), ("one side alone", apart_form),
             ("one side alone", f"x{less}{high}"),
             ("outside", rf"x<{low}\text{{ or }}x>{high}"), ("outside", rf"(-\infty,{low})\cup({high},+\infty)"),
             ("reversed", interval(high, low, *ends))]
    if left or right_end or draw.random() < 0.7:
        return Question([main, span, rf"\{{x\mid {main}\}}"], wrong, right=right)
    return Question([chain(low, high, *ends, "a")], [pair for pair in wrong if "x" not in pair[1]],
                    right=[span, rf"a\in {span}", rf"\{{a\mid {chain(low, high, *ends, 'a')}\}}"])


@kind
def unions(draw: Random) -> Question:
    low, high = sorted(draw.sample(range(-9, 10), 2))
    closed = draw.random() < 0.5
    less, more, left, right_end = (r"\le ", r"\ge ", "[", "]") if closed else ("<", ">", "(", ")")
    span = rf"(-\infty,{low}{right_end}\cup{left}{high},+\infty)"
    forms = [f"x{less}{low}或x{more}{high}", f"x{less}{low} or x{more}{high}", span]
    right = [rf"x\in {span}".replace("+", ""), rf"{left}{high},+\infty)\cup(-\infty,{low}{right_end}",
             rf"x{more}{high}\text{{ or }}x{less}{low}", rf"\{{x|x{less}{low}\text{{或}}x{more}{high}\}}",
             rf"\{{x\mid x{less}{low}\text{{ or }}x{more}{high}\}}"]
    swap = {"<": r"\le ", ">": r"\ge ", r"\le ": "<", r"\ge ": ">"}
    wrong = [("ends open or closed", f"x{swap[less]}{low} or x{swap[more]}{high}"), ("one part alone", f"x{more}{high}"),
             ("one part alone", rf"(-\infty,{low}{right_end}"), ("inside", f"{left}{low},{high}{right_end}"),
             ("inside", f"{low}{less}x{less}{high}"), ("other bound", rf"(-\infty,{low}{right_end}\cup{left}{high + 1},+\infty)"),
             ("other bound", f"x{less}{low - 1} or x{more}{high}"),
             ("one end open or closed", rf"(-\infty,{low}{right_end}\cup{'(' if closed else '['}{high},+\infty)")]
    return Question(forms, wrong, right=right, leads=("The solution is {}.", "不等式的解集是{}", "定义域为{}"))


@kind
def without_a_point(draw: Random) -> Question:
    """Everything but a point, or a ray without one of its points."""
    low, hole = draw.randint(-5, 3), draw.randint(4, 9)
    closed = draw.random() < 0.5
    more, end, other = (r"\ge ", "[", r">") if closed else (">", "(", r"\ge ")
    if draw.random() < 0.4:
        wrong = [("the point", f"x={hole}"), ("other point", rf"x\ne {hole + 1}"), ("one side alone", f"x>{hole}"), ("sign", rf"x\ne -{hole}"),
                 ("point put in", r"(-\infty,+\infty)")]
        return Question([rf"x\ne {hole}"], wrong, right=[rf"(-\infty,{hole})\cup({hole},+\infty)", rf"\{{x|x\ne {hole}\}}",
                                                         rf"\{{x\mid x\ne {hole}\}}"])
    main = rf"x{more}{low}"
    wrong = [("point put in", main), ("hole alone", rf"x\ne {hole}"), ("other hole", rf"{main}且x\ne {hole + 1}"),
             ("end open or closed", rf"x{other}{low}且x\ne {hole}"), ("other bound", rf"x{more}{low - 1}且x\ne {hole}"),
             ("cut off at the hole", f"{end}{low},{hole})"), ("hole taken for the end", f"({hole},+\\infty)")]
    right = [rf"{end}{low},{hole})\cup({hole},+\infty)", rf"{main}\text{{ and }}x\ne {hole}", rf"{main} and x\ne {hole}", rf"x\ne {hole}且{main}"]
    return Question([rf"{main}且x\ne {hole}"], wrong, golds=right[:2], right=right)


@kind
def all_or_nothing(draw: Random) -> Question:
    tables = (
        (r"(-\infty,+\infty)", ("R", r"\mathbb{R}", "all real numbers", r"x\in\mathbb{R}", "全体实数", "一切实数"),
         ("no solution", r"\emptyset", "x>0", r"(0,+\infty)", r"(-\infty,0)")),
        (r"\mathbb{R}", (r"(-\infty,+\infty)", r"(-\infty,\infty)", r"\mathbf{R}", "R"),
         (r"\mathbb{Z}", r"\emptyset", r"(0,+\infty)", r"x\ne 0")),
        ("no solution", ("No solution", "no solutions", "There is no solution.", "The equation has no solution."),
         ("x=0", "0", "x=1", "infinitely many solutions")),
        ("无解", ("方程无解", "无解。", "该不等式组无解", "原方程无解。"), ("x=0", "0", "有解", "无数解")),
    )
    main, right, wrong = draw.choice(tables)
    return Question([main], [("something else", form) for form in wrong], right=right, deniable=False)


@kind
def families(draw: Random) -> Question:
    """Infinitely many solutions or intervals, numbered by k."""
    part = draw.choice((3, 4, 6, 8))
    whole = r"k\in\mathbb{Z}"
    main = rf"x=k\pi+\frac{{\pi}}{{{part}}}"
    if draw.random() < 0.5:
        wrong = [("one alone", rf"x=\frac{{\pi}}{{{part}}}"), ("other period", rf"x=2k\pi+\frac{{\pi}}{{{part}}},{whole}"),
                 ("other sign", rf"x=k\pi-\frac{{\pi}}{{{part}}},{whole}"), ("other start", rf"x=k\pi+\frac{{\pi}}{{{part + 1}}},{whole}")]
        return Question([f"{main},{whole}", f"{main}({whole})"], wrong,
                        right=[rf"x=\frac{{\pi}}{{{part}}}+k\pi,{whole}", rf"\{{x|{main},{whole}\}}", f"{main}, k∈Z"])
    low, high = rf"k\pi-\frac{{\pi}}{{{part}}}", r"k\pi+\frac{\pi}{2}"
    wrong = [("ends open", f"({low},{high})({whole})"), ("one alone", rf"[-\frac{{\pi}}{{{part}}},\frac{{\pi}}{{2}}]"),
             ("other end", rf"[{low},k\pi+\frac{{\pi}}{{5}}]({whole})"), ("other sign", rf"[k\pi+\frac{{\pi}}{{{part}}},{high}]({whole})")]
    return Question([f"[{low},{high}]({whole})", f"[{low},{high}],{whole}"], wrong,
                    right=[rf"[-\frac{{\pi}}{{{part}}}+k\pi,\frac{{\pi}}{{2}}+k\pi],{whole}", f"[{low},{high}], k∈Z"])


@kind
def sets(draw: Random) -> Question:
    values = draw.sample(range(-9, 20), draw.choice((2, 3, 4)))
    if draw.random() < 0.12:
        return Question([r"\emptyset"], [("a number", "0"), ("not empty", r"\{0\}"), ("everything", r"\mathbb{R}"), ("not empty", r"\{1\}")],
                        right=["∅", r"A\cap B=\emptyset", "空集", "the empty set"])

    def written(members: list[int]) -> str:
        return rf"\{{{','.join(map(str, members))}\}}"

    other = max(values) + draw.randint(1, 5)
    wrong = [("one left out", written(values[1:])), ("one too many", written([*values, other])), ("one other", written([*values[1:], other])),
             ("one alone", str(values[0])), ("the largest for all", written([other, other + 1]))]
    name = draw.choice(("A", "M", r"A\cap B", r"A\cup B"))
    right = [written(values[::-1]), written(sorted(values)), f"{name}={written(values)}", ", ".join(map(str, values))]
    return Question([written(values)], wrong, golds=[f"{name}={written(values)}"], right=right)


@kind
def solutions(draw: Random) -> Question:
    """All solutions of an equation, in any order."""
    a, b = apart(draw, 2, -12, 13)
    var = draw.choice("xxxmat")
    forms = [f"{var}={a} or {var}={b}", f"{var}={a}或{var}={b}", f"{var}_1={a},{var}_2={b}", f"{a},{b}", rf"{var}={a}\text{{ or }}{var}={b}"]
    right = [rf"{var}_{{1}}={b},{var}_{{2}}={a}", f"{b}, {a}", f"{a} and {b}", f"{a}或{b}", f"{var}={b}或{a}", f"{var}={a},{b}",
             rf"\{{{a},{b}\}}", f"${var}={a}$ or ${var}={b}$", f"{var} = {b}, {var} = {a}", f"{var}={a}; {var}={b}",
             rf"\boxed{{{a}}} and \boxed{{{b}}}", rf"{var}={a}\quad \text{{or}}\quad {var}={b}", f"{a}和{b}"]
    wrong = [("one left out", f"{var}={a}"), ("one left out", str(b)), ("one other", f"{var}={a} or {var}={b + 25}"),
             ("one sign", f"{var}={a}或{var}={-b}"), ("signs", f"{-a}, {-b}"), ("one too many", f"{a}, {b}, {a + b}"),
             ("one other", rf"{var}_1={a},{var}_2={-b}"), ("none left", "no solution"), ("added up", str(a + b))]
    return Question(forms, wrong, right=right, leads=("The solutions are {}.", "方程的解为{}", "解得{}", "所以方程的根是{}。"))


@kind
def plus_or_minus(draw: Random) -> Question:
    base = draw.choice(("", "", "1", "2"))
    root = draw.choice((r"\sqrt{2}", r"\sqrt{7}", r"2\sqrt{3}") if base else ("3", "5", "4", r"\sqrt{2}", r"2\sqrt{3}"))
    low, high = f"{base}-{root}", f"{base}+{root}" if base else root
    forms = [rf"{base}\pm {root}", rf"x={base}\pm {root}"]
    wrong = [("one left out", high), ("one left out", low), ("one left out", f"x={low}"), ("other base", rf"{'3' if base else '1'}\pm {root}"),
             ("other root", rf"{base}\pm \sqrt{{11}}"), ("one too many", f"{low},{high},0")]
    right = [f"{high},{low}", f"x={high} or x={low}", f"{high}或{low}", f"x_1={low},x_2={high}", rf"x={high}\text{{ or }}x={low}",
             f"{low} and {high}", rf"\{{{low},{high}\}}"]
    return Question(forms, wrong, golds=[f"{high},{low}"], right=right)


@kind
def systems(draw: Random) -> Question:
    a, b = apart(draw, 2, -9, 12)
    c = draw.randint(13, 20)

    def cases(x: object, y: object) -> str:
        return rf"\begin{{cases}}x={x}\\y={y}\end{{cases}}"

    right = [rf"\left\{{\begin{{array}}{{l}}x={a}\\y={b}\end{{array}}\right.", f"x={a}, y={b}", f"y={b}, x={a}", f"({a},{b})",
             f"x={a} and y={b}", rf"x={a},\quad y={b}", f"$x={a}$, $y={b}$", f"x={a}\ny={b}", rf"(x,y)=({a},{b})", f"x={a}; y={b}",
             rf"\begin{{cases}} x = {a} \\ y = {b} \end{{cases}}",
             rf"\left\{{\begin{{aligned}}x&={a}\\y&={b}\end{{aligned}}\right.", rf"\boxed{{x={a}}} and \boxed{{y={b}}}"]
    wrong = [("swapped", cases(b, a)), ("swapped", f"x={b}, y={a}"), ("one left out", f"x={a}"), ("one left out", f"y={b}"),
             ("one other", cases(a, b + 1)), ("one other", f"x={c}, y={b}"), ("one sign", f"x={a}, y={-b}"), ("swapped", f"({b},{a})"),
             ("added up", str(a + b))]
    return Question([cases(a, b), f"x={a},y={b}"], wrong, golds=[f"x={a}，y={b}"], right=right, leads=("The solution is {}.", "方程组的解为{}", "解得{}"))


@kind
def products(draw: Random) -> Question:
    """(x+a)(x+b), factored, expanded and re-ordered."""
    a, b = apart(draw, 2, -9, 10)
    var = draw.choice("xxamt")
    factor = {each: f"({terms((1, var), (each, ''))})" for each in (a, b, -a, -b, a + 1)}
    square = f"{var}^2"
    expanded = terms((1, square), (a + b, var), (a * b, ""))
    forms = [expanded, factor[a] + factor[b]]
    right = [terms((a * b, ""), (a + b, var), (1, square)), factor[b] + factor[a], rf"{factor[a]}\cdot {factor[b]}",
             terms((a + b, var), (1, square), (a * b, ""))]
    wrong = differing((a + b, a * b), ("signs", factor[-a] + factor[-b], (-a - b, a * b)),
                      ("one sign", factor[a] + factor[-b], (a - b, -a * b)), ("middle lost", terms((1, square), (a * b, "")), (0, a * b)),
                      ("other number", terms((1, square), (a + b, var), (a * b + 1, "")), (a + b, a * b + 1)), ("factor lost", factor[a], "x"),
                      ("squares", terms((2, square), (a + b, var), (a * b, "")), "y"),
                      ("other factor", factor[a + 1] + factor[b], (a + b + 1, a * b + b)), ("negated", f"-{factor[a]}{factor[b]}", "z"))
    return Question(forms, wrong, right=right)


@kind
def expressions(draw: Random) -> Question:
    """Expressions of school algebra whose other spellings are equal for every value of their letters."""
    a, b = apart(draw, 2, 2, 9)
    tables = (
        (f"{a}x-{b}", [f"-{b}+{a}x", f"{a}x+(-{b})"], [f"{a}x+{b}", f"{b}x-{a}", f"{a}x", f"{b}-{a}x", f"{a}y-{b}"]),
        (f"{a}a+{b}b", [f"{b}b+{a}a"], [f"{b}a+{a}b", f"{a}a-{b}b", f"{a + b}ab", f"{a * b}ab"]),
        (rf"\frac{{x+{a}}}{{x-{b}}}", [rf"\frac{{-x-{a}}}{{{b}-x}}", rf"\frac{{{a}+x}}{{x-{b}}}", f"(x+{a})/(x-{b})"],
         [rf"\frac{{x-{b}}}{{x+{a}}}", rf"\frac{{x-{a}}}{{x+{b}}}", f"x+{a}-x-{b}", rf"\frac{{x+{a}}}{{{b}-x}}"]),
        (rf"{a}(x-{b})", [rf"{a}x-{a * b}", rf"(x-{b})\cdot {a}"], [rf"{a}x-{b}", rf"{a}x+{a * b}", rf"{b}(x-{a})", f"x-{a * b}"]),
        (f"x^2-{a**2}", [f"(x+{a})(x-{a})", f"(x-{a})(x+{a})", f"-{a**2}+x^2"], [f"(x-{a})^2", f"x^2+{a**2}", f"x^2-{a}", f"(x+{a})^2"]),
        (f"(x-{a})^2", [f"x^2-{2 * a}x+{a**2}", f"({a}-x)^2", f"(x-{a})(x-{a})"],
         [f"x^2-{a**2}", f"(x+{a})^2", f"x^2-{a}x+{a**2}", f"(x-{a})^3"]),
        (r"2^{n+1}-2", [r"2(2^n-1)", r"2\cdot 2^n-2", r"-2+2^{n+1}"], [r"2^n-2", r"2^{n+1}-1", r"2^{n+1}+2", r"2^{n+1}", r"2^{n-1}-2"]),
        (rf"{a}n-1", [rf"-1+{a}n", rf"{a}(n-1)+{a - 1}"], [rf"{a}n+1", rf"{a}(n-1)", rf"n-{a}", rf"{a}n"]),
        (r"\frac{n(n+1)}{2}", [r"\frac{n^2+n}{2}", r"\frac{1}{2}n(n+1)", "n(n+1)/2"],
         [r"\frac{n(n-1)}{2}", "n(n+1)", r"\frac{n^2+1}{2}", r"\frac{n(n+1)}{3}"]),
        (rf"\frac{{{a}}}{{x}}", [f"{a}/x", rf"{a}x^{{-1}}"], [rf"\frac{{x}}{{{a}}}", rf"{a}x", rf"-\frac{{{a}}}{{x}}", rf"\frac{{{a}}}{{x^2}}"]),
        (r"\sqrt{a^2+b^2}", [r"\sqrt{b^2+a^2}"], ["a+b", r"\sqrt{a+b}", "a^2+b^2", r"\sqrt{a^2-b^2}"]),
        (rf"{a}x^{b}y", [rf"{a}yx^{b}", rf"{a}\cdot x^{b}\cdot y"], [rf"{a}xy^{b}", rf"{b}x^{a}y", rf"-{a}x^{b}y", rf"{a}x^{b}"]),
        (r"\sin 2x", [r"2\sin x \cos x", r"\sin(2x)"], [r"2\sin x", r"\sin x", r"\cos 2x", r"\sin x\cos x"]),
        (r"e^{x}-1", ["-1+e^{x}", r"\mathrm{e}^{x}-1"], ["e^{x}+1", "e^{x}", r"e^{-x}-1", "1-e^{x}"]),
    )
    main, equal, other = draw.choice(tables)
    return Question([main], [("other expression", form) for form in other], right=equal)


@kind
def lines(draw: Random) -> Question:
    slope, shift = apart(draw, 2, -7, 10)
    sides = f"y={terms((slope, 'x'), (shift, ''))}"
    forms = [sides, f"{terms((slope, 'x'), (-1, 'y'), (shift, ''))}=0"]
    right = [f"y={terms((shift, ''), (slope, 'x'))}", f"{terms((1, 'y'), (-slope, 'x'))}={shift}", f"{terms((slope, 'x'), (-1, 'y'))}={-shift}",
             f"{terms((2 * slope, 'x'), (-2, 'y'), (2 * shift, ''))}=0", f"{terms((-slope, 'x'), (1, 'y'), (-shift, ''))}=0"]
    wrong = [(note, f"y={terms((m, 'x'), (c, ''))}") for note, m, c in (("slope's sign", -slope, shift), ("shift's sign", slope, -shift),
        ("swapped", shift, slope), ("other slope", slope + 11, shift), ("other shift", slope, shift + 11), ("shift lost", slope, 0))]
    wrong += [("x for y", f"x={terms((slope, 'y'), (shift, ''))}"), ("other sign", f"{terms((slope, 'x'), (1, 'y'), (shift, ''))}=0")]
    return Question(forms, wrong, right=right, leads=("The equation of the line is {}.", "直线AB的解析式为{}", "所以直线l的方程为{}。"))


@kind
def curves(draw: Random) -> Question:
    (a, b), radius = apart(draw, 2, 2, 8), draw.randint(2, 9)
    square = radius**2
    constant = a * a + b * b - square
    tables = (
        ([f"(x-{a})^2+(y+{b})^2={square}", f"{terms((1, 'x^2'), (1, 'y^2'), (-2 * a, 'x'), (2 * b, 'y'), (constant, ''))}=0"],
         [f"(y+{b})^2+(x-{a})^2={square}", f"(x-{a})^2+(y+{b})^2={radius}^2"],
         [f"(x+{a})^2+(y-{b})^2={square}", f"(x-{a})^2+(y+{b})^2={radius}", f"(x-{b})^2+(y+{a})^2={square}", f"(x-{a})^2-(y+{b})^2={square}",
          f"(x-{a})^2+(y+{b})^2={square + 1}"]),
        ([f"y^2={4 * a}x"], [f"x=\\frac{{y^2}}{{{4 * a}}}", f"{4 * a}x=y^2", f"y^2-{4 * a}x=0"],
         [f"x^2={4 * a}y", f"y^2=-{4 * a}x", f"y^2={2 * a}x", f"y={4 * a}x^2"]),
        ([rf"\frac{{x^2}}{{{a * a}}}+\frac{{y^2}}{{{b}}}=1"], [rf"\frac{{y^2}}{{{b}}}+\frac{{x^2}}{{{a * a}}}=1",
            rf"{b}x^2+{a * a}y^2={a * a * b}"],
         [rf"\frac{{x^2}}{{{a * a}}}-\frac{{y^2}}{{{b}}}=1", rf"\frac{{x^2}}{{{a * a + 1}}}+\frac{{y^2}}{{{b}}}=1",
          rf"\frac{{x^2}}{{{a * a}}}+\frac{{y^2}}{{{b + 1}}}=1"] + ([rf"\frac{{x^2}}{{{b}}}+\frac{{y^2}}{{{a * a}}}=1"] if b != a * a else [])),
        ([f"y=(x-{a})^2+{b}", f"y=x^2-{2 * a}x+{a * a + b}"], [f"y={b}+(x-{a})^2", f"y-{b}=(x-{a})^2"],
         [f"y=(x+{a})^2+{b}", f"y=(x-{a})^2-{b}", f"y=-(x-{a})^2+{b}", f"y=(x-{b})^2+{a}", f"y=x^2-{2 * a}x+{a * a}"]),
        ([rf"y=\frac{{{a}}}{{x}}"], [f"y={a}/x", f"y={a}x^{{-1}}"],
         [rf"y=-\frac{{{a}}}{{x}}", rf"y=\frac{{x}}{{{a}}}", f"y={a}x", rf"y=\frac{{{a + 1}}}{{x}}"]),
        ([f"f(x)=x^2-{a}x"], [f"f(x)=x(x-{a})", f"f(x)=-{a}x+x^2"], [f"f(x)=x^2+{a}x", f"f(x)=x^2-{a}", f"f(x)=x^2-{a + 1}x", f"f(x)={a}x-x^2"]),
        ([rf"y=2\sin(2x+\frac{{\pi}}{{{a}}})"], [rf"y=2\sin(\frac{{\pi}}{{{a}}}+2x)"],
         [rf"y=2\sin(2x-\frac{{\pi}}{{{a}}})", rf"y=2\cos(2x+\frac{{\pi}}{{{a}}})", rf"y=\sin(2x+\frac{{\pi}}{{{a}}})",
          rf"y=2\sin(x+\frac{{\pi}}{{{a}}})"]),
        ([rf"a_n={a}n-1"], [rf"a_n=-1+{a}n", rf"a_{{n}}={a}n-1"], [rf"a_n={a}n+1", rf"a_n=n-{a}", rf"a_n={a}n"]),
    )
    forms, right, wrong = draw.choice(tables)
    return Question(forms, [("other curve", form) for form in wrong], right=right)
