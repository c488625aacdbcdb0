"""`eureka verify --against vllm`: the command itself, with a real engine, and what it counts as what."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eureka_megatron.cli.commands import main
from eureka_megatron.verify import made_up_samples
from eureka_megatron.verify.engine import differences, first_scored
from eureka_megatron.weights.offline import hf_to_megatron

PICTURES = (((3, 3),), (), ((1, 1), (5, 2)))


def test_an_engine_gives_the_log_probabilities_of_the_native_model(tiny_dir: Path, tmp_path: Path) -> None:
    """Both sides load Megatron's format here; that engines load Hugging Face's is in every other file of this folder."""
    hf_to_megatron(tiny_dir, tmp_path / "megatron")
    command = [
        sys.executable,
        "-m",
        "eureka_megatron",
        "verify",
        "--against",
        "vllm",
        "--hf",
        str(tmp_path / "megatron"),
    ]
    options = ["--tp", "2", "--sequence-parallel", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr[-3000:])
    assert done.returncode == 0
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["against"] == "vllm"
    assert report["layout"]["tensor"] == 2
    assert set(report["figures"]) == {"text", "near_picture", "after_picture"}
    for figures in report["figures"].values():
        assert 0 < figures["max"] <= 1e-5  # measured 9.6e-7
        assert figures["mean"] <= figures["max"]
        assert figures["tokens"] > 0


def test_gradients_of_an_engine_are_refused(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--hf", str(tiny_dir), "--against", "vllm", "--grads"]) == 2
    assert "--grads needs --against transformers" in capsys.readouterr().err


def test_differences_are_told_apart_by_what_stands_before_a_token(tiny_dir: Path) -> None:
    """One token of each kind is off; everything else agrees."""
    samples = made_up_samples(tiny_dir, pictures=PICTURES)
    end = json.loads((tiny_dir / "config.json").read_text())["vision_end_token_id"]
    assert [sample.tokens_S[first_scored(sample) - 1] == end for sample in samples] == [True, False, True]
    native = [np.zeros(len(sample)) for sample in samples]
    engine = [np.zeros(len(sample) - first_scored(sample)) for sample in samples]
    engine[1][3] = 0.1
    engine[0][7], engine[2][8] = 0.2, 0.3
    found = differences(samples, native, engine)
    assert {kind: one["max"] for kind, one in found.items()} == {
        "text": pytest.approx(0.1),
        "near_picture": pytest.approx(0.2),
        "after_picture": pytest.approx(0.3),
    }
    assert found["near_picture"]["tokens"] == 16
    assert found["near_picture"]["mean"] == pytest.approx(0.2 / 16)


def test_a_log_probability_that_is_no_number_is_never_close(tiny_dir: Path) -> None:
    samples = made_up_samples(tiny_dir, pictures=((),))
    engine = [np.full(len(samples[0]) - 1, np.nan)]
    assert differences(samples, [np.zeros(len(samples[0]))], engine)["text"]["max"] == np.inf
