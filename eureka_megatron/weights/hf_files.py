"""Streaming safetensors: a reader that maps files into memory, a writer that appends tensor after tensor.

The reader looks at every header first, so that all that is wrong with a checkpoint is known before any weight moves;
tensors are then views of the mapped files, and slicing one reads only the bytes it touches. The writer needs the list
of tensors beforehand and never holds more than one. Pickled weights are refused: loading one runs the code inside.

File format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from eureka_megatron.errors import UserError
from eureka_megatron.weights.splits import Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 50 * 10**9  # the default of transformers 5
MAX_HEADER_BYTES = 100 * 10**6  # the safetensors library's own limit
BAND_BYTES = 16 * 2**20  # read at once where only some columns are wanted

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A tensor to be written: name, shape, dtype.
Announced = tuple[str, Shape, torch.dtype]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. Example: TensorInfo("lm_head.weight", (384, 128), torch.bfloat16, path, 10248, 98304)."""

    name: str
    shape: Shape
    dtype: torch.dtype
    file: Path
    offset: int  # bytes from the beginning of the file
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; UserError when it is truncated, damaged or of another format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{path}: truncated or not safetensors ({size} bytes, header of {length} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: the header is not JSON ({error})") from None
    begin = 8 + length
    tensors = {
        name: _parse_entry(path, name, entry, begin, size) for name, entry in header.items() if name != "__metadata__"
    }
    used = sum(info.nbytes for info in tensors.values())
    if used != size - begin:
        raise UserError(f"{path}: holds {size - begin} bytes of data, its header describes {used}")
    return tensors


def _parse_entry(path: Path, name: str, entry: object, begin: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]  # type: ignore[index]
        nbytes = int(stop) - int(start)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: the header's entry of {name!r} is damaged: {entry!r}") from None
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name!r} has dtype {dtype!r}, which is not supported")
    if nbytes != prod(shape) * DTYPES[dtype].itemsize or start < 0:
        raise UserError(f"{path}: {name!r} of shape {shape} and dtype {dtype} cannot take {nbytes} bytes")
    if begin + stop > size:
        raise UserError(f"{path}: truncated: {name!r} ends at byte {begin + stop}, the file at {size}")
    return TensorInfo(name, shape, DTYPES[dtype], path, begin + start, nbytes)


def read_part(info: TensorInfo, bounds: Sequence[slice], out: Tensor) -> None:
    """Writes info[bounds] into `out`, of the same shape and dtype. OSError when the file ends before.

    Bytes that follow each other go straight into `out`; else whole rows are read and what is wanted of them is copied. Of a [3, 4] matrix:

        [1:3, :]  . . . .     [1:2, 1:3]  . . . .     [0:2, 1:3]  r x x r     r: read, not wanted
                  x x x x                 . x x .                 r x x r
                  x x x x                 . . . .                 . . . .

    Not through a map: its page faults make a conversion take three times as long.
    """
    axis = next((i for i, bound in enumerate(bounds) if bound.stop - bound.start > 1), len(bounds) - 1)
    whole = [slice(0, length) for length in info.shape[axis + 1 :]]
    row_bytes = prod(info.shape[axis + 1 :]) * info.dtype.itemsize
    if list(bounds[axis + 1 :]) == whole and out.is_contiguous():
        at = info.offset + info.dtype.itemsize * sum(
            bound.start * prod(info.shape[i + 1 :]) for i, bound in enumerate(bounds)
        )
        _read_bytes(info.file, at, as_bytes(out))
        return
    step, band = max(1, BAND_BYTES // row_bytes), bounds[axis]
    for start in range(band.start, band.stop, step):
        stop = min(band.stop, start + step)
        rows = torch.empty((*(1,) * axis, stop - start, *info.shape[axis + 1 :]), dtype=info.dtype)
        read_part(info, (*bounds[:axis], slice(start, stop), *whole), rows)
        here = out.narrow(axis, start - band.start, stop - start)
        here.copy_(rows[(slice(None),) * (axis + 1) + tuple(bounds[axis + 1 :])])


def _read_bytes(path: Path, at: int, out: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        while len(out):
            count = os.preadv(file.fileno(), [out], at)
            if not count:
                raise OSError(errno.EIO, f"ends before byte {at + len(out)}", str(path))
            out, at = out[count:], at + count


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, seen as a matrix where it has more axes. Rows are read when asked for, into memory of their own."""

    info: TensorInfo

    @property
    def shape(self) -> Shape:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    def view(self, rows: int, _: int) -> FileTensor:
        return FileTensor(replace(self.info, shape=(rows, prod(self.shape[1:]))))

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        bounds = [slice(*rows.indices(self.shape[0])[:2]), *(slice(0, length) for length in self.shape[1:])]
        out = torch.empty([bound.stop - bound.start for bound in bounds], dtype=self.dtype)
        read_part(self.info, bounds, out)
        return out[(slice(None), *columns)]


class Reader:
    """The tensors of a checkpoint directory, one file or several with an index; `reader[name]` maps a tensor.

    `rename` turns stored names into those the reader goes by (`TensorInfo.name` stays the stored one).
    Raises UserError when opened on missing shards, damaged headers, an index and files that disagree, or pickles.
    """

    def __init__(self, directory: str | Path, rename: Callable[[str], str] = str):
        self.directory = Path(directory)
        self.files, index = self._find_files()
        self.tensors: dict[str, TensorInfo] = {}
        problems = []
        for file in self.files:
            try:
                header = read_header(file)
            except UserError as error:
                problems.append(str(error))
                continue
            if index is not None:
                problems += _disagreements(file, header, index)
            for stored, info in header.items():
                name = rename(stored)
                if name in self.tensors:
                    other = self.tensors[name]
                    problems.append(f"{file}: {stored} is in {other.file.name} too, as {other.name}")
                self.tensors[name] = info
        if problems:
            raise UserError("\n".join(problems))
        self._maps: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A read-only view of the mapped file; nothing is read until values are used."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.file not in self._maps:
            with info.file.open("rb") as file:
                # A private mapping: torch wants writable memory, and a write by mistake must not reach the file.
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._maps[info.file], dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        if info.offset % info.dtype.itemsize:  # legal in the format, but torch's kernels want aligned addresses
            flat = flat.clone()
        return flat.view(info.dtype).view(info.shape)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def _find_files(self) -> tuple[list[Path], dict[str, str] | None]:
        """Files to read, and the index's name → file when there is one; a single model.safetensors wins."""
        single, index_path = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if single.exists():
            return [single], None
        if index_path.exists():
            index = _read_index(index_path)
            names = sorted(set(index.values()))
            absent = [name for name in names if not (self.directory / name).is_file()]
            if absent:
                raise UserError(f"{index_path} names files that are absent: {', '.join(absent)}")
            return [self.directory / name for name in names], index
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a directory")
        loose = sorted(path.name for path in self.directory.glob("*.safetensors"))
        pickles = sorted(p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if loose:
            raise UserError(f"{self.directory}: {INDEX_FILE} is missing beside {', '.join(loose)}")
        if pickles:
            raise UserError(
                f"{self.directory}: {', '.join(pickles)}: pickled weights are not read, they can run code; "
                "save them as safetensors first (transformers' save_pretrained does)"
            )
        raise UserError(f"{self.directory}: found neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors index: {error!r}") from None
    strange = sorted({file for file in names.values() if Path(file).name != file or not file.endswith(".safetensors")})
    if strange:
        raise UserError(f"{path} names files that are no safetensors files of this directory: {', '.join(strange)}")
    return names


def _disagreements(file: Path, header: dict[str, TensorInfo], index: dict[str, str]) -> list[str]:
    said = {name for name, place in index.items() if place == file.name}
    problems = [f"{file}: lacks {name}, which the index places there" for name in sorted(said - set(header))]
    return problems + [
        f"{file}: holds {name}, which the index does not place there" for name in sorted(set(header) - said)
    ]


class Writer:
    """Writes tensors, in the announced order, as model.safetensors or as shards with an index, like transformers.

    >>> with Writer(directory, [("a", (2,), torch.float32)]) as writer:
    ...     writer.write("a", torch.zeros(2))

    Left out: atomicity. Write into `atomic_directory`.
    """

    def __init__(self, directory: str | Path, plan: Iterable[Announced], *, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.directory = Path(directory)
        self.shards = plan_shards(list(plan), max_shard_bytes)
        self._steps = self._run_through()
        self._expected: Announced | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Writer:
        self._expected = next(self._steps, None)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            assert self._expected is None, f"the checkpoint ends before {self._expected}"
            write_index(self.directory, self.shards)

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor; names, shapes and dtypes must come exactly as announced."""
        found = (name, tuple(tensor.shape), tensor.dtype)
        assert found == self._expected, f"announced {self._expected}, got {found}"
        assert self._file is not None
        self._file.write(as_bytes(tensor))
        self._expected = next(self._steps, None)

    def _run_through(self) -> Iterator[Announced]:
        """Opens each file, writes its header and waits until its tensors have been appended."""
        for file, plan in self.shards.items():
            with (self.directory / file).open("wb") as self._file:
                self._file.write(encode_header(plan))
                yield from plan
                self._file.flush()
                os.fsync(self._file.fileno())


def write_index(directory: Path, shards: Mapping[str, Sequence[Announced]]) -> None:
    """model.safetensors.index.json for these files and their tensors; one file alone has none."""
    if len(shards) == 1:
        return
    plan = [item for shard in shards.values() for item in shard]
    index = {
        "metadata": {
            "total_parameters": sum(prod(shape) for _, shape, _ in plan),
            "total_size": sum(prod(shape) * dtype.itemsize for _, shape, dtype in plan),
        },
        "weight_map": {name: file for file, shard in shards.items() for name, _, _ in shard},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def plan_shards(plan: Sequence[Announced], max_shard_bytes: int) -> dict[str, list[Announced]]:
    """File name → its tensors: filled in order up to the limit; a larger tensor gets a file of its own."""
    shards: list[list[Announced]] = [[]]
    filled = 0
    for name, shape, dtype in plan:
        nbytes = prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, dtype))
        filled += nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def encode_header(plan: Sequence[Announced]) -> bytes:
    """Length and JSON header of a file whose data are these tensors, one after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype in plan:
        stop = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return len(text).to_bytes(8, "little") + text


def as_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they stand in a file (little endian); no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Makes a UserError of what the disk says while `output` is being made."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{output} cannot be written: {error.strerror or error}{where}; nothing was left") from error


@contextlib.contextmanager
def atomic_directory(output: str | Path) -> Iterator[Path]:
    """A temporary directory beside `output` that takes its name when the block ends well, and vanishes otherwise.

    UserError when `output` exists and is not an empty directory, and on a full disk or missing permission.
    """
    output = Path(output).absolute()
    refuse_to_overwrite(output)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp's is for the owner only
            yield temporary
            sync_files(temporary)
            os.rename(temporary, output)
            sync_file(output.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync_file(path: Path, *, forget: bool = False) -> None:
    """Waits until the disk has a file's content, or a directory's names; `forget`: takes it out of the page cache, for others."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if forget:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def sync_files(directory: Path) -> None:
    """Waits until the disk has everything in a flat directory: it may take its final name then."""
    for path in sorted(directory.iterdir()):
        sync_file(path)
    sync_file(directory)


def refuse_to_overwrite(output: str | Path) -> None:
    """UserError when `output` exists, unless it is an empty directory."""
    output = Path(output)
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists and is not overwritten; remove it or choose another output")
