"""Stored rollouts come back as they were, within their bounds, and never stop a run."""

import errno
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eureka_megatron.demo.counting import examples
from eureka_megatron.tracking import rollouts
from eureka_megatron.tracking.rollouts import pieces, step_files, store
from eureka_megatron.tracking.tracker import Tracker
from tests.helpers.made_run import MadeRun, batch_of, decode, made_config, made_group, make_run, trained


def groups_of(run: MadeRun):
    source = random.Random(1)
    stream = examples(1)
    return [made_group(next(stream), 0.5, run, source) for _ in range(run.groups)]


def test_a_step_comes_back_as_it_was(tmp_path: Path) -> None:
    groups = groups_of(MadeRun(groups=3, responses=4))
    batch = batch_of(groups)
    store(tmp_path, 7, groups, batch, decode, {1: trained(groups)[1]})
    rows = pq.read_table(rollouts.step_file(tmp_path, 7)).to_pylist()
    expected = [(number, index) for number in range(3) for index in range(4)]
    assert [(row["group"], row["response"]) for row in rows] == expected
    for place, row in enumerate(rows):
        group = groups[row["group"]]
        rollout = group.rollouts[row["response"]]
        assert (row["step"], row["prompt"], row["answer"]) == (7, group.prompt.text, group.prompt.answer)
        assert (row["pictures"], row["picture_tokens"]) == ([group.prompt.pictures[0].key], [9])
        assert row["tokens"] == rollout.tokens_R.tolist()
        assert "".join(row["pieces"]) == rollout.text + "<|im_end|>"
        assert np.array_equal(np.array(row["logprobs"], np.float32), rollout.logprobs_R)
        assert (row["trainer_logprobs"] is not None, row["entropy"] is not None) == (place == 1, place == 1)
        assert row["advantage"] == batch.samples[place].advantages_S[-1]
        assert dict(row["rewards"]) == rollout.rewards
    kept = Image.open(tmp_path / "rollouts" / "pictures" / f"{groups[0].prompt.pictures[0].key}.png")
    assert np.array_equal(np.asarray(kept), np.asarray(groups[0].prompt.pictures[0].image))


def test_every_so_many_steps_and_so_many_groups_and_each_picture_once(tmp_path: Path) -> None:
    make_run(tmp_path, MadeRun(steps=12, every=5, groups=2, pictures=3))
    assert list(step_files(tmp_path)) == [0, 5, 10, 11]
    assert {pq.read_metadata(path).num_rows for path in step_files(tmp_path).values()} == {16}
    assert 2 <= len(list((tmp_path / "rollouts" / "pictures").iterdir())) <= 3
    make_run(tmp_path / "none", MadeRun(steps=3, every=0))
    assert not (tmp_path / "none" / "rollouts").exists()
    usual = made_config(MadeRun())
    assert usual.checkpoint.every % type(usual.tracking)().rollouts_every == 0, "the step behind a checkpoint is stored"


def test_a_resumed_run_sets_aside_what_it_does_again(tmp_path: Path) -> None:
    run = MadeRun(steps=12, every=5, groups=1)
    make_run(tmp_path, run)
    with Tracker(made_config(run), tmp_path, stage="sft", start_step=2):
        assert list(step_files(tmp_path)) == [0, 5, 10, 11]
    with Tracker(made_config(run), tmp_path, start_step=4):
        assert list(step_files(tmp_path)) == [0]
    assert len(list((tmp_path / "rollouts" / "replaced").iterdir())) == 3


def test_a_full_disk_costs_the_file_and_is_told_once(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    make_run(tmp_path, MadeRun(steps=3, every=1))
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["pictures"]
    assert capsys.readouterr().out.count("No space left") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_characters_of_several_tokens_stand_at_their_last() -> None:
    letters = [b"4", "√".encode()[:1], "√".encode()[1:], b"2", "½".encode()[:1]]

    def bytewise(tokens: list[int]) -> str:
        return b"".join(letters[token] for token in tokens).decode("utf-8", "replace")

    assert pieces([0, 1, 2, 3], bytewise, {}) == ["4", "", "√", "2"]
    assert pieces([3, 4], bytewise, {}) == ["2", "\ufffd"], "cut off within a character"


@pytest.mark.parametrize("text", ["", "\ud800 lone surrogate"])
def test_any_text_is_taken(tmp_path: Path, text: str) -> None:
    (group,) = groups_of(MadeRun(groups=1, responses=2))
    odd = replace(group.rollouts[0], text=text)
    group = replace(group, rollouts=(odd, group.rollouts[1]))
    store(tmp_path, 0, [group], batch_of([group]), decode, {})
    assert pq.read_table(rollouts.step_file(tmp_path, 0)).to_pylist()[0]["text"] == text.replace("\ud800", "?")


def test_wandb_gets_a_table_with_the_pictures(tmp_path: Path) -> None:
    quiet = {"wandb": "offline", "tensorboard": False, "console": False, "rollouts_per_step": 2}
    make_run(tmp_path, MadeRun(steps=1, responses=2), tracking=quiet)
    (table,) = (tmp_path / "wandb").rglob("media/table/*.json")
    rows = json.loads(table.read_text())["data"]
    assert len(rows) == 4
    assert {row[1] for row in rows} == {"Image"}, "the pictures themselves travel in the table's artifact"
