"""Measures our training checkpoint files against torch.distributed.checkpoint's own writer and reader, on one rank's state.

    python tools/benchmark/checkpoint.py [--mib 2048] [--rounds 3] [--directory DIR]

Saves made-up fp32 state as `checkpoint.writer` does (copy, then a thread that appends, hashes and syncs) and by `async_save` with
`FileSystemWriter` (then its file is read once more for the checksum). Loads a quarter of every tensor's columns, as a rank of four would.
For each: seconds the caller is held up, seconds until all is on the disk with its checksum, peak of anonymous memory above the state
(one copy is needed, so that training may go on). Says also whether a `.metadata` that runs code when unpickled does so in torch's reader.
"""

import argparse
import contextlib
import json
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from eureka_megatron.checkpoint.store import checksum
from eureka_megatron.checkpoint.writer import HashedFile
from eureka_megatron.weights.hf_files import sync_file
from eureka_megatron.weights.torch_dist import DistReader, Place, append
from eureka_megatron.weights.torch_dist_metadata import StoredTensor, read_metadata, write_metadata

SIDE = 2048  # of the made-up matrices: 16 MiB each


def anonymous_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Anonymous:"))


def measured(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds, peak of anonymous memory above the present in MiB)."""
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return result, seconds, max(0, peak[0] - before) / 2**20


def save_ours(state: dict[str, Tensor], directory: Path) -> float:
    """→ seconds the caller was held up"""
    directory.mkdir()
    begin = time.perf_counter()
    copies = {key: values.clone() for key, values in state.items()}
    held = time.perf_counter() - begin

    def write() -> None:
        with (directory / "__0_0.distcp").open("wb") as raw:
            file = HashedFile(raw)
            chunks = {key: append(file, values, (0, 0), "__0_0.distcp") for key, values in copies.items()}
        sync_file(directory / "__0_0.distcp")
        write_metadata(
            directory, {key: StoredTensor((SIDE, SIDE), torch.float32, (chunk,)) for key, chunk in chunks.items()}
        )

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    return held


def save_theirs(state: dict[str, Tensor], directory: Path) -> float:
    begin = time.perf_counter()
    saving = dcp.async_save(dict(state), storage_writer=dcp.FileSystemWriter(directory, sync_files=True), no_dist=True)
    held = time.perf_counter() - begin
    assert isinstance(saving, Future), "of one process"
    saving.result()
    for path in directory.glob("*.distcp"):
        checksum(path)
    return held


def load_ours(state: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    reader = object.__new__(DistReader)  # without the table: these tensors are of no model
    reader.directory, reader.stored = directory, read_metadata(directory)
    reader._values, reader._chunks = {}, {}
    parts = {key: torch.empty(SIDE, SIDE // 4) for key in state}
    for key, part in parts.items():
        reader.read(Place(key, None), (slice(0, SIDE), slice(0, SIDE // 4)), part)
    return parts


def load_theirs(state: dict[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """FileSystemReader unpickles a whole tensor for each part of it: this is what its `read_data` does for every item of a plan."""
    found = {}
    for key in state:
        target = {key: torch.empty(SIDE, SIDE)}
        dcp.load(target, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
        found[key] = target[key][:, : SIDE // 4].clone()
    return found


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    torch.serialization.set_crc32_options(False)
    state = {f"w{i}": torch.randn(SIDE, SIDE) for i in range(options.mib // 16)}
    found: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            for name, save, load in (("ours", save_ours, load_ours), ("torch", save_theirs, load_theirs)):
                held, seconds, peak = measured(partial(save, state, Path(folder) / name))
                found.setdefault(f"save, {name}", []).append((held, seconds, peak))
                parts, seconds, peak = measured(partial(load, state, Path(folder) / name))
                found.setdefault(f"load, {name}", []).append((seconds, seconds, peak))
                assert all(torch.equal(parts[key], values[:, : SIDE // 4]) for key, values in state.items())
            trap = Path(folder) / "trap"
            (Path(folder) / "torch" / ".metadata").write_bytes(pickle.dumps(Trap(trap)))
            with contextlib.suppress(AttributeError):  # what it unpickles here is no index
                dcp.FileSystemReader(Path(folder) / "torch").read_metadata()
            runs_code = trap.exists()
    print(f"{options.mib} MiB of state, medians of {options.rounds} rounds")
    for name, rounds in found.items():
        held, seconds, peak = (median(values) for values in zip(*rounds, strict=True))
        print(f"{name:<12} held up {held:6.2f} s, done in {seconds:6.2f} s, memory {peak:6.0f} MiB")
    print(f"torch's reader runs the code of a foreign .metadata: {runs_code}")


if __name__ == "__main__":
    main()
