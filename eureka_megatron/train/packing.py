"""Samples → packed micro-batches, the same number on every data-parallel rank.

Invariants, each asserted by a test: every sample of an update appears exactly once over all ranks and is never split; every rank runs the
same number of micro-batches (a rank with too few samples gets empty ones: one filler token, mask 0); no micro-batch exceeds `max_tokens`
unless a single sample does, which is refused; rows are a multiple of `align` tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from eureka_megatron.errors import UserError
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.types import ContextShare, MicroBatch, Picture, Sample, VisionBatch


@dataclass(frozen=True)
class Features:
    """What a frozen tower made of pictures, by their keys: embeddings [U, O] when `merged`, else what enters the merger, [P, H].

    In host memory: those of a whole rollout step would fill a GPU.
    """

    of: Mapping[str, torch.Tensor]
    merged: bool


def plan(
    lengths: Sequence[int],
    costs: Sequence[float],
    data_parallel: int,
    max_tokens: int,
    align: int = 1,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Which sample goes where: `plan[rank][micro_batch]` is a list of indices into `lengths`.

    Ranks are balanced by cost (longest first to the least loaded), then each rank's samples fill micro-batches by tokens (first fit).
    The number of micro-batches, the same on all ranks, is a multiple of `multiple_of` (interleaved pipelines need that); the last may be
    empty.

    Raises:
        UserError: a sample is longer than `max_tokens`.
    """
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise UserError(
                f"sample {index} has {length} tokens, more than training.max_tokens_per_micro_batch={max_tokens}; "
                "raise that limit or lower data.max_prompt_tokens or rollout.max_response_tokens"
            )
    loads = [0.0] * data_parallel
    ranks: list[list[int]] = [[] for _ in range(data_parallel)]
    for index in sorted(range(len(lengths)), key=lambda i: (-costs[i], i)):
        lightest = min(range(data_parallel), key=lambda rank: (loads[rank], rank))
        ranks[lightest].append(index)
        loads[lightest] += costs[index]
    usable = max_tokens // align * align
    plans = [_first_fit(indices, lengths, max(usable, 1)) for indices in ranks]
    count = max(len(micro_batches) for micro_batches in plans)
    count += -count % multiple_of
    return [micro_batches + [[]] * (count - len(micro_batches)) for micro_batches in plans]


def _first_fit(indices: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        for place, room in enumerate(free):
            if lengths[index] <= room:
                bins[place].append(index)
                free[place] -= lengths[index]
                break
        else:
            bins.append([index])
            free.append(max_tokens - lengths[index])
    return bins or [[]]


def cost(sample: Sample) -> float:
    """Relative work of one sample: linear layers count its tokens, attention their square, the tower its patches."""
    length = len(sample)
    patches = sum(picture.patches_PD.shape[0] for picture in sample.pictures)
    return length + length**2 / 8192 + 0.5 * patches


@dataclass(frozen=True)
class RowLayout:
    """What parallelism asks of a packed row.

    Attributes:
        align: the row's tokens are a multiple of it.
        context_rank, context_size: this rank among those that share the row's tokens.
        picture_rank, picture_ranks: this rank among those that share the row's pictures; one: every rank has all of them.
    """

    align: int = 1
    context_rank: int = 0
    context_size: int = 1
    picture_rank: int = 0
    picture_ranks: int = 1

    @property
    def each(self) -> int:
        """Every sequence is filled up to a multiple of it."""
        return 2 * self.context_size if self.context_size > 1 else 1

    def filled(self, length: int) -> int:
        """Tokens that a sample of `length` takes up."""
        return length + -length % self.each


def row_layout(parallel: Parallel, vision_parallel: str = "replicated", multiple: int = 1) -> RowLayout:
    """The layout for this rank's rows: under sequence parallelism each context share divides by the tensor-parallel size.

    Args:
        multiple: what the rows of one rank's share must divide by (FP8 kernels).
    """
    tensor, context = parallel.tensor, parallel.context
    share = multiple * (tensor.size if parallel.layout.sequence_parallel else 1)
    shared = vision_parallel == "data"
    return RowLayout(
        align=share if context.size == 1 else math.lcm(share, 2) * context.size,
        context_rank=context.rank,
        context_size=context.size,
        picture_rank=tensor.rank if shared else 0,
        picture_ranks=tensor.size if shared else 1,
    )


def pack(
    samples: Sequence[Sample],
    indices: Sequence[int],
    layout: RowLayout | int = 1,
    features: Features | None = None,
) -> MicroBatch:
    """Lay the chosen samples end to end. No indices: one filler row of `align` tokens that contributes nothing.

    Args:
        layout: what parallelism asks of the row; a number is an alignment alone.
        features: of pictures that a frozen tower has already seen; they take the place of the patches.
    """
    layout = RowLayout(align=layout) if isinstance(layout, int) else layout
    chosen = [samples[index] for index in indices]
    lengths = [len(sample) for sample in chosen]
    room = [layout.filled(length) for length in lengths]
    used = sum(room)
    filling = -used % layout.align if used else layout.align
    padding = [b - a for a, b in zip(lengths, room, strict=True)]

    def laid(values: list[np.ndarray], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """From 'belongs to token i' to 'belongs to the prediction made at row i−1'; the last row of each sequence gets 0."""
        rows = [np.append(value[1:], np.zeros(1 + more)) for value, more in zip(values, padding, strict=True)]
        return torch.from_numpy(np.concatenate([*rows, np.zeros(filling)])).to(dtype)

    # An empty micro-batch has the same optional parts as the others: ranks must agree on what they report.
    known = (chosen or list(samples))[:1]

    def optional(name: str) -> torch.Tensor | None:
        if not known or getattr(known[0], name) is None:
            return None
        return laid([getattr(sample, name) for sample in chosen])

    tokens = [
        np.append(sample.tokens_S, np.zeros(more, np.int64)) for sample, more in zip(chosen, padding, strict=True)
    ]
    positions = [extend(sample.positions_3S, more) for sample, more in zip(chosen, padding, strict=True)]
    positions.append(np.broadcast_to(np.arange(filling), (3, filling)))
    owners = [
        np.repeat((number, -1), (length, more))
        for number, (length, more) in enumerate(zip(lengths, padding, strict=True))
    ]
    shows = [
        np.repeat((bool(sample.pictures), False), (len(sample), more))
        for sample, more in zip(chosen, padding, strict=True)
    ]
    segments = room + ([filling] if filling else [])
    cu_seqlens = np.concatenate(([0], np.cumsum(segments)))
    share = _context_share(cu_seqlens, layout) if layout.context_size > 1 else None
    return MicroBatch(
        tokens_T=torch.from_numpy(np.concatenate([*tokens, np.zeros(filling, dtype=np.int64)])),
        labels_T=laid([sample.tokens_S for sample in chosen], torch.int64),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        segments=tuple(segments),
        lengths=tuple(lengths),
        mask_T=laid([sample.mask_S for sample in chosen]),
        sequence_ids_T=torch.from_numpy(np.concatenate((*owners, np.full(filling, -1))).astype(np.int64)),
        has_image_T=torch.from_numpy(np.concatenate((*shows, np.zeros(filling, dtype=bool)))),
        advantages_T=laid([sample.advantages_S for sample in chosen]),
        old_logprobs_T=optional("old_logprobs_S"),
        rollout_logprobs_T=optional("rollout_logprobs_S"),
        ref_logprobs_T=optional("ref_logprobs_S"),
        vision=_vision(chosen, cu_seqlens, layout, features, share),
        sample_indices=tuple(indices),
        context=share,
    )


def extend(positions_3S: np.ndarray, tokens: int) -> np.ndarray:
    """Positions of filling at the end of a sequence; what they are does not matter, only that they exist."""
    return np.concatenate((positions_3S, np.zeros((3, tokens), dtype=np.int64)), axis=1)


def split(values_T: torch.Tensor, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """A result per row, cut into one tensor a sample; still belonging to the prediction made at each row."""
    starts = accumulate(micro_batch.segments, initial=0)
    return [values_T[start : start + length] for start, length in zip(starts, micro_batch.lengths, strict=False)]


def unshift(values_T: torch.Tensor, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """The inverse of packing's shift: one tensor a sample, value i belonging to its token i; index 0 gets 0."""
    return [torch.cat((piece.new_zeros(1), piece[:-1])) for piece in split(values_T, micro_batch)]


def _context_share(cu_seqlens: np.ndarray, layout: RowLayout) -> ContextShare:
    size = layout.context_size

    def rows_of(rank: int) -> np.ndarray:
        rows = []
        for start, end in pairwise(cu_seqlens.tolist()):
            chunk = (end - start) // (2 * size)
            for place in (rank, 2 * size - 1 - rank):
                rows.append(np.arange(start + place * chunk, start + (place + 1) * chunk))
        return np.concatenate(rows)

    order = np.argsort(np.concatenate([rows_of(rank) for rank in range(size)]))
    own = rows_of(layout.context_rank)
    return ContextShare(layout.context_rank, size, torch.from_numpy(own), torch.from_numpy(order))


def share_pictures(pictures: Sequence[Picture], ranks: int) -> list[list[int]]:
    """Which pictures each rank encodes: the costliest first to the least loaded. Windows are short, frames are not."""
    costs = [float(len(p.patches_PD) + (p.frame_lengths_F.astype(float) ** 2).sum() / 8192) for p in pictures]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(pictures)), key=lambda i: (-costs[i], i)):
        lightest = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[lightest].append(index)
        loads[lightest] += costs[index]
    return [sorted(share) for share in shares]


def distinct_pictures(samples: Iterable[Sample]) -> list[Picture]:
    """Each picture once, in the order of its first appearance."""
    return list({picture.key: picture for sample in samples for picture in sample.pictures}.values())


def _vision(
    samples: list[Sample],
    starts: np.ndarray,
    layout: RowLayout,
    features: Features | None,
    share: ContextShare | None,
) -> VisionBatch | None:
    """Each distinct picture once; every place that shows it points to the same embeddings."""
    pictures = distinct_pictures(samples)
    if not pictures:
        return None
    finished = features is not None and features.merged
    # Embeddings that are already there need no rank to compute them.
    shares = share_pictures(pictures, 1 if finished else layout.picture_ranks)
    first_unit: dict[str, int] = {}
    units = 0
    for index in (index for part in shares for index in part):
        first_unit[pictures[index].key] = units
        units += pictures[index].units
    sources, placements = [], []
    for sample, start in zip(samples, starts, strict=False):
        for picture, offset in zip(sample.pictures, sample.picture_offsets, strict=True):
            sources.append(first_unit[picture.key] + np.arange(picture.units))
            # The unit at place u of the window order is unit unit_order_U[u] in reading order.
            placements.append(start + offset + picture.unit_order_U)
    own = [pictures[index] for index in shares[0 if len(shares) == 1 else layout.picture_rank]]
    source_E, placement_E = torch.from_numpy(np.concatenate(sources)), torch.from_numpy(np.concatenate(placements))
    return vision_batch(
        own,
        features,
        units=units,
        units_R=tuple(sum(pictures[index].units for index in part) for part in shares) if len(shares) > 1 else None,
        source_E=source_E,
        placement_E=placement_E,
        shown_2L=None if share is None else _shown(source_E, placement_E, share),
    )


def _shown(source_E: torch.Tensor, placement_E: torch.Tensor, share: ContextShare) -> torch.Tensor:
    """[2, L]: of the embeddings' places in the whole row those among this rank's rows, as places in these."""
    rows = len(share.rows_t)
    local = share.order_T[placement_E] - share.rank * rows
    here = (local >= 0) & (local < rows)
    return torch.stack((source_E[here], local[here]))


def vision_batch(pictures: Sequence[Picture], features: Features | None = None, **fields: Any) -> VisionBatch:
    """The tower's input for these pictures, in this order; features, where there are any, in place of the patches."""
    windows, frames = (
        [length for picture in pictures for length in getattr(picture, name).tolist()]
        for name in ("window_lengths_W", "frame_lengths_F")
    )

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))

    contents = "patches_PD" if features is None else "units_UO" if features.merged else "hidden_PH"
    coordinates = [picture.coordinates_P2 for picture in pictures] or [np.zeros((0, 2), dtype=np.int64)]
    return VisionBatch(
        coordinates_P2=torch.from_numpy(np.concatenate(coordinates)),
        cu_windows=cumulative(windows),
        cu_frames=cumulative(frames),
        windows=tuple(windows),
        frames=tuple(frames),
        **{contents: tuple(p.patches_PD if features is None else features.of[p.key] for p in pictures)},
        **fields,
    )
