"""MMK12 parquet files become rows the reader takes; validation finds what training would stumble over."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from eureka_megatron.cli.commands import main
from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.prepare import Validation, convert_mmk12, validate
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError


def picture(kind: str = "PNG") -> bytes:
    return saved(Image.new("RGB", (84, 84), (200, 30, 30)), kind)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def record(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"m{number}",
        "question": "<image>What is x?",
        "image": {"bytes": picture(), "path": None},
        "answer": "12",
        "subject": "math",
    }
    return row | changes


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    directory = build_published(tmp_path_factory.mktemp("model") / "hf", weights=False)
    return Processor(directory, min_pixels=784, max_pixels=640 * 784)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_rows_of_several_files_can_be_read_and_bad_ones_are_named(tmp_path: Path, processor: Processor) -> None:
    first = write_parquet(tmp_path / "a.parquet", [record(0), record(1, image={"bytes": b"junk", "path": None})])
    second = write_parquet(
        tmp_path / "b.parquet", [record(2, image={"bytes": picture("JPEG"), "path": None}), record(3, answer=" ")]
    )
    target, problems = convert_mmk12([first, second], tmp_path / "out")
    dataset = load_dataset(target, processor)
    assert [prompt.id for prompt in dataset] == ["m0", "m2"]
    assert all("What is x?" in prompt.text and "<image>" not in prompt.text for prompt in dataset)
    assert [problem.origin for problem in problems] == [f"{first}:2", f"{second}:2"]
    assert sorted(path.suffix for path in (tmp_path / "out" / "images").iterdir()) == [".jpg", ".png"]


def test_pictures_of_every_kind_the_reader_takes_are_converted_and_no_other(
    tmp_path: Path, processor: Processor
) -> None:
    grey = Image.new("L", (84, 84), 90)
    data = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    for options in ({"save_all": True, "append_images": [grey]}, {"exif": b"Exif\0\0MM"}):
        data.append(saved(grey, "MPO" if "save_all" in options else "JPEG", **options))
    bad = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", picture("PNG")[:90], saved(grey, "ICO")]
    rows = [record(n, image={"bytes": one, "path": None}) for n, one in enumerate([*data, *bad])]
    target, problems = convert_mmk12([write_parquet(tmp_path / "a.parquet", rows)], tmp_path / "out")
    assert [problem.origin.rpartition(":")[2] for problem in problems] == ["9", "10", "11"]
    assert len(list(load_dataset(target, processor))) == len(data)


def test_rows_that_cannot_be_used_are_told_and_cost_no_other(tmp_path: Path) -> None:
    odd = [b"What is x?", b"\xff<image>", b"<image2>?", b"And y?", b"And z?"]
    table = pyarrow.table(
        {
            "id": [str(n) for n in range(5)],
            "question": pyarrow.array(odd, pyarrow.binary()).view(pyarrow.string()),
            "image": [{"bytes": picture(), "path": None}] * 5,
            "answer": [1.0, 2.0, 3.0, float("nan"), float("inf")],
            "subject": ["math"] * 5,
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    target, problems = convert_mmk12([tmp_path / "a.parquet"], tmp_path / "out")
    assert len(target.read_text().splitlines()) == 1
    assert [problem.origin.rpartition(":")[2] for problem in problems] == ["2", "3", "4", "5"]
    assert not any("a.parquet" in problem.reason for problem in problems)


def test_nothing_is_overwritten_and_wrong_files_are_named(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "a.parquet", [record(0)])
    convert_mmk12([good], tmp_path / "out")
    with pytest.raises(UserError, match=r"train\.jsonl exists and is not overwritten"):
        convert_mmk12([good], tmp_path / "out")
    other = write_parquet(tmp_path / "b.parquet", [{"id": "1", "text": "x"}])
    with pytest.raises(
        UserError, match=r"b\.parquet: columns \['question', 'image', 'answer', 'subject'\] are missing"
    ):
        convert_mmk12([good, other], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "c.parquet").write_text("hello")
    with pytest.raises(UserError, match=r"c\.parquet is no parquet file"):
        convert_mmk12([tmp_path / "c.parquet"], tmp_path / "new")


def test_validation_finds_every_kind_of_bad_row_and_keeps_the_good(tmp_path: Path, processor: Processor) -> None:
    paths = write_counting(tmp_path, train=6, test=2)
    rows = [json.loads(line) for line in paths.train.read_text().splitlines()]
    rows[1]["message"] = "[{"
    del rows[3]["answer"]
    (tmp_path / "images" / "train-00004.png").write_bytes(b"junk")
    paths.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = validate(paths.train, processor, clean=tmp_path / "clean.jsonl")
    assert (found.rows, found.pictures, found.videos) == (3, 3, 0)
    assert [problem.origin.rpartition(":")[2] for problem in found.problems] == ["2", "4", "5"]
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert kept == [rows[0], rows[2], rows[5]]
    again = validate(tmp_path / "clean.jsonl", processor)
    assert again == Validation(3, 3, 0, found.longest_tokens, ())
    assert not list(tmp_path.glob(".*rejected*"))


def test_videos_are_counted_and_checked_too(tmp_path: Path, processor: Processor) -> None:
    for number in range(4):
        Image.new("RGB", (56, 28), (number, 0, 0)).save(tmp_path / f"{number}.png")
    clip = {"type": "video", "video": ["0.png", "1.png", "2.png", "3.png"]}
    broken = {"type": "video", "video": ["0.png", "9.png"]}
    long = {"type": "video", "video": ["0.png"] * 3002}
    image = {"type": "image", "image": "0.png"}
    contents = [[clip, image], [broken], [image], [clip, clip, "?"], [long]]
    rows = [{"message": [{"role": "user", "content": content}], "answer": "1"} for content in contents]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = validate(tmp_path / "rows.jsonl", processor)
    assert (found.rows, found.pictures, found.videos) == (3, 2, 3)
    assert [problem.reason for problem in found.problems] == [
        f"picture '9.png' does not exist (looked for {tmp_path / '9.png'})",
        "the video of '0.png' … has 3002 frames; data.video_max_frames=768",
    ]
    assert found.longest_tokens > 8


def test_tables_are_validated_and_not_copied(tmp_path: Path, processor: Processor) -> None:
    table = write_parquet(
        tmp_path / "a.parquet", [record(0), record(1, image={"bytes": b"junk", "path": None}), record(2, answer="")]
    )
    found = validate(table, processor)
    assert (found.rows, found.pictures) == (1, 1)
    assert [problem.origin for problem in found.problems] == [f"{table}:2", f"{table}:3"]
    with pytest.raises(UserError, match="is a table; good rows can be copied from JSONL files only"):
        validate(table, processor, clean=tmp_path / "clean.jsonl")


def test_the_command_prints_a_table_and_answers_by_its_exit_code(
    tmp_path: Path, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_counting(tmp_path, train=3, test=1)
    arguments = ["--model", str(processor.model_dir), "--min-pixels", "784"]
    assert main(["data", "validate", str(paths.train), *arguments]) == 0
    paths.train.write_text(paths.train.read_text() + "{}\n")
    assert main(["data", "validate", str(paths.train), *arguments]) == 1
    printed = capsys.readouterr().out
    assert "3 good rows, 0 bad" in printed
    assert "3 good rows, 1 bad" in printed
    assert "key 'message' is missing" in printed


def test_a_runs_yaml_says_what_is_read_and_how(
    tmp_path: Path, processor: Processor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = write_counting(tmp_path, train=4, test=2)
    rows = [json.loads(line) for line in paths.train.read_text().splitlines()]
    rows[1]["response"] = "a<|im_end|>b"
    rows[2]["response"] = "1 " * 300
    del rows[3]["response"]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{path: {processor.model_dir}}}\ndata: {{train: ~/train.jsonl, test: ~/test.jsonl, min_pixels: 784, max_prompt_tokens: 96}}\n"
        "training: {max_tokens_per_micro_batch: 400}\nrollout: {max_response_tokens: 40}\n"
    )
    assert main(["data", "validate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"{paths.train}: 4 good rows, 0 bad; 4 pictures, 0 videos, 4 responses" in printed
    assert f"{paths.test}: 2 good rows" in printed
    assert main(["data", "validate", "--config", str(run), "data.train=~/other.jsonl,~/train.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "other.jsonl: 2 good rows, 2 bad; 2 pictures, 0 videos, 1 responses" in printed
    assert "contains the control token <|im_end|>" in printed
    assert "training.max_tokens_per_micro_batch" in printed
    named = ["data", "validate", str(run), str(tmp_path / "other.jsonl")]
    assert main([*named, "--responses", "response", "--clean=~/clean.jsonl"]) == 1
    printed = capsys.readouterr().out
    assert "1 good rows, 3 bad" in printed
    assert "key 'response' is missing" in printed
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 1
    assert main([*named, "data.max_prompt_tokens=20", "data.on_bad_row=skip"]) == 1
    assert "0 good rows, 4 bad" in capsys.readouterr().out
    for words, told in (
        ([str(run), "--clean=~/x.jsonl"], "--clean is for one file"),
        ([str(paths.train)], "needs a data file and --model"),
        ([str(paths.train), "a.b=c", f"--model={processor.model_dir}"], "'a.b=c': overrides are for a run's YAML file"),
        ([str(run), "data.tran=x"], "unknown key 'data.tran'"),
    ):
        assert main(["data", "validate", *words]) > 0
        assert told in capsys.readouterr().err
