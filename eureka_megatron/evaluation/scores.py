"""From verdicts to figures: accuracy with an interval, pass@k, and the same for every group of rows that the benchmark's authors tell apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
_BATCH = 100  # resamples in memory at once


def accuracy(verdicts: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Figures of rows that were answered k times each.

    Args:
        verdicts: of each row, of each of its samples.

    Returns:
        "accuracy": mean over rows and samples; "low", "high": its bootstrap 95 % interval over rows (percentiles, seed 0); "rows"; "samples"
        of a row; "pass": {k: probability that one of k samples drawn from the row's n is right, for k = 1, 2, 4 … n} where n > 1.

    Example:
        Two rows, two samples each, [[True, False], [True, True]]: accuracy 0.75, pass {1: 0.75, 2: 1.0}.
    """
    if not verdicts:
        return {"accuracy": 0.0, "low": 0.0, "high": 0.0, "rows": 0, "samples": 0}
    means = np.array([np.mean(samples) for samples in verdicts], dtype=np.float64)
    low, high = _interval(means)
    n = len(verdicts[0])
    found: dict[str, Any] = {
        "accuracy": float(means.mean()),
        "low": low,
        "high": high,
        "rows": len(verdicts),
        "samples": n,
    }
    if n > 1:
        steps = sorted({min(2**power, n) for power in range(n.bit_length() + 1)})
        found["pass"] = {k: float(np.mean([pass_at(k, sum(samples), n) for samples in verdicts])) for k in steps}
    return found


def pass_at(k: int, right: int, n: int) -> float:
    """1 − C(n − right, k) / C(n, k): the unbiased estimate from n samples (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def by_group(
    verdicts: Sequence[Sequence[bool]], groups: Sequence[Mapping[str, Sequence[str]]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """`accuracy` by column and value. groups: of each row, the values it counts under."""
    members: dict[str, dict[str, list[Sequence[bool]]]] = defaultdict(lambda: defaultdict(list))
    for samples, columns in zip(verdicts, groups, strict=True):
        for column, values in columns.items():
            for value in values:
                members[column][value].append(samples)
    return {
        column: {value: accuracy(rows) for value, rows in sorted(values.items())} for column, values in members.items()
    }


def _interval(means: np.ndarray) -> tuple[float, float]:
    if len(means) < 2 or np.ptp(means) == 0:  # nothing varies
        return float(means.mean()), float(means.mean())
    from scipy.stats import bootstrap

    found = bootstrap((means,), np.mean, method="percentile", n_resamples=RESAMPLES, batch=_BATCH, rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


# --- what others published ---

# Model → score in per cent; the groups' own reports, judged by GPT-4o (arXiv 2503.07365, the CPGD report; docs/evaluation.md).
REFERENCES: dict[str, dict[str, float]] = {
    "mathvista": {
        "Qwen2.5-VL-7B": 68.2, "Qwen2.5-VL-32B": 74.7, "Qwen2.5-VL-72B": 74.8,
        "MM-Eureka-Qwen-7B": 73.0, "MM-Eureka-Qwen-32B": 74.8, "CPGD 7B": 74.0,
    },
    "mathverse": {
        "Qwen2.5-VL-7B": 47.9, "Qwen2.5-VL-32B": 49.9, "Qwen2.5-VL-72B": 57.6,
        "MM-Eureka-Qwen-7B": 50.3, "MM-Eureka-Qwen-32B": 56.5, "CPGD 7B": 50.6,
    },
    "mathvision": {
        "Qwen2.5-VL-7B": 25.4, "Qwen2.5-VL-32B": 40.1, "Qwen2.5-VL-72B": 38.1,
        "MM-Eureka-Qwen-7B": 26.9, "MM-Eureka-Qwen-32B": 34.4, "CPGD 7B": 28.3,
    },
    "olympiadbench": {
        "Qwen2.5-VL-7B": 20.2, "Qwen2.5-VL-32B": 30.0, "Qwen2.5-VL-72B": 40.4,
        "MM-Eureka-Qwen-7B": 20.1, "MM-Eureka-Qwen-32B": 35.9, "CPGD 7B": 21.4,
    },
    "wemath": {
        "Qwen2.5-VL-7B": 62.1, "Qwen2.5-VL-32B": 69.1, "Qwen2.5-VL-72B": 72.4,
        "MM-Eureka-Qwen-7B": 66.1, "MM-Eureka-Qwen-32B": 73.4, "CPGD 7B": 68.3,
    },
    "mmk12": {
        "Qwen2.5-VL-7B": 53.6, "Qwen2.5-VL-32B": 66.8, "Qwen2.5-VL-72B": 70.5,
        "MM-Eureka-Qwen-7B": 64.5, "MM-Eureka-Qwen-32B": 72.2, "CPGD 7B": 65.3,
    },
}  # fmt: skip
