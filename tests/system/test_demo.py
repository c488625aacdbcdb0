"""`eureka demo`, cut short: every station of the story is passed for real; how far it learns is `make demo`'s to show."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from eureka_megatron.cli.commands import main
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published

pytestmark = [pytest.mark.system, pytest.mark.slow]

SHORT = ["sft.steps=40", "training.steps=2", "algorithm.filter.enabled=false", "tracking.wandb=disabled"]


def test_the_short_story_leaves_everything_behind(
    one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = _questions(tmp_path / "vision.parquet")
    asked = [
        f"training.evaluate_benchmarks.mathvision={vision}",
        "training.evaluate_every=2",
        "training.evaluate_best=eval/mathvision_paper",
    ]
    assert main(["demo", "--out", str(tmp_path / "demo"), "--overrides", *SHORT, *asked]) == 0, capsys.readouterr().err
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
    assert ["eval/mathvision_official" in line for line in lines[-2:]] == [False, True]
    best = json.loads((tmp_path / "demo" / "best.json").read_text())
    assert best == {"metric": "eval/mathvision_paper", "value": lines[-1]["eval/mathvision_paper"], "step": 2}
    assert (tmp_path / "demo" / "hf_best" / "model.safetensors").read_bytes() == (
        tmp_path / "demo" / "hf" / "model.safetensors"
    ).read_bytes()
    assert len((tmp_path / "demo/evaluation/step_000002/mathvision/answers.jsonl").read_text().splitlines()) == 5
    assert "curves.png" in capsys.readouterr().out
    _evaluate(tmp_path / "demo" / "hf", vision, summary, capsys)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "not from an earlier demo" in error


def _questions(path: Path) -> Path:
    """Five rows in MathVision's schema."""
    picture = io.BytesIO()
    Image.new("RGB", (90, 84), "red").save(picture, "PNG")
    row = {"question": "Which?", "options": list("ABCDE"), "answer": "B", "level": 1, "subject": "algebra"}
    row |= {"decoded_image": {"bytes": picture.getvalue(), "path": None}}
    parquet.write_table(pa.Table.from_pylist([row | {"id": str(number)} for number in range(5)]), path)
    return path


def _evaluate(model: Path, vision: Path, summary: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`eureka eval` of the export: the demo's own task, and two benchmarks, one of which was killed in the middle of a line
    and had a picture that is mended now."""
    out = vision.parent / "eval"
    out.mkdir()
    sphere = {
        "question": "$x + 1 = 2$?",
        "final_answer": ["1"],
        "answer_type": "Numerical",
        "is_multiple_answer": False,
    }
    (out / "OE_TO_maths_en_COMP.json").write_text(json.dumps([sphere | {"id": n} for n in range(2)]))
    (out / "mathvision").mkdir()
    whole = json.dumps({"id": "0", "sample": 0, "response": "\\boxed{B}", "tokens": 3})
    mended = json.dumps({"id": "2", "sample": 0, "response": "", "error": "2.png: cannot be decoded"})
    (out / "mathvision" / "answers.jsonl").write_text(f'{whole}\n{mended}\n{{"id": "1", "sample": 0, "resp')
    assert main(["eval", "--model", str(model), "--benchmark", "counting", "--output", str(out)]) == 0
    assert "counting" in capsys.readouterr().out
    figures = json.loads((out / "summary.json").read_text())["counting"]
    assert figures["rows"] == 200
    assert figures["scores"]["official"]["accuracy"] == summary["accuracy_export_vllm"]
    words = ["--benchmark", "mathvision", "--data", str(vision)]
    words += ["--benchmark", "olympiadbench", "--data", str(out / "OE_TO_maths_en_COMP.json")]
    assert main(["eval", "--model", str(model), *words, "--output", str(out), "--max-tokens", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told[name]["rows"] for name in ("mathvision", "olympiadbench")] == [5, 2]
    lines = [json.loads(line) for line in (out / "mathvision" / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list("01234")
    assert (lines[0]["tokens"], lines[0]["official"]) == (3, {"extraction": "b", "correct": True})  # not asked again
    assert all(line["prompt"].count("<|image_pad|>") == 1 and line["tokens"] <= 8 for line in lines[1:])
    assert "wrapped using the" in lines[1]["prompt"]  # the 32B prompt


def test_a_bad_configuration_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, model, data = tmp_path / "run.yaml", tmp_path / "model", tmp_path / "data"
    build_published(model)
    write_counting(data, train=4, test=2)
    config.write_text(
        f"model: {{path: {model}}}\ndata: {{train: {data}/train.jsonl, min_pixels: 784}}\nrun: {{output: {tmp_path}/out}}"
    )
    capsys.readouterr()
    for override, message in [
        ("parallel.tensor=3", "parallel.tensor=3 does not divide"),
        ("algorithm.loss=pp_clip", "unknown loss 'pp_clip'"),
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
    ]:
        assert main(["train", str(config), override]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "hf").mkdir(parents=True)
    (tmp_path / "out" / "hf" / "config.json").touch()
    assert main(["train", str(config)]) == 1
    assert (
        f"{tmp_path}/out/hf" in capsys.readouterr().err
    )  # an earlier run's export is found before, not after, this one's work


def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_published(tmp_path / "model")
    paths = write_counting(tmp_path / "data", train=4, test=2)
    rows = paths.train.read_text().splitlines()
    broken = json.loads(rows[2]) | {"message": "[{"}
    paths.train.write_text("\n".join([*rows[:2], json.dumps(broken), *rows[3:]]))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {tmp_path}/model}}\ndata: {{train: {paths.train}, min_pixels: 784}}\nrun: {{output: {tmp_path}/out}}"
    )
    capsys.readouterr()
    assert main(["train", str(config)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {paths.train}:3: ")
