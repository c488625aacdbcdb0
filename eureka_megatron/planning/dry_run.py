"""`eureka train CONFIG --dry-run` (sft too): all that can be checked of a run without its GPUs, and everything that is wrong at once.

A model that is named as on the hub and is not in this machine's cache says that the run will start elsewhere. Then what is not here is told and
does not count as wrong: weights, data, folders; layout and memory are those of the published configuration.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import Rows, load_dataset, read_mixture
from eureka_megatron.data.processor import make_processor
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.gpus import GPUS, Gpu
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.operations import text_parameters, tower_parameters
from eureka_megatron.places import absolute
from eureka_megatron.planning import report
from eureka_megatron.planning.command import tower_is_frozen
from eureka_megatron.planning.hardware import GIB, usable
from eureka_megatron.planning.load import Load, Shape, stages_of_interest
from eureka_megatron.planning.predict import Engines
from eureka_megatron.planning.published import configuration
from eureka_megatron.planning.twins import Twin, rehearse_twin
from eureka_megatron.rewards.rewarder import check_function
from eureka_megatron.run.checks import check_algorithm, check_rollout, check_run
from eureka_megatron.run.evaluate import open_benchmarks
from eureka_megatron.run.inputs import answer_check, reward_rules, settle
from eureka_megatron.run.output import taken
from eureka_megatron.run.seats import Demand, check_seats
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.train.step import Objective
from eureka_megatron.weights.online import check_hf, open_checkpoint
from eureka_megatron.weights.table import expand, rows

SAMPLED = 16  # rows of each data file that are read whole


@dataclass(frozen=True)
class Machine:
    """What the run will have. nodes: None: as many as the run needs."""

    gpu: Gpu
    nodes: int | None = None
    gpus_per_node: int = 8

    @classmethod
    def named(cls, gpu: str, memory: float | None, nodes: int | None, gpus_per_node: int) -> Machine:
        """Raises ConfigError for an unknown GPU."""
        if gpu not in GPUS:
            raise ConfigError(f"--gpu {gpu}: unknown; known: {', '.join(GPUS)}")
        found = GPUS[gpu] if memory is None else replace(GPUS[gpu], memory=memory)
        return cls(found, nodes, gpus_per_node)


def dry_run(config: RunConfig, machine: Machine, *, supervised: bool = False, resume: bool = False) -> None:
    """Prints a line a check.

    Raises:
        ConfigError: all that is wrong, a line each.
    """
    run = DryRun(config, machine, supervised)
    run.check("model", run.model)
    known = supervised or run.check("algorithm", lambda: _each(check_algorithm, run.config, run.config.algorithm.loss))
    if run.config_dir is not None:  # nothing else can be said without a model's sizes
        run.check("weights", run.weights)
        fits = run.check("layout", lambda: _each(check_run, run.config, "fits the model"))
        if not supervised:
            run.check("rollouts", lambda: _each(check_rollout, run.config, "fit the model and the micro-batches"))
        run.check("placement", run.placement)
        if fits and known:
            run.check("memory of a rank", run.memory)
        if not supervised:
            run.check("memory of an engine", run.engine)
        run.check("disk", run.disk)
    if not supervised:
        run.check("rewards", run.rewards)
    for data in dict.fromkeys([config.data.train, *([str(config.data.test)] if config.data.test else [])]):
        run.check("data", lambda data=data: run.data(data))  # type: ignore[misc]
    if config.training.evaluate_benchmarks and not supervised:
        run.check("benchmarks", run.benchmarks)
    if not resume:
        run.check("output", run.output)
    if run.problems:
        raise ConfigError("\n".join(run.problems))
    absent = f"; not on this machine, so not checked: {', '.join(run.absent)}" if run.absent else ""
    tell(f"nothing wrong was found{absent}")


def objective_of(config: RunConfig) -> Objective:
    """Of the run's updates, as far as memory and operations depend on it."""
    return Objective(config.algorithm.loss, config.loss_options, config.algorithm.compat)


def _each(check: Callable[[RunConfig], None], config: RunConfig, fine: str) -> str:
    check(config)
    return fine


class DryRun:
    """The checks of one run; each returns what it found, or raises what is wrong."""

    def __init__(self, config: RunConfig, machine: Machine, supervised: bool) -> None:
        self.config, self.machine, self.supervised = config, machine, supervised
        self.problems: list[str] = []
        self.absent: list[str] = []
        self.config_dir: Path | None = None
        self.elsewhere = False

    def check(self, title: str, check: Callable[[], str]) -> bool:
        """→ whether nothing is wrong"""
        try:
            tell(f"{title}: {check()}")
            return True
        except UserError as error:
            lines = str(error).splitlines()
            tell(f"{title}: wrong: {lines[0]}{f' (and {len(lines) - 1} more)' if len(lines) > 1 else ''}")
            self.problems += [line for line in lines if line not in self.problems]
            return False

    def model(self) -> str:
        name = str(self.config.model.path)
        try:
            self.config = settle(self.config, download=False)
            self.config_dir = self.config.model.path
        except UserError:  # only for what is named as on the hub
            self.config_dir = directory = configuration(name)
            self.elsewhere = True
            self.absent.append(name)
            self.config = self.config.model_copy(
                update={"model": self.config.model.model_copy(update={"path": directory})}
            )
        found = read_hf_config(self.config_dir)
        parameters = text_parameters(found) + tower_parameters(found)
        return f"{self.config_dir.name}, {parameters / 1e9:.3g} billion parameters"

    def weights(self) -> str:
        if self.elsewhere:
            return "not on this machine"
        directory = self.config.model.path
        reader = open_checkpoint(directory)
        table = {row.megatron: row for row in expand(rows(read_hf_config(directory)))}
        if problems := check_hf(reader, table):
            raise UserError("\n".join(problems))
        return f"{counted(len(reader.tensors), 'tensor')}, all where they belong"

    def placement(self) -> str:
        demand = Demand.of(self.config, engines=not self.supervised)
        nodes = self.machine.nodes or -(-demand.gpus // self.machine.gpus_per_node)
        check_seats(demand, nodes, self.machine.gpus_per_node)
        return f"{demand} on {counted(nodes, 'node')} of {self.machine.gpus_per_node} GPUs"

    def memory(self) -> str:
        tell("memory of a rank: one of each kind is rehearsed, on tensors without memory …")
        loads = self.rehearsed()
        peak = max(loads, key=lambda load: load.peak)
        room = usable(self.machine.gpu, colocated=self._colocated)
        parts = ", ".join(f"{name} {nbytes / GIB:.1f}" for name, nbytes in report.parts_of(peak).items())
        of = f"{peak.peak / GIB:.1f} of {room / GIB:.1f} GiB on a {self.machine.gpu.name} at stage {peak.stage} ({parts})"
        if peak.peak > room:
            raise ConfigError(
                f"memory of a rank: {of}: model.recompute=full, a smaller training.max_tokens_per_micro_batch, or a larger parallel.tensor or "
                "parallel.pipeline; `eureka plan` finds what fits"
            )
        return of

    def rehearsed(self) -> list[Load]:
        """Of a rank of each kind."""
        run, directory = self.config, self.config_dir
        assert directory is not None
        config = read_hf_config(directory)
        longest = run.longest_sample
        if not self.supervised:
            longest = min(longest, run.data.max_prompt_tokens + run.rollout.max_response_tokens)
        frozen = tower_is_frozen(config, run.model.freeze)
        tokens = run.training.max_tokens_per_micro_batch
        shape = Shape(run.layout, run.model.recompute, tokens, longest, run.data.max_pixels, frozen)
        objective = None if self.supervised else objective_of(run)
        twins = [
            Twin(directory, shape, stage, run.model.freeze, objective, run.optimizer, run.model.dtype)
            for stage in stages_of_interest(run.layout)
        ]
        with ProcessPoolExecutor(min(2, len(twins)), mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(rehearse_twin, twins))

    @property
    def _colocated(self) -> bool:
        return self.config.placement == "colocated" and not self.supervised

    def engine(self) -> str:
        rollout, gpu = self.config.rollout, self.machine.gpu
        assert self.config_dir is not None
        config = read_hf_config(self.config_dir)
        engines = Engines(rollout.engines, rollout.tensor, rollout.gpu_memory_utilization, self._colocated)
        tokens = engines.cache_tokens(config, gpu)
        if tokens < rollout.max_model_tokens:
            raise ConfigError(
                f"memory of an engine: {rollout.gpu_memory_utilization:.0%} of {gpu.memory:g} GiB hold {engines.weights(config) / GIB:.1f} GiB of weights and "
                f"a KV cache of {max(tokens, 0)} tokens, fewer than rollout.max_model_tokens={rollout.max_model_tokens}: a larger rollout.tensor "
                "or rollout.gpu_memory_utilization"
            )
        return f"weights {engines.weights(config) / GIB:.1f} GiB, KV cache of {tokens:,} tokens"

    def disk(self) -> str:
        assert self.config_dir is not None
        config = read_hf_config(self.config_dir)
        learning = text_parameters(config)
        if not tower_is_frozen(config, self.config.model.freeze):
            learning += tower_parameters(config)
        weights = 2 * (text_parameters(config) + tower_parameters(config))
        kept = (
            self.config.checkpoint.keep_last + 1 if self.config.checkpoint.every else 0
        )  # one is written before one goes
        needed = weights + kept * (weights + 12 * learning)
        folder = absolute(self.config.run.output)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        said = f"{needed / GIB:,.1f} GiB for {counted(kept, 'checkpoint')} and the export, {free / GIB:,.1f} free in {folder}"
        if free < needed:
            if not self.elsewhere:
                raise ConfigError(
                    f"disk: run.output={self.config.run.output} needs {said}: another place, or checkpoint.keep_last=1"
                )
            self.absent.append(f"the disk of {self.config.run.output}")
        return said

    def rewards(self) -> str:
        rules = reward_rules(self.config)
        if rules.function and rules.urls:
            raise ConfigError("rewards.function and rewards.urls are both set; one of them judges")
        if rules.function:
            check_function(rules.function)
        return rules.function or ", ".join(rules.urls) or "rules"

    def data(self, named: str) -> str:
        paths = [path for path, _ in read_mixture(named)]
        missing = [str(path) for path in paths if not path.exists()]
        if missing and self.elsewhere:
            self.absent += missing
            return f"{named}: not on this machine"
        if missing:
            raise UserError("\n".join(f"{path}: no such data file" for path in missing))
        if self.elsewhere:
            return f"{named}: read by the model's processor, which is not on this machine"
        response = self.config.sft.responses if self.supervised else None
        found = load_dataset(
            named,
            make_processor(self.config),
            media=self.config.data.media,
            on_bad_row=self.config.data.on_bad_row,
            check_answer=None if response else answer_check(self.config),
            response_key=response,
            max_tokens=self.config.longest_sample,
        )
        return f"{named}: {counted(len(found), 'row')}, {_read_some(found)}"

    def benchmarks(self) -> str:
        missing = [str(path) for path in self.config.training.evaluate_benchmarks.values() if not path.exists()]
        if missing and self.elsewhere:
            self.absent += missing
            return f"{', '.join(missing)}: not on this machine"
        return ", ".join(f"{rows.benchmark} {counted(len(rows), 'row')}" for rows in open_benchmarks(self.config))

    def output(self) -> str:
        output = absolute(self.config.run.output) / "hf"
        if taken(output):
            raise UserError(
                f"{output} holds the weights of an earlier run: another run.output, or move them away, or --resume auto"
            )
        return str(output)


def _read_some(found: Rows) -> str:
    places = sorted({*np.linspace(0, len(found) - 1, SAMPLED).astype(int).tolist()})
    prompts = [(place, found.load(place, keep=False)) for place in places]
    bad: Sequence[str] = [str(prompt) for _, prompt in prompts if isinstance(prompt, UserError)]
    if bad and getattr(found, "on_bad_row", "error") == "error":
        raise UserError("\n".join(bad))
    lengths = [len(prompt.tokens_S) for _, prompt in prompts if not isinstance(prompt, UserError)]
    if not lengths:
        raise UserError(f"of {len(places)} rows that were read none is good; the first: {bad[0]}")
    left_out = f", {len(bad)} left out" if bad else ""
    return f"{len(places)} of them read: prompts of {min(lengths)} to {max(lengths)} tokens{left_out}"
