"""config.json is read whole, in both its shapes, and what is missing or impossible is named."""

import json
from pathlib import Path

import pytest

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.models.qwen2_5_vl.config import check_layout, read_hf_config
from eureka_megatron.models.qwen2_5_vl.tiny import build_tiny


@pytest.fixture
def config_file(tiny_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text((tiny_dir / "config.json").read_text())
    return path


def edit(path: Path, change: object) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_the_flat_hub_shape_reads_the_same(config_file: Path) -> None:
    nested = read_hf_config(config_file.parent)

    def flatten(values: dict) -> None:
        text = values.pop("text_config")
        rope = text.pop("rope_parameters")
        values |= {name: value for name, value in text.items() if name not in ("model_type", "dtype")}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}

    edit(config_file, flatten)
    assert read_hf_config(config_file.parent) == nested


def test_a_missing_number_is_named_not_guessed(config_file: Path) -> None:
    edit(config_file, lambda values: values["text_config"].pop("rms_norm_eps"))
    with pytest.raises(UserError, match=r"config\.json: key 'rms_norm_eps' is missing"):
        read_hf_config(config_file.parent)


def test_another_architecture_is_refused(config_file: Path) -> None:
    edit(config_file, lambda values: values.update(model_type="llama"))
    with pytest.raises(UserError, match=r"model_type is 'llama', need 'qwen2_5_vl'"):
        read_hf_config(config_file.parent)


def test_impossible_layouts_name_the_possible_ones(tiny_dir: Path) -> None:
    config = read_hf_config(tiny_dir)
    with pytest.raises(
        ConfigError, match=r"parallel\.tensor=8 does not divide num_attention_heads=4; possible: \[1, 2, 4\]"
    ):
        check_layout(config, 8, 1)
    with pytest.raises(ConfigError, match=r"parallel\.pipeline=3 does not divide num_hidden_layers=4"):
        check_layout(config, 1, 3)
    check_layout(config, 4, 2)  # two kv heads over four ranks is possible


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((1, 2), {"virtual_pipeline": 3}, r"virtual_pipeline=3 does not divide the 2 text layers of a pipeline stage"),
        ((1, 2), {"layers_first_stage": 1, "virtual_pipeline": 2}, r"does not divide the [13] text layers"),
        ((1, 1), {"layers_first_stage": 1}, r"parallel\.layers_first_stage needs parallel\.pipeline > 1"),
        ((1, 2), {"layers_first_stage": 1, "layers_last_stage": 2}, r"leave 1 of num_hidden_layers=4 for the other 0"),
        (
            (1, 4),
            {"layers_first_stage": 2},
            r"layers_first_stage=2 leave 2 of num_hidden_layers=4 for the other 3 stages",
        ),
        ((1, 4), {"layers_first_stage": 5}, r"leave -1 of"),
    ],
)
def test_impossible_stages_are_refused(tiny_dir: Path, sizes: tuple[int, int], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(read_hf_config(tiny_dir), *sizes, **options)


def test_a_tower_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    config = read_hf_config(build_tiny(tmp_path, vision_heads=4, text_heads=8, text_hidden=256))
    check_layout(config, 8, 1)
    with pytest.raises(
        ConfigError, match=r"vision_parallel='tensor': parallel\.tensor=8 does not divide .*num_heads=4"
    ):
        check_layout(config, 8, 1, vision_parallel="tensor")


def test_the_public_way_in_is_there() -> None:
    import eureka_megatron.models.qwen2_5_vl as package

    assert package.build_model.__module__ == "eureka_megatron.models.qwen2_5_vl.model"
    assert package.read_hf_config is read_hf_config
    with pytest.raises(AttributeError, match="has no attribute 'build'"):
        _ = package.build
