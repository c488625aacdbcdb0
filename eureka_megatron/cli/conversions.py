"""`hf-to-megatron`, `megatron-to-hf` and `inspect` from a command line, for `eureka convert` and tools/checkpoint_convert."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from eureka_megatron.errors import UserError
from eureka_megatron.places import model_directory
from eureka_megatron.weights import listing as inspect
from eureka_megatron.weights import offline
from eureka_megatron.weights.offline import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERSIONS = {"hf-to-megatron": offline.hf_to_megatron, "megatron-to-hf": offline.megatron_to_hf}


def add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of both directions."""
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="or hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as they are)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default: 1, enough for one disk)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything back and compare bitwise")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_inspection_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `inspect`."""
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="one to list, two to compare")
    parser.add_argument("--json", action="store_true")


def run_conversion(kind: str, options: argparse.Namespace) -> int:
    """Converts, with a progress bar of bytes and time left on a terminal; → exit code."""
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: need at least 1")
    with progress_bar(kind, options.quiet) as progress:
        CONVERSIONS[kind](
            model_directory(options.input),
            options.output,
            dtype=dtype,
            workers=options.workers,
            verify=options.verify,
            progress=progress,
        )
    if not options.quiet:
        print(f"{options.output} written{' and verified' if options.verify else ''}")
    return 0


def run_inspection(options: argparse.Namespace) -> int:
    """Prints one checkpoint, or the differences of two (exit code 1 when there are any)."""
    if len(options.directories) > 2:
        raise UserError("inspect takes one directory, or two to compare")
    first, *others = map(inspect.describe, map(model_directory, options.directories))
    if not others:
        print(inspect.to_json(first) if options.json else inspect.to_text(first))
        return 0
    differences = inspect.differences(first, others[0])
    print("\n".join(differences) if differences else "no differences in names, shapes, dtypes and values")
    return 1 if differences else 0


def main(kind: str, arguments: Sequence[str] | None = None) -> int:
    """A script of its own, with the errors and exit codes of `eureka`."""
    parser = argparse.ArgumentParser(description=CONVERSIONS[kind].__doc__ if kind in CONVERSIONS else inspect.__doc__)
    (add_conversion_arguments if kind in CONVERSIONS else add_inspection_arguments)(parser)
    options = parser.parse_args(arguments)
    try:
        return run_conversion(kind, options) if kind in CONVERSIONS else run_inspection(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


@contextmanager
def progress_bar(title: str, quiet: bool) -> Iterator[Progress | None]:
    """A bar of bytes and time left on a terminal; None when there shall be none."""
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
