"""What does not learn: which parameters, and what that saves.

A frozen parameter has no gradient buffer, no optimizer state, and does not travel to the rollout engines. A tower whose blocks are frozen
sees every distinct picture once a rollout step; its outputs serve all samples, passes and log-probabilities of that step.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl.model import QwenVLModel
from eureka_megatron.parallel.collectives import gather_units
from eureka_megatron.parallel.runtime import Axis, Parallel
from eureka_megatron.train.packing import Features, vision_batch
from eureka_megatron.train.parcel import PictureSize
from eureka_megatron.train.step import to_device
from eureka_megatron.types import Picture
from eureka_megatron.weights.online import own_parameters, table_of, unwrap
from eureka_megatron.weights.table import frozen_rows


def freeze(chunks: Sequence[torch.nn.Module], names: Sequence[str]) -> frozenset[str]:
    """Switch gradients off. → the Megatron names of the frozen parameters of the whole model, equal on all ranks.

    Args:
        names: parts or patterns, see weights.table.frozen_rows.
    """
    frozen = frozen_rows(table_of(chunks).values(), names)
    for name, parameter in own_parameters(chunks).items():
        if name in frozen:
            parameter.requires_grad_(False)
    return frozen


class FrozenTower:
    """Features of pictures from a tower whose blocks, or blocks and merger, are frozen; each picture is computed by one rank only.

    Args:
        model: the chunk that holds the tower.
        max_patches: patches of one call of the tower, unless a single picture has more.
    """

    def __init__(self, model: QwenVLModel, parallel: Parallel, max_patches: int) -> None:
        self.tower, self.parallel, self.max_patches = model.vision, parallel, max_patches
        self.merged = not _learns(self.tower.merger)
        whole = model.vision_parallel != "tensor"  # else all tensor-parallel ranks compute each picture together
        self.axes = (parallel.data, parallel.context, parallel.tensor if whole else Axis())

    @property
    def ranks(self) -> int:
        """Of one data-parallel rank, that share its pictures."""
        return self.axes[1].size * self.axes[2].size

    @torch.no_grad()
    def features(
        self, shares: Sequence[Sequence[PictureSize]], pictures: Mapping[str, Picture], wanted: Collection[str]
    ) -> Features:
        """Of the wanted pictures. Collective.

        Args:
            shares: which pictures each rank encodes, data-parallel rank by rank, in each context-parallel, in each tensor-parallel.
            pictures: by key, with patches: at least those of this rank's share.
        """
        data, context, tensor = self.axes
        own = shares[data.rank * self.ranks + context.rank * tensor.size + tensor.rank]
        calls = _calls([pictures[size.key] for size in own], self.max_patches)
        vision = self.tower.vision
        width = vision.out_hidden_size if self.merged else vision.hidden_size
        nothing = torch.zeros(0, width, dtype=self.tower.patch_embed.weight.dtype, device=self.parallel.device)
        found = torch.cat([nothing, *map(self._encode, calls)])
        lengths = [[size.units if self.merged else size.patches for size in share] for share in shares]
        counts_DCT = np.array([sum(share) for share in lengths]).reshape(data.size, context.size, tensor.size)
        found = _gathered(found, counts_DCT[data.rank, context.rank], tensor)
        found = _gathered(found, counts_DCT[data.rank].sum(-1), context)
        found = _gathered(found, counts_DCT.sum((1, 2)), data)
        # To the host: micro-batches fetch theirs when their turn comes.
        pieces = found.cpu().split([length for share in lengths for length in share])
        keys = [size.key for share in shares for size in share]
        of = {key: piece.clone() for key, piece in zip(keys, pieces, strict=True) if key in wanted}
        return Features(of, self.merged)

    def _encode(self, pictures: Sequence[Picture]) -> Tensor:
        batch = to_device(vision_batch(pictures), self.parallel.device, self.tower.patch_embed.weight.dtype)
        return self.tower(batch) if self.merged else self.tower.encode(batch)[:, 0]


def _gathered(rows: Tensor, counts: np.ndarray, axis: Axis) -> Tensor:
    return gather_units(rows, counts.tolist(), axis) if axis.size > 1 else rows


def _calls(pictures: Sequence[Picture], max_patches: int) -> list[list[Picture]]:
    """Cut into runs of at most `max_patches` patches; a larger picture stands alone."""
    calls: list[list[Picture]] = []
    room = 0
    for picture in pictures:
        if not calls or picture.patches > room:
            calls.append([])
            room = max_patches
        calls[-1].append(picture)
        room -= picture.patches
    return calls


def frozen_tower(chunks: Sequence[torch.nn.Module], parallel: Parallel, max_patches: int) -> FrozenTower | None:
    """Where this rank holds a vision tower whose blocks are frozen."""
    model = cast(QwenVLModel, unwrap(chunks[0]))
    if not model.pre_process or _learns(model.vision.patch_embed) or _learns(model.vision.decoder):
        return None
    return FrozenTower(model, parallel, max_patches)


def _learns(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
