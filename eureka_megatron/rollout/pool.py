"""Several engines as Ray actors: start together, take prompts from one queue, are replaced when they die, hang or have wrong weights.

Engines work in slices (`Engine.serve`): a call ends when a prompt is finished, or soon after, and the next one brings more prompts. Between
two calls weights may change; what an engine had begun goes on with the new ones. So `generate` may run in a thread while the trainer's
thread sends weights inside `paused`.

A replaced engine has the weights of `model.path`; when others have been sent since, `resend` (set by whoever owns the trainer) gives it the
current ones before it gets prompts. Weights come from the trainer, not from a copy kept here: a second whole model in the object store
would cost more host memory than the first. While the trainer is at work the replacement waits for it, and the other engines go on.

Ray must be initialised by the caller.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import UserError, from_remote, last_message
from eureka_megatron.rollout.engine import Engine, EngineOptions, Work, request_seeds
from eureka_megatron.sync.check import Fingerprint
from eureka_megatron.types import Group, Prompt, Rollout, Sampling

log = logging.getLogger(__name__)

_MAX_DEATHS = 3  # of engines within one call: then something kills them, and restarting does not help
SLICE_SECONDS = 0.2  # that an engine samples before it can take new weights, at most


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
        sleeps=config.placement == "colocated",
        tensor=rollout.tensor,
    )


@dataclass(frozen=True)
class _Call:
    """A slice that an engine is at work on, with these weights, and when it must have answered."""

    engine: int
    actor: Any
    version: int
    deadline: float


class RolloutPool:
    """`rollout.engines` engines. They begin to start on construction; `start` waits for them.

    Args:
        options: Ray's, of each engine's actor; none: they start anywhere, with `rollout.tensor` GPUs each where the cluster has any.
        resend: called with the handles of replaced engines and whether to wait for a trainer that is at work: must send them the current
            weights under the current version and return the SyncReport, or None where it did not wait. Without it engines can be replaced
            only as long as no weights have been sent.
        engine_class: for tests.

    Attributes:
        version: of the weights every engine has.
        restarts: engines replaced so far.
        memory: `memory.held_memory` of each engine after the last weights.
        before_sampling: called before engines sample; colocated ones are woken there.
    """

    def __init__(
        self,
        config: RunConfig,
        options: Sequence[dict[str, Any]] | None = None,
        *,
        resend: Callable[[list[Any], bool], Any] | None = None,
        engine_class: type[Engine] = Engine,
    ) -> None:
        self.config = config
        self.resend = resend
        self.before_sampling: Callable[[], None] = lambda: None
        self.version = 0
        self.restarts = 0
        self.memory: list[dict[str, float]] = []
        self.timeout_seconds = config.rollout.timeout_seconds
        self._sent = False  # whether the engines have other weights than those of model.path
        self._options = engine_options(config)
        count = config.rollout.engines
        gpus = config.rollout.tensor if ray.cluster_resources().get("GPU") else 0
        # Trainer ranks rest while engines sample; still, whoever shares the machine with others says so by OMP_NUM_THREADS.
        threads = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (os.cpu_count() or 1) // (count * config.rollout.tensor))
        )
        self._actor_classes: list[Any] = []
        for own in options or [{}] * count:
            seen = {"OMP_NUM_THREADS": threads, **own.get("runtime_env", {}).get("env_vars", {})}
            given = {"num_cpus": 0, "num_gpus": gpus, **own, "runtime_env": {"env_vars": seen}}
            self._actor_classes.append(ray.remote(engine_class).options(**given))
        self._actors: list[Any] = [actor_class.remote(self._options) for actor_class in self._actor_classes]
        self._stale: dict[int, Any] = {}  # replaced engines without the current weights → their first answer, to come
        self._calls: dict[Any, _Call] = {}  # of `serve`, to be answered
        self._one_at_a_time = threading.Lock()  # generate
        self._gate = threading.RLock()  # what begins calls, replaces engines or sends weights holds it
        self._closed = False

    @property
    def actors(self) -> list[Any]:
        """Handles of the engines, for `send_weights`. An entry changes when its engine is replaced; one that still starts is left out."""
        return [self._actors[index] for index in self._started]

    def number(self, actor: Any) -> int:
        """Of the engine with this handle."""
        return self._actors.index(actor)

    def start(self) -> list[dict[str, Any]]:
        """Wait until all engines are up. → status of each. Raises UserError naming an engine that cannot start, and why."""
        return [self._ready(index) for index in range(len(self._actors))]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seen: Counter[str] | None = None,
        finished: Callable[[int, tuple[Rollout, ...]], None] | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Group]:
        """n rollouts for every prompt, in order, spread over the engines; the result does not depend on how.

        Args:
            seen: how often ids have come up, when these prompts are a part of more; counted on here.
            finished: called with a prompt's number and rollouts as soon as it has them.

        A prompt of an engine that dies, does not answer within `rollout.timeout_seconds` or has other weights than it should is done again.
        Raises UserError when engines keep dying.
        """
        if set(sampling) != Sampling.__required_keys__:
            raise TypeError(f"generate wants {sorted(Sampling.__required_keys__)}, got {sorted(sampling)}")
        self.before_sampling()
        work = list(zip(range(len(prompts)), prompts, request_seeds(prompts, sampling["seed"], seen), strict=True))
        with self._one_at_a_time:
            try:
                found = self._serve(work, sampling, finished or (lambda *_: None))
            except BaseException:
                self._abandon()
                raise
        return [Group(prompt, found[i]) for i, prompt in enumerate(prompts)]

    def _serve(
        self, work: Sequence[Work], sampling: Sampling, finished: Callable[[int, tuple[Rollout, ...]], None]
    ) -> dict[int, tuple[Rollout, ...]]:
        """All of the work, from one queue: an engine holds as many prompts as it samples at once, or its part where there are fewer."""
        waiting, found, deaths = deque(range(len(work))), dict[int, tuple[Rollout, ...]](), 0
        held: list[tuple[Any, set[int]]] = [(actor, set()) for actor in self._actors]
        most = max(1, min(self._options.max_concurrent // sampling["n"], -(-len(work) // len(self._actors))))

        def begin(engine: int) -> None:
            """The engine's next slice, with more work."""
            actor, numbers = held[engine]
            if actor is not self._actors[engine]:  # replaced: what it had is done again
                waiting.extendleft(sorted(numbers, reverse=True))
                actor, numbers = held[engine] = self._actors[engine], set()
            if engine in self._stale:
                return
            fresh = [waiting.popleft() for _ in range(min(most - len(numbers), len(waiting)))]
            numbers.update(fresh)
            if numbers:
                part = [(i, work[i][1].without_patches(), work[i][2]) for i in fresh]
                call = actor.serve.remote(part, sampling, SLICE_SECONDS)
                self._calls[call] = _Call(engine, actor, self.version, time.monotonic() + self.timeout_seconds)

        while len(found) < len(work):
            # Outside the gate: whoever trains passes it first.
            self._freshen(wait=len(self._stale) == len(self._actors))
            with self._gate:
                busy = {call.engine for call in self._calls.values()}
                for engine in range(len(self._actors)):
                    if engine not in busy:
                        begin(engine)
            call, answer, error = self._next_answer()
            if call is not None and answer is not None:
                done = {number: tuple(rollouts) for number, rollouts in answer.items()}
                found |= done
                for number, rollouts in done.items():
                    finished(number, rollouts)
                held[call.engine][1].difference_update(done)
            if error is not None:
                assert call is not None
                deaths += 1
                if deaths > _MAX_DEATHS:
                    raise UserError(
                        f"rollout engines died {deaths} times in one call, the last was engine {call.engine}: {last_message(error)}; "
                        "look for an out-of-memory kill, or lower rollout.max_concurrent or rollout.gpu_memory_utilization"
                    ) from error
                self._replace(call.engine, call.actor)
        return found

    def _next_answer(self) -> tuple[_Call | None, dict[int, list[Rollout]] | None, RayActorError | None]:
        """(call, finished rollouts, why the engine is dead) of the next call that is answered; nothing where none is under way yet."""
        if self._closed:
            raise UserError("the rollout engines have been shut down")
        pending = dict(self._calls)
        if not pending:
            if starting := list(self._stale.values()):
                ray.wait(starting, num_returns=1, timeout=SLICE_SECONDS)
            return None, None, None
        nearest = min(call.deadline for call in pending.values())
        # A replacement that is ready meanwhile gets its share.
        patience = SLICE_SECONDS if self._stale else nearest - time.monotonic()
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, patience))
        if not ready and time.monotonic() < nearest:
            return None, None, None
        done = ready[0] if ready else min(pending, key=lambda call: pending[call].deadline)
        call = pending[done]
        try:
            version, answer = self._result(done, call.engine, call.actor, None if ready else 0.0)
            if version != call.version:
                ray.kill(call.actor)
                raise RayActorError(error_msg=f"it had weights of version {version}, expected {call.version}")
            return call, answer, None
        except RayActorError as error:
            return call, None, error
        finally:
            del self._calls[done]

    def _abandon(self) -> None:
        """After a failure: engines that live stop sampling what nobody waits for, or it would turn up in the next call."""
        for actor in self._actors:
            actor.abandon.remote()
        self._calls.clear()

    # ---- weights ----------------------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[list[Any]]:
        """Inside, no engine samples: weights may be sent to those that are yielded, and `weights_sent` be called. Then they go on."""
        with self._gate:
            calls = list(self._calls)
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=self.timeout_seconds)
            yield self.actors

    def weights_sent(self, report: Any) -> None:
        """Take note of a finished update (`sync.ray_transfer.SyncReport`): every engine must have its version from now on.

        Engines that died during the update are replaced and sent the weights again.
        """
        with self._gate:
            self.version = report.version
            self._sent = True
            found = self._on_all("status")
            for index, status in found.items():
                self._require_version(index, status, self.version)
                self._stale.pop(index, None)
            self.memory = [status.get("memory", {}) for status in found.values()]

    def fingerprints(self) -> dict[int, dict[str, Fingerprint]]:
        """Of every engine by its number: checksums of the weights it computes with, for `sync.check.compare`."""
        return self._on_all("checksums")

    def status(self) -> list[dict[str, Any]]:
        """Of every engine: process id, weight version, failure. Waits for those that start again."""
        self._freshen(wait=True)
        return list(self._on_all("status").values())

    def sleep(self) -> None:
        """Free the engines' memory for the trainer, see `Engine.sleep`; also of those that still start, which is waited for."""
        self._freshen(wait=True)
        self._on_all("sleep")

    def wake(self, *parts: str) -> None:
        """Take these parts back, see `Engine.wake`. An engine that died meanwhile is replaced by one that is awake."""
        self._on_all("wake", *parts)

    def shutdown(self) -> None:
        """End the engines. The pool cannot be used afterwards; a `generate` of another thread ends with an error."""
        self._closed = True
        for actor in self._actors:
            ray.kill(actor)

    # ---- inside -----------------------------------------------------------------------------------------------------

    @property
    def _started(self) -> list[int]:
        """Engines that are not starting again; all where all are."""
        return [i for i in range(len(self._actors)) if i not in self._stale] or list(range(len(self._actors)))

    def _on_all(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Call a method of every started engine; dead ones are replaced first. → answers by engine"""
        actors = {index: self._actors[index] for index in self._started}
        calls = {index: (actor, getattr(actor, method).remote(*arguments)) for index, actor in actors.items()}

        def answer(index: int, actor: Any, call: Any, may_die: bool) -> Any:
            try:
                return self._result(call, index, actor, self.timeout_seconds)
            except RayActorError as error:
                if not may_die:
                    reason = f"died twice in one call ({method}): {last_message(error)}"
                    raise UserError(f"rollout engine {index} {reason}") from error
                self._replace(index, actor)
                self._freshen(wait=True)
                actor = self._actors[index]
                return answer(index, actor, getattr(actor, method).remote(*arguments), False)

        return {index: answer(index, actor, call, True) for index, (actor, call) in calls.items()}

    def _result(self, call: Any, engine: int, actor: Any, seconds: float | None) -> Any:
        """What a call of an engine returns. RayActorError: the engine is dead; one that does not answer in time is ended."""
        try:
            return ray.get(call, timeout=seconds)
        except GetTimeoutError:
            log.warning(
                "rollout engine %d has not answered for %g s (rollout.timeout_seconds)", engine, self.timeout_seconds
            )
            ray.kill(actor)
            raise RayActorError(
                error_msg=f"no answer within rollout.timeout_seconds={self.timeout_seconds:g}"
            ) from None
        except RayTaskError as error:
            raise from_remote(f"rollout engine {engine}", error) from None

    def _replace(self, index: int, dead: Any) -> None:
        """Begins to start a new engine in the place of this one, unless that has happened."""
        with self._gate:
            if self._actors[index] is not dead or self._closed:
                return
            if self._sent and self.resend is None:
                raise UserError(
                    f"rollout engine {index} died and its replacement cannot get the weights of version {self.version}: "
                    "RolloutPool.resend is not set"
                )
            self.restarts += 1
            log.warning("rollout engine %d died; starting another in its place", index)
            self._actors[index] = self._actor_classes[index].remote(self._options)
            self._stale[index] = self._actors[index].status.remote()

    def _freshen(self, *, wait: bool) -> None:
        """Gives engines that have started again the current weights. wait: for their start, and for the trainer."""
        for index, started in list(self._stale.items()):
            if not (wait or ray.wait([started], timeout=0)[0]):
                continue
            self._ready(index)
            if self.resend is not None:
                report = self.resend([self._actors[index]], wait)
                if report is None:
                    continue
                # While an update is under way the trainer is one version ahead of what has been reported here.
                self._require_version(index, self._ready(index), getattr(report, "version", self.version))
            self._stale.pop(index, None)

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
