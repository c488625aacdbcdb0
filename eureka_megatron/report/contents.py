"""What a run's folder tells, but for its rollouts: metrics, evaluations, configuration, faults, machines.

A run in progress, an empty one and a damaged one can be read: what is missing is left out, what cannot be read is named in "problems".
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from eureka_megatron.config import make_config
from eureka_megatron.errors import UserError
from eureka_megatron.tracking.tracker import read_metrics

PAUSE_SECONDS = 60  # between steps, beyond what their phases took: the run stood still
OWN = ("step", "stage", "time", "timed", "non_finite")  # of a line of metrics.jsonl, besides the metrics

Record = dict[str, Any]
Flat = dict[str, Any]  # dotted key → value


def read_run(folder: Path) -> Record:
    """Everything as plain values for JSON. UserError: it is no run's folder.

    Example: {"name": "counting", "stages": {"train": {"steps": [0, 1], "began": 1790000000, "times": [0.4, 9.1], "series": {"train/reward": [0.5, None]}}}, …}.
    """
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} is no run's folder: it has neither metrics.jsonl nor config.yaml (run.output of a run is one)"
        )
    problems: list[str] = []
    lines = _lines(folder / "metrics.jsonl", problems)
    config = _flat(_read(folder / "config.yaml", yaml.safe_load, problems) or {})
    stages = {stage: _series(lines, stage) for stage in dict.fromkeys(line["stage"] for line in lines)}
    return clean(
        {
            "name": str(config.get("run.name") or folder.resolve().name),
            "stages": stages,
            "planned": {"train": config.get("training.steps"), "sft": config.get("sft.steps")},
            "config": config,
            "defaults": _defaults(),
            "changes": list(_changes(folder, config, problems)),
            "faults": {
                "non_finite": _non_finite(lines),
                "again": _again(_lines(folder / "metrics.replaced.jsonl", problems)),
                "pauses": [pause for stage in stages for pause in _pauses(lines, stage)],
            },
            "evaluation": list(_scores(_read(folder / "evaluation" / "summary.json", json.loads, problems) or {})),
            "topology": _read(folder / "topology.json", json.loads, problems),
            "versions": _read(folder / "versions.json", json.loads, problems) or {},
            "problems": problems,
        }
    )


def clean(value: Any) -> Any:
    """For strict JSON, and short: floats of six digits, None for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value if value is None or isinstance(value, int | str) else str(value)


def _read(path: Path, parse: Callable[[str], Any], problems: list[str]) -> Any:
    if not path.exists():
        return None
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return None
    if not isinstance(found, dict):
        problems.append(f"{path.name} holds no keys")
        return None
    return found


def _lines(path: Path, problems: list[str]) -> list[Record]:
    try:
        found = read_metrics(path) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return []
    good = [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]
    if len(good) < len(found):
        problems.append(f"{path.name}: {len(found) - len(good)} lines are no records")
    return [{"stage": "train", "time": None, **line, **(line.get("timed") or {})} for line in good]


def _series(lines: Iterable[Record], stage: str) -> Record:
    """A step that was logged in several lines is one; the later value holds."""
    merged: dict[int, Record] = {}
    for line in lines:
        if line["stage"] == stage:
            merged.setdefault(line["step"], {}).update(line)
    steps = sorted(merged)
    names = [name for name in dict.fromkeys(name for line in merged.values() for name in line) if name not in OWN]
    series = {name: [_number(merged[step].get(name)) for step in steps] for name in names}
    times = [_number(merged[step]["time"]) for step in steps]
    began = int(min((time for time in times if time is not None), default=0))
    since = [None if time is None else time - began for time in times]  # short enough to be rounded
    return {"steps": steps, "began": began, "times": since, "series": series}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _flat(section: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested sections by dotted keys; lists stay values."""
    found: Flat = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _defaults() -> Flat:
    """What a run has that sets nothing but what must be set."""
    plain = make_config({"model": {"path": "-"}, "data": {"train": "-"}}).model_dump(mode="json")
    required = ("model.path", "data.train")
    return {key: value for key, value in _flat(plain).items() if key not in required}


def _changes(folder: Path, config: Flat, problems: list[str]) -> Iterator[Record]:
    """What stages and resumed runs had other than config.yaml: config-STAGE-STEP.yaml, in the order in which they were written."""
    for path in sorted(folder.glob("config-*-*.yaml"), key=lambda path: path.stat().st_mtime):
        stage, step = path.stem.split("-", 2)[1:]
        later = _flat(_read(path, yaml.safe_load, problems) or {})
        if later:
            keys = [key for key in dict.fromkeys((*config, *later)) if config.get(key) != later.get(key)]
            yield {"stage": stage, "step": step, "keys": [[key, config.get(key), later.get(key)] for key in keys]}


def _non_finite(lines: Iterable[Record]) -> list[Record]:
    return [
        {"stage": line["stage"], "step": line["step"], "name": name, "value": value}
        for line in lines
        for name, value in (line.get("non_finite") or {}).items()
    ]


def _again(lines: Iterable[Record]) -> list[Record]:
    """Steps that were done and done again by a resumed run, as ranges. A step below the one before it begins a new range."""
    found: list[Record] = []
    for line in lines:
        last = found[-1] if found else None
        if last and last["stage"] == line["stage"] and last["last"] <= line["step"] <= last["last"] + 1:
            last["last"] = line["step"]
        else:
            found.append({"stage": line["stage"], "first": line["step"], "last": line["step"]})
    return found


def _pauses(lines: Iterable[Record], stage: str) -> Iterator[Record]:
    """Where more time passed between two steps than the later one's phases took: a stop, a requeued job, a slow start."""
    own = [line for line in lines if line["stage"] == stage and isinstance(line["time"], int | float)]
    gaps = [
        (
            later["step"],
            later["time"]
            - before["time"]
            - sum(_number(later.get(name)) or 0.0 for name in later if name.startswith("time/")),
        )
        for before, later in pairwise(own)
    ]
    usual = median(gap for _, gap in gaps) if gaps else 0.0
    return ({"stage": stage, "step": step, "seconds": gap} for step, gap in gaps if gap > usual + PAUSE_SECONDS)


def _scores(summary: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Record]:
    """One row for each accuracy of evaluation/summary.json, however deep it stands."""
    for name, value in summary.items():
        if not isinstance(value, Mapping):
            continue
        if isinstance(value.get("accuracy"), int | float):
            figures = {key: _number(value.get(key)) for key in ("accuracy", "low", "high", "rows")}
            yield {"benchmark": (path or (name,))[0], "what": " · ".join((*path[1:], str(name))), **figures}
        else:
            yield from _scores(value, (*path, str(name)))
