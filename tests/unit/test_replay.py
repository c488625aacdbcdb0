"""What `eureka replay` refuses before it starts anything; that it does a step again is in tests/system/test_resume.py."""

import json
from pathlib import Path

import pytest

from eureka_megatron.checkpoint.store import STATE_FILE, STATE_FORMAT
from eureka_megatron.errors import UserError
from eureka_megatron.run import replay as module
from eureka_megatron.run.replay import replay
from tests.helpers.made_run import MadeRun, made_config, make_run

RUN = MadeRun(steps=12, every=5, groups=2, responses=2)  # stored: 0, 5, 10, 11


class Started(Exception):
    """Nothing was refused."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(module, "Run", start)
    state = {"format": STATE_FORMAT, "config": made_config(RUN).model_dump(mode="json")}
    for step in (3, 5, 12):
        directory = tmp_path / "checkpoints" / f"step_{step:06d}"
        directory.mkdir(parents=True)
        (directory / STATE_FILE).write_text(json.dumps(state))
    return make_run(tmp_path, RUN)


def kept(folder: Path, **groups: float) -> None:
    """Have every step's line say where its groups came from."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) | {f"filter/{name}": value for name, value in groups.items()} for line in path.open()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (4, r"has no checkpoint right before step 4; steps that can be replayed: 3, 5 \("),
        (12, r"ended before step 12; steps that can be replayed: 3, 5 \("),
    ],
)
def test_steps_that_can_be_replayed_are_named_and_can(folder: Path, step: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        replay(folder, step)
    for possible in (3, 5):
        with pytest.raises(Started):
            replay(folder, possible)


def test_a_step_without_rollouts_names_those_that_have_some(folder: Path) -> None:
    for only in ("rollout", "train"):
        with pytest.raises(
            UserError, match=r"step_000003\.parquet does not exist; steps with stored rollouts: 0, 5, 10, 11"
        ):
            replay(folder, 3, only)


def test_a_folder_of_nothing_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps that can be replayed: none"):
        replay(tmp_path / "nothing", 3)


def test_training_alone_needs_the_groups_that_the_step_trained_on(folder: Path) -> None:
    """Not those that it asked for: a filter leaves fewer."""
    for groups in ({"kept": 2.0, "from_buffer": 0.0}, {"kept": 1.0, "from_buffer": 1.0}):
        kept(folder, **groups)
        with pytest.raises(Started):
            replay(folder, 5, "train")
    kept(folder, kept=2.0, from_buffer=1.0)
    with pytest.raises(UserError, match="2 of the 3 groups that the step trained on are stored"):
        replay(folder, 5, "train")
