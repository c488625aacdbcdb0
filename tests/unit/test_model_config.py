"""config.json is read in every form it is published in, as transformers reads it, and what cannot be is named."""

import copy
import json
import math
from pathlib import Path

import pytest

from eureka_megatron.demo.forms import FORMS, build_published
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.layout import Layout
from eureka_megatron.models.qwen2_5_vl.config import check_layout, read_hf_config, token_ids

# What the hub's files say (facts): the 7B's of January 2025, the 32B's of March, whose tower leaves class defaults out.
TOP = {
    "model_type": "qwen2_5_vl",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
    "hidden_act": "silu",
}
TOP |= {
    "max_position_embeddings": 128000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "eos_token_id": 151645,
}
TOP |= {"image_token_id": 151655, "video_token_id": 151656, "vision_token_id": 151654}
TOP |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
SECTION = {"mrope_section": [16, 24, 24]}
HUB_7B = TOP | {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "sliding_window": None,
    "max_window_layers": 28,
    "rope_scaling": {"type": "mrope", **SECTION},
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
HUB_32B = TOP | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "sliding_window": 32768,
    "max_window_layers": 64,
    "rope_scaling": {"type": "default", "rope_type": "default", **SECTION},
    "vision_config": {
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3456,
        "model_type": "qwen2_5_vl",
        "out_hidden_size": 5120,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        "torch_dtype": "bfloat16",
    },
}
# All text keys left out that the 72B model shares with transformers' class defaults.
SPARSE_72B = {
    "model_type": "qwen2_5_vl",
    "text_config": {"rms_norm_eps": 1e-06, "rope_parameters": {"rope_type": "default", **SECTION}},
}
SPARSE_72B |= {
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 8192, "intermediate_size": 3456, "tokens_per_second": 2}
}


@pytest.fixture(scope="module")
def tiny_forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """config.json of a tiny checkpoint in each published form with the default tower left as it is."""
    forms = ("hub-7b", "transformers-4.57", "transformers-5")
    folder = tmp_path_factory.mktemp("forms")
    return {
        form: json.loads((build_published(folder / form, form, weights=False) / "config.json").read_text())
        for form in forms
    }


def read(folder: Path, values: object):
    (folder / "config.json").write_text(json.dumps(values))
    return read_hf_config(folder)


def test_the_files_of_the_hub(tmp_path: Path) -> None:
    seven, large = read(tmp_path, HUB_7B), read(tmp_path, HUB_32B)
    assert (seven.text_config.hidden_size, seven.text_config.rms_norm_eps, seven.text_config.rope_theta) == (
        3584,
        1e-6,
        1e6,
    )
    assert seven.text_config.mrope_section == large.text_config.mrope_section == (16, 24, 24)
    assert (large.text_config.num_hidden_layers, large.text_config.num_key_value_heads) == (64, 8)
    tower = large.vision_config
    assert (tower.depth, tower.num_heads, tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size) == (
        32,
        16,
        14,
        2,
        2,
    )
    assert (tower.window_size, tower.fullatt_block_indexes, tower.tokens_per_second) == (112, (7, 15, 23, 31), 2)
    assert (seven.vision_config.intermediate_size, tower.intermediate_size) == (3420, 3456)
    assert seven.vision_token_ids == {151652, 151653, 151654, 151655, 151656}
    assert seven.eos_token_ids == (151645,)
    largest = read(tmp_path, SPARSE_72B)
    assert (largest.text_config.hidden_size, largest.text_config.num_hidden_layers, largest.text_config.vocab_size) == (
        8192,
        80,
        152064,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_one_checkpoint_reads_the_same_in_every_form(tmp_path: Path, tied: bool) -> None:
    sizes = dict(FORMS["hub-32b"].sizes)  # the sparse forms ask for the default tower
    found = {form: build_published(tmp_path / form, form, tied=tied, weights=False, **sizes) for form in FORMS}
    configs = {form: read_hf_config(directory) for form, directory in found.items()}
    assert len(set(configs.values())) == 1, configs
    assert configs["hub-7b"].tie_word_embeddings == tied
    said = {form: set(json.loads((directory / "config.json").read_text())) for form, directory in found.items()}
    assert "text_config" not in said["hub-7b"] | said["hub-32b"] | said["transformers-4.49"]
    assert "depth" not in json.loads((found["hub-32b"] / "config.json").read_text())["vision_config"]
    assert "hidden_size" not in said["transformers-5"]


@pytest.mark.parametrize("null", ["text_config", "num_key_value_heads", "sliding_window", "vision_token_id"])
def test_nulls_where_transformers_has_them(tmp_path: Path, null: str) -> None:
    config = read(tmp_path, HUB_7B | {null: None})
    assert config.text_config.num_key_value_heads == (28 if null == "num_key_value_heads" else 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "3584"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
        ({"num_attention_heads": 0}, "text_config.num_attention_heads is 0; needs a positive number"),
        ({"vision_config": [1]}, "'vision_config'"),
        ({"rope_scaling": None}, "mrope_section is None"),
        ({"rope_scaling": "mrope"}, "rope_scaling is 'mrope'; needs an object"),
        ({"rope_scaling": SECTION | {"rope_theta": True}}, "rope_theta is True; needs a positive number"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, True]}}, "mrope_section is "),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf; needs a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": ["<|im_end|>"]}, "eos_token_id"),
        ({"vision_token_id": 1.5}, "vision_token_id: 1.5 is no token; needs a whole number"),
        ({"image_token_id": 152064}, "image_token_id 152064 is beyond vocab_size 152064"),
        ({"vision_config": HUB_7B["vision_config"] | {"window_size": 14}}, "window_size 14 is less than"),
        ({"vision_config": HUB_7B["vision_config"] | {"fullatt_block_indexes": None}}, "fullatt_block_indexes"),
        ({"rope_theta": None}, "rope_theta is None; needs a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}, "sliding-window attention"),
        ({"layer_types": ["sliding_attention"] * 28}, "sliding-window attention"),
        ({"vision_config": HUB_7B["vision_config"] | {"patch_size": [14, 14]}}, r"patch_size is \[14, 14\]"),
        ({"vision_config": None, "hidden_size": 3072}, "28 attention heads do not divide hidden_size 3072"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 28"),
        ({"text_config": None, "hidden_size": ...}, "hidden_size missing; there is no text_config either"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    values = {key: value for key, value in (HUB_7B | changes).items() if value is not ...}
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        read(tmp_path, values)


@pytest.mark.parametrize("form", ["hub-7b", "transformers-4.57", "transformers-5"])
@pytest.mark.parametrize("where", ["", "text_config"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_are_refused_wherever_the_file_tells_of_them(
    tiny_forms: dict[str, dict], tmp_path: Path, form: str, where: str, key: str
) -> None:
    for name in ("type", "rope_type"):
        for kind in ("yarn", "linear", "dynamic", "longrope", "llama3", "ntk"):
            values = copy.deepcopy(tiny_forms[form])
            part = values.setdefault(where, {}) if where else values
            part[key] = (part.get(key) or {}) | {name: kind, "factor": 4.0}
            prefix = f"{where}." if where else ""
            with pytest.raises(UserError, match=rf"config.json: {prefix}{key}\.{name} is '{kind}'; only unscaled"):
                read(tmp_path, values)


@pytest.mark.parametrize("where", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_weights_are_refused_with_their_method(
    tiny_forms: dict[str, dict], tmp_path: Path, where: str, method: str
) -> None:
    values = copy.deepcopy(tiny_forms["transformers-5"])
    (values[where] if where else values)["quantization_config"] = {"quant_method": method, "bits": 4}
    told = rf"config.json: {where and where + '.'}quantization_config: the weights are quantised \({method}\)"
    with pytest.raises(UserError, match=told):
        read(tmp_path, values)
    assert read(tmp_path, tiny_forms["transformers-5"] | {"quantization_config": None})


def test_ends_at_the_top_count_beside_those_of_the_text(tiny_forms: dict[str, dict], tmp_path: Path) -> None:
    values = copy.deepcopy(tiny_forms["transformers-5"])
    values["text_config"]["eos_token_id"] = 7
    assert read(tmp_path, values | {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6, 7)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    rope = {"type": "mrope", "mrope_section": [16, 48]}
    with pytest.raises(UserError) as told:
        read(tmp_path, HUB_7B | {"hidden_act": "relu", "rope_scaling": rope, "vocab_size": -1})
    assert len(str(told.value).splitlines()) == 3
    with pytest.raises(UserError, match="must hold a JSON object, found list"):
        read(tmp_path, [])


def test_ids_are_one_or_several_or_none() -> None:
    assert token_ids(7, [3, 7], None) == (3, 7)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_type is 'llama', need 'qwen2_5_vl'"):
        read(tmp_path, HUB_7B | {"model_type": "llama"})


def test_impossible_layouts_name_the_possible_ones(tiny_dir: Path) -> None:
    config = read_hf_config(tiny_dir)
    with pytest.raises(
        ConfigError, match=r"parallel\.tensor=8 does not divide num_attention_heads=4; possible: \[1, 2, 4\]"
    ):
        check_layout(config, Layout(tensor=8))
    with pytest.raises(ConfigError, match=r"parallel\.pipeline=3 does not divide num_hidden_layers=4"):
        check_layout(config, Layout(pipeline=3))
    check_layout(config, Layout(tensor=4, pipeline=2))  # two kv heads over four ranks is possible


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        (2, {"virtual_pipeline": 3}, r"virtual_pipeline=3 does not divide the 2 text layers of a pipeline stage"),
        (2, {"layers_first_stage": 1, "virtual_pipeline": 2}, r"does not divide the [13] text layers"),
        (1, {"layers_first_stage": 1}, r"parallel\.layers_first_stage needs parallel\.pipeline > 1"),
        (2, {"layers_first_stage": 1, "layers_last_stage": 2}, r"leave 1 of num_hidden_layers=4 for the other 0"),
        (
            4,
            {"layers_first_stage": 2},
            r"layers_first_stage=2 leave 2 of num_hidden_layers=4 for the other 3 stages",
        ),
        (4, {"layers_first_stage": 5}, r"leave -1 of"),
    ],
)
def test_impossible_stages_are_refused(tiny_dir: Path, pipeline: int, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(read_hf_config(tiny_dir), Layout(pipeline=pipeline, **options))


def test_a_tower_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    config = read_hf_config(build_published(tmp_path, vision_heads=4, text_heads=8, text_hidden=256))
    check_layout(config, Layout(tensor=8))
    with pytest.raises(
        ConfigError, match=r"vision_parallel='tensor': parallel\.tensor=8 does not divide .*num_heads=4"
    ):
        check_layout(config, Layout(tensor=8, vision_parallel="tensor"))


def test_the_public_way_in_is_there() -> None:
    import eureka_megatron.models.qwen2_5_vl as package

    assert package.build_model.__module__ == "eureka_megatron.models.qwen2_5_vl.model"
    assert package.read_hf_config is read_hf_config
    with pytest.raises(AttributeError, match="has no attribute 'build'"):
        _ = package.build
