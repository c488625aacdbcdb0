"""What an engine is started with, and what of it vLLM is told: settings for GPUs, for CPUs, and in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eureka_megatron.models.qwen2_5_vl.config import ARCHITECTURE


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is started with. Example: EngineOptions(model="Qwen2.5-VL-7B-Instruct", dtype="bfloat16")."""

    model: Path | str  # Hugging Face directory, or one in Megatron's format
    dtype: str = "bfloat16"
    max_model_tokens: int = 8192  # prompt and response together
    max_concurrent: int = 256  # sequences running at once
    kv_cache_gib: float = 1.0  # on a CPU, of each worker
    gpu_memory_utilization: float = 0.85  # on a GPU: share of its memory for weights and KV cache
    min_pixels: int = 4 * 28 * 28  # bounds of the image processor; pictures already within them pass unchanged
    max_pixels: int = 640 * 28 * 28
    seed: int = 0
    weight_version: int = 0  # of the weights in `model`
    sleeps: bool = False  # whether the trainer has its GPU in turn (`sleep`, `wake`)
    tensor: int = 1  # tensor-parallel workers, each with a GPU of this node


def hf_overrides(options: EngineOptions, positions: int, *, on_gpu: bool) -> dict[str, Any]:
    """What vLLM is to read in config.json in place of what stands there. positions: those that the checkpoint names."""
    return {
        # Some files name none, and vLLM would take a model without an output layer.
        "architectures": [ARCHITECTURE],
        # `score` must generate one token beyond, even where max_model_tokens is all the positions that the checkpoint names: they bound
        # the table of rotary angles, whose rows do not depend on how many there are.
        "text_config": {"max_position_embeddings": max(positions, options.max_model_tokens + 1)},
        **({"head_dtype": "float32"} if on_gpu else {}),
    }


def gpu_settings(options: EngineOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_sleep_mode": options.sleeps,
    }
    if options.max_model_tokens > 8192:  # vLLM's smallest default: a video must fit into one step of the encoder whole
        settings["max_num_batched_tokens"] = options.max_model_tokens + 1
    return settings


def cpu_settings(options: EngineOptions) -> dict[str, Any]:
    """vLLM 0.32 on a CPU dies ("CPU Generator does not use offset") when the prompt of a seeded request is processed in parts.

    So a prompt is never split for the token budget. What the n responses to it share is computed once, in blocks of 32 tokens, the least that
    the kernels take.
    """
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30),
        "enable_chunked_prefill": False,
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_num_batched_tokens": max(options.max_model_tokens + 1, 2048),
    }


def set_environment() -> None:
    """Before vLLM is imported. What the user has set stays, except what the engine relies on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM passes it over for requests with a seed, as all of ours are, but may have nvcc compile it while an engine starts: GPU nodes
    # without a CUDA toolkit would end there.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if not torch.cuda.is_available():
        # Several engines and trainer ranks share the cores: OMP_NUM_THREADS decides, not vLLM's one-thread-a-core binding.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
