"""What travels from the driver to the trainer ranks is proportional to the distinct pictures, and arrives unchanged."""

import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from eureka_megatron.train.parcel import unwrap, wrap
from eureka_megatron.types import Sample
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
