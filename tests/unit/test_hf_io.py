"""Safetensors in and out: bitwise, readable by transformers' own library, and every kind of damage named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eureka_megatron.errors import UserError
from eureka_megatron.weights.hf_files import (
    INDEX_FILE,
    SINGLE_FILE,
    Reader,
    Writer,
    atomic_directory,
    plan_shards,
    read_header,
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(4, 6),
        "b": torch.randn(5).to(torch.bfloat16),
        "c": torch.randn(2, 3, 2).to(torch.float16),
        "d": torch.tensor(3, dtype=torch.int64),
        "e": torch.empty(0, 4),
        "f": torch.randn(8, 3).to(torch.float8_e4m3fn),
    }


def write(directory: Path, content: dict[str, torch.Tensor], **options) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()]
    with Writer(directory, plan, **options) as writer:
        for name, tensor in content.items():
            writer.write(name, tensor)
    return directory


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def fail_after_writing(directory: Path) -> None:
    (directory / "x").write_text("1")
    raise KeyError("a defect half-way")


def write_sharded(directory: Path) -> Path:
    return write(directory, {f"w{i}": torch.full((4,), float(i)) for i in range(4)}, max_shard_bytes=32)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_what_is_written_is_read_back_bitwise(tmp_path, max_shard_bytes):
    reader = Reader(write(tmp_path, tensors(), max_shard_bytes=max_shard_bytes))
    assert set(reader.tensors) == set(tensors())
    for name, tensor in tensors().items():
        assert reader[name].dtype == tensor.dtype
        assert reader[name].shape == tensor.shape
        assert bits(reader[name]) == bits(tensor)


def test_the_safetensors_library_reads_what_the_writer_wrote(tmp_path):
    loaded = load_file(write(tmp_path, tensors()) / SINGLE_FILE)
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {n: bits(t) for n, t in tensors().items()}


def test_the_reader_reads_what_the_safetensors_library_wrote(tmp_path):
    save_file(tensors(), tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    reader = Reader(tmp_path)
    assert {name: bits(reader[name]) for name in reader.tensors} == {n: bits(t) for n, t in tensors().items()}


def test_shards_and_index_are_those_of_transformers(tmp_path):
    from huggingface_hub import split_torch_state_dict_into_shards

    content = {f"w{i}": torch.zeros(n) for i, n in enumerate((10, 20, 30, 100, 5, 5))}
    write(tmp_path, content, max_shard_bytes=240)
    theirs = split_torch_state_dict_into_shards(
        content, filename_pattern="model{suffix}.safetensors", max_shard_size=240
    )
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    grouped: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        grouped.setdefault(file, []).append(name)
        assert name in read_header(tmp_path / file)
    assert len(grouped) == len(theirs.filename_to_tensors)
    assert index["metadata"] == {"total_parameters": 170, "total_size": 680}
    assert sorted(grouped) == sorted(theirs.filename_to_tensors)


def test_no_shard_exceeds_the_limit_except_by_one_tensor():
    plan = [(str(i), (n,), torch.float32) for i, n in enumerate((1, 2, 3, 50, 1, 4, 6))]
    for file, shard in plan_shards(plan, 40).items():
        assert len(shard) == 1 or sum(shape[0] * 4 for _, shape, _ in shard) <= 40, file
    assert [item for shard in plan_shards(plan, 40).values() for item in shard] == plan


def test_slicing_a_mapped_tensor_does_not_touch_the_file(tmp_path):
    content = {"a": torch.arange(12.0).reshape(4, 3)}
    reader = Reader(write(tmp_path, content))
    view = reader["a"]
    assert torch.equal(view[1:3, :2], content["a"][1:3, :2])
    view[0, 0] = 99.0  # private mapping: stays in this process
    assert torch.equal(Reader(tmp_path)["a"], content["a"])


def test_unaligned_tensors_are_read(tmp_path):
    save_file({"x": torch.ones(3, dtype=torch.uint8)}, tmp_path / SINGLE_FILE)
    header = json.dumps(
        {
            "x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    ).encode()
    values = torch.tensor([1.5, -2.5])
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + b"\1\1\1" + bits(values))
    assert torch.equal(Reader(tmp_path)["y"], values)


def test_reading_a_slice_of_a_large_file_takes_no_anonymous_memory(tmp_path):
    """64 MiB on disk, every page touched; what grows is file-backed and can be dropped by the kernel."""
    write(tmp_path, {"big": torch.zeros(2**26, dtype=torch.uint8)})
    code = (
        "import sys, psutil\n"
        "from eureka_megatron.weights.hf_files import Reader\n"
        "process = psutil.Process(); before = process.memory_info()\n"
        "big = Reader(sys.argv[1])['big']\n"
        "total = int(big[::4096].sum())\n"
        "after = process.memory_info()\n"
        "print(total, (after.rss - after.shared) - (before.rss - before.shared))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    total, grown = map(int, result.stdout.split())
    assert total == 0
    assert grown < 16 * 2**20  # measured: 1–2 MiB


def test_absent_shards_are_all_named(tmp_path):
    write_sharded(tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors")):
        path.unlink()
    with pytest.raises(UserError, match=r"index\.json names files that are absent: .*00001-of-00002.*00002-of-00002"):
        Reader(tmp_path)


def test_every_truncated_file_is_named(tmp_path):
    write_sharded(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    for path in files:
        os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError) as raised:
        Reader(tmp_path)
    for path, name in zip(files, ("w1", "w3"), strict=True):
        assert f"{path}: truncated: '{name}'" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"\xff" * 64, "truncated or not safetensors"),
        ((4).to_bytes(8, "little") + b"{{{{", "header is not JSON"),
        ((100).to_bytes(8, "little") + b"{}", "truncated or not safetensors"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, content, message):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{message}"):
        Reader(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [3]}, "entry of 'x' is damaged"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "'x' has dtype 'F4'"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "cannot take 8 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "holds 8 bytes of data, its header describes 4"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "cannot take"),
    ],
)
def test_damaged_entries_are_refused(tmp_path, entry, message):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=message):
        Reader(tmp_path)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    write_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("w0")
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks ghost(.|\n)*holds w0"):
        Reader(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_may_only_name_safetensors_of_its_directory(tmp_path, file):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(UserError, match="no safetensors files of this directory"):
        Reader(tmp_path)


def test_an_index_that_is_no_index_is_refused(tmp_path):
    (tmp_path / INDEX_FILE).write_text("[1, 2]")
    with pytest.raises(UserError, match="is not a safetensors index"):
        Reader(tmp_path)


def test_pickles_are_refused_by_name(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickled weights are not read"):
        Reader(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path):
    save_file(tensors(), tmp_path / "part-1.safetensors")
    with pytest.raises(UserError, match=rf"{INDEX_FILE} is missing beside part-1"):
        Reader(tmp_path)


def test_an_empty_or_absent_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"found neither {SINGLE_FILE}"):
        Reader(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        Reader(tmp_path / "nowhere")


def test_one_name_in_two_files_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(UserError, match="holds x, which the index does not place there"):
        Reader(tmp_path)


def test_tensors_must_come_as_announced(tmp_path):
    plan = [("a", (2,), torch.float32), ("b", (2,), torch.float32)]
    with pytest.raises(AssertionError, match="announced"), Writer(tmp_path, plan) as writer:
        writer.write("b", torch.zeros(2))
    with pytest.raises(AssertionError, match="ends before"), Writer(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(2))


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "deep" / "out"
    with atomic_directory(output) as temporary:
        (temporary / "x").write_text("1")
        assert not output.exists()
    assert (output / "x").read_text() == "1"
    with pytest.raises(KeyError, match="half-way"), atomic_directory(tmp_path / "other") as temporary:
        fail_after_writing(temporary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_existing_output_is_not_overwritten_but_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="full exists and is not overwritten"), atomic_directory(tmp_path / "full"):
        pass
    assert (tmp_path / "full" / "x").read_text() == "precious"
    with atomic_directory(tmp_path / "empty") as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "empty" / "x").exists()


def test_a_full_disk_leaves_nothing_half_made(tmp_path):
    """The kernel refuses to grow a file beyond the limit; as on a full disk, write() fails half-way."""
    code = (
        "import resource, signal, sys, torch\n"
        "from eureka_megatron.weights.hf_files import Writer, atomic_directory\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "with atomic_directory(sys.argv[1]) as out, Writer(out, [('a', (4000,), torch.float32)]) as writer:\n"
        "    writer.write('a', torch.zeros(4000))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "UserError" in result.stderr
    assert "cannot be written: File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), atomic_directory(tmp_path / "file" / "out"):
        pass
