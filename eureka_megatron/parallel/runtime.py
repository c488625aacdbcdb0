"""Process groups of one trainer rank, as a frozen handle that is passed along; nothing imports it as a global.

Megatron-Core keeps globals of its own (`parallel_state`), which its schedules read; `init_parallel` sets them up and returns the
same groups as a `Parallel`. Code of this package takes the handle and never asks the globals.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from eureka_megatron.errors import ConfigError
from eureka_megatron.layout import Layout
from eureka_megatron.parallel import cpu


@dataclass(frozen=True)
class Axis:
    """This rank's place along one parallel axis. `group` is None only outside torch.distributed (one process)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Parallel:
    """Where this rank stands in a layout. Example: TP 2 × PP 2 gives tensor=Axis(1, 2, …), pipeline=Axis(0, 2, …), data=Axis(0, 1, …)."""

    tensor: Axis = Axis()
    pipeline: Axis = Axis()
    data: Axis = Axis()
    context: Axis = Axis()
    world: Axis = Axis()
    layout: Layout = Layout()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1


def init_parallel(
    layout: Layout = Layout(),
    *,
    rank: int = 0,
    world_size: int | None = None,
    init_method: str = "env://",
    timeout_seconds: float = 600,
) -> Parallel:
    """Join the world, set up Megatron's groups, return this rank's handle.

    Uses NCCL and this rank's GPU where there is one (`LOCAL_RANK`, or the only visible device), else gloo on the CPU.

    Args:
        world_size: where it is given, data parallelism takes the ranks that the other axes leave; else that of the layout.
        init_method: "env://", or an address such as "tcp://127.0.0.1:29500" or "file:///path".

    Raises:
        ConfigError: the layout does not divide the world.
    """
    from megatron.core import parallel_state as mpu

    # Advice about CUDA streams and deprecations between pinned versions, once a rank: noise to a user.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    tensor, pipeline, context = layout.tensor, layout.pipeline, layout.context
    world_size = layout.world_size if world_size is None else world_size
    data, left = divmod(world_size, tensor * pipeline * context)
    if left:
        raise ConfigError(
            f"world size {world_size} is not a multiple of tensor × pipeline × context = {tensor} × {pipeline} × {context}"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        cpu.use_cpu()
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            context_parallel_size=context,
            create_gloo_process_groups=False,
        )
    if device.type == "cuda":
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1234)  # no draw is made from it; Megatron wants the states to exist
    return Parallel(
        tensor=_axis(mpu.get_tensor_model_parallel_group()),
        pipeline=_axis(mpu.get_pipeline_model_parallel_group()),
        data=_axis(mpu.get_data_parallel_group()),
        context=_axis(mpu.get_context_parallel_group()),
        world=_axis(dist.group.WORLD),
        layout=layout.model_copy(update={"data": data}),
        device=device,
    )


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; the host does not wait for it.

    A copy from pageable memory waits for all that the GPU has been given so far. From pinned memory the GPU fetches by itself, and torch
    keeps the pinned pages until it has.
    """
    if device.type != "cuda" or value.device == device:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def join_on_device(pieces: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Tensors of the host end to end on the device, in `dtype`; as `to_device`, with one copy on the host and not two."""
    if device.type != "cuda":
        return torch.cat(list(pieces)).to(dtype)
    rows = sum(map(len, pieces))
    pinned = torch.empty(rows, *pieces[0].shape[1:], dtype=dtype, pin_memory=True)
    return torch.cat(list(pieces), out=pinned).to(device, non_blocking=True)


@contextmanager
def patient(parallel: Parallel, limit: timedelta) -> Iterator[None]:
    """While active, collectives of this rank may take until `limit`. For a stretch in which one rank works and the others wait for it.

    A rank that only sends does not wait on a GPU: it queues its part and goes on to the next collective, whose time runs from then on.
    Group by group, because Megatron's have other limits than the world.
    """
    axes = (parallel.world, parallel.tensor, parallel.pipeline, parallel.data, parallel.context)
    groups = [axis.group for axis in axes if axis.group is not None]
    before = {group: group._get_backend(parallel.device).options._timeout for group in groups}
    for group in before:
        dist.distributed_c10d._set_pg_timeout(limit, group)
    try:
        yield
    finally:
        for group, usual in before.items():
            dist.distributed_c10d._set_pg_timeout(usual, group)


def _axis(group: dist.ProcessGroup | None) -> Axis:
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)
