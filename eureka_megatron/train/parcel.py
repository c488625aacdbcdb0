"""Samples on their way from the driver to the trainer ranks: every distinct picture once, however many samples show it.

Patches are most of a batch (4.7 kB for 14 × 14 pixels) and travel as numpy arrays: Ray maps those of an object in its store into each rank
of a node without a copy, where a torch tensor is unpickled into memory of the rank's own. A rank pays for the patches that it reads. Pixels
and frames stay behind: they are the rollout engine's.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from eureka_megatron.train.packing import distinct_pictures
from eureka_megatron.types import Picture, Sample


@dataclass(frozen=True)
class Parcel:
    """Example: 8 samples of one prompt give 8 `samples` without pictures, `shown` ((0,), (0,), …), one picture, one array."""

    samples: tuple[Sample, ...]
    shown: tuple[tuple[int, ...], ...]  # by sample: its pictures, as places in `pictures`
    pictures: tuple[Picture, ...]  # distinct, without patches, pixels and frames
    patches_PD: tuple[np.ndarray, ...]  # float32, of each picture


def wrap(samples: Sequence[Sample]) -> Parcel:
    """What `unwrap` makes the samples of again. Nothing is copied."""
    pictures = distinct_pictures(samples)
    place = {picture.key: index for index, picture in enumerate(pictures)}
    return Parcel(
        samples=tuple(replace(sample, pictures=()) for sample in samples),
        shown=tuple(tuple(place[picture.key] for picture in sample.pictures) for sample in samples),
        pictures=tuple(replace(picture, patches_PD=torch.empty(0), image=None, frames=None) for picture in pictures),
        patches_PD=tuple(picture.patches_PD.numpy() for picture in pictures),
    )


def unwrap(parcel: Parcel) -> list[Sample]:
    """The samples; those that show the same picture share it. Patches are views of the parcel's arrays."""
    with warnings.catch_warnings():  # object-store memory is read-only, and patches are only read
        warnings.filterwarnings("ignore", message=".*not writable.*")
        pictures = [
            replace(picture, patches_PD=torch.from_numpy(patches_PD))
            for picture, patches_PD in zip(parcel.pictures, parcel.patches_PD, strict=True)
        ]
    return [
        replace(sample, pictures=tuple(pictures[index] for index in shown))
        for sample, shown in zip(parcel.samples, parcel.shown, strict=True)
    ]
