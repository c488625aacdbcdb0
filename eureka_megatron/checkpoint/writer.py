"""Writes training checkpoints while training goes on: each rank its own file, in a thread; rank 0 completes the directory.

The caller hands over copies in host memory; from then on nothing waits. The threads of all ranks talk over a gloo group of their own,
so a save never meets the collectives of training, and all ranks hear when one of them could not write. Threads, not processes: nothing is
forked under CUDA or gloo, and what they spend their time in (copying, hashing, the disk) does not hold Python's lock.

Why not torch's `async_save` or Megatron's `dist_checkpointing`, whose format this is (tools/benchmark/checkpoint.py, 1 GiB, CPU, torch 2.13):
torch's holds the caller up less (1.7 s, 4.2 s here), takes less memory (800 MiB, 1,024 here) and as long to the last byte (17.3 s, 17.8 s:
the disk); loading a quarter of every tensor takes it 2.9 s, 0.7 s here, as chunks are unpickled whole. What decides: both unpickle `.metadata`
and so run whatever code a foreign one names (the script shows it); Megatron's asynchronous writer forks or spawns processes; neither knows a
range of a flattened shard without a planner of ours, nor checksums, nor a directory that appears whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.checkpoint import store
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.weights.companions import copy_companions
from eureka_megatron.weights.hf_files import sync_file
from eureka_megatron.weights.splits import Shape
from eureka_megatron.weights.torch_dist import append
from eureka_megatron.weights.torch_dist_metadata import KeyedChunk, join_chunks, write_metadata

SLOWEST_DISK = timedelta(hours=6)  # that a rank waits for the others to have written


@dataclass(frozen=True)
class Block:
    """A rectangle of a stored tensor of `shape`. `values` lie in host memory and own it."""

    key: str
    shape: Shape
    offsets: Shape
    values: Tensor


@dataclass(frozen=True)
class Share:
    """What one rank adds to a checkpoint. `texts` (file name → content) and `model` count on rank 0 only.

    `random` are the random states of this rank, plain values. `model` is where config.json and the tokenizer's files come from.
    """

    step: int
    blocks: Sequence[Block]
    random: Mapping[str, Any]
    texts: Mapping[str, str]
    model: Path
    dtype: torch.dtype


@dataclass(frozen=True)
class Report:
    """How a save ended, the same on all ranks. `error` says what went wrong; without one the checkpoint is there."""

    step: int
    directory: Path
    nbytes: int
    seconds: float
    error: str | None


class CheckpointWriter:
    """One rank's part of a save. `start` returns at once; one save is under way at a time. Constructing it is a collective.

    One run at a time writes into a folder: rank 0 holds a lock from the first save on. What is half-written there is removed then.
    """

    def __init__(self, folder: Path, parallel: Parallel, *, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.rank, self.world = parallel.world.rank, parallel.world.size
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
        self._saving: Future[Report] | None = None
        self._lock: IO[bytes] | None = None
        torch.serialization.set_crc32_options(False)  # of the archives: the checksums cover them

    def start(self, share: Share) -> None:
        """Begins to write. The report of the save before must have been fetched."""
        assert self._saving is None, "the last save has not been waited for"
        saving = self._saving = Future()

        def run() -> None:
            try:
                saving.set_result(self._save(share))
            except BaseException as error:
                saving.set_exception(error)

        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether there is a report to fetch without waiting."""
        return self._saving is not None and self._saving.done()

    def wait(self) -> Report | None:
        """The report of the last save, once; None when there is none to wait for. Raises what is no fault of the disk: a defect."""
        saving, self._saving = self._saving, None
        return None if saving is None else saving.result()

    def _save(self, share: Share) -> Report:
        started = time.perf_counter()
        directory = self.folder / store.directory_name(share.step)
        temporary = directory.with_name(directory.name + ".tmp")

        def report(nbytes: int, error: str | None = None) -> Report:
            return Report(share.step, directory, nbytes, time.perf_counter() - started, error)

        # Each step is done by whom it concerns, then everybody hears whether it went well.
        _, problem = self._step(lambda: self._prepare(temporary), on=0)
        if problem:
            return report(0, problem)
        part, problem = self._step(lambda: _write_part(temporary / f"__{self.rank}_0.distcp", share))
        parts: list[Any] = [None] * self.world
        dist.gather_object(part, parts if self.rank == 0 else None, group=self._group, group_dst=0)
        nbytes = None
        if not problem:
            nbytes, problem = self._step(lambda: self._complete(temporary, directory, share, parts), on=0)
        if problem:
            self._step(lambda: shutil.rmtree(temporary, ignore_errors=True), on=0)
        return report(nbytes or 0, problem)

    def _step(self, action: Callable[[], Any], on: int | None = None) -> tuple[Any, str | None]:
        """(result of an action here, what went wrong anywhere). `on`: the only rank that acts; None: all do.

        A disk's errors are problems; any other error is a defect, raised here when everybody has heard of it.
        """
        result, problem, defect = None, None, None
        if on in (None, self.rank):
            try:
                result = action()
            except OSError as error:
                problem = f"{error.filename or self.folder}: {error.strerror or error}"
            except Exception as error:
                problem, defect = f"rank {self.rank}: {error!r}", error
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=self._group)
        if defect is not None:
            raise defect
        return result, "; ".join(dict.fromkeys(filter(None, problems))) or None

    def _prepare(self, temporary: Path) -> None:
        """Rank 0, before anybody writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            lock = (self.folder / store.LOCK_FILE).open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(errno.EBUSY, "another run saves its checkpoints here", str(self.folder)) from None
            except OSError as error:  # some network file systems know no locks
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
            store.remove_unfinished(self.folder)
            self._lock = lock
        temporary.mkdir()

    def _complete(self, temporary: Path, directory: Path, share: Share, parts: list[_Part]) -> int:
        """Rank 0, when every rank has written: index, state, checksums, the name; → bytes."""
        tensors = join_chunks(chain.from_iterable(part.chunks for part in parts))
        gaps = [key for key, tensor in tensors.items() if not tensor.covered]
        assert not gaps, f"the ranks' parts do not cover {', '.join(gaps)}"
        write_metadata(temporary, tensors)
        copy_companions(share.model, temporary, share.dtype)
        texts = {**share.texts, store.RANDOM_FILE: store.as_json([part.random for part in parts])}
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        checksums = {part.file: part.checksum for part in parts}
        _await_files(temporary, checksums)
        for path in sorted(temporary.iterdir()):
            if path.name not in checksums:
                sync_file(path)
                checksums[path.name] = store.checksum(path)
        store.write_through(temporary / store.CHECKSUMS_FILE, store.checksum_lines(checksums))
        nbytes = sum(path.stat().st_size for path in temporary.iterdir())
        store.commit(temporary, directory)
        store.prune(self.folder, self.keep_last, self.keep_every)
        return nbytes


@dataclass(frozen=True)
class _Part:
    """What a rank has written."""

    file: str
    checksum: str
    chunks: Sequence[KeyedChunk]
    random: Mapping[str, Any]


class HashedFile:
    """A file that is written once, from beginning to end, and knows its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self._at = file, hashlib.blake2b(), 0
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.file.write(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at


def _write_part(path: Path, share: Share) -> _Part:
    try:
        with path.open("wb") as raw:
            file = HashedFile(raw)
            chunks = [
                KeyedChunk(
                    block.key, block.shape, block.values.dtype, append(file, block.values, block.offsets, path.name)
                )
                for block in share.blocks
            ]
        sync_file(path)
    except OSError as error:  # a full disk shows when writing, and then names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return _Part(path.name, file.digest.hexdigest(), chunks, share.random)


def _await_files(directory: Path, names: Iterable[str], seconds: float = 60.0) -> None:
    """Until the other ranks' files are seen here; a network file system may show them a little later."""
    deadline = time.monotonic() + seconds
    while absent := [name for name in names if not (directory / name).is_file()]:
        if time.monotonic() > deadline:
            raise OSError(
                errno.ENOENT, f"{', '.join(absent)} cannot be seen: all nodes must share this folder", str(directory)
            )
        time.sleep(0.5)
