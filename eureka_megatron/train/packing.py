"""Samples → packed micro-batches, the same number on every data-parallel rank.

Invariants, each asserted by a test: every sample of an update appears exactly once over all ranks and is never split; every rank runs the
same number of micro-batches (a rank with too few samples gets empty ones: `align` tokens of padding, mask 0); no micro-batch exceeds
`max_tokens` unless a single sample does, which is refused; rows are a multiple of `align` tokens. Samples of one prompt stay together where
that leaves the ranks balanced, and share the rows of their prompt (train.sharing).

A row of two samples, ABCDE and XYZ, at `align` 4 under two context-parallel ranks (each sample is padded to a multiple of 4, `·`):

    tokens_T         A  B  C  D  E  ·  ·  ·  X  Y  Z  ·
    labels_T         B  C  D  E  0  0  0  0  Y  Z  0  0     what row t predicts
    advantages_T     b  c  d  e  0  0  0  0  y  z  0  0     a value of token i stands at row i − 1, as every value of a sample does
    sequence_ids_T   0  0  0  0  0 −1 −1 −1  1  1  1 −1
    context rank     0  0  1  1  1  1  0  0  0  1  1  0     chunks 0 and 3 of four against chunks 1 and 2, of each sample
    cu_seqlens       0                       8          12  padding that only the row needs would be a sequence of its own, at the end
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from eureka_megatron.errors import UserError
from eureka_megatron.parallel.mirrored import mirrored_rows, order_of
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.train import sharing
from eureka_megatron.types import ContextShare, MicroBatch, Picture, Sample, VisionBatch

OPTIONAL = ("old_logprobs_S", "rollout_logprobs_S", "ref_logprobs_S")  # of a sample; a row's have _T


@dataclass(frozen=True)
class Features:
    """What a frozen tower made of pictures, by their keys: embeddings [U, O] when `merged`, else what enters the merger, [P, H].

    In host memory: those of a whole rollout step would fill a GPU.
    """

    of: Mapping[str, torch.Tensor]
    merged: bool


# --- which sample goes where ---


def plan(
    lengths: Sequence[int],
    costs: Sequence[float],
    data_parallel: int,
    max_tokens: int,
    align: int = 1,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Which sample goes where: `plan[rank][micro_batch]` is a list of indices into `lengths`.

    Ranks are balanced by cost, then each rank's samples fill micro-batches by tokens, longest first to the first that has room.
    The number of micro-batches, the same on all ranks, is a multiple of `multiple_of` (interleaved pipelines need that); the last may be
    empty. Example: lengths and costs 5, 4, 3, 2 on two ranks with rows of 5 give [[[0], [3]], [[1], [2]]].

    Raises:
        UserError: a sample is longer than `max_tokens`.
    """
    check_lengths(lengths, max_tokens)
    usable = max(max_tokens // align * align, 1)
    plans = [_first_fit(indices, lengths, usable) for indices in balanced(costs, data_parallel)]
    count = max(len(micro_batches) for micro_batches in plans)
    count += -count % multiple_of
    return [micro_batches + [[]] * (count - len(micro_batches)) for micro_batches in plans]


def check_lengths(lengths: Sequence[int], max_tokens: int) -> None:
    """Raises UserError if a sample is longer than a row."""
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise UserError(
                f"sample {index} has {length} tokens, more than training.max_tokens_per_micro_batch={max_tokens}; "
                "raise that limit or lower data.max_prompt_tokens or rollout.max_response_tokens"
            )


def bundles(samples: Sequence[Sample], ranks: int, max_tokens: int, layout: "RowLayout") -> list[list[int]]:
    """Samples that stay together, those of a prompt if they share it: places in `samples`.

    Large bundles are hard to balance, so all are divided, into halves, quarters, …, until that would burden no rank less.
    Example: three prompts of four responses on two ranks: six bundles of two responses.
    """
    check_lengths([layout.padded(len(sample)) for sample in samples], max_tokens)
    if not layout.share_prompts:
        return [[place] for place in range(len(samples))]
    groups = sharing.by_prompt(samples)
    usable = max(max_tokens // layout.align * layout.align, 1)
    best, least, parts = [[place] for place in range(len(samples))], math.inf, 1
    while parts < 2 * max(map(len, groups), default=0):
        found = [
            piece for group in groups for piece in _fitting(samples, sharing.divided(group, parts), usable, layout)
        ]
        costs = [cost(*(samples[place] for place in bundle)) for bundle in found]
        burden = max(sum(costs[place] for place in part) for part in balanced(costs, ranks))
        if burden < least:
            best, least = found, burden
        if ranks == 1:
            break
        parts *= 2
    return best


def _fitting(samples: Sequence[Sample], groups: list[list[int]], usable: int, layout: "RowLayout") -> list[list[int]]:
    """The same, cut in two as often as a group is longer than a row; or apart, when sharing would save nothing."""
    found: list[list[int]] = []
    while groups:
        group = groups.pop(0)
        own = [samples[place] for place in group]
        if len(group) == 1 or (sharing.shares(own, layout.padded) and sharing.tokens(own, layout.padded) <= usable):
            found.append(group)
        else:
            groups = sharing.divided(group, 2) + groups
    return found


def balanced(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices into `costs` for each rank, ascending: the costliest first to the least loaded."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[lightest].append(index)
        loads[lightest] += costs[index]
    return [sorted(share) for share in shares]


def _first_fit(indices: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        place = next((place for place, room in enumerate(free) if lengths[index] <= room), len(free))
        if place == len(free):
            rows.append([])
            free.append(max_tokens)
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows or [[]]


def cost(*samples: Sample) -> float:
    """Relative work of a sample, or of several that share their prompt: linear layers count tokens, attention pairs, the tower patches.

    Rows p of a prompt and b of a response: p² pairs once, and b² + 2 p b of each response, which together are (p + b)² of a single one.
    """
    prompt = sharing.shared_rows(samples[0]) if len(samples) > 1 else 0
    rest = [len(sample) - prompt for sample in samples]
    pairs = prompt**2 + sum(length**2 + 2 * prompt * length for length in rest)
    return prompt + sum(rest) + pairs / 8192 + 0.5 * sum(picture.patches for picture in samples[0].pictures)


def share_pictures(pictures: Sequence[Picture], ranks: int) -> list[list[int]]:
    """Which pictures each rank encodes, balanced by cost. Windows are short, frames are not."""
    return balanced([float(p.patches + (p.frame_lengths_F.astype(float) ** 2).sum() / 8192) for p in pictures], ranks)


def distinct_pictures(samples: Iterable[Sample]) -> dict[str, Picture]:
    """Each picture once, by its key, in the order of its first appearance."""
    return {picture.key: picture for sample in samples for picture in sample.pictures}


# --- rows ---


@dataclass(frozen=True)
class RowLayout:
    """What parallelism asks of a packed row.

    Attributes:
        align: the row's tokens are a multiple of it.
        context_rank, context_size: this rank among those that share the row's tokens.
        picture_rank, picture_ranks: this rank among those that share the row's pictures; one: every rank has all of them.
        share_prompts: whether samples of one prompt share its rows.
    """

    align: int = 1
    context_rank: int = 0
    context_size: int = 1
    picture_rank: int = 0
    picture_ranks: int = 1
    share_prompts: bool = False

    def padded(self, length: int) -> int:
        """Tokens that a sample of `length` takes up: under context parallelism two chunks a rank, all of one size."""
        return length + -length % (2 * self.context_size) if self.context_size > 1 else length


def row_layout(
    parallel: Parallel, vision_parallel: str = "replicated", multiple: int = 1, *, share_prompts: bool = False
) -> RowLayout:
    """The layout for this rank's rows: under sequence parallelism each context share divides by the tensor-parallel size.

    Args:
        multiple: what the rows of one rank's share must divide by (FP8 kernels).
        share_prompts: see RowLayout.
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
        share_prompts=share_prompts,
    )


@dataclass(frozen=True)
class _Piece:
    """Rows `start` … `stop` of a sample, side by side in a packed row.

    number: of the sample, −1: of several, or none. prefix: the place of the piece that it continues, −1: none.
    """

    sample: Sample
    start: int
    stop: int
    number: int
    prefix: int = -1

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def pictures(self) -> tuple[tuple[Picture, int], ...]:
        """With the first row of each; they are all in what comes first of a sample."""
        sample = self.sample
        return () if self.start else tuple(zip(sample.pictures, sample.picture_offsets, strict=True))


def _pieces(samples: Sequence[Sample], layout: RowLayout) -> list[_Piece]:
    """Example, two samples of one prompt and one of another: prompt, response, response, sample."""
    groups = sharing.by_prompt(samples) if layout.share_prompts else [[place] for place in range(len(samples))]
    found: list[_Piece] = []
    for group in groups:
        own = [samples[place] for place in group]
        if not sharing.shares(own, layout.padded):
            found += [_Piece(samples[place], 0, len(samples[place]), place) for place in group]
            continue
        rows, prefix = sharing.shared_rows(own[0]), len(found)
        found.append(_Piece(own[0], 0, rows, -1))
        found += [_Piece(samples[place], rows, len(samples[place]), place, prefix) for place in group]
    return found


# The end of a row is laid as a sample of no tokens and much padding.
_EMPTY = np.zeros(0, dtype=np.float32)
_END = _Piece(
    Sample(np.zeros(0, np.int64), np.zeros((3, 0), np.int64), _EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY), 0, 0, -1
)


def brought_by_all(samples: Sequence[Sample]) -> frozenset[str]:
    """Which of the OPTIONAL values every sample has."""
    return frozenset(name for name in OPTIONAL if all(getattr(sample, name) is not None for sample in samples))


def pack(
    samples: Sequence[Sample],
    indices: Sequence[int],
    layout: RowLayout | int = 1,
    features: Features | None = None,
    brought: Collection[str] | None = None,
) -> MicroBatch:
    """Lay the chosen samples end to end. No indices: one row of `align` tokens of padding, which contributes nothing.

    Args:
        layout: what parallelism asks of the row; a number is an alignment alone.
        features: of pictures that a frozen tower has already seen; they take the place of the patches.
        brought: OPTIONAL values that a row without samples has, too, for ranks must agree on what they report; None: those of `samples`.
    """
    layout = RowLayout(align=layout) if isinstance(layout, int) else layout
    chosen = [samples[index] for index in indices]
    pieces = _pieces(chosen, layout)
    rooms = [layout.padded(piece.rows) for piece in pieces]
    rooms.append(-sum(rooms) % layout.align if rooms else layout.align)
    laid, places = [*pieces, _END], [0, *accumulate(rooms)]

    def lay(values: Sequence[np.ndarray], dtype: type = np.float32, padding: int = 0) -> torch.Tensor:
        row = np.full((*values[0].shape[:-1], places[-1]), padding, dtype)
        for value, place in zip(values, places, strict=False):
            row[..., place : place + value.shape[-1]] = value
        return torch.from_numpy(row)

    def shifted(name: str, dtype: type = np.float32) -> torch.Tensor:
        """From 'belongs to token i' to 'belongs to the prediction made at row i − 1'; the last row of each sample gets 0."""
        return lay([getattr(piece.sample, name)[piece.start + 1 : piece.stop + 1] for piece in laid], dtype)

    def optional(name: str) -> torch.Tensor | None:
        return shifted(name) if name in here else None

    here = brought_by_all(chosen) if chosen else brought_by_all(samples) if brought is None else brought
    segments = tuple(room for room in rooms if room)
    starts = np.cumsum([0, *segments])
    share = _context_share(segments, layout) if layout.context_size > 1 else None
    return MicroBatch(
        tokens_T=lay([piece.sample.tokens_S[piece.start : piece.stop] for piece in laid], np.int64),
        labels_T=shifted("tokens_S", np.int64),
        positions_3T=lay([piece.sample.positions_3S[:, piece.start : piece.stop] for piece in laid], np.int64),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        segments=segments,
        pieces=_rows_of_samples(pieces, starts),
        mask_T=shifted("mask_S"),
        sequence_ids_T=lay([np.full(piece.rows, piece.number) for piece in laid], np.int64, padding=-1),
        has_image_T=lay([np.full(piece.rows, bool(piece.sample.pictures)) for piece in laid], np.bool_),
        advantages_T=shifted("advantages_S"),
        old_logprobs_T=optional("old_logprobs_S"),
        rollout_logprobs_T=optional("rollout_logprobs_S"),
        ref_logprobs_T=optional("ref_logprobs_S"),
        vision=_vision(pieces, starts, layout, features, share),
        sample_indices=tuple(indices),
        context=share,
        prefixes=_prefixes(pieces, starts),
    )


def _rows_of_samples(pieces: Sequence[_Piece], starts: np.ndarray) -> tuple[tuple[tuple[int, int], ...], ...]:
    """MicroBatch.pieces. Example: of a prompt of 3 rows and responses of 4 and 2 ((0, 3), (3, 4)) and ((0, 3), (7, 2))."""
    found: dict[int, tuple[tuple[int, int], ...]] = {}
    for piece, start in zip(pieces, starts.tolist(), strict=False):
        if piece.number >= 0:
            prefix = ((int(starts[piece.prefix]), pieces[piece.prefix].rows),) if piece.prefix >= 0 else ()
            found[piece.number] = (*prefix, (start, piece.rows))
    return tuple(found[number] for number in sorted(found))


def _prefixes(pieces: Sequence[_Piece], starts: np.ndarray) -> tuple[tuple[int, int], ...]:
    """MicroBatch.prefixes, one for each segment; the end of the row continues nothing."""
    if all(piece.prefix < 0 for piece in pieces):
        return ()
    own = [(int(starts[p.prefix]), pieces[p.prefix].rows) if p.prefix >= 0 else (0, 0) for p in pieces]
    return (*own, *[(0, 0)] * (len(starts) - 1 - len(own)))


def split(values_T: torch.Tensor, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """A result per row, cut into one tensor a sample; still belonging to the prediction made at each row."""
    return [torch.cat([values_T[start : start + rows] for start, rows in own]) for own in micro_batch.pieces]


def unshift(values_T: torch.Tensor, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """The inverse of packing's shift: one tensor a sample, value i belonging to its token i; index 0 gets 0."""
    return [torch.cat((piece.new_zeros(1), piece[:-1])) for piece in split(values_T, micro_batch)]


def _context_share(segments: Sequence[int], layout: RowLayout) -> ContextShare:
    rows = mirrored_rows(segments, layout.context_size)
    order_T = order_of(rows)
    own = torch.from_numpy(rows[layout.context_rank])
    return ContextShare(layout.context_rank, layout.context_size, own, torch.from_numpy(order_T), order_T)


# --- pictures ---


def _vision(
    pieces: Sequence[_Piece],
    starts: np.ndarray,
    layout: RowLayout,
    features: Features | None,
    share: ContextShare | None,
) -> VisionBatch | None:
    """Each distinct picture once; every place that shows it points to the same embeddings.

    Pictures a (3 units) and b (2), at rows 2 … 4 of one sample, and b, a at rows 9, 10 and 13 … 15 of the next, in reading order:
    the embeddings are a0 a1 a2 b0 b1; source_E 0 1 2 | 3 4 | 0 1 2 goes to placement_E 2 3 4 | 9 10 | 13 14 15.
    """
    pictures = list({picture.key: picture for piece in pieces for picture, _ in piece.pictures}.values())
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
    for piece, start in zip(pieces, starts, strict=False):
        for picture, offset in piece.pictures:
            sources.append(first_unit[picture.key] + np.arange(picture.units))
            # The unit at place u of the window order is unit unit_order_U[u] in reading order.
            placements.append(start + offset + picture.unit_order_U)
    source_E, placement_E = np.concatenate(sources), np.concatenate(placements)
    own = shares[0 if len(shares) == 1 else layout.picture_rank]
    return replace(
        vision_batch([pictures[index] for index in own], features),
        units=units,
        units_R=tuple(sum(pictures[index].units for index in part) for part in shares) if len(shares) > 1 else None,
        source_E=torch.from_numpy(source_E),
        placement_E=torch.from_numpy(placement_E),
        shown_2L=None if share is None else _shown(source_E, placement_E, share),
    )


def _shown(source_E: np.ndarray, placement_E: np.ndarray, share: ContextShare) -> torch.Tensor:
    """[2, L]: of the embeddings' places in the whole row those among this rank's rows, as places in these."""
    rows = len(share.rows_t)
    assert share.places_T is not None, "pack makes the share"
    local = share.places_T[placement_E] - share.rank * rows
    here = (local >= 0) & (local < rows)
    return torch.from_numpy(np.stack((source_E[here], local[here])))


def vision_batch(pictures: Sequence[Picture], features: Features | None = None) -> VisionBatch:
    """The tower's input for these pictures, in this order, shown nowhere; features, where there are any, in place of the patches."""
    windows, frames = (
        [length for picture in pictures for length in getattr(picture, name).tolist()]
        for name in ("window_lengths_W", "frame_lengths_F")
    )

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))

    name = "patches_PD" if features is None else "units_UO" if features.merged else "hidden_PH"
    contents: dict[str, Any] = {name: tuple(p.patches_PD if features is None else features.of[p.key] for p in pictures)}
    coordinates = [picture.coordinates_P2 for picture in pictures] or [np.zeros((0, 2), dtype=np.int64)]
    nowhere = torch.zeros(0, dtype=torch.int64)
    batch = VisionBatch(
        coordinates_P2=torch.from_numpy(np.concatenate(coordinates)),
        cu_windows=cumulative(windows),
        cu_frames=cumulative(frames),
        windows=tuple(windows),
        frames=tuple(frames),
        units=sum(picture.units for picture in pictures),
        source_E=nowhere,
        placement_E=nowhere,
    )
    return replace(batch, **contents)
