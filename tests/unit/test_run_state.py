"""What the driver puts into a checkpoint and takes out again, and which checkpoint it chooses."""

import json
from pathlib import Path

import numpy as np
import pytest

from eureka_megatron.checkpoint import store
from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.data.counting import write_counting
from eureka_megatron.data.dataset import Dataset, load_dataset
from eureka_megatron.data.processor import Processor
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.run_state import choose_checkpoint, differences, pack, unpack
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


def test_changed_keys_are_listed() -> None:
    old = {"optimizer": {"lr": 1e-6, "name": "adam"}, "run": {"seed": 0}, "gone": 1}
    new = {"optimizer": {"lr": 5e-7, "name": "adam"}, "run": {"seed": 0}, "new": {"a": 1}}
    assert differences(old, new) == ["optimizer.lr 1e-06 → 5e-07", "gone 1 → None", "new None → {'a': 1}"]
