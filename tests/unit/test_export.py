"""`eureka export`: releases that transformers loads, FP8 that vLLM's reader understands, nothing half-made."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from eureka_megatron import cli
from eureka_megatron.checkpoint import store
from eureka_megatron.config import make_config
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.release.quantize import FP8, dequantized
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.listing import describe, differences
from eureka_megatron.weights.offline import hf_to_megatron


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting(tmp_path_factory.mktemp("counting"), train=24, test=1).train


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint as `eureka train` leaves one, without the optimizer's part."""
    directory = tmp_path_factory.mktemp("run") / "step_000007"
    hf_to_megatron(tiny_dir, directory)
    config = make_config(
        {
            "model": {"path": str(tiny_dir), "dtype": "float32"},
            "data": {"train": str(data), "min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 96},
            "run": {"name": "counts"},
        }
    )
    state = {
        "format": 1,
        "step": 7,
        "scores": {"accuracy": 0.5},
        "config": config.model_dump(mode="json"),
        "git_commit": "abc123",
    }
    (directory / store.STATE_FILE).write_text(store.as_json(state))
    seal(directory)
    return directory


def seal(directory: Path) -> None:
    """Checksums of what is there now."""
    path = directory / store.CHECKSUMS_FILE
    path.unlink(missing_ok=True)
    path.write_text(store.checksum_lines({file.name: store.checksum(file) for file in directory.iterdir()}))


def run(*arguments: Any) -> int:
    return cli.main([*map(str, arguments), "--quiet"])


def test_a_release_holds_the_weights_and_says_where_they_come_from(
    checkpoint: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "release"
    assert run("export", checkpoint, "--output", output, "--base-model", "Qwen/Qwen2.5-VL-7B-Instruct") == 0
    assert differences(describe(tiny_dir), describe(output)) == []
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (output / name).is_file()
    card = (output / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    for line in (
        "- **Training data**: train.jsonl",
        "- **Algorithm**: grpo advantages, ppo_clip loss",
        "- **Run**: counts, step 7",
        "- **Code**: abc123",
        "| accuracy | 0.5 |",
        "| optimizer.lr | 1e-06 |",
    ):
        assert line in card.splitlines()
    assert str(tiny_dir) not in card, "no paths of the machine that trained"
    model = AutoModelForImageTextToText.from_pretrained(output)
    reader = Reader(output)
    assert torch.equal(model.lm_head.weight, reader["lm_head.weight"])
    assert AutoProcessor.from_pretrained(output).tokenizer.vocab_size > 0


def test_a_converted_checkpoint_and_another_dtype_go_out_too(tiny_dir: Path, tmp_path: Path) -> None:
    hf_to_megatron(tiny_dir, tmp_path / "megatron")
    assert run("export", tmp_path / "megatron", "--output", tmp_path / "out", "--dtype", "bfloat16") == 0
    assert {dtype for _, dtype in describe(tmp_path / "out").tensors.values()} == {torch.bfloat16}
    assert "Training data" not in (tmp_path / "out" / "README.md").read_text()


# --- FP8 ---


@pytest.mark.parametrize("noted", ["Qwen/Qwen2.5-VL-7B-Instruct", "/home/someone/secret/best-model"])
def test_a_card_names_the_base_that_config_json_notes_but_no_folder_of_its_machine(
    tiny_dir: Path, tmp_path: Path, noted: str
) -> None:
    hf_to_megatron(tiny_dir, tmp_path / "megatron")
    path = tmp_path / "megatron" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": noted}))
    assert run("export", tmp_path / "megatron", "--output", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"**Base model**: {noted.removeprefix('/home/someone/secret/')}" in card
    assert "secret" not in card


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fp8") / "release"
    assert run("export", checkpoint, "--output", output, "--quantize", "fp8", "--calibration-prompts", 8) == 0
    assert [path.name for path in output.parent.iterdir()] == ["release"], "the way there is cleaned up"
    return output


def test_only_the_linears_of_the_text_layers_become_fp8(quantized: Path, tiny_dir: Path) -> None:
    reader, source = Reader(quantized), Reader(tiny_dir)
    linears = {name for name in source.tensors if name.startswith("model.layers.") and name.endswith("_proj.weight")}
    assert len(linears) == 7 * 4
    scales = {f"{name}_scale" for name in linears} | {name.replace(".weight", ".input_scale") for name in linears}
    assert reader.tensors.keys() == source.tensors.keys() | scales
    for name in source.tensors:
        if name not in linears:
            assert torch.equal(reader[name], source[name]), name
            continue
        assert reader.tensors[name].dtype == FP8
        assert reader.tensors[f"{name}_scale"].shape == ()
        error = (dequantized(reader, name) - source[name]).abs()
        # Half the distance to the next of 8 values an octave, or of the smallest steps near zero.
        assert (error <= source[name].abs() / 16 + 2**-10 * reader[f"{name}_scale"]).all(), name
        assert dequantized(reader, name).abs().max() == pytest.approx(source[name].abs().max().item(), rel=1 / 16)


def test_what_vllm_fuses_has_one_scale(quantized: Path) -> None:
    reader = Reader(quantized)
    for layer in range(4):
        for parent, members in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            for kind in ("weight_scale", "input_scale"):
                found = {reader[f"model.layers.{layer}.{parent}.{member}_proj.{kind}"].item() for member in members}
                assert len(found) == 1


def test_the_files_are_plain_safetensors_and_the_card_tells_the_error(quantized: Path) -> None:
    with safe_open(quantized / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == FP8
        assert file.get_tensor("model.layers.0.mlp.up_proj.input_scale").item() > 0
    card = (quantized / "README.md").read_text()
    assert "- **Quantisation**: FP8 (E4M3) linears of the text layers, calibrated on 12 prompts; relative error" in card
    assert 'quantization="modelopt"' in card


def test_inspection_sees_a_changed_scale(quantized: Path, tmp_path: Path) -> None:
    other = shutil.copytree(quantized, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale"] *= 2  # a scalar
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert differences(describe(quantized), describe(quantized)) == []
    changed = ["model.layers.0.mlp.up_proj.weight_scale: 1 of 1 values differ"]
    assert differences(describe(quantized), describe(other)) == changed


@pytest.mark.slow
def test_vllms_own_reader_finds_fp8_where_it_is_and_nowhere_else(quantized: Path) -> None:
    """vLLM's configuration class, with the model class's renaming, asked about every linear of vLLM's model."""
    program = """
import json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
directory = sys.argv[1]
for text in (open(f"{directory}/hf_quant_config.json").read(), json.dumps(json.load(open(f"{directory}/config.json"))["quantization_config"])):
    config = ModelOptFp8Config.from_config(json.loads(text))
    config.packed_modules_mapping = Model.packed_modules_mapping
    config.apply_vllm_mapper(Model.hf_to_vllm_mapper)
    names = [f"language_model.model.layers.3.{n}" for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    names += ["language_model.lm_head"]
    names += [f"visual.blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.gate_up_proj", "mlp.down_proj")]
    names += ["visual.merger.mlp.0", "visual.merger.mlp.2", "visual.patch_embed.proj"]
    print(json.dumps([config.quant_method, [config.is_layer_excluded(name) for name in names]]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, quantized], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [["FP8", [False] * 4 + [True] * 8]] * 2


def test_a_release_can_be_quantised_with_other_data(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("export", tiny_dir, "--output", tmp_path / "out", "--quantize", "fp8", "--calibration-prompts", 2)
    assert run(*arguments, "--calibrate", data) == 0
    assert Reader(tmp_path / "out").tensors["model.layers.0.mlp.up_proj.weight"].dtype == FP8


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files uses, as the real client speaks it."""

    requests: ClassVar[list[tuple[str, str | None, bytes]]] = []

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._answer({"id": "someone/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        here = f"http://127.0.0.1:{self.server.server_port}/someone/model"
        if self.path.endswith("/create"):
            self._answer({"url": here, "name": "someone/model"})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": file["path"], **plain} for file in json.loads(body)["files"]]})
        else:
            self._answer({"commitUrl": f"{here}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})

    def _answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_push_uploads_every_file_to_the_named_repository(checkpoint: Path, tmp_path: Path) -> None:
    """huggingface_hub's real client against a local server. Not covered: the hub's own storage for large files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "eureka_megatron", "export", checkpoint, "--output", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--push", "someone/model", "--quiet"], capture_output=True, text=True, env={**os.environ, **hub}
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"pushed to {hub['HF_ENDPOINT']}/someone/model" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    created = json.loads(next(body for path, _, body in Hub.requests if path.endswith("/create")))
    assert (created["organization"], created["name"], created["visibility"]) == ("someone", "model", "private")
    ((path, token, body),) = [request for request in Hub.requests if "/commit/" in request[0]]
    assert (path, token) == ("/api/models/someone/model/commit/main", "Bearer hf_secret")
    values = [json.loads(line)["value"] for line in body.splitlines()]
    sent = {value["path"]: base64.b64decode(value["content"]) for value in values if "path" in value}
    assert sent == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["CHECKPOINT", "--push", "release"], 2, "--push 'release': need a repository as OWNER/NAME"),
        (["CHECKPOINT", "--public"], 2, "--public says how to --push"),
        (["CHECKPOINT", "--quantize", "int4"], 2, "unknown --quantize 'int4'"),
        (["CHECKPOINT", "--quantize", "fp8", "--dtype", "bfloat16"], 2, "do not go together"),
        (["HF"], 1, "is a Hugging Face directory already; --quantize fp8, or --push without --output"),
        (["HF", "--quantize", "fp8"], 2, "name a data file with --calibrate"),
        (["NOTHING"], 1, "config.json"),
        (["CHECKPOINT", "--quantize", "fp8", "--calibrate", "absent.jsonl"], 1, "absent.jsonl does not exist"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    checkpoint: Path,
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list,
    code: int,
    message: str,
) -> None:
    places = {"CHECKPOINT": checkpoint, "HF": tiny_dir, "NOTHING": tmp_path / "nothing"}
    assert run("export", *(places.get(word, word) for word in arguments), "--output", tmp_path / "out") == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_not_touched(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine").write_text("mine")
    assert run("export", checkpoint, "--output", tmp_path) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_offline_nothing_is_pushed_and_the_release_stays(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("export", checkpoint, "--output", tmp_path / "out", "--push", "someone/model") == 1
    error = capsys.readouterr().err
    assert "out is not pushed to someone/model: " in error
    assert "the directory stays" in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
