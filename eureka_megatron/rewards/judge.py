"""Judging in worker processes with hard limits: a hang, a crash or a memory burst costs that one answer 0.

    with JudgePool(workers=2) as pool:
        verdicts = pool.judge([(response, answer), ...], think="required")   # dicts of `rewards.score`, in order
        pool.timeouts                                                        # answers that cost a limit so far

Workers are plain child processes that import no torch; they start in the background when the pool is made. A worker
that dies is replaced, and the answers it had not reached go back to the queue.

Not pebble's ProcessPool: its workers import the parent's main module, torch with it (5.5 s to start instead of 2.8 s), get their work as
pickles, judge 2,300 answers a second instead of 3,500, and leave running what a hung function of a user has started.
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
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Unpack

from eureka_megatron.rewards.response import Judged, Rewards, as_row
from eureka_megatron.rewards.scoring import ScoringOptions, ScoringRules, score
from eureka_megatron.session import shielded

log = logging.getLogger(__name__)

_START_SECONDS = 120.0  # a cold file system, many ranks importing at once
_GRACE_SECONDS = 2.0  # the worker's own alarm comes first; the parent steps in only if that fails
_CHUNK = 64
_CHUNK_CHARACTERS = 400_000


@dataclass(frozen=True)
class Limits:
    """Of a worker, see `JudgePool`."""

    time_limit_seconds: float = 10.0
    memory_limit_bytes: int = 1024**3
    user_function: str | None = None


class JudgePool:
    """A pool of judge processes; a context manager. Thread-safe, one batch at a time.

    `timeouts` counts the answers so far that got 0 because they broke a limit or the judge.

    Args:
        workers: number of processes.
        time_limit_seconds: for each answer.
        memory_limit_bytes: address space a worker may add to what it holds once it has started.
        user_function: "module:function" or "path.py:function" to call instead of `rewards.score`.
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
        self._limits = Limits(time_limit_seconds, memory_limit_bytes, user_function)
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

    def judge(
        self, samples: Sequence[Judged], rules: ScoringRules | None = None, **options: Unpack[ScoringOptions]
    ) -> list[Rewards]:
        """Verdicts in the order of the samples. One that broke a limit gets zeros; one warning a batch tells how many and why.

        Args:
            samples: records, (response, answer) pairs, or dictionaries for a user's function; anything JSON can carry.
            rules: or, in its place, its fields as keywords.

        Raises:
            RuntimeError: a user's function cannot be loaded or fails on every sample.
        """
        if self._closed:
            raise ValueError("the JudgePool is closed")
        rules, rows = rules or ScoringRules(**options), [as_row(sample) for sample in samples]
        if self._limits.user_function is None:
            score("", "", rules=rules)  # a wrong option is the caller's error, not a failed answer
            rows = [{"response": row["response"], "answer": row["answer"]} for row in rows]
        with self._lock:
            run = _Run(rows, rules, self._workers, self._limits)
            verdicts = run.finish()
        failures = run.reasons.total()
        self.timeouts += failures
        if failures:
            ((reason, _),) = run.reasons.most_common(1)
            if self._limits.user_function and failures == len(samples):
                raise RuntimeError(f"the reward function failed on every one of {len(samples)} answers: {reason}")
            log.warning("%d of %d answers could not be judged and got 0: %s", failures, len(samples), reason)
        return verdicts


class _Worker:
    """One child process, with what it was given and has not answered yet."""

    def __init__(self, limits: Limits) -> None:
        # -S would be faster but hides the virtual environment; one thread: the pool is the parallelism.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        with shielded():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eureka_megatron.rewards.worker", json.dumps(asdict(limits))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if limits.user_function else subprocess.DEVNULL,  # what a user's function prints
                env=environment,
                process_group=0,  # with what a user's function starts: `kill` ends them all
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.work, self.answers = self.process.stdin, self.process.stdout
        self.ready = False
        self.pending: collections.deque[int] = collections.deque()
        self.buffer = b""
        self.deadline = time.monotonic() + _START_SECONDS

    def kill(self) -> None:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.work, self.answers):
            with contextlib.suppress(BrokenPipeError):  # unsent bytes of a dead worker
                pipe.close()


class _Run:
    """One batch on its way through the workers."""

    def __init__(self, rows: list[dict[str, Any]], rules: ScoringRules, workers: list[_Worker], limits: Limits) -> None:
        self.rows, self.rules, self.workers, self.limits = rows, asdict(rules), workers, limits
        self.selector = selectors.DefaultSelector()
        self.queue = collections.deque(range(len(rows)))
        self.verdicts: list[Rewards | None] = [None] * len(rows)
        self.open = len(rows)
        self.reasons: collections.Counter[str] = collections.Counter()  # of answers that could not be judged
        # Small enough chunks that all workers finish together.
        self.chunk = max(1, min(_CHUNK, len(rows) // (4 * len(workers)) + 1))

    def finish(self) -> list[Rewards]:
        with self.selector:
            for worker in self.workers:
                self._register(worker)
            while self.open:
                now = time.monotonic()
                for key, _ in self.selector.select(max(min(w.deadline for w in self._busy()) - now, 0.0)):
                    self._receive(key.data)
                for worker in [w for w in self._busy() if w.deadline < time.monotonic()]:
                    self._replace(worker, overdue=True)
        names = next((verdict.keys() for verdict in self.verdicts if verdict), ("accuracy", "format", "total"))
        return [verdict if verdict is not None else dict.fromkeys(names, 0.0) for verdict in self.verdicts]

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.pending or not worker.ready]

    def _register(self, worker: _Worker) -> None:
        self.selector.register(worker.answers, selectors.EVENT_READ, worker)
        if worker.ready:
            self._feed(worker)
        else:
            worker.deadline = time.monotonic() + _START_SECONDS

    def _feed(self, worker: _Worker) -> None:
        size = 0
        while self.queue and len(worker.pending) < self.chunk and size < _CHUNK_CHARACTERS:
            worker.pending.append(self.queue.popleft())
            values = self.rows[worker.pending[-1]].values()
            size += sum(len(value) if isinstance(value, str) else 100 for value in values)
        if not worker.pending:
            return
        self._allow(worker)
        chunk = {"rules": self.rules, "rows": [(index, self.rows[index]) for index in worker.pending]}
        try:
            worker.work.write(json.dumps(chunk).encode() + b"\n")
            worker.work.flush()
        except BrokenPipeError:  # nothing was judged: no answer is to blame
            self.queue.extendleft(reversed(worker.pending))
            worker.pending.clear()
            self._replace(worker)

    def _allow(self, worker: _Worker) -> None:
        worker.deadline = time.monotonic() + self.limits.time_limit_seconds + _GRACE_SECONDS

    def _receive(self, worker: _Worker) -> None:
        data = os.read(worker.answers.fileno(), 1 << 16)
        if not data:
            self._replace(worker)
            return
        *lines, worker.buffer = (worker.buffer + data).split(b"\n")
        for line in lines:
            index, verdict, reason = json.loads(line)
            if index is not None:
                assert worker.pending.popleft() == index, "a judge worker answers in order"
                self._settle(index, verdict, reason)
            elif reason is not None:
                self._not_started(reason)
            worker.ready = True
        self._allow(worker)
        if not worker.pending:
            self._feed(worker)

    def _settle(self, index: int, verdict: Rewards | None, reason: str | None) -> None:
        self.verdicts[index] = verdict
        self.open -= 1
        if reason is not None:
            self.reasons[reason] += 1

    def _not_started(self, reason: str) -> NoReturn:
        function = self.limits.user_function
        what = f"the reward function {function!r} cannot be loaded" if function else "a judge worker did not start"
        raise RuntimeError(f"{what}: {reason}")

    def _replace(self, worker: _Worker, overdue: bool = False) -> None:
        """The worker died or overran: its current answer gets 0, the others go back to the front of the queue."""
        self.selector.unregister(worker.answers)
        worker.kill()
        code = worker.process.returncode
        overdue = overdue or code == -signal.SIGALRM
        end = f"was ended by a signal: {signal.strsignal(-code)}" if code < 0 else f"ended with exit code {code}"
        if not worker.ready:
            self._not_started(f"its process was not ready in {_START_SECONDS:g} seconds" if overdue else f"it {end}")
        if worker.pending:
            reason = f"it took longer than {self.limits.time_limit_seconds:g} seconds"
            self._settle(worker.pending.popleft(), None, reason if overdue else f"the judge process {end}")
            self.queue.extendleft(reversed(worker.pending))
        fresh = _Worker(self.limits)
        self.workers[self.workers.index(worker)] = fresh
        self._register(fresh)
