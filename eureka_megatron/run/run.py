"""Everything a run needs, started together and stopped together: trainer ranks and engines under Ray, judges, data."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import PromptStream
from eureka_megatron.data.processor import make_processor
from eureka_megatron.errors import UserError
from eureka_megatron.rewards import Rewarder
from eureka_megatron.rollout.ahead import Ahead
from eureka_megatron.rollout.collector import Collector
from eureka_megatron.rollout.pool import RolloutPool
from eureka_megatron.run.checks import check_algorithm, check_rollout, check_run
from eureka_megatron.run.cluster import start_ray
from eureka_megatron.run.evaluate import evaluate_in_training, open_benchmarks
from eureka_megatron.run.inputs import open_dataset, reward_rules
from eureka_megatron.run.output import replacing
from eureka_megatron.run.placement import Placement
from eureka_megatron.run.turns import Turns
from eureka_megatron.sync.check import compare
from eureka_megatron.sync.ray_transfer import SyncReport
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.tracking.memory import held_memory, memory_metrics
from eureka_megatron.train.actor import TrainerGroup, model_card
from eureka_megatron.types import Batch


class Run:
    """Everything a run needs, started together and stopped together. A context manager."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.weight_version = 0  # what the engines load from model.path
        self.global_step = 0  # optimizer steps of reinforcement learning
        self.scores: dict[str, float] = {}  # of the last evaluation, which was of the weights with `scored_version`
        self.scored_version = -1
        # Whoever changes the trainer's weights holds it until the engines have them, so that a replaced engine never gets newer ones than
        # its version says.
        self.trainer_turn = threading.RLock()
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        config = self.config
        # What can be refused is refused before any process starts.
        check_run(config)
        check_rollout(config)
        check_algorithm(config)
        self.processor = make_processor(config)
        tell(self.processor.describe_ends())
        tell(f"reading {config.data.train} …")
        self.train_data = open_dataset(config, config.data.train, self.processor)
        self.test = open_dataset(config, config.data.test, self.processor) if config.data.test else None
        self.benchmarks = open_benchmarks(config)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _start(self) -> None:
        config = self.config
        rows = counted(len(self.train_data), "training row") + (
            f", {counted(len(self.test), 'test row')}" if self.test else ""
        )
        ranks = counted(config.parallel.world_size, "trainer rank")
        tell(f"{rows}; starting Ray, {ranks} and {counted(config.rollout.engines, 'rollout engine')} …")
        start_ray(self._stack)
        self.placement = Placement(config)
        self._stack.callback(self.placement.close)
        self.trainer = TrainerGroup(config, self.placement.rank_options())
        self._stack.callback(self.trainer.close)
        self.turns: Turns | None = None
        if config.placement == "colocated":
            self.layout = self.trainer.start()
            self.trainer.rest()  # the engines measure how much memory is left for them
        self.pool = RolloutPool(config, self.placement.engine_options(self.trainer.seats))
        self._stack.callback(self.pool.shutdown)
        if config.placement == "split":
            self.layout = self.trainer.start()  # while the engines load
        tell("the trainer has its weights; vLLM loads and warms up …")
        self.pool.start()
        if config.placement == "colocated":
            self.turns = Turns(self.trainer, self.pool)
            self.trainer.before_training, self.pool.before_sampling = self.turns.train, self.turns.sample
        self.placement.tell(self.trainer.seats, self.pool.actors)
        if self.trainer.unknown_device:
            tell(self.trainer.unknown_device)
        self.pool.resend = self._resend
        self.rewarder = self._stack.enter_context(Rewarder(reward_rules(config)))
        self.collector = Collector(
            self.pool,
            self.rewarder.judge,
            PromptStream(self.train_data, config.run.seed, workers=config.data.workers, prefetch=config.data.prefetch),
            config,
            max_age=config.algorithm.filter.max_age,
        )
        training = config.training
        self.rollouts = Ahead(self.collector, ahead=training.async_steps, steps=training.steps)
        self._stack.callback(self.rollouts.close)
        self._stack.callback(self.pool.shutdown)  # before it: what waits for rollouts learns that none will come

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def learn(self, batch: Batch) -> dict[str, float]:
        """All optimizer steps on this batch. → means of their metrics; maxima, or the last value, where the name says so."""
        results = self.trainer.train(batch)

        def over_steps(name: str) -> float:
            values = [result[name] for result in results]
            if name == "actor_lr" or "/" in name:  # with a slash: of the whole rollout step, each time the same
                return values[-1]
            return max(values) if name.endswith("_max") else sum(values) / len(values)

        self.global_step += len(results)
        metrics = {name if "/" in name else f"train/{name}": over_steps(name) for name in results[0]}
        return metrics | self.trainer.utilisation | {"train/global_step": self.global_step}

    def sync_weights(self, check: bool = False) -> dict[str, float]:
        """Hand the trainer's weights to every engine; with `check`, compare a checksum of every tensor on both sides."""
        start = time.perf_counter()
        with self.trainer_turn:
            self.weight_version += 1
            if self.turns is not None:
                self.turns.wake("weights")  # engines that died in their sleep are replaced here
            with self.pool.paused() as engines:
                report = self.trainer.send_weights(engines, self.weight_version, with_fingerprints=check)
                self.pool.weights_sent(report)  # and here those lost on the way
                for index, checksums in self.pool.fingerprints().items() if check else ():
                    compare(report.fingerprints, checksums, where=f"rollout engine {index}")
        seconds = {"sync/seconds": report.seconds, "sync/seconds_with_check": time.perf_counter() - start}
        memory = memory_metrics("engine", self.pool.memory) | memory_metrics("driver", [held_memory()])
        return seconds | memory | {"perf/sync_bytes": float(report.nbytes)}

    def _resend(self, engines: Sequence[Any], wait: bool) -> SyncReport | None:
        """The present weights for engines that were started anew, see RolloutPool; their lines of the topology are brought up to date."""
        if not self.trainer_turn.acquire(blocking=wait):
            return None
        try:
            for engine in engines:
                self.placement.replaced(self.pool.number(engine), engine)
            return self.trainer.send_weights(engines, self.weight_version)
        finally:
            self.trainer_turn.release()

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.test is not None or bool(self.benchmarks)

    def evaluate(self, step: int = 0) -> dict[str, float]:
        """Sample every test prompt once and judge it; then the rows of `training.evaluate_benchmarks`, whose answers go to a folder of this step."""
        if not self.evaluates:
            raise UserError("neither data.test nor training.evaluate_benchmarks is set: nothing to evaluate")
        self.scores = {}
        if self.test is not None:
            found = (self.test.get(index, keep=False) for index in range(len(self.test)))
            self.scores = self.collector.evaluate(prompt for prompt in found if prompt)
        for rows in self.benchmarks:
            self.scores |= evaluate_in_training(self.config, rows, self.pool, self.processor, step)
        self.scored_version = self.weight_version
        return self.scores

    def export(self, output: Path, scores: dict[str, float] | None = None) -> None:
        """Write the trainer's present weights as a Hugging Face directory with a model card. What lies there moves aside."""
        with replacing(output) as fresh:
            self.trainer.export(fresh, model_card(self.config, scores))
