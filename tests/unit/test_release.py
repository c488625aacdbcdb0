"""What stands beside the weights of a release."""

import json

import pytest
import torch
import yaml

from eureka_megatron.demo.forms import build_published
from eureka_megatron.release.card import model_card
from eureka_megatron.weights.companions import COPIED_FILES, copy_companions


def test_the_card_holds_what_it_was_given_and_its_head_is_yaml():
    card = model_card(
        {
            "title": "Counts: red | blue",
            "base_model": "someone/model",
            "license": "other: see LICENSE",
            "data": "MMK12, 15k questions",
            "algorithm": "GRPO",
            "hyperparameters": {"optimizer.lr": 1e-6, "filter": "0.01|0.99"},
            "scores": {"MathVista": 0.7312},
            "git_commit": "abc123",
        }
    )
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "someone/model"
    assert head["license"] == "other: see LICENSE"
    assert head["pipeline_tag"] == "image-text-to-text"
    for line in (
        "- **Code**: abc123",
        "| optimizer.lr | 1e-06 |",
        "| filter | 0.01\\|0.99 |",
        "| MathVista | 0.7312 |",
    ):
        assert line in card.splitlines()


def test_a_base_model_that_the_hub_does_not_know_stays_out_of_the_head():
    for base in ("hf", "runs/sft/hf", "/models/Qwen2.5-VL-7B-Instruct"):
        card = model_card({"base_model": base})
        assert "base_model" not in yaml.safe_load(card.split("---")[1])
        assert f"- **Base model**: {base}" in card.splitlines()


def test_an_empty_card_is_still_a_card():
    card = model_card({})
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert not {"license", "base_model"} & head.keys()
    assert "None" not in card
    assert "Scores" not in card


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_companions_are_copied_by_known_name_only_and_config_says_the_dtype(tmp_path, key):
    source = build_published(tmp_path / "source", weights=False)
    config = json.loads((source / "config.json").read_text())
    config |= {key: config.pop("torch_dtype"), "text_config": None}
    (source / "config.json").write_text(json.dumps(config))
    for stray in ("optimizer.pt", "modeling_evil.py", "pytorch_model.bin", "notes.txt"):
        (source / stray).write_text("x")
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(source, target, torch.bfloat16)
    copied = {path.name for path in target.iterdir()}
    assert copied <= {*COPIED_FILES, "config.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} <= copied
    written = json.loads((target / "config.json").read_text())
    assert written[key] == "bfloat16"
    assert {"dtype", "torch_dtype"} & set(written) == {key}
    assert written == config | {key: "bfloat16"}
