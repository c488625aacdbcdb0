"""Weights: the table, Hugging Face files, loading into and exporting from Megatron shards, releases."""

from eureka_megatron.checkpoint.convert import iter_hf_weights, load_hf
from eureka_megatron.checkpoint.qwen2_5_vl import hf_metadata
from eureka_megatron.checkpoint.release import export_hf

__all__ = ["export_hf", "hf_metadata", "iter_hf_weights", "load_hf"]
