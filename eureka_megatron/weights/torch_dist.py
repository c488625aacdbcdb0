"""Megatron's sharded checkpoint format (`torch_dist`) read and written file by file, without ranks and without Megatron.

The format is that of torch.distributed.checkpoint: `.metadata` (`dist_metadata`) lists, for every tensor, rectangular chunks and where
each lies; a chunk is one `torch.save` archive inside a `.distcp` file. Names are those that Megatron's own `sharded_state_dict`
gives this model: layers of the text decoder are stacked along a leading axis, vision layers are not. Chunks may be cut in any
way (by the tensor ranks of a training run, or by rows here), so a checkpoint loads at any layout.

`DistReader` offers the HF tensors of such a directory, in the manner of `hf_io.Reader`: slices of them are put together from
mapped chunks. Nothing in the files is executed.
"""

from __future__ import annotations

import mmap
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from eureka_megatron.errors import UserError
from eureka_megatron.weights.hf_files import Extent, TensorInfo
from eureka_megatron.weights.layouts import Shape
from eureka_megatron.weights.table import Row, rows
from eureka_megatron.weights.torch_dist_metadata import METADATA_FILE, Chunk, read_metadata

ALIGNMENT = 64  # bytes; torch aligns values within an archive, so archives are aligned too


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
    shape = row.layout.shard_shape(row.shapes, 1)
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
    cuts parameters anywhere, so a range begins and ends with parts of rows.
    """
    shape = row.layout.shard_shape(row.shapes, n)
    width, leading = prod(shape[1:]), () if place.layer is None else (place.layer,)
    runs = row.layout.runs(row.shapes, r, n)
    while start < stop:
        at, column = divmod(start, width)
        run = next(run for run in runs if run.row <= at < run.row + run.rows)
        rows_ = 1 if column else min((stop - start) // width, run.row + run.rows - at) or 1
        count = min(stop - start, rows_ * width - column)
        offsets, sizes = (run.whole_row + at - run.row,), (rows_,)
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

    def __init__(self, directory: str | Path, hf_config: Any, prefix: str = ""):
        self.directory = Path(directory)
        self.stored = read_metadata(self.directory, prefix)
        self.files = sorted({self.directory / chunk.file for t in self.stored.values() for chunk in t.chunks})
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._starts: dict[Chunk, int] = {}  # of the values, in the file
        self._layers: dict[Place, list[Chunk]] = {}
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

    def _chunks(self, place: Place) -> list[Chunk]:
        """Those that hold something of a parameter."""
        if place not in self._layers:
            self._layers[place] = [
                chunk
                for chunk in self.stored[place.key].chunks
                if place.layer is None or chunk.offsets[0] <= place.layer < chunk.offsets[0] + chunk.sizes[0]
            ]
        return self._layers[place]

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self.directory / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]

    def read(self, place: Place, start: int, stop: int, columns: slice, out: Tensor) -> None:
        """Rows start … stop-1 and these columns of a parameter, as one rank alone would hold it, into `out`."""
        layer = () if place.layer is None else (place.layer,)
        for chunk in self._chunks(place):
            row, height = chunk.offsets[len(layer)], chunk.sizes[len(layer)]
            begin, end = max(start, row), min(stop, row + height)
            if begin >= end:
                continue
            block = self._chunk(chunk, out.dtype)
            if layer:
                block = block[layer[0] - chunk.offsets[0]]
            block = block[begin - row : end - row]
            if out.ndim == 1:
                out[begin - start : end - start] = block
                continue
            first, width = chunk.offsets[len(layer) + 1], chunk.sizes[len(layer) + 1]
            left, right = max(columns.start, first), min(columns.stop, first + width)
            if left < right:
                target = out[begin - start : end - start, left - columns.start : right - columns.start]
                target.copy_(block[:, left - first : right - first])

    def extents(self, name: str, start: int, stop: int) -> list[Extent] | None:
        """Where rows start … stop-1 of an HF tensor lie, in order; None when tensor ranks have cut its rows into columns."""
        row, place, source = self._found[name]
        found = []
        for piece in sorted(row.layout.pieces(row.shapes, 0, 1), key=lambda piece: piece.at_source[0].start):
            rows_, at = piece.at_source[0], piece.at_shard[0].start
            begin, end = max(rows_.start, start), min(rows_.stop, stop)
            if piece.source == source and begin < end:
                found.append(self._row_extents(place, at + begin - rows_.start, at + end - rows_.start))
        return None if None in found else [extent for extents in found for extent in extents or ()]

    def _row_extents(self, place: Place, start: int, stop: int) -> list[Extent] | None:
        """The same of rows of a Megatron parameter."""
        stored, leading = self.stored[place.key], 0 if place.layer is None else 1
        found = []
        for chunk in sorted(self._chunks(place), key=lambda chunk: chunk.offsets):
            row, height = chunk.offsets[leading], chunk.sizes[leading]
            begin, end = max(start, row), min(stop, row + height)
            if begin >= end:
                continue
            if chunk.sizes[leading + 1 :] != stored.shape[leading + 1 :]:
                return None
            before = 0 if place.layer is None else (place.layer - chunk.offsets[0]) * height
            row_bytes = prod(chunk.sizes[leading + 1 :]) * stored.dtype.itemsize
            offset = self._start(chunk, stored.dtype) + (before + begin - row) * row_bytes
            found.append(Extent(self.directory / chunk.file, offset, (end - begin) * row_bytes))
        return found

    def _start(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where the values of a chunk begin in its file."""
        if chunk not in self._starts:
            expected = prod(chunk.sizes) * dtype.itemsize
            self._starts[chunk] = _data_offset(self._map(chunk.file), chunk, expected, self.directory)
        return self._starts[chunk]

    def _chunk(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """The values of a chunk, mapped: the archive stores them as they are."""
        data, expected, start = self._map(chunk.file), prod(chunk.sizes) * dtype.itemsize, self._start(chunk, dtype)
        flat = torch.frombuffer(data, dtype=torch.uint8, count=expected, offset=start)
        if start % dtype.itemsize:  # archives follow each other without alignment
            flat = flat.clone()
        return flat.view(dtype).view(chunk.sizes)


def _data_offset(data: mmap.mmap, chunk: Chunk, expected: int, directory: Path) -> int:
    """Where the values begin, from the archive's directory."""
    name = f"{directory / chunk.file} at byte {chunk.offset}"
    try:
        with zipfile.ZipFile(_Section(data, chunk.offset, chunk.nbytes)) as archive:
            (record,) = [item for item in archive.infolist() if item.filename.endswith("/data/0")]
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{name}: no archive of one tensor ({error})") from None
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != expected:
        raise UserError(f"{name}: holds {record.file_size} bytes, the metadata says {expected}")
    at = chunk.offset + record.header_offset
    return (
        at + 30 + int.from_bytes(data[at + 26 : at + 28], "little") + int.from_bytes(data[at + 28 : at + 30], "little")
    )


class _Section:
    """A part of mapped memory as a file, for `zipfile`."""

    def __init__(self, data: mmap.mmap, start: int, size: int):
        self.data, self.start, self.size, self.at = data, start, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        stop = self.size if count < 0 else min(self.size, self.at + count)
        found = self.data[self.start + self.at : self.start + stop]
        self.at = max(self.at, stop)
        return found


class Stored:
    """One HF tensor inside a Megatron tensor. Slicing, in the coordinates of `Layout.hf_view`, reads what it needs."""

    def __init__(self, reader: DistReader, row: Row, place: Place, source: int):
        self.reader, self.row, self.place, self.source = reader, row, place, source
        self.shape: Shape = row.shapes[source]
        self.dtype = reader.stored[place.key].dtype
        self._flat = row.layout.flat_shapes(row.shapes)[source]

    def view(self, *_: int) -> Stored:
        return self  # `hf_view` asks for what the slices mean already

    def __getitem__(self, index: slice | Sequence[slice]) -> Tensor:
        bounds = (index,) if isinstance(index, slice) else tuple(index)
        bounds += tuple(slice(None) for _ in self._flat[len(bounds) :])
        limits = [slice(*bound.indices(length)[:2]) for bound, length in zip(bounds, self._flat, strict=True)]
        wanted, columns = limits[0], limits[1] if len(limits) > 1 else slice(0, 1)
        out = torch.empty([limit.stop - limit.start for limit in limits], dtype=self.dtype)
        for piece in self.row.layout.pieces(self.row.shapes, 0, 1):
            rows_, at = piece.at_source[0], piece.at_shard[0].start
            begin, end = max(rows_.start, wanted.start), min(rows_.stop, wanted.stop)
            if piece.source == self.source and begin < end:
                start = at + begin - rows_.start
                target = out[begin - wanted.start : end - wanted.start]
                self.reader.read(self.place, start, start + end - begin, columns, target)
        return out


# --- writing ---


def append(file: IO[bytes], values: Tensor, offsets: Shape, name: str) -> Chunk:
    """Appends one chunk to a .distcp file. `values` must own its storage: all of it is written."""
    assert values.is_contiguous()
    assert values.untyped_storage().nbytes() == values.nbytes
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    start = file.tell()
    try:
        torch.save(values, file)
    except RuntimeError as error:  # what torch makes of a full disk
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
    return Chunk(offsets, tuple(values.shape), name, start, file.tell() - start)


def append_room(file: IO[bytes], shape: Shape, dtype: torch.dtype, offsets: Shape, name: str) -> tuple[Chunk, int]:
    """Appends a chunk whose values are written later, in place; → it, and where in the file they belong."""
    noted = _Noted(file)
    with torch.serialization.skip_data():
        # Memory that nothing touches is no memory.
        chunk = append(noted, torch.empty(shape, dtype=dtype), offsets, name)
    assert noted.skipped is not None
    return chunk, noted.skipped


class _Noted:
    """A file that knows where `torch.save` left the room for the values."""

    def __init__(self, file: IO[bytes]):
        self.file, self.skipped = file, None
        self.write, self.tell, self.flush = file.write, file.tell, file.flush

    def seek(self, offset: int, whence: int) -> int:
        assert self.skipped is None, "one tensor, one gap"
        self.skipped = self.file.tell()
        return self.file.seek(offset, whence)
