"""Which layouts there are, which of them fit, and which is fastest: all by arithmetic, then the promising ones rehearsed.

Sequence parallelism is on wherever tensor parallelism is (memory for nothing), and `model.recompute=selective` is left out: with flash attention it
saves less than 1 %.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import ConfigError
from eureka_megatron.gpus import Gpu
from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, check_engine, check_layout
from eureka_megatron.planning import predict
from eureka_megatron.planning.hardware import GIB, usable
from eureka_megatron.planning.load import Load, Shape, estimate, stages_of_interest
from eureka_megatron.planning.predict import Engines, Work

TENSORS = (1, 2, 4, 8)
MICRO_BATCHES = (8192, 16384, 32768)
RECOMPUTE: tuple[Literal["none", "full"], ...] = ("none", "full")
LONG = 16384  # tokens of a sample from which on context parallelism is considered
BESIDE_TRAINER = 4.0  # GiB of a colocated engine's GPU that the trainer takes besides its parameters: CUDA context, buckets of the sync
MOST, LEAST = 0.9, 0.3  # of a GPU's memory for an engine
FULL = 0.85, 0.08  # a layout that fills more than that share of what is usable counts as so much slower


@dataclass(frozen=True)
class Ask:
    """What is to be trained on what."""

    model: Path  # directory of config.json
    config: QwenVLConfig
    run: RunConfig
    work: Work
    gpu: Gpu
    gpus: int
    node: int = 8  # GPUs of a node


@dataclass(frozen=True)
class Candidate:
    shape: Shape
    engines: Engines

    @property
    def where(self) -> tuple[Any, ...]:
        """What a reader would call the layout: of those that agree in it only the best is shown."""
        return self.shape.layout, self.engines.colocated

    def __str__(self) -> str:
        """Example: `TP 8 · PP 2 · DP 3, colocated, recompute full, 16384 tokens`."""
        placement = "colocated" if self.engines.colocated else "split"
        return f"{axes(self.shape.layout)}, {placement}, recompute {self.shape.recompute}, {self.shape.tokens} tokens"


def axes(layout: Layout) -> str:
    """Example: `TP 8 · PP 2 · DP 3`."""
    sizes = {
        "TP": layout.tensor,
        "PP": layout.pipeline,
        "VPP": layout.virtual_pipeline,
        "CP": layout.context,
        "DP": layout.data,
    }
    return " · ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "1 GPU"


@dataclass(frozen=True)
class Outcome:
    """A candidate and what is expected of it. `loads` are those of the kinds of ranks, stage by stage."""

    ask: Ask
    candidate: Candidate
    loads: tuple[Load, ...]

    @cached_property
    def room(self) -> float:
        """Bytes that the trainer's tensors may take."""
        return usable(self.ask.gpu, colocated=self.candidate.engines.colocated)

    @cached_property
    def peak(self) -> float:
        return max(load.peak for load in self.loads)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of a rollout step by part: rollout, those of train, sync, switch."""
        ask, shape, engines = self.ask, self.candidate.shape, self.candidate.engines
        concurrent = ask.run.rollout.max_concurrent
        return {
            "rollout": predict.rollout_seconds(ask.config, engines, ask.work, ask.gpu, concurrent),
            **predict.train_seconds(self.loads, shape, ask.work, ask.gpu),
            "sync": predict.sync_seconds(ask.config, shape.layout, engines, ask.gpu, ask.work.frozen_tower),
            "switch": predict.switch_seconds(ask.config, self.loads, engines, ask.gpu),
        }

    @cached_property
    def step(self) -> float:
        """Seconds of a rollout step."""
        parts = self.seconds
        others = sum(parts.values()) - parts["rollout"]
        ahead = self.ask.work.asynchronous and not self.candidate.engines.colocated
        return max(parts["rollout"], others) if ahead else parts["rollout"] + others

    @property
    def rehearsed(self) -> bool:
        return all(load.rehearsed for load in self.loads)

    def fits(self) -> bool:
        return self.peak <= self.room


def candidates(ask: Ask) -> Iterator[Candidate]:
    """All layouts of the trainer and its engines that the GPUs are enough for and the model divides into."""
    for colocated, count, size in _engine_choices(ask):
        world = ask.gpus if colocated else ask.gpus - count * size
        for layout in _layouts(ask, world):
            for tokens in _micro_batches(ask):
                for recompute in RECOMPUTE:
                    shape = Shape(layout, recompute, tokens, ask.work.longest, ask.work.pixels, ask.work.frozen_tower)
                    engines = Engines(count, size, _share(ask, shape, colocated), colocated)
                    if engines.memory >= LEAST and engines.cache_tokens(ask.config, ask.gpu) >= ask.work.longest:
                        yield Candidate(shape, engines)


def _engine_choices(ask: Ask) -> Iterator[tuple[bool, int, int]]:
    """(colocated, engines, GPUs of each)"""
    for size in TENSORS:
        if size > min(ask.node, ask.gpus) or not _allowed(check_engine, ask.config, size):
            continue
        if ask.gpus % size == 0 and not ask.work.asynchronous:
            yield True, ask.gpus // size, size
        for part in (4, 3, 2):
            unit = max(size, ask.node if ask.gpus > 2 * ask.node else size)
            given = ask.gpus // part // unit * unit
            if given and given < ask.gpus:
                yield False, given // size, size


def _layouts(ask: Ask, world: int) -> Iterator[Layout]:
    layers = ask.config.text_config.num_hidden_layers
    contexts = (1,) if ask.work.longest <= LONG else (1, 2, 4, 8)
    for tensor in TENSORS:
        for pipeline in (size for size in range(1, min(layers, world) + 1) if layers % size == 0):
            for context in contexts:
                data, left = divmod(world, tensor * pipeline * context)
                if left or tensor * context > ask.node or ask.work.responses_per_update < data:
                    continue
                for virtual in (1, 2) if pipeline > 1 else (1,):
                    layout = Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        context=context,
                        data=data,
                        sequence_parallel=tensor > 1,
                    )
                    if _allowed(check_layout, ask.config, layout):
                        yield layout


def _micro_batches(ask: Ask) -> list[int]:
    fitting = [tokens for tokens in MICRO_BATCHES if tokens >= ask.work.longest]
    return fitting or [-(-ask.work.longest // 1024) * 1024]


def _share(ask: Ask, shape: Shape, colocated: bool) -> float:
    if not colocated:
        return MOST
    parameters = max(estimate(ask.config, shape, stage).parameters for stage in stages_of_interest(shape.layout))
    return min(MOST, (ask.gpu.memory - parameters / GIB - BESIDE_TRAINER) / ask.gpu.memory // 0.01 / 100)


def _allowed(check: Callable[[QwenVLConfig, Any], None], config: QwenVLConfig, what: Any) -> bool:
    try:
        check(config, what)
    except ConfigError:
        return False
    return True


@dataclass
class Found:
    """Outcomes, fastest first: those that fit, one for each layout, and those that do not."""

    fitting: list[Outcome] = field(default_factory=list)
    too_large: list[Outcome] = field(default_factory=list)


def search(ask: Ask) -> Found:
    """By arithmetic."""
    outcomes = [
        Outcome(
            ask, one, tuple(estimate(ask.config, one.shape, stage) for stage in stages_of_interest(one.shape.layout))
        )
        for one in candidates(ask)
    ]
    best = min((outcome.step for outcome in outcomes), default=0.0)
    # Of what takes about the same time, the smaller: less can go wrong.
    outcomes.sort(key=lambda outcome: (round(_weighed(outcome) / best, 2), outcome.peak))
    found, seen = Found(), set()
    for outcome in outcomes:
        if not outcome.fits():
            found.too_large.append(outcome)
        elif outcome.candidate.where not in seen:
            seen.add(outcome.candidate.where)
            found.fitting.append(outcome)
    return found


def _weighed(outcome: Outcome) -> float:
    return outcome.step * (1 + FULL[1] * (outcome.peak > FULL[0] * outcome.room))


def least_gpus(ask: Ask) -> int | None:
    """The smallest number of GPUs of this kind that the run fits on, tried in steps that nodes come in; None: not up to 1,024."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(160, 1025, 32)]
    return next((gpus for gpus in sizes if search(replace(ask, gpus=gpus)).fitting), None)


def rehearsed(
    outcomes: Sequence[Outcome], *, seconds: float, wanted: int, told: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """The first outcomes with the loads of rehearsals in place of arithmetic, as many as the time allows, one at least; fastest first.

    Args:
        seconds: after which no further one is begun.
        wanted: how many at most.
        told: called with each when it is done.
    """
    from eureka_megatron.planning.twins import Twin, rehearse_twin  # imports torch and Megatron-Core

    start, done = time.monotonic(), list[Outcome]()
    ask = outcomes[0].ask
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for outcome in outcomes[:wanted]:
            if done and time.monotonic() - start > seconds and any(one.fits() for one in done):
                break
            stages = stages_of_interest(outcome.candidate.shape.layout)
            twins = [Twin(ask.model, outcome.candidate.shape, stage, ask.run.model.freeze) for stage in stages]
            done.append(replace(outcome, loads=tuple(pool.map(rehearse_twin, twins))))
            told(done[-1])
    return sorted(done, key=lambda outcome: (not outcome.fits(), _weighed(outcome)))
