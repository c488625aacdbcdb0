"""What processes hold of memory, as metrics."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil

MOST_SHOWN = 16  # processes of a kind with a metric each


def give_back() -> None:
    """Return free pages of this process's heap to the system: glibc keeps them, and places the next step's buffers elsewhere."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)


def held_memory(pids: Sequence[int] = ()) -> dict[str, float]:
    """GiB of this process, whose heap is trimmed first, and these: {"memory_gib": 1.2}, resident; with CUDA also "gpu_memory_gib", the most
    that torch has taken here so far."""
    give_back()
    total = 0
    for pid in {psutil.Process().pid, *pids}:
        with suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_info().rss
    found = {"memory_gib": total / 2**30}
    torch = sys.modules.get("torch")  # who has not imported it holds nothing of a GPU
    if torch is not None and torch.cuda.is_initialized():
        found["gpu_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def memory_metrics(kind: str, held: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest of several processes of a kind, and each while they are few enough to look at.

    Example: memory_metrics("engine", [{"memory_gib": 1.0}, {"memory_gib": 2.0}]) is {"perf/memory_gib_engine_max": 2.0,
    "perf/memory_gib_engine_0": 1.0, "perf/memory_gib_engine_1": 2.0}.
    """
    metrics = {}
    for name in dict.fromkeys(name for found in held for name in found):
        values = {number: found[name] for number, found in enumerate(held) if name in found}
        metrics[f"perf/{name}_{kind}_max"] = max(values.values())
        if len(held) <= MOST_SHOWN:
            metrics |= {f"perf/{name}_{kind}_{number}": value for number, value in values.items()}
    return metrics
