"""Samples that nobody has to provide, as large as a run allows: the rows that a rank must have room for."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch

from eureka_megatron.data.positions import Span, extend_positions, mrope_positions
from eureka_megatron.data.vision_layout import vision_layout
from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.types import Picture, Sample

TEXT = 32  # tokens of a prompt besides its picture, at least


@dataclass(frozen=True)
class Workload:
    """Full micro-batches: every row has `tokens` tokens, of samples that share nothing and each show a picture of their own.

    Example: rows of 16,384 tokens where a sample has 7,096 at most are three samples of 5,461.
    """

    tokens: int  # of a micro-batch
    longest: int  # prompt and response of a sample, at most
    pixels: int  # of a picture; 0: no pictures
    rows: int  # micro-batches of a data-parallel rank
    rollouts: bool = True  # with the engine's log-probabilities, as reinforcement learning has them
    reference: bool = False  # with a reference's, which a KL term in the loss needs

    def samples(self, config: QwenVLConfig, layout: Layout) -> tuple[Sample, ...]:
        """Those of all data-parallel ranks. Their values do not matter, only shapes do."""
        count = -(-self.tokens // self.longest)
        length = self.tokens // count
        if layout.context > 1:
            length -= length % (2 * layout.context)
        units = min(picture_units(config, self.pixels), length - TEXT) if self.pixels else 0
        return tuple(self._sample(config, length, units, number) for number in range(count * self.rows * layout.data))

    def _sample(self, config: QwenVLConfig, length: int, units: int, number: int) -> Sample:
        pictures = [_picture(config, units, number)] if units > 0 else []
        spans = [Span(TEXT // 2, picture.grid_thw) for picture in pictures]
        prompt = TEXT + sum(picture.units for picture in pictures)
        merge = config.vision_config.spatial_merge_size
        positions = extend_positions(mrope_positions(prompt, spans, merge_size=merge), length - prompt)
        zeros = np.zeros(length, np.float32)
        return Sample(
            tokens_S=np.full(length, number, np.int64),  # equal prompts would be shared
            positions_3S=positions,
            mask_S=(np.arange(length) >= prompt).astype(np.float32),
            advantages_S=zeros,
            rollout_logprobs_S=zeros if self.rollouts else None,
            ref_logprobs_S=zeros if self.reference else None,
            pictures=tuple(pictures),
            picture_offsets=tuple(span.offset for span in spans),
        )


def picture_units(config: QwenVLConfig, pixels: int) -> int:
    """Placeholder tokens of a picture of so many pixels, nearly a square."""
    height, width = _sides(pixels // (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2)
    return height * width


def _sides(units: int) -> tuple[int, int]:
    """Example: 640 merge units are 25 × 25."""
    height = max(isqrt(units), 1)
    return height, max(units // height, 1)


def _picture(config: QwenVLConfig, units: int, number: int) -> Picture:
    vision = config.vision_config
    height, width = (side * vision.spatial_merge_size for side in _sides(units))
    grid = (1, height, width)
    order = vision_layout(
        grid, window_size=vision.window_size, patch_size=vision.patch_size, merge_size=vision.spatial_merge_size
    )
    return Picture(
        key=str(number),
        image=None,
        grid_thw=grid,
        patches_PD=torch.from_numpy(np.zeros((height * width, vision.patch_values), np.float32)),
        coordinates_P2=order.coordinates_P2,
        unit_order_U=order.unit_order_U,
        window_lengths_W=order.window_lengths_W,
        frame_lengths_F=order.frame_lengths_F,
    )
