"""`eureka demo`, cut short: every station of the story is passed for real; how far it learns is `make demo`'s to show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]

SHORT = ["sft.steps=40", "training.steps=2", "algorithm.filter.enabled=false", "training.evaluate_every=2"]


def eureka(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eureka_megatron", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=550,
    )


def test_the_short_story_leaves_everything_behind(tmp_path: Path) -> None:
    done = eureka("demo", "--out", str(tmp_path / "demo"), "--overrides", *SHORT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    layout = {"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "dp": 1, "sequence_parallel": 1}
    assert summary["trainer_layout"] == layout
    assert summary["rollout_engine"] == "vllm"
    assert summary["steps"] == 2
    assert summary["logprob_max_abs_diff"] <= 1e-4  # measured 4e-5 over the long demo
    assert summary["accuracy_export_vllm"] == summary["accuracy_after"]  # same weights, same seeds, another engine
    for name in ("hf/model.safetensors", "hf/README.md", "hf/preprocessor_config.json", "curves.png", "config.yaml"):
        assert (tmp_path / "demo" / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["sft"] * 40 + ["train"] * 2
    assert "curves.png" in done.stdout
    again = eureka("demo", "--out", str(tmp_path))
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "not from an earlier demo" in again.stderr


def test_a_bad_configuration_starts_nothing(tmp_path: Path) -> None:
    for override, message in [
        ("parallel.tensor=3", "parallel.tensor=3 does not divide"),
        ("algorithm.loss=pp_clip", "unknown loss 'pp_clip'"),
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
    ]:
        config = tmp_path / "run.yaml"
        model, data = tmp_path / "model", tmp_path / "data"
        if not model.exists():
            from eureka_megatron.demo.counting import write_counting
            from eureka_megatron.demo.forms import build_published

            build_published(model)
            write_counting(data, train=4, test=2)
            config.write_text(
                f"model: {{path: {model}}}\ndata: {{train: {data}/train.jsonl, min_pixels: 784}}\nrun: {{output: {tmp_path}/out}}"
            )
        done = eureka("train", str(config), override)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "hf").mkdir(parents=True)
    (tmp_path / "out" / "hf" / "config.json").touch()
    done = eureka("train", str(config))
    assert done.returncode == 1
    assert f"{tmp_path}/out/hf" in done.stderr  # an earlier run's export is found before, not after, this one's work


def test_bad_rows_are_named_with_file_and_line(tmp_path: Path) -> None:
    from eureka_megatron.demo.counting import write_counting
    from eureka_megatron.demo.forms import build_published

    build_published(tmp_path / "model")
    paths = write_counting(tmp_path / "data", train=4, test=2)
    rows = paths.train.read_text().splitlines()
    broken = json.loads(rows[2]) | {"message": "[{"}
    paths.train.write_text("\n".join([*rows[:2], json.dumps(broken), *rows[3:]]))
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tmp_path}/model}}\ndata: {{train: {paths.train}, min_pixels: 784}}")
    done = eureka("train", str(config))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {paths.train}:3: ")
