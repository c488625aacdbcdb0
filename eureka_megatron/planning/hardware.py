"""GPUs and what of their peak a training step gets: the numbers behind a predicted time, none of them measured by this project.

Peaks are those of NVIDIA's data sheets (dense bf16, SXM boards where not said otherwise); network is one 400 Gb/s adapter a GPU (H100 and newer)
or 200 Gb/s (A100, L40S), as in DGX systems; `host` is one direction of PCIe. A link's rate is that of one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Example: GPUS["h100"]."""

    name: str
    memory: float  # GiB
    matrix: float  # 10¹² floating-point operations a second
    memory_rate: float  # 10⁹ bytes a second, as the rates below
    link: float  # between GPUs of a node
    network: float  # of each GPU to other nodes
    host: float


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

# Shares of the peaks that are assumed.
MATRIX, ATTENTION, MEMORY, LINKS = 0.65, 0.45, 0.8, 0.75
STORAGE = 2.0  # 10⁹ bytes a second that a node writes to shared disks
DECODE_OVERHEAD = 0.002  # seconds of an engine's step besides reading weights and cache
TENSOR_LATENCY = 20e-6  # seconds of a small all-reduce among an engine's workers, of which a layer has two

# Of a GPU's memory: what allocator and fragmentation lose, and what CUDA, NCCL's buffers and the libraries take (GiB).
FRAGMENTATION, CONTEXT = 0.05, 2.5
# GiB that a sleeping engine leaves on the GPU: its process's CUDA context and captured graphs.
SLEEPING = 2.0
# GiB of an engine besides weights and cache: activations of a prefill, graphs.
ENGINE = 3.0


def usable(gpu: Gpu, *, colocated: bool) -> float:
    """Bytes that tensors of the trainer may take."""
    return (gpu.memory * (1 - FRAGMENTATION) - CONTEXT - (SLEEPING if colocated else 0)) * GIB
