"""Value of a closed or algebraic expression, by evaluation, with hard bounds on everything.

A judge must be fast and cannot trust its input, so ordinary answers never reach a computer-algebra system: rationals are
exact fractions, everything else 60-digit floats, and a variable takes fixed "random" rational values, so two
expressions are equal iff they agree at several points (Schwartz-Zippel). No eval, no recursion deeper than MAX_DEPTH.
What this small grammar does not know raises Unsupported, and the caller falls back to math-verify.
"""

import functools
import hashlib
import re
from fractions import Fraction

import mpmath

MAX_CHARACTERS = 600
MAX_TOKENS = 300
MAX_DEPTH = 30
_MAX_BITS = 100_000  # of an exact integer
_MAX_EXPONENT = 10**15
_DIGITS = 60
_TRIALS = 3

Value = Fraction | mpmath.mpf | mpmath.mpc
_mp = mpmath.mp.clone()
_mp.dps = _DIGITS

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:[, ]\d{3})+(?![\d]|[, ]\d)(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<name>[A-Za-z]'*)|(?P<symbol>\*\*|[-+*/^_(){}\[\]|!%]))"
)
_FUNCTIONS = {
    "\\sin": _mp.sin, "\\cos": _mp.cos, "\\tan": _mp.tan, "\\cot": _mp.cot, "\\ln": _mp.ln, "\\exp": _mp.exp,
    "\\arcsin": _mp.asin, "\\arccos": _mp.acos, "\\arctan": _mp.atan,
}  # fmt: skip
_GREEK = {
    f"\\{name}"
    for name in [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
    ]
}
_MULTIPLY = {"*", "\\times", "\\cdot", "\\cdotp"}
_DIVIDE = {"/", "\\div"}


class Unsupported(Exception):
    """Not in the grammar, undefined (1/0), or beyond the bounds."""


def values(text: str) -> tuple[Value, ...]:
    """The expression at `_TRIALS` points (a single value when it has no variable). Raises Unsupported."""
    return _values(text)


@functools.lru_cache(maxsize=4096)
def _values_or_error(text: str) -> tuple[Value, ...] | Unsupported:
    try:
        parser = _Parser(text, 0)
        first = parser.parse()
        if not parser.variables:
            return (first,)
        return (first, *(_Parser(text, trial).parse() for trial in range(1, _TRIALS)))
    except Unsupported as error:
        return error
    except (ZeroDivisionError, OverflowError, ValueError, RecursionError, mpmath.libmp.NoConvergence) as error:
        return Unsupported(str(error))


def _values(text: str) -> tuple[Value, ...]:
    result = _values_or_error(text)
    if isinstance(result, Unsupported):
        raise result
    return result


def same(left: Value, right: Value) -> bool:
    """Exact for fractions; otherwise 30 digits relative, and everything below 1e-40 in both is one zero."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    a, b = _wide(left), _wide(right)
    size = max(abs(a), abs(b))
    if not _mp.isfinite(size):
        return bool(a == b)
    return bool(size < 1e-40 or abs(a - b) <= size * _mp.mpf("1e-30"))


def equal(left: str, right: str) -> bool:
    """Whether two expressions have the same value everywhere. Raises Unsupported when either is not understood."""
    first, second = _values(left), _values(right)
    count = max(len(first), len(second))
    return all(same(first[i % len(first)], second[i % len(second)]) for i in range(count))


def proportion(left: str, right: str) -> mpmath.mpf | None:
    """c if left = c * right with one constant c != 0 (for relations brought to one side). Raises Unsupported."""
    ratios = []
    first, second = _values(left), _values(right)
    for i in range(max(len(first), len(second))):
        a, b = _wide(first[i % len(first)]), _wide(second[i % len(second)])
        if abs(a) < 1e-40 or abs(b) < 1e-40:
            return None
        ratios.append(a / b)
    return ratios[0] if len(ratios) > 1 and all(same(ratio, ratios[0]) for ratio in ratios) else None


def is_constant(text: str) -> bool:
    """Whether the expression has no variable. Raises Unsupported."""
    return len(_values(text)) == 1


def _wide(value: Value) -> mpmath.mpf | mpmath.mpc:
    return _mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


@functools.lru_cache(maxsize=1024)
def _point(name: str, trial: int) -> Fraction:
    """A fixed positive rational for a variable: positive, so that roots of it are real."""
    digest = hashlib.blake2b(f"{name}/{trial}".encode(), digest_size=4).digest()
    return Fraction(int.from_bytes(digest, "big") % 8999 + 1000, 3571)


class _Parser:
    """Recursive descent over tokens; evaluates as it reads."""

    def __init__(self, text: str, trial: int) -> None:
        if len(text) > MAX_CHARACTERS:
            raise Unsupported("too long")
        self.tokens: list[tuple[str, str]] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or len(self.tokens) >= MAX_TOKENS:
                raise Unsupported(f"cannot read {text[position : position + 8]!r}")
            self.tokens.append((match.lastgroup or "", match.group(match.lastgroup or 0)))
            position = match.end()
        self.position, self.depth, self.trial = 0, 0, trial
        self.variables: set[str] = set()
        self.in_bars = False

    def parse(self) -> Value:
        if not self.tokens:
            raise Unsupported("empty")
        value = self.sum()
        if self.position != len(self.tokens):
            raise Unsupported(f"trailing {self.peek()!r}")
        return value

    def peek(self) -> str:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise Unsupported("ends too early")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unsupported(f"expected {token!r}")

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsupported("too deep")
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = _add(value, _multiply(Fraction(sign), self.product()))
        self.depth -= 1
        return value

    def product(self) -> Value:
        if self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unsupported("too deep")
            value = _multiply(Fraction(sign), self.product())
            self.depth -= 1
            return value
        value = self.power()
        while token := self.peek():
            if token in _MULTIPLY:
                self.take()
                value = _multiply(value, self.signed_power())
            elif token in _DIVIDE:
                self.take()
                value = _divide(value, self.signed_power())
            elif self.starts_factor():
                if self.kind() == "number" and self.tokens[self.position - 1][0] == "number":
                    raise Unsupported("two numbers in a row")
                value = _multiply(value, self.power())
            else:
                break
        return value

    def signed_power(self) -> Value:
        if self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            return _multiply(Fraction(sign), self.power())
        return self.power()

    def starts_factor(self) -> bool:
        token, kind = self.peek(), self.kind()
        if token == "|":
            return not self.in_bars
        return kind in ("number", "name", "command") or token in ("(", "{", "[")

    def power(self) -> Value:
        value = self.atom()
        while True:
            token = self.peek()
            if token in ("^", "**"):
                self.take()
                if self.peek() == "\\circ":  # only inside a function: a closing degree sign is a unit
                    self.take()
                    return _multiply(value, _mp.pi / 180)
                return _power(value, self.exponent())
            if token == "!":
                self.take()
                value = _factorial(value)
            elif token == "%":
                self.take()
                value = _divide(value, Fraction(100))
            else:
                return value

    def exponent(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsupported("too deep")
        if self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = _multiply(Fraction(sign), self.atom())
        else:
            value = self.power()
        self.depth -= 1
        return value

    def group(self, opening: str, closing: str) -> Value:
        self.expect(opening)
        value = self.sum()
        self.expect(closing)
        return value

    def argument(self) -> Value:
        """{…} or one token, as LaTeX reads \\frac12 and \\sqrt2."""
        if self.peek() == "{":
            return self.group("{", "}")
        if self.kind() == "number":
            digits = self.take()
            if len(digits) > 1:  # LaTeX takes one digit and leaves the rest
                if not digits.isdigit():
                    raise Unsupported("unbraced decimal")
                self.position -= 1
                self.tokens[self.position] = ("number", digits[1:])
            return Fraction(int(digits[0]))
        return self.atom()

    def atom(self) -> Value:
        token, kind = self.peek(), self.kind()
        if kind == "number":
            return self.number()
        if kind == "name":
            return self.variable()
        if token in ("(", "{", "["):
            return self.group(token, {"(": ")", "{": "}", "[": "]"}[token])
        if token == "|" and not self.in_bars:
            self.in_bars = True
            value = abs(self.group("|", "|"))
            self.in_bars = False
            return value
        if kind == "command":
            return self.command()
        raise Unsupported(f"unexpected {token!r}")

    def number(self) -> Value:
        text = self.take().replace(",", "").replace(" ", "")
        mantissa, _, exponent = text.lower().partition("e")
        if len(mantissa) > 400 or len(exponent) > 6:
            raise Unsupported("number too long")
        if mantissa.startswith("."):
            mantissa = "0" + mantissa
        value = Fraction(mantissa.rstrip(".") or "0")
        if exponent:
            value = _multiply(value, _power(Fraction(10), Fraction(int(exponent))))
        follows_fraction = self.peek() == "\\frac" and mantissa.isdigit() and not exponent
        if follows_fraction and self.mixed_fraction():
            return _add(value, self.command())
        if mantissa.isdigit() and self.mixed_slash():  # 1 1/2
            numerator, _, denominator = (self.take() for _ in range(3))
            return _add(value, _divide(Fraction(numerator), Fraction(denominator)))
        return value

    def mixed_slash(self) -> bool:
        upcoming = [token for _, token in self.tokens[self.position : self.position + 3]]
        return len(upcoming) == 3 and upcoming[1] == "/" and upcoming[0].isdigit() and upcoming[2].isdigit()

    def mixed_fraction(self) -> bool:
        """Whether \\frac{digits}{digits} stands here, so that 1\\frac{1}{2} is one and a half."""
        upcoming = [token for _, token in self.tokens[self.position : self.position + 7]]
        if len(upcoming) >= 7 and [upcoming[i] for i in (1, 3, 4, 6)] == ["{", "}", "{", "}"]:
            return upcoming[2].isdigit() and upcoming[5].isdigit()
        return len(upcoming) >= 2 and upcoming[1].isdigit()

    def variable(self) -> Value:
        name = self.take()
        if name == "e" and self.peek() != "_":
            return _mp.e
        if name == "i" and self.peek() != "_":
            return _mp.mpc(0, 1)
        if name in ("f", "g", "h", "F", "P") and self.peek() == "(":
            raise Unsupported("function call")
        return self.symbol(name)

    def symbol(self, name: str) -> Value:
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                depth, parts = 0, []
                while True:
                    part = self.take()
                    depth += {"{": 1, "}": -1}.get(part, 0)
                    parts.append(part)
                    if depth == 0:
                        break
                name += "_" + "".join(parts[1:-1])
            else:
                name += "_" + self.take()
        self.variables.add(name)
        return _point(name, self.trial)

    def command(self) -> Value:
        name = self.take()
        if name == "\\frac":
            numerator = self.argument()
            return _divide(numerator, self.argument())
        if name == "\\sqrt":
            degree: Value = Fraction(2)
            if self.peek() == "[":
                degree = self.group("[", "]")
            return _root(self.argument(), degree)
        if name == "\\pi":
            return +_mp.pi
        if name == "\\infty":
            return _mp.inf
        if name in _FUNCTIONS or name in ("\\log", "\\lg"):
            return self.function(name)
        if name in _GREEK:
            return self.symbol(name)
        if name in ("\\angle", "\\triangle", "\\vec", "\\overrightarrow", "\\overline", "\\hat", "\\bar"):
            return self.named_object(name)
        raise Unsupported(f"command {name}")

    def named_object(self, command: str) -> Value:
        """\\angle 1, \\angle ABC, \\vec{a}: one variable; a value for its whole name, not a product of letters."""
        name = command
        if self.peek() == "{":
            self.take()
            while self.peek() != "}":
                name += self.take()
            self.take()
        else:
            while self.kind() == "name" or (self.kind() == "number" and name == command):
                name += self.take()
        if name == command:
            raise Unsupported(f"{command} of nothing")
        self.variables.add(name)
        return _point(name, self.trial)

    def function(self, name: str) -> Value:
        base: Value = Fraction(10)
        power: Value | None = None
        if name == "\\log" and self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            power = self.exponent()
            if power == -1:
                raise Unsupported("inverse function")
        if self.peek() in ("(", "{"):
            value = self.atom()
        else:
            value = self.power()
            while self.kind() in ("number", "name") or self.peek() in _GREEK or self.peek() == "\\pi":
                value = _multiply(value, self.power())
        wide = _wide(value)
        if abs(wide) > 1e6 and name not in ("\\log", "\\ln", "\\lg"):
            raise Unsupported("argument too large")
        if name in ("\\log", "\\lg"):
            result = _mp.log(wide) / _mp.log(_wide(base))
        else:
            result = _FUNCTIONS[name](wide)
        return result if power is None else _power(result, power)


def _both_exact(left: Value, right: Value) -> bool:
    return isinstance(left, Fraction) and isinstance(right, Fraction)


def _add(left: Value, right: Value) -> Value:
    return _bounded(left + right) if _both_exact(left, right) else _finite(_wide(left) + _wide(right))


def _multiply(left: Value, right: Value) -> Value:
    return _bounded(left * right) if _both_exact(left, right) else _finite(_wide(left) * _wide(right))


def _divide(left: Value, right: Value) -> Value:
    if right == 0:
        raise Unsupported("division by zero")
    return _bounded(left / right) if _both_exact(left, right) else _finite(_wide(left) / _wide(right))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise Unsupported("number too large")
    return value


def _finite(value: Value) -> Value:
    if _mp.isnan(value):
        raise Unsupported("undefined")
    return value


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if base == 0 and exponent <= 0:
            raise Unsupported("0 to a power below 1")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length(), 1)
        if abs(exponent) * bits <= _MAX_BITS:
            return _bounded(base ** int(exponent))
    if isinstance(exponent, Fraction) and exponent.denominator in (2, 3) and abs(exponent) < 100:
        return _power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    wide_base, wide_exponent = _wide(base), _wide(exponent)
    if not _mp.isfinite(wide_exponent) or abs(wide_exponent) > _MAX_EXPONENT or abs(wide_base) > _mp.mpf(10) ** 1000:
        raise Unsupported("power too large")
    return _finite(_mp.power(wide_base, wide_exponent))


def _root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 100:
        raise Unsupported("root of an odd degree")
    n = int(degree)
    if isinstance(value, Fraction):
        sign = 1
        if value < 0 and n % 2:
            sign, value = -1, -value
        numerator, denominator = _integer_root(value.numerator, n), _integer_root(value.denominator, n)
        if numerator is not None and denominator is not None:
            return sign * Fraction(numerator, denominator)
        return sign * _mp.power(_wide(value), _mp.mpf(1) / n)
    return _mp.power(value, _mp.mpf(1) / n)


def _integer_root(value: int, n: int) -> int | None:
    """The exact n-th root of a non-negative integer, None when there is none (or the integer is long)."""
    if value < 0 or value.bit_length() > 4096:
        return None
    guess = int(_mp.nint(_mp.power(value, _mp.mpf(1) / n)))
    return guess if guess**n == value else None


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 2000:
        raise Unsupported("factorial of this")
    result = 1
    for factor in range(2, int(value) + 1):
        result *= factor
    return Fraction(result)
