"""Rollouts of coming steps while the trainer is at work on this one (`training.async_steps`).

The groups of step k + 1 … k + a begin to be collected, one step after the other, when those of step k are handed out. So with a = 1
no response is begun by weights older than one step, and while it lasts it may go on with newer ones (`Rollout.switches`):

    trainer    | train 0 | train 1 | train 2 |          step time: the longer of the two, not their sum
    engines  0 |    1    |    2    |    3    |
                         ↑ weights of step 0 arrive; responses that are not finished go on with them

With a = 0 everything happens in turn, in the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from eureka_megatron.rollout.collector import Collector
from eureka_megatron.types import Group


@dataclass(frozen=True)
class Collected:
    """The groups of a step, and the collector's figures of it."""

    step: int
    groups: list[Group]
    metrics: dict[str, float]


class Ahead:
    """Collects up to `ahead` steps before they are asked for. `close` ends it.

    Args:
        steps: of the run; nothing is collected for later ones.
    """

    def __init__(self, collector: Collector, *, ahead: int, steps: int) -> None:
        self._collector, self._ahead, self._steps = collector, ahead, steps
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._coming: dict[int, Future[Collected]] = {}
        self._before: dict[int, dict[str, Any]] = {}  # the collector's state when a coming step began
        self._snapshot = threading.Lock()

    def take(self, step: int) -> Collected:
        """The groups of this step, waited for; those of the next ones begin. Raises what went wrong while they were collected."""
        if self._ahead:
            self._begin(step)
        # A run that is resumed with less lookahead still has what was ready.
        found = self._coming.pop(step).result() if step in self._coming else self._collect(step)
        self._before.pop(step)
        for later in range(step + 1, min(step + self._ahead, self._steps - 1) + 1):
            self._begin(later)
        return found

    def state_dict(self, *, wait: bool) -> dict[str, Any]:
        """The collector's state and "ready": what is collected, in order of steps. Steps that are not finished will be collected again, from the
        state before them, so no prompt is lost and none used twice.

        wait: for the steps that are under way, so that a resumed run trains on the very same responses.
        """
        ready: list[Collected] = []
        for step, coming in sorted(self._coming.items()):
            if wait:
                futures.wait([coming])
            if not coming.done() or coming.exception():
                with self._snapshot:
                    return {**(self._before.get(step) or self._collector.state_dict()), "ready": ready}
            ready.append(coming.result())
        return {**self._collector.state_dict(), "ready": ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ready: Sequence[Collected] = state["ready"]
        self._collector.load_state_dict({name: value for name, value in state.items() if name != "ready"})
        for found in ready:
            self._before[found.step] = {}
            self._coming[found.step] = Future()
            self._coming[found.step].set_result(found)

    def close(self) -> None:
        """Waits for the thread, whose engines must have been told to stop."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int) -> None:
        if step not in self._coming:
            self._coming[step] = self._threads.submit(self._collect, step)

    def _collect(self, step: int) -> Collected:
        with self._snapshot:
            self._before[step] = self._collector.state_dict()
        groups = self._collector.collect(step)
        return Collected(step, groups, self._collector.metrics)
