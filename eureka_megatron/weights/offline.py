"""Conversion on one CPU node, without ranks: HF safetensors ↔ Megatron's torch_dist, streaming, resumable, checked.

The work is cut into units of a few hundred MiB, each written by one process; a unit that is finished leaves a small record,
so that a conversion that was killed goes on where it stopped. All of it happens in a hidden directory beside the output,
which takes the output's name at the end. Where the dtype stays, values go from file to file through a small buffer; otherwise at most
`WRITTEN_BYTES` a process stand in memory of their own. Nothing of it stays in the page cache.

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
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from eureka_megatron.checkpoint.store import CHECKSUMS_FILE, problems_of
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.weights.companions import copy_companions
from eureka_megatron.weights.hf_files import (
    MAX_SHARD_BYTES,
    Extent,
    Reader,
    as_bytes,
    copy_extent,
    encode_header,
    plan_shards,
    refuse_to_overwrite,
    settle,
    sync_file,
    sync_files,
    write_index,
)
from eureka_megatron.weights.layouts import Shape
from eureka_megatron.weights.online import check_hf, check_spare_head, open_checkpoint
from eureka_megatron.weights.table import Row, expand, hf_metadata, rows
from eureka_megatron.weights.torch_dist import DistReader, Place, append_room, stored_rows, stored_shape
from eureka_megatron.weights.torch_dist_metadata import Chunk, StoredTensor, write_metadata

CHUNK_BYTES = 16 * 2**20  # of one archive
WRITTEN_BYTES = 2**20  # of values made here, at a time: more does not fit the processor's cache, which doubles the time
UNIT_BYTES = 512 * 2**20

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Block:
    """Rows start … stop-1 of one tensor: of a Megatron parameter (as one rank holds it), or of an HF tensor."""

    name: str
    start: int
    stop: int
    nbytes: int
    file: str = ""  # of the HF output
    offset: int = 0  # of the first of these rows in that file, in bytes


@dataclass(frozen=True)
class Job:
    """Everything a worker needs; travels by pickle."""

    kind: str  # "hf-to-megatron" | "megatron-to-hf"
    source: Path
    target: Path
    dtype: torch.dtype
    units: tuple[tuple[Block, ...], ...]
    shards: dict[str, list[tuple[str, Shape, torch.dtype]]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)  # further files: name → content

    @property
    def total_bytes(self) -> int:
        return sum(block.nbytes for unit in self.units for block in unit)


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
        verify: read everything back and compare bitwise before the output takes its name.

    Raises:
        UserError: naming all tensors or files that are wrong; nothing is left at `output`.
    """
    reader, kind = _open(Path(source), dtype, Reader)
    blocks = []
    for row, _, _ in _stored_rows(reader):
        shape = row.layout.shard_shape(row.shapes, 1)
        blocks += [Block(row.megatron, *bounds) for bounds in _cut(shape, kind)]
    _convert(Job("hf-to-megatron", reader.directory, Path(output), kind, _units(blocks)), workers, verify, progress)


def megatron_to_hf(
    source: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    workers: int = 1,
    verify: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes an HF directory in the hub naming from a torch_dist checkpoint, and `texts` (file name → content) beside the weights.

    The other arguments and the errors are as above.
    """
    reader, kind = _open(Path(source), dtype, DistReader)
    metadata = hf_metadata(read_hf_config(source))
    shards = plan_shards([(name, shape, kind) for name, shape in metadata], max_shard_bytes)
    blocks = []
    for file, plan in shards.items():
        at = len(encode_header(plan))
        for name, shape, _ in plan:
            flat = (shape[0], prod(shape[1:])) if len(shape) > 1 else shape
            for start, stop, nbytes in _cut(flat, kind):
                blocks.append(Block(name, start, stop, nbytes, file, at))
                at += nbytes
    job = Job("megatron-to-hf", reader.directory, Path(output), kind, _units(blocks), shards, texts or {})
    _convert(job, workers, verify, progress)


def _open(source: Path, dtype: torch.dtype | None, wanted: type) -> tuple[Reader | DistReader, torch.dtype]:
    """The checked source, and the dtype to write."""
    table = {row.megatron: row for row in expand(rows(read_hf_config(source)))}
    reader = open_checkpoint(source)
    if not isinstance(reader, wanted):
        found, other = ("torch_dist", "megatron-to-hf") if isinstance(reader, DistReader) else ("HF", "hf-to-megatron")
        raise UserError(f"{source} is a checkpoint in {found} format; {other} converts it")
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
    """(start, stop, bytes) of blocks of whole rows within `CHUNK_BYTES`."""
    row_bytes = prod(shape[1:]) * dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        yield start, stop, (stop - start) * row_bytes


def _units(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], ...]:
    units: list[list[Block]] = [[]]
    for block in blocks:
        if units[-1] and sum(other.nbytes for other in units[-1]) + block.nbytes > UNIT_BYTES:
            units.append([])
        units[-1].append(block)
    return tuple(map(tuple, units))


# --- running a job ---


def _convert(job: Job, workers: int, verify: bool, progress: Progress | None) -> None:
    output = job.target.absolute()
    refuse_to_overwrite(output)
    work = output.parent / f".{output.name}.converting"
    try:
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
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{output} cannot be written: {error.strerror or error}{where}; nothing was left") from error


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
    units = [[asdict(block) for block in unit] for unit in job.units]
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


def _write_unit(unit: int) -> int:
    """Writes one unit unless its record is there; → its bytes."""
    blocks = _job.units[unit]
    record = _job.target.parent / "units" / f"{unit}.json"
    if not record.exists():
        chunks = _write_distcp(unit, blocks) if _job.kind == "hf-to-megatron" else _write_safetensors(blocks)
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(chunk) for chunk in chunks]))
        temporary.rename(record)
    return sum(block.nbytes for block in blocks)


def _write_distcp(unit: int, blocks: Sequence[Block]) -> list[Chunk]:
    """First the archives, with room for the values, then the values."""
    known = {row.megatron: (row, place) for row, place, _ in _stored_rows(_reader)}
    file_name = f"__{unit}_0.distcp"
    chunks, rooms = [], []
    with (_job.target / file_name).open("wb") as file:
        for block in blocks:
            row, place = known[block.name]
            shape = (block.stop - block.start, *row.layout.shard_shape(row.shapes, 1)[1:])
            offsets: Shape = (block.start,) + (0,) * (len(shape) - 1)
            if place.layer is not None:
                offsets, shape = (place.layer, *offsets), (1, *shape)
            chunk, room = append_room(file, shape, _job.dtype, offsets, file_name)
            chunks.append(chunk)
            rooms.append(room)
        file.flush()
        for block, room in zip(blocks, rooms, strict=True):
            _fill(file.fileno(), room, block, _MegatronRows(known[block.name][0]))
        settle(file.fileno())  # before the record says so: a node may lose its power
    return chunks


def _write_safetensors(blocks: Sequence[Block]) -> list[Chunk]:
    for file_name, group in groupby(blocks, key=lambda block: block.file):
        with (_job.target / file_name).open("r+b", buffering=0) as file:
            for block in group:
                _fill(file.fileno(), block.offset, block, _HFRows(block.name))
            settle(file.fileno())
    return []


@dataclass(frozen=True)
class _HFRows:
    """Rows of an HF tensor: where they lie, or their values."""

    name: str

    def extents(self, start: int, stop: int) -> list[Extent] | None:
        return _reader.extents(self.name, start, stop) if _reader.tensors[self.name].dtype == _job.dtype else None

    def values(self, start: int, stop: int) -> torch.Tensor:
        return _reader[self.name][start:stop].to(_job.dtype)


@dataclass(frozen=True)
class _MegatronRows:
    """The same of a Megatron parameter, as one rank alone would hold it, from an HF directory."""

    row: Row

    def extents(self, start: int, stop: int) -> list[Extent] | None:
        names, found = list(self.row.hf), []
        for piece in sorted(self.row.layout.pieces(self.row.shapes, 0, 1), key=lambda piece: piece.at_shard[0].start):
            at, rows_ = piece.at_shard[0], piece.at_source[0]
            begin, end = max(at.start, start), min(at.stop, stop)
            if begin < end:
                part = _HFRows(names[piece.source]).extents(
                    rows_.start + begin - at.start, rows_.start + end - at.start
                )
                if part is None:
                    return None
                found += part
        return found

    def values(self, start: int, stop: int) -> torch.Tensor:
        shape = self.row.layout.shard_shape(self.row.shapes, 1)
        values = torch.empty((stop - start, *shape[1:]), dtype=_job.dtype)
        self.row.layout.fill_rows(values, [_reader[name] for name in self.row.hf], start)
        return values


def _fill(target: int, at: int, block: Block, rows_: _HFRows | _MegatronRows) -> None:
    """Writes the values of a block to place `at` of an open file: bytes from file to file, unless dtype or order differ."""
    extents = rows_.extents(block.start, block.stop)
    if extents is not None:
        assert sum(extent.nbytes for extent in extents) == block.nbytes
        for extent in extents:
            copy_extent(extent, target, at)
            at += extent.nbytes
        return
    step = max(1, WRITTEN_BYTES * (block.stop - block.start) // block.nbytes)
    for start in range(block.start, block.stop, step):
        data = as_bytes(rows_.values(start, min(block.stop, start + step)))
        while data:  # one call writes less on a full disk
            written = os.pwrite(target, data, at)
            data, at = data[written:], at + written


def _finish(job: Job) -> None:
    """Indices and companions, once all units are there."""
    copy_companions(job.source, job.target, job.dtype)
    for name, text in job.texts.items():
        (job.target / name).write_text(text, encoding="utf-8")
    if job.kind == "megatron-to-hf":
        write_index(job.target, job.shards)
        return
    tensors: dict[str, StoredTensor] = {}
    chunks: dict[str, list[Chunk]] = {}
    for unit, blocks in enumerate(job.units):
        record = json.loads((job.target.parent / "units" / f"{unit}.json").read_text())
        for block, entry in zip(blocks, record, strict=True):
            chunk = Chunk(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
            chunks.setdefault(block.name, []).append(chunk)
    for row, place, layers in _stored_rows(open_checkpoint(job.source)):
        before = tensors[place.key].chunks if place.key in tensors else ()
        shape = stored_shape(row, place, layers)
        tensors[place.key] = StoredTensor(shape, job.dtype, before + tuple(chunks[row.megatron]))
    write_metadata(job.target, tensors)


def _verify_unit(unit: int) -> int:
    """Compares what was written with the source, bitwise, block by block; → bytes."""
    written = open_checkpoint(_job.target)
    names = {row.megatron: tuple(row.hf) for row, _, _ in _stored_rows(_reader)}
    different = []
    for block in _job.units[unit]:
        if _job.kind == "megatron-to-hf":
            pairs = [(block.name, slice(block.start, block.stop))]
        elif block.start == 0:  # a parameter's HF tensors are compared where its first rows were written
            pairs = [(name, slice(*bounds[:2])) for name in names[block.name] for bounds in _cut_hf(name)]
        else:
            continue
        for name, bounds in pairs:
            expected = _reader[name][bounds].to(_job.dtype).reshape(-1)
            found = written[name][bounds].reshape(-1)
            if not torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
                different.append(name)
    if different:
        raise UserError(f"{_job.target}: verification found different values in {', '.join(dict.fromkeys(different))}")
    return sum(block.nbytes for block in _job.units[unit])


def _cut_hf(name: str) -> Iterator[tuple[int, int, int]]:
    shape = _reader.tensors[name].shape
    return _cut(shape, _job.dtype)
