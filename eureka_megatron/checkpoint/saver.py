"""Writes training checkpoints while training goes on: each rank its own file, in a thread; rank 0 completes the directory.

The caller hands over copies in host memory; from then on nothing waits. The threads of all ranks talk over a gloo group of their own,
so a save never meets the collectives of training, and all ranks hear when one of them could not write. Threads, not processes: nothing is
forked under CUDA or gloo, and what they spend their time in (copying, hashing, the disk) does not hold Python's lock.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.checkpoint import store
from eureka_megatron.checkpoint.dist_io import Chunk, StoredTensor, append, write_metadata
from eureka_megatron.checkpoint.hf_io import sync_file
from eureka_megatron.checkpoint.layouts import Shape
from eureka_megatron.checkpoint.release import copy_companions
from eureka_megatron.parallel.runtime import Parallel

SLOWEST_DISK = timedelta(hours=6)  # that a rank waits for the others to have written


@dataclass(frozen=True)
class Block:
    """A rectangle of a stored tensor. `values` lie in host memory and own it."""

    key: str
    shape: Shape  # of the whole stored tensor
    offsets: Shape
    values: Tensor


@dataclass(frozen=True)
class Contents:
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


class Saver:
    """One rank's part of saving. `start` returns at once; one save is under way at a time. Constructing it is a collective.

    What is half-written in the folder is removed: only one run at a time may write there.
    """

    def __init__(self, folder: Path, parallel: Parallel, *, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.rank, self.world = parallel.world.rank, parallel.world.size
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST_DISK)
        self._thread: threading.Thread | None = None
        self._report: Report | None = None
        self._defect: BaseException | None = None
        torch.serialization.set_crc32_options(False)  # of the archives: the checksums cover them
        if self.rank == 0:
            store.remove_unfinished(folder)
        dist.barrier(self._group)

    def start(self, contents: Contents) -> None:
        """Begins to write. The report of the save before must have been fetched."""
        assert self._thread is None, "the last save has not been waited for"
        self._thread = threading.Thread(target=self._run, args=(contents,), name="saver", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether there is a report to fetch without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> Report | None:
        """The report of the last save, once; None when there is none to wait for. Raises what is no fault of the disk: a defect."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, report, defect = None, self._report, self._defect
        self._report = self._defect = None
        if defect is not None:
            raise defect
        return report

    def _run(self, contents: Contents) -> None:
        try:
            self._report = self._save(contents)
        except BaseException as error:
            self._defect = error

    def _save(self, contents: Contents) -> Report:
        started = time.perf_counter()
        directory = self.folder / store.directory_name(contents.step)
        temporary = directory.with_name(directory.name + ".tmp")
        part, problem, defect = None, None, None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            part = _write_part(temporary / f"__{self.rank}_0.distcp", contents)
        except OSError as error:
            problem = _describe(error, temporary)
        except Exception as error:  # the others wait: they are told before it goes on
            problem, defect = f"rank {self.rank}: {error!r}", error
        parts: list[Any] = [None] * self.world
        dist.gather_object((part, problem), parts if self.rank == 0 else None, group=self._group)
        outcome = [(0, "")]
        if self.rank == 0:
            problems = dict.fromkeys(problem for _, problem in parts if problem)
            nbytes = 0
            if not problems:
                try:
                    nbytes = self._complete(temporary, directory, contents, [part for part, _ in parts])
                except OSError as error:
                    problems[_describe(error, temporary)] = None
                except Exception as error:
                    problems[f"rank 0: {error!r}"], defect = None, error
            if problems:
                shutil.rmtree(temporary, ignore_errors=True)
            outcome = [(nbytes, "; ".join(problems))]
        dist.broadcast_object_list(outcome, group_src=0, group=self._group)
        if defect is not None:
            raise defect
        ((nbytes, message),) = outcome
        return Report(contents.step, directory, nbytes, time.perf_counter() - started, message or None)

    def _complete(self, temporary: Path, directory: Path, contents: Contents, parts: list[_Part]) -> int:
        """Rank 0, when every rank has written: index, state, checksums, the name; → bytes."""
        tensors: dict[str, StoredTensor] = {}
        for part in parts:
            for key, tensor in part.tensors.items():
                before = tensors[key].chunks if key in tensors else ()
                tensors[key] = StoredTensor(tensor.shape, tensor.dtype, before + tensor.chunks)
        gaps = [key for key, tensor in tensors.items() if not tensor.covered]
        assert not gaps, f"the ranks' parts do not cover {', '.join(gaps)}"
        write_metadata(temporary, tensors)
        copy_companions(contents.model, temporary, contents.dtype)
        texts = {**contents.texts, store.RANDOM_FILE: store.as_json([part.random for part in parts])}
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        checksums = {part.file: part.checksum for part in parts}
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
    tensors: Mapping[str, StoredTensor]
    random: Mapping[str, Any]


class _Hashed:
    """A file that is written once, from beginning to end, and knows its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self._at = file, hashlib.blake2b(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.file.write(data)
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        self.file.flush()


def _write_part(path: Path, contents: Contents) -> _Part:
    tensors: dict[str, StoredTensor] = {}
    with path.open("wb") as raw:
        file = _Hashed(raw)
        for block in contents.blocks:
            chunk: Chunk = append(file, block.values, block.offsets, path.name)
            before = tensors[block.key].chunks if block.key in tensors else ()
            tensors[block.key] = StoredTensor(block.shape, block.values.dtype, (*before, chunk))
    sync_file(path)
    return _Part(path.name, file.digest.hexdigest(), tensors, contents.random)


def _describe(error: OSError, temporary: Path) -> str:
    return f"{error.filename or temporary}: {error.strerror or error}"
