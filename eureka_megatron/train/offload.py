"""What the trainer needs for its updates alone, out of the GPU's memory while engines sample there.

    the optimizer's state, masters included       to host memory and back, bit for bit
    gradient buffers                              freed; they come back as zeros, which every update begins with
    parameters                                    stay: weights are sent from them

A tensor stays the same object; its data lies in host memory meanwhile, where checkpoints can read it. Megatron's own `offload_to_cpu` would also
move masters that are views of the model's parameters (fp32 models), which then would no longer be updated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor


class Offload:
    """Of one rank. The optimizer may not exist yet, or be another one at each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moved: list[Tensor] = []
        self._resting = False

    def rest(self, chunks: Sequence[DistributedDataParallel], optimizer: Any, *, move: bool) -> None:
        """Free what can be: with `move` all of the above, else only what torch's allocator holds without using it."""
        if move and not self._resting:
            self._resting = True
            for chunk in chunks:
                chunk.offload_grad_buffers(synchronize=self.device.type == "cuda", empty_cache=False)
            parameters = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
            self._moved = [
                state for state in _states(optimizer) if state.untyped_storage().data_ptr() not in parameters
            ]
            for state in self._moved:
                state.data = state.to("cpu", copy=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def resume(self, chunks: Sequence[DistributedDataParallel]) -> None:
        """Everything where `rest` found it."""
        if not self._resting:
            return
        self._resting = False
        for chunk in chunks:
            chunk.restore_grad_buffers(synchronize=self.device.type == "cuda")
        for state in self._moved:
            state.data = state.to(self.device, copy=True)
        self._moved = []


def _states(optimizer: Any) -> Iterator[Tensor]:
    """The tensors that torch's (or Transformer Engine's) optimizers hold and step, each once."""
    seen: set[int] = set()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:  # nothing learns here, or there was no phase yet
            continue
        held = [tensor for group in inner.param_groups for tensor in group["params"]]
        held += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        for tensor in held:
            if tensor.dim() > 0 and id(tensor) not in seen:  # a step count stays where its optimizer wants it
                seen.add(id(tensor))
                yield tensor
