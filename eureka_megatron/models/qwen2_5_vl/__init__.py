"""Qwen2.5-VL on Megatron-Core. `build_model` and `read_hf_config` are the way in; the rest is imported where it is needed.

Lazy, because `config` and `tiny` are used on machines and in processes without Megatron.
"""

from typing import Any

__all__ = ["build_model", "read_hf_config"]


def __getattr__(name: str) -> Any:
    if name == "build_model":
        from eureka_megatron.models.qwen2_5_vl.model import build_model

        return build_model
    if name == "read_hf_config":
        from eureka_megatron.models.qwen2_5_vl.config import read_hf_config

        return read_hf_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
