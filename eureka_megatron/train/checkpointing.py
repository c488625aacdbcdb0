"""A PolicyTrainer's state into a training checkpoint and back, at any parallel layout.

Everything this rank holds (weights, Adam's averages, fp32 masters) is a range of a flattened shard of a row of THE TABLE; the table
says which rectangles of the stored tensor that is. Whoever loads, at whatever layout, asks the table again. Nothing is gathered:
each rank writes its own ranges, and of equal copies (data-parallel weights, a replicated vision tower) everybody writes a share.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from eureka_megatron.checkpoint import store
from eureka_megatron.checkpoint.writer import Block, CheckpointWriter, Share
from eureka_megatron.errors import UserError
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.weights.online import (
    load_hf,
    own_parameters,
    patterns_of,
    raise_together,
    table_of,
)
from eureka_megatron.weights.table import Row
from eureka_megatron.weights.torch_dist import DistReader, rectangles, stored_rows, stored_shape
from eureka_megatron.weights.torch_dist_metadata import STATE_PREFIX

if TYPE_CHECKING:
    from eureka_megatron.train.trainer import PolicyTrainer

ADAM = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"  # Megatron's spelling
STAGING_BYTES = 64 * 2**20
SHARED_BYTES = 4 * 2**20  # smaller weights are written by one of their copies, larger ones by all, in equal parts


@dataclass(frozen=True)
class Held:
    """Values of one parameter that this rank holds: places start, start+1, … of its flattened shard.

    `name` is that of the parameter in the whole model, `kind` "" for the weight itself, or what the optimizer calls it. `values` is flat,
    on the device, and no copy. `holders` ranks hold the same values, this one is number `holder`.
    """

    name: str
    kind: str
    values: Tensor
    start: int
    holders: int
    holder: int


class TrainerCheckpoints(CheckpointWriter):
    """Saves and loads one rank's share of a run. All methods are collective, like the trainer's.

    Args:
        folder: where the checkpoints of this run lie, side by side.
    """

    def __init__(self, trainer: PolicyTrainer, folder: Path, *, keep_last: int = 1, keep_every: int = 0) -> None:
        super().__init__(folder, trainer.parallel, keep_last=keep_last, keep_every=keep_every)
        self.trainer = trainer
        self.staging = Staging(STAGING_BYTES) if trainer.parallel.device.type == "cuda" else None

    def save(self, step: int, texts: Mapping[str, str] | None = None, **state: Any) -> None:
        """Copies everything to host memory and begins to write; training may go on at once.

        Args:
            step: rollout steps that are done; names the directory.
            texts: further files (name → content), of rank 0.
            state: further entries of state.json, plain values, of rank 0.
        """
        trainer = self.trainer
        dtype = trainer.chunks[0].config.params_dtype
        ours = {
            "format": store.STATE_FORMAT,
            "step": step,
            "updates": _count_updates(trainer),
            "scheduled": trainer.scheduler.num_steps,
            "optimizer": _optimizer_name(trainer),
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout_of(trainer.parallel),
        }
        texts = {**(texts or {}), store.STATE_FILE: store.as_json({**ours, **state})}
        blocks = _blocks(trainer, self.staging)
        self.start(Share(step, blocks, random_state(), texts, trainer.model_path, dtype))

    def load(self, directory: Path) -> dict[str, Any]:
        """Fills weights, optimizer, schedule and (at the same layout) random states. `start_phase` must have run. → state.json

        Raises:
            UserError: on all ranks alike: the checkpoint is of another model, precision or optimizer; nothing is loaded then.
        """
        trainer = self.trainer
        state = _together(trainer.parallel, lambda: store.read_state(directory))
        readers = _together(trainer.parallel, lambda: _open_states(trainer, directory, state))
        if state["updates"]:
            for optimizer in _optimizers(trainer):
                if isinstance(optimizer, DistributedOptimizer):
                    # The library allocates a state at the first step; this one changes weights too, so it comes before loading them.
                    optimizer._init_optimizer_states_with_dummy_values()
        load_hf(trainer.chunks, directory, trainer.parallel)
        table, tensor = table_of(trainer.chunks), trainer.parallel.tensor
        for held in held_states(trainer, table):
            if held.kind in readers:
                _fill(held, table[held.name], readers[held.kind], tensor.rank, tensor.size)
        trainer.scheduler.num_steps = 0
        trainer.scheduler.step(state["scheduled"])
        _set_updates(trainer, state["updates"])
        if state["layout"] == layout_of(trainer.parallel):
            restore_random(store.read_json(directory / store.RANDOM_FILE)[trainer.parallel.world.rank])
        return state


def layout_of(parallel: Parallel) -> dict[str, int]:
    """Sizes of the axes. Example: {"tensor": 2, "pipeline": 1, "context": 1, "data": 4}."""
    return {name: getattr(parallel, name).size for name in ("tensor", "pipeline", "context", "data")}


# --- what a rank holds ---


def held_weights(trainer: PolicyTrainer, table: Mapping[str, Row]) -> Iterator[Held]:
    """All weights, whole shards."""
    for name, parameter in own_parameters(trainer.chunks).items():
        holders = _holders(table[name], trainer.parallel, over_data=True)
        yield Held(name, "", parameter.detach().view(-1), 0, *holders)


def held_states(trainer: PolicyTrainer, table: Mapping[str, Row]) -> Iterator[Held]:
    """Masters, where the weights are not fp32 themselves, and Adam's averages, where they exist already."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in own_parameters(trainer.chunks).items()}
    for optimizer in _optimizers(trainer):
        for parameter, main, start in _main_parameters(optimizer, names):
            name = names[parameter]
            holders = _holders(table[name], trainer.parallel, over_data=not isinstance(optimizer, DistributedOptimizer))
            if parameter.dtype != torch.float32:
                yield Held(name, MASTER, main.detach().view(-1), start, *holders)
            for kind in ADAM:
                if kind in (state := optimizer.optimizer.state.get(main, {})):
                    yield Held(name, kind, state[kind].view(-1), start, *holders)


def _optimizers(trainer: PolicyTrainer) -> list[Any]:
    """Megatron's optimizers with parameters of this rank; none on a rank where everything is frozen."""
    chained = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return [optimizer for optimizer in chained if getattr(optimizer, "optimizer", None) is not None]


def _optimizer_name(trainer: PolicyTrainer) -> str | None:
    """As in the configuration; None where everything is frozen. (See train.optimizer: only Adam's state is distributed.)"""
    kinds = {isinstance(optimizer, DistributedOptimizer) for optimizer in _optimizers(trainer)}
    return {True: "adam", False: "sgd"}[kinds.pop()] if kinds else None


def _main_parameters(optimizer: Any, names: Mapping[Tensor, str]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(the model's parameter, what the optimizer steps, where that begins in the flattened parameter)."""
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, place) in optimizer.model_param_group_index_map.items():
            start = optimizer._get_model_param_range_map(parameter)["param"].start
            yield parameter, optimizer.optimizer.param_groups[group]["params"][place], start
        return
    of_main = {getattr(parameter, "main_param", parameter): parameter for parameter in names}
    for group in optimizer.optimizer.param_groups:
        yield from ((of_main[main], main, 0) for main in group["params"])


def _holders(row: Row, parallel: Parallel, *, over_data: bool) -> tuple[int, int]:
    """(ranks that hold the same values of a parameter, which of them this is)."""
    axes = [parallel.data, parallel.context] if over_data else []
    if row.split.shards(parallel.tensor.size) == 1:
        axes.append(parallel.tensor)
    holders, holder = 1, 0
    for axis in axes:
        holders, holder = holders * axis.size, holder * axis.size + axis.rank
    return holders, holder


# --- saving ---


def _blocks(trainer: PolicyTrainer, staging: Staging | None) -> list[Block]:
    """Copies, in host memory, of what this rank writes."""
    stored = {row.megatron: (row, place, layers) for row, place, layers in stored_rows(patterns_of(trainer.chunks))}
    order = {name: number for number, name in enumerate(stored)}
    table, tensor = table_of(trainer.chunks), trainer.parallel.tensor
    blocks = []
    for held in chain(held_weights(trainer, table), held_states(trainer, table)):
        if held.name not in stored:  # a tied head's copy of the embedding
            continue
        row, place, layers = stored[held.name]
        key = STATE_PREFIX.format(kind=held.kind) + place.key if held.kind else place.key
        begin, end = _share(held, order[held.name])
        bounds = held.start + begin, held.start + end
        for part, offsets, sizes in rectangles(row, place, tensor.rank, tensor.size, *bounds):
            values = held.values[part.start - held.start : part.stop - held.start].view(sizes)
            blocks.append(Block(key, stored_shape(row, place, layers), offsets, to_host(values, staging)))
    return blocks


def _share(held: Held, number: int) -> tuple[int, int]:
    """Which of the values this copy writes."""
    count = len(held.values)
    if held.values.nbytes < SHARED_BYTES:
        return (0, count) if number % held.holders == held.holder else (0, 0)
    return count * held.holder // held.holders, count * (held.holder + 1) // held.holders


class Staging:
    """One buffer of pinned memory that all copies from the GPU go through, so that the copies themselves need not be pinned.

    Pinned memory cannot be paged out, and torch keeps what it once got: 27 GB a rank for 7B at TP 4, 53 while the save before is written.
    """

    def __init__(self, nbytes: int) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def fill(self, host: Tensor, values: Tensor) -> None:
        """Bit for bit. Both contiguous, of one shape and dtype. Done when it returns."""
        source, target = (tensor.view(-1).view(torch.uint8) for tensor in (values, host))
        size = len(self.buffer)
        for part, place in zip(source.split(size), target.split(size), strict=True):
            staged = self.buffer[: len(part)]
            staged.copy_(part)
            place.copy_(staged)


def to_host(values: Tensor, staging: Staging | None) -> Tensor:
    """A copy in ordinary host memory, through `staging` if there is one."""
    host = torch.empty(values.shape, dtype=values.dtype)
    if staging is None:
        return host.copy_(values)
    staging.fill(host, values)
    return host


# --- loading ---


def _open_states(trainer: PolicyTrainer, directory: Path, state: Mapping[str, Any]) -> dict[str, DistReader]:
    """Readers of what the optimizer needs, by kind; UserError when the checkpoint was made for another trainer."""
    dtype = trainer.chunks[0].config.params_dtype
    if state["dtype"] != (wanted := str(dtype).removeprefix("torch.")):
        raise UserError(f"{directory} holds {state['dtype']} weights, model.dtype is {wanted}")
    name = _optimizer_name(trainer)
    if name and state["optimizer"] not in (None, name):
        raise UserError(f"{directory} was written with optimizer.name={state['optimizer']}, it is {name} now")
    kinds = [] if dtype == torch.float32 else [MASTER]
    kinds += ADAM if state["updates"] and name == "adam" else ()
    readers = {kind: DistReader(directory, trainer.hf_config, STATE_PREFIX.format(kind=kind)) for kind in kinds}
    table, problems = table_of(trainer.chunks), []
    names: dict[Tensor, str] = {parameter: name for name, parameter in own_parameters(trainer.chunks).items()}
    trained = [names[p] for optimizer in _optimizers(trainer) for p, _, _ in _main_parameters(optimizer, names)]
    needed = {hf: shape for name in trained for hf, shape in table[name].hf.items()}
    for kind, reader in readers.items():
        # Also what model.freeze names no longer: it was not trained, so there is nothing to go on from.
        missing = [hf for hf in needed if hf not in reader]
        found = {hf: info.shape for hf, info in reader.tensors.items() if hf in needed}
        wrong = [f"{hf} {shape}, not {needed[hf]}" for hf, shape in found.items() if shape != needed[hf]]
        problems += [f"{directory} has no {kind} of {', '.join(missing)}"] if missing else []
        problems += [f"{directory}: {kind} has another shape of {', '.join(wrong)}"] if wrong else []
    if problems:
        raise UserError("\n".join(problems))
    return readers


def _fill(held: Held, row: Row, reader: DistReader, r: int, n: int) -> None:
    shape = row.split.shard_shape(row.shapes, n)
    width, stop = prod(shape[1:]), held.start + len(held.values)
    first, last = held.start // width, -(-stop // width)
    block = torch.empty((last - first, *shape[1:]), dtype=held.values.dtype)
    row.split.fill(block, [reader[name] for name in row.hf], r, n, first)
    held.values.copy_(block.view(-1)[held.start - first * width : stop - first * width])


def _count_updates(trainer: PolicyTrainer) -> int:
    """Steps the optimizer has made; the schedule counts planned ones. Collective: a rank may hold nothing that learns."""
    found = 0
    for optimizer in _optimizers(trainer):
        entries = (*optimizer.optimizer.state.values(), *optimizer.optimizer.param_groups)
        found = max([found, *(int(entry["step"]) for entry in entries if "step" in entry)])
    count = torch.tensor(found, device=trainer.parallel.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


def _set_updates(trainer: PolicyTrainer, updates: int) -> None:
    """Adam's step count: torch keeps it with every parameter, Transformer Engine with the group."""
    for optimizer in _optimizers(trainer):
        for state in optimizer.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(updates)
        for group in optimizer.optimizer.param_groups:
            if "step" in group:
                group["step"] = updates


def _together(parallel: Parallel, action: Any) -> Any:
    """The result of a local action, or the UserError of whichever rank had one, on all ranks."""
    problems, result = [], None
    try:
        result = action()
    except UserError as error:
        problems.append(str(error))
    raise_together(problems, parallel)
    return result


# --- random states ---


def random_state() -> dict[str, Any]:
    """Of torch, numpy, Python, the GPU and Megatron's tracker, in this process, as plain values."""
    version, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [version, keys.tolist(), *rest],
        "torch": _pack(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _pack(torch.cuda.get_rng_state())
        state["megatron"] = {name: _pack(value) for name, value in get_cuda_rng_tracker().get_states().items()}
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Inverse of `random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(_unpack(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_unpack(state["cuda"]))
        get_cuda_rng_tracker().set_states({name: _unpack(value) for name, value in state["megatron"].items()})


def _pack(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _unpack(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
