"""The folder of a run's training checkpoints: which are there, which are whole, which may go.

    checkpoints/latest                 names the newest; for people and scripts, resuming does not rely on it
    checkpoints/lock                   held by the run that saves here
    checkpoints/step_000050/           50 rollout steps are done
        __R_0.distcp  .metadata        weights and optimizer of rank R in Megatron's torch_dist format (dist_io)
        metadata.json  common.pt       so that Megatron's own loader reads it too; common.pt is empty, and never read here
        config.json, tokenizer, …      of the model: the directory exports and converts by itself
        state.json                     step, versions, configuration, layout, schedule, place in the data
        random.json  collector.json    random states of all ranks, groups waiting in the filter's buffer
        checksums.b2                   BLAKE2b of every other file; `b2sum -c checksums.b2` checks them as well

A checkpoint is written as `step_000050.tmp` and takes its name when everything is on the disk. Whatever is damaged later, the
checksums tell. Nothing in these directories is unpickled except the index `.metadata`, with a list of permitted classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eureka_megatron.errors import UserError
from eureka_megatron.weights.hf_files import sync_file

CHECKPOINTS = "checkpoints"  # the folder, within that of the run
CHECKSUMS_FILE = "checksums.b2"
STATE_FILE = "state.json"
RANDOM_FILE = "random.json"
LATEST_FILE = "latest"
LOCK_FILE = "lock"  # held by the run that saves here
STATE_FORMAT = 1  # raised when a reader of today could not understand tomorrow's state.json
READ_BYTES = 8 * 2**20
UNFINISHED = (".tmp", ".deleting")  # what a killed run leaves; removed when the next one starts to save

_NAME = re.compile(r"step_(\d{6,})")
_LINE = re.compile(r"([0-9a-f]{128})  ([^/\n]+)\n")


def directory_name(step: int) -> str:
    """Example: "step_000050"."""
    return f"step_{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all finished checkpoints, oldest first; whole or damaged."""
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


# --- checksums ---


def checksum_lines(checksums: dict[str, str]) -> str:
    """The text of checksums.b2, of file name → digest. Every byte of it matters: a changed one is found."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums.items()))


def checksum(path: Path) -> str:
    """BLAKE2b of a file, read in blocks."""
    digest = hashlib.blake2b()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def problems_of(directory: Path) -> list[str]:
    """What is wrong with a checkpoint: every file that is absent, unexpected, unreadable or changed. Empty: it is whole.

    Reads everything, in as many threads as there are cores (hashing does not hold Python's lock).
    """
    path = directory / CHECKSUMS_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return [f"{CHECKSUMS_FILE} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{CHECKSUMS_FILE} cannot be read ({error})"]
    expected = {name: digest for digest, name in _LINE.findall(text)}
    if checksum_lines(expected) != text:
        return [f"{CHECKSUMS_FILE} is damaged"]
    found = {path.name for path in directory.iterdir()} - {CHECKSUMS_FILE}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"{name} has no checksum" for name in sorted(found - expected.keys())]

    def compare(name: str) -> list[str]:
        try:
            return [] if checksum(directory / name) == expected[name] else [f"{name} does not match {CHECKSUMS_FILE}"]
        except OSError as error:
            return [f"{name} cannot be read ({error.strerror})"]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for wrong in pool.map(compare, sorted(expected.keys() & found)):
            problems += wrong
    return problems


# --- resuming ---


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint that is whole, one line for each newer one that is not). (None, []) when there is none at all.

    Raises:
        UserError: there are checkpoints and all are damaged; starting over by itself would throw the run away.
    """
    warnings: list[str] = []
    for _, directory in reversed(list_checkpoints(folder)):
        problems = problems_of(directory)
        if not problems:
            return directory, warnings
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        warnings.append(f"{directory} is damaged ({'; '.join(problems[:3])}{more})")
    if warnings:
        raise UserError("\n".join([*warnings, f"no checkpoint of {folder} is whole; move it away to start over"]))
    return None, []


def newest_of_run(directory: Path) -> tuple[Path, list[str]]:
    """As `newest_whole`, of a run's folder or of its folder of checkpoints; any other directory comes back as it is."""
    for folder in (directory, directory / CHECKPOINTS):
        if list_checkpoints(folder):
            found, warnings = newest_whole(folder)
            assert found is not None
            return found, warnings
    return directory, []


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint. UserError when it is none, or of a newer format."""
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        known = state["format"] == STATE_FORMAT
    except FileNotFoundError:
        raise UserError(f"{directory} is no training checkpoint: it holds no {STATE_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None
    if not known:
        raise UserError(f"{path} has format {state['format']!r}, this version reads {STATE_FORMAT}")
    return state


def read_json(path: Path) -> Any:
    """A file of a checkpoint whose checksums hold."""
    return json.loads(path.read_text(encoding="utf-8"))


def set_aside(folder: Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step` to `….replaced`, so that they are neither resumed from nor counted. → their new names.

    They are damaged, or belong to a course of the run that is given up by going back to `step`.
    """
    moved = []
    for other, directory in list_checkpoints(folder):
        if other > step:
            target = directory.with_name(f"{directory.name}.replaced")
            if target.exists():
                shutil.rmtree(target)
            moved.append(directory.rename(target))
    return moved


# --- keeping ---


def remove_unfinished(folder: Path) -> None:
    """Deletes what a killed run left half-written or half-deleted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in UNFINISHED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def commit(temporary: Path, directory: Path) -> None:
    """Gives a finished checkpoint its name, and lets `latest` say so. All files in it must be on the disk already."""
    sync_file(temporary)
    if directory.exists():  # of a course of the run that was given up
        delete(directory)
    temporary.rename(directory)
    sync_file(directory.parent)
    pointer = directory.with_name(LATEST_FILE + ".tmp")
    write_through(pointer, f"{directory.name}\n")
    pointer.rename(directory.with_name(LATEST_FILE))
    sync_file(directory.parent)


def delete(directory: Path) -> None:
    """Takes the name away first, so that a half-deleted checkpoint is never seen."""
    going = directory.with_name(f"{directory.name}.deleting")
    directory.rename(going)
    shutil.rmtree(going)


def surplus(steps: Iterable[int], keep_last: int, keep_every: int) -> list[int]:
    """The steps that may go: all but the last `keep_last` and the multiples of `keep_every` (0: none of those).

    Example: surplus([10, 20, 30, 40, 50], keep_last=2, keep_every=20) == [10, 30]
    """
    ordered = sorted(steps)
    return [step for step in ordered[:-keep_last] if not (keep_every and step % keep_every == 0)]


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Deletes the surplus checkpoints."""
    found = dict(list_checkpoints(folder))
    for step in surplus(found, keep_last, keep_every):
        delete(found[step])


# --- onto the disk ---


def as_json(value: Any) -> str:
    """Strict JSON: Python writes numbers so that they come back bit for bit."""
    return json.dumps(value, allow_nan=False) + "\n"


def write_through(path: Path, text: str) -> None:
    """Writes a small file and waits until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
