"""One rank of a layout rehearsed without its machine: the real model, optimizer, schedule and losses on fake tensors, in one process.

torch's fake process group makes this process rank r of any number; under FakeTensorMode a tensor has a shape and no memory. Everything else is
the code that trains, `PolicyTrainer` from its constructor to its optimizer step, so what `Counts` and FlopCounterMode find is what will happen.
What cannot be asked of fake tensors is put in here, and nothing else: weights are not read, and values that the host asks for are one.

One rehearsal a process, as Megatron's groups are global: `rehearse` starts a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, read_hf_config
from eureka_megatron.parallel.cpu import cuda_type_names
from eureka_megatron.parallel.runtime import Parallel, init_parallel
from eureka_megatron.planning.counting import Counts
from eureka_megatron.planning.gpu_path import Attentions, as_on_gpu
from eureka_megatron.planning.parts import Parts
from eureka_megatron.planning.workload import Workload
from eureka_megatron.train import trainer as trainer_module
from eureka_megatron.train.parcel import shares
from eureka_megatron.train.pipeline import received as received
from eureka_megatron.train.step import Objective
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.types import Batch, Sample


@dataclass(frozen=True)
class Plan:
    """What is rehearsed: a model's directory (its config.json is read, no weights), a layout, and one rollout step's samples.

    objective: None: a supervised step on all samples; else one policy update.
    on_gpu: whether it goes the way that a GPU would, see gpu_path; for bfloat16.
    layers: of the text model, instead of the model's own number, see `deepened`.
    """

    model: Path
    layout: Layout
    execution: Execution
    samples: tuple[Sample, ...] | Workload
    max_tokens_per_micro_batch: int
    freeze: tuple[str, ...] = ()
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    objective: Objective | None = None
    on_gpu: bool = False
    layers: int | None = None

    def batch(self) -> Batch:
        """The samples, or the workload's; on real tensors, for they travel as arrays."""
        if not isinstance(self.samples, Workload):
            return Batch.of(self.samples)
        return Batch.of(self.samples.samples(read_hf_config(self.model), self.layout))


@dataclass(frozen=True)
class Rehearsal:
    """What one rank does in one optimizer step, and holds.

    Memory in bytes. `ahead`, `passes` and `update` are what is held at most beyond parameters, gradients and optimizer state: while a frozen
    tower and log-probabilities of a reference are computed, in the forward and backward passes, by the optimizer.
    Example: Rehearsal(rank=0, parameters=…, gradients=…, optimizer=…, passes=…, operations=…, collectives={("allreduce_", "tensor"): 189408}, …)
    """

    rank: int
    parameters: int
    gradients: int
    optimizer: int
    ahead: int
    passes: int
    update: int
    operations: int  # floating-point, a multiplication and an addition are two
    operations_by_part: dict[str, int]
    moved: int  # bytes that the passes read and write in operations that are no matrix products
    moved_by_update: int  # and the optimizer
    collectives: dict[tuple[str, str], int]  # (operation, group) → bytes
    calls: dict[tuple[str, str], int]
    micro_batches: int
    synchronisations: int = field(compare=False)
    kernels: int = field(compare=False)  # of the passes, at least

    @property
    def peak(self) -> int:
        """Bytes of all tensors at once, at most."""
        return self.parameters + self.gradients + self.optimizer + max(self.ahead, self.passes, self.update)


def rehearse(parts: Sequence[tuple[Plan, int]]) -> list[Rehearsal]:
    """These ranks of these plans, one after the other, in a process of their own: Megatron keeps its groups in globals. Raises what PolicyTrainer raises."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.starmap(in_this_process, parts)


def in_this_process(plan: Plan, rank: int) -> Rehearsal:
    """`rehearse` of one rank, for a process that does nothing else."""
    from megatron.core import parallel_state as mpu
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("ignore")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of a machine that has GPUs: fake tensors say that they are on the CPU
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=plan.layout.world_size, store=FakeStore())
    try:
        parallel = init_parallel(plan.layout, rank=rank)
        attentions = Attentions() if plan.on_gpu else None
        with ExitStack() as stack:
            stack.enter_context(_unasked())
            stack.enter_context(of_layers(plan.layers))
            if attentions is not None:
                stack.enter_context(as_on_gpu(attentions))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            return measure(plan, parallel, Unread, attentions)
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


class Drawn(PolicyTrainer):
    """The trainer with random weights in place of a checkpoint's: for a real step beside a rehearsal."""

    def _load(self, chunks: list[Any], *, allow_narrowing: bool) -> None:
        torch.manual_seed(0)
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)


class Unread(PolicyTrainer):
    """The trainer, with whatever weights its tensors are made with."""

    def _load(self, chunks: list[Any], *, allow_narrowing: bool) -> None:
        pass


def measure(
    plan: Plan, parallel: Parallel, kind: type[PolicyTrainer] = PolicyTrainer, attentions: Attentions | None = None
) -> Rehearsal:
    """Builds this rank's trainer and makes one step of it, on whatever tensors and groups there are, and counts."""
    counts = Counts(names_of_groups(parallel), answer=kind is Unread)
    formulas = attentions.formulas() if attentions else {}
    flops = FlopCounterMode(display=False, custom_mapping=formulas)
    parts = Parts(flops)
    with parts.marked(), counts, flops:
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
        trainer.start_phase(plan.optimizer, 2)
        with cuda_type_names():
            trainer.optimizer.step()  # its state exists from the first on
        gc.collect()
        held = counts.live
        assert flops.get_total_flops() == 0, "building computes nothing"
        counts.restart()
        ahead = peak = moved = kernels = 0

        def gradients(*args: Any) -> dict[str, float]:
            nonlocal ahead, peak, moved, kernels
            ahead, counts.peak = counts.peak - held, counts.live
            metrics = passes(*args)
            peak, moved, kernels = counts.peak - held, counts.moved, counts.kernels
            counts.peak = counts.live  # from here on the optimizer's
            return metrics

        passes, trainer._gradients = trainer._gradients, gradients  # type: ignore[method-assign,assignment]
        micro_batches = one_step(trainer, plan)
    return Rehearsal(
        rank=parallel.world.rank,
        parameters=weights,
        gradients=buffers,
        optimizer=held - weights - buffers,
        ahead=ahead,
        passes=peak,
        update=counts.peak - held,
        operations=flops.get_total_flops(),
        operations_by_part=parts.found(attentions.in_windows if attentions else 0),
        moved=moved,
        moved_by_update=counts.moved - moved,
        collectives=dict(counts.collectives),
        calls=dict(counts.calls),
        micro_batches=micro_batches,
        synchronisations=counts.synchronisations,
        kernels=kernels,
    )


def one_step(trainer: PolicyTrainer, plan: Plan) -> int:
    """What is rehearsed, of a trainer that has its optimizer. → micro-batches of this rank"""
    tower_ranks = trainer.frozen_tower.ranks if trainer.frozen_tower and plan.objective else 0
    with unset_fake_temporarily():
        share = shares(plan.batch(), trainer.rules, tower_ranks)[trainer.parallel.data.rank]
    if plan.objective is None:
        trainer.supervise(share)
    else:
        trainer.learn(share, plan.objective)
    return len(share.rows)


def deepened(one: Rehearsal, two: Rehearsal, layers: tuple[int, int], wanted: int) -> Rehearsal:
    """The rehearsal of a stage of `wanted` layers, from those of the same rank with fewer. Layers are alike, so every count is linear in their number.

    Args:
        layers: of the rank's stage in `one` and in `two`.
    """
    share = (wanted - layers[0]) / (layers[1] - layers[0])

    def line(first: Any, second: Any) -> Any:
        if isinstance(first, int):
            return round(first + share * (second - first))
        return {key: line(first.get(key, 0), second.get(key, 0)) for key in first | second}

    values = {name: line(getattr(one, name), getattr(two, name)) for name in one.__dataclass_fields__ if name != "rank"}
    return Rehearsal(rank=one.rank, **values)


def names_of_groups(parallel: Parallel) -> dict[tuple[int, ...], str]:
    """World ranks of a group → the axis it spans; of groups of equal ranks the first of the axes counts."""
    names = ("tensor", "context", "data", "pipeline", "world")
    groups = [(name, getattr(parallel, name).group) for name in names]
    found = {tuple(dist.get_process_group_ranks(group)): name for name, group in reversed(groups) if group is not None}
    return {**found, (parallel.world.rank,): "alone"}


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def of_layers(number: int | None) -> Iterator[None]:
    """While active, trainers have so many text layers; None: the model's own number."""

    def read(directory: Path) -> QwenVLConfig:
        config = read_hf_config(directory)
        if number is None:
            return config
        return replace(config, text_config=replace(config.text_config, num_hidden_layers=number))

    with mock.patch.object(trainer_module, "read_hf_config", read):
        yield


@contextmanager
def _unasked() -> Iterator[None]:
    """What Megatron would ask of others, or of values, answered from here."""
    from megatron.core.optimizer import clip_grads

    def own_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    def norm(_: int, __: Any, lists: list[list[torch.Tensor]], *rest: Any) -> tuple[torch.Tensor, None]:
        parts = [torch.norm(tensor) for tensors in lists for tensor in tensors]
        return torch.norm(torch.stack(parts) if parts else torch.zeros(1))[None], None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_gather_object", own_object))
        stack.enter_context(
            mock.patch.object(nn.Module, "bfloat16", lambda module: module)
        )  # weights are made so already
        stack.enter_context(mock.patch.object(clip_grads, "l2_norm_impl", norm))
        yield
