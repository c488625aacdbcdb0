"""Offline conversion: bitwise both ways, resumable, atomic, and readable by Megatron's own loader."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron.cli import main
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.weights import offline
from eureka_megatron.weights.hf_files import INDEX_FILE, Reader
from eureka_megatron.weights.listing import describe, differences
from eureka_megatron.weights.offline import hf_to_megatron, megatron_to_hf
from eureka_megatron.weights.online import open_checkpoint
from eureka_megatron.weights.table import hub_name
from eureka_megatron.weights.torch_dist import DistReader
from tests.helpers.naming import newer_name

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "checkpoint_convert"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(directory)
    return {name: reader[name][:] for name in reader.tensors}


def same(left: Path, right: Path) -> bool:
    return differences(describe(left), describe(right)) == []


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and units even for a tiny model."""
    monkeypatch.setattr(offline, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(offline, "UNIT_BYTES", 300_000)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_there_and_back_is_bitwise(tmp_path, small_blocks, tied, sharded):
    options = {"tied": tied, "randomize_all": True, "dtype": torch.bfloat16}
    source = build_published(tmp_path / "hf", max_shard_size="500KB" if sharded else "5GB", **options)
    seen = []
    hf_to_megatron(source, tmp_path / "megatron", verify=True, progress=lambda *amounts: seen.append(amounts))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=True, max_shard_bytes=500_000 if sharded else 10**9)
    assert same(source, tmp_path / "back")
    assert same(source, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    assert (tmp_path / "back" / INDEX_FILE).exists() == sharded
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == 2 * sum(info.nbytes for info in Reader(source).tensors.values())
    assert not list(tmp_path.glob(".*"))


def test_the_newer_naming_goes_in_and_the_hub_naming_comes_out(tmp_path):
    source = build_published(tmp_path / "hf", randomize_all=True)
    content = load_file(source / "model.safetensors")
    new = {newer_name(name): tensor for name, tensor in content.items()}
    assert all(hub_name(name) in content for name in new)
    save_file(new, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == content.keys()
    assert all(torch.equal(back[name], content[name]) for name in content)


def test_dtype_casts_and_config_says_so(tmp_path):
    source = build_published(tmp_path / "hf", randomize_all=True)
    hf_to_megatron(source, tmp_path / "megatron", dtype=torch.bfloat16, verify=True)
    expected, found = weights(source), weights(tmp_path / "megatron")
    assert all(torch.equal(found[name].flatten(), expected[name].bfloat16().flatten()) for name in expected)
    assert json.loads((tmp_path / "megatron" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_workers_are_processes_and_write_the_same(tmp_path, small_blocks):
    source = build_published(tmp_path / "hf", randomize_all=True)
    hf_to_megatron(source, tmp_path / "one")
    hf_to_megatron(source, tmp_path / "two", workers=2, verify=True)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path):
    source = build_published(tmp_path / "hf", randomize_all=True)
    code = (
        "import sys, time\n"
        "from eureka_megatron.weights import offline\n"
        "offline.CHUNK_BYTES, offline.UNIT_BYTES = 20_000, 300_000\n"
        "offline.hf_to_megatron(sys.argv[1], sys.argv[2], progress=lambda done, total: time.sleep(0.2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, source, tmp_path / "out"])
    units = tmp_path / ".out.converting" / "units"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not units.is_dir() or len(list(units.glob("*.json"))) < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in units.glob("*.json")}
    assert len(kept) >= 3
    times = []
    resumed = code.replace("time.sleep(0.2)", "None").replace(
        "\noffline.hf_to",
        "\nwritten = offline._write_distcp\n"
        "offline._write_distcp = lambda unit, blocks: print(unit) or written(unit, blocks)\noffline.hf_to",
    )
    result = subprocess.run(
        [sys.executable, "-c", resumed, source, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    times = [f"{unit}.json" for unit in result.stdout.split()]
    assert times
    assert not set(times) & set(kept)
    assert same(source, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_a_killed_worker_is_told_and_the_next_conversion_goes_on(tmp_path, small_blocks):
    source = build_published(tmp_path / "hf", randomize_all=True)

    def kill_a_worker() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len(workers := multiprocessing.active_children()) == 2:
                time.sleep(0.2)  # they are importing; Python 3.11 hangs if one dies while the other is being started
                os.kill(workers[0].pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    with pytest.raises(UserError, match=r"was killed .* goes on where this one stopped"):
        hf_to_megatron(source, tmp_path / "out", workers=2)
    killer.join()
    assert not (tmp_path / "out").exists()
    hf_to_megatron(source, tmp_path / "out", workers=2)
    assert same(source, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_a_changed_source_starts_over(tmp_path, small_blocks):
    source = build_published(tmp_path / "hf", randomize_all=True)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(source, tmp_path / "out", progress=interrupt)
    assert (tmp_path / ".out.converting").exists()
    build_published(source, seed=1, randomize_all=True)
    hf_to_megatron(source, tmp_path / "out")
    assert same(source, tmp_path / "out")


def test_a_second_conversion_to_the_same_output_is_refused_and_leaves_the_first_alone(tmp_path, small_blocks):
    source = build_published(tmp_path / "hf", randomize_all=True)
    messages = []

    def try_again(done: int, total: int) -> None:
        if done and not messages:
            with pytest.raises(UserError) as raised:
                hf_to_megatron(source, tmp_path / "out")
            messages.append(str(raised.value))

    hf_to_megatron(source, tmp_path / "out", progress=try_again)
    assert "another conversion" in messages[0]
    assert same(source, tmp_path / "out")


def test_outputs_are_not_overwritten(tmp_path):
    source = build_published(tmp_path / "hf")
    with pytest.raises(UserError, match="hf exists and is not overwritten"):
        hf_to_megatron(source, source)


def test_the_wrong_direction_is_explained(tmp_path):
    source = build_published(tmp_path / "hf")
    with pytest.raises(UserError, match="in HF format; hf-to-megatron converts it"):
        megatron_to_hf(source, tmp_path / "out")


def test_verification_finds_a_flipped_bit(tmp_path, monkeypatch):
    source = build_published(tmp_path / "hf", randomize_all=True)
    finish = offline._finish

    def finish_and_flip(job: offline.Job) -> None:
        finish(job)
        file = job.target / "__0_0.distcp"
        chunk = next(c for c in DistReader(job.target, offline.read_hf_config(source)).stored.values()).chunks[0]
        data = bytearray(file.read_bytes())
        data[chunk.offset + chunk.nbytes // 2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(offline, "_finish", finish_and_flip)
    with pytest.raises(UserError, match=r"different values in visual\.patch_embed\.proj\.weight"):
        hf_to_megatron(source, tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def convert_with_a_file_limit(source: Path, output: Path) -> subprocess.CompletedProcess:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "from eureka_megatron.cli import main\n"
        "sys.exit(main(['convert', 'hf-to-megatron', '--input', sys.argv[1], '--output', sys.argv[2], '--quiet']))\n"
    )
    return subprocess.run([sys.executable, "-c", code, source, output], capture_output=True, text=True)


def test_a_full_disk_leaves_nothing_half_made(tmp_path):
    source = build_published(tmp_path / "hf")
    result = convert_with_a_file_limit(source, tmp_path / "out")
    assert result.returncode == 1
    assert "out cannot be written: " in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / ".metadata").write_bytes(b"not a pickle"), r"\.metadata cannot be read"),
        (lambda d: (d / "metadata.json").unlink(), r"metadata\.json does not exist: the checkpoint is incomplete"),
        (lambda d: (d / "__0_0.distcp").unlink(), r"names files that are absent: __0_0\.distcp"),
        (lambda d: os.truncate(d / "__0_0.distcp", 10_000), r"truncated: __0_0\.distcp"),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps(os.system)), r"names posix\.system, which has no place"),
    ],
)
def test_damaged_megatron_checkpoints_are_named(tmp_path, damage, message):
    hf_to_megatron(build_published(tmp_path / "hf"), tmp_path / "megatron")
    damage(tmp_path / "megatron")
    with pytest.raises(UserError, match=message):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_missing_extra_and_misshapen_tensors_are_listed_together(tmp_path):
    source = build_published(tmp_path / "hf")
    content = load_file(source / "model.safetensors")
    del content["model.norm.weight"]
    content["surprise"] = torch.zeros(1)
    content["lm_head.weight"] = torch.zeros(2, 2)
    save_file(content, source / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: model\.norm\.weight\n.*surprise.*\n.*lm_head\.weight .*\(2, 2\)"):
        hf_to_megatron(source, tmp_path / "out")


def test_inspection_lists_and_compares(tmp_path, capsys):
    source = build_published(tmp_path / "hf", randomize_all=True)
    hf_to_megatron(source, tmp_path / "megatron")
    assert main(["convert", "inspect", str(tmp_path / "megatron"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "torch_dist"
    assert report["parameters_by_dtype"] == {"float32": report["parameters"]}
    assert main(["convert", "inspect", str(source)]) == 0
    assert "lm_head.weight" in capsys.readouterr().out
    assert main(["convert", "inspect", str(source), str(tmp_path / "megatron")]) == 0
    other = shutil.copytree(source, tmp_path / "other")
    content = load_file(other / "model.safetensors")
    content["model.norm.weight"][:3] += 1
    content["lm_head.weight"] = content["lm_head.weight"].bfloat16()
    del content["visual.merger.ln_q.weight"]
    save_file(content, other / "model.safetensors")
    capsys.readouterr()
    assert main(["convert", "inspect", str(source), str(other)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "model.norm.weight: 3 of 128 values differ" in out
    assert "lm_head.weight: dtype torch.float32 against torch.bfloat16" in out
    assert f"only in {source}: visual.merger.ln_q.weight" in out


def test_the_scripts_convert_and_report_errors_in_one_line(tmp_path):
    source = build_published(tmp_path / "hf")
    arguments = ["--input", source, "--output", tmp_path / "out", "--dtype", "bfloat16", "--verify"]
    done = subprocess.run([sys.executable, TOOLS / "hf_to_megatron.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written and verified" in done.stdout
    again = subprocess.run([sys.executable, TOOLS / "hf_to_megatron.py", *arguments], capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1
