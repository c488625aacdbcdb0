"""From a checkpoint's config.json to Megatron's transformer configurations.

Every number is read from config.json: the class defaults of transformers differ from the published checkpoints (text eps, tokens
per second). Both shapes of the file are read, the hub's flat one and the newer one with `text_config`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eureka_megatron.errors import ConfigError, UserError


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    tokens_per_second: float

    @property
    def patch_values(self) -> int:
        """D: numbers in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class QwenVLConfig:
    """The architecture of one checkpoint; field names as in config.json."""

    text_config: TextConfig
    vision_config: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int


def read_hf_config(directory: Path | str) -> QwenVLConfig:
    """Read `config.json` of a Qwen2.5-VL directory.

    Raises:
        UserError: no such file, another architecture, or a missing number; names file and key.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; a Hugging Face checkpoint directory is needed")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if values.get("model_type") != "qwen2_5_vl":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}, need 'qwen2_5_vl'")
    text = {**values, **values.get("text_config", {})}
    vision = values.get("vision_config", {})
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}

    def need(source: dict[str, Any], *keys: str) -> Any:
        for key in keys:
            if source.get(key) is not None:
                return source[key]
        raise UserError(f"{path}: key {' or '.join(map(repr, keys))} is missing")

    if text.get("use_sliding_window"):
        raise UserError(
            f"{path}: use_sliding_window is true; sliding-window attention is not supported (published models: false)"
        )
    config = QwenVLConfig(
        text_config=TextConfig(
            hidden_size=need(text, "hidden_size"),
            num_hidden_layers=need(text, "num_hidden_layers"),
            num_attention_heads=need(text, "num_attention_heads"),
            num_key_value_heads=need(text, "num_key_value_heads"),
            intermediate_size=need(text, "intermediate_size"),
            vocab_size=need(text, "vocab_size"),
            rms_norm_eps=need(text, "rms_norm_eps"),
            rope_theta=float(need({**text, **rope}, "rope_theta")),
            mrope_section=tuple(need(rope, "mrope_section")),
            max_position_embeddings=need(text, "max_position_embeddings"),
        ),
        vision_config=VisionConfig(
            depth=need(vision, "depth"),
            hidden_size=need(vision, "hidden_size"),
            num_heads=need(vision, "num_heads"),
            intermediate_size=need(vision, "intermediate_size"),
            out_hidden_size=need(vision, "out_hidden_size"),
            in_channels=need(vision, "in_channels", "in_chans"),
            patch_size=need(vision, "patch_size", "spatial_patch_size"),
            temporal_patch_size=need(vision, "temporal_patch_size"),
            spatial_merge_size=need(vision, "spatial_merge_size"),
            window_size=need(vision, "window_size"),
            fullatt_block_indexes=tuple(need(vision, "fullatt_block_indexes")),
            tokens_per_second=need(vision, "tokens_per_second"),
        ),
        # The flag stands at the top, in text_config, or (transformers' default for this model) nowhere: false.
        tie_word_embeddings=bool(values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        image_token_id=need(values, "image_token_id"),
        video_token_id=need(values, "video_token_id"),
        vision_start_token_id=need(values, "vision_start_token_id"),
        vision_end_token_id=need(values, "vision_end_token_id"),
    )
    _check(config, path)
    return config


def _check(config: QwenVLConfig, path: Path) -> None:
    text, vision = config.text_config, config.vision_config
    if sum(text.mrope_section) * 2 != text.head_dim:
        raise UserError(
            f"{path}: mrope_section {text.mrope_section} must sum to half the head size, {text.head_dim // 2}"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise UserError(
            f"{path}: vision out_hidden_size {vision.out_hidden_size} differs from hidden_size {text.hidden_size}"
        )


def check_layout(
    config: QwenVLConfig,
    tensor: int,
    pipeline: int,
    *,
    virtual_pipeline: int = 1,
    layers_first_stage: int | None = None,
    layers_last_stage: int | None = None,
    vision_parallel: str = "replicated",
) -> None:
    """Refuse a layout the model cannot have, before anything starts.

    Raises:
        ConfigError: names the number that does not divide and the sizes that would.
    """
    _check_tensor(config.text_config, tensor)
    if vision_parallel == "tensor":
        _check_vision_tensor(config.vision_config, tensor)
    layers = config.text_config.num_hidden_layers
    uneven = {"layers_first_stage": layers_first_stage, "layers_last_stage": layers_last_stage}
    given = {name: number for name, number in uneven.items() if number is not None}
    if given and pipeline == 1:
        raise ConfigError(f"parallel.{next(iter(given))} needs parallel.pipeline > 1")
    left, stages = layers - sum(given.values()), pipeline - len(given)
    if left < 0 or (left if stages == 0 else left % stages):
        said = " and ".join(f"parallel.{name}={number}" for name, number in given.items())
        if said:
            raise ConfigError(
                f"{said} leave {left} of num_hidden_layers={layers} for the other {stages} stages of parallel.pipeline={pipeline}; "
                "they must share them evenly"
            )
        fits = [n for n in range(1, layers + 1) if layers % n == 0]
        raise ConfigError(
            f"parallel.pipeline={pipeline} does not divide num_hidden_layers={layers}; possible: {fits}, "
            "or set parallel.layers_first_stage or parallel.layers_last_stage"
        )
    for number in {*given.values(), *([left // stages] if stages else [])}:
        if number == 0 or number % virtual_pipeline:
            raise ConfigError(
                f"parallel.virtual_pipeline={virtual_pipeline} does not divide the {number} text layers of a pipeline stage"
            )


def _check_tensor(text: TextConfig, tensor: int) -> None:
    # kv heads may be fewer than ranks, but then each must be shared by equally many of them.
    kv_fits = text.num_key_value_heads % tensor == 0 or tensor % text.num_key_value_heads == 0
    sizes = {
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        "vocab_size": text.vocab_size,
    }
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % tensor]
    if not kv_fits:
        wrong.append(f"num_key_value_heads={text.num_key_value_heads}")
    if wrong:
        fits = [n for n in range(1, text.num_attention_heads + 1) if all(size % n == 0 for size in sizes.values())]
        fits = [n for n in fits if text.num_key_value_heads % n == 0 or n % text.num_key_value_heads == 0]
        raise ConfigError(f"parallel.tensor={tensor} does not divide {', '.join(wrong)}; possible: {fits}")


def _check_vision_tensor(vision: VisionConfig, tensor: int) -> None:
    sizes = {"num_heads": vision.num_heads, "intermediate_size": vision.intermediate_size}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % tensor]
    if wrong:
        raise ConfigError(
            f"model.vision_parallel='tensor': parallel.tensor={tensor} does not divide the vision tower's {', '.join(wrong)}; "
            "use 'data' or 'replicated'"
        )
