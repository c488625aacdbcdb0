"""The page of a run holds what its folder holds, whatever state that is in, and nothing a run says becomes markup."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from eureka_megatron.cli import main
from eureka_megatron.report.contents import read_run
from eureka_megatron.report.page import write_report
from eureka_megatron.report.samples import PICTURE_BYTES, StoredRollouts
from eureka_megatron.tracking.rollouts import step_file
from eureka_megatron.tracking.tracker import Tracker
from tests.helpers.made_run import MadeRun, made_config, make_long_run, make_run

BLOCK = re.compile(r'<script type="text/plain" id="([^"]+)">([^<]*)</script>\n')
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


def packed(page: Path) -> dict[str, str]:
    return dict(BLOCK.findall(page.read_text()))


def unpacked(page: Path, name: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(packed(page)[name])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), MadeRun(steps=12, every=5, groups=3, responses=4))


def test_the_page_holds_metrics_rollouts_and_pictures(folder: Path) -> None:
    page = write_report([folder])
    assert page == folder / "report.html"
    (run,) = unpacked(page, "runs")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = run["stages"]["train"]
    assert own["steps"] == list(range(12))
    assert own["series"]["train/reward"] == pytest.approx([line["train/reward"] for line in lines], rel=1e-5)
    assert own["series"]["eval/accuracy"][8:11] == [None, pytest.approx(lines[9]["eval/accuracy"]), None]
    assert run["problems"] == []
    index = unpacked(page, "index-0")
    assert index["step"] == sorted([0, 5, 10, 11] * 12)
    responses = [
        unpacked(page, f"step-0-{step}")["groups"][str(group)]["responses"][str(response)]
        for step, group, response in zip(index["step"], index["group"], index["response"], strict=True)
    ]
    assert index["length"] == [len(one["pieces"]) for one in responses]
    assert index["total"] == [one["rewards"]["total"] for one in responses]
    assert all(one["pieces"][-1] == "<|im_end|>" for one in responses)
    assert all(
        len(one["pieces"]) == len(one["logprobs"]) == len(one["difference"]) == len(one["entropy"]) for one in responses
    )
    keys = {
        key
        for step in (0, 5, 10, 11)
        for group in unpacked(page, f"step-0-{step}")["groups"].values()
        for key in group["pictures"]
    }
    assert {name for name in packed(page) if name.startswith("picture-")} == {f"picture-{key}" for key in keys}


def test_the_page_needs_nothing_from_elsewhere(folder: Path) -> None:
    markup = BLOCK.sub("", write_report([folder]).read_text())
    assert not re.search(r"https?://", markup)
    assert re.findall(r'(?:src|href)="([^"]*)"', markup) == ["data:,"]
    assert "default-src 'none'" in markup


def test_hostile_text_never_becomes_markup(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path, MadeRun(steps=1, text=HOSTILE), run={"name": HOSTILE})])
    text = page.read_text()
    assert "onerror" not in text
    assert len(re.findall("<script", text)) == len(BLOCK.findall(text)) + 1
    said = unpacked(page, "step-0-0")["groups"]["0"]["responses"]["0"]["pieces"]
    assert "".join(said) == HOSTILE + "<|im_end|>"


def test_an_empty_and_a_running_run_can_be_reported(tmp_path: Path) -> None:
    run = MadeRun(steps=12, every=5)
    with Tracker(made_config(run), tmp_path):
        (page,) = [write_report([tmp_path])]
    (empty,) = unpacked(page, "runs")
    assert (empty["stages"], empty["problems"], empty["planned"]["train"]) == ({}, [], 12)
    make_run(tmp_path, run)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 12, "sta')
    (running,) = unpacked(write_report([tmp_path]), "runs")
    assert running["stages"]["train"]["steps"][-1] == 11
    assert running["problems"] == []


def test_a_damaged_run_is_reported_with_what_is_wrong(tmp_path: Path) -> None:
    make_run(tmp_path, MadeRun(steps=12, every=5))
    (tmp_path / "config.yaml").write_text("run: [unclosed")
    (tmp_path / "topology.json").write_text("[]")
    step_file(tmp_path, 5).write_bytes(b"PAR1 no more")
    (next((tmp_path / "rollouts" / "pictures").iterdir())).unlink()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('7\n{"step": "x"}\n')
    page = write_report([tmp_path])
    (run,) = unpacked(page, "runs")
    starts = [problem.split()[0] for problem in run["problems"]]
    assert starts[:3] == ["metrics.jsonl:", "config.yaml", "topology.json"]
    assert starts[3] == "rollouts/step_000005.parquet"
    assert starts[4].startswith("rollouts/pictures/")
    assert set(unpacked(page, "index-0")["step"]) == {0, 10, 11}


def test_two_runs_are_compared_and_share_their_pictures(folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", MadeRun(steps=3, every=1, groups=3, responses=4), optimizer={"lr": 1e-5})
    page = write_report([folder, other], tmp_path / "sub" / "both.html")
    runs = unpacked(page, "runs")
    assert [run["config"]["optimizer.lr"] for run in runs] == [3e-4, 1e-5]
    assert unpacked(page, "index-1")["step"] == sorted([0, 1, 2] * 12)
    names = [name for name, _ in BLOCK.findall(page.read_text())]
    assert len(names) == len(set(names))


def test_configuration_faults_and_restarts(tmp_path: Path) -> None:
    run = MadeRun(steps=8)
    make_run(tmp_path, run)
    with Tracker(made_config(run, optimizer={"lr": 1e-4}), tmp_path, start_step=5) as tracker:
        tracker.log(5, {"train/reward": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["time"] = json.loads(lines[-2])["time"] + 500
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    found = read_run(tmp_path)
    assert found["defaults"]["optimizer.lr"] == 1e-6
    assert found["config"]["optimizer.lr"] == 3e-4
    assert found["changes"] == [{"stage": "train", "step": "5", "keys": [["optimizer.lr", 3e-4, 1e-4]]}]
    assert found["faults"] == {
        "non_finite": [{"stage": "train", "step": 5, "name": "train/reward", "value": "nan"}],
        "again": [{"stage": "train", "first": 5, "last": 7}],
        "pauses": [{"stage": "train", "step": 5, "seconds": pytest.approx(500)}],
    }
    assert found["topology"]["placement"] == "split"


def test_scores_are_found_however_deep(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "x"}}))
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "rows": 100}
    summary = {"mathvista": {"scores": {"official": score}, "groups": {"geometry": score}, "rows": 3}, "other": None}
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps(summary))
    assert read_run(tmp_path)["evaluation"] == [
        {"benchmark": "mathvista", "what": what, **score} for what in ("scores · official", "groups · geometry")
    ]


def test_a_large_picture_is_shown_smaller(tmp_path: Path) -> None:
    pictures = tmp_path / "rollouts" / "pictures"
    pictures.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "large.png")
    stored = StoredRollouts(tmp_path)
    url = stored.picture("large")
    assert url.startswith("data:image/webp;base64,")
    assert len(url) < (pictures / "large.png").stat().st_size / 5
    assert (pictures / "large.png").stat().st_size > PICTURE_BYTES
    assert stored.picture("../../secret") is None
    assert len(stored.problems) == 1


def test_mistakes_are_told_in_one_line(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert main(["report", str(folder), str(folder), str(folder)]) == 2
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "neither metrics.jsonl nor config.yaml" in errors[0]
    assert "one run's folder or two, found 3" in errors[1]
    assert "is a folder" in errors[2]


def test_what_breaks_off_leaves_the_page_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report([make_run(tmp_path, MadeRun(steps=1))])
    before = page.read_bytes()

    def interrupted(self: StoredRollouts) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoredRollouts, "steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report([tmp_path])
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".report*"))


def test_a_thousand_steps_of_64_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(make_long_run(tmp_path))]) == 0
    page = tmp_path / "report.html"
    size = page.stat().st_size / 2**20
    assert capsys.readouterr().out == f"{page} ({size:.1f} MiB)\n"
    assert len(unpacked(page, "index-0")["step"]) == 64_000
    assert size < 21  # measured 19.1, of responses of 66 tokens with log-probabilities, differences and entropies
