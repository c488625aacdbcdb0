"""What a checkpoint holds, HF or Megatron's, and how two differ. Values are compared bitwise, under HF names where known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from eureka_megatron.checkpoint.convert import open_checkpoint
from eureka_megatron.checkpoint.dist_io import DistReader
from eureka_megatron.checkpoint.hf_io import Reader

COMPARED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Contents:
    """A described checkpoint. `step` is None where the checkpoint does not come from training."""

    directory: Path
    format: str  # "HF safetensors" | "torch_dist"
    reader: Reader | DistReader
    files: int
    file_bytes: int
    step: int | None

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name → (shape, dtype)."""
        return {name: (info.shape, info.dtype) for name, info in sorted(self.reader.tensors.items())}

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape, _ in self.tensors.values())


def describe(directory: str | Path) -> Contents:
    """Opens a checkpoint. UserError when it is none, or damaged."""
    reader = open_checkpoint(directory)
    files = [path for path in Path(directory).iterdir() if path.is_file()]
    state = Path(directory) / "state.json"  # of a training checkpoint
    step = json.loads(state.read_text()).get("step") if state.exists() else None
    kind = "torch_dist" if isinstance(reader, DistReader) else "HF safetensors"
    return Contents(Path(directory), kind, reader, len(files), sum(path.stat().st_size for path in files), step)


def _summary(contents: Contents) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for shape, dtype in contents.tensors.values():
        name = str(dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + prod(shape)
    return {
        "directory": str(contents.directory),
        "format": contents.format,
        "step": contents.step,
        "files": contents.files,
        "bytes": contents.file_bytes,
        "tensors": len(contents.tensors),
        "parameters": contents.parameters,
        "parameters_by_dtype": dtypes,
    }


def to_json(contents: Contents) -> str:
    """Everything, for programs."""
    tensors = [
        {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        for name, (shape, dtype) in contents.tensors.items()
    ]
    return json.dumps({**_summary(contents), "contents": tensors}, indent=2)


def to_text(contents: Contents) -> str:
    """Everything, for people: the summary last, where the eye is after a long list."""
    width = max((len(name) for name in contents.tensors), default=0)
    lines = [
        f"{name:<{width}}  {str(dtype).removeprefix('torch.'):<9} {' × '.join(map(str, shape))}"
        for name, (shape, dtype) in contents.tensors.items()
    ]
    summary = _summary(contents)
    dtypes = ", ".join(f"{count:,} {name}" for name, count in summary.pop("parameters_by_dtype").items())
    lines += ["", f"{summary['directory']}: {summary['format']}" + (f", step {contents.step}" if contents.step else "")]
    lines += [
        f"{summary['tensors']} tensors, {dtypes} parameters, {contents.file_bytes / 1e9:.2f} GB in {contents.files} files"
    ]
    return "\n".join(lines)


def differences(first: Contents, second: Contents) -> list[str]:
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


def _different_values(first: Contents, second: Contents, name: str) -> int:
    shape, dtype = first.tensors[name]
    step = max(1, COMPARED_BYTES // max(1, prod(shape[1:]) * dtype.itemsize))
    count = 0
    for start in range(0, shape[0], step) if shape else ():
        a, b = (side.reader[name][start : start + step].reshape(-1) for side in (first, second))
        bits_a, bits_b = (part.view(torch.uint8).view(-1, dtype.itemsize) for part in (a, b))
        count += int((bits_a != bits_b).any(dim=1).sum())
    return count
