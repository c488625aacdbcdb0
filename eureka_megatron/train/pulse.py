"""Signs of life of the trainer ranks, and each rank's own log: who has died or stands still, and what was its last word.

Ray reports processes that have ended. One that is stopped, or hangs in a driver, keeps its peers waiting in a collective: so a thread in
every rank says over and over, in Ray's key-value store, that it lives and what its main thread is doing, and the driver looks there while it
waits for answers.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

import ray
from ray.actor import ActorHandle
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from eureka_megatron.errors import UserError

LOGS = "logs"  # in run.output
BEAT_SECONDS = 5.0
_NAMESPACE = "eureka"
_ERROR = re.compile(r"error|exception|fatal|what\(\)|killed|abort", re.IGNORECASE)


def log_file(output: Path, rank: int) -> Path:
    """Where a trainer rank writes what it has to say. A run that is started again appends to it."""
    return output / LOGS / f"rank_{rank:04d}.log"


def keep_log(path: Path) -> None:
    """From now on all output of this process goes to the end of this file, what native code and a crash say too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} {os.uname().nodename} process {os.getpid()}\n".encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()


def last_words(path: Path) -> str:
    """The last error in a rank's log since the rank began, for a message."""
    try:
        lines = path.read_text(errors="replace").rpartition("\n--- ")[2].splitlines()[1:]
    except OSError:
        return f"its log is on its node: {path}"
    errors = [line.strip() for line in lines if _ERROR.search(line) and "Warning" not in line]
    if not errors:
        return f"no error in its log ({path}): look for an out-of-memory kill on its node"
    return f"{errors[-1][:300]} ({path})"


class Pulse(threading.Thread):
    """Of this process, an actor's, until it ends."""

    def __init__(self, seconds: float) -> None:
        super().__init__(name="pulse", daemon=True)
        self._seconds, self._main = seconds, threading.main_thread().ident
        self._key = str(ray.get_runtime_context().get_actor_id()).encode()
        self.start()

    def run(self) -> None:
        beats = 0
        while True:
            beats += 1
            word = {"beats": beats, "doing": doing(sys._current_frames().get(self._main or 0))}
            _internal_kv_put(self._key, json.dumps(word).encode(), overwrite=True, namespace=_NAMESPACE)
            time.sleep(self._seconds)


def doing(frame: FrameType | None) -> str:
    """What a thread is in: a collective and who called it, else the innermost function of ours or Megatron's.

    Example: "all_reduce (megatron/core/tensor_parallel/mappings.py:28)".
    """
    operation, place = "", ""
    while frame is not None and not place:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/torch/distributed/" in path and not path.endswith("c10d_logger.py"):  # which wraps every collective
            operation = name  # the outermost of torch's own: what was asked of it
        elif found := re.search(r"(?:eureka_megatron|megatron)/(?!.*site-packages).*", path):
            place = f"{found[0]}:{frame.f_lineno}"
            operation = operation or name
        frame = frame.f_back
    return f"{operation} ({place})" if place else operation or "nothing"


class Watch:
    """The driver's look at the ranks' signs of life while it waits for a call of theirs."""

    def __init__(self, ranks: Sequence[ActorHandle], limit: float) -> None:
        self._keys, self._limit = [rank._actor_id.hex().encode() for rank in ranks], limit
        self._seen: dict[int, tuple[bytes | None, float]] = {}  # the last sign, and since when there is no newer one

    def look(self, waiting: Iterable[int], call: str) -> None:
        """UserError when one of these ranks has given no sign for `limit` seconds; says what the others wait in."""
        signs, silent = dict[int, bytes | None](), list[int]()
        for rank in waiting:
            signs[rank] = sign = _internal_kv_get(self._keys[rank], namespace=_NAMESPACE)
            before, since = self._seen.get(rank, (None, 0.0))
            if rank not in self._seen or sign != before:
                self._seen[rank] = (sign, time.monotonic())
            elif sign is not None and time.monotonic() - since > self._limit:
                silent.append(rank)
        if silent:
            others = {rank: json.loads(sign)["doing"] for rank, sign in signs.items() if sign and rank not in silent}
            waits = "".join(f"; rank {rank} waits in {what}" for rank, what in list(others.items())[:3])
            raise UserError(
                f"trainer rank {', '.join(map(str, silent))} stands still: no sign of life for {self._limit:g} s "
                f"(training.stall_seconds) during {call!r}{waits}"
            )
