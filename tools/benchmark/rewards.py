"""Verdicts per second of the judge pool on ordinary answers.

    python tools/benchmark/rewards.py [--workers 2] [--samples 40000] [--json]

Ordinary: numbers, fractions, roots, options, words, quantities, coordinates, equations and a few formulas that need a
computer-algebra system, in the proportions of school mathematics; half of them right, a third after a long think part,
eight different responses to a prompt as in a training step. No two responses of a run are equal; comparing equal values
again is cached, as it is in training. --hard is the weight of what only math-verify can judge.
"""

import argparse
import json
import random
import time
from collections.abc import Callable

from eureka_megatron.rewards import JudgePool

_FORMS = (
    "{}",
    " {} ",
    "${}$",
    "$\\boxed{{{}}}$",
    "\\boxed{{{}}}",
    "The answer is ${}$.",
    "答案是 $\\boxed{{{}}}$",
    "\\({}\\)",
)
_THOUGHT = "The figure shows two parallel lines cut by a transversal, so the alternate angles are equal. "
_WORDS = ("isosceles triangle", "parallelogram", "increases", "north", "增加", "the angle bisector", "mitochondria")


def _number(r: random.Random) -> tuple[str, str]:
    return str(r.randint(0, 999)), f"{r.randint(0, 999)}"


def _fraction(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(1, 99), r.randint(2, 99)
    return f"\\frac{{{a}}}{{{b}}}", f"{a + r.randint(0, 1)}/{b}"


def _root(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(2, 20), r.choice((2, 3, 5, 7))
    return f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b + r.randint(0, 1)}}}"


def _option(r: random.Random) -> tuple[str, str]:
    letter = r.choice("ABCD")
    return r.choice("ABCD"), r.choice((letter, f"({letter})", f"{letter}. {r.randint(1, 99)} cm"))


def _word(r: random.Random) -> tuple[str, str]:
    return r.choice(_WORDS), r.choice(_WORDS).title()


def _quantity(r: random.Random) -> tuple[str, str]:
    value, unit = r.randint(1, 500) / 10, r.choice(("cm", "cm^2", "m/s", "^\\circ", "kg"))
    return (
        f"{value} {unit}",
        f"{value + r.randint(0, 1)}\\text{{ {unit.replace('^', '')}}}" if "^" not in unit else f"{value}",
    )


def _coordinate(r: random.Random) -> tuple[str, str]:
    x, y = r.randint(-9, 9), r.randint(-9, 9)
    return f"({x},{y})", f"({x}, {y + r.randint(0, 1)})"


def _equation(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(2, 9), r.randint(1, 9)
    return f"y={a}x+{b}", f"y={b}+{a + r.randint(0, 1)}x"


def _polynomial(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(1, 9), r.randint(1, 9)
    return f"(x+{a})(x+{b})", f"x^2+{a + b}x+{a * b + r.randint(0, 1)}"


def _interval(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(-9, 0), r.randint(1, 9)
    return f"({a},{b}]", f"{a}<x\\le {b + r.randint(0, 1)}"


def _hard(r: random.Random) -> tuple[str, str]:
    a, b, c = (r.randint(1, 9) for _ in range(3))
    matrix = "\\begin{{pmatrix}}{}&{}\\\\{}&1\\end{{pmatrix}}"
    return matrix.format(a, b, c), matrix.format(a, b, c + r.randint(0, 1))


Maker = Callable[[random.Random], tuple[str, str]]
_SHARES: list[tuple[Maker, float]] = [
    (_number, 0.30), (_option, 0.25), (_fraction, 0.10), (_quantity, 0.10), (_root, 0.05), (_word, 0.05),
    (_coordinate, 0.05), (_equation, 0.04), (_polynomial, 0.03), (_interval, 0.03),
]  # fmt: skip


def make_samples(count: int, hard: float, seed: int = 0) -> list[tuple[str, str]]:
    r = random.Random(seed)
    makers, shares = [*(maker for maker, _ in _SHARES), _hard], [*(share for _, share in _SHARES), hard]
    samples: list[tuple[str, str]] = []
    while len(samples) < count:
        maker = r.choices(makers, shares)[0]
        gold, _ = maker(r)
        for _ in range(8):
            value = gold if r.random() < 0.5 else maker(r)[1]
            thought = _THOUGHT * r.choice((1, 5, 60)) + f"Case {len(samples)}."
            samples.append((f"<think>{thought}</think>\n<answer>{r.choice(_FORMS).format(value)}</answer>", gold))
    return samples[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--hard", type=float, default=0.01, help="weight of formulas only math-verify can judge")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    samples = make_samples(arguments.samples, arguments.hard)
    started = time.perf_counter()
    with JudgePool(arguments.workers) as pool:
        pool.judge(samples[:1])
        start_seconds = time.perf_counter() - started
        started = time.perf_counter()
        verdicts = pool.judge(samples)
        seconds = time.perf_counter() - started
        figures = {
            "verdicts_per_second": round(len(samples) / seconds),
            "workers": arguments.workers,
            "samples": len(samples),
            "hard_share": arguments.hard,
            "start_seconds": round(start_seconds, 2),
            "right": round(sum(verdict["accuracy"] for verdict in verdicts) / len(verdicts), 3),
            "timeouts": pool.timeouts,
        }
    print(
        json.dumps(figures) if arguments.json else "\n".join(f"{name:>20}  {value}" for name, value in figures.items())
    )


if __name__ == "__main__":
    main()
