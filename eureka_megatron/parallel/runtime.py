"""Process groups of one trainer rank, as a frozen handle that is passed along; nothing imports it as a global.

Megatron-Core keeps globals of its own (`parallel_state`), which its schedules read; `init_parallel` sets them up and returns the
same groups as a `Parallel`. Code of this package takes the handle and never asks the globals.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """This rank's place along one parallel axis. `group` is None only outside torch.distributed (one process)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Parallel:
    """Where this rank stands. Example: TP 2 × PP 2 gives tensor=Axis(1, 2, …), pipeline=Axis(0, 2, …), data=Axis(0, 1, …)."""

    tensor: Axis = Axis()
    pipeline: Axis = Axis()
    data: Axis = Axis()
    context: Axis = Axis()
    world: Axis = Axis()
    sequence_parallel: bool = False
    device: torch.device = torch.device("cpu")

    @property
    def first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1
