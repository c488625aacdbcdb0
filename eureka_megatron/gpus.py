"""GPUs by name, with the peaks of NVIDIA's data sheets: dense bf16, SXM boards where not said otherwise. And what processes hold of memory.

Network is one 400 Gb/s adapter a GPU (H100 and newer) or 200 Gb/s (A100, L40S), as in DGX systems; a link's rate is that of one direction.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Gpu:
    """Example: GPUS["h100"]."""

    name: str
    memory: float  # GiB
    matrix: float  # 10¹² floating-point operations a second
    memory_rate: float  # 10⁹ bytes a second, as the rates below
    link: float  # between GPUs of a node
    network: float  # of each GPU to other nodes
    host: float  # PCIe


GPUS = {
    "a100": Gpu("A100 80 GB", 80, 312, 2039, 300, 25, 25),
    "a800": Gpu("A800 80 GB", 80, 312, 2039, 200, 25, 25),
    "b200": Gpu("B200", 180, 2250, 7700, 900, 50, 55),
    "h100": Gpu("H100 80 GB", 80, 989, 3350, 450, 50, 55),
    "h200": Gpu("H200", 141, 989, 4800, 450, 50, 55),
    "h20": Gpu("H20", 96, 148, 4000, 450, 50, 55),
    "h800": Gpu("H800 80 GB", 80, 989, 3350, 200, 50, 55),
    "l40s": Gpu("L40S (PCIe)", 48, 362, 864, 25, 25, 25),
}
MOST_SHOWN = 16  # processes of a kind with a metric each
# Boards of the same chip with other peaks.
_OTHERS = re.compile(r"PCIe|NVL", re.IGNORECASE)


def peak_of(device: str) -> float | None:
    """10¹² operations a second of a device as CUDA names it; None for what is not in the table. Example: "NVIDIA H100 80GB HBM3" → 989."""
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", device)}
    known = next((name for name in GPUS if name in words), None)
    return None if known is None or _OTHERS.search(device) else GPUS[known].matrix


def held_memory(pids: Sequence[int] = ()) -> dict[str, float]:
    """GiB of this process and these: {"memory_gib": 1.2}, resident; with CUDA also "gpu_memory_gib", the most that torch has taken here so far."""
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
