"""What one rank holds and does for one micro-batch, by arithmetic at first and as rehearsed afterwards: the same record, so the same predictions.

The arithmetic is for choosing what to rehearse, and for the first table within seconds. Its coefficients are those that rehearsals show:

    kept of a layer, a token   2 · (7 h + 3 k + 3 f) + 4 heads bytes / tensor, h hidden size, k width of the keys, f of the MLP;  2 h / tensor recomputed
    head and the last layer    gradient of the output weight, three blocks of logits, 11 h bytes a token
    read and written           400 h bytes a token and layer (600 recomputed), 100 vocabulary
    sent under SP              10 times a layer's hidden states (14 recomputed)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.models.qwen2_5_vl.operations import (
    text_layer_parameters,
    text_layer_weights,
    tower_parameters,
)
from eureka_megatron.planning.hardware import GIB

LOGITS = 3 * 0.125 * GIB


@dataclass(frozen=True)
class Shape:
    """How a model is trained, as far as a rank's load depends on it."""

    layout: Layout
    recompute: Literal["none", "selective", "full"]
    tokens: int  # of a micro-batch
    longest: int  # of a sample
    pixels: int  # of a picture
    frozen_tower: bool

    @property
    def samples(self) -> int:
        """Of a full micro-batch: equal ones, as long as may be."""
        return -(-self.tokens // self.longest)

    @property
    def pairs(self) -> float:
        """Of queries and keys in a full micro-batch."""
        return self.tokens**2 / self.samples / 2


@dataclass(frozen=True)
class Load:
    """Memory in bytes at once; operations, bytes moved and bytes sent of one micro-batch: forward and backward.

    `data` bytes are sent once an update. Bytes sent are those that leave this rank (a ring's).
    """

    stage: int
    parameters: float
    gradients: float
    optimizer: float
    passes: float
    update: float
    vision: float  # operations
    linears: float  # of text and head
    attention: float
    moved: float
    moved_by_update: float
    tensor: float
    context: float
    pipeline: float
    data: float
    rehearsed: bool = False

    @property
    def peak(self) -> float:
        return self.parameters + self.gradients + self.optimizer + max(self.passes, self.update)


def stages_of_interest(layout: Layout) -> list[int]:
    """First, one in the middle, last: all kinds that there are, with and without tower and head."""
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})


def layers_of(config: QwenVLConfig, layout: Layout, stage: int) -> int:
    """Text layers of a stage. Example: 8 layers on 4 stages, 1 on the first and the last: 1 3 3 1."""
    given = {0: layout.layers_first_stage, layout.pipeline - 1: layout.layers_last_stage}
    if (own := given.get(stage)) is not None:
        return own
    fixed = [number for number in given.values() if number is not None]
    return (config.text_config.num_hidden_layers - sum(fixed)) // (layout.pipeline - len(fixed))


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most, in units of the whole stage (Megatron's 1F1B and interleaved schedules)."""
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return stages - stage
    return ((stages - stage - 1) * 2 + (chunks - 1) * stages + 1) / chunks


def estimate(config: QwenVLConfig, shape: Shape, stage: int) -> Load:
    """By arithmetic; within some percent of what a rehearsal finds (tests/dist/test_planning.py)."""
    layout, text = shape.layout, config.text_config
    tensor, shared = layout.tensor, layout.tensor * layout.context
    hidden, layers = text.hidden_size, layers_of(config, layout, stage)
    last, first = stage == layout.pipeline - 1, stage == 0
    vocabulary = text.vocab_size * hidden / tensor
    ends = (first + last - (first and last and config.tie_word_embeddings)) * vocabulary + last * hidden
    learning = layers * text_layer_parameters(config, tensor) + ends
    tower = tower_parameters(config) if first else 0
    frozen = tower if shape.frozen_tower else 0
    learning += tower - frozen
    tied = config.tie_word_embeddings and layout.pipeline > 1 and (first or last)
    keys = text.num_key_value_heads * text.head_dim
    kept = 2 * (7 * hidden + 3 * keys + 3 * text.intermediate_size) + 4 * text.num_attention_heads
    full = shape.recompute == "full"
    layer = kept * shape.tokens / shared
    passes = in_flight(layout, stage) * layers * (2 * hidden * shape.tokens / shared if full else layer)
    passes += 11 * hidden * shape.tokens / layout.context + ((2 * vocabulary + LOGITS) if last else 0)
    if first and not shape.frozen_tower:
        passes += in_flight(layout, stage) * _kept_of_tower(config, shape)
    forwards = 4 if full else 3  # a forward; backward two
    linear = text_layer_weights(config, tensor) * layers * forwards + (4 * vocabulary if last else 0)
    rows = shape.tokens * hidden * 2 / layout.context
    return Load(
        stage=stage,
        parameters=2 * (learning + frozen),
        gradients=4 * learning,
        optimizer=12 * learning / (layout.data * layout.context),
        passes=passes,
        update=4.2 * learning / (layout.data * layout.context),
        vision=_tower_operations(config, shape) / (shared if shape.frozen_tower else 1) if first else 0,
        linears=2 * linear * shape.tokens / layout.context,
        attention=(18 if full else 14) * shape.pairs * text.num_attention_heads * text.head_dim * layers / shared,
        moved=(400 * layers * hidden * (1.5 if full else 1) + (100 * text.vocab_size if last else 0))
        * shape.tokens
        / shared,
        moved_by_update=84 * learning / (layout.data * layout.context),
        tensor=(14 if full else 10) * layers * rows * (tensor - 1) / tensor,
        context=(3 if full else 2) * 2 * keys / hidden * layers * rows * (layout.context - 1) / tensor
        if layout.context > 1
        else 0,
        pipeline=(2 * layout.virtual_pipeline - (first or last)) * rows / tensor if layout.pipeline > 1 else 0,
        data=6 * learning * (1 - 1 / (layout.data * layout.context)) + (4 * vocabulary if tied else 0),
    )


def _tower_operations(config: QwenVLConfig, shape: Shape) -> float:
    """Of the pictures of a full micro-batch: forward, and backward where the tower learns."""
    vision = config.vision_config
    pictures = shape.samples if shape.pixels else 0
    patches = shape.pixels / vision.patch_size**2
    attention = 4 * patches * patches * vision.hidden_size * len(vision.fullatt_block_indexes)
    return pictures * (2 * tower_parameters(config) * patches + attention) * (1 if shape.frozen_tower else 3)


def _kept_of_tower(config: QwenVLConfig, shape: Shape) -> float:
    """Bytes of a learning tower's activations, whole on every rank, of the pictures of a full micro-batch."""
    vision = config.vision_config
    patches = shape.samples * shape.pixels / vision.patch_size**2
    layer = (
        2 * vision.hidden_size if shape.recompute == "full" else 20 * vision.hidden_size + 6 * vision.intermediate_size
    )
    return patches * vision.depth * layer


def with_tower(load: Load, share: float) -> Load:
    """The tower's operations times `share`: rows of shorter samples show more pictures, and pictures that several responses show are encoded once."""
    return replace(load, vision=load.vision * share)
