"""Splitting a quantity such as 12 cm, 60^\\circ, $5 or 20 percent into its value and one spelling of its unit."""

import re

# One spelling a unit; symbols keep their case (mW is not MW), words do not.
_SYMBOLS = [
    "km",
    "hm",
    "dm",
    "cm",
    "mm",
    "nm",
    "pm",
    "m",
    "kg",
    "mg",
    "g",
    "t",
    "ms",
    "s",
    "h",
    "min",
    "mL",
    "ml",
    "dL",
    "L",
    "kN",
    "N",
    "kJ",
    "J",
    "kW",
    "W",
    "MW",
    "kV",
    "mV",
    "V",
    "mA",
    "A",
    "kPa",
    "MPa",
    "Pa",
    "kHz",
    "MHz",
    "Hz",
    "mol",
    "K",
    "cal",
    "kcal",
    "eV",
    "rad",
    "lx",
    "dB",
    "ha",
    "ft",
    "in",
    "mi",
    "mph",
    "kmh",
    "Wh",
]
_WORDS = {
    "cm": "centimeters centimeter centimetres centimetre 厘米",
    "mm": "millimeters millimeter millimetres millimetre 毫米",
    "dm": "decimeters decimeter decimetres decimetre 分米",
    "km": "kilometers kilometer kilometres kilometre 千米 公里",
    "m": "meters meter metres metre 米",
    "kg": "kilograms kilogram 千克 公斤",
    "g": "grams gram 克",
    "mg": "milligrams milligram 毫克",
    "t": "tonnes tonne tons ton 吨",
    "s": "seconds second secs sec 秒",
    "min": "minutes minute mins 分钟",
    "h": "hours hour hrs hr 小时 时",
    "day": "days day 天 日",
    "week": "weeks week 周 星期",
    "year": "years year 年",
    "mL": "milliliters milliliter millilitres millilitre ml 毫升",
    "L": "liters liter litres litre 升",
    "deg": "degrees degree deg 度",
    "degC": "degrees_celsius 摄氏度",
    "%": "percentage percent pct",
    "Ω": "ohms ohm 欧姆 欧",
    "N": "newtons newton 牛顿 牛",
    "J": "joules joule 焦耳 焦",
    "W": "watts watt 瓦特 瓦",
    "V": "volts volt 伏特 伏",
    "A": "amperes ampere amps amp 安培 安",
    "Pa": "pascals pascal 帕斯卡 帕",
    "Hz": "hertz 赫兹",
    "mol": "moles mole 摩尔",
    "$": "dollars dollar USD 美元",
    "¥": "yuan RMB 元",
    "cent": "cents cent",
    "ft": "feet foot",
    "in": "inches inch",
    "mi": "miles mile",
    "lb": "pounds pound lbs",
    "rad": "radians radian",
    "unit": "units unit 个单位 单位",
}
_SPELLINGS = {symbol: symbol for symbol in _SYMBOLS} | {"ml": "mL"}
_SPELLINGS |= {word: unit for unit, words in _WORDS.items() for word in words.split()}
_NAMES = sorted(_SPELLINGS, key=len, reverse=True)
_LOWER = {name.lower(): unit for name, unit in _SPELLINGS.items() if len(name) > 3}
_NAME = "(?:" + "|".join(re.escape(name) for name in _NAMES) + ")"
# km/h, m/s^2, N \cdot m, square meters, cm^{3}, kg m s^{-2}
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\s*\d\s*\}|-?\d))?"
_FACTOR = rf"(?:(?:square|sq\.?|cubic|cu\.?|平方|立方)\s*)?(?i:{_NAME})(?![A-Za-z]){_POWER}(?:\s+(?:squared|cubed))?"
_COMPOUND = rf"{_FACTOR}(?:\s*(?:/|\\cdot|\*|·|per\b|每)?\s*{_FACTOR}){{0,3}}"
_OMEGA = r"k?\\Omega"
_UNIT = re.compile(rf"\s*({_COMPOUND}|{_OMEGA}|\^\\circ(?:\s*[CF](?![A-Za-z]))?)\s*\.?$")
_PART = re.compile(
    r"(?P<slash>/)?[\s*]*(?:(?P<square>square|sq\.?|平方)|(?P<cube>cubic|cu\.?|立方))?\s*(?P<name>[A-Za-z%Ωμ$\u4e00-\u9fff]+)"
    r"(?P<power>\s*\^\s*\{?\s*-?\s*\d\s*\}?)?(?:\s+(?:(?P<squared>squared)|(?P<cubed>cubed)))?"
)
_DERIVED = {"mph": {"mi": 1, "h": -1}, "kmh": {"km": 1, "h": -1}}
_LETTER_UNITS = set("mgtshLNJWVAK")
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2}(?![a-zA-Z])")
_MONEY = re.compile(r"^(-?)\s*(\\\$|\$|¥|￥|€|£|RMB|US\$)\s*(?=[\d.])")
_MONEY_AFTER = re.compile(r"(?<=[\d.])\s*(\\\$|\$|¥|￥|€|£)$")
_NUMERIC_END = re.compile(r"(?:[\d.)}\]%!]|\\pi|\\infty)$")
# Number, then counted things in words: "5 apples", "3 个". Any word counts as a unit after a plain number.
_COUNTED = re.compile(r"^([-+]?[\d,./ ]*\d)\s*((?:[A-Za-z]{3,}|[\u4e00-\u9fff])(?:[A-Za-z \u4e00-\u9fff]*))$")


def split(text: str) -> tuple[str, str | None]:
    """(value, unit) of a canonical answer; unit None when there is none. "12 cm^2" gives ("12", "cm^2")."""
    text = text.strip()
    if match := _MONEY.match(text):
        return (match[1] + text[match.end() :]).strip(), _money(match[2])
    if match := _MONEY_AFTER.search(text):
        return text[: match.start()].strip(), _money(match[1])
    # Units stand at the end and are short: look only there, so that long text costs nothing.
    tail_start = max(0, len(text) - 60)
    for position in range(tail_start, len(text)):
        if position and _NUMERIC_END.search(text[max(0, position - 8) : position].rstrip()):
            match = _UNIT.match(text, position)
            if match and not _is_product(text[:position], match[1].strip()):
                return text[:position].strip(), spelling(match[1])
    if len(text) < 80 and (match := _COUNTED.match(text)):
        return match[1].strip(), " ".join(match[2].split()).casefold().rstrip("s")
    return text, None


def _is_product(value: str, unit: str) -> bool:
    """Whether a letter is a variable rather than a unit: (a+b)h is a product, 12 h and AB = 12 m are quantities."""
    return unit in _LETTER_UNITS and bool(_VARIABLE.search(re.split(r"[=<>]", value)[-1]))


def _money(sign: str) -> str:
    return {"\\$": "$", "US$": "$", "￥": "¥", "RMB": "¥"}.get(sign, sign)


def spelling(unit: str) -> str:
    """One spelling of a unit, as a product of powers: "m/s", "m s^{-1}" and "meters per second" all give "m s^-1"."""
    unit = unit.replace("^\\circ", "deg ").replace("\\Omega", "Ω").replace("\\cdot", " ").replace("·", " ")
    unit = re.sub(r"deg\s+([CF])", r"deg\1", re.sub(r"\bper\b|每", "/", unit))
    powers: dict[str, int] = {}
    for match in _PART.finditer(unit):
        name = _SPELLINGS.get(match["name"]) or _LOWER.get(match["name"].lower()) or match["name"]
        power = int(re.sub(r"[\s{}^]", "", match["power"] or "1"))
        power *= 2 if match["square"] or match["squared"] else 3 if match["cube"] or match["cubed"] else 1
        for part, exponent in _DERIVED.get(name, {name: 1}).items():
            powers[part] = powers.get(part, 0) + exponent * (-power if match["slash"] else power)
    return " ".join(f"{name}^{power}" if power != 1 else name for name, power in sorted(powers.items()) if power)
