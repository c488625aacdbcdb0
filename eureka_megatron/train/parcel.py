"""What travels from the driver to the trainer ranks: to each data-parallel rank the plan of its micro-batches and the samples in them, no
others, with every distinct picture once, however many samples show it.

The plan needs lengths and costs alone and is made once, with what belongs to the whole batch: the denominators of every update.

Patches are most of a batch (4.7 kB for 14 × 14 pixels) and travel as numpy arrays: Ray maps those of an object in its store into each rank
of a node without a copy, where a torch tensor is unpickled into memory of the rank's own. A rank pays for the patches that it reads. Pixels
and frames stay behind: they are the rollout engine's.

Example: samples 0 … 5, updates (0, 1, 2, 3) and (4, 5), two data-parallel ranks, rows that hold two samples:

    update        0              1
    rank 0        [0, 3]         [5]         its share: samples 0 3 5, rows (0, 1) (2), updates rows 0 … 1 and 1 … 2
    rank 1        [1, 2]         [4]                    samples 1 2 4, rows (0, 1) (2), the same
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from eureka_megatron.train import packing, sharing
from eureka_megatron.train.packing import distinct_pictures
from eureka_megatron.types import Batch, Picture, Sample


@dataclass(frozen=True)
class Parcel:
    """Example: 8 samples of one prompt give 8 `samples` without pictures, `shown` ((0,), (0,), …), one picture, one array.

    Attributes:
        shown: by sample: its pictures, as places in `pictures`.
        pictures: distinct, without patches, pixels and frames.
        patches_PD: float32, of each picture; no rows where the rank needs none.
    """

    samples: tuple[Sample, ...]
    shown: tuple[tuple[int, ...], ...]
    pictures: tuple[Picture, ...]
    patches_PD: tuple[np.ndarray, ...]


def wrap(samples: Sequence[Sample], encoded: Sequence[Picture] | None = None) -> Parcel:
    """What `unwrap` makes the samples of again. Nothing is copied.

    Args:
        encoded: pictures that travel with their patches, shown by the samples or not; None: all that are shown.
    """
    pictures = distinct_pictures(samples)
    needed = pictures if encoded is None else {picture.key: picture for picture in encoded}
    pictures = pictures | needed
    place = {key: index for index, key in enumerate(pictures)}
    return Parcel(
        samples=tuple(replace(sample, pictures=()) for sample in samples),
        shown=tuple(tuple(place[picture.key] for picture in sample.pictures) for sample in samples),
        pictures=tuple(replace(p, patches_PD=torch.empty(0), image=None, frames=None) for p in pictures.values()),
        patches_PD=tuple(p.patches_PD.numpy()[: None if key in needed else 0] for key, p in pictures.items()),
    )


def unwrap_pictures(parcel: Parcel) -> list[Picture]:
    """The distinct pictures; patches are views of the parcel's arrays."""
    with warnings.catch_warnings():  # object-store memory is read-only, and patches are only read
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return [
            replace(picture, patches_PD=torch.from_numpy(patches_PD))
            for picture, patches_PD in zip(parcel.pictures, parcel.patches_PD, strict=True)
        ]


def unwrap(parcel: Parcel) -> list[Sample]:
    """The samples; those that show the same picture share it."""
    pictures = unwrap_pictures(parcel)
    return [
        replace(sample, pictures=tuple(pictures[index] for index in shown))
        for sample, shown in zip(parcel.samples, parcel.shown, strict=True)
    ]


@dataclass(frozen=True)
class Rules:
    """What a plan keeps to, equal on all ranks.

    Attributes:
        data_ranks: how many share the samples.
        max_tokens: of a row.
        rows: of any rank, for the sizes in it.
        multiple_of: what the number of micro-batches divides by.
    """

    data_ranks: int
    max_tokens: int
    rows: packing.RowLayout
    multiple_of: int = 1


class Update(NamedTuple):
    """One optimizer step: micro-batches `start` … `stop` of the share, and the denominators, those of all ranks together.

    At least 1 each, so that an update without learned tokens is 0, not NaN.
    """

    start: int
    stop: int
    tokens: float
    sequences: float


class PictureSize(NamedTuple):
    """What other ranks have to know of a picture that one of them encodes."""

    key: str
    patches: int
    units: int


@dataclass(frozen=True)
class Share:
    """One data-parallel rank's part of a batch.

    Attributes:
        parcel: its samples.
        rows: micro-batches of all updates, one after another: places in the samples.
        scheduled: see Batch.
        brought: optional values that all samples of the whole batch have.
        places: where each of its samples stands in the batch.
        tower: of a frozen tower: which pictures of the whole batch each rank encodes; a data-parallel rank's ranks stand together.
    """

    parcel: Parcel
    rows: tuple[tuple[int, ...], ...]
    updates: tuple[Update, ...]
    scheduled: int | None
    brought: frozenset[str]
    places: tuple[int, ...] = ()
    tower: tuple[tuple[PictureSize, ...], ...] = ()


def shares(batch: Batch, rules: Rules, tower_ranks: int = 0) -> list[Share]:
    """What each data-parallel rank gets of a batch.

    Args:
        tower_ranks: ranks of one data-parallel rank among which a frozen tower's pictures are shared out, which then travel with their
            patches to those who encode them; 0: to those who show them.

    Raises:
        UserError: a sample is longer than a row.
    """
    samples, brought = batch.samples, packing.brought_by_all(batch.samples)
    plans = [_plan(samples, indices, rules) for indices in batch.updates]
    pictures = list(distinct_pictures(samples).values()) if tower_ranks else []
    encoded = packing.share_pictures(pictures, rules.data_ranks * tower_ranks) if pictures else []
    tower = tuple(
        tuple(PictureSize(pictures[i].key, pictures[i].patches, pictures[i].units) for i in part) for part in encoded
    )
    stops = list(accumulate((len(plan[0]) for plan in plans), initial=0))  # as many rows on every rank
    updates = tuple(
        Update(start, stop, *_denominators([samples[index] for index in indices]))
        for (start, stop), indices in zip(pairwise(stops), batch.updates, strict=True)
    )
    found = []
    for rank in range(rules.data_ranks):
        rows = [row for plan in plans for row in plan[rank]]
        own = sorted({index for row in rows for index in row})
        place = {index: number for number, index in enumerate(own)}
        mine = encoded[rank * tower_ranks : (rank + 1) * tower_ranks]
        found.append(
            Share(
                wrap([samples[i] for i in own], [pictures[i] for part in mine for i in part] if tower else None),
                rows=tuple(tuple(place[index] for index in row) for row in rows),
                updates=updates,
                scheduled=batch.scheduled,
                brought=brought,
                places=tuple(own),
                tower=tower,
            )
        )
    return found


def _plan(samples: Sequence[Sample], indices: Sequence[int], rules: Rules) -> list[list[list[int]]]:
    """`[rank][micro-batch]`: indices into `samples`, of those in `indices`."""
    own = [samples[index] for index in indices]
    bundles = packing.bundles(own, rules.data_ranks, rules.max_tokens, rules.rows)
    together = [[own[place] for place in bundle] for bundle in bundles]
    plans = packing.plan(
        [sharing.tokens(bundle, rules.rows.padded) for bundle in together],
        [packing.cost(*bundle) for bundle in together],
        rules.data_ranks,
        rules.max_tokens,
        rules.rows.align,
        rules.multiple_of,
    )
    return [
        [[indices[place] for bundle in row for place in bundles[bundle]] for row in micro_batches]
        for micro_batches in plans
    ]


def _denominators(samples: Sequence[Sample]) -> tuple[float, float]:
    """Learned tokens, and sequences that have any."""
    counts = [float(sample.mask_S[1:].sum()) for sample in samples]
    return max(sum(counts), 1.0), max(float(sum(count > 0 for count in counts)), 1.0)
