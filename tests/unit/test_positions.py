"""Positions and window order against the two libraries that must agree with them. Exact."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eureka_megatron.data.positions import Span, extend_positions, mrope_positions
from eureka_megatron.data.vision_layout import vision_layout

# (tokens, spans): one image; two images next to each other; text between; an image at either end; no image at all.
IMAGE_CASES = [
    (36, [Span(15, (1, 6, 6))]),
    (60, [Span(3, (1, 4, 4)), Span(7, (1, 2, 40)), Span(31, (1, 6, 4))]),
    (1, [Span(0, (1, 2, 2))]),
    (40, [Span(0, (1, 8, 6)), Span(28, (1, 6, 8))]),
    (17, []),
]


def seconds(fps: float, dtype: torch.dtype = torch.float32) -> float:
    """Of two frames, as vLLM's input processor hands them on: a tensor of the model's type."""
    return torch.tensor(2 / fps).to(dtype).item()


VIDEO_CASES = [
    (200, [Span(5, (4, 6, 8), seconds_per_grid=1.0)]),
    (
        200,
        [
            Span(5, (7, 2, 4), seconds_per_grid=2.5),
            Span(40, (1, 6, 6)),
            Span(60, (3, 8, 4), seconds_per_grid=seconds(5.4)),
        ],
    ),
    # Sixty frames and more, fractional seconds, then an image, then text.
    (400, [Span(3, (31, 4, 6), seconds_per_grid=seconds(1.7)), Span(192, (1, 6, 6)), Span(201, (1, 2, 8))]),
    (
        900,
        [
            Span(0, (100, 4, 4), seconds_per_grid=seconds(2.997)),
            Span(402, (40, 4, 4), seconds_per_grid=seconds(23.976)),
        ],
    ),
    (900, [Span(0, (100, 4, 4), seconds_per_grid=seconds(1.7, torch.bfloat16)), Span(400, (1, 4, 4))]),
    # 2 / fps = 0.7: a multiple of it lies at a whole position, and float32 just below it.
    (60, [Span(1, (12, 2, 4), seconds_per_grid=seconds(2 / 0.7))]),
    (60, [Span(1, (12, 2, 4), seconds_per_grid=0.7)]),
]


def vllm_positions(length: int, spans: list[Span], tokens_per_second: float) -> np.ndarray:
    """vLLM's own function, on its own feature records; it reads nothing of the model but these two numbers."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
    from vllm.multimodal.inputs import (
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        MultiModalSharedField,
        PlaceholderRange,
    )

    def feature(span: Span) -> MultiModalFeatureSpec:
        modality = "image" if span.seconds_per_grid is None else "video"
        values = {f"{modality}_grid_thw": torch.tensor(span.grid_thw)}
        if modality == "video":
            values["second_per_grid_ts"] = torch.tensor(
                span.seconds_per_grid, dtype=torch.float64
            )  # holds every type's
        item = MultiModalKwargsItem(
            {
                name: MultiModalFieldElem(data=value, field=MultiModalSharedField(batch_size=1))
                for name, value in values.items()
            }
        )
        place = PlaceholderRange(offset=span.offset, length=int(np.prod(span.units(2))))
        return MultiModalFeatureSpec(data=item, modality=modality, identifier=str(span), mm_position=place)

    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.iter_mm_grid_thw = lambda features: Model.iter_mm_grid_thw(model, features)
    positions, delta = Model.get_mrope_input_positions(model, [0] * length, [feature(span) for span in spans])
    assert delta == positions.max() + 1 - length
    return positions.numpy()


@pytest.mark.parametrize(("length", "spans"), IMAGE_CASES + VIDEO_CASES)
@pytest.mark.parametrize("tokens_per_second", [2, 4])
def test_positions_equal_vllm(length, spans, tokens_per_second):
    expected = vllm_positions(length, spans, tokens_per_second)
    np.testing.assert_array_equal(mrope_positions(length, spans, tokens_per_second=tokens_per_second), expected)


def test_the_last_bit_of_the_seconds_may_move_a_position():
    """Why spans hold them in the engine's type."""
    rounded, exact = (
        mrope_positions(60, [Span(1, (12, 2, 4), seconds_per_grid=value)])[0, 1:].reshape(-1)[:24:2]
        for value in (seconds(2 / 0.7), 0.7)
    )
    assert rounded[5] == 1 + 6
    assert exact[5] == 1 + 7


# transformers takes pictures that touch for one, so they are kept apart here; the chat template never makes them touch.
@pytest.mark.parametrize(
    ("length", "spans"),
    [(36, [Span(15, (1, 6, 6))]), (60, [Span(3, (1, 4, 4)), Span(9, (1, 2, 40)), Span(31, (1, 6, 4))])],
)
def test_positions_of_images_equal_transformers(length, spans):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    types = torch.zeros(1, length, dtype=torch.int32)
    for span in spans:
        types[0, span.offset : span.offset + int(np.prod(span.units(2)))] = 1
    with torch.device("meta"):  # no weights: positions need none
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig())
    grids = torch.tensor([span.grid_thw for span in spans])
    positions, _ = model.get_rope_index(torch.zeros(1, length, dtype=torch.long), types, image_grid_thw=grids)
    np.testing.assert_array_equal(mrope_positions(length, spans), positions[:, 0].numpy())


def test_a_response_continues_after_the_largest_position_of_any_axis():
    positions = mrope_positions(9, [Span(0, (1, 6, 6))])
    extended = extend_positions(positions, 2)
    assert extended.shape == (3, 11)
    assert extended[:, 9:].tolist() == [[3, 4]] * 3
    np.testing.assert_array_equal(extended, mrope_positions(11, [Span(0, (1, 6, 6))]))


def test_spans_that_overlap_or_leave_the_sequence_are_refused():
    with pytest.raises(ValueError, match="overlaps"):
        mrope_positions(30, [Span(0, (1, 6, 6)), Span(8, (1, 2, 2))])
    with pytest.raises(ValueError, match="leaves the 8 tokens"):
        mrope_positions(8, [Span(0, (1, 6, 6))])


GRIDS = [
    (1, 2, 2),  # one merge unit
    (1, 6, 6),  # smaller than a window
    (1, 8, 8),  # exactly one window
    (1, 16, 24),  # divisible by the window
    (1, 40, 6),  # 20 × 3 units
    (1, 10, 18),
    (3, 10, 18),  # a video
]


@pytest.mark.parametrize("window_size", [56, 112])
@pytest.mark.parametrize("grid", GRIDS)
def test_window_order_equals_transformers(grid, window_size):
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

    layout = vision_layout(grid, window_size=window_size)
    grids = torch.tensor([grid])
    index, cu_windows = get_vision_window_index(grids, spatial_merge_size=2, window_size=window_size, patch_size=14)
    np.testing.assert_array_equal(layout.unit_order_U, index.numpy())
    np.testing.assert_array_equal(layout.window_lengths_W.cumsum(), cu_windows.numpy()[1:])
    np.testing.assert_array_equal(layout.frame_lengths_F.cumsum(), get_vision_cu_seqlens(grids).numpy()[1:])
    # transformers permutes units of four patches; permuting its coordinates must give ours.
    coordinates = get_vision_position_ids(grids, 2).numpy().reshape(-1, 4, 2)[index.numpy()].reshape(-1, 2)
    np.testing.assert_array_equal(layout.coordinates_P2, coordinates)
    np.testing.assert_array_equal(layout.patch_order_P.reshape(-1, 4)[:, 0] // 4, layout.unit_order_U)


@pytest.mark.parametrize("grid", GRIDS)
def test_window_order_is_a_permutation_and_lengths_cover_all_patches(grid):
    layout = vision_layout(grid)
    patches = int(np.prod(grid))
    assert sorted(layout.unit_order_U) == list(range(patches // 4))
    assert sorted(layout.patch_order_P) == list(range(patches))
    assert layout.window_lengths_W.sum() == layout.frame_lengths_F.sum() == patches
    assert layout.window_lengths_W.min() > 0


def test_odd_grids_are_refused():
    with pytest.raises(ValueError, match="multiples of merge_size"):
        vision_layout((1, 3, 4))
