"""Progress of what is counted: a bar with the time left on a terminal, lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eureka_megatron.tracking.console import progress_lines


@contextmanager
def progress(title: str, total: int, done: int = 0, *, silent: bool = False) -> Iterator[Callable[[], None]]:
    """Yields a function to be called when one more of `total` is done. done: how many were before; lines tell of what was left then."""
    count = done
    if silent:
        yield lambda: None
    elif sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)
    else:
        tell = progress_lines(title, "rows")

        def advance() -> None:
            nonlocal count
            count += 1
            tell(count - done, total - done)

        yield advance
