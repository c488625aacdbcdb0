"""`eureka replay`: one step of a run done again by itself, from the checkpoint before it, and whether its numbers come out the same.

    the checkpoint after N steps ──► sample step N again ──► compare with rollouts/step_N.parquet, token by token
                                └──► train on it again   ──► compare with the line of metrics.jsonl

Nothing is written into the run's folder. On CPUs both are equal to the last bit; on GPUs the kernels decide how close they are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eureka_megatron.checkpoint import store
from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.data.batch import make_batch, updates_per_step
from eureka_megatron.errors import UserError
from eureka_megatron.run.resume import restore
from eureka_megatron.run.run import Run
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.tracking.rollouts import step_file, step_files
from eureka_megatron.tracking.tracker import Tracker, read_metrics
from eureka_megatron.types import Group, Rollout

Part = Literal["rollout", "train"]
SHOWN = 5  # differences that are told
CLOSE = 1e-6  # relative; equal bits are asked of nothing but a CPU


def replay(run_dir: Path, step: int, only: Part | None = None) -> bool:
    """Do step `step` (its number in metrics.jsonl) again. → whether everything that was compared came out the same.

    only: "rollout" samples and compares; "train" trains on what is stored and compares, which needs every group there that the step trained on.

    Raises:
        UserError: there is no checkpoint right before the step, or nothing to compare with; names the steps that can be replayed.
    """
    metrics = run_dir / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    recorded = {line["step"]: line for line in lines if line.get("stage") == "train"}
    checkpoint = _before(run_dir, step, recorded)
    state = store.read_state(checkpoint)
    line, stored = recorded[step], _stored(run_dir, step)
    if stored is None and only is not None:
        there = ", ".join(map(str, step_files(run_dir))) or "none"
        raise UserError(
            f"{step_file(run_dir, step)} does not exist; steps with stored rollouts: {there} (tracking.rollouts_every)"
        )
    if only == "train":
        _require_all(stored or [], line, state["config"]["training"]["prompts_per_step"])
    with tempfile.TemporaryDirectory(prefix="replay-") as folder:
        config = _elsewhere(state["config"], Path(folder))
        with Run(config) as run, Tracker(config, config.run.output, start_step=step) as tracker:
            run.trainer.start_phase(config.optimizer, config.training.steps * updates_per_step(config))
            restore(run, checkpoint, tracker)
            groups = _groups(run, stored or []) if only == "train" else run.rollouts.take(step).groups
            same = True
            if only != "train" and stored is not None:
                same &= _compare_rollouts(groups, stored)
            if only != "rollout" and groups:
                same &= _compare_metrics(run.learn(make_batch(groups, config, step, run.weight_version)), line)
            if not groups:
                tell("training: the filter leaves too few groups: the step is skipped now")
                same &= line.get("filter/skipped") == 1
    return same


def _before(run_dir: Path, step: int, done: Container[int]) -> Path:
    """The checkpoint of the steps before this one. done: the steps that metrics.jsonl tells of."""
    found = dict(store.list_checkpoints(run_dir / store.CHECKPOINTS))
    if step not in found or step not in done:
        why = f"ended before step {step}" if step in found else f"has no checkpoint right before step {step}"
        there = ", ".join(str(number) for number in found if number in done) or "none"
        raise UserError(
            f"{run_dir} {why}; steps that can be replayed: {there} (checkpoint.every, keep_last, keep_every)"
        )
    return found[step]


def _elsewhere(values: dict[str, Any], folder: Path) -> RunConfig:
    """The run's configuration with another place to write, and without what only a run of its own needs."""
    sections = {name: dict(value) for name, value in values.items() if isinstance(value, Mapping)}
    sections["run"] |= {"output": folder}
    sections["tracking"] |= {"wandb": "disabled", "tensorboard": False}
    sections["checkpoint"] |= {"every": 0}
    return make_config({**values, **sections}, "the checkpoint's configuration")


def _stored(run_dir: Path, step: int) -> list[dict[str, Any]] | None:
    path = step_file(run_dir, step)
    if not path.exists():
        return None
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def _require_all(rows: Sequence[dict[str, Any]], line: Mapping[str, Any], most: int) -> None:
    """UserError when not all groups are stored that the step trained on: what waited and what the filter left, `most` of them."""
    stored = len({row["group"] for row in rows})
    trained = min(most, int(line.get("filter/from_buffer", 0) + line.get("filter/kept", most)))
    if stored < trained:
        raise UserError(
            f"{stored} of the {trained} groups that the step trained on are stored (tracking.rollouts_per_step); without --only train "
            "they are sampled again"
        )


def _groups(run: Run, rows: Sequence[dict[str, Any]]) -> list[Group]:
    """What was stored as the collector handed it over. Raises UserError: a prompt is no longer in the data."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    wanted = {own[0]["prompt_id"]: own[0]["prompt"] for own in found.values()}
    prompts = {}
    for prompt in run.train_data:
        if wanted.get(prompt.id) == prompt.text:
            prompts[prompt.id] = prompt
        if len(prompts) == len(wanted):
            break
    if lost := wanted.keys() - prompts.keys():
        raise UserError(f"{run.train_data.path} no longer holds the prompt {min(lost)!r} as it was")
    return [Group(prompts[own[0]["prompt_id"]], tuple(map(_rollout, own))) for own in found.values()]


def _rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(
        tokens_R=np.array(row["tokens"], dtype=np.int64),
        logprobs_R=np.array(row["logprobs"], dtype=np.float32),
        text=row["text"],
        finish_reason=row["finish_reason"],
        weight_version=row["weight_version"],
        rewards=dict(row["rewards"]),
    )


def _compare_rollouts(groups: Sequence[Group], stored: Sequence[dict[str, Any]]) -> bool:
    """Token by token; the first difference of each response is told."""
    different, gap = [], 0.0
    for row in stored:
        where = f"group {row['group']}, response {row['response']}"
        group = groups[row["group"]] if row["group"] < len(groups) else None
        if group is None or group.prompt.id != row["prompt_id"]:
            different.append(f"{where}: the prompt was {row['prompt_id']}, is {group and group.prompt.id}")
            continue
        rollout = group.rollouts[row["response"]]
        if rollout.tokens_R.tolist() != row["tokens"]:
            pairs = zip(rollout.tokens_R.tolist(), row["tokens"], strict=False)
            first = next(
                (k for k, (new, old) in enumerate(pairs) if new != old), min(len(rollout.tokens_R), len(row["tokens"]))
            )
            different.append(f"{where}: another token at {first}")
            continue
        gap = max(gap, float(np.abs(rollout.logprobs_R - np.array(row["logprobs"], dtype=np.float32)).max(initial=0.0)))
    tell(
        f"rollouts: {len(stored) - len(different)} of {counted(len(stored), 'stored response')} came out the same, token by token; "
        f"log-probabilities within {gap:.2g}"
    )
    for text in different[:SHOWN]:
        tell(f"  {text}")
    return not different


def _compare_metrics(found: Mapping[str, float], line: Mapping[str, Any]) -> bool:
    """What stands in both; what a value depends on time for has "time" or "second" in its name and is left out."""
    names = [
        name
        for name in found
        if isinstance(line.get(name), int | float) and "time" not in name and "second" not in name
    ]
    bits = [name for name in names if found[name] == line[name]]
    different = [name for name in names if not math.isclose(found[name], line[name], rel_tol=CLOSE, abs_tol=CLOSE)]
    tell(
        f"training: {len(bits)} of {counted(len(names), 'metric')} came out the same to the last bit, {len(different)} differ"
    )
    for name in different[:SHOWN]:
        tell(f"  {name}: {line[name]!r} then, {found[name]!r} now")
    return not different
