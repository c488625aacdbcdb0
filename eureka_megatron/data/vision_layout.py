"""The order in which Qwen2.5-VL's vision tower wants the patches of one picture, worked out from its grid alone.

Patches come from the image processor block by block: the 2×2 patches of a merge unit are neighbours, units run in
reading order. Windowed attention wants the units of a window next to each other. Everything per patch is permuted to
that window order here, once, so the model never permutes; windows at the right and lower edge are smaller, never padded.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class VisionLayout:
    """Window order of one grid. P patches, U merge units, W windows, F frames; the arrays are shared: never write to them.

    Example: grid (1, 2, 12), window of 4 units: unit_order_U [0 … 5], window_lengths_W [16, 8], frame_lengths_F [24].
    """

    unit_order_U: np.ndarray  # int64: place u of the window order holds unit `unit_order_U[u]` of the reading order
    patch_order_P: np.ndarray  # int64: the same for patches, against the image processor's order
    coordinates_P2: np.ndarray  # int64: (row, column) of the patch at each place of the window order
    window_lengths_W: np.ndarray  # int64: patches of each window
    frame_lengths_F: np.ndarray  # int64: patches of each frame; full attention does not cross frames


@lru_cache(maxsize=256)
def vision_layout(
    grid_thw: tuple[int, int, int], *, window_size: int = 112, patch_size: int = 14, merge_size: int = 2
) -> VisionLayout:
    """Window order of a picture of t×h×w patches.

    Args:
        window_size: side of a window in pixels; patch_size likewise; merge_size: patches on a side of a merge unit.

    Raises:
        ValueError: height or width is no multiple of merge_size, or anything is below one.
    """
    frames, height, width = grid_thw
    if min(grid_thw) < 1 or height % merge_size or width % merge_size:
        raise ValueError(f"grid {grid_thw}: height and width must be positive multiples of merge_size={merge_size}")
    side = window_size // (patch_size * merge_size)  # units on a side of a window
    if side < 1:
        raise ValueError(f"window_size={window_size} is smaller than one merge unit, {patch_size * merge_size} pixels")
    rows, columns = height // merge_size, width // merge_size
    units_FHW = np.arange(frames * rows * columns).reshape(frames, rows, columns)
    windows = [
        units_FHW[frame, top : top + side, left : left + side].ravel()
        for frame in range(frames)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]
    unit_order_U = np.concatenate(windows)
    area = merge_size**2
    patch_order_P = (unit_order_U[:, None] * area + np.arange(area)).ravel()
    # Coordinates in the image processor's order: (frame, unit row, unit column, row within unit, column within unit).
    block = np.indices((rows, columns, merge_size, merge_size))
    coordinates = np.stack([block[0] * merge_size + block[2], block[1] * merge_size + block[3]], axis=-1)
    coordinates_P2 = np.tile(coordinates.reshape(-1, 2), (frames, 1))[patch_order_P]
    return VisionLayout(
        unit_order_U=unit_order_U.astype(np.int64),
        patch_order_P=patch_order_P.astype(np.int64),
        coordinates_P2=coordinates_P2.astype(np.int64),
        window_lengths_W=np.array([len(window) * area for window in windows], dtype=np.int64),
        frame_lengths_F=np.full(frames, height * width, dtype=np.int64),
    )
