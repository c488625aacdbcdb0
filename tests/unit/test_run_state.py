"""What the driver puts into a checkpoint and takes out again, and which checkpoint it chooses."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eureka_megatron.checkpoint import store
from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.data.dataset import Dataset, load_dataset
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.run.output import replacing
from eureka_megatron.run.resume import choose_checkpoint, differences, pack, starting_point, tell_of_resumption, unpack
from eureka_megatron.tracking.tracker import versions
from eureka_megatron.types import Group, Rollout
from tests.unit.test_store import make


@pytest.fixture(scope="module")
def dataset(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    paths = write_counting(tmp_path_factory.mktemp("counting"), train=6, test=1)
    return load_dataset(paths.train, Processor(tiny_dir, min_pixels=784, max_pixels=50176, max_prompt_tokens=96))


def rollout(seed: int) -> Rollout:
    random = np.random.default_rng(seed)
    return Rollout(
        tokens_R=random.integers(0, 384, 5),
        logprobs_R=random.normal(size=5).astype(np.float32),
        text="<think> ½ \ud800 </think>",  # a lone surrogate, as a decoder may leave it
        finish_reason="stop",
        weight_version=3,
        rewards={"accuracy": 1.0, "total": float(random.normal())},
    )


def test_waiting_groups_come_back_bit_for_bit_through_json(dataset: Dataset) -> None:
    groups = [Group(dataset[row], (rollout(row), rollout(row + 10))) for row in (4, 1)]
    state = {"buffer": groups, "stream": {"position": 5}}
    text = store.as_json(pack(state, dataset))
    assert "patches" not in text, "pictures are read from the data again"
    back = unpack(json.loads(text), dataset)
    assert back["stream"] == {"position": 5}
    for found, group in zip(back["buffer"], groups, strict=True):
        assert found.prompt is dataset[dataset.rows.index(next(r for r in dataset.rows if r.id == group.prompt.id))]
        for one, other in zip(found.rollouts, group.rollouts, strict=True):
            assert one.tokens_R.dtype == np.int64
            assert one.logprobs_R.dtype == np.float32
            assert one.tokens_R.tobytes() == other.tokens_R.tobytes()
            assert one.logprobs_R.tobytes() == other.logprobs_R.tobytes()
            assert (one.text, one.finish_reason, one.weight_version) == ("<think> ½ \ud800 </think>", "stop", 3)
            assert one.rewards == other.rewards


def config(output: Path) -> RunConfig:
    return make_config({"model": {"path": "m"}, "data": {"train": "d"}, "run": {"output": str(output)}})


def test_auto_takes_the_newest_whole_one_and_names_the_damaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, two, three = make(tmp_path / "checkpoints", 1, 2, 3)
    assert choose_checkpoint(config(tmp_path), "auto") == three
    (three / "weights").write_bytes(b"")
    (two / "checksums.b2").unlink()
    assert choose_checkpoint(config(tmp_path), "auto") == one
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"warning: {three} is damaged (weights does not match checksums.b2); going back to the one before",
        f"warning: {two} is damaged (checksums.b2 is missing); going back to the one before",
    ]


def test_auto_without_checkpoints_begins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert choose_checkpoint(config(tmp_path), "auto") is None
    assert "starting from the beginning" in capsys.readouterr().out


def test_auto_with_damaged_ones_only_does_not_throw_the_run_away(tmp_path: Path) -> None:
    (only,) = make(tmp_path / "checkpoints", 1)
    (only / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json does not match checksums\.b2\)\nno checkpoint of .* is whole"):
        choose_checkpoint(config(tmp_path), "auto")


def test_a_named_one_is_checked(tmp_path: Path) -> None:
    (only,) = make(tmp_path / "elsewhere", 1)
    assert choose_checkpoint(config(tmp_path / "run"), str(only)) == only
    (only / "weights").write_bytes(b"")
    with pytest.raises(UserError, match=r"step_000001 is damaged: weights does not match"):
        choose_checkpoint(config(tmp_path / "run"), str(only))
    with pytest.raises(UserError, match=r"absent is no training checkpoint"):
        choose_checkpoint(config(tmp_path / "run"), str(tmp_path / "absent"))


def test_starting_over_an_earlier_run_is_refused(tmp_path: Path) -> None:
    assert choose_checkpoint(config(tmp_path), None) is None
    make(tmp_path / "checkpoints", 1, 2)
    with pytest.raises(ConfigError, match=r"up to step 2: go on from there with --resume auto, or choose another run"):
        choose_checkpoint(config(tmp_path), None)


def as_stage(checkpoint: Path, stage: str) -> Path:
    """The checkpoint as if that command had written it."""
    state = store.read_state(checkpoint) | {"stage": stage}
    (checkpoint / store.STATE_FILE).write_text(store.as_json(state))
    lines = {path.name: store.checksum(path) for path in checkpoint.iterdir() if path.name != store.CHECKSUMS_FILE}
    (checkpoint / store.CHECKSUMS_FILE).write_text(store.checksum_lines(lines))
    return checkpoint


@pytest.mark.parametrize(("wrote", "begins"), [("sft", "train"), ("train", "sft")])
def test_the_advice_fits_what_is_found(tmp_path: Path, wrote: str, begins: str) -> None:
    newest = as_stage(make(tmp_path / "run" / "checkpoints", 1, 2)[-1], wrote)
    with pytest.raises(ConfigError) as refused:
        choose_checkpoint(config(tmp_path / "run"), None, begins)
    assert "--resume" not in str(refused.value)
    assert f"holds checkpoints of eureka {wrote}, up to step 2: begin from the newest with model.path={newest}" in str(
        refused.value
    )
    assert f"another run.output, such as {tmp_path}/run-{begins}" in str(refused.value)
    for asked in ("auto", str(tmp_path / "run"), str(newest)):
        with pytest.raises(
            UserError, match=f"eureka {begins} begins from it by model.path={newest}, in another run.output"
        ):
            choose_checkpoint(config(tmp_path / "run"), asked, begins)
    with pytest.raises(ConfigError, match="with --resume auto, or choose"):
        choose_checkpoint(config(tmp_path / "run"), None, wrote)


def test_a_runs_folder_is_as_good_as_its_newest_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make(tmp_path / "run" / "checkpoints", 1, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for asked in (tmp_path / "run", tmp_path / "run" / "checkpoints", two, "run", "run/", "~/run"):
        assert choose_checkpoint(config(tmp_path / "other"), str(asked)) == two
    (two / "weights").write_bytes(b"")
    assert choose_checkpoint(config(tmp_path / "other"), "run") == one
    assert "step_000002 is damaged (weights does not match checksums.b2); going back" in capsys.readouterr().out


def test_a_finished_run_is_lengthened_or_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (last,) = make(tmp_path / "checkpoints", 4)
    output = tmp_path / "hf"
    options = {"output": output, "stage": "train"}
    assert starting_point(config(tmp_path), "auto", steps=4, **options) == (last, 4)  # stopped before its export
    output.mkdir()
    assert starting_point(config(tmp_path), "auto", steps=4, **options) == (last, 4)
    (output / "config.json").touch()
    assert starting_point(config(tmp_path), "auto", steps=4, **options) is None
    assert f"all 4 steps are done, weights in {output}" in capsys.readouterr().out
    assert starting_point(config(tmp_path), "auto", steps=6, **options) == (last, 4)
    later = last.stat().st_mtime + 60
    (newer,) = make(tmp_path / "checkpoints", 6)
    os.utime(
        newer / store.STATE_FILE, (later, later)
    )  # stopped between the last save and its export: hf is still of step 4
    assert starting_point(config(tmp_path), "auto", steps=6, **options) == (newer, 6)


@pytest.mark.parametrize(("schedule", "told"), [("cosine", True), ("constant", False)])
def test_what_a_longer_run_does_to_the_learning_rate_is_said(tmp_path: Path, schedule: str, told: bool) -> None:
    def of(steps: int) -> RunConfig:
        sections = {"training": {"steps": steps}, "optimizer": {"schedule": schedule}, "run": {"output": str(tmp_path)}}
        return make_config({"model": {"path": "m"}, "data": {"train": "d"}, **sections})

    said: list[str] = []
    state = {"stage": "train", "step": 4, "config": of(4).model_dump(mode="json"), "versions": versions()}
    tell_of_resumption(tmp_path / "step_000004", state, of(6), SimpleNamespace(say=said.append))
    assert said[:2] == [
        f"going on after step 4, from {tmp_path}/step_000004",
        "changed since then: training.steps 4 → 6",
    ]
    assert [line.startswith("the learning rate goes on as in a run of 6 steps") for line in said[2:]] == [True] * told


def test_a_new_run_does_not_write_over_weights(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    options = {"output": tmp_path / "hf", "stage": "train", "steps": 4}
    assert starting_point(config(tmp_path), None, **options) == (None, 0)
    (tmp_path / "hf" / "config.json").touch()
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=rf"begin from them with model\.path={tmp_path}/hf and another run\.output"):
            starting_point(config(tmp_path), resume, **options)


def test_earlier_weights_move_aside_once_the_new_ones_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "hf"

    def write(text: str) -> None:
        with replacing(output) as fresh:
            assert not fresh.exists() or not any(fresh.iterdir())
            fresh.mkdir(exist_ok=True)
            (fresh / "config.json").write_text(text)

    output.mkdir()
    write("first")
    assert capsys.readouterr().out == ""
    write("second")
    assert capsys.readouterr().out == f"the earlier weights of {output} lie in {output}_earlier\n"
    write("third")
    found = {path.name: (path / "config.json").read_text() for path in tmp_path.iterdir()}
    assert found == {"hf": "third", "hf_earlier": "first", "hf_earlier_2": "second"}
    with pytest.raises(KeyError), replacing(output):
        raise KeyError
    assert (output / "config.json").read_text() == "third"


def test_changed_keys_are_listed() -> None:
    old = {"optimizer": {"lr": 1e-6, "name": "adam"}, "run": {"seed": 0}, "gone": 1}
    new = {"optimizer": {"lr": 5e-7, "name": "adam"}, "run": {"seed": 0}, "new": {"a": 1}}
    assert differences(old, new) == ["optimizer.lr 1e-06 → 5e-07", "gone 1 → None", "new None → {'a': 1}"]
