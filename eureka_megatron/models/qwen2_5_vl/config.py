"""What a checkpoint's config.json says, whatever form it was published in; and which layouts such a model can have.

`read_hf_config` is the only place that knows these forms. They differ in where the text's keys stand (at the top, in `text_config`, or in
both), in how rotary positions are spelled, and in what is left out because it was a class default of the transformers that wrote the file.
So transformers' own configuration class interprets the file, here and nowhere else, and the numbers are taken from what it makes of it:
rollout engines ask the same class. What this model does not compute is refused by name.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.layout import Layout

MODEL_TYPE, ARCHITECTURE = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"
# Where text sizes stand in a file without `text_config`. Class defaults are the 72B model's: silence about all of them is a mistake.
_FLAT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# Keys of rope_scaling and rope_parameters that change what is computed, and what they say where nothing is changed.
_PLAIN_ROPE = {
    "rope_type": ("default", "mrope", None),
    "type": ("default", "mrope", None),
    "partial_rotary_factor": (1, None),
    "mrope_interleaved": (False, None),
}
_QUANTISED = ("quantization_config", "compression_config")


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
    """The architecture of one checkpoint; field names as in config.json. Equal configurations: the same shapes and computation."""

    text_config: TextConfig
    vision_config: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    # Of "<|vision_pad|>", which nothing uses, and of what the file says ends a text.
    vision_token_id: int | None = field(default=None, compare=False)
    eos_token_ids: tuple[int, ...] = field(default=(), compare=False)

    @property
    def vision_token_ids(self) -> frozenset[int]:
        """Tokens that stand for pictures and videos or enclose them: a policy must never sample one."""
        named = (self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id)
        return frozenset((*named, *(() if self.vision_token_id is None else (self.vision_token_id,))))


def read_hf_config(directory: Path | str) -> QwenVLConfig:
    """Read `config.json` of a Qwen2.5-VL directory, in any form transformers has written since 4.49 or the hub publishes.

    Raises:
        UserError: no such file, another architecture, a value that cannot be, or one this model does not compute; all that is wrong of
            the last two kinds at once, with the keys.
    """
    path = Path(directory) / "config.json"
    values = _read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}, need {MODEL_TYPE!r}")
    _refuse(path, _not_trained(values))
    hf = _interpret(values, path)
    text, vision, rope = hf.text_config, hf.vision_config, hf.text_config.rope_parameters
    _refuse(path, [*_not_computed(text, vision, rope), *_not_numbers(hf, rope)])
    rotary = {"rope_theta": float(rope["rope_theta"]), "mrope_section": tuple(rope["mrope_section"])}
    config = _record(
        QwenVLConfig,
        hf,
        text_config=_record(TextConfig, text, **rotary),
        vision_config=_record(VisionConfig, vision, fullatt_block_indexes=tuple(vision.fullatt_block_indexes)),
        vision_token_id=next(iter(_token_ids(path, "vision_token_id", getattr(hf, "vision_token_id", None))), None),
        # transformers drops the key at the top where there is a text_config.
        eos_token_ids=_token_ids(path, "eos_token_id", values.get("eos_token_id"), text.eos_token_id),
    )
    _refuse(path, _impossible(config))
    return config


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))


def _record(kind: type[Any], source: Any, **others: Any) -> Any:
    """One of the records above: `others`, and every further field as `source` has it."""
    return kind(
        **{field.name: getattr(source, field.name) for field in fields(kind) if field.name not in others}, **others
    )


def token_ids(*found: int | Iterable[int] | None) -> tuple[int, ...]:
    """What files give as one id, a list of ids or null, as one sorted tuple. Example: token_ids(7, [3, 7], None) is (3, 7).

    Raises UserError for anything else; who calls adds file and key.
    """
    listed = [entry if isinstance(entry, list | tuple) else () if entry is None else (entry,) for entry in found]
    tokens = [token for entry in listed for token in entry]
    if wrong := [token for token in tokens if type(token) is not int]:
        raise UserError(f"{wrong[0]!r} is no token; needs a whole number, a list of them or null")
    return tuple(sorted(set(tokens)))


def _token_ids(path: Path, key: str, *found: Any) -> tuple[int, ...]:
    try:
        return token_ids(*found)
    except UserError as error:
        raise UserError(f"{path}: {key}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; a Hugging Face checkpoint directory is needed")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _interpret(values: dict[str, Any], path: Path) -> Any:
    """transformers' configuration object of a config.json."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2_5_VLConfig

    if values.get("text_config") is None and (missing := [key for key in _FLAT_SIZES if key not in values]):
        raise UserError(
            f"{path}: {', '.join(missing)} missing; there is no text_config either to say how large the text is"
        )
    try:
        return Qwen2_5_VLConfig.from_dict(values)
    # "Validation error for field 'hidden_size':\n    TypeError: Field … expected int, got str …"
    except StrictDataclassError as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: {said.split(': ', 1)[-1].split('. Errors:')[0]}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: transformers cannot read it: {error}") from error


def _not_trained(values: dict[str, Any]) -> list[str]:
    """Scaled rotary positions and quantised weights, wherever the file tells of them: transformers' class passes over some of the places."""
    problems = []
    for where in ("", "text_config", "vision_config"):
        part, prefix = (values.get(where), f"{where}.") if where else (values, "")
        if not isinstance(part, dict):
            continue
        # The tower's has names of its own.
        for key in () if where == "vision_config" else ("rope_scaling", "rope_parameters"):
            rope = part.get(key) or {}
            if not isinstance(rope, dict):
                problems.append(f"{prefix}{key} is {rope!r}; needs an object with rope_type and mrope_section, or null")
                continue
            problems += [
                f"{prefix}{key}.{name} is {rope[name]!r}; only unscaled rotary positions are supported ('default' or 'mrope'): "
                "neither YaRN nor any other scaling"
                for name, plain in _PLAIN_ROPE.items()
                if rope.get(name) not in plain
            ]
        for key in _QUANTISED:
            if told := part.get(key):
                method = told.get("quant_method", "no quant_method") if isinstance(told, dict) else told
                problems.append(
                    f"{prefix}{key}: the weights are quantised ({method}), which cannot be trained or converted; "
                    "take the checkpoint that is not quantised"
                )
    return problems


def _not_computed(text: Any, vision: Any, rope: dict[str, Any]) -> list[str]:
    """What transformers and vLLM would compute otherwise than this model."""
    problems = []
    if text.use_sliding_window or any(kind != "full_attention" for kind in text.layer_types):
        problems.append(
            "use_sliding_window and layer_types ask for sliding-window attention, which is not supported (published: full attention)"
        )
    if rope.get("rope_type") != "default":
        problems.append(
            f"rope_type is {rope.get('rope_type')!r}; only unscaled rotary positions are supported ('default' or 'mrope')"
        )
    problems += [
        f"{part}.hidden_act is {config.hidden_act!r}; only 'silu' is supported"
        for part, config in (("text_config", text), ("vision_config", vision))
        if config.hidden_act != "silu"
    ]
    return problems


def _not_numbers(hf: Any, rope: dict[str, Any]) -> list[str]:
    """What is no positive number where one is needed: transformers checks most types, but takes 0, infinities and lists of sides."""
    values: dict[str, tuple[Any, type]] = {"rope_theta": (rope.get("rope_theta"), float)}
    for part, owner, record in (
        ("", hf, QwenVLConfig),
        ("text_config.", hf.text_config, TextConfig),
        ("vision_config.", hf.vision_config, VisionConfig),
    ):
        for name, kind in record.__annotations__.items():
            if kind in (int, float) and name != "rope_theta":
                values[f"{part}{name}"] = (getattr(owner, name, None), kind)
    problems = [
        f"{name} is {value!r}; needs a positive number{', a whole one' if kind is int and type(value) is float else ''}"
        for name, (value, kind) in values.items()
        if not (type(value) in {int, kind} and math.isfinite(value) and value > 0)
    ]
    problems += [
        f"tie_word_embeddings is {tied!r}; needs true or false"
        for tied in (getattr(owner, "tie_word_embeddings", None) for owner in (hf, hf.text_config))
        if not isinstance(tied, bool | None)
    ]
    section = rope.get("mrope_section")
    if not (isinstance(section, list | tuple) and len(section) == 3 and all(type(part) is int for part in section)):
        problems.append(
            f"mrope_section is {section!r} in rope_scaling or rope_parameters; needs three numbers such as [16, 24, 24]"
        )
    return problems


def _impossible(config: QwenVLConfig) -> list[str]:
    text, vision = config.text_config, config.vision_config
    heads, kv_heads, unit = (
        text.num_attention_heads,
        text.num_key_value_heads,
        vision.patch_size * vision.spatial_merge_size,
    )
    checks = [
        (
            text.hidden_size % heads,
            f"text_config: {heads} attention heads do not divide hidden_size {text.hidden_size}",
        ),
        (
            vision.hidden_size % vision.num_heads,
            f"vision_config: {vision.num_heads} attention heads do not divide hidden_size {vision.hidden_size}",
        ),
        (heads % kv_heads, f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"),
        (
            sum(text.mrope_section) * 2 != text.head_dim,
            f"mrope_section {text.mrope_section} must sum to half the head size, {text.head_dim // 2}",
        ),
        *(
            (
                getattr(config, name) >= text.vocab_size,
                f"{name} {getattr(config, name)} is beyond vocab_size {text.vocab_size}",
            )
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ),
        (
            vision.window_size < unit,
            f"vision window_size {vision.window_size} is less than patch_size × spatial_merge_size, "
            f"{vision.patch_size} × {vision.spatial_merge_size}",
        ),
        (
            vision.out_hidden_size != text.hidden_size,
            f"vision out_hidden_size {vision.out_hidden_size} differs from hidden_size {text.hidden_size}",
        ),
    ]
    return [message for wrong, message in checks if wrong]


def check_layout(config: QwenVLConfig, layout: Layout) -> None:
    """Refuse a layout the model cannot have, before anything starts.

    Example: 8 layers on 4 stages are 2 each; with layers_first_stage=1 and layers_last_stage=1 they are 1, 3, 3, 1.

    Raises:
        ConfigError: names the number that does not divide and the sizes that would.
    """
    _check_tensor(config.text_config, layout.tensor)
    names, vision = ("num_heads", "intermediate_size"), config.vision_config
    wrong = [f"{name}={getattr(vision, name)}" for name in names if getattr(vision, name) % layout.tensor]
    if wrong and layout.vision_parallel == "tensor":
        raise ConfigError(
            f"model.vision_parallel='tensor': parallel.tensor={layout.tensor} does not divide the vision tower's {', '.join(wrong)}; "
            "use 'data' or 'replicated'"
        )
    layers, pipeline = config.text_config.num_hidden_layers, layout.pipeline
    given = layout.model_dump(include={"layers_first_stage", "layers_last_stage"}, exclude_none=True)
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
        if number == 0 or number % layout.virtual_pipeline:
            raise ConfigError(
                f"parallel.virtual_pipeline={layout.virtual_pipeline} does not divide the {number} text layers of a pipeline stage"
            )


def check_engine(config: QwenVLConfig, tensor: int) -> None:
    """Refuse `rollout.tensor` workers that the text model cannot be split over. vLLM pads the vocabulary. Raises ConfigError."""
    _check_tensor(config.text_config, tensor, "rollout.tensor", but=("vocab_size",))


def tower_divides(vision: VisionConfig, tensor: int) -> bool:
    """Whether the vision tower can be split over `tensor` ranks."""
    return vision.num_heads % tensor == 0 and vision.intermediate_size % tensor == 0


def _check_tensor(text: TextConfig, tensor: int, key: str = "parallel.tensor", but: tuple[str, ...] = ()) -> None:
    names = [
        n for n in ("num_attention_heads", "intermediate_size", "vocab_size", "num_key_value_heads") if n not in but
    ]

    def undivided(ranks: int) -> list[str]:
        # kv heads may be fewer than ranks, but then each must be shared by equally many of them.
        shared = ranks % text.num_key_value_heads == 0
        wrong = [name for name in names if getattr(text, name) % ranks and not (name == names[-1] and shared)]
        return [f"{name}={getattr(text, name)}" for name in wrong]

    if wrong := undivided(tensor):
        fits = [ranks for ranks in range(1, text.num_attention_heads + 1) if not undivided(ranks)]
        raise ConfigError(f"{key}={tensor} does not divide {', '.join(wrong)}; possible: {fits}")
