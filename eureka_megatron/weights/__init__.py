"""Weights in every form: the table, Hugging Face files, Megatron shards, torch_dist; from each to the others."""

from eureka_megatron.weights.online import iter_hf_weights, load_hf
from eureka_megatron.weights.table import hf_metadata

__all__ = ["hf_metadata", "iter_hf_weights", "load_hf"]
