"""What of a GPU's peaks a training step is taken to get, and what of its memory: none of it measured by this project."""

from __future__ import annotations

from eureka_megatron.gpus import Gpu

GIB = 2**30

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
