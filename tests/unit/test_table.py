"""The table names every tensor that transformers saves, with its shape, and nothing else."""

import copy
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import ConfigError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.weights.splits import Replicated
from eureka_megatron.weights.table import Row, expand, frozen_rows, hf_metadata, hub_name, rows, unsent

HUB_3B = Qwen2_5_VLConfig(  # the numbers of the published 3B model
    hidden_size=2048,
    intermediate_size=11008,
    num_attention_heads=16,
    num_hidden_layers=36,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    vocab_size=151936,
    vision_config={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
    },
)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_names_exactly_what_transformers_saves(tmp_path, tied):
    directory = build_published(tmp_path, tied=tied)
    with safe_open(directory / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert dict(hf_metadata(read_hf_config(directory))) == saved
    assert hf_metadata(AutoConfig.from_pretrained(directory)) == hf_metadata(read_hf_config(directory))


def test_the_names_of_transformers_modules_map_to_the_hub_naming():
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(HUB_3B)
    shapes = {hub_name(name): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert shapes == dict(hf_metadata(HUB_3B))
    assert {hub_name(name) for name in shapes} == set(shapes)  # hub names stay as they are


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", ["local", "te"])
@pytest.mark.parametrize("vision_parallel", ["replicated", "tensor"])
def test_every_name_stands_once(tied, backend, vision_parallel):
    config = copy.copy(HUB_3B)
    config.tie_word_embeddings = tied
    table = expand(rows(config, backend=backend, vision_parallel=vision_parallel))
    assert max(Counter(row.megatron for row in table).values()) == 1
    assert max(Counter(name for row in table if not row.copy for name in row.hf).values()) == 1
    assert not any("{" in row.megatron for row in table)
    assert [row.megatron for row in table if row.copy] == (["output_layer.weight"] if tied else [])


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_every_row_of_the_real_shapes_divides(n):
    for vision_parallel in ("replicated", "tensor") if n <= 4 else ("replicated",):  # 3420 / 8 is no whole number
        for row in rows(HUB_3B, vision_parallel=vision_parallel):
            shape = row.split.shard_shape(row.shapes, n)
            elements = sum(torch.Size(hf).numel() for hf in row.shapes)
            assert torch.Size(shape).numel() * row.split.shards(n) == elements


def test_the_vision_tower_is_whole_on_every_rank_unless_tensor_parallel():
    whole = {row.megatron: row.split for row in rows(HUB_3B) if row.megatron.startswith("vision.")}
    cut = {row.megatron: row.split for row in rows(HUB_3B, vision_parallel="tensor")}
    assert all(isinstance(layout, Replicated) for layout in whole.values())
    for name, layout in whole.items():
        assert cut[name] in (layout, layout.inner)


def test_transformer_engine_keeps_norms_in_the_linear_that_follows():
    local = {row.megatron for row in expand(rows(HUB_3B))}
    te = {row.megatron for row in expand(rows(HUB_3B, backend="te"))}
    assert len(te) == len(local)
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in te
    assert "vision.decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in te
    assert {name for name in local - te if "norm" not in name} == set()


def test_expansion_goes_layer_by_layer():
    names = [name for name, _ in hf_metadata(HUB_3B)]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert len(set(layers)) == 36


@pytest.mark.parametrize("argument", ["backend", "vision_parallel"])
def test_unknown_options_are_refused(argument):
    with pytest.raises(ConfigError, match="nonsense"):
        rows(HUB_3B, **{argument: "nonsense"})


def frozen(*names: str, tied: bool = False) -> frozenset[str]:
    return frozen_rows(small_table(tied), names)


def small_table(tied: bool = False) -> tuple[Row, ...]:
    config = copy.deepcopy(HUB_3B)
    config.tie_word_embeddings = tied
    return expand(rows(config))


def test_parts_and_patterns_choose_what_is_frozen() -> None:
    assert frozen() == frozenset()
    assert {name.split(".")[0] for name in frozen("vision", "merger")} == {"vision"}
    assert not any(name.startswith("vision.merger.") for name in frozen("vision"))
    assert not any(name.startswith("vision.") for name in frozen("language", tied=True))
    block = frozen("visual.blocks.0.*")
    assert len(block) == 10
    assert all(name.startswith("vision.decoder.layers.0.") for name in block)
    query_key_value = frozen("model.layers.0.self_attn.[qkv]_proj.weight")
    assert query_key_value == {"decoder.layers.0.self_attention.linear_qkv.weight"}
    assert frozen("model.embed_tokens.*", tied=True) == {"embedding.word_embeddings.weight", "output_layer.weight"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["visn"], "model.freeze: 'visn' matches no tensor; did you mean 'vision'"),
        (["visual.blocks.99.*"], "matches no tensor"),
        (["model.layers.0.self_attn.q_proj.*"], "they are one parameter, decoder.layers.0.self_attention.linear_qkv"),
        (["vision", "merger", "language"], "leaves no parameter to learn"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        frozen(*names)


def test_half_a_frozen_module_still_travels() -> None:
    table = small_table()
    bias = frozen("visual.blocks.0.attn.qkv.bias")
    assert unsent(table, bias) == frozenset()
    whole = frozen("visual.blocks.0.attn.qkv.*")
    assert unsent(table, whole) == whole
    assert len(whole) == 2
