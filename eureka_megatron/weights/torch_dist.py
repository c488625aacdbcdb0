"""Megatron's sharded checkpoint format (`torch_dist`) read and written file by file, without ranks and without Megatron.

The format is that of torch.distributed.checkpoint: `.metadata` (`dist_metadata`) lists, for every tensor, rectangular chunks and where
each lies; a chunk is one `torch.save` archive inside a `.distcp` file. Names are those that Megatron's own `sharded_state_dict`
gives this model: layers of the text decoder are stacked along a leading axis, vision layers are not. Chunks may be cut in any
way (by the tensor ranks of a training run, or by rows here), so a checkpoint loads at any layout.

`DistReader` offers the HF tensors of such a directory, in the manner of `hf_files.Reader`: slices of them are read from the
chunks. Nothing in the files is executed. Why not torch's own reader: see `checkpoint.writer`.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig
from eureka_megatron.weights.hf_files import TensorInfo, as_bytes, read_part
from eureka_megatron.weights.splits import Shape, matrix_shape
from eureka_megatron.weights.table import Row, rows
from eureka_megatron.weights.torch_dist_metadata import METADATA_FILE, Chunk, read_metadata

ALIGNMENT = 64  # bytes; torch aligns values within an archive, so archives are aligned too
TAIL_BYTES = 2**16  # that an archive's own directory fits into


@dataclass(frozen=True)
class Place:
    """Where a Megatron parameter is stored: under `key`, and in which layer of the stack if it is stacked."""

    key: str
    layer: int | None


def places(row: Row) -> list[tuple[Row, Place]]:
    """A row of the table, expanded, and where Megatron stores each of its parameters."""
    if row.stack is None:
        return [(row, Place(row.megatron, None))]
    layers = range(row.stack.layers)
    if row.stack.name == "text":  # a TransformerBlock stacks equal layers
        return [(row.at(i), Place(row.megatron.replace("{i}.", ""), i)) for i in layers]
    return [(row.at(i), Place(row.at(i).megatron, None)) for i in layers]


def stored_shape(row: Row, place: Place, layers: int) -> Shape:
    """Shape of the stored tensor that holds this parameter."""
    shape = row.split.shard_shape(row.shapes, 1)
    return shape if place.layer is None else (layers, *shape)


def stored_rows(patterns: Iterable[Row]) -> Iterator[tuple[Row, Place, int]]:
    """Row without pattern, its place, layers of its stack; rows that are copies of others are not stored."""
    for pattern in patterns:
        if not pattern.copy:
            layers = pattern.stack.layers if pattern.stack else 0
            yield from ((row, place, layers) for row, place in places(pattern))


def rectangles(row: Row, place: Place, r: int, n: int, start: int, stop: int) -> Iterator[tuple[slice, Shape, Shape]]:
    """Values start … stop-1 of shard r of n, flattened, as rectangles of the stored tensor.

    → (which of the flattened values, offsets, sizes); a rectangle's values follow each other. An optimizer that shards its state
    cuts parameters anywhere, so a range begins and ends with parts of rows. Values 2 … 10 of a shard of width 4 that is the right half
    of a stored [3, 8]:

        . . . . . . 2 3     2:4  at (0, 6) of size (1, 2)
        . . . . 4 5 6 7     4:8  at (1, 4) of size (1, 4)
        . . . . 8 9 10 .    8:11 at (2, 4) of size (1, 3)
    """
    shape = row.split.shard_shape(row.shapes, n)
    width, leading = prod(shape[1:]), () if place.layer is None else (place.layer,)
    runs = row.split.runs(row.shapes, r, n)
    while start < stop:
        at, column = divmod(start, width)
        run = next(run for run in runs if run.row <= at < run.row + run.rows)
        rows_ = 1 if column else min((stop - start) // width, run.row + run.rows - at) or 1
        count = min(stop - start, rows_ * width - column)
        offsets: Shape = (run.whole_row + at - run.row,)
        sizes: Shape = (rows_,)
        if len(shape) > 1:
            offsets, sizes = (*offsets, run.column + column), (*sizes, count // rows_)
        yield slice(start, start + count), (*leading, *offsets), (*((1,) * len(leading)), *sizes)
        start += count


# --- reading ---


class DistReader:
    """The HF tensors of a torch_dist directory. `reader[name]` is a `Stored`, which slices like a tensor.

    What does not fit the table shows in `tensors` with its stored name and shape, as it would in an HF directory.
    With a prefix it offers what the optimizer keeps of every weight instead, under the same HF names.
    """

    def __init__(self, directory: str | Path, hf_config: QwenVLConfig, prefix: str = ""):
        self.directory = Path(directory)
        self.stored = read_metadata(self.directory, prefix)
        self.files = sorted({self.directory / chunk.file for t in self.stored.values() for chunk in t.chunks})
        self.tensors: dict[str, TensorInfo] = {}
        self._values: dict[Chunk, TensorInfo] = {}
        self._chunks: dict[Place, list[Chunk]] = {}  # that hold something of a parameter
        self._found: dict[str, tuple[Row, Place, int]] = {}
        used = set()
        # Which backend wrote the checkpoint shows in the names of the norms.
        for local, fused in zip(rows(hf_config), rows(hf_config, backend="te"), strict=True):
            for (row, place), (_, other) in zip(places(local), places(fused), strict=True):
                spelled = next((p for p in (place, other) if p.key in self.stored), None)
                if spelled is None or row.copy:
                    continue
                used.add(spelled.key)
                layers = local.stack.layers if local.stack else 0
                fits = self.stored[spelled.key].shape == stored_shape(row, spelled, layers)
                for source, (name, shape) in enumerate(row.hf.items()):
                    self._found[name] = (row, spelled, source)
                    self._announce(name, spelled.key, shape if fits else self.stored[spelled.key].shape)
        for key in self.stored.keys() - used:
            self._announce(key, key, self.stored[key].shape)

    def _announce(self, name: str, key: str, shape: Shape) -> None:
        dtype = self.stored[key].dtype
        file = self.directory / METADATA_FILE
        self.tensors[name] = TensorInfo(key, shape, dtype, file, 0, prod(shape) * dtype.itemsize)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Stored:
        return Stored(self, *self._found[name])

    def read(self, place: Place, bounds: Sequence[slice], out: Tensor) -> None:
        """Writes a part of a parameter, within `bounds` of what one rank alone would hold, into `out`."""
        if place.layer is not None:
            bounds, out = (slice(place.layer, place.layer + 1), *bounds), out[None]
        if place not in self._chunks:
            layer = bounds[:1] if place.layer is not None else ()
            self._chunks[place] = [c for c in self.stored[place.key].chunks if _common(layer, c) is not None]
        for chunk in self._chunks[place]:
            if parts := _common(bounds, chunk):
                here = zip(parts, bounds, strict=True)
                target = out[tuple(slice(part.start - bound.start, part.stop - bound.start) for part, bound in here)]
                there = zip(parts, chunk.offsets, strict=True)
                read_part(self._lies(chunk, out.dtype), [slice(p.start - at, p.stop - at) for p, at in there], target)

    def _lies(self, chunk: Chunk, dtype: torch.dtype) -> TensorInfo:
        """Where the values of a chunk lie: the archive stores them as they are."""
        if chunk not in self._values:
            path, nbytes = self.directory / chunk.file, prod(chunk.sizes) * dtype.itemsize
            start = _data_offset(path, chunk, nbytes)
            self._values[chunk] = TensorInfo(path.name, chunk.sizes, dtype, path, start, nbytes)
        return self._values[chunk]


def _common(bounds: Sequence[slice], chunk: Chunk) -> list[slice] | None:
    """The part of a chunk within bounds (of the leading axes), in the stored tensor's coordinates; None when there is none."""
    found = [
        slice(max(bound.start, at), min(bound.stop, at + size))
        for bound, at, size in zip(bounds, chunk.offsets, chunk.sizes, strict=False)
    ]
    return found if all(part.start < part.stop for part in found) else None


def _data_offset(path: Path, chunk: Chunk, expected: int) -> int:
    """Where the values begin, from the archive's directory at its end."""
    name, end = f"{path} at byte {chunk.offset}", chunk.offset + chunk.nbytes
    begin = max(chunk.offset, end - TAIL_BYTES)
    with path.open("rb", buffering=0) as file:
        tail = os.pread(file.fileno(), end - begin, begin)
        try:
            with zipfile.ZipFile(BytesIO(tail)) as archive:  # counts from the tail's beginning
                (record,) = [item for item in archive.infolist() if item.filename.endswith("/data/0")]
        except (zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{name}: no archive of one tensor ({error})") from None
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != expected:
            raise UserError(f"{name}: holds {record.file_size} bytes, the metadata says {expected}")
        at = begin + record.header_offset
        # The record's name and extra field stand before its values.
        return at + 30 + sum(struct.unpack("<HH", os.pread(file.fileno(), 4, at + 26)))


class Stored:
    """One HF tensor inside a Megatron tensor. Slicing, in the coordinates of a matrix (see splits), reads what it needs."""

    def __init__(self, reader: DistReader, row: Row, place: Place, source: int):
        self.reader, self.row, self.place, self.source = reader, row, place, source
        self.shape: Shape = row.shapes[source]
        self.dtype = reader.stored[place.key].dtype

    def view(self, *_: int) -> Stored:
        return self  # slices mean a matrix already

    def __getitem__(self, index: slice | Sequence[slice]) -> Tensor:
        shape, asked = matrix_shape(self.shape), (index,) if isinstance(index, slice) else tuple(index)
        bounds = [slice(0, length) for length in shape]
        for axis, bound in enumerate(asked):
            bounds[axis] = slice(*bound.indices(shape[axis])[:2])
        wanted, columns = bounds[0], bounds[1:]
        out = torch.empty([bound.stop - bound.start for bound in bounds], dtype=self.dtype)
        for whole in self.row.split.copies(self.row.shapes, 0, 1):
            copy = whole.clip(wanted.start, wanted.stop)
            if copy.source == self.source and copy.rows > 0:
                at = copy.start - wanted.start
                self.reader.read(self.place, (copy.at_shard, *columns), out[at : at + copy.rows])
        return out


# --- writing ---


class Appended(Protocol):
    """What `append` needs of a file."""

    def write(self, data: Any, /) -> int: ...
    def tell(self) -> int: ...
    def flush(self) -> None: ...


def append(file: Appended, values: Tensor, offsets: Shape, name: str) -> Chunk:
    """Appends one chunk, as `torch.save` would write it, to a .distcp file."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    start = file.tell()
    empty = torch.empty(values.shape, dtype=values.dtype)  # memory that nothing touches is no memory
    try:
        with torch.serialization.skip_data():
            torch.save(empty, _Filled(file, values))  # type: ignore[arg-type]  # it asks for no more
    except RuntimeError as error:  # what torch makes of a full disk
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
    return Chunk(offsets, tuple(values.shape), name, start, file.tell() - start)


class _Filled:
    """A file for `torch.save` that leaves room for values: they are written there, past its archive writer, which would copy them twice."""

    def __init__(self, file: Appended, values: Tensor):
        self.values = values
        self.file, self.write, self.tell, self.flush = file, file.write, file.tell, file.flush

    def seek(self, nbytes: int, whence: int) -> int:
        assert (nbytes, whence) == (self.values.nbytes, os.SEEK_CUR), "the only gap is that of the values"
        return self.file.write(as_bytes(self.values))
