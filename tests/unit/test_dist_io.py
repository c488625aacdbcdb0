"""Rectangles of stored tensors: whatever range of whatever shard is written, all of them together are the tensor, each value once."""

import random
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch

from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.weights.table import rows
from eureka_megatron.weights.torch_dist import rectangles, stored_rows, stored_shape


@pytest.mark.parametrize("vision_parallel", ["replicated", "tensor"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ranges_of_shards_tile_the_stored_tensor(tiny_dir: Path, n: int, vision_parallel: str) -> None:
    draw = random.Random(0)
    for row, place, layers in stored_rows(rows(read_hf_config(tiny_dir), vision_parallel=vision_parallel)):
        shape = stored_shape(row, place, layers)
        sources = [torch.arange(prod(shape)).double().view(shape) for shape in row.shapes]
        sources = [source + 0.1 * number for number, source in enumerate(sources)]
        stored = torch.full(shape, torch.nan, dtype=torch.float64)
        for r in range(row.split.shards(n)):
            shard = row.split.cut(sources, r, n).flatten()
            cuts = sorted({0, len(shard), *(draw.randrange(len(shard)) for _ in range(3))})
            for start, stop in pairwise(cuts):
                for part, offsets, sizes in rectangles(row, place, r, n, start, stop):
                    at = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
                    assert stored[at].isnan().all(), "written twice"
                    stored[at] = shard[part].view(sizes)
        mine = stored if place.layer is None else stored[place.layer]
        assert torch.equal(mine, row.split.cut(sources, 0, 1)), row.megatron


def test_a_range_takes_as_few_rectangles_as_it_can(tiny_dir: Path) -> None:
    table = {row.megatron: (row, place) for row, place, _ in stored_rows(rows(read_hf_config(tiny_dir)))}
    row, place = table["decoder.layers.1.mlp.linear_fc2.weight"]
    _, width = row.split.shard_shape(row.shapes, 2)
    found = list(rectangles(row, place, 1, 2, width + 3, 5 * width + 7))
    assert [offsets for _, offsets, _ in found] == [(1, 1, width + 3), (1, 2, width), (1, 5, width)]
    assert [sizes for _, _, sizes in found] == [(1, 1, width - 3), (1, 3, width), (1, 1, 7)]
