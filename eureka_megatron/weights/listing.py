"""What a checkpoint holds, HF or Megatron's, and how two differ. Values are compared bitwise, under HF names where known.

Of training checkpoints the optimizer's part is listed and compared too: `optimizer.state.exp_avg.<HF name>`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from eureka_megatron.checkpoint.store import STATE_FILE, read_state
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.online import open_checkpoint
from eureka_megatron.weights.torch_dist import DistReader
from eureka_megatron.weights.torch_dist_metadata import state_prefixes

COMPARED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Listing:
    """A described checkpoint. `readers` holds the weights under "", and what the optimizer keeps under its prefixes.

    `state` is state.json of a training checkpoint, else empty.
    """

    directory: Path
    format: str  # "HF safetensors" | "torch_dist"
    readers: dict[str, Reader | DistReader]
    files: int
    file_bytes: int
    state: dict[str, Any]

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype)."""
        return {
            prefix + name: (info.shape, info.dtype)
            for prefix, reader in self.readers.items()
            for name, info in sorted(reader.tensors.items())
        }

    @property
    def parameters(self) -> int:
        return sum(prod(info.shape) for info in self.readers[""].tensors.values())

    @property
    def layout(self) -> str | None:
        """Of the ranks that wrote it. Example: "tensor 2 × pipeline 1 × context 1 × data 4"."""
        sizes = self.state.get("layout")
        return " × ".join(f"{name} {size}" for name, size in sizes.items()) if sizes else None

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Values of a tensor; all of a scalar."""
        prefix = next(prefix for prefix in sorted(self.readers, key=len, reverse=True) if name.startswith(prefix))
        tensor = self.readers[prefix][name.removeprefix(prefix)]
        return tensor[rows if tensor.shape else ()]


def describe(directory: str | Path) -> Listing:
    """Opens a checkpoint. UserError when it is none, or damaged."""
    directory = Path(directory)
    readers: dict[str, Reader | DistReader] = {"": open_checkpoint(directory)}
    kind = "HF safetensors"
    if isinstance(readers[""], DistReader):
        kind = "torch_dist"
        for prefix in state_prefixes(directory):
            readers[prefix] = DistReader(directory, read_hf_config(directory), prefix)
    files = [path for path in directory.iterdir() if path.is_file()]
    state = read_state(directory) if (directory / STATE_FILE).exists() else {}
    return Listing(directory, kind, readers, len(files), sum(path.stat().st_size for path in files), state)


def _summary(contents: Listing) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for info in contents.readers[""].tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + prod(info.shape)
    return {
        "directory": str(contents.directory),
        "format": contents.format,
        "step": contents.state.get("step"),
        "layout": contents.layout,
        "files": contents.files,
        "bytes": contents.file_bytes,
        "tensors": len(contents.tensors),
        "parameters": contents.parameters,
        "parameters_by_dtype": dtypes,
    }


def to_json(contents: Listing) -> str:
    """Everything, for programs."""
    tensors = [
        {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        for name, (shape, dtype) in contents.tensors.items()
    ]
    return json.dumps({**_summary(contents), "contents": tensors}, indent=2)


def to_text(contents: Listing) -> str:
    """Everything, for people: the summary last, where the eye is after a long list."""
    width = max((len(name) for name in contents.tensors), default=0)
    lines = [
        f"{name:<{width}}  {str(dtype).removeprefix('torch.'):<9} {' × '.join(map(str, shape))}"
        for name, (shape, dtype) in contents.tensors.items()
    ]
    summary = _summary(contents)
    dtypes = ", ".join(f"{count:,} {name}" for name, count in summary.pop("parameters_by_dtype").items())
    step = f", step {summary['step']}" if contents.state else ""
    layout = f", written by {contents.layout}" if contents.layout else ""
    lines += ["", f"{summary['directory']}: {summary['format']}{step}{layout}"]
    lines += [
        f"{summary['tensors']} tensors, {dtypes} parameters, {contents.file_bytes / 1e9:.2f} GB in {contents.files} files"
    ]
    return "\n".join(lines)


def differences(first: Listing, second: Listing) -> list[str]:
    """One line for each difference in names, shapes, dtypes and, where those agree, values."""
    left, right = first.tensors, second.tensors
    lines = [f"only in {first.directory}: {name}" for name in left.keys() - right.keys()]
    lines += [f"only in {second.directory}: {name}" for name in right.keys() - left.keys()]
    for name in left.keys() & right.keys():
        (shape, dtype), (other_shape, other_dtype) = left[name], right[name]
        if shape != other_shape:
            lines.append(f"{name}: shape {shape} against {other_shape}")
        elif dtype != other_dtype:
            lines.append(f"{name}: dtype {dtype} against {other_dtype}")
        elif count := _different_values(first, second, name):
            lines.append(f"{name}: {count} of {prod(shape)} values differ")
    return sorted(lines)


def _different_values(first: Listing, second: Listing, name: str) -> int:
    shape, dtype = first.tensors[name]
    step = max(1, COMPARED_BYTES // max(1, prod(shape[1:]) * dtype.itemsize))
    count = 0
    for start in range(0, shape[0] if shape else 1, step):
        a, b = (side.rows(name, slice(start, start + step)).reshape(-1) for side in (first, second))
        bits_a, bits_b = (part.view(torch.uint8).view(-1, dtype.itemsize) for part in (a, b))
        count += int((bits_a != bits_b).any(dim=1).sum())
    return count
