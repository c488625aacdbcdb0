"""What the trainer sends: every weight under its Hugging Face name, streamed one tensor at a time.

Every pass is checked against its declaration, tensor by tensor: the one guard of the sending side. The engine's are `check.check_announced`
before anything is loaded, and `rollout.engine` for what came.

`MegatronWeightSource` has the shape of vLLM's `WeightSource` (`metadata()` and iteration that agree element for element) without importing
vLLM, so trainer ranks stay free of it; `ray_transfer.NcclTransfer` wraps it in vLLM's own class where vLLM's NCCL sender needs one.

Left out on purpose: how shards become full tensors (weights.online.iter_hf_weights) and how bytes travel (ray_transfer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eureka_megatron.errors import UserError


class SyncError(UserError):
    """Weights on the two sides do not agree. The message names the tensors and both values."""


@dataclass(frozen=True)
class TensorMeta:
    """One tensor of a checkpoint. Example: TensorMeta("model.norm.weight", torch.bfloat16, (3584,))."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class MegatronWeightSource:
    """A re-iterable stream of (name, tensor) over the trainer's weights; each pass starts a new one.

    Args:
        weights: starts a pass, for example `lambda: iter_hf_weights(model, parallel)`. It is a collective: every rank must
            iterate it, in lockstep. Ranks that do not hold the full tensor may yield None for it.
        metadata: all tensors of the model in the order of iteration; equal on all ranks.
        dtype: cast floating-point tensors to it before sending, None to send them as they are. It must be the engine's
            dtype: a cast on arrival would make the two sides' checksums incomparable.
        unchanged: names of weights that are not sent because both sides have them from the same checkpoint (frozen ones).
    """

    def __init__(
        self,
        weights: Callable[[], Iterable[tuple[str, Tensor | None]]],
        metadata: Sequence[TensorMeta],
        *,
        dtype: torch.dtype | None = None,
        unchanged: Sequence[str] = (),
    ) -> None:
        self.unchanged = tuple(unchanged)
        self._weights = weights
        self._metadata = metadata
        self._dtype = dtype

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype as sent, and full shape of every tensor, in the order of iteration."""

        def dtype(stored: torch.dtype) -> torch.dtype:
            return self._dtype if self._dtype is not None and stored.is_floating_point else stored

        return [TensorMeta(meta.name, dtype(meta.dtype), tuple(meta.shape)) for meta in self._metadata]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        declared = self.metadata()
        sent = 0
        for sent, (name, tensor) in enumerate(self._weights(), 1):
            if sent > len(declared):
                raise SyncError(
                    f"weight stream holds more than the {len(declared)} declared tensors: first extra {name!r}"
                )
            expected = declared[sent - 1]
            if name != expected.name:
                raise SyncError(
                    f"weight stream yields {name!r} as tensor {sent - 1} where metadata declares {expected.name!r}"
                )
            if tensor is not None and tuple(tensor.shape) != expected.shape:
                raise SyncError(f"{name}: shape {tuple(tensor.shape)} where metadata declares {expected.shape}")
            yield name, None if tensor is None else tensor.detach().to(expected.dtype)
        if left := declared[sent:]:
            raise SyncError(f"weight stream ends {len(left)} tensors early: first missing {left[0].name!r}")
