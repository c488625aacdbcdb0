r"""Splitting a quantity such as 12 cm, 60^\circ, $5, 3 km/h or 20 percent into its value and its unit.

A unit is a product of powers of base units and a factor, so that L and dm^3, N·m and J are the same unit, cm and m are
not; with `factor` two of one dimension can be converted where a user allows it.
"""

import re
from fractions import Fraction
from typing import NamedTuple

# base unit: "symbol[=factor] word word …", symbols and short words keep their case (mW is not MW).
_TABLE = {
    "m": "m|meters meter metres metre 米; km=1000|kilometers kilometer kilometres kilometre 千米 公里; dm=1/10|decimeters decimeter 分米;"
    "cm=1/100|centimeters centimeter centimetres centimetre 厘米; mm=1/1000|millimeters millimeter millimetres millimetre 毫米;"
    "nm=1/1000000000|nanometers nanometer; μm=1/1000000|um micrometers 微米; in=127/5000|inches inch 英寸; ft=381/1250|feet foot 英尺;"
    "yd=1143/1250|yards yard; mi=201168/125|miles mile 英里",
    "kg": "kg|kilograms kilogram 千克 公斤; g=1/1000|grams gram 克; mg=1/1000000|milligrams milligram 毫克; t=1000|tonnes tonne 吨;"
    "lb|pounds pound lbs; oz|ounces ounce",
    "s": "s|seconds second secs sec 秒; ms=1/1000|milliseconds; min=60|minutes minute mins 分钟 分; h=3600|hours hour hrs hr 小时 时",
    "day": "day|days 天 日; week=7|weeks 周 星期",
    "month": "month|months 个月 月; year=12|years year yr 年; century=1200|centuries",
    "L": "L=1/1000|liters liter litres litre 升; mL=1/1000000|ml milliliters milliliter millilitres millilitre 毫升; dL=1/10000",
    "deg": "deg|degrees degree 度", "degC": "degC|摄氏度", "degF": "degF|华氏度", "rad": "rad|radians radian 弧度",
    "%": "%|percentage percent pct", "‰": "‰", "$": "$|dollars dollar USD 美元; cent=1/100|cents cent 美分",
    "¥": "¥|yuan RMB CNY 元; jiao=1/10|角", "€": "€|euros euro EUR 欧元", "£": "£|GBP 英镑; penny=1/100|pence penny",
    "A": "A|amperes ampere amps amp 安培 安; mA=1/1000", "mol": "mol|moles mole 摩尔", "K": "K|kelvin", "lx": "lx|lux",
    "N": "N|newtons newton 牛顿 牛; kN=1000", "J": "J|joules joule 焦耳 焦; kJ=1000; cal|calories; kcal; eV",
    "W": "W|watts watt 瓦特 瓦; kW=1000|千瓦; MW=1000000; mW=1/1000", "V": "V|volts volt 伏特 伏; kV=1000; mV=1/1000",
    "Ω": "Ω|ohms ohm 欧姆 欧; kΩ=1000", "Pa": "Pa|pascals pascal 帕斯卡 帕; kPa=1000; MPa=1000000",
    "Hz": "Hz|hertz 赫兹; kHz=1000; MHz=1000000", "dB": "dB|decibels", "gal": "gal|gallons gallon 加仑", "unit": "unit|units 个单位 单位", "ha": "ha|hectares 公顷",
    "arcmin": "arcmin|'", "arcsec": "arcsec|''", "am": "am|a.m. a.m AM A.M. A.M", "pm": "pm|p.m. p.m PM P.M. P.M",
}  # fmt: skip
_DERIVED = {
    "L": ({"m": 3}, 1),
    "J": ({"kg": 1, "m": 2, "s": -2}, 1),
    "N": ({"kg": 1, "m": 1, "s": -2}, 1),
    "W": ({"kg": 1, "m": 2, "s": -3}, 1),
}
_COMPOUND_NAMES = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "mpg": "mi/gal"}


class Unit(NamedTuple):
    """Powers of base units in order, and how many of those one of it is."""

    powers: tuple[tuple[str, int], ...]
    factor: Fraction


def _read_table() -> dict[str, tuple[dict[str, int], Fraction]]:
    found: dict[str, tuple[dict[str, int], Fraction]] = {}
    for base, row in _TABLE.items():
        for entry in row.split(";"):
            head, _, words = entry.strip().partition("|")
            symbol, _, factor = head.partition("=")
            # Without a factor to the base it is a unit of its own, which is never converted.
            name = base if factor or symbol == base else symbol
            powers = _DERIVED[base][0] if base in _DERIVED and name == base else {name: 1}
            for spelling in (symbol, *words.split()):
                found[spelling] = (powers, Fraction(factor or 1))
    return found


_UNITS = _read_table()
_BASES = {base for powers, _ in _UNITS.values() for base in powers}
_LOWER = {name.lower(): unit for name, unit in _UNITS.items() if len(name) > 3}
_SORTED = [re.escape(name) for name in sorted([*_UNITS, *_COMPOUND_NAMES], key=len, reverse=True)]
_NAME = f"(?:{'|'.join(_SORTED)}|(?i:{'|'.join(name for name in _SORTED if len(name) > 3)}))"
# km/h, m/s^2, N \cdot m, square meters, cm^{3}, kg m s^{-2}, 元/千克, feet per second
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\s*\d\s*\}|-?\d))?"
_FACTOR = rf"(?:(?:square|sq\.?|cubic|cu\.?|平方|立方)\s*)?\(?(?:{_NAME}(?![A-Za-z])|k?\\Omega){_POWER}\)?(?:\s+(?:squared|cubed))?"
_UNIT = re.compile(
    rf"\s*({_FACTOR}(?:\s*(?:/|\\cdot|\*|per\b|每|an?\b)?\s*{_FACTOR}){{0,3}}|\^\\circ(?:\s*[CF](?![A-Za-z]))?)\s*\.?$"
)
_PART = re.compile(
    r"(?P<slash>/)?[\s*()]*(?:(?P<square>square|sq\.?|平方)|(?P<cube>cubic|cu\.?|立方))?\s*(?P<name>[A-Za-z.%‰Ωμ$€£¥\u4e00-\u9fff]+)"
    r"(?P<power>\s*\^\s*\{?\s*-?\s*\d\s*\}?)?(?:\)?\s+(?:(?P<squared>squared)|(?P<cubed>cubed)))?"
)
_LETTER_UNITS = set("mgtshLNJWVAK")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2}(?![a-zA-Z])")
_MONEY = re.compile(r"^([-+]?)\s*(\\\$|\$|¥|￥|€|£|RMB|US\$)\s*(?=[-\d.])")
_MONEY_AFTER = re.compile(r"(?<=[\d.])\s*(\\\$|\$|¥|￥|€|£)$")
_NUMERIC_END = re.compile(r"(?:[\d.)}\]%!]|\\pi|\\infty)$")
# Number, then counted things in words: "5 apples", "3 个". Any word counts as a unit after a plain number.
_COUNTED = re.compile(
    r"^([-+]?[\d,./ ]*\d|[-+]?\\frac\{\d+\}\{\d+\})\s*((?:[A-Za-z]{3,}|[\u4e00-\u9fff])(?:[A-Za-z \u4e00-\u9fff]*))$"
)
_BEHIND_LETTERS = re.compile(rf"(.*[a-z)}}\]])\s*({'|'.join(name for name in _SORTED if name[0] > chr(0x4E00))})")
_MULTIPLES = re.compile(
    r"(?:hundred|thousand|million|billion|trillion|dozen|times|factorial|over|[百千万亿])", re.IGNORECASE
)


def split(text: str) -> tuple[str, Unit | None]:
    """(value, unit) of a canonical answer; unit None when there is none. "12 cm^2" gives ("12", m^2 by 1/10000)."""
    text = text.strip()
    before = _MONEY.match(text)
    if match := before or _MONEY_AFTER.search(text):
        rest = text[match.end() :] if before else ""
        if rate := re.match(rf"([\d.,/]+?)\s*(?:/|per\b|每|an?\b)\s*({_NAME})$", rest):  # $3/pound
            return match[1] + rate[1], unit(f"{match[2].lstrip(chr(92))}/{rate[2]}")
        sign = match[2 if before else 1].lstrip("\\").replace("US", "").replace("￥", "¥").replace("RMB", "¥")
        value = match[1] + rest if before else text[: match.start()]
        return value.strip(), unit(sign)
    # Units stand at the end and are short: look only there, so that long text costs nothing.
    for position in range(max(1, len(text) - 60), len(text)):
        if _NUMERIC_END.search(text[max(0, position - 8) : position].rstrip()):
            match = _UNIT.match(text, position)
            if match and not _is_product(text[:position], match[1].strip()):
                return text[:position].strip(), unit(match[1])
    if match := _BEHIND_LETTERS.fullmatch(text):  # 0.8a元
        return match[1].strip(), unit(match[2])
    if len(text) < 80 and (match := _COUNTED.match(text)) and not _MULTIPLES.match(match[2]):
        return match[1].strip(), Unit(((" ".join(match[2].split()).casefold().rstrip("s"), 1),), Fraction(1))
    return text, None


def is_known(unit: Unit) -> bool:
    """Whether all of it stands in the table; counted things do not."""
    return all(base in _BASES for base, _ in unit.powers)


def _is_product(value: str, name: str) -> bool:
    """Whether a letter is a variable rather than a unit: (a+b)h is a product, 12 h and AB = 12 m are quantities."""
    return name in _LETTER_UNITS and bool(_VARIABLE.search(re.split(r"[=<>]", value)[-1]))


def unit(text: str) -> Unit:
    """The unit of a spelling: "m/s", "m s^{-1}" and "meters per second" are the same."""
    text = text.replace("^\\circ", "deg ").replace("\\Omega", "Ω").replace("\\cdot", " ")
    text = re.sub(r"deg\s+([CF])", r"deg\1", text)
    text = re.sub(r"\bper\b|每|(?<=\w) an? (?=\w)", "/", text)
    for name, spelled in _COMPOUND_NAMES.items():
        text = re.sub(rf"\b{name}\b", spelled, text, flags=re.IGNORECASE)
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for match in _PART.finditer(text):
        name = match["name"].rstrip(".") if match["name"] not in _UNITS else match["name"]
        bases, size = _UNITS.get(name) or _LOWER.get(name.lower()) or ({name: 1}, Fraction(1))
        power = int(re.sub(r"[\s{}^]", "", match["power"] or "1"))
        power *= 2 if match["square"] or match["squared"] else 3 if match["cube"] or match["cubed"] else 1
        power = -power if match["slash"] else power
        factor *= size**power
        for base, exponent in bases.items():
            powers[base] = powers.get(base, 0) + exponent * power
    return Unit(tuple(sorted((base, power) for base, power in powers.items() if power)), factor)
