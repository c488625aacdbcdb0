"""Small checkpoints in the forms that real ones have: of the hub, and of what transformers saved over the years.

`tiny.build_tiny` writes what the installed transformers saves. `build_published` puts that into another form: the same weights, tokenizer
and settings, in files laid out and spelled as a published directory has them. Tests and the demo use it, because users have nothing else.

What the forms differ in (facts taken from published files):

- text keys at the top (hub, 4.49), at the top and again in `text_config` (4.51 to 4.57), or in `text_config` only (5);
- rotary positions as `rope_scaling` of type "mrope" or "default" with `rope_theta` beside it, or as `rope_parameters`;
- keys of `vision_config` that equal class defaults of transformers left out (the 32B model and whatever 4.49 saved);
- more rows in the embedding than the tokenizer has tokens;
- the chat template within tokenizer_config.json, in chat_template.json or in chat_template.jinja;
- picture bounds as min_pixels and max_pixels, as `size`, or both, in one or two files;
- sampling defaults in generation_config.json that must not reach a rollout.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eureka_megatron.demo.tiny import CHAT_TEMPLATE, build_tiny

Values = dict[str, Any]

DEFAULT_FORM = "hub-7b"
# Of transformers' class, so that a file may leave them out; the least width that 16 heads allow.
_DEFAULT_TOWER = {"vision_depth": 32, "vision_heads": 16, "vision_hidden": 64, "full_attention_blocks": (7, 15, 23, 31)}
_SAMPLING = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.001, "top_k": 1}
_PIXELS = {"min_pixels", "max_pixels"}


@dataclass(frozen=True)
class Form:
    """One way to write a directory. Example: FORMS["hub-7b"]."""

    version: str  # of transformers, as config.json says
    config: Callable[[Values], Values]  # from what the installed transformers saves
    template: str  # the file that holds the chat template
    pictures: frozenset[str] = frozenset(_PIXELS | {"size"})  # keys of preprocessor_config.json that bound pictures
    image_processor: str = "Qwen2VLImageProcessor"
    videos: bool = False  # video_preprocessor_config.json is there
    sizes: Values = field(default_factory=dict)  # of TinyOptions, where the form depends on them


def build_published(directory: Path | str, form: str = DEFAULT_FORM, **options: Any) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint in a published form into `directory` and return it.

    Args:
        form: a key of `FORMS`.
        options: those of `build_tiny`; sizes go before the form's own.
    """
    chosen = FORMS[form]
    directory = build_tiny(directory, **{**chosen.sizes, **options})
    path = directory / "config.json"
    config = chosen.config(json.loads(path.read_text()))
    _write(path, dict(sorted(config.items())) | {"transformers_version": chosen.version})
    if chosen.version.startswith("5"):
        _one_processor_file(directory)
    else:
        _tokenizer_files(directory)
        _processor_files(directory, chosen)
        _template_file(directory, chosen.template)
        generation = json.loads((directory / "generation_config.json").read_text())
        _write(directory / "generation_config.json", generation | _SAMPLING | {"transformers_version": chosen.version})
    return directory


# --- config.json ---


def _flat(config: Values, rope: Values) -> Values:
    """Text keys at the top, tokens and dtype under their old keys, the tower's as they were named then."""
    text, vision = config["text_config"], config["vision_config"]
    later = {"dtype", "model_type", "rope_parameters", "layer_types", "pad_token_id", "in_channels"}
    return {
        **{key: value for key, value in text.items() if key not in later},
        **{key: value for key, value in config.items() if key not in ("text_config", "dtype")},
        "torch_dtype": config["dtype"],
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "rope_scaling": {**rope, "mrope_section": text["rope_parameters"]["mrope_section"]},
        "vision_config": {
            **{key: value for key, value in vision.items() if key not in later | {"initializer_range"}},
            "in_chans": vision["in_channels"],
            "spatial_patch_size": vision["patch_size"],
        },
    }


def _hub_7b(config: Values) -> Values:
    return _flat(config, {"type": "mrope"})


def _sparse(config: Values) -> Values:
    """Flat; what the tower has in common with transformers' class defaults is left out."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    values = _flat(config, {"rope_type": "default", "type": "default"})
    defaults = Qwen2_5_VLVisionConfig().to_dict()
    tower = {key: value for key, value in values["vision_config"].items() if defaults.get(key) != value}
    values["vision_config"] = tower | {"model_type": "qwen2_5_vl", "torch_dtype": values["torch_dtype"]}
    return values | {"sliding_window": 32768}


def _doubled(config: Values, dtype: str) -> Values:
    """Text keys twice. In `text_config` tokens it does not know are null; a tied output layer is told only there."""
    values = _flat(config, {"rope_type": "default", "type": "default"})
    unknown = ("image_token_id", "video_token_id")
    keys = config["text_config"].keys() - {"rope_parameters", "dtype"} | {"rope_theta", "rope_scaling"}
    text = {key: values.get(key) for key in sorted(keys)} | dict.fromkeys(unknown) | {dtype: values["torch_dtype"]}
    text |= {
        "model_type": "qwen2_5_vl_text",
        "sliding_window": None,
        "layer_types": config["text_config"]["layer_types"],
    }
    text["tie_word_embeddings"] = values.pop("tie_word_embeddings")
    tower = values["vision_config"] | {"in_channels": 3, "model_type": "qwen2_5_vl", dtype: values["torch_dtype"]}
    return values | {"text_config": text, "vision_config": tower, dtype: values.pop("torch_dtype")}


# --- the other files ---


def _tokenizer_files(directory: Path) -> None:
    """Those of Qwen2Tokenizer, as on the hub: vocabulary and merges by themselves too."""
    content = json.loads((directory / "tokenizer.json").read_text())
    model, added = content["model"], content["added_tokens"]
    _write(directory / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    described = {str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added}
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("backend", None)
    values |= {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": described,
        "additional_special_tokens": [token["content"] for token in added if token["special"]],
        "bos_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write(path, values)


def _processor_files(directory: Path, form: Form) -> None:
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        values = json.loads((directory / name).read_text())
        bounds = _PIXELS | {"size"}
        _write(
            directory / name, {key: value for key, value in values.items() if key in form.pictures or key not in bounds}
        )
    path = directory / "preprocessor_config.json"
    _write(path, json.loads(path.read_text()) | {"image_processor_type": form.image_processor})
    if not form.videos:
        (directory / "video_preprocessor_config.json").unlink()


def _template_file(directory: Path, file: str) -> None:
    for name in ("chat_template.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    if file.endswith(".jinja"):
        (directory / file).write_text(CHAT_TEMPLATE)
    else:
        path = directory / file
        _write(path, (json.loads(path.read_text()) if path.exists() else {}) | {"chat_template": CHAT_TEMPLATE})


def _one_processor_file(directory: Path) -> None:
    """processor_config.json in place of the three files."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"):
        (directory / name).unlink()
    processor.save_pretrained(directory)


def _write(path: Path, values: Values) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_SPARE = {"spare_rows": 16}
FORMS = {
    "hub-7b": Form("4.41.2", _hub_7b, "tokenizer_config.json", frozenset(_PIXELS), sizes=_SPARE),
    "hub-32b": Form("4.49.0.dev0", _sparse, "chat_template.json", frozenset(_PIXELS), sizes=_SPARE | _DEFAULT_TOWER),
    "transformers-4.49": Form("4.49.0", _sparse, "tokenizer_config.json", sizes=_SPARE | _DEFAULT_TOWER),
    "transformers-4.53": Form(
        "4.53.2",
        lambda config: _doubled(config, "torch_dtype"),
        "chat_template.jinja",
        image_processor="Qwen2VLImageProcessorFast",
        videos=True,
        sizes=_SPARE,
    ),
    "transformers-4.57": Form(
        "4.57.1",
        lambda config: _doubled(config, "dtype"),
        "chat_template.jinja",
        frozenset({"size"}),
        image_processor="Qwen2VLImageProcessorFast",
        videos=True,
        sizes=_SPARE,
    ),
    "transformers-5": Form("5.19.0", dict, "chat_template.jinja", sizes=_SPARE),
}
