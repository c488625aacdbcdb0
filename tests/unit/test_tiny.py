"""The tiny checkpoint is a Qwen2.5-VL checkpoint like any other, and equal arguments give equal files."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from eureka_megatron.demo.tiny import SPECIAL_TOKENS, TAG_TOKENS, build_tiny, mrope_section


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def weights(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def test_equal_arguments_give_equal_files(tiny, tmp_path):
    again = build_tiny(tmp_path)
    names = sorted(path.name for path in tiny.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_the_seed_changes_the_weights_and_not_the_global_random_state(tiny, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    other = build_tiny(tmp_path, seed=1)
    assert torch.rand(1) == expected
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights(tiny)[name], weights(other)[name])


def test_names_are_the_hubs(tiny):
    names = set(weights(tiny))
    assert {"model.embed_tokens.weight", "lm_head.weight", "visual.patch_embed.proj.weight"} <= names
    assert all(name.startswith(("model.", "visual.", "lm_head.")) for name in names)


def test_a_tied_checkpoint_has_no_output_layer(tmp_path):
    directory = build_tiny(tmp_path, tied=True)
    assert "lm_head.weight" not in weights(directory)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_randomize_all_leaves_no_bias_zero_and_no_norm_one(tmp_path):
    for name, tensor in weights(build_tiny(tmp_path, randomize_all=True)).items():
        assert tensor.std() > 0, name


def test_special_tokens_come_last_and_tags_are_single_ordinary_tokens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == AutoConfig.from_pretrained(tiny).text_config.vocab_size == 384
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *TAG_TOKENS])
    assert ids == list(range(384 - len(ids), 384))
    text = "<think>x</think><answer>\\boxed{3}</answer>"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == 8
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert tokenizer.decode(ids[:7], skip_special_tokens=True) == ""


@pytest.mark.parametrize("text", ["Größe 数学 \t\n\n  x²≥π 🙂", "I'll   WE'RE", "a\r\nb"])
def test_any_text_survives_the_tokenizer(tiny, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_default_turn_of_the_chat_template_is_qwens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_other_shapes(tmp_path):
    directory = build_tiny(
        tmp_path,
        text_hidden=96,
        text_layers=3,
        text_heads=6,
        kv_heads=3,
        ffn=160,
        vision_hidden=64,
        vision_depth=3,
        vision_heads=2,
        vision_ffn=96,
        window_size=56,
        full_attention_blocks=(0, 2),
        vocab_size=512,
        max_shard_size=200_000,
        dtype=torch.bfloat16,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory)
    config = model.config
    assert (config.text_config.hidden_size, config.text_config.num_key_value_heads) == (96, 3)
    assert config.vision_config.fullatt_block_indexes == [0, 2]
    assert config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert model.dtype == torch.bfloat16
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(directory))
    assert AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("\\boxed{") == 511


@pytest.mark.parametrize(
    ("head_dim", "section"), [(128, [16, 24, 24]), (32, [4, 6, 6]), (16, [2, 3, 3]), (64, [8, 12, 12])]
)
def test_mrope_sections_keep_qwens_proportions(head_dim, section):
    assert mrope_section(head_dim) == section


@pytest.mark.parametrize(
    "sizes", [{"kv_heads": 3}, {"text_hidden": 130}, {"vision_hidden": 100}, {"vocab_size": 267}], ids=str
)
def test_impossible_sizes_are_refused_before_anything_is_written(tmp_path, sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        build_tiny(tmp_path / "new", **sizes)
    assert not (tmp_path / "new").exists()
