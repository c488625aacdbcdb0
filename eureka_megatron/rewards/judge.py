"""Judging in worker processes with hard limits: a hang, a crash or a memory burst costs that one answer 0.

    with JudgePool(workers=2) as pool:
        verdicts = pool.judge([(response, answer), ...], think="required")   # dicts of `rewards.score`, in order
        pool.timeouts                                                        # answers that cost a limit so far

Workers are plain child processes that import no torch; they start in the background when the pool is made. A worker
that dies is replaced, and the answers it had not reached go back to the queue.
"""

import collections
import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from eureka_megatron.rewards.scoring import score
from eureka_megatron.session import shielded

log = logging.getLogger(__name__)

LARGEST_REWARD = 1e18  # sums of squares of rewards stay finite in float32
_START_SECONDS = 120.0  # a cold file system, many ranks importing at once
_GRACE_SECONDS = 2.0  # the worker's own alarm comes first; the parent steps in only if that fails
_CHUNK = 64
_CHUNK_CHARACTERS = 400_000


class JudgePool:
    """A pool of judge processes; a context manager. Thread-safe, one batch at a time.

    workers             number of processes
    time_limit_seconds  for each answer
    memory_limit_bytes  address space a worker may add to what it holds once it has started
    user_function       "module:function" or "path.py:function" to call instead of `rewards.score`
    timeouts            how many answers so far got 0 because they broke a limit or the judge
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        time_limit_seconds: float = 10.0,
        memory_limit_bytes: int = 1024**3,
        user_function: str | None = None,
    ) -> None:
        if workers < 1 or time_limit_seconds <= 0:
            raise ValueError(
                f"JudgePool needs workers >= 1 and a time limit > 0, got {workers} and {time_limit_seconds}"
            )
        self.timeouts = 0
        self._limits = {
            "time_limit_seconds": time_limit_seconds,
            "memory_limit_bytes": memory_limit_bytes,
            "user_function": user_function,
        }
        self._lock = threading.Lock()
        self._workers = [_Worker(self._limits) for _ in range(workers)]
        self._closed = False

    def __enter__(self) -> "JudgePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Further calls of `judge` raise."""
        self._closed = True
        for worker in self._workers:
            worker.kill()

    def judge(self, samples: Sequence[Any], **options: Any) -> list[dict[str, float]]:
        """Verdicts in the order of the samples.

        samples: (response, answer) pairs, or the dictionaries a user function takes; anything JSON can carry.
        options: keyword arguments of `rewards.score`. A sample that broke a limit gets zeros and counts in `timeouts`;
            one warning a batch tells how many and the commonest reason.

        Raises RuntimeError when a user's function cannot be loaded or fails on every sample.
        """
        if self._closed:
            raise ValueError("the JudgePool is closed")
        if self._limits["user_function"] is None:
            score("", "", **options)  # a wrong option is the caller's error, not a failed answer
        with self._lock:
            run = _Run(list(samples), options, self._workers, self._limits)
            verdicts = run.finish()
        self.timeouts += run.failures
        if run.failures:
            ((reason, _),) = run.reasons.most_common(1)
            if self._limits["user_function"] and run.failures == len(samples):
                raise RuntimeError(f"the reward function failed on every one of {len(samples)} answers: {reason}")
            log.warning("%d of %d answers could not be judged and got 0: %s", run.failures, len(samples), reason)
        return verdicts


class _Worker:
    """One child process, with what it was given and has not answered yet."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.limits = limits
        # -S would be faster but hides the virtual environment; one thread: the pool is the parallelism.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        with shielded():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eureka_megatron.rewards.worker", json.dumps(limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if limits["user_function"] else subprocess.DEVNULL,  # what a user's function prints
                env=environment,
                process_group=0,  # with what a user's function starts: `kill` ends them all
            )
        self.ready = False
        self.pending: collections.deque[int] = collections.deque()
        self.buffer = b""
        self.deadline = time.monotonic() + _START_SECONDS

    def send(self, chunk: list[list[Any]]) -> None:
        """May raise BrokenPipeError; then nothing of the chunk counts as sent."""
        self.pending = collections.deque(index for index, _, _ in chunk)
        self.touch()
        self.process.stdin.write(json.dumps(chunk).encode() + b"\n")
        self.process.stdin.flush()

    def touch(self) -> None:
        self.deadline = time.monotonic() + self.limits["time_limit_seconds"] + _GRACE_SECONDS

    def lines(self) -> list[bytes] | None:
        """Complete lines that have arrived; None when the worker is gone."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *complete, self.buffer = (self.buffer + data).split(b"\n")
        return complete

    def kill(self) -> None:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # unsent bytes of a dead worker
                pipe.close()


class _Run:
    """One batch on its way through the workers."""

    def __init__(
        self, samples: list[Any], options: dict[str, Any], workers: list[_Worker], limits: dict[str, Any]
    ) -> None:
        self.samples, self.options, self.workers, self.limits = samples, options, workers, limits
        self.queue = collections.deque(range(len(samples)))
        self.verdicts: list[dict[str, float] | None] = [None] * len(samples)
        self.open = len(samples)
        self.failures = 0
        self.reasons: collections.Counter[str] = collections.Counter()
        # Small enough chunks that all workers finish together.
        self.chunk = max(1, min(_CHUNK, len(samples) // (4 * len(workers)) + 1))

    def finish(self) -> list[dict[str, float]]:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                self._register(selector, worker)
            while self.open:
                now = time.monotonic()
                for key, _ in selector.select(max(min(w.deadline for w in self._busy()) - now, 0.0)):
                    self._receive(selector, key.data)
                for worker in [w for w in self._busy() if w.deadline < time.monotonic()]:
                    self._replace(selector, worker, overdue=True)
        names = next((verdict.keys() for verdict in self.verdicts if verdict), ("accuracy", "format", "total"))
        return [verdict if verdict is not None else dict.fromkeys(names, 0.0) for verdict in self.verdicts]

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.pending or not worker.ready]

    def _register(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        if worker.ready:
            self._feed(selector, worker)
        else:
            worker.deadline = time.monotonic() + _START_SECONDS

    def _feed(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        chunk, size = [], 0
        while self.queue and len(chunk) < self.chunk and size < _CHUNK_CHARACTERS:
            index = self.queue.popleft()
            chunk.append([index, self.samples[index], self.options])
            size += _characters(self.samples[index])
        if not chunk:
            return
        try:
            worker.send(chunk)
        except BrokenPipeError:
            worker.pending.clear()  # nothing was judged: no answer is to blame
            self.queue.extendleft(index for index, _, _ in reversed(chunk))
            self._replace(selector, worker)

    def _receive(self, selector: selectors.BaseSelector, worker: _Worker) -> None:
        lines = worker.lines()
        if lines is None:
            self._replace(selector, worker)
            return
        for line in lines:
            message = json.loads(line)
            if not worker.ready:
                if "error" in message:
                    self._not_started(message["error"])
                worker.ready = True
                continue
            index, verdict, error = message
            assert worker.pending.popleft() == index, "a judge worker answers in order"
            self._settle(index, verdict, error)
        worker.touch()
        if not worker.pending:
            self._feed(selector, worker)

    def _settle(self, index: int, verdict: dict[str, float] | None, reason: str | None) -> None:
        self.verdicts[index] = verdict
        if reason is not None:
            self.failures += 1
            self.reasons[reason] += 1
        self.open -= 1

    def _not_started(self, reason: str) -> NoReturn:
        function = self.limits["user_function"]
        what = f"the reward function {function!r} cannot be loaded" if function else "a judge worker did not start"
        raise RuntimeError(f"{what}: {reason}")

    def _replace(self, selector: selectors.BaseSelector, worker: _Worker, overdue: bool = False) -> None:
        """The worker died or overran: its current answer gets 0, the others go back to the front of the queue."""
        selector.unregister(worker.process.stdout)
        worker.kill()
        code = worker.process.returncode
        overdue = overdue or code == -signal.SIGALRM
        end = f"was ended by a signal: {signal.strsignal(-code)}" if code < 0 else f"ended with exit code {code}"
        if not worker.ready:
            self._not_started(f"its process was not ready in {_START_SECONDS:g} seconds" if overdue else f"it {end}")
        if worker.pending:
            reason = f"it took longer than {self.limits['time_limit_seconds']:g} seconds"
            self._settle(worker.pending.popleft(), None, reason if overdue else f"the judge process {end}")
            self.queue.extendleft(reversed(worker.pending))
        fresh = _Worker(self.limits)
        self.workers[self.workers.index(worker)] = fresh
        self._register(selector, fresh)


def _characters(sample: Any) -> int:
    """Rough size of a sample, to keep chunks of long responses small."""
    parts = sample.values() if isinstance(sample, dict) else sample
    return sum(len(part) if isinstance(part, str) else 100 for part in parts)
