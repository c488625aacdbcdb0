"""Arithmetic with hard bounds: exact fractions where possible, 60-digit floats otherwise, never an unbounded integer."""

from fractions import Fraction

import mpmath

_MAX_BITS = 100_000  # of an exact integer
_MAX_EXPONENT = 10**15
_DIGITS = 60

Value = Fraction | mpmath.mpf | mpmath.mpc
# An own context: the precision of mpmath.mp belongs to whoever else uses it (sympy).
MP = mpmath.mp.clone()
MP.dps = _DIGITS


class Unsupported(Exception):
    """Not in the grammar, undefined (1/0), or beyond the bounds."""


class Unbounded(Unsupported):
    """Beyond the bounds: too large or too deep. Nobody else should try it either."""


def same(left: Value, right: Value) -> bool:
    """Exact for fractions; otherwise 30 digits relative, and everything below 1e-40 in both is one zero."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    a, b = wide(left), wide(right)
    size = max(abs(a), abs(b))
    if not MP.isfinite(size):
        return bool(a == b)
    return bool(size < 1e-40 or abs(a - b) <= size * MP.mpf("1e-30"))


def wide(value: Value) -> mpmath.mpf | mpmath.mpc:
    return MP.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _both_exact(left: Value, right: Value) -> bool:
    return isinstance(left, Fraction) and isinstance(right, Fraction)


def add(left: Value, right: Value) -> Value:
    return _bounded(left + right) if _both_exact(left, right) else _finite(wide(left) + wide(right))


def multiply(left: Value, right: Value) -> Value:
    return _bounded(left * right) if _both_exact(left, right) else _finite(wide(left) * wide(right))


def divide(left: Value, right: Value) -> Value:
    if right == 0:
        raise Unsupported("division by zero")
    return _bounded(left / right) if _both_exact(left, right) else _finite(wide(left) / wide(right))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise Unbounded("number too large")
    return value


def _finite(value: Value) -> Value:
    if MP.isnan(value):
        raise Unsupported("undefined")
    return value


def power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if base == 0 and exponent <= 0:
            raise Unsupported("0 to a power below 1")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length(), 1)
        if abs(exponent) * bits <= _MAX_BITS:
            return _bounded(base ** int(exponent))
    if isinstance(exponent, Fraction) and exponent.denominator in (2, 3) and abs(exponent) < 100:
        return power(root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    wide_base, wide_exponent = wide(base), wide(exponent)
    if not MP.isfinite(wide_exponent) or abs(wide_exponent) > _MAX_EXPONENT or abs(wide_base) > MP.mpf(10) ** 1000:
        raise Unbounded("power too large")
    return _finite(MP.power(wide_base, wide_exponent))


def root(value: Value, degree: Value) -> Value:
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
        return sign * MP.power(wide(value), MP.mpf(1) / n)
    return MP.power(value, MP.mpf(1) / n)


def _integer_root(value: int, n: int) -> int | None:
    """The exact n-th root of a non-negative integer, None when there is none (or the integer is long)."""
    if value < 0 or value.bit_length() > 4096:
        return None
    guess = int(MP.nint(MP.power(value, MP.mpf(1) / n)))
    return guess if guess**n == value else None


def factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 2000:
        raise Unsupported("factorial of this")
    result = 1
    for factor in range(2, int(value) + 1):
        result *= factor
    return Fraction(result)
