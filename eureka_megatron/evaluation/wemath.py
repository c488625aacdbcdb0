"""We-Math by its authors' rules: the letter behind "Answer", and the four-way metric over problems and their single steps.

    IG  inadequate generalisation: all steps right, the whole wrong        CM  complete mastery: steps right, the whole right
    IK  insufficient knowledge: a step wrong, the whole wrong              RM  rote memorisation: steps wrong, the whole right

Strict: CM asks for all steps, RM for one wrong step. Loose: CM asks for one right step, RM for none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from eureka_megatron.errors import UserError
from eureka_megatron.evaluation.verdict import Row, Verdict, field

LETTERS = "ABCDEFGH"


def judge(row: Row, text: str, *, extracted: bool = False) -> Verdict:
    answer = text if extracted else extract(text)
    return Verdict(answer, answer is not None and answer == field("We-Math", row, "answer"))


def extract(response: str) -> str | None:
    """The first character behind the last "Answer" but for > < : and dots; None: no letter of A to H.

    Kept as it is: "Answer: (B)" and "**Answer:** B" are none, "A triangle …" is A.
    """
    rest = response.split("Answer")[-1].strip()
    for character in "><:.":
        rest = rest.replace(character, "")
    first = rest.strip()[:1]
    return first if first and first in LETTERS else None


def wemath_scores(rows: Sequence[Row], verdicts: Sequence[Verdict | bool]) -> dict[str, Any]:
    """All of We-Math's figures, of rows in the published schema.

    Args:
        verdicts: of each row.

    Returns:
        "accuracy" over all rows; "strict" and "loose", each {"IK", "IG", "CM", "RM": problems; "IK_rate", "IG_rate", "CM_rate": shares of the
        problems; "RM_rate": of those whose whole is right, 0 when there is none; "score"}; "S1", "S2", "S3": accuracy on one-step, two-step
        and three-step questions (0 without any); "concepts": accuracy on one-step questions by concept.

    Raises:
        UserError: numbers differ, a key is unknown, or a problem has not one question of several steps and two or three of one.
    """
    if len(rows) != len(verdicts):
        raise UserError(f"We-Math: {len(rows)} rows, but {len(verdicts)} verdicts")
    right = [verdict.correct if isinstance(verdict, Verdict) else bool(verdict) for verdict in verdicts]
    single: dict[str, list[bool]] = defaultdict(list)
    whole: dict[str, tuple[int, bool]] = {}
    concepts: dict[str, list[bool]] = defaultdict(list)
    for row, correct in zip(rows, right, strict=True):
        problem, key = field("We-Math", row, "ID"), field("We-Math", row, "key")
        steps, _, part = key.partition("steps_")
        if steps not in ("2", "3") or not (part == "multi" or part in map(str, range(1, int(steps) + 1))):
            raise UserError(f"We-Math: problem {problem} has the key {key!r}; 2steps_1 … 3steps_multi are known")
        if part == "multi":
            if problem in whole:
                raise UserError(f"We-Math: problem {problem} has two questions {key!r}")
            whole[problem] = int(steps), correct
        else:
            single[problem].append(correct)
            concepts[str(row.get("knowledge concept", ""))].append(correct)
    if lacking := sorted(p for p in single.keys() | whole.keys() if p not in whole or len(single[p]) != whole[p][0]):
        raise UserError(
            f"We-Math: {len(lacking)} problems are not whole, {lacking[0]} first: steps or their question are missing"
        )
    cases = [(single[problem], correct) for problem, (_, correct) in whole.items()]
    of = {steps: [correct for number, correct in whole.values() if number == steps] for steps in (2, 3)}
    return {
        "accuracy": _share(right),
        "strict": _four(cases, all),
        "loose": _four(cases, any),
        "S1": _share([correct for steps in single.values() for correct in steps]),
        "S2": _share(of[2]),
        "S3": _share(of[3]),
        "concepts": {name: _share(values) for name, values in sorted(concepts.items())},
    }


def _four(cases: Sequence[tuple[list[bool], bool]], masters: Any) -> dict[str, float]:
    """`masters`: which of the steps a master has right, all or any."""
    counts: Counter[str] = Counter()
    for steps, correct in cases:
        if correct:
            counts["CM" if masters(steps) else "RM"] += 1
        else:
            counts["IG" if all(steps) else "IK"] += 1
    problems = max(len(cases), 1)
    solved = counts["CM"] + counts["RM"]
    return {name: counts[name] for name in ("IK", "IG", "CM", "RM")} | {
        **{f"{name}_rate": counts[name] / problems for name in ("IK", "IG", "CM")},
        "RM_rate": counts["RM"] / solved if solved else 0.0,
        "score": (counts["CM"] + 0.5 * counts["IG"]) / problems,
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
