"""Progress of what is counted: a bar with the time left on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eureka_megatron.tracking.console import format_seconds, tell

LINE_SECONDS = 15.0
FIRST_GUESS = 10  # done before the time left is guessed at: the first ones pay for what is warmed up


@contextmanager
def progress(title: str, total: int, done: int = 0, *, silent: bool = False) -> Iterator[Callable[[], None]]:
    """Yields a function to be called when one more of `total` is done. done: how many were before."""
    if silent:
        yield lambda: None
        return
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    started = last = time.monotonic()
    count, first = done, done

    def advance() -> None:
        nonlocal count, last
        count += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS and count < total:
            last = now
            left = (now - started) / (count - first) * (total - count)
            known = count - first >= FIRST_GUESS
            tell(f"{title} {count}/{total}" + (f" · {format_seconds(left)} left" if known else ""))

    yield advance
    if count > first:
        tell(f"{title} {count}/{total} · {format_seconds(time.monotonic() - started)}")
