"""Splits are exact bijections at every tensor-parallel size, and agree with independent closed forms."""

import pytest
import torch

from eureka_megatron.errors import UserError
from eureka_megatron.weights.splits import (
    ByColumns,
    ByRows,
    FusedQKV,
    GatedUp,
    Replicated,
    Split,
    VisionQKV,
)

PARALLEL = (1, 2, 4, 8)
CASES = [
    (ByRows(), [(16, 3)]),
    (ByRows(), [(24,)]),
    (ByColumns(), [(3, 16)]),
    (Replicated(), [(5,)]),
    (Replicated(), [(5, 3)]),
    (FusedQKV(8, 8, 4), [(32, 6), (32, 6), (32, 6)]),
    (FusedQKV(8, 2, 4), [(32, 6), (8, 6), (8, 6)]),
    (FusedQKV(8, 1, 4), [(32,), (4,), (4,)]),
    (FusedQKV(28, 4, 8), [(224, 5), (32, 5), (32, 5)]),
    (GatedUp(), [(16, 5), (16, 5)]),
    (GatedUp(), [(24,), (24,)]),
    (VisionQKV(4), [(96, 7)]),
    (VisionQKV(8), [(24,)]),
    (ByRows(), [(8, 3, 2, 2, 2)]),
    (Replicated(), [(5, 3, 2, 2, 2)]),
    (Replicated(GatedUp()), [(5, 2), (5, 2)]),
    (Replicated(VisionQKV(3)), [(18, 2)]),
    (Replicated(ByColumns()), [(3, 5)]),
]


def numbered(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tensors in which every value stands once, so that equality means every element is in its place."""
    start, tensors = 0, []
    for shape in shapes:
        count = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + count, dtype=torch.float64).reshape(shape))
        start += count
    return tensors


@pytest.mark.parametrize("n", PARALLEL)
@pytest.mark.parametrize(("split", "shapes"), CASES, ids=lambda value: str(value))
def test_merge_undoes_cut_and_every_value_is_in_exactly_one_shard(split: Split, shapes, n):
    tensors = numbered(shapes)
    shards = [split.cut(tensors, r, n) for r in range(n)]
    different = shards[: split.shards(n)]
    assert all(tuple(shard.shape) == split.shard_shape(shapes, n) for shard in shards)
    values = torch.cat([shard.flatten() for shard in different]).sort().values
    assert torch.equal(values, torch.cat([tensor.flatten() for tensor in tensors]))
    for merged, tensor in zip(split.merge(different, shapes), tensors, strict=True):
        assert torch.equal(merged, tensor)
    if split.shards(n) == 1:
        assert all(torch.equal(shard, shards[0]) for shard in shards)


@pytest.mark.parametrize("n", PARALLEL)
@pytest.mark.parametrize(("split", "shapes"), CASES, ids=lambda value: str(value))
def test_spans_cover_every_row_once(split: Split, shapes, n):
    rows = [shape[0] for shape in shapes]
    covered = [(span.source, row) for span in split.spans(rows, n) for row in range(span.start, span.stop)]
    assert sorted(covered) == [(source, row) for source, count in enumerate(rows) for row in range(count)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 2), (8, 2, 3), (6, 1, 4)])
def test_fused_qkv_puts_each_key_and_value_after_its_query_heads(heads, kv_heads, head_dim):
    q, k, v = tensors = numbered([(heads * head_dim, 5), (kv_heads * head_dim, 5), (kv_heads * head_dim, 5)])
    grouped = [part.reshape(kv_heads, -1, head_dim, 5) for part in (q, k, v)]
    expected = torch.cat(grouped, dim=1).reshape(-1, 5)
    assert torch.equal(FusedQKV(heads, kv_heads, head_dim).cut(tensors, 0, 1), expected)


@pytest.mark.parametrize("n", PARALLEL)
def test_fused_qkv_shards_are_plain_chunks_even_with_fewer_kv_heads_than_shards(n):
    tensors = numbered([(32, 3), (8, 3), (8, 3)])
    split = FusedQKV(8, 2, 4)
    chunks = split.cut(tensors, 0, 1).chunk(n)
    assert all(torch.equal(split.cut(tensors, r, n), chunks[r]) for r in range(n))


def test_vision_qkv_interleaves_heads():
    (qkv,) = numbered([(3 * 4 * 2, 5)])
    expected = qkv.reshape(3, 4, 2, 5).transpose(0, 1).reshape(-1, 5)
    assert torch.equal(VisionQKV(4).cut([qkv], 0, 1), expected)


@pytest.mark.parametrize("n", PARALLEL)
def test_gated_up_shard_is_its_gate_rows_then_its_up_rows(n):
    gate, up = numbered([(16, 3), (16, 3)])
    for r in range(n):
        expected = torch.cat([gate.chunk(n)[r], up.chunk(n)[r]])
        assert torch.equal(GatedUp().cut([gate, up], r, n), expected)


def test_columns_cut_the_input_axis():
    (weight,) = numbered([(3, 8)])
    assert torch.equal(ByColumns().cut([weight], 1, 4), weight[:, 2:4])


def test_a_convolution_is_seen_as_a_matrix():
    (kernel,) = numbered([(4, 3, 2, 5, 5)])
    assert torch.equal(ByRows().cut([kernel], 0, 1), kernel.reshape(4, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fill_casts_to_the_dtype_of_the_shard(dtype):
    tensors = [torch.randn(8, 4), torch.randn(8, 4)]
    shard = torch.empty(8, 4, dtype=dtype)
    GatedUp().fill(shard, tensors, 1, 2)
    assert torch.equal(shard, torch.cat([tensors[0][4:], tensors[1][4:]]).to(dtype))


def test_merged_tensors_never_share_memory_with_the_shards():
    shard = torch.ones(4, 3)
    (merged,) = Replicated().merge([shard], [(4, 3)])
    shard.zero_()
    assert torch.equal(merged, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("split", "shapes", "message"),
    [
        (ByRows(), [(7, 2)], "7 rows do not divide into 2 shards"),
        (ByColumns(), [(2, 9)], "9 columns do not divide into 2 shards"),
        (GatedUp(), [(5, 2), (5, 2)], "5 rows do not divide into 2 shards"),
    ],
)
def test_what_does_not_divide_is_refused(split, shapes, message):
    with pytest.raises(UserError, match=message):
        split.cut(numbered(shapes), 0, 2)


def test_sixteen_bit_patterns_survive_bitwise():
    bits = torch.randint(-(2**15), 2**15, (24, 8), dtype=torch.int16)
    tensors = list(bits.view(torch.bfloat16).split([16, 4, 4]))  # NaN payloads included
    split = FusedQKV(4, 1, 4)
    merged = split.merge([split.cut(tensors, r, 4) for r in range(4)], [(16, 8), (4, 8), (4, 8)])
    assert torch.equal(torch.cat([tensor.view(torch.int16) for tensor in merged]), bits)
