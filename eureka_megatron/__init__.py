"""MM-EUREKA on Megatron-Core: rule-based reinforcement learning for Qwen2.5-VL."""

__version__ = "0.1.0"
