"""Kinds of answers for `answers.constructed`, numbers first: each makes a question
with spellings of its value and values that differ from it.

Forms are LaTeX without delimiters, or plain text; a form with a dollar or an empty line is taken as it stands. What a fair examiner could
argue about stays out: rounding, conversion of units, hedging, an equation given by one side only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

# fmt: off


@dataclass(frozen=True)
class Question:
    """One question's spellings.

    forms  equal spellings that golds and answers may have
    wrong  (what is wrong with it, the form) of answers that differ from every gold
    golds  further spellings of the gold alone
    right  further spellings of a right answer alone
    leads  sentences of this kind that may hold the answer, "{}" in its place
    deniable  whether "not" before a form makes sense

    Example: Question(["3:5"], [("swapped", "5:3")], right=["3 to 5"])
    """

    forms: Sequence[str]
    wrong: Sequence[tuple[str, str]]
    golds: Sequence[str] = ()
    right: Sequence[str] = ()
    leads: Sequence[str] = ()
    deniable: bool = True


KINDS: dict[str, Callable[[Random], Question]] = {}


def kind(make: Callable[[Random], Question]) -> Callable[[Random], Question]:
    KINDS[make.__name__] = make
    return make


def differing(truth: object, *options: tuple[str, str, object]) -> list[tuple[str, str]]:
    """The (note, form) of the options whose value is not the truth's, numbers compared to nine digits."""
    return [(note, form) for note, form, value in options if not _equal(truth, value)]


def _equal(left: object, right: object) -> bool:
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, (str, frozenset, tuple)) or isinstance(right, (str, frozenset, tuple)):
        return left == right
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9) if not isinstance(left, complex) else abs(left - right) < 1e-9


def put(form: str, value: object) -> str:
    """The form with the value in the place of "{}". Example: put(r"\boxed{{}}", 5) == r"\boxed{5}"."""
    return form.replace("{}", str(value))


def near(value: int, form: str = "{}") -> list[tuple[str, str]]:
    """Other whole numbers a slip could give, in a form."""
    slips = [("off by one", value + 1), ("off by one", value - 1), ("other sign", -value), ("ten times", 10 * value), ("twice", 2 * value)]
    return differing(value, *((note, put(form, other), other) for note, other in slips))


def frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return str(value) if value.denominator == 1 else rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def decimal(value: Fraction) -> str:
    """A terminating decimal, exactly. Example: decimal(Fraction(-5, 4)) == "-1.25"."""
    text = f"{float(value):.10f}".rstrip("0").rstrip(".")
    assert Fraction(text) == value, value
    return text


def terms(*parts: tuple[int, str]) -> str:
    """A sum. Example: terms((1, "x^2"), (-3, "x"), (2, "")) == "x^2-3x+2"."""
    text = ""
    for factor, name in parts:
        size = "" if abs(factor) == 1 and name else str(abs(factor))
        text += f"{'-' if factor < 0 else '+'}{size}{name}" if factor else ""
    return text.removeprefix("+") or "0"


def proper(draw: Random, low: int = 2, high: int = 12) -> Fraction:
    """A fraction below 1, not one half, whose bounds are small."""
    bottom = draw.randint(max(low, 3), high)
    return Fraction(draw.choice([top for top in range(1, bottom) if math.gcd(top, bottom) == 1]), bottom)


def apart(draw: Random, count: int, low: int, high: int) -> list[int]:
    """Whole numbers of different size, none of them 0 or 1 in size."""
    sizes = draw.sample(range(max(2, low), high), count)
    return [size if low >= 0 or draw.random() < 0.6 else -size for size in sizes]


UNITS = {  # how the unit is written after the number, its names in words, and units it is not
    "cm": (r"{}\text{ cm}", ("{} centimeters", "{}厘米", "{}cm"), r"{}\text{ cm}^2"),
    "m": (r"{}\text{ m}", ("{} meters", "{}米", "{} 米"), r"{}\text{ cm}"),
    "km": (r"{}\text{ km}", ("{} kilometers", "{}千米", "{}km"), r"{}\text{ m}"),
    "kg": (r"{}\text{ kg}", ("{} kilograms", "{}千克", "{}kg"), r"{}\text{ g}"),
    "cm2": (r"{}\text{ cm}^2", ("{} square centimeters", "{}平方厘米", "{} cm²", "{} cm^2", r"{}\,\mathrm{cm}^{2}"), r"{}\text{ cm}^3"),
    "m2": (r"{}\text{ m}^2", ("{} square meters", "{}平方米", "{}m²", "{} m^2"), r"{}\text{ m}"),
    "cm3": (r"{}\text{ cm}^3", ("{} cubic centimeters", "{}立方厘米", "{} cm³"), r"{}\text{ cm}^2"),
    "s": (r"{}\text{ s}", ("{} seconds", "{}秒", "{} s"), r"{}\text{ min}"),
    "h": (r"{}\text{ h}", ("{} hours", "{}小时", "{} h"), r"{}\text{ min}"),
    "min": (r"{}\text{ min}", ("{} minutes", "{}分钟", "{} min"), r"{}\text{ s}"),
    "N": (r"{}\text{ N}", ("{} newtons", "{}牛", "{} N"), r"{}\text{ J}"),
    "V": (r"{}\text{ V}", ("{} volts", "{}伏", "{}V"), r"{}\text{ A}"),
    "ohm": (r"{}\,\Omega", ("{} ohms", "{}欧", "{} Ω", "{}Ω"), r"{}\text{ V}"),
    "yuan": (r"{}\text{ yuan}", ("{} yuan", "{}元", "{} 元"), "{} dollars"),
    "dollars": (r"{}\text{ dollars}", ("{} dollars", r"\${}", "${}"), "{} cents"),
}
RATES = {
    "km/h": (r"{}\text{ km/h}", ("{} kilometers per hour", "{}千米/时", "{} km/h", "{}km/h", r"{}\ \mathrm{km/h}", "{} km per hour"),
             r"{}\text{ m/s}"),
    "m/s": (r"{}\text{ m/s}", ("{} meters per second", "{}米/秒", "{}m/s", r"{}\ \mathrm{m/s}", r"{} \text{ m}/\text{s}"), r"{}\text{ m/s}^2"),
    "m/s2": (r"{}\text{ m/s}^2", ("{} meters per second squared", "{} m/s²", "{} m/s^2", r"{}\ \mathrm{m/s^2}"), r"{}\text{ m/s}"),
    "yuan/kg": ("{}元/千克", ("{} 元/千克", r"{}\text{元/千克}", "每千克{}元"), "{}元/克"),
    "g/cm3": (r"{}\text{ g/cm}^3", ("{} g/cm³", "{} grams per cubic centimeter", "{}克/立方厘米", r"{}\,\mathrm{g/cm^3}"), r"{}\text{ g/cm}^2"),
    "m/min": (r"{}\text{ m/min}", ("{} meters per minute", "{}米/分", "{}m/min"), r"{}\text{ m/s}"),
}


def _measured(draw: Random, table: dict, value: int) -> Question:
    main, spelt, other = table[draw.choice(list(table))]
    wrong = [*near(value, main), *near(value)[:2], ("another value besides", f"{put(main, value)}, {put(main, value + 2)}")]
    leads = ("The total is {}.", "So the result is {}.", "总共是{}。", "结果为{}")
    right = [put(form, value) for form in spelt]
    if spelt[1].startswith("{}"):  # the number marked, its unit outside
        right.append(put(spelt[1], draw.choice((rf"$\boxed{{{value}}}$ ", f"${value}$ ", rf"\boxed{{{value}}}", rf"\({value}\) "))))
    if draw.random() < 0.4:  # a gold without its unit takes any
        return Question([str(value)], wrong, right=[put(main, value), *right], leads=leads)
    wrong += [("other unit", put(other, value))] * 4
    return Question([put(main, value)], wrong, golds=[put(spelt[1], value)], right=[str(value), *right], leads=leads)


@kind
def units(draw: Random) -> Question:
    return _measured(draw, UNITS, draw.randint(2, 200))


@kind
def rates(draw: Random) -> Question:
    return _measured(draw, RATES, draw.randint(2, 90))


@kind
def whole_numbers(draw: Random) -> Question:
    value = draw.choice([draw.randint(2, 99), -draw.randint(2, 40), draw.randint(100, 2500)])
    wrong = [*near(value), ("another value besides", f"{value}, {value + 3}"), ("another value besides", f"{value} and {value + 5}"),
             ("half", frac(Fraction(value, 2)))]
    leads = ("The value of $k$ is {}.", "所以k的值是{}。", "k = {}", "We find that a+b = {}", "所以它的值是 {}")
    return Question([str(value)], wrong, right=[f"{value}.0", f"x={value}", f"{value - 3}+3={value}", f"n = {value}"], leads=leads)


@kind
def decimals(draw: Random) -> Question:
    value = Fraction(draw.choice([each for each in range(-400, 2000) if each % 10 and each]), 100)
    wrong = differing(value, *((note, decimal(other), other) for note,
                               other in (("point moved", value * 10), ("point moved", value / 10), ("other sign", -value),
                                         ("last digit", value + Fraction(1, 100)),
                                                                                 ("off by one", value + 1),
                                                                                     ("rounded away", Fraction(round(value) or 7)))))
    return Question([decimal(value)], wrong, right=[f"{decimal(value)}0", frac(value), f"x = {decimal(value)}"])


@kind
def fractions(draw: Random) -> Question:
    value = proper(draw) * draw.choice((1, 1, -1))
    if draw.random() < 0.5 and value.numerator not in (1, -1):
        value = 1 / value
    top, bottom = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    wrong = differing(value, ("upside down", frac(1 / value), 1 / value), ("other sign", frac(-value), -value),
                      ("other numerator", frac(value + Fraction(1, bottom)), value + Fraction(1, bottom)),
                      ("other denominator", rf"{sign}\frac{{{top}}}{{{bottom + 1}}}", value * bottom / (bottom + 1)),
                      ("bar read as a point", f"{sign}{top}.{bottom}", float(f"{sign}{top}.{bottom}")),
                      ("numerator alone", f"{sign}{top}", Fraction(f"{sign}{top}")),
                      ("another value besides", f"{frac(value)}, {frac(value + 1)}", (value,)))
    right = [rf"\frac{{{sign}{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}", rf"x={frac(value)}"]
    right += [decimal(value)] if not 10**6 * value % 1 else []
    return Question([frac(value)], wrong, right=right)


@kind
def mixed_numbers(draw: Random) -> Question:
    part, whole, sign = proper(draw), draw.randint(1, 12), draw.choice(("", "", "-"))
    value, unsigned = (-1 if sign else 1) * (whole + part), whole + part
    form = rf"{sign}{whole}{frac(part)}"
    wrong = differing(value, ("fraction alone", sign + frac(part), part), ("whole alone", f"{sign}{whole}", whole),
                      ("other whole", rf"{sign}{whole + 1}{frac(part)}", whole + 1 + part),
                      ("product", sign + frac(whole * part), whole * part * (-1 if sign else 1)),
                      ("difference", sign + frac(whole - part), whole - part),
                      ("other sign", ("" if sign else "-") + f"{whole}{frac(part)}", -value), ("upside down", frac(1 / value), 1 / value))
    right = [frac(value), f"{sign}{whole} {part}", f"{sign}{whole}又{part}"] + ([] if sign else [f"{whole}+{frac(part)}"])
    right += [decimal(value)] if not 10**5 * unsigned % 1 else []
    return Question([form, frac(value)], wrong, right=right)


@kind
def percentages(draw: Random) -> Question:
    value = draw.choice([each for each in range(3, 98) if each != 50])
    share = Fraction(value, 100)
    wrong = [*near(value, r"{}\%"), ("rest", rf"{100 - value}\%"), ("share as percent", rf"{decimal(share)}\%"), ("per mille", f"{value}‰"),
             ("share moved", decimal(share / 10))]
    return Question([rf"{value}\%", f"{value}%"], wrong, right=[f"{value} %", f"{value} percent", decimal(share), frac(share),
        rf"x = {value}\%", f"{value}.0%", rf"\boxed{{{value}}}\%", f"${value}$%"])


@kind
def probabilities(draw: Random) -> Question:
    value = draw.choice([Fraction(top, bottom) for bottom in (4, 5, 6, 8, 9, 10, 12, 15, 20) for top in range(1, bottom) if math.gcd(top,
        bottom) == 1])
    top, bottom = value.numerator, value.denominator
    exact = not 10**4 * value % 1
    wrong = [("of the opposite", frac(1 - value)), ("upside down", frac(1 / value)), ("other count", rf"\frac{{{top}}}{{{bottom + 1}}}"),
             ("tenth", rf"\frac{{{top}}}{{{bottom}0}}"), ("count alone", str(top + 1)), ("squared", frac(value * value))]
    wrong += [("percent of a percent", rf"{decimal(value)}\%")] if exact else []
    right = [f"P(A)={frac(value)}", f"{top}/{bottom}", rf"P=\frac{{{top}}}{{{bottom}}}"] + ([decimal(value), rf"{decimal(100 * value)}\%",
        f"P = {decimal(value)}"] if exact else [])
    return Question([frac(value)], wrong, golds=[decimal(value)] if exact else [], right=right,
                    leads=("The probability is {}.", "概率为{}", "所以所求的概率是{}。"))


@kind
def repeating_decimals(draw: Random) -> Question:
    block = draw.choice(("3", "6", "7", "27", "45", "18", "123"))
    value, turned = Fraction(int(block), 10 ** len(block) - 1), block[1:] + block[:1]
    dotted = rf"0.\dot{{{block[0]}}}" + (rf"{block[1:-1]}\dot{{{block[-1]}}}" if len(block) > 1 else "")
    wrong = [("not repeating", f"0.{block}"), ("later start", rf"0.0\overline{{{block}}}"), ("upside down", frac(1 / value)),
             ("whole added", rf"1.\overline{{{block}}}"), ("other block", rf"0.\overline{{{int(block) + 1}}}"),
             ("numerator off", frac(value + Fraction(1, value.denominator)))]
    wrong += [("turned", rf"0.\overline{{{turned}}}")] if turned != block else []
    return Question([frac(value), rf"0.\overline{{{block}}}"], wrong, right=[dotted, f"x={frac(value)}"])


@kind
def scientific(draw: Random) -> Question:
    digits, power = draw.choice([each for each in range(11, 99) if each % 10]), draw.choice((*range(4, 12), *range(-8, -2)))
    mantissa = f"{digits // 10}.{digits % 10}"
    form = rf"{mantissa}\times 10^{{{power}}}"
    wrong = [("other power", rf"{mantissa}\times 10^{{{power + 1}}}"), ("other power", rf"{mantissa}\times 10^{{{power - 1}}}"),
             ("sign of the power", rf"{mantissa}\times 10^{{{-power}}}"),
             ("other mantissa", rf"{digits // 10}.{digits % 10 + 1 if digits % 10 < 9 else 1}\times 10^{{{power}}}"),
             ("power alone", f"10^{{{power}}}"), ("mantissa alone", mantissa), ("other sign", f"-{form}"),
             ("base lost", rf"{mantissa}\times {abs(power)}")]
    golds = [str(digits * 10 ** (power - 1))] if 0 < power < 9 else []
    return Question([form], wrong, golds=golds, right=[rf"{mantissa}\cdot 10^{{{power}}}", f"{mantissa} × 10^{power}", f"{mantissa}*10^{power}",
                                                       f"{mantissa}e{power}",
                                                       rf"{mantissa} \times 10^{{{power}}}\text{{ km}}"][: 5 if golds else 4])


@kind
def thousands(draw: Random) -> Question:
    value = draw.choice((draw.randint(1001, 99999), draw.randint(1_000_001, 99_999_999)))
    grouped = f"{value:,}"
    right = [grouped.replace(",", sign) for sign in (",", "{,}", r"\,", r",\!", " ", r"\ ")]
    other = value + draw.choice((1, 100, -100, 1000))
    wrong = [("other digit", f"{other:,}"), ("other digit", str(other)), ("first group alone", grouped.split(",")[0]),
             ("a group lost", grouped.rpartition(",")[0]), ("ten times", f"{10 * value:,}"),
             ("ten times", f"{10 * value:,}".replace(",", "{,}")), ("last group alone", str(value % 1000 or 7))]
    return Question([str(value), grouped], wrong, golds=right[1:3], right=[*right, f"{grouped}.0"])


@kind
def number_bases(draw: Random) -> Question:
    base, value = draw.choice((2, 3, 5, 7, 8)), draw.randint(20, 200)

    def digits(number: int) -> str:
        return (digits(number // base) if number >= base else "") + str(number % base)

    text = digits(value)
    wrong = [("other base", f"{text}_{{{base + 1}}}"), ("other base", f"{text}_{{10}}"), ("other number", f"{digits(value + 1)}_{{{base}}}"),
             ("other number", f"{digits(value - 3)}_{base}"), ("shifted", f"{text}0_{base}"), ("shortened", f"{text[:-1]}_{base}")]
    return Question([f"{text}_{{{base}}}", f"{text}_{base}", f"({text})_{base}"], wrong,
                    right=[f"{text} (base {base})", rf"{text}_{{\text{{base }}{base}}}"])


@kind
def angles(draw: Random) -> Question:
    value = draw.choice([each for each in range(11, 175) if each not in (60, 90)])
    wrong = [*near(value, r"{}^\circ"), ("supplement", rf"{180 - value}^\circ"),
             ("another value besides", rf"{value}^\circ, {180 - value}^\circ"), ("other unit", f"{value} cm"),
             ("right angle", r"90^\circ"), ("minutes", f"{value}'")]
    right = [str(value), f"{value} degrees", f"{value}度", rf"\angle A={value}^\circ", rf"{value} \text{{ degrees}}", f"{value}°", f"${value}$°", f"${value}$ degrees",
             rf"$\boxed{{{value}}}^\circ$", rf"\boxed{{{value}}}°"]
    leads = (r"$\angle ABC$ is {}.", "∠BAC的度数为{}", "∠1的度数是{}。", "the measure of angle B is {}.", "The angle is {}", "所以∠AOB = {}")
    return Question([rf"{value}^\circ"], wrong, golds=[f"{value}°"], right=right, leads=leads)


@kind
def degrees_and_minutes(draw: Random) -> Question:
    degrees, minutes = draw.sample(range(11, 60), 2)
    forms = [rf"{degrees}^\circ{minutes}'", f"{degrees}°{minutes}′"]
    wrong = [("swapped", rf"{minutes}^\circ{degrees}'"), ("minutes left out", rf"{degrees}^\circ"),
             ("other minutes", rf"{degrees}^\circ{minutes - 10}'"), ("other degrees", f"{degrees + 1}°{minutes}′")]
    return Question(forms, wrong, right=[rf"{degrees}^\circ {minutes}^{{\prime}}", f"{degrees}度{minutes}分", f"{degrees}° {minutes}'",
                                         rf"\angle A={degrees}^\circ{minutes}'"])


@kind
def surds(draw: Random) -> Question:
    factor, root = draw.randint(2, 9), draw.choice((2, 3, 5, 6, 7, 10, 13))
    truth = factor * math.sqrt(root)
    form = rf"{factor}\sqrt{{{root}}}"
    wrong = differing(truth, ("swapped", rf"{root}\sqrt{{{factor}}}", root * math.sqrt(factor)),
                      ("sum", rf"{factor}+\sqrt{{{root}}}", factor + math.sqrt(root)), ("other sign", f"-{form}", -truth),
                      ("root lost", str(factor * root), factor * root),
                      ("other factor", rf"{factor + 1}\sqrt{{{root}}}", truth + math.sqrt(root)),
                      ("factor lost", rf"\sqrt{{{root}}}", math.sqrt(root)),
                      ("factor under the root", rf"\sqrt{{{factor * root}}}", math.sqrt(factor * root)),
                      ("other root", rf"{factor}\sqrt{{{root + 1}}}", factor * math.sqrt(root + 1)),
                      ("both signs", rf"\pm {form}", "both"), ("cube root", rf"{factor}\sqrt[3]{{{root}}}", factor * root ** (1 / 3)))
    right = [rf"\sqrt{{{factor**2 * root}}}", rf"{factor}\cdot\sqrt{{{root}}}", f"{factor}*sqrt({root})", rf"AB={form}",
             rf"\sqrt{{{root}}}\times {factor}", rf"{factor}\times\sqrt{{{root}}}"]
    return Question([form], wrong, right=right, leads=("The length of AB is {}.", "所以AB的长为{}", "线段BC的长是{}。", "the distance is {}"))


@kind
def surd_fractions(draw: Random) -> Question:
    root, bottom = draw.choice((2, 3, 5, 7)), draw.choice((2, 3, 4, 5, 6))
    truth = math.sqrt(root) / bottom
    wrong = differing(truth, ("upside down", rf"\frac{{{bottom}}}{{\sqrt{{{root}}}}}", 1 / truth),
                      ("all under the root", rf"\sqrt{{\frac{{{root}}}{{{bottom}}}}}", math.sqrt(root / bottom)),
                      ("other sign", rf"-\frac{{\sqrt{{{root}}}}}{{{bottom}}}", -truth),
                      ("root lost", frac(Fraction(root, bottom)), root / bottom), ("divisor lost", rf"\sqrt{{{root}}}", truth * bottom),
                      ("other root", rf"\frac{{\sqrt{{{root + 1}}}}}{{{bottom}}}", math.sqrt(root + 1) / bottom),
                      ("other divisor", rf"\frac{{\sqrt{{{root}}}}}{{{bottom + 1}}}", math.sqrt(root) / (bottom + 1)))
    right = [rf"\frac{{1}}{{{bottom}}}\sqrt{{{root}}}", rf"\frac{{{root}}}{{{bottom}\sqrt{{{root}}}}}", rf"\sqrt{{{root}}}/{bottom}",
             rf"\sqrt{{\frac{{{root}}}{{{bottom**2}}}}}"]
    return Question([rf"\frac{{\sqrt{{{root}}}}}{{{bottom}}}"], wrong, right=right, leads=(r"$\sin A$ = {}", "所以cosB的值为{}", "the ratio is {}."))


@kind
def surd_sums(draw: Random) -> Question:
    (first, second), root, sign = apart(draw, 2, 2, 9), draw.choice((2, 3, 5, 6, 7)), draw.choice((1, -1))
    signed, mark, other = sign * second, "+" if sign > 0 else "-", "-" if sign > 0 else "+"
    surd, truth = rf"{second}\sqrt{{{root}}}", first + signed * math.sqrt(root)
    wrong = differing(truth, ("conjugate", f"{first}{other}{surd}", 0), ("negated", f"-{first}{other}{surd}", -truth),
                      ("factors swapped", rf"{second}{mark}{first}\sqrt{{{root}}}", second + sign * first * math.sqrt(root)),
                      ("first part lost", surd, 0), ("second part lost", str(first), first), ("both signs", rf"{first}\pm {surd}", "both"),
                      ("other first", f"{first + 1}{mark}{surd}", truth + 1),
                      ("other root", rf"{first}{mark}{second}\sqrt{{{root + 1}}}", 0))
    right = [(f"{surd}+{first}" if sign > 0 else f"-{surd}+{first}"), rf"{first}{mark}\sqrt{{{second**2 * root}}}",
             rf"\frac{{{2 * first}{mark}{2 * second}\sqrt{{{root}}}}}{{2}}", f"({first}{mark}{surd})"]
    return Question([f"{first}{mark}{surd}"], wrong, right=right)


@kind
def multiples_of_pi(draw: Random) -> Question:
    value = draw.choice((Fraction(draw.randint(2, 40)), proper(draw), 1 + proper(draw)))
    top, bottom = value.numerator, value.denominator

    def pi(factor: Fraction, name: str = r"\pi") -> str:
        over = f"{'' if factor.numerator == 1 else factor.numerator}{name}"
        return over if factor.denominator == 1 else rf"\frac{{{over}}}{{{factor.denominator}}}"

    wrong = differing(value, ("pi lost", frac(value), 0), ("squared", pi(value, r"\pi^2"), 0), ("other factor", pi(value + 1), value + 1),
                      ("twice", pi(2 * value), 2 * value),
                      ("other sign", f"-{pi(value)}", -value), ("sum", rf"{frac(value)}+\pi", 0), ("factor lost", r"\pi", 1),
                      ("upside down", pi(1 / value), 1 / value))
    right = [rf"{frac(value)}\pi", rf"{frac(value)}\cdot\pi", rf"S={pi(value)}",
             f"{top}*pi/{bottom}" if bottom > 1 else f"{top}*pi"] + ([rf"{decimal(value)}\pi"] if not 1000 * value % 1 else [])
    return Question([pi(value)], wrong, right=right, leads=("The area is {}.", "扇形的面积是{}", "弧长为{}。"))


@kind
def sums_with_pi(draw: Random) -> Question:
    (first, second), mark = apart(draw, 2, 2, 20), draw.choice("+-")
    other = "-" if mark == "+" else "+"
    form = rf"{first}\pi{mark}{second}"
    wrong = [("other sign", rf"{first}\pi{other}{second}"), ("factors swapped", rf"{second}\pi{mark}{first}"),
             ("added up", rf"{first + second}\pi"), ("part lost", rf"{first}\pi"),
             ("pi lost", f"{first}{mark}{second}"), ("other number", rf"{first}\pi{mark}{second + 1}")]
    right = [rf"{second}+{first}\pi" if mark == "+" else rf"-{second}+{first}\pi", rf"({form})\text{{ cm}}^2", rf"S = {form}"]
    return Question([form], wrong, right=right)


@kind
def logs_and_trig(draw: Random) -> Question:
    a, b = draw.sample((2, 3, 5, 7), 2)
    tables = (
        (rf"\ln {a}", math.log(a), ((rf"\frac{{1}}{{2}}\ln {a * a}", ""), (rf"-\ln\frac{{1}}{{{a}}}", ""), (rf"\log_e {a}", "")),
         ((rf"\ln {b}", math.log(b)), (rf"-\ln {a}", -math.log(a)), (str(a), a), (rf"\frac{{1}}{{\ln {a}}}", 1 / math.log(a)))),
        (rf"{a}\ln {b}", a * math.log(b), ((rf"\ln {b**a}", ""), (rf"\ln {b}^{{{a}}}", "")),
         ((rf"{b}\ln {a}", b * math.log(a)), (rf"\ln {a * b}", math.log(a * b)), (rf"\ln {b}", math.log(b)),
          (rf"{a}+\ln {b}", a + math.log(b)))),
        (rf"\log_{a} {b}", math.log(b, a), ((rf"\log_{{{a}}}{b}", ""), (rf"\frac{{\ln {b}}}{{\ln {a}}}", ""),
                                            (rf"\frac{{1}}{{\log_{b} {a}}}", "")),
                                            ((rf"\log_{b} {a}", math.log(a, b)), (rf"\log_{a} {b + 1}", math.log(b + 1, a)),
                                             (frac(Fraction(b, a)), b / a))),
        (rf"1+\log_{a} {b}", 1 + math.log(b, a), ((rf"\log_{a} {a * b}", ""), (rf"\log_{a} {b}+1", "")),
         ((rf"\log_{a} {b}", math.log(b, a)), (rf"1-\log_{a} {b}", 1 - math.log(b, a)), (rf"\log_{a} {a + b}", math.log(a + b, a)))),
        (r"\frac{1}{2}", 0.5, ((r"\sin 30^\circ", ""), (r"\cos 60^\circ", ""), (r"\sin\frac{\pi}{6}", ""), (r"\cos\frac{\pi}{3}", "")),
         ((r"\sin 60^\circ", 0.866), (r"\cos 30^\circ", 0.866), (r"\tan 30^\circ", 0.577), (r"\sin\frac{\pi}{3}", 0.866))),
        (r"\sqrt{3}", math.sqrt(3), ((r"\tan 60^\circ", ""), (r"\tan\frac{\pi}{3}", "")),
         ((r"\tan 30^\circ", 0.577), (r"\sin 60^\circ", 0.866), (r"\tan\frac{\pi}{6}", 0.577))),
        (rf"\arctan {a}", math.atan(a), ((rf"\tan^{{-1}} {a}", ""), (rf"\arctan({a})", "")),
         ((rf"\arctan\frac{{1}}{{{a}}}", math.atan(1 / a)), (rf"\tan {a}", math.tan(a)), (rf"\arctan {b}", math.atan(b)),
          (rf"-\arctan {a}", -math.atan(a)))),
        (rf"e^{a}", math.exp(a), ((rf"e^{{{a}}}", ""), (rf"\mathrm{{e}}^{{{a}}}", "")),
         ((f"{a}e", a * math.e), (f"e^{{-{a}}}", math.exp(-a)), (f"e^{b}", math.exp(b)), (f"{a}^{{e}}", a**math.e))),
    )
    main, truth, right, wrong = draw.choice(tables)
    return Question([main], differing(truth, *(("other value", form, value) for form, value in wrong)), right=[form for form, _ in right])


@kind
def counting(draw: Random) -> Question:
    n, k = draw.choice([(n, k) for n in range(4, 9) for k in range(2, n - 1) if 2 * k != n])
    tables = (
        (math.factorial(n), (f"{n}!",), ((f"{n - 1}!", math.factorial(n - 1)), (f"{n + 1}!", math.factorial(n + 1)),
            (str(n * (n - 1)), n * n - n))),
        (math.comb(n, k), (rf"\binom{{{n}}}{{{k}}}", rf"C_{{{n}}}^{{{k}}}", rf"C_{n}^{k}={math.comb(n, k)}", rf"\frac{{{n}!}}{{{k}!{n - k}!}}",
                           rf"\mathrm{{C}}_{{{n}}}^{{{k}}}"), ((rf"\binom{{{n}}}{{{k - 1}}}", math.comb(n, k - 1)),
                               (rf"C_{{{n + 1}}}^{{{k}}}", math.comb(n + 1, k)), (f"{n}!", math.factorial(n)))),
        (math.perm(n, k), (rf"A_{{{n}}}^{{{k}}}", rf"\frac{{{n}!}}{{{n - k}!}}", rf"A_{n}^{k}={math.perm(n, k)}"),
         ((rf"C_{{{n}}}^{{{k}}}", math.comb(n, k)), (f"{n}!", math.factorial(n)), (rf"A_{{{n}}}^{{{k + 1}}}", math.perm(n, k + 1)))),
        (k**n, (f"{k}^{{{n}}}", f"{k}^{n}"), ((f"{n}^{{{k}}}", n**k), (f"{k}^{{{n + 1}}}", k ** (n + 1)), (str(k * n), k * n))),
    )
    value, right, wrong = draw.choice(tables)
    return Question([str(value)], [*differing(value, *(("other count", form, other) for form, other in wrong)), *near(value)], golds=right[:1],
                    right=right, leads=("There are {} ways.", "共有{}种不同的方法", "the number is {}"))


@kind
def complex_numbers(draw: Random) -> Question:
    a, b = apart(draw, 2, -9, 10)
    form = terms((a, ""), (b, "i"))
    wrong = [("conjugate", terms((a, ""), (-b, "i"))), ("swapped", terms((b, ""), (a, "i"))), ("negated", terms((-a, ""), (-b, "i"))),
             ("i lost", str(a + b)), ("one part alone", str(a)), ("one part alone", f"{b}i"), ("modulus", rf"\sqrt{{{a * a + b * b}}}"),
             ("other part", terms((a, ""), (b + 1 if b != -1 else 5, "i")))]
    return Question([form], wrong, right=[terms((b, "i"), (a, "")), form.replace("i", r"\mathrm{i}"), f"z={form}", f"z = {form}", f"({form})"])
