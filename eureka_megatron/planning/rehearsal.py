"""One rank of a layout rehearsed without its machine: the real model, optimizer, schedule and losses on fake tensors, in one process.

torch's fake process group makes this process rank r of any number; under FakeTensorMode a tensor has a shape and no memory. Everything else is
the code that trains, `PolicyTrainer` from its constructor to its optimizer step, so what `Counts` and FlopCounterMode find is what will happen.
What cannot be asked of fake tensors is put in here, and nothing else: weights are not read, values that the host asks for are one,
shapes that pipeline stages tell each other are known beforehand.

One rehearsal a process, as Megatron's groups are global: `rehearse` starts a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import Parallel, init_parallel
from eureka_megatron.planning.counting import Counts
from eureka_megatron.train.parcel import shares
from eureka_megatron.train.step import LossFunction
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.types import Batch, MicroBatch, Sample


@dataclass(frozen=True)
class Plan:
    """What is rehearsed: a model's directory (its config.json is read, no weights), a layout, and one optimizer step's samples."""

    model: Path
    layout: Layout
    execution: Execution
    samples: tuple[Sample, ...]
    max_tokens_per_micro_batch: int
    freeze: tuple[str, ...] = ()
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)


@dataclass(frozen=True)
class Rehearsal:
    """What one rank does in one supervised optimizer step, and holds.

    Memory in bytes. `step` is what a step takes at most beyond parameters, gradients and optimizer state: activations and temporary tensors.
    Example: Rehearsal(rank=0, parameters=…, gradients=…, optimizer=…, step=…, operations=…, collectives={("allreduce_", "tensor"): 189408}, …)
    """

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    step: int
    operations: int  # floating-point, a multiplication and an addition are two
    operations_by_module: dict[str, int]
    collectives: dict[tuple[str, str], int]  # (operation, group) → bytes
    calls: dict[tuple[str, str], int]
    synchronisations: int = field(compare=False)

    @property
    def peak(self) -> int:
        """Bytes of all tensors at once, at most."""
        return self.parameters + self.gradients + self.optimizer + self.step


def rehearse(parts: Sequence[tuple[Plan, int]]) -> list[Rehearsal]:
    """These ranks of these plans, one after the other, in a process of their own: Megatron keeps its groups in globals. Raises what PolicyTrainer raises."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.starmap(_in_this_process, parts)


def _in_this_process(plan: Plan, rank: int) -> Rehearsal:
    from megatron.core import parallel_state as mpu
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=plan.layout.world_size, store=FakeStore())
    try:
        parallel = init_parallel(plan.layout, rank=rank)
        with _unasked(), FakeTensorMode(allow_non_fake_inputs=True):
            return measure(plan, parallel, Unread)
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


class Unread(PolicyTrainer):
    """The trainer, with whatever weights its tensors are made with. It knows which shapes its stage will be sent."""

    shapes: ClassVar[tuple[Iterator[list[int]], Iterator[list[int]]]]  # from the stage before, from the one after

    def _load(self, chunks: list[Any], *, allow_narrowing: bool) -> None:
        pass

    def _gradients(self, micro_batches: list[MicroBatch], loss: LossFunction) -> dict[str, float]:
        layout = self.parallel.layout
        width = self.hf_config.text_config.hidden_size
        shared = layout.context * (layout.tensor if layout.sequence_parallel else 1)
        rows = [[batch.tokens // shared, 1, width] for batch in micro_batches]
        before, after = received(rows, layout, self.parallel.pipeline.rank)
        Unread.shapes = iter(before), iter(after)
        return super()._gradients(micro_batches, loss)


def received(rows: Sequence[Any], layout: Layout, stage: int) -> tuple[list[Any], list[Any]]:
    """(from the stage before, from the one after): what a stage receives, in order, of micro-batches 0, 1, … that leave every stage as `rows`.

    Micro-batches go through a virtual pipeline in groups of as many as there are stages, chunk after chunk; backward the chunks come in reverse.
    Rows a b c d, two stages, two chunks, stage 0, which has the embedding:  from before  a b  c d  (chunk 1 only),  from after  a b a b  c d c d.
    """
    stages, chunks = layout.pipeline, range(layout.virtual_pipeline)
    size = stages if len(chunks) > 1 else 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    before = [row for group in groups for chunk in chunks for row in group if stage or chunk]
    after = [
        row for group in groups for chunk in chunks for row in group if stage < stages - 1 or chunk < len(chunks) - 1
    ]
    return before, after


def measure(plan: Plan, parallel: Parallel, kind: type[PolicyTrainer] = PolicyTrainer) -> Rehearsal:
    """Builds this rank's trainer and makes one step of it, on whatever tensors and groups there are, and counts."""
    counts = Counts(names_of_groups(parallel), answer=kind is Unread)
    with counts, FlopCounterMode(display=False) as flops:
        trainer = kind(
            plan.model,
            parallel,
            plan.execution,
            freeze=plan.freeze,
            max_tokens_per_micro_batch=plan.max_tokens_per_micro_batch,
            optimizer=plan.optimizer,
        )
        weights = sum(_nbytes(p) for chunk in trainer.chunks for p in chunk.parameters())
        buffers = counts.live - weights
        trainer.start_phase(plan.optimizer, 1)
        counts.collectives.clear()
        counts.calls.clear()
        before = flops.get_total_flops()
        assert before == 0, "building computes nothing"
        counts.synchronisations = 0
        share = shares(Batch.of(plan.samples), trainer.rules)[parallel.data.rank]
        counts.restart_peak()
        trainer.supervise(share)
        del share
        gc.collect()  # autograd's cycles
    held = counts.live
    return Rehearsal(
        rank=parallel.world.rank,
        parameters=weights,
        gradients=buffers,
        optimizer=held - weights - buffers,
        step=counts.peak - held,
        operations=flops.get_total_flops(),
        operations_by_module={name: sum(found.values()) for name, found in flops.get_flop_counts().items()},
        collectives=dict(counts.collectives),
        calls=dict(counts.calls),
        synchronisations=counts.synchronisations,
    )


def names_of_groups(parallel: Parallel) -> dict[tuple[int, ...], str]:
    """World ranks of a group → the axis it spans; of groups of equal ranks the first of the axes counts."""
    names = ("tensor", "context", "data", "pipeline", "world")
    groups = [(name, getattr(parallel, name).group) for name in names]
    found = {tuple(dist.get_process_group_ranks(group)): name for name, group in reversed(groups) if group is not None}
    return {**found, (parallel.world.rank,): "alone"}


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _unasked() -> Iterator[None]:
    """What Megatron would ask of others, or of values, answered from here."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def own_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    def norm(_: int, __: Any, lists: list[list[torch.Tensor]], *rest: Any) -> tuple[torch.Tensor, None]:
        parts = [torch.norm(tensor) for tensors in lists for tensor in tensors]
        return torch.norm(torch.stack(parts) if parts else torch.zeros(1))[None], None

    exchange = P2PCommunicator._communicate_shapes

    def shapes(communicator: Any, to_next: Any, to_previous: Any, from_previous: bool, from_next: bool) -> Any:
        exchange(communicator, to_next, to_previous, from_previous, from_next)  # counted, though nothing comes
        before, after = Unread.shapes
        return next(before) if from_previous else [0, 0, 0], next(after) if from_next else [0, 0, 0]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(P2PCommunicator, "_communicate_shapes", shapes))
        stack.enter_context(mock.patch.object(dist, "all_gather_object", own_object))
        stack.enter_context(
            mock.patch.object(nn.Module, "bfloat16", lambda module: module)
        )  # weights are made so already
        stack.enter_context(mock.patch.object(clip_grads, "l2_norm_impl", norm))
        yield
