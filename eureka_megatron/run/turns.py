"""Colocated ranks and engines use the same GPUs in turn: whoever works has the memory, the other side rests.

    sampling    engines awake; the optimizer's state in host memory, the gradients' memory free (training.offload)
    training    engines asleep; all of the trainer on the GPU
    a sync      the trainer rests again; engines have their weights, not yet the KV cache

Nobody need say whose turn it is: TrainerGroup and RolloutPool call in before they work. The order of calls is the same on a CPU, where the two sides
share cores and memory.
"""

from __future__ import annotations

from typing import Protocol


class Rests(Protocol):
    def rest(self) -> None: ...
    def resume(self) -> None: ...


class Sleeps(Protocol):
    def sleep(self) -> None: ...
    def wake(self, *parts: str) -> None: ...


class Turns:
    """Begins with the turn of the engines: the trainer rests, they are awake."""

    def __init__(self, trainer: Rests, pool: Sleeps) -> None:
        self._trainer, self._pool = trainer, pool
        self._training = False
        self._asleep: tuple[str, ...] = ()  # parts of the engines

    def train(self) -> None:
        """The trainer's turn."""
        if not self._training:
            self._pool.sleep()
            self._asleep = ("weights", "kv_cache")
            self._trainer.resume()
            self._training = True

    def wake(self, *parts: str) -> None:
        """The engines' turn; of theirs, these parts come back."""
        if self._training:
            self._trainer.rest()
            self._training = False
        if wanted := [part for part in self._asleep if part in parts]:
            self._pool.wake(*wanted)
            self._asleep = tuple(part for part in self._asleep if part not in wanted)

    def sample(self) -> None:
        """The engines' turn, with all that sampling needs."""
        self.wake("weights", "kv_cache")
