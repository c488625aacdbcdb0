"""The earlier place of `demo.tiny`, which scripts outside this repository still import."""

from eureka_megatron.demo.tiny import build_tiny

__all__ = ["build_tiny"]
