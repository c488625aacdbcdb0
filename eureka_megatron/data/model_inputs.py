"""A sample as transformers' model takes it."""

from typing import Any

import numpy as np
import torch

from eureka_megatron.types import Picture, Sample


def model_inputs(sample: Sample, image_token: int) -> dict[str, Any]:
    """What transformers' model takes of a sample, as a batch of one.

    It works out the positions itself unless there is a video: there its rule is another than vLLM's, and it is given those of the sample.
    """
    tokens = torch.from_numpy(sample.tokens_S)[None]
    inputs: dict[str, Any] = {"input_ids": tokens, "mm_token_type_ids": (tokens == image_token).int()}
    for video, patches, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        shown = [picture for picture in sample.pictures if picture.is_video == video]
        if shown:
            inputs[patches] = torch.cat([reading_order(picture) for picture in shown])
            inputs[grids] = torch.tensor([picture.grid_thw for picture in shown])
        if shown and video:
            inputs["position_ids"] = torch.from_numpy(sample.positions_3S)[:, None]
    return inputs


def reading_order(picture: Picture) -> torch.Tensor:
    """The patches as the image processor gave them: window order undone, merge unit by merge unit."""
    units = picture.patches_PD.unflatten(0, (picture.units, -1))
    restored = torch.empty_like(units)
    restored[torch.from_numpy(np.asarray(picture.unit_order_U))] = units
    return restored.flatten(0, 1)
