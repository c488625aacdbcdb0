"""Packing's invariants, as its docstring states them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eureka_megatron.errors import UserError
from eureka_megatron.train import sharing
from eureka_megatron.train.packing import Features, RowLayout, bundles, cost, pack, plan, split, unshift
from eureka_megatron.train.parcel import Rules, shares
from eureka_megatron.types import Batch, Picture, Sample


def picture(key: str, units: int) -> Picture:
    """A row of merge units in reversed window order."""
    return Picture(
        key=key,
        image=None,
        grid_thw=(1, 2, 2 * units),
        patches_PD=torch.full((4 * units, 3), float(ord(key[0]))),
        coordinates_P2=np.zeros((4 * units, 2), dtype=np.int64),
        unit_order_U=np.arange(units)[::-1].copy(),
        window_lengths_W=np.array([4 * units]),
        frame_lengths_F=np.array([4 * units]),
    )


def sample(length: int, first: int = 0, pictures: tuple[Picture, ...] = (), offsets: tuple[int, ...] = ()) -> Sample:
    mask = np.zeros(length, dtype=np.float32)
    mask[length // 2 :] = 1
    values = np.arange(length, dtype=np.float32)
    return Sample(
        tokens_S=np.arange(first, first + length),
        positions_3S=np.broadcast_to(np.arange(length), (3, length)),
        mask_S=mask,
        advantages_S=values,
        rollout_logprobs_S=-values,
        pictures=pictures,
        picture_offsets=offsets,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    ranks=st.integers(1, 5),
    align=st.sampled_from([1, 2, 4]),
)
def test_every_sample_once_same_count_everywhere_and_no_row_too_long(
    lengths: list[int], ranks: int, align: int
) -> None:
    plans = plan(lengths, [float(length) for length in lengths], ranks, 64, align)
    assert sorted(i for rank in plans for row in rank for i in row) == list(range(len(lengths)))
    assert len({len(rank) for rank in plans}) == 1
    assert all(sum(lengths[i] for i in row) <= 64 for rank in plans for row in rank)


def test_ranks_are_balanced_by_cost() -> None:
    costs = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    plans = plan([1] * 8, costs, 2, 100)
    loads = [sum(costs[i] for row in rank for i in row) for rank in plans]
    assert loads == [18.0, 18.0]


def test_a_sample_longer_than_a_row_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"sample 1 has 65 tokens.*max_tokens_per_micro_batch=64"):
        plan([3, 65], [1.0, 1.0], 1, 64)


def test_values_move_to_the_row_that_predicts_their_token_and_back() -> None:
    samples = [sample(5, 10), sample(3, 50)]
    batch = pack(samples, [1, 0], layout=4)
    assert batch.tokens_T.tolist() == [50, 51, 52, 10, 11, 12, 13, 14]
    assert batch.labels_T.tolist() == [51, 52, 0, 11, 12, 13, 14, 0]
    assert batch.advantages_T.tolist() == [1, 2, 0, 1, 2, 3, 4, 0]
    assert batch.mask_T.tolist() == [1, 1, 0, 0, 1, 1, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 8]
    assert batch.segments == (3, 5)
    assert batch.sequence_ids_T.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    back = unshift(batch.advantages_T, batch)
    assert [one.tolist() for one in back] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert [len(one) for one in split(batch.tokens_T, batch)] == [3, 5]


def test_filling_is_a_sequence_of_its_own_without_weight() -> None:
    batch = pack([sample(5)], [0], layout=4)
    assert batch.tokens == 8
    assert batch.cu_seqlens.tolist() == [0, 5, 8]
    assert batch.mask_T[5:].tolist() == [0, 0, 0]
    assert batch.sequence_ids_T[5:].tolist() == [-1, -1, -1]


def test_an_empty_micro_batch_is_one_filler_row() -> None:
    batch = pack([sample(5)], [], layout=2)
    assert (batch.tokens, float(batch.mask_T.sum()), batch.vision, batch.sample_indices) == (2, 0.0, None, ())
    assert batch.rollout_logprobs_T.tolist() == [0, 0], "the same optional parts as its siblings"
    assert batch.ref_logprobs_T is None


def test_a_shared_picture_is_encoded_once_and_placed_in_reading_order_everywhere() -> None:
    a, b = picture("a", 3), picture("b", 2)
    samples = [sample(8, pictures=(a,), offsets=(2,)), sample(9, pictures=(b, a), offsets=(1, 5))]
    vision = pack(samples, [0, 1]).vision
    assert vision is not None
    assert vision.units == 5
    assert [len(patches) for patches in vision.patches_PD] == [12, 8]
    assert all(patches is p.patches_PD for patches, p in zip(vision.patches_PD, (a, b), strict=True)), "not copied"
    assert vision.cu_frames.tolist() == [0, 12, 20]
    assert vision.frames == (12, 8)
    # Unit at window place u is unit 2−u (or 1−u) in reading order; sample 1 starts at row 8.
    assert vision.source_E.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert vision.placement_E.tolist() == [4, 3, 2, 10, 9, 15, 14, 13]


def test_context_ranks_share_every_sequence_in_mirrored_chunks() -> None:
    samples = [sample(5, 10), sample(8, 50)]
    ranks = [pack(samples, [0, 1], RowLayout(align=4, context_rank=rank, context_size=2)) for rank in range(2)]
    row = ranks[0]
    assert row.cu_seqlens.tolist() == [0, 8, 16], "5 tokens are filled up to 8, twice two chunks of two"
    assert row.tokens_T.tolist() == [*range(10, 15), 0, 0, 0, *range(50, 58)]
    assert row.sequence_ids_T.tolist() == [0] * 5 + [-1] * 3 + [1] * 8
    assert row.labels_T.tolist() == [11, 12, 13, 14, 0, 0, 0, 0, *range(51, 58), 0]
    assert row.mask_T.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    shares = [one.context for one in ranks]
    assert shares[0].rows_t.tolist() == [0, 1, 6, 7, 8, 9, 14, 15]
    assert shares[1].rows_t.tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    together = torch.cat([share.rows_t for share in shares])
    assert together[shares[0].order_T].tolist() == list(range(16))
    assert [one.tolist() for one in split(row.tokens_T, row)] == [list(range(10, 15)), list(range(50, 58))]
    empty = pack(samples, [], RowLayout(align=4, context_size=2))
    assert (empty.tokens, len(empty.context.rows_t)) == (4, 2)


def test_context_ranks_know_which_embeddings_stand_in_their_rows() -> None:
    a, b = picture("a", 3), picture("b", 2)
    samples = [sample(8, pictures=(a,), offsets=(2,)), sample(9, pictures=(b,), offsets=(6,))]
    whole = pack(samples, [0, 1], RowLayout(align=4, context_size=2)).vision
    expected = dict(zip(whole.placement_E.tolist(), whole.source_E.tolist(), strict=True))
    found: dict[int, int] = {}
    for rank in range(2):
        one = pack(samples, [0, 1], RowLayout(align=4, context_rank=rank, context_size=2))
        source, place = one.vision.shown_2L
        found |= dict(zip(one.context.rows_t[place].tolist(), source.tolist(), strict=True))
    assert found == expected
    assert len(expected) == 5


def test_rows_know_whether_their_sample_shows_a_picture() -> None:
    samples = [sample(5), sample(7, pictures=(picture("a", 2),), offsets=(1,))]
    batch = pack(samples, [0, 1], RowLayout(align=8))
    assert batch.has_image_T.tolist() == [False] * 5 + [True] * 7 + [False] * 4
    assert not pack(samples, [], RowLayout(align=8)).has_image_T.any()


def test_tensor_ranks_share_the_pictures_by_cost() -> None:
    pictures = [picture(name, units) for name, units in (("a", 3), ("b", 7), ("c", 4))]
    samples = [
        sample(30, pictures=tuple(pictures), offsets=(1, 5, 15)),
        sample(9, pictures=(pictures[0],), offsets=(2,)),
    ]
    first, second = (pack(samples, [0, 1], RowLayout(picture_rank=rank, picture_ranks=2)).vision for rank in range(2))
    assert first.units_R == second.units_R == (7, 7), "b alone against a and c"
    assert [[chr(int(patches[0, 0])) for patches in one.patches_PD] for one in (first, second)] == [["b"], ["a", "c"]]
    # In the gathered order b stands first, then a and c; sample 1 shows a once more.
    assert first.source_E.tolist() == [7, 8, 9, *range(7), 10, 11, 12, 13, 7, 8, 9]
    alone = pack(samples, [1], RowLayout(picture_rank=1, picture_ranks=2)).vision
    assert (alone.units_R, alone.patches_PD) == ((3, 0), ())


def test_features_take_the_place_of_patches() -> None:
    a, b = picture("a", 3), picture("b", 2)
    samples = [sample(8, pictures=(a,), offsets=(2,)), sample(9, pictures=(b, a), offsets=(1, 5))]
    known = {"a": torch.full((3, 4), 1.0), "b": torch.full((2, 4), 2.0)}
    features = Features(known, merged=True)
    vision = pack(samples, [0, 1], RowLayout(picture_ranks=2), features).vision
    assert all(units is known[key] for units, key in zip(vision.units_UO, "ab", strict=True)), "not copied"
    assert (vision.patches_PD, vision.units_R) == (None, None)
    assert vision.source_E.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


def test_interleaved_pipelines_get_a_multiple_of_the_stages() -> None:
    plans = plan([5, 5, 5], [1.0] * 3, 1, 5, multiple_of=2)
    assert plans == [[[0], [1], [2], []]]


SHARED = RowLayout(share_prompts=True)


def response(
    prompt: list[int], tokens: list[int], pictures: tuple[Picture, ...] = (), offsets: tuple[int, ...] = ()
) -> Sample:
    length = len(prompt) + len(tokens)
    learned = (np.arange(length) >= len(prompt)).astype(np.float32)
    return Sample(
        tokens_S=np.array(prompt + tokens),
        positions_3S=np.broadcast_to(np.arange(length), (3, length)),
        mask_S=learned,
        advantages_S=learned * tokens[0],
        rollout_logprobs_S=-learned * np.arange(length),
        pictures=pictures,
        picture_offsets=offsets,
    )


def test_responses_share_the_rows_of_their_prompt_but_the_last() -> None:
    samples = [response([1, 2, 3, 4], [50, 51]), response([7, 8], [70, 71]), response([1, 2, 3, 4], [60, 61, 62])]
    batch = pack(samples, [0, 1, 2], SHARED)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 50, 51, 4, 60, 61, 62, 7, 8, 70, 71]
    assert batch.labels_T.tolist() == [2, 3, 4, 50, 51, 0, 60, 61, 62, 0, 8, 70, 71, 0]
    assert batch.positions_3T[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 1, 2, 3]
    assert batch.mask_T.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0]
    assert batch.sequence_ids_T.tolist() == [-1] * 3 + [0] * 3 + [2] * 4 + [1] * 4
    assert batch.segments == (3, 3, 4, 4)
    assert batch.prefixes == ((0, 0), (0, 3), (0, 3), (0, 0))
    assert [one.tolist() for one in split(batch.tokens_T, batch)] == [one.tokens_S.tolist() for one in samples]
    back = unshift(batch.rollout_logprobs_T, batch)
    assert [one.tolist() for one in back] == [one.rollout_logprobs_S.tolist() for one in samples]


def test_a_shared_prompt_shows_its_picture_once() -> None:
    a = picture("a", 3)
    samples = [response([1, 9, 9, 9, 2, 3], [50 + n], (a,), (1,)) for n in range(2)]
    vision = pack(samples, [0, 1], SHARED).vision
    assert vision is not None
    assert (vision.units, vision.placement_E.tolist()) == (3, [3, 2, 1])
    assert pack(samples, [0, 1], SHARED).has_image_T.all()
    other = replace(samples[1], pictures=(picture("b", 3),))
    assert pack([samples[0], other], [0, 1], SHARED).prefixes == (), "another picture is another prompt"


@pytest.mark.parametrize("change", ["tokens_S", "positions_3S", "picture_offsets"])
def test_a_prompt_that_differs_is_not_shared(change: str) -> None:
    one, other = (response([1, 9, 9, 2, 3], [50], (picture("a", 1),), (1,)) for _ in range(2))
    values = {
        "tokens_S": other.tokens_S + (np.arange(6) == 3),
        "positions_3S": other.positions_3S + 1,
        "picture_offsets": (2,),
    }
    assert pack([one, other], [0, 1], SHARED).prefixes
    assert pack([one, replace(other, **{change: values[change]})], [0, 1], SHARED).prefixes == ()


def test_nothing_is_shared_where_the_first_token_is_learned_or_padding_would_eat_it() -> None:
    all_learned = [replace(sample(6), mask_S=np.ones(6, np.float32)) for _ in range(2)]
    assert pack(all_learned, [0, 1], SHARED).prefixes == ()
    unlearned = [replace(sample(6), mask_S=np.zeros(6, np.float32)) for _ in range(2)]
    assert pack(unlearned, [0, 1], SHARED).prefixes == ()
    short = [response([1, 2, 3], [4]) for _ in range(2)]  # 2 + 2 + 2 rows, but 4 each in chunks of four
    assert pack(short, [0, 1], replace(SHARED, context_size=2, align=4)).prefixes == ()
    assert pack(short, [0, 1], SHARED).prefixes


def test_context_ranks_share_prompts_and_responses_in_mirrored_chunks() -> None:
    samples = [response(list(range(1, 8)), [50, 51]), response(list(range(1, 8)), [60])]
    row = pack(samples, [0, 1], RowLayout(align=4, context_size=2, share_prompts=True))
    assert row.segments == (8, 4, 4)
    assert row.prefixes == ((0, 0), (0, 6), (0, 6)), "padding of the prompt is seen by nobody"
    assert row.context.rows_t.tolist() == [0, 1, 6, 7, 8, 11, 12, 15]
    assert row.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 7, 50, 51, 0, 7, 60, 0, 0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    groups=st.lists(
        st.tuples(st.integers(2, 12), st.lists(st.integers(1, 8), min_size=1, max_size=5)), min_size=1, max_size=6
    ),
    ranks=st.integers(1, 4),
    context=st.sampled_from([1, 2]),
)
def test_shared_or_not_every_sample_lies_whole_in_one_row(
    groups: list[tuple[int, list[int]]], ranks: int, context: int
) -> None:
    samples = [
        response([number] * length, [100 + place] * size)
        for number, (length, sizes) in enumerate(groups)
        for place, size in enumerate(sizes)
    ]
    layout = RowLayout(align=2 * context, context_size=context, share_prompts=True)
    found = shares(Batch.of(samples), Rules(ranks, 24, layout))
    seen = []
    for share in found:
        for row in share.rows:
            batch = pack(share.parcel.samples, row, layout)
            assert batch.tokens <= 24
            for place, tokens in zip(row, split(batch.tokens_T, batch), strict=True):
                own = share.parcel.samples[place]
                assert tokens.tolist() == own.tokens_S.tolist()
                seen.append(own.tokens_S.tobytes())
    assert sorted(seen) == sorted(one.tokens_S.tobytes() for one in samples)
    assert len({len(share.rows) for share in found}) == 1


def test_prompts_are_divided_only_as_far_as_it_lightens_the_heaviest_rank() -> None:
    group = [response([1] * 100, [n, n]) for n in range(4)]
    other = [response([2] * 100, [n, n]) for n in range(4)]
    assert bundles(group + other, 2, 4096, SHARED) == [[0, 1, 2, 3], [4, 5, 6, 7]], "a rank each"
    assert bundles(group, 1, 4096, SHARED) == [[0, 1, 2, 3]]
    assert bundles(group, 1, 110, SHARED) == [[0, 1], [2, 3]], "99 + 2 · 3 rows fit"
    long = [response([1] * 4, [n] * 100) for n in range(4)]
    assert bundles(long, 2, 4096, SHARED) == [[0, 1], [2, 3]], "a prompt for each rank costs less than an idle rank"
    assert bundles(long, 2, 4096, RowLayout()) == [[0], [1], [2], [3]]


def test_the_cost_of_a_shared_prompt_is_that_of_its_rows_and_pairs() -> None:
    one, other = response([1] * 9, [5, 6]), response([1] * 9, [7, 8, 9])
    assert sharing.tokens([one, other], lambda length: length) == 8 + 3 + 4
    assert cost(one, other) == pytest.approx(15 + (8 * 8 + 3 * 3 + 2 * 8 * 3 + 4 * 4 + 2 * 8 * 4) / 8192)
    assert cost(one) == pytest.approx(11 + 11 * 11 / 8192)
