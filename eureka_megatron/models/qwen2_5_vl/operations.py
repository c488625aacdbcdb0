"""Parameters and floating-point operations of Qwen2.5-VL by arithmetic: what a model needs, whatever computes it.

A multiplication and an addition are two operations; norms, activations and rotations are not counted. tests hold both against the code: parameters against
the table of weights, operations against a rehearsal of the model (tests/dist/test_planning.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.types import Picture, Sample


def text_layer_weights(config: QwenVLConfig, tensor: int = 1) -> float:
    """Elements of a text layer's matrices, on one of `tensor` ranks."""
    text = config.text_config
    return text.hidden_size * (_qkv(config, tensor) + text.hidden_size / tensor + 3 * text.intermediate_size / tensor)


def text_layer_parameters(config: QwenVLConfig, tensor: int = 1) -> float:
    """With biases of queries, keys and values, and two norms."""
    return text_layer_weights(config, tensor) + _qkv(config, tensor) + 2 * config.text_config.hidden_size


def _qkv(config: QwenVLConfig, tensor: int) -> float:
    """Width of queries, keys and values on a rank; a head of keys is on one rank, or copied where there are fewer heads than ranks."""
    text = config.text_config
    return (
        text.num_attention_heads * text.head_dim / tensor
        + 2 * max(text.num_key_value_heads // tensor, 1) * text.head_dim
    )


def tower_parameters(config: QwenVLConfig) -> float:
    vision = config.vision_config
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    layer = 4 * hidden * (hidden + 1) + (3 * hidden + 2) * vision.intermediate_size + 3 * hidden
    merger = hidden + (merged + 1) * merged + (merged + 1) * vision.out_hidden_size
    return vision.patch_values * hidden + vision.depth * layer + merger


def text_parameters(config: QwenVLConfig) -> float:
    """With the embedding, and the output layer where it is not the same."""
    text = config.text_config
    ends = (1 if config.tie_word_embeddings else 2) * text.vocab_size * text.hidden_size
    return text.num_hidden_layers * text_layer_parameters(config) + ends + text.hidden_size


def text_operations(config: QwenVLConfig, lengths: Iterable[int]) -> float:
    """Of one forward pass over sequences of these lengths, head included. Attention is causal: L tokens are L (L + 1) / 2 pairs."""
    text = config.text_config
    lengths = np.fromiter(lengths, dtype=np.float64)
    weights = text.num_hidden_layers * text_layer_weights(config) + text.vocab_size * text.hidden_size
    pairs = (lengths * (lengths + 1) / 2).sum()
    width = text.num_attention_heads * text.head_dim
    return float(2 * weights * lengths.sum() + 4 * pairs * width * text.num_hidden_layers)


def tower_operations(config: QwenVLConfig, pictures: Iterable[Picture]) -> float:
    """Of one forward pass over these pictures, merger included."""
    vision = config.vision_config
    hidden, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    layer = 4 * hidden**2 + 3 * hidden * vision.intermediate_size
    full = len(vision.fullatt_block_indexes)
    total = 0.0
    for picture in pictures:
        linears = (vision.patch_values * hidden + vision.depth * layer) * picture.patches
        linears += (merged**2 + merged * vision.out_hidden_size) * picture.units
        windows, frames = (
            float((a.astype(np.float64) ** 2).sum()) for a in (picture.window_lengths_W, picture.frame_lengths_F)
        )
        total += 2 * linears + 4 * hidden * (full * frames + (vision.depth - full) * windows)
    return total


def update_operations(
    config: QwenVLConfig, rows: Iterable[Sequence[Sample]], saved: Iterable[int] = (), *, frozen_tower: bool
) -> float:
    """Of forward and backward over every sample once, the usual measure of model FLOPs: nothing that is computed again, no old log-probabilities.

    Args:
        rows: the samples of each micro-batch. A tower that learns runs forward and backward once for each picture that a micro-batch shows.
        saved: lengths of prompts that were not computed, because others of their micro-batch share their rows.
        frozen_tower: it runs forward, once for a picture.
    """
    rows = list(rows)
    shown = [{picture.key: picture for sample in row for picture in sample.pictures} for row in rows]
    if frozen_tower:
        shown = [{key: picture for row in shown for key, picture in row.items()}]
    pictures = [picture for row in shown for picture in row.values()]
    text = text_operations(config, (len(sample) for row in rows for sample in row)) - text_operations(config, saved)
    return 3 * text + tower_operations(config, pictures) * (1 if frozen_tower else 3)
