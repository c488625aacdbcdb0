"""Samples → packed micro-batches, the same number on every data-parallel rank.

Invariants, each asserted by a test: every sample of an update appears exactly once over all ranks and is never split; every rank runs the
same number of micro-batches (a rank with too few samples gets empty ones: one filler token, mask 0); no micro-batch exceeds `max_tokens`
unless a single sample does, which is refused; rows are a multiple of `align` tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from eureka_megatron.errors import UserError
from eureka_megatron.types import MicroBatch, Picture, Sample, VisionBatch


def plan(
    lengths: Sequence[int], costs: Sequence[float], data_parallel: int, max_tokens: int, align: int = 1
) -> list[list[list[int]]]:
    """Which sample goes where: `plan[rank][micro_batch]` is a list of indices into `lengths`.

    Ranks are balanced by cost (longest first to the least loaded), then each rank's samples fill micro-batches by tokens (first fit).

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


def pack(samples: Sequence[Sample], indices: Sequence[int], align: int = 1) -> MicroBatch:
    """Lay the chosen samples end to end. No indices: one filler row of `align` tokens that contributes nothing."""
    chosen = [samples[index] for index in indices]
    lengths = [len(sample) for sample in chosen]
    used = sum(lengths)
    filling = -used % align if used else align
    total = used + filling

    # An empty micro-batch has the same optional parts as the others: ranks must agree on what they report.
    known = (chosen or list(samples))[:1]

    def optional(name: str) -> torch.Tensor | None:
        if not known or getattr(known[0], name) is None:
            return None
        return _shifted([getattr(sample, name) for sample in chosen], filling)

    tokens = np.concatenate([*(sample.tokens_S for sample in chosen), np.zeros(filling, dtype=np.int64)])
    positions = [sample.positions_3S for sample in chosen]
    positions.append(np.broadcast_to(np.arange(filling), (3, filling)))
    owners = np.repeat(np.arange(len(chosen)), lengths)
    segments = lengths + ([filling] if filling else [])
    return MicroBatch(
        tokens_T=torch.from_numpy(tokens),
        labels_T=_shifted([sample.tokens_S for sample in chosen], filling, torch.int64),
        positions_3T=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], np.cumsum(segments))).astype(np.int32)),
        mask_T=_shifted([sample.mask_S for sample in chosen], filling),
        sequence_ids_T=torch.from_numpy(np.concatenate((owners, np.full(filling, -1))).astype(np.int64)),
        advantages_T=_shifted([sample.advantages_S for sample in chosen], filling),
        old_logprobs_T=optional("old_logprobs_S"),
        rollout_logprobs_T=optional("rollout_logprobs_S"),
        ref_logprobs_T=optional("ref_logprobs_S"),
        vision=_vision(chosen, np.cumsum([0, *lengths])),
        sample_indices=tuple(indices) if total else (),
    )


def _shifted(values: list[np.ndarray], filling: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """From 'belongs to token i' to 'belongs to the prediction made at row i−1'; the last row of each sequence gets 0."""
    rows = [np.append(value[1:], 0) for value in values]
    return torch.from_numpy(np.concatenate([*rows, np.zeros(filling)])).to(dtype)


def split(values_T: torch.Tensor, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """A result per row, cut into one tensor a sample; still belonging to the prediction made at each row."""
    pieces = values_T.split(micro_batch.cu_seqlens.diff().tolist())
    return list(pieces[: len(micro_batch.sample_indices)])


def unshift(values_T: torch.Tensor, micro_batch: MicroBatch) -> list[torch.Tensor]:
    """The inverse of packing's shift: one tensor a sample, value i belonging to its token i; index 0 gets 0."""
    return [torch.cat((piece.new_zeros(1), piece[:-1])) for piece in split(values_T, micro_batch)]


def _vision(samples: list[Sample], starts: np.ndarray) -> VisionBatch | None:
    """Each distinct picture once; every place that shows it points to the same embeddings."""
    first_unit: dict[str, int] = {}
    pictures: list[Picture] = []
    units = 0
    sources, placements = [], []
    for sample, start in zip(samples, starts, strict=False):
        for picture, offset in zip(sample.pictures, sample.picture_offsets, strict=True):
            if picture.key not in first_unit:
                first_unit[picture.key] = units
                pictures.append(picture)
                units += picture.units
            sources.append(first_unit[picture.key] + np.arange(picture.units))
            # The unit at place u of the window order is unit unit_order_U[u] in reading order.
            placements.append(start + offset + picture.unit_order_U)
    if not pictures:
        return None

    def cumulative(lengths: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int32))

    return VisionBatch(
        patches_PD=torch.cat([picture.patches_PD for picture in pictures]),
        coordinates_P2=torch.from_numpy(np.concatenate([picture.coordinates_P2 for picture in pictures])),
        cu_windows=cumulative([picture.window_lengths_W for picture in pictures]),
        cu_frames=cumulative([picture.frame_lengths_F for picture in pictures]),
        units=units,
        source_E=torch.from_numpy(np.concatenate(sources)),
        placement_E=torch.from_numpy(np.concatenate(placements)),
    )
