"""Several engines as Ray actors: start together, fan prompts out, replace an engine that dies or no longer answers.

A replaced engine has the weights of `model.path`; when others have been sent since, `resend` (set by whoever owns the trainer) gives it the
current ones before its prompts are done again. Weights come from the trainer, not from a copy kept here: a second whole model
in the object store would cost more host memory than the first.

Left out: engines over several GPUs, asynchronous rollouts. Ray must be initialised by the caller.
"""

from __future__ import annotations

import heapq
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import UserError, from_remote, last_message
from eureka_megatron.rollout.engine import Engine, EngineOptions, request_seeds
from eureka_megatron.sync.check import Fingerprint
from eureka_megatron.types import Group, Prompt, Rollout, Sampling

log = logging.getLogger(__name__)

_MAX_DEATHS = 3  # of engines within one call: then something kills them, and restarting does not help


def engine_options(config: RunConfig) -> EngineOptions:
    """What the run's engines are started with."""
    rollout = config.rollout
    return EngineOptions(
        model=config.model.path,
        dtype=config.model.dtype,
        max_model_tokens=rollout.max_model_tokens,
        max_concurrent=rollout.max_concurrent,
        kv_cache_gib=rollout.kv_cache_gib,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        seed=config.run.seed,
    )


class RolloutPool:
    """`rollout.engines` engines. They begin to start on construction; `start` waits for them.

    Args:
        options: Ray's, of each engine's actor; none: they start anywhere, with `rollout.tensor` GPUs each where the cluster has any.
        resend: called with the handles of replaced engines, must send them the current weights under the current version and
            return the SyncReport. Without it engines can be replaced only as long as no weights have been sent.
        engine_class: for tests.

    Attributes:
        version: of the weights every engine has.
        restarts: engines replaced so far.
    """

    def __init__(
        self,
        config: RunConfig,
        options: Sequence[dict[str, Any]] | None = None,
        *,
        resend: Callable[[list[Any]], Any] | None = None,
        engine_class: type[Engine] = Engine,
    ) -> None:
        self.config = config
        self.resend = resend
        self.version = 0
        self.restarts = 0
        self.timeout_seconds = config.rollout.timeout_seconds
        self._sent = False  # whether the engines have other weights than those of model.path
        self._options = engine_options(config)
        count = config.rollout.engines
        gpus = config.rollout.tensor if ray.cluster_resources().get("GPU") else 0
        # Trainer ranks rest while engines sample; still, whoever shares the machine with others says so by OMP_NUM_THREADS.
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
        self._actor_classes: list[Any] = []
        for own in options or [{}] * count:
            seen = {"OMP_NUM_THREADS": threads, **own.get("runtime_env", {}).get("env_vars", {})}
            given = {"num_cpus": 0, "num_gpus": gpus, **own, "runtime_env": {"env_vars": seen}}
            self._actor_classes.append(ray.remote(engine_class).options(**given))
        self._actors: list[Any] = [actor_class.remote(self._options) for actor_class in self._actor_classes]

    @property
    def actors(self) -> list[Any]:
        """Handles of the engines, for `send_weights`. An entry changes when its engine is replaced."""
        return list(self._actors)

    def start(self) -> list[dict[str, Any]]:
        """Wait until all engines are up. → status of each. Raises UserError naming an engine that cannot start, and why."""
        return [self._ready(index) for index in range(len(self._actors))]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seen: Counter[str] | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Group]:
        """n rollouts for every prompt, in order, spread over the engines; the result does not depend on how.

        seen: how often ids have come up, when these prompts are a part of more; counted on here.

        Prompts of an engine that dies, or does not answer within `rollout.timeout_seconds`, are done again by its replacement.
        Raises UserError when engines keep dying.
        """
        if set(sampling) != Sampling.__required_keys__:
            raise TypeError(f"generate wants {sorted(Sampling.__required_keys__)}, got {sorted(sampling)}")
        seeds = request_seeds(prompts, sampling["seed"], seen)
        costs = [len(prompt.tokens_S) + sampling["n"] * sampling["max_tokens"] for prompt in prompts]
        # call → (engine, the prompts it does, when it must have answered)
        pending: dict[Any, tuple[int, list[int], float]] = {}

        def begin(engine: int, share: list[int]) -> None:
            part = [prompts[i].without_patches() for i in share]
            call = self._actors[engine].generate.remote(part, [seeds[i] for i in share], sampling)
            pending[call] = (engine, share, time.monotonic() + self.timeout_seconds)

        for engine, share in enumerate(balance(costs, len(self._actors))):
            if share:
                begin(engine, share)
        found: dict[int, tuple[Rollout, ...]] = {}
        deaths = 0
        while pending:
            nearest = min(deadline for _, _, deadline in pending.values())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, nearest - time.monotonic()))
            done = ready[0] if ready else min(pending, key=lambda call: pending[call][2])
            engine, share, _ = pending.pop(done)
            try:
                found.update(zip(share, map(tuple, self._result(done, engine, None if ready else 0.0)), strict=True))
            except RayActorError as error:
                deaths += 1
                if deaths > _MAX_DEATHS:
                    raise UserError(
                        f"rollout engines died {deaths} times in one call, the last was engine {engine}: {last_message(error)}; "
                        "look for an out-of-memory kill, or lower rollout.max_concurrent or rollout.gpu_memory_utilization"
                    ) from error
                self._replace(engine)
                begin(engine, share)
        versions = {rollout.weight_version for rollouts in found.values() for rollout in rollouts}
        if versions - {self.version}:
            raise UserError(f"rollouts come from weight versions {sorted(versions)}, expected {self.version} only")
        return [Group(prompt, found[i]) for i, prompt in enumerate(prompts)]

    # ---- weights ----------------------------------------------------------------------------------------------------

    def weights_sent(self, report: Any) -> None:
        """Take note of a finished update (`sync.ray_transfer.SyncReport`): every engine must have its version from now on.

        Engines that died during the update are replaced and sent the weights again.
        """
        self.version = report.version
        self._sent = True
        for index, status in enumerate(self._on_all("status")):
            self._require_version(index, status, self.version)

    def fingerprints(self) -> list[dict[str, Fingerprint]]:
        """Of every engine: checksums of the weights it computes with, for `sync.check.compare`."""
        return self._on_all("checksums")

    def status(self) -> list[dict[str, Any]]:
        """Of every engine: process id, weight version, failure."""
        return self._on_all("status")

    def shutdown(self) -> None:
        """End the engines. The pool cannot be used afterwards."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _on_all(self, method: str) -> list[Any]:
        """Call a method of every engine; dead ones are replaced first."""
        calls = [getattr(actor, method).remote() for actor in self._actors]

        def answer(index: int, call: Any, may_die: bool) -> Any:
            try:
                return self._result(call, index, self.timeout_seconds)
            except RayActorError as error:
                if not may_die:
                    reason = f"died twice in one call ({method}): {last_message(error)}"
                    raise UserError(f"rollout engine {index} {reason}") from error
                self._replace(index)
                return answer(index, getattr(self._actors[index], method).remote(), False)

        return [answer(index, call, True) for index, call in enumerate(calls)]

    def _result(self, call: Any, engine: int, seconds: float | None) -> Any:
        """What a call of an engine returns. RayActorError: the engine is dead; one that does not answer in time is ended."""
        try:
            return ray.get(call, timeout=seconds)
        except GetTimeoutError:
            log.warning(
                "rollout engine %d has not answered for %g s (rollout.timeout_seconds)", engine, self.timeout_seconds
            )
            ray.kill(self._actors[engine])
            raise RayActorError(
                error_msg=f"no answer within rollout.timeout_seconds={self.timeout_seconds:g}"
            ) from None
        except RayTaskError as error:
            raise from_remote(f"rollout engine {engine}", error) from None

    def _replace(self, index: int) -> None:
        """A new engine at this place, with the current weights."""
        if self._sent and self.resend is None:
            raise UserError(
                f"rollout engine {index} died and its replacement cannot get the weights of version {self.version}: "
                "RolloutPool.resend is not set"
            )
        self.restarts += 1
        log.warning("rollout engine %d died; starting another in its place", index)
        self._actors[index] = self._actor_classes[index].remote(self._options)
        self._ready(index)
        if self.resend is not None:
            report = self.resend([self._actors[index]])
            # While an update is under way the trainer is one version ahead of what has been reported here.
            self._require_version(index, self._ready(index), getattr(report, "version", self.version))

    def _ready(self, index: int) -> dict[str, Any]:
        try:
            return ray.get(self._actors[index].status.remote())
        except (RayActorError, RayTaskError) as error:
            reason = last_message(error)
            if "cache" in reason or "memory" in reason:
                reason += " (rollout.gpu_memory_utilization; on a CPU rollout.kv_cache_gib)"
            raise UserError(f"rollout engine {index} did not start: {reason}") from error

    def _require_version(self, index: int, status: dict[str, Any], version: int) -> None:
        if status["failure"] is not None or status["weight_version"] != version:
            reason = f" ({status['failure']})" if status["failure"] else ""
            raise UserError(
                f"rollout engine {index} has weights of version {status['weight_version']}{reason}, expected {version}"
            )


def balance(costs: Sequence[float], engines: int) -> list[list[int]]:
    """Indices of the items of each engine: longest first, each to the engine with the least so far. Shares keep the order.

    costs [5, 1, 1, 4] over 2 engines:   item 0 (5) → engine 0        loads 5 0
                                         item 3 (4) → engine 1              5 4
                                         item 1 (1) → engine 1              5 5
                                         item 2 (1) → engine 0              6 5     gives [[0, 2], [1, 3]]
    """
    loads = [(0.0, engine) for engine in range(engines)]
    shares: list[list[int]] = [[] for _ in range(engines)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, engine = heapq.heappop(loads)
        shares[engine].append(index)
        heapq.heappush(loads, (load + costs[index], engine))
    return [sorted(share) for share in shares]
