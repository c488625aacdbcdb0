"""Every published form of checkpoint through imitation, its release into an engine, a checked step of RL, and conversion there and back.

Parity with transformers is tests/parity/test_forms.py.
The small models are built in the forms (models/qwen2_5_vl/forms.py), since the published weights are not here; half of them are tied.
The chain per form: published directory → sft → release → train (a vLLM engine and trainer ranks load that release) → release.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import FORMS, build_published
from eureka_megatron.loop import train
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.run.sft import run_sft
from eureka_megatron.weights.listing import describe, differences
from eureka_megatron.weights.offline import hf_to_megatron, megatron_to_hf

pytestmark = [pytest.mark.slow, pytest.mark.system]

TIED = {"transformers-4.49", "transformers-4.53", "transformers-5"}
BAR = 1e-5  # nats between trainer and engine, fp32; measured at most 9.6e-7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counting")
    write_counting(folder, train=24, test=4, noise=0.3)
    return folder


def configuration(model: Path, output: Path, data: Path) -> RunConfig:
    tokens = {"max_prompt_tokens": 96}
    return make_config(
        {
            "run": {"output": str(output)},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"train": str(data / "train.jsonl"), "min_pixels": 784, "max_pixels": 50176, **tokens},
            "rollout": {
                "samples_per_prompt": 4,
                "max_response_tokens": 40,
                "max_model_tokens": 160,
                "kv_cache_gib": 0.3,
            },
            "rewards": {"function": "tests.helpers.rewards:by_characters"},
            "algorithm": {"filter": {"enabled": False}},
            "training": {"steps": 1, "prompts_per_step": 4, "responses_per_update": 8},
            "sft": {"steps": 1, "samples_per_step": 4},
            "sync": {"check_every": 1},
            "checkpoint": {"every": 0},
            "tracking": {"wandb": "disabled", "tensorboard": False, "console": False},
        }
    )


def as_snapshot(directory: Path) -> Path:
    """As the hub's cache lays it: links to blobs, and nobody may write."""
    cache = directory.parent / "models--someone--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.move(directory, cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        file.chmod(0o444)
    snapshot.chmod(0o555)
    return snapshot


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def loads_in_transformers(directory: Path, tied: bool) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, loading = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert AutoProcessor.from_pretrained(directory).image_processor.size["shortest_edge"] == 784


@pytest.mark.parametrize("form", FORMS)
def test_a_published_form_goes_through_every_command(
    one_ray: None, form: str, data: Path, tmp_path: Path, capsys
) -> None:
    tied = form in TIED
    shards = {"max_shard_size": "1MB"} if form.startswith("hub") else {}
    source = build_published(tmp_path / "published", form, tied=tied, randomize_all=True, **shards)
    if form.startswith("hub"):
        source = as_snapshot(source)
    original, said = tensors(source), json.loads((source / "config.json").read_text())
    assert read_hf_config(source).tie_word_embeddings == tied

    hf_to_megatron(source, tmp_path / "megatron", verify=True)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=True)
    back = tensors(tmp_path / "back")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    assert differences(describe(source), describe(tmp_path / "back")) == []

    run_sft(configuration(source, tmp_path / "sft", data))
    release = tmp_path / "sft" / "hf"
    train(configuration(release, tmp_path / "rl", data))
    metrics = json.loads((tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()[0])
    with capsys.disabled():
        print(f"\n{form}: trainer against engine {metrics['train/logprob_abs_diff_max']:.1e}")
    assert metrics["train/logprob_abs_diff_max"] < BAR
    for directory in (release, tmp_path / "rl" / "hf"):
        loads_in_transformers(directory, tied)
        assert json.loads((directory / "config.json").read_text()) == said  # written in the form it came in
        after = tensors(directory)
        assert after.keys() == original.keys()
        assert any(not torch.equal(after[name], original[name]) for name in original)
