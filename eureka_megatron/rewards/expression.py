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

from eureka_megatron.rewards.arithmetic import (
    MP,
    Unbounded,
    Unsupported,
    Value,
    add,
    divide,
    factorial,
    multiply,
    power,
    root,
    same,
    wide,
)

MAX_CHARACTERS = 600
MAX_TOKENS = 300
MAX_DEPTH = 80
_TRIALS = 3

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:[, ]\d{3})+(?![\d]|[, ]\d)(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<name>[A-Za-z]'*)|(?P<symbol>\*\*|[-+*/^_(){}\[\]|!%]))"
)
_FUNCTIONS = {
    "\\sin": MP.sin, "\\cos": MP.cos, "\\tan": MP.tan, "\\cot": MP.cot, "\\ln": MP.ln, "\\exp": MP.exp,
    "\\arcsin": MP.asin, "\\arccos": MP.acos, "\\arctan": MP.atan,
}  # fmt: skip
_GREEK_NAMES = (
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta",
    "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega", "ell",
)  # fmt: skip
_GREEK = {f"\\{name}" for name in _GREEK_NAMES}
_MULTIPLY = {"*", "\\times", "\\cdot", "\\cdotp"}
_DIVIDE = {"/", "\\div"}


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
    except (OverflowError, RecursionError) as error:
        return Unbounded(str(error))
    except (ZeroDivisionError, ValueError, mpmath.libmp.NoConvergence) as error:
        return Unsupported(str(error))


def _values(text: str) -> tuple[Value, ...]:
    result = _values_or_error(text)
    if isinstance(result, Unsupported):
        raise result
    return result


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
        a, b = wide(first[i % len(first)]), wide(second[i % len(second)])
        if abs(a) < 1e-40 or abs(b) < 1e-40:
            return None
        ratios.append(a / b)
    return ratios[0] if len(ratios) > 1 and all(same(ratio, ratios[0]) for ratio in ratios) else None


def is_constant(text: str) -> bool:
    """Whether the expression has no variable. Raises Unsupported."""
    return len(_values(text)) == 1


@functools.lru_cache(maxsize=1024)
def _point(name: str, trial: int) -> Fraction:
    """A fixed positive rational for a variable: positive, so that roots of it are real."""
    digest = hashlib.blake2b(f"{name}/{trial}".encode(), digest_size=4).digest()
    return Fraction(int.from_bytes(digest, "big") % 8999 + 1000, 3571)


class _Parser:
    """Recursive descent over tokens; evaluates as it reads."""

    def __init__(self, text: str, trial: int) -> None:
        if len(text) > MAX_CHARACTERS:
            raise Unbounded("too long")
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
            raise Unbounded("too deep")
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = add(value, multiply(Fraction(sign), self.product()))
        self.depth -= 1
        return value

    def product(self) -> Value:
        if self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unbounded("too deep")
            value = multiply(Fraction(sign), self.product())
            self.depth -= 1
            return value
        value = self.power()
        while token := self.peek():
            if token in _MULTIPLY:
                self.take()
                value = multiply(value, self.signed_power())
            elif token in _DIVIDE:
                self.take()
                value = divide(value, self.signed_power())
            elif self.starts_factor():
                if self.kind() == "number" and self.tokens[self.position - 1][0] == "number":
                    raise Unsupported("two numbers in a row")
                value = multiply(value, self.power())
            else:
                break
        return value

    def signed_power(self) -> Value:
        if self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            return multiply(Fraction(sign), self.power())
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
                    return multiply(value, MP.pi / 180)
                return power(value, self.exponent())
            if token == "!":
                self.take()
                value = factorial(value)
            elif token == "%":
                self.take()
                value = divide(value, Fraction(100))
            else:
                return value

    def exponent(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unbounded("too deep")
        if self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = multiply(Fraction(sign), self.atom())
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
            raise Unbounded("number too long")
        if mantissa.startswith("."):
            mantissa = "0" + mantissa
        value = Fraction(mantissa.rstrip(".") or "0")
        if exponent:
            value = multiply(value, power(Fraction(10), Fraction(int(exponent))))
        if "." in text and not exponent and self.peek() == "\\overline":
            return add(value, self.repeating(len(mantissa.partition(".")[2])))
        follows_fraction = self.peek() == "\\frac" and mantissa.isdigit() and not exponent
        if follows_fraction and self.mixed_fraction():
            return add(value, self.command())
        if mantissa.isdigit() and self.mixed_slash():  # 1 1/2
            numerator, _, denominator = (self.take() for _ in range(3))
            return add(value, divide(Fraction(numerator), Fraction(denominator)))
        return value

    def repeating(self, places: int) -> Value:
        """The tail of 0.1\\overline{6}: period / (10^n - 1), shifted behind the digits before it."""
        self.take()
        self.expect("{")
        period = self.take()
        self.expect("}")
        if not period.isdigit() or len(period) + places > 50:
            raise Unsupported("repeating decimal")
        return Fraction(int(period), (10 ** len(period) - 1) * 10**places)

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
            return MP.e
        if name == "i" and self.peek() != "_":
            return MP.mpc(0, 1)
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
            return divide(numerator, self.argument())
        if name == "\\sqrt":
            degree: Value = Fraction(2)
            if self.peek() == "[":
                degree = self.group("[", "]")
            return root(self.argument(), degree)
        if name == "\\pi":
            return +MP.pi
        if name == "\\infty":
            return MP.inf
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
        raised: Value | None = None
        if name == "\\log" and self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            raised = self.exponent()
            if raised == -1:
                raise Unsupported("inverse function")
        if self.peek() in ("(", "{"):
            value = self.atom()
        else:
            value = self.power()
            while self.kind() in ("number", "name") or self.peek() in _GREEK or self.peek() == "\\pi":
                value = multiply(value, self.power())
        argument = wide(value)
        if abs(argument) > 1e6 and name not in ("\\log", "\\ln", "\\lg"):
            raise Unbounded("argument too large")
        if name in ("\\log", "\\lg"):
            result = MP.log(argument) / MP.log(wide(base))
        else:
            result = _FUNCTIONS[name](argument)
        return result if raised is None else power(result, raised)
