"""What travels from the driver to the trainer ranks is proportional to the distinct pictures, and arrives unchanged."""

import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from eureka_megatron.train.packing import RowLayout, distinct_pictures
from eureka_megatron.train.parcel import Rules, Share, shares, unwrap, unwrap_pictures, wrap
from eureka_megatron.types import Batch, Sample
from eureka_megatron.verify.samples import made_up_samples


def travelling_bytes(value: object) -> tuple[int, int]:
    """(bytes that every receiver unpickles, bytes that it maps without a copy), as Ray has it (pickle protocol 5)."""
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return len(stream), sum(buffer.raw().nbytes for buffer in buffers)


def loaded_anew(samples: list[Sample]) -> list[Sample]:
    """The same samples with pictures of their own, as two workers of the data loader would have made them."""
    return pickle.loads(pickle.dumps(samples))


def test_samples_that_show_a_picture_cost_it_once(tiny_dir: Path) -> None:
    one = made_up_samples(tiny_dir, pictures=[((20, 20), (10, 10))])
    group = [replace(one[0], advantages_S=one[0].advantages_S * n) for n in range(16)]
    patches = sum(picture.patches_PD.nbytes for picture in one[0].pictures)
    copied, mapped = travelling_bytes(wrap([*group, *loaded_anew(group)]))
    print(f"patches {patches}, copied {copied}, mapped {mapped}")
    assert patches <= mapped <= 1.05 * patches  # measured 1.016: tokens, positions, coordinates
    assert copied <= 0.01 * patches  # measured 0.0004
    # As torch tensors: all of it copied by every rank, once for each picture object.
    assert travelling_bytes([*group, *loaded_anew(group)])[0] > 2 * patches


def test_samples_come_out_as_they_went_in_but_for_what_engines_need(tiny_dir: Path) -> None:
    samples = made_up_samples(tiny_dir)
    back = unwrap(pickle.loads(pickle.dumps(wrap(samples), protocol=5)))
    for before, after in zip(samples, back, strict=True):
        same_fields(before, after, {"pictures"})
        for picture, copy in zip(before.pictures, after.pictures, strict=True):
            same_fields(picture, copy, {"image", "frames"})
            assert copy.image is copy.frames is None


def same_fields(a: object, b: object, but: set[str]) -> None:
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in but:
            continue
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        elif isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y


def test_a_picture_is_shared_after_the_journey_too(tiny_dir: Path) -> None:
    samples = made_up_samples(tiny_dir, pictures=[((3, 3),)])
    first, second = unwrap(wrap([*samples, *loaded_anew(samples)]))
    assert first.pictures[0] is second.pictures[0]


def two_updates(directory: Path) -> Batch:
    """Four responses to each of four prompts, two with a picture of their own, two that show the same; numbered by their advantage."""
    prompts = made_up_samples(directory, pictures=(((8, 8),), ((4, 12), (6, 4)), ((10, 6),), ((10, 6),)))
    samples = [replace(sample, advantages_S=sample.mask_S) for _ in range(4) for sample in prompts]
    samples = [replace(sample, advantages_S=sample.mask_S * n) for n, sample in enumerate(samples, 1)]
    return Batch(tuple(samples), (tuple(range(10)), tuple(range(10, 16))), scheduled=7)


def numbers(share: Share) -> list[int]:
    return [int(sample.advantages_S.max()) - 1 for sample in share.parcel.samples]


def test_a_rank_gets_its_own_samples_and_their_distinct_pictures_once(tiny_dir: Path) -> None:
    batch = two_updates(tiny_dir)
    longest = max(map(len, batch.samples))
    parts = shares(batch, Rules(3, 2 * longest, RowLayout()))
    assert sorted(number for share in parts for number in numbers(share)) == list(range(16)), "each sample on one rank"
    for share in parts:
        own = [batch.samples[number] for number in numbers(share)]
        assert [picture.key for picture in share.parcel.pictures] == list(distinct_pictures(own))
        patches = sum(picture.patches_PD.nbytes for picture in distinct_pictures(own).values())
        assert patches <= travelling_bytes(share)[1] <= 1.02 * patches  # measured 1.007
        for update, indices in zip(share.updates, batch.updates, strict=True):
            places = [place for row in share.rows[update.start : update.stop] for place in row]
            assert {numbers(share)[place] for place in places} <= set(indices)
            learned = [float(batch.samples[index].mask_S[1:].sum()) for index in indices]
            assert (update.tokens, update.sequences) == (sum(learned), len(learned)), "of all ranks together"
        assert sorted(place for row in share.rows for place in row) == list(range(len(own)))
    assert len({(share.updates, share.scheduled, share.brought) for share in parts}) == 1


def test_patches_for_a_frozen_tower_go_to_those_who_encode_them(tiny_dir: Path) -> None:
    batch = two_updates(tiny_dir)
    every = distinct_pictures(batch.samples)
    parts = shares(batch, Rules(2, 10_000, RowLayout()), tower_ranks=2)
    assert sorted(size.key for share in parts[0].tower for size in share) == sorted(every)
    for rank, share in enumerate(parts):
        assert share.tower == parts[0].tower
        to_encode = {size.key for part in share.tower[2 * rank : 2 * rank + 2] for size in part}
        for picture in unwrap_pictures(share.parcel):
            expected = every[picture.key].patches_PD if picture.key in to_encode else every[picture.key].patches_PD[:0]
            assert torch.equal(picture.patches_PD, expected)
            assert picture.patches == every[picture.key].patches
        assert to_encode <= {picture.key for picture in share.parcel.pictures}


def test_a_rank_without_samples_still_has_its_empty_rows(tiny_dir: Path) -> None:
    batch = two_updates(tiny_dir)
    lonely = Batch.of([replace(batch.samples[0], rollout_logprobs_S=batch.samples[0].mask_S)])
    first, second = shares(lonely, Rules(2, 10_000, RowLayout()))
    assert (second.rows, second.parcel.samples, second.parcel.pictures) == (((),), (), ())
    assert second.updates == first.updates
    assert second.brought == {"rollout_logprobs_S"}
