"""Conversion on one CPU node, without ranks: HF safetensors ↔ Megatron's torch_dist, streaming, resumable, checked.

The work is cut into units of a few hundred MiB, each written by one process; a unit that is finished leaves a small record,
so that a conversion that was killed goes on where it stopped. All of it happens in a hidden directory beside the output,
which takes the output's name at the end. At most `CHUNK_BYTES` a process stand in memory of their own.

A converted directory holds config.json, tokenizer and processor files too: it is complete, and `load_hf` loads it like an
HF directory, at any layout.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch

from eureka_megatron.checkpoint.store import CHECKSUMS_FILE, problems_of
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.weights.companions import copy_companions
from eureka_megatron.weights.hf_files import (
    MAX_SHARD_BYTES,
    Announced,
    FileTensor,
    Reader,
    as_bytes,
    disk_errors,
    encode_header,
    plan_shards,
    refuse_to_overwrite,
    sync_file,
    sync_files,
    write_index,
)
from eureka_megatron.weights.online import check_hf, check_spare_head, open_checkpoint
from eureka_megatron.weights.splits import Shape
from eureka_megatron.weights.table import Row, expand, hf_metadata, rows
from eureka_megatron.weights.torch_dist import DistReader, Place, Stored, append, stored_rows, stored_shape
from eureka_megatron.weights.torch_dist_metadata import Chunk, KeyedChunk, join_chunks, write_metadata

CHUNK_BYTES = 16 * 2**20  # of one archive
UNIT_BYTES = 512 * 2**20

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class HowToConvert(TypedDict, total=False):
    """See `hf_to_megatron`."""

    workers: int
    verify: bool
    progress: Progress | None


@dataclass(frozen=True)
class RowRange:
    """Rows start … stop-1 of one tensor: of a Megatron parameter (as one rank alone holds it), or of an HF tensor.

    Of an HF tensor: in which file of the output they lie, and from which byte on.
    """

    name: str
    start: int
    stop: int
    nbytes: int
    file: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; travels by pickle. `texts` are further files: name → content."""

    kind: Literal["hf-to-megatron", "megatron-to-hf"]
    source: Path
    target: Path
    dtype: torch.dtype
    units: tuple[tuple[RowRange, ...], ...]
    shards: Mapping[str, Sequence[Announced]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(part.nbytes for unit in self.units for part in unit)


def hf_to_megatron(
    source: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    workers: int = 1,
    verify: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes a torch_dist checkpoint that loads at any layout, from an HF directory in either naming.

    Args:
        dtype: of the written weights; default: that of the source.
        workers: processes that write.
        verify: read everything back and compare bitwise before the output takes its name.

    Raises:
        UserError: naming all tensors or files that are wrong; nothing is left at `output`.
    """
    reader, kind = _open(Path(source), dtype, Reader)
    ranges = [
        RowRange(row.megatron, *bounds)
        for row, _, _ in _stored_rows(reader)
        for bounds in _cut(row.split.shard_shape(row.shapes, 1), kind)
    ]
    job = Job("hf-to-megatron", reader.directory, Path(output), kind, _units(ranges))
    _convert(job, workers=workers, verify=verify, progress=progress)


def megatron_to_hf(
    source: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
    **how: Unpack[HowToConvert],
) -> None:
    """Writes an HF directory in the hub naming from a torch_dist checkpoint, and `texts` (file name → content) beside the weights.

    The other arguments and the errors are as above.
    """
    reader, kind = _open(Path(source), dtype, DistReader)
    plan = [(name, shape, kind) for name, shape in hf_metadata(read_hf_config(source))]
    shards = plan_shards(plan, max_shard_bytes)
    ranges = []
    for file, tensors in shards.items():
        at = len(encode_header(tensors))
        for name, shape, _ in tensors:
            for start, stop, nbytes in _cut(shape, kind):
                ranges.append(RowRange(name, start, stop, nbytes, file, at))
                at += nbytes
    job = Job("megatron-to-hf", reader.directory, Path(output), kind, _units(ranges), shards, texts or {})
    _convert(job, **how)


def _open(source: Path, dtype: torch.dtype | None, wanted: type) -> tuple[Reader | DistReader, torch.dtype]:
    """The checked source, and the dtype to write."""
    table = {row.megatron: row for row in expand(rows(read_hf_config(source)))}
    reader = open_checkpoint(source)
    if not isinstance(reader, wanted):
        form, other = ("torch_dist", "megatron-to-hf") if isinstance(reader, DistReader) else ("HF", "hf-to-megatron")
        raise UserError(f"{source} is a checkpoint in {form} format; {other} converts it")
    if (source / CHECKSUMS_FILE).exists() and (damage := problems_of(source)):
        raise UserError(f"{source} is damaged: {'; '.join(damage)}")
    problems = check_hf(reader, table) or check_spare_head(reader, table, Parallel())
    if problems:
        raise UserError("\n".join(problems))
    found = {reader.tensors[name].dtype for row in table.values() for name in row.hf}
    if dtype is None and len(found) > 1:
        raise UserError(
            f"{source} holds several dtypes ({', '.join(sorted(map(str, found)))}); choose one with --dtype"
        )
    return reader, dtype or found.pop()


def _stored_rows(reader: Reader | DistReader) -> Iterator[tuple[Row, Place, int]]:
    return stored_rows(rows(read_hf_config(reader.directory)))


def _cut(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of ranges of whole rows within `CHUNK_BYTES`."""
    row_bytes = prod(shape[1:]) * dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        yield start, stop, (stop - start) * row_bytes


def _units(ranges: Sequence[RowRange]) -> tuple[tuple[RowRange, ...], ...]:
    units: list[list[RowRange]] = [[]]
    for part in ranges:
        if units[-1] and sum(other.nbytes for other in units[-1]) + part.nbytes > UNIT_BYTES:
            units.append([])
        units[-1].append(part)
    return tuple(map(tuple, units))


# --- running a job ---


def _convert(job: Job, *, workers: int = 1, verify: bool = False, progress: Progress | None = None) -> None:
    output = job.target.absolute()
    refuse_to_overwrite(output)
    work = output.parent / f".{output.name}.converting"
    with disk_errors(output):
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another conversion to {output} is running") from None
            try:
                _convert_in(work, replace(job, target=work / "data"), workers, verify, progress)
                sync_files(work / "data")
                os.rename(work / "data", output)
                sync_file(output.parent)
            except BrokenProcessPool as error:
                reason = "one of the worker processes was killed (by the system, for want of memory?)"
                raise UserError(f"{reason}; the same command goes on where this one stopped") from error
            except Exception:  # a kill or Ctrl-C leaves what is done, to go on from there
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work)


def _convert_in(work: Path, job: Job, workers: int, verify: bool, progress: Progress | None) -> None:
    """Everything, into work/data; units that a killed conversion of the same source finished are kept."""
    plan, plan_file = _fingerprint(job), work / "plan.json"
    if not plan_file.exists() or plan_file.read_text() != plan:
        for part in ("data", "units"):
            shutil.rmtree(work / part, ignore_errors=True)
            (work / part).mkdir()
        for file, shard in job.shards.items():
            header = encode_header(shard)
            with (work / "data" / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(len(header) + sum(prod(shape) * dtype.itemsize for _, shape, dtype in shard))
        plan_file.write_text(plan)
    total = job.total_bytes * (2 if verify else 1)
    done = _run(job, _write_unit, workers, progress, 0, total)
    _finish(job)
    if verify:
        _run(job, _verify_unit, workers, progress, done, total)


def _fingerprint(job: Job) -> str:
    """What must be equal for a conversion to be continued."""
    files = [path for path in job.source.iterdir() if path.is_file()]
    state = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}
    units = [[asdict(part) for part in unit] for unit in job.units]
    return json.dumps({"kind": job.kind, "dtype": str(job.dtype), "source": state, "units": units})


def _run(
    job: Job, function: Callable[[int], int], workers: int, progress: Progress | None, done: int, total: int
) -> int:
    """Runs a function over all units; → bytes done. The first failure ends it."""

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    report(0)
    if workers == 1 or len(job.units) == 1:
        _start(job)
        for unit in range(len(job.units)):
            report(function(unit))
        return done
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(job.units)), context, _start, (job,)) as pool:
        pending = {pool.submit(function, unit) for unit in range(len(job.units))}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_EXCEPTION, timeout=0.5)
                for future in finished:
                    report(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


_job: Job  # of this process; set once by `_start`
_reader: Reader | DistReader


def _start(job: Job) -> None:
    global _job, _reader
    torch.set_num_threads(1)  # processes are the parallelism
    torch.serialization.set_crc32_options(False)  # checksums of the archives, a third of the time
    _job, _reader = job, open_checkpoint(job.source)


def _source(name: str) -> FileTensor | Stored:
    return FileTensor(_reader.tensors[name]) if isinstance(_reader, Reader) else _reader[name]


def _write_unit(unit: int) -> int:
    """Writes one unit unless its record is there; → its bytes."""
    ranges = _job.units[unit]
    record = _job.target.parent / "units" / f"{unit}.json"
    if not record.exists():
        chunks = _write_distcp(unit, ranges) if _job.kind == "hf-to-megatron" else _write_safetensors(ranges)
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps([astuple(chunk) for chunk in chunks]))
        temporary.rename(record)
        # What was read leaves the page cache: pages that are used again at once are cheaper than fresh ones.
        for path in _reader.files:
            sync_file(path, forget=True)
    return sum(part.nbytes for part in ranges)


def _write_distcp(unit: int, ranges: Sequence[RowRange]) -> list[Chunk]:
    known = {row.megatron: (row, place) for row, place, _ in _stored_rows(_reader)}
    chunks = []
    path = _job.target / f"__{unit}_0.distcp"
    with path.open("wb") as file:
        for part in ranges:
            row, place = known[part.name]
            shape = (part.stop - part.start, *row.split.shard_shape(row.shapes, 1)[1:])
            values = torch.empty(shape, dtype=_job.dtype)
            row.split.fill(values, [_source(name) for name in row.hf], start=part.start)
            offsets = (part.start, *(0 for _ in shape[1:]))
            if place.layer is not None:
                offsets, values = (place.layer, *offsets), values[None]
            chunks.append(append(file, values, offsets, path.name))
    sync_file(path, forget=True)  # before the record says so: a node may lose its power
    return chunks


def _write_safetensors(ranges: Sequence[RowRange]) -> list[Chunk]:
    for file_name, group in groupby(ranges, key=lambda part: part.file):
        with (_job.target / file_name).open("r+b") as file:
            for part in group:
                file.seek(part.offset)
                file.write(as_bytes(_source(part.name)[part.start : part.stop].to(_job.dtype)))
        sync_file(_job.target / file_name, forget=True)
    return []


def _finish(job: Job) -> None:
    """Indices and companions, once all units are there."""
    copy_companions(job.source, job.target, job.dtype)
    for name, text in job.texts.items():
        (job.target / name).write_text(text, encoding="utf-8")
    if job.kind == "megatron-to-hf":
        write_index(job.target, job.shards)
        return
    stored = {row.megatron: (row, place, layers) for row, place, layers in _stored_rows(open_checkpoint(job.source))}
    chunks = []
    for unit, ranges in enumerate(job.units):
        record = json.loads((job.target.parent / "units" / f"{unit}.json").read_text())
        for part, (offsets, sizes, *where) in zip(ranges, record, strict=True):
            row, place, layers = stored[part.name]
            chunk = Chunk(tuple(offsets), tuple(sizes), *where)
            chunks.append(KeyedChunk(place.key, stored_shape(row, place, layers), job.dtype, chunk))
    write_metadata(job.target, join_chunks(chunks))


def _verify_unit(unit: int) -> int:
    """Compares what was written with the source, bitwise, range by range; → bytes."""
    written = open_checkpoint(_job.target)
    names = {row.megatron: tuple(row.hf) for row, _, _ in _stored_rows(_reader)}
    different = []
    for part in _job.units[unit]:
        if _job.kind == "megatron-to-hf":
            pairs = [(part.name, slice(part.start, part.stop))]
        else:  # a parameter's HF tensors are compared where its first rows were written
            hf = names[part.name] if part.start == 0 else ()
            pairs = [
                (name, slice(start, stop))
                for name in hf
                for start, stop, _ in _cut(_reader.tensors[name].shape, _job.dtype)
            ]
        for name, bounds in pairs:
            expected = _source(name)[bounds].to(_job.dtype).reshape(-1)
            if not torch.equal(expected.view(torch.uint8), written[name][bounds].reshape(-1).view(torch.uint8)):
                different.append(name)
    if different:
        raise UserError(f"{_job.target}: verification found different values in {', '.join(dict.fromkeys(different))}")
    return sum(part.nbytes for part in _job.units[unit])
