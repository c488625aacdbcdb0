"""What a run shows while it works: a live table on a terminal, plain lines in a log file.

The table holds progress, phase, time left, the last step in words, and for each metric its last value and a small picture of its history. Where
stdout is no terminal (CI, sbatch) a line is printed for the first and the last step and in between at most every
`line_seconds`; a long phase says once a minute that it goes on.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Self

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eureka_megatron.tracking.line import describe_step

BLOCKS = "▁▂▃▄▅▆▇█"
PROGRESS_SECONDS = 10.0  # between two lines about one piece of work
BEAT_SECONDS = 60.0  # a phase that lasts longer says in a log that it goes on
HISTORY = 400  # values kept for each metric's small picture
# Names that matter most stand first; the rest follow in the order in which they came.
LEADING = ("reward", "accuracy", "loss", "logprob", "response_length")


def tell(text: str, stream: IO[str] | None = None) -> None:
    """One line at once, before there is a `Console`: what is being done while nothing else shows yet."""
    print(text, file=stream or sys.stdout, flush=True)


def tell_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table at once, like `tell`."""
    table = Table(box=None, pad_edge=False, padding=(0, 3 if len(columns) < 8 else 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    RichConsole(width=120, highlight=False).print(table)


def progress_lines(title: str, unit: str = "GB", stream: IO[str] | None = None) -> Callable[[int, int], None]:
    """What a bar is on a terminal, for logs: call it with what is done and all there is to do (0: unknown), as often as you like.

    A line at most every PROGRESS_SECONDS: "convert: 3.2 of 14.9 GB, 1m10s left". unit: "GB" (of bytes), or what is counted.
    The time left is by the pace since the first call: what comes before it (engines that warm up) says nothing of the rest.
    """
    last = time.monotonic()
    first: tuple[float, int] | None = None

    def amount(number: int) -> str:
        return f"{number / 1e9:,.1f}" if unit == "GB" else f"{number:,}"

    def told(done: int, total: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        began, before = first = first or (now, done)
        if now - last < PROGRESS_SECONDS:
            return
        last = now
        left = (
            f", {format_seconds((now - began) / (done - before) * (total - done))} left"
            if total and done > before
            else ""
        )
        tell(f"{title}: {amount(done)}{f' of {amount(total)}' if total else ''} {unit}{left}", stream)

    return told


def counted(number: int, name: str) -> str:
    """Example: counted(2, "trainer rank") is "2 trainer ranks"."""
    return f"{number} {name}" + ("" if number == 1 else "s")


class Console:
    """Live view of `total_steps` steps. A context manager; without a terminal, or with `live=False`, plain lines.

    Example:
        with Console(40, title="demo") as console:
            with console.phase("rollout"):
                ...
            console.show(0, {"train/reward": 0.7})
            console.take_times()     # {"time/rollout": 1.2}
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "eureka",
        first_step: int = 0,
        enabled: bool = True,
        live: bool | None = None,
        line_seconds: float = 10.0,
        stream: IO[str] | None = None,
    ) -> None:
        self.total_steps, self.title, self.enabled, self.line_seconds = total_steps, title, enabled, line_seconds
        self.stream = stream or sys.stdout
        self.live = enabled and (self.stream.isatty() if live is None else live)
        self.done = self.first_step = first_step
        self.metrics: dict[str, float] = {}  # the last value of each
        self.last: Mapping[str, float] = {}  # those of the last step
        self.history: dict[str, deque[float]] = {}
        # (name, when it began), outer phases first
        self._phases: list[tuple[str, float]] = []
        self._times: dict[str, float] = {}
        self._started = self._last_line = time.monotonic()
        # The last 20 steps give the time left. The first of this process counts for none: it holds the warm-up of engine and kernels.
        self._step_ends: deque[float] = deque(maxlen=21)
        self._view: Live | None = None
        self._printed = False  # since the last beat
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self.live:
            self._view = Live(
                console=RichConsole(file=self.stream, force_terminal=True),
                get_renderable=self.table,
                refresh_per_second=4,
                vertical_overflow="crop",
            )
            self._view.start()
        elif self.enabled:
            threading.Thread(target=self._beat, name="long phases", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._view is not None:
            self._view.stop()
            self._view = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show `name` while the block runs, count its seconds towards `time/<name>`. Phases may stand within phases."""
        phase = name, time.monotonic()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._phases.remove(phase)
            key = f"time/{name}"
            self._times[key] = round(self._times.get(key, 0.0) + time.monotonic() - phase[1], 6)

    def take_times(self) -> dict[str, float]:
        """Seconds of each phase that ended since the last call, as `time/<name>`; a sum where it ran several times."""
        times, self._times = self._times, {}
        return times

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take over the metrics of a finished step."""
        now = time.monotonic()
        if step + 1 > self.done:
            self.done = step + 1
            self._step_ends.append(now)
        self.last = metrics
        for name, value in metrics.items():
            # History first: the refresh thread draws every name it finds in `metrics`.
            self.history.setdefault(name, deque(maxlen=HISTORY)).append(value)
            self.metrics[name] = value
        due = now - self._last_line >= self.line_seconds
        if self.enabled and not self.live and (due or step in (self.first_step, self.total_steps - 1)):
            self._last_line = now
            self._print(self.line(metrics))

    def say(self, text: str) -> None:
        """A line that stays, above the table; printed even when the console is switched off in the configuration."""
        if self._view is not None:
            self._view.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def seconds_left(self) -> float | None:
        """Steps to go times the mean seconds of the last 20; None before the second of this process has ended."""
        steps = len(self._step_ends) - 1
        if steps < 1:
            return None
        return (self._step_ends[-1] - self._step_ends[0]) / steps * (self.total_steps - self.done)

    def line(self, metrics: Mapping[str, float]) -> str:
        """One line for a log: `demo 12/40 · reward 0.71 · … · 3m10s left`."""
        parts = [f"{self.title} {self.done}/{self.total_steps}", *describe_step(metrics)]
        left = self.seconds_left()
        if self.done < self.total_steps:
            parts.append("estimating the time to go" if left is None else f"{format_seconds(left)} left")
        return " · ".join(parts)

    def table(self) -> Group:
        """The picture of this moment, for rich."""
        head = Table.grid(padding=(0, 2))
        elapsed = format_seconds(time.monotonic() - self._started)
        left = self.seconds_left()
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.total_steps, completed=self.done, width=30),
            f"{self.done}/{self.total_steps}",
            f"{elapsed} gone" + (f", {format_seconds(left)} left" if left is not None else ""),
        )
        body = Table(box=None, padding=(0, 2), show_header=False)
        # What fits the terminal; the rest is in metrics.jsonl.
        height = self._view.console.height - 6 if self._view is not None else 18
        for name in ranked(self.metrics)[: max(4, min(18, height))]:
            picture = sparkline(self.history[name], 24)
            body.add_row(Text(name, style="cyan"), Text(format_value(self.metrics[name]), justify="right"), picture)
        last = Text(" · ".join(describe_step(self.last)), no_wrap=True, overflow="ellipsis")
        return Group(head, Text(self._phase_text(), style="yellow"), last, body)

    def _phase_text(self) -> str:
        phases = list(self._phases)  # a copy: the refresh thread reads while the run goes on
        if not phases:
            return "…"
        return " › ".join(name for name, _ in phases) + f"  {format_seconds(time.monotonic() - phases[-1][1])}"

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            if self._phases and not self._printed:
                self._print(f"{self.title} {self.done}/{self.total_steps} · {self._phase_text()}")
            self._printed = False

    def _print(self, text: str) -> None:
        self._printed = True
        print(text, file=self.stream, flush=True)


def ranked(names: Mapping[str, Any]) -> list[str]:
    """Names with those of LEADING first; seconds and what else depends on the machine last."""

    def key(name: str) -> int:
        if name.startswith(("time/", "perf/")):
            return len(LEADING) + 1
        return next((place for place, word in enumerate(LEADING) if word in name), len(LEADING))

    return sorted(names, key=key)


def sparkline(values: "deque[float]", width: int) -> str:
    """The values as blocks, each the mean of an equal share; non-finite ones leave a gap. [0, 1, 2] gives ▁▅█."""
    shares = [list(values)[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    if len(values) < width:
        shares = [[value] for value in values]
    means = [sum(share) / len(share) for share in shares]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    if not finite:
        return " " * len(means)
    low, span = min(finite), max(finite) - min(finite)
    scale = (len(BLOCKS) - 1) / span if span else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] if abs(mean) < float("inf") else " " for mean in means)


def format_value(value: float) -> str:
    """Four significant figures: 0.7183, 1024, 3.1e-07."""
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """42s, 3m10s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
