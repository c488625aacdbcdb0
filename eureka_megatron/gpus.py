"""GPUs by name, with the peaks of NVIDIA's data sheets: dense bf16, SXM boards where not said otherwise.

Network is one 400 Gb/s adapter a GPU (H100 and newer) or 200 Gb/s (A100, L40S), as in DGX systems; a link's rate is that of one direction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


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
# Boards of the same chip with other peaks.
_OTHERS = re.compile(r"PCIe|NVL", re.IGNORECASE)


def peak_of(device: str) -> float | None:
    """10¹² operations a second of a device as CUDA names it; None for what is not in the table. Example: "NVIDIA H100 80GB HBM3" → 989."""
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", device)}
    known = next((name for name in GPUS if name in words), None)
    return None if known is None or _OTHERS.search(device) else GPUS[known].matrix
