"""Run a function on several real ranks: processes of their own, joined by gloo over loopback.

    def body(rank, factor):                     # at module level, so that another process can import it
        value = torch.tensor(float(rank)) * factor
        dist.all_reduce(value)
        return float(value)

    def test_sum():
        assert run_ranks(body, 4, 10.0) == [60.0] * 4

The processes are forked from a server that has imported torch and Megatron once (multiprocessing's "forkserver"), so a
call costs a fraction of a second rather than an import of seven seconds a rank; no state is shared with the test
process. This module needs no pytest.

Ranks on GPUs are started afresh ("spawn") instead: importing Megatron asks torch for GPUs, and a process that has asked cannot hand them
on by forking ("Cannot re-initialize CUDA in forked subprocess").
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is first imported, here and in the fork server.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PRELOADED = [
    "torch",
    "torch.distributed",
    "megatron.core.models.gpt",
    "megatron.core.dist_checkpointing",
    "transformers.models.qwen2_5_vl",
    "pytest",
    "eureka_megatron.train.trainer",
    "eureka_megatron.train.checkpointing",
    "eureka_megatron.verify",
]
# After the first failure the others usually sit in a collective; they get this long to fail for a reason of their own.
GRACE_SECONDS = 1.0


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds every failed rank's traceback, in order of failing."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 180.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` ranks with `torch.distributed` initialised; the return values, by rank.

    `fn`, `args` and the results travel by pickle. What the ranks print appears afterwards, each line marked `[rank r]`.
    With backend "nccl" rank r uses GPU r; with gloo no rank sees a GPU. All processes started, and whatever they started, are gone when this returns.

    Raises:
        RankError: a rank raised (with its traceback), died, or the time limit passed (with the ranks still running).
    """
    import torch.distributed as dist

    context = multiprocessing.get_context("spawn" if backend == "nccl" else "forkserver")
    if backend != "nccl":
        context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = pickle.dumps((fn, args))
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {})
    ranks: list[tuple[Any, Connection]] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                job = (rank, world_size, store.port, backend, timeout_seconds, environment, payload, folder, sender)
                process = context.Process(target=_child, args=job, name=f"rank-{rank}")
                process.start()
                sender.close()
                ranks.append((process, receiver))
            outcomes = _collect(ranks, timeout_seconds)
        finally:
            for process, receiver in ranks:
                _end(process)
                receiver.close()
            _show_output(Path(folder))
    failures = [text for ok, text in outcomes.values() if not ok]
    if failures:
        raise RankError("\n".join(failures))
    return [outcomes[rank][1] for rank in range(world_size)]


def _collect(ranks: list[tuple[Any, Connection]], timeout_seconds: float) -> dict[int, tuple[bool, Any]]:
    """Outcome (ok, result or failure text) of each rank in the order of arrival; stops soon after the first failure."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(outcomes) < len(ranks):
        waiting = {ranks[rank][1]: rank for rank in range(len(ranks)) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            if all(ok for ok, _ in outcomes.values()):
                stuck = f"ranks {sorted(waiting.values())} still running after {timeout_seconds:g} s"
                outcomes.update({rank: (False, stuck if i == 0 else "") for i, rank in enumerate(waiting.values())})
            return outcomes
        for connection in ready:
            rank = waiting[connection]
            try:
                outcomes[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                ranks[rank][0].join(5)
                code = ranks[rank][0].exitcode
                outcomes[rank] = (False, f"rank {rank} died without a word, exit code {code} (negative: a signal)")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes


def _end(process: Any) -> None:
    """Kill what is left of a rank: its process group, since it leads one, holds whatever it started too."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(5)
    if process.is_alive():  # it had not become a group leader yet
        process.kill()
        process.join(5)


def _show_output(folder: Path) -> None:
    for log in sorted(folder.glob("rank-*.log")):
        for line in log.read_text(errors="replace").splitlines():
            print(f"[{log.stem.replace('-', ' ')}] {line}")


def _child(
    rank: int,
    world_size: int,
    port: int,
    backend: str,
    timeout_seconds: float,
    environment: dict[str, str],
    payload: bytes,
    folder: str,
    sender: Connection,
) -> None:
    """The life of one rank."""
    os.setsid()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(os.path.join(folder, f"rank-{rank}.log"), "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()  # the server's environment is that of the first call in this test run
    os.environ.update(environment)
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        result = _run(rank, world_size, port, backend, timeout_seconds, payload)
        message = pickle.dumps((True, result))
    except BaseException as error:
        message = pickle.dumps((False, f"rank {rank} of {world_size}: {error!r}\n{traceback.format_exc()}"))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(message)
    sender.close()
    os._exit(0)  # interpreter shutdown with open process groups can hang, and nothing is left to do


def _run(rank: int, world_size: int, port: int, backend: str, timeout_seconds: float, payload: bytes) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    limit = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    fn, args = pickle.loads(payload)
    result = fn(rank, *args)
    dist.barrier()  # nobody leaves while another still talks to it
    return result


def _die_with_parent() -> None:
    """A test process that is killed takes its ranks with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)
