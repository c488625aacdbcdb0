"""The index of a `torch_dist` directory: which tensors it holds, and in which file each rectangular chunk of them lies.

`.metadata` is a pickle of torch.distributed.checkpoint's records. Reading it runs no code: records of our own stand in for torch's,
and whatever else a pickle might name is refused.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eureka_megatron.errors import UserError
from eureka_megatron.weights.splits import Shape

METADATA_FILE = ".metadata"
FORMAT_FILE = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Parts of a training checkpoint that are no weights.
NO_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine_state")
# What an optimizer keeps of a parameter stands under the parameter's key behind this; Megatron's own spelling.
STATE_PREFIX = "optimizer.state.{kind}."


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor, in the tensor's coordinates. `offset` and `nbytes` bound its archive in `file`."""

    offsets: Shape
    sizes: Shape
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def covered(self) -> bool:
        """Whether the chunks, which never overlap, are all of it."""
        return sum(prod(chunk.sizes) for chunk in self.chunks) == prod(self.shape)


class KeyedChunk(NamedTuple):
    """A chunk and the stored tensor it is part of."""

    key: str
    shape: Shape
    dtype: torch.dtype
    chunk: Chunk


def join_chunks(chunks: Iterable[KeyedChunk]) -> dict[str, StoredTensor]:
    """Key → stored tensor, of chunks in any order."""
    together: dict[str, list[KeyedChunk]] = {}
    for keyed in chunks:
        together.setdefault(keyed.key, []).append(keyed)
    return {
        key: StoredTensor(found[0].shape, found[0].dtype, tuple(keyed.chunk for keyed in found))
        for key, found in together.items()
    }


class _Record:
    """In place of any class of the format's libraries: fields, no code. (Importing torch's own would take a second, besides.)"""

    def __init__(self, *_: object, **__: object): ...

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class _IndexRecord(_Record):
    """MetadataIndex: the name of a tensor and the offsets of a chunk; `index` is a hint that does not count."""

    fqn: str
    offset: Shape | None = None  # of records without a place, such as random states

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _IndexRecord) and (self.fqn, self.offset) == (other.fqn, other.offset)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the records of `.metadata` and nothing else."""

    ALLOWED = (
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.distributed.checkpoint.metadata", "MetadataIndex"):
            return _IndexRecord
        ours = module.startswith(("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing."))
        if ours or (module, name) == ("torch.serialization", "_get_layout"):
            return _Record
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.ALLOWED:
            raise UserError(f"names {module}.{name}, which has no place in a checkpoint's metadata; not loaded")
        return super().find_class(module, name)


def read_metadata(directory: Path, prefix: str = "") -> dict[str, StoredTensor]:
    """Name → stored tensor, of the weights, or of what stands behind a prefix (taken off the names).

    UserError when files are missing, truncated or of another format.
    """
    path = directory / METADATA_FILE
    try:
        said = json.loads((directory / FORMAT_FILE).read_text())
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist: the checkpoint is incomplete") from None
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None
    if said.get("sharded_backend") != "torch_dist":
        raise UserError(
            f"{directory / FORMAT_FILE}: sharded_backend is {said.get('sharded_backend')!r}, need 'torch_dist'"
        )
    tensors: dict[str, StoredTensor] = {}
    ends: dict[str, int] = {}
    places_ = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    for name, entry in metadata.state_dict_metadata.items():
        wanted = name.startswith(prefix) if prefix else not name.startswith(NO_WEIGHTS)
        if hasattr(entry, "chunks") and wanted:  # TensorStorageMetadata
            chunks = []
            for chunk in entry.chunks:
                info = places_[name, chunk.offsets]
                where = str(info.relative_path)
                chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), where, info.offset, info.length))
                ends[where] = max(ends.get(where, 0), info.offset + info.length)
            tensors[name.removeprefix(prefix)] = StoredTensor(
                tuple(entry.size), entry.properties.state[0], tuple(chunks)
            )
    _check_files(directory, ends)
    gaps = [name for name, tensor in tensors.items() if not tensor.covered]
    if gaps:
        raise UserError(f"{path}: the chunks of these tensors do not cover them: {', '.join(gaps)}")
    return tensors


def state_prefixes(directory: Path) -> list[str]:
    """What an optimizer keeps of the weights. Example: ["optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."]."""
    before, _, after = STATE_PREFIX.partition("{kind}")
    kinds = {name.partition(after)[0] for name in read_metadata(directory, before)}
    return [STATE_PREFIX.format(kind=kind) for kind in sorted(kinds)]


def _check_files(directory: Path, ends: dict[str, int]) -> None:
    strange = sorted(file for file in ends if Path(file).name != file)
    absent = sorted(file for file in ends if not (directory / file).is_file())
    if strange or absent:
        raise UserError(f"{directory / METADATA_FILE} names files that are absent: {', '.join(strange + absent)}")
    short = sorted(file for file, end in ends.items() if (directory / file).stat().st_size < end)
    if short:
        raise UserError(f"{directory}: truncated: {', '.join(short)}")


def write_metadata(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """`.metadata`, `metadata.json` and an empty `common.pt`, as Megatron's loader wants them."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage = {}
    for name, tensor in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks]
        properties = TensorProperties(dtype=tensor.dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            index = MetadataIndex(name, torch.Size(chunk.offsets), number)
            storage[index] = _StorageInfo(chunk.file, chunk.offset, chunk.nbytes)
    torch.save({}, directory / "common.pt")
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT))
    (directory / METADATA_FILE).write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
