"""Rotary positions (time, height, width) of a prompt with pictures, by vLLM's rule.

Text counts up in all three axes. A picture of t×h×w merge units at position p gets p + (time, row, column); what
follows starts at the largest position so far plus one, over **all** axes. transformers 5.19 differs on videos, where it
ignores the time axis in that maximum; the policy must see what the rollout engine sees, so vLLM decides. On images both
agree.

Source: Qwen2.5-VL report (arXiv:2502.13923), section 2.1; vLLM 0.32 `get_mrope_input_positions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """A picture or video within a token sequence.

    Example: Span(offset=15, grid_thw=(1, 6, 6)) are 9 placeholders from token 15 on.
    """

    offset: int  # index of the first placeholder token
    grid_thw: tuple[int, int, int]  # patches in time, height, width
    # None: an image; else seconds between two steps of the time axis, rounded to the type in which vLLM has them (its model's): the time
    # axis is truncated to whole positions, so a difference in the last bit may move one.
    seconds_per_grid: float | None = None

    def units(self, merge_size: int) -> tuple[int, int, int]:
        """Merge units in time, height, width."""
        time, height, width = self.grid_thw
        return time, height // merge_size, width // merge_size


def mrope_positions(
    length: int, spans: Sequence[Span], *, merge_size: int = 2, tokens_per_second: float = 2.0
) -> np.ndarray:
    """int64 [3, length]: positions in time, height, width of each token.

    Args:
        length: tokens of the sequence, placeholders expanded.
        spans: in the order of their offsets, not overlapping.
        tokens_per_second: of config.json's vision_config; scales the time axis of videos.

    Raises:
        ValueError: spans overlap, are out of order or leave the sequence.
    """
    positions_3S = np.empty((3, length), dtype=np.int64)
    token, position = 0, 0
    for span in spans:
        units = span.units(merge_size)
        end = span.offset + units[0] * units[1] * units[2]
        if span.offset < token or end > length:
            raise ValueError(f"picture span {span.offset}…{end} overlaps another or leaves the {length} tokens")
        text = span.offset - token
        positions_3S[:, token : span.offset] = position + np.arange(text)
        grid = np.indices(units)
        if span.seconds_per_grid is not None:
            grid[0] = (grid[0] * (span.seconds_per_grid * tokens_per_second)).astype(np.int64)
        positions_3S[:, span.offset : end] = position + text + grid.reshape(3, -1)
        position += text + int(grid.max()) + 1
        token = end
    positions_3S[:, token:] = position + np.arange(length - token)
    return positions_3S


def extend_positions(positions_3S: np.ndarray, tokens: int) -> np.ndarray:
    """int64 [3, S + tokens]: the same positions followed by `tokens` text tokens (a response)."""
    start = int(positions_3S.max()) + 1 if positions_3S.size else 0
    response = np.broadcast_to(start + np.arange(tokens, dtype=np.int64), (3, tokens))
    return np.concatenate([positions_3S, response], axis=1)
