r"""Value of a closed or algebraic expression, by evaluation, with hard bounds on everything.

A judge must be fast and cannot trust its input, so ordinary answers never reach a computer-algebra system: everything is
an 80-digit float, and a variable takes fixed "random" rational values, so two expressions are equal iff they agree at
several points (Schwartz-Zippel). No eval, no integers without bound. What this small grammar does not know raises
Unsupported, and the caller asks math-verify.

    \frac{1}{2}, 1/2, 0.5, 50%, 1 1/2, 0.\overline{3}, 2\sqrt{3}, \sqrt 23, e^{16}-1, x^2-4, \sin 30^\circ, \binom{5}{2}
"""

import functools
import hashlib
import re
from collections.abc import Callable
from typing import TypeAlias

import mpmath

_MAX_CHARACTERS, _MAX_TOKENS, _MAX_DEPTH, _MAX_DIGITS = 600, 300, 80, 45
_MAX_EXPONENT = 10**15
_TRIALS, _SIGNED_TRIALS = 3, 6
# An own context: the precision of mpmath.mp belongs to whoever else uses it (sympy).
MP = mpmath.mp.clone()
MP.dps = 80
Value: TypeAlias = mpmath.mpf | mpmath.mpc


class Unsupported(Exception):
    """Not in the grammar, or undefined (1/0)."""


class Unbounded(Unsupported):
    """Too large or too deep. Nobody else should try it either."""


_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|"
    "omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell"
)
_OBJECTS = "angle|triangle|vec|overrightarrow|overline|hat|bar|widehat|odot|square"
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:[, ]\d{3})+(?!\d|[, ]\d{3})(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    rf"|(?P<object>\\(?:{_OBJECTS})\s*(?:\{{\s*[A-Za-z0-9 ]+'*\s*\}}|[A-Z]+'*|[a-z](?![a-zA-Z])|\d))"
    r"|(?P<count>[ACP]\s*_\s*\{?\d{1,3}\}?\s*\^\s*\{?\d{1,3}\}?)"  # of permutations and combinations
    r"|(?P<call>[fghFP]\(-?(?:\d+|[A-Za-z])\))"  # f(2) is another unknown than f(3)
    rf"|(?P<name>(?:[A-Za-z]'*|\\(?:{_GREEK})(?![a-zA-Z]))(?:\s*_\s*(?:\{{[^{{}}]*\}}|\d+|\w))?)"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<symbol>\*\*|[-+*/^_(){}\[\]|!%]))"
)
# Mixed numbers as sums (but not 11 6/6), and 0.1\overline{6}: the period over 9…9, shifted behind the digits before it.
_MIXED = re.compile(
    r"(?<![\d.,)}^_])(?<!\d )(\d{1,3}(?:[, ]\d{3})+|\d+)\s*(?:\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|\s(\d+)\s*/\s*(\d+))"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{\s*(\d{1,20})\s*\}")
_FUNCTIONS: dict[str, Callable] = {
    "\\sin": MP.sin, "\\cos": MP.cos, "\\tan": MP.tan, "\\cot": MP.cot, "\\sec": MP.sec, "\\csc": MP.csc,
    "\\ln": MP.ln, "\\exp": MP.exp, "\\arcsin": MP.asin, "\\arccos": MP.acos, "\\arctan": MP.atan, "\\log": MP.log10,
    "\\lg": MP.log10, "\\sinh": MP.sinh, "\\cosh": MP.cosh, "\\tanh": MP.tanh,
}  # fmt: skip
_LOGARITHMS = ("\\log", "\\ln", "\\lg")
_CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}
_TIMES, _DIVIDED = ("*", "\\times", "\\cdot", "\\cdotp"), ("/", "\\div")
_ADDITION, _PRODUCT, _FACTOR, _POWER = range(4)  # how tightly an operator binds


def values(text: str, *, signed: bool = False) -> tuple[Value, ...]:
    """The expression at several points, a single value when it has no variable. Raises Unsupported.

    signed: also where variables are negative, which |…| asks for; otherwise not, for roots may be complex there.
    """
    result = _values_or_error(text, _TRIALS + _SIGNED_TRIALS * signed)
    if isinstance(result, Unsupported):
        raise result
    return result


@functools.lru_cache(maxsize=4096)
def _values_or_error(text: str, trials: int = _TRIALS) -> tuple[Value, ...] | Unsupported:
    try:
        parser = _Parser(text, 0)
        first = parser.parse()
        return (first, *(_Parser(text, trial).parse() for trial in range(1, trials if parser.variables else 1)))
    except Unsupported as error:
        return error
    except (OverflowError, RecursionError) as error:
        return Unbounded(str(error))
    except ZeroDivisionError:
        return Unsupported("division by zero")
    except (ValueError, mpmath.libmp.NoConvergence) as error:
        return Unsupported(str(error))


def equal(left: str, right: str) -> bool:
    """Whether two expressions have the same value everywhere. Raises Unsupported when either is not understood."""
    first, second = (values(side, signed="|" in left + right) for side in (left, right))
    count = max(len(first), len(second))
    return all(same(first[i % len(first)], second[i % len(second)]) for i in range(count))


def same(a: Value, b: Value) -> bool:
    """Equal to 50 digits; what subtraction leaves of nothing, about 1e-80, is zero, but 1/100! is not."""
    size = max(abs(a), abs(b))
    if not MP.isfinite(size):
        return bool(a == b)
    left_over = (a == 0 or b == 0) and MP.mpf("1e-95") < size < MP.mpf("1e-60")
    return bool(left_over or abs(a - b) <= size * MP.mpf("1e-50"))


def proportion(left: str, right: str) -> Value | None:
    """c if left = c * right with one constant c != 0 (for relations brought to one side). Raises Unsupported."""
    first, second = values(left), values(right)
    pairs = [(first[i % len(first)], second[i % len(second)]) for i in range(max(len(first), len(second)))]
    if len(pairs) == 1 or any(abs(value) < 1e-40 for pair in pairs for value in pair):
        return None
    ratios = [a / b for a, b in pairs]
    return ratios[0] if all(same(ratio, ratios[0]) for ratio in ratios) else None


def is_constant(text: str) -> bool:
    """Whether this is an expression without a variable; False when it is none at all."""
    result = _values_or_error(text)
    return not isinstance(result, Unsupported) and len(result) == 1


@functools.lru_cache(maxsize=1024)
def _point(name: str, trial: int) -> Value:
    """A fixed positive rational for a variable: positive, so that roots of it are real."""
    digest = hashlib.blake2b(f"{name}/{trial}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "big")
    return MP.mpf(number % 8999 + 1000) / (-3571 if trial >= _TRIALS and number % 2 else 3571)


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of every token; the kind names a group of _TOKEN."""
    if len(text) > _MAX_CHARACTERS:
        raise Unbounded("too long")
    text = _MIXED.sub(_mixed, _REPEATING.sub(_repeating, text)).rstrip()
    found: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(found) >= _MAX_TOKENS:
            raise Unsupported(f"cannot read {text[position : position + 8]!r}")
        found.append((match.lastgroup or "", match.group(match.lastgroup or 0)))
        position = match.end()
    return found


def _mixed(match: re.Match) -> str:
    whole, numerator, denominator = (group for group in match.groups() if group)
    return f"({whole}+{numerator}/{denominator})" if int(numerator) < int(denominator) else match[0]


def _repeating(match: re.Match) -> str:
    return f"({match[1] or 0}.{match[2] or 0}+{int(match[3])}/({10 ** len(match[3]) - 1}*10^{len(match[2])}))"


class _Parser:
    """Operator precedence over tokens; evaluates as it reads."""

    def __init__(self, text: str, trial: int) -> None:
        self.tokens, self.position, self.depth, self.trial = _tokens(text), 0, 0, trial
        self.variables: set[str] = set()
        self.in_bars = self.in_function = False

    def parse(self) -> Value:
        value = self.expression(_ADDITION)
        if self.position != len(self.tokens):
            raise Unsupported(f"trailing {self.peek()!r}")
        return value

    def peek(self) -> str:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise Unsupported(f"expected {expected or 'more'!r}")
        self.position += 1
        return token

    def expression(self, binding: int) -> Value:
        """What follows, up to an operator that binds less than `binding`."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unbounded("too deep")
        signs = {"+": 1, "-": -1}
        value = signs[self.take()] * self.expression(max(binding, _PRODUCT)) if self.peek() in signs else self.atom()
        while token := self.peek():
            if token in ("^", "**"):
                self.take()
                value = self.raised(value)
            elif token in ("!", "%"):
                value = _factorial(value) if self.take() == "!" else value / 100
            elif binding <= _ADDITION and token in signs:
                value = value + signs[self.take()] * self.expression(_PRODUCT)
            elif binding <= _PRODUCT and token in _TIMES:
                self.take()
                value = value * self.expression(_FACTOR)
            elif binding <= _PRODUCT and token in _DIVIDED:
                self.take()
                value = value / self.expression(_FACTOR)
            elif binding <= _PRODUCT and self.starts_factor():
                if self.kind() == "number" and self.tokens[self.position - 1][0] in ("number", "name"):
                    raise Unsupported("a number behind a number or a name")  # 1 2 is no product, x2 may be a power
                value = value * self.expression(_POWER)
            else:
                break
        self.depth -= 1
        if MP.isnan(value):
            raise Unsupported("undefined")
        return value

    def starts_factor(self) -> bool:
        return self.peek() in "({[" or (self.peek() == "|" and not self.in_bars) or self.kind() != "symbol"

    def raised(self, base: Value) -> Value:
        if self.peek() == "\\circ":  # degrees, which are a unit outside of functions
            self.take()
            return base * MP.pi / 180 if self.in_function else base
        return _power(base, self.expression(_POWER) if self.peek() in ("+", "-") else self.script())

    def script(self) -> Value:
        """{…} or what binds tightest: x^10, x^{n+1}, 2^{2^n}"""
        value = self.atom()
        return self.raised(value) if self.peek() in ("^", "**") and self.take() else value

    def argument(self) -> Value:
        r"""{…} or one digit, as LaTeX reads \frac12."""
        if self.kind() != "number":
            return self.atom()
        digits = self.take()
        if not digits.isdigit():
            raise Unsupported("unbraced decimal")
        if len(digits) > 1:  # leave the rest
            self.position -= 1
            self.tokens[self.position] = ("number", digits[1:])
        return MP.mpf(digits[0])

    def atom(self) -> Value:
        token, kind = self.peek(), self.kind()
        if kind in ("number", "command"):
            return self.number() if kind == "number" else self.command()
        if kind in ("name", "object", "call"):
            return self.unknown(kind)
        if kind == "count":
            n, k = map(int, re.findall(r"\d+", self.take()))
            return MP.binomial(n, k) * (1 if token[0] == "C" else MP.factorial(k))
        if token in ("(", "{", "[") or (token == "|" and not self.in_bars):
            outer, self.in_bars = self.in_bars, token == "|"
            self.take()
            value = self.expression(_ADDITION)
            self.take(_CLOSING[token])
            self.in_bars = outer
            return abs(value) if token == "|" else value
        raise Unsupported(f"unexpected {token!r}")

    def number(self) -> Value:
        text = self.take().replace(",", "").replace(" ", "").lower()
        mantissa, _, exponent = text.partition("e")
        if len(mantissa) > _MAX_DIGITS or len(exponent) > 6:
            raise Unbounded("number too long")
        return MP.mpf(text)

    def unknown(self, kind: str) -> Value:
        r"""e, i, or an unknown. \angle ABC is one for its whole name, CBA the same; neither is a product of letters."""
        name = re.sub(r"[\s{}]", "", self.take())
        if name in ("e", "i"):
            return +MP.e if name == "e" else MP.mpc(0, 1)
        if kind == "object":
            command, letters = re.fullmatch(r"(\\[a-z]+?)([A-Z0-9].*|[a-z]'*)", name).groups()  # type: ignore[union-attr]
            ordered = sorted(letters) if command in ("\\triangle", "\\overline") else letters
            name = command + "".join(min(letters, letters[::-1]) if command == "\\angle" else ordered)
        self.variables.add(name)
        return _point(name, self.trial)

    def command(self) -> Value:
        name = self.take()
        if name == "\\frac":
            numerator = self.argument()
            return numerator / self.argument()
        if name == "\\binom":
            return MP.binomial(self.argument(), self.argument())
        if name == "\\sqrt":
            degree = self.atom() if self.peek() == "[" else MP.mpf(2)
            return _root(self.atom(), degree)  # \sqrt 23 is what people write for the root of 23
        if name in ("\\pi", "\\infty"):
            return +MP.pi if name == "\\pi" else MP.inf
        if name in _FUNCTIONS:
            return self.function(name)
        raise Unsupported(f"command {name}")

    def function(self, name: str) -> Value:
        outer, self.in_function = self.in_function, name not in _LOGARITHMS
        base = exponent = None
        if name == "\\log" and self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            if self.peek() == "-" or self.tokens[self.position + 1 :][:1] == [("symbol", "-")]:
                raise Unsupported("inverse function")
            exponent = self.script()
        if self.peek() in ("(", "{"):
            value = self.atom()
            if self.in_function and [token for _, token in self.tokens[self.position :][:2]] == ["^", "\\circ"]:
                self.position += 1
                value = self.raised(value)
        else:
            value = self.expression(_POWER)
            while self.kind() in ("number", "name") or self.peek() == "\\pi":  # \sin 2x
                value = value * self.expression(_POWER)
        self.in_function = outer
        if abs(value) > 1e6 and name not in _LOGARITHMS:
            raise Unbounded("argument too large")
        result = _FUNCTIONS[name](value) if base is None else MP.log(value) / MP.log(base)
        return result if exponent is None else _power(result, exponent)


def _power(base: Value, exponent: Value) -> Value:
    if base == 0 and MP.re(exponent) <= 0:
        raise Unsupported("0 to a power below 1")
    if not MP.isfinite(exponent) or abs(exponent) > _MAX_EXPONENT or abs(base) > MP.mpf(10) ** 1000:
        raise Unbounded("power too large")
    negative = isinstance(base, mpmath.mpf | MP.mpf) and base < 0
    if negative and same(exponent * 3, MP.nint(exponent * 3)) and exponent % 1:  # (-8)^{2/3}
        return _root(base, MP.mpf(3)) ** int(MP.nint(exponent * 3))
    return MP.power(base, exponent)


def _root(value: Value, degree: Value) -> Value:
    """The real root of a negative number where the degree is odd."""
    if degree != MP.nint(degree) or not 1 <= degree <= 100:
        raise Unsupported("root of an odd degree")
    negative = isinstance(value, MP.mpf) and value < 0 and int(degree) % 2
    return -MP.root(-value, int(degree)) if negative else MP.root(value, int(degree))


def _factorial(value: Value) -> Value:
    if not isinstance(value, MP.mpf) or value != MP.nint(value) or not 0 <= value <= 2000:
        raise Unsupported("factorial of this")
    return MP.factorial(value)
