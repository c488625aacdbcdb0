"""Whatever is wrong with a checkpoint or a disk: `eureka` names file and tensor, ends with 1, and leaves no half-made output.

Each damage is done to a good checkpoint and shown to every command that reads that kind.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron import cli
from eureka_megatron.config import make_config
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import ConfigError
from eureka_megatron.run.checks import check_rollout
from eureka_megatron.weights.offline import hf_to_megatron
from eureka_megatron.weights.torch_dist import append
from eureka_megatron.weights.torch_dist_metadata import StoredTensor, read_metadata, write_metadata

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sharded HF directory and the same in Megatron's format."""
    folder = tmp_path_factory.mktemp("good")
    hf = build_published(folder / "hf", randomize_all=True, max_shard_size="3MB")
    assert (hf / SHARD).exists()
    hf_to_megatron(hf, folder / "megatron")
    return {"hf": hf, "megatron": folder / "megatron"}


def change_config(**values: object) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """All into one file, changed."""

    def damage(directory: Path) -> None:
        tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            tensors |= load_file(file)
            file.unlink()
        (directory / INDEX).unlink()
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def several(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"], tensors["visual.merger.ln_q.weight"]
    tensors |= {"surprise.a": torch.zeros(1), "surprise.b": torch.zeros(1)}
    tensors["lm_head.weight"] = torch.zeros(2, 3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(256, 128, dtype=torch.int32)


def shorten(name: str, size: int) -> Callable[[Path], object]:
    return lambda directory: os.truncate(directory / name, size)


def lengthen_header(directory: Path) -> None:
    with (directory / SHARD).open("r+b") as file:
        file.write((10**9).to_bytes(8, "little"))


def point_elsewhere(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def as_pickle(directory: Path) -> None:
    for path in (*directory.glob("*.safetensors"), directory / INDEX):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


REFUSED = {
    "yarn": (
        change_config(rope_scaling={"type": "yarn", "factor": 4.0, "mrope_section": [4, 6, 6]}),
        ["config.json: rope_scaling.type is 'yarn'; only unscaled rotary positions"],
    ),
    "quantised": (
        change_config(quantization_config={"quant_method": "awq", "bits": 4}),
        ["config.json: quantization_config: the weights are quantised (awq)"],
    ),
    "text where a number belongs": (change_config(hidden_size="128"), ["config.json", "'hidden_size' expected int"]),
    "section is null": (change_config(rope_scaling=None), ["config.json: mrope_section is None"]),
}

HF_DAMAGES = {
    "missing shard": (lambda d: (d / SHARD).unlink(), [f"{INDEX} names files that are absent: {SHARD}"]),
    "index names absent files": (point_elsewhere, [INDEX, "model-00009-of-00009.safetensors"]),
    "index is no JSON": (lambda d: (d / INDEX).write_text("{"), [f"{INDEX} is not a safetensors index"]),
    "no index": (lambda d: (d / INDEX).unlink(), [f"{INDEX} is missing beside", SHARD]),
    "truncated header": (shorten(SHARD, 100), [f"{SHARD}: truncated or not safetensors"]),
    "truncated to nothing": (shorten(SHARD, 0), [f"{SHARD}: truncated or not safetensors (0 bytes"]),
    "truncated data": (shorten(SHARD, 100_000), [f"{SHARD}: truncated: '", "ends at byte"]),
    "header longer than the file": (lengthen_header, [f"{SHARD}: truncated or not safetensors"]),
    "missing tensor": (
        change_tensors(lambda t: t.pop("model.norm.weight")),
        ["1 tensors are missing: model.norm.weight"],
    ),
    "extra tensor": (
        change_tensors(lambda t: t.update(surprise=torch.zeros(1))),
        ["1 tensors have no place in this model: surprise (model.safetensors)"],
    ),
    "wrong shape": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(5)})),
        ["model.norm.weight (model.safetensors) is (5,), expected (128,)"],
    ),
    "wrong dtype": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(128, dtype=torch.int64)})),
        ["model.norm.weight (model.safetensors) is torch.int64"],
    ),
    "several kinds at once": (
        change_tensors(several),
        [
            "2 tensors are missing: visual.merger.ln_q.weight, model.norm.weight",
            "2 tensors have no place in this model: surprise.a (model.safetensors), surprise.b",
            "1 tensors have a wrong shape: lm_head.weight (model.safetensors) is (2, 3), expected (400, 128)",
            "1 tensors have a dtype that cannot be loaded: model.layers.0.mlp.up_proj.weight",
        ],
    ),
    "unknown architecture": (change_config(model_type="llama"), ["config.json", "'llama'"]),
    **REFUSED,
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "pickle": (as_pickle, ["pytorch_model.bin: pickled weights are not read"]),
    "nothing": (shutil.rmtree, ["does not exist"]),
}


def change_metadata(change: Callable[[Path, dict[str, StoredTensor]], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        tensors = read_metadata(directory)
        change(directory, tensors)
        write_metadata(directory, tensors)

    return damage


def add_tensor(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    with (directory / "__9_0.distcp").open("wb") as file:
        chunk = append(file, torch.zeros(3), (0,), "__9_0.distcp")
    tensors["surprise.weight"] = StoredTensor((3,), torch.float32, (chunk,))


def leave_a_gap(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    name = "decoder.layers.mlp.linear_fc1.weight"
    tensors[name] = StoredTensor(tensors[name].shape, tensors[name].dtype, tensors[name].chunks[1:])


DISTCP = "__0_0.distcp"
MEGATRON_DAMAGES = {
    "missing file": (lambda d: (d / DISTCP).unlink(), [f".metadata names files that are absent: {DISTCP}"]),
    "truncated file": (shorten(DISTCP, 5000), [f"truncated: {DISTCP}"]),
    "truncated index": (shorten(".metadata", 500), [".metadata cannot be read"]),
    "no index of the format": (lambda d: (d / "metadata.json").unlink(), ["metadata.json does not exist"]),
    "missing tensor": (
        change_metadata(lambda _, t: t.pop("decoder.final_layernorm.weight")),
        ["1 tensors are missing: model.norm.weight"],
    ),
    "extra tensor": (
        change_metadata(add_tensor),
        ["1 tensors have no place in this model: surprise.weight (.metadata)"],
    ),
    "missing part of a tensor": (
        change_metadata(leave_a_gap),
        ["the chunks of these tensors do not cover them: decoder.layers.mlp.linear_fc1.weight"],
    ),
    "wrong shape": (
        change_config(vocab_size=416),
        ["embedding.word_embeddings.weight (.metadata) is (400, 128), expected (416, 128)"],
    ),
    "unknown architecture": (change_config(model_type="llama"), ["config.json", "'llama'"]),
    **REFUSED,
}

CASES = [
    *(("hf-to-megatron", "hf", name) for name in HF_DAMAGES),
    *((command, "megatron", name) for command in ("megatron-to-hf", "export") for name in MEGATRON_DAMAGES),
]


def command_line(command: str, source: Path | str, output: Path | str) -> list[str]:
    if command == "export":
        return ["export", str(source), "--output", str(output), "--quiet"]
    return ["convert", command, "--input", str(source), "--output", str(output), "--quiet"]


@pytest.mark.parametrize(("command", "kind", "damage"), CASES)
def test_a_damaged_checkpoint_is_described_and_nothing_is_written(
    good: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, command: str, kind: str, damage: str
) -> None:
    source = shutil.copytree(good[kind], tmp_path / "source")
    change, expected = (HF_DAMAGES if kind == "hf" else MEGATRON_DAMAGES)[damage]
    change(source)
    assert cli.main(command_line(command, source, tmp_path / "out")) == 1
    lines = capsys.readouterr().err.splitlines()
    for part in expected:
        assert any(part in line for line in lines), lines
    assert all(line.startswith("error: ") for line in lines)
    # One line for each kind of problem: a lost shard's tensors or a wrong number in config.json are not told one by one.
    assert len(lines) == (4 if damage == "several kinds at once" else 1), lines
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
"""
FORBIDDEN = """
import os
os.seteuid(65534)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Which others may enter from above, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf", "export"])
@pytest.mark.parametrize(
    ("limit", "message"), [(FULL, "File too large"), (FORBIDDEN, "Permission denied")], ids=["full", "forbidden"]
)
def test_a_full_or_forbidden_disk_is_told_and_nothing_is_left(
    good: dict[str, Path], open_folder: Path, command: str, limit: str, message: str
) -> None:
    """Permission is taken from the command itself, root or not, after its imports (an interpreter in a home folder is unreadable then)."""
    source = shutil.copytree(good["hf" if command == "hf-to-megatron" else "megatron"], open_folder / "source")
    for file in source.iterdir():
        file.chmod(0o644)
    target = open_folder / "target"
    target.mkdir()
    if os.geteuid():
        target.chmod(0o555)
        limit = limit.replace("os.seteuid(65534)", "")
    program = (
        "import sys, eureka_megatron.release.export, torch.distributed.checkpoint.filesystem\n"
        f"from eureka_megatron import cli\n{limit}\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *command_line(command, source, target / "out")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert f"{target / 'out'} cannot be written: " in done.stderr
    assert message in done.stderr
    assert "nothing was left" in done.stderr
    assert list(target.iterdir()) == []


def test_rollouts_are_as_long_as_the_positions_at_most(tmp_path: Path) -> None:
    directory = build_published(tmp_path / "model", weights=False, max_position_embeddings=160)
    values = {"model": {"path": directory}, "data": {"train": str(tmp_path / "x.jsonl"), "max_prompt_tokens": 100}}

    def check(tokens: int) -> None:
        check_rollout(make_config(values | {"rollout": {"max_model_tokens": tokens, "max_response_tokens": 40}}))

    check(160)
    with pytest.raises(ConfigError, match=r"rollout\.max_model_tokens=161 is more than max_position_embeddings=160 in"):
        check(161)
