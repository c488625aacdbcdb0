"""The published sizes of Qwen2.5-VL: their config.json, without weights, beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.models.qwen2_5_vl.config import QwenVLConfig, TextConfig, VisionConfig, read_hf_config
from eureka_megatron.places import HUB_ID, absolute

CONFIGS = Path(__file__).parent / "configs"
SIZES = ("3b", "7b", "32b", "72b")
_PUBLISHED = re.compile(r"qwen/qwen2\.5-vl-(3b|7b|32b|72b)-instruct(@.*)?", re.IGNORECASE)


def configuration(model: str | Path) -> Path:
    """The directory of a model's config.json: of a size (7b), of a published name, of a directory, or of another hub id.

    Raises:
        UserError: it is none of these, or the hub id cannot be had.
    """
    name = str(model)
    if name.lower() in SIZES and not Path(name).exists():
        return CONFIGS / name.lower()
    if (known := _PUBLISHED.fullmatch(name)) and not Path(name).exists():
        return CONFIGS / known[1].lower()
    if Path(name).is_dir():
        return absolute(Path(name))
    if (other := HUB_ID.fullmatch(name)) is None:
        raise ConfigError(f"{name}: neither a directory nor one of {', '.join(SIZES)} nor a model of the hub")
    from huggingface_hub import hf_hub_download

    try:  # of what the cache lacks this file alone: no weights are needed
        return Path(hf_hub_download(other["repository"], "config.json", revision=other["revision"])).parent
    except Exception as error:  # of many kinds: names the hub does not know, tokens, proxies, networks
        raise UserError(
            f"{name}: no directory, and its config.json cannot be had from the hub: {' '.join(str(error).split())[:200]}"
        ) from error


def sizes_of(directory: Path) -> QwenVLConfig:
    """What `read_hf_config` says of a directory; of the published files without transformers, whose import takes longer than a first answer may."""
    if directory.parent != CONFIGS:
        return read_hf_config(directory)
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    usual = json.loads((CONFIGS / "7b" / "config.json").read_text(encoding="utf-8"))["vision_config"]
    vision = usual | values["vision_config"]  # the 32B file leaves out what is transformers' default
    vision |= {"in_channels": vision["in_chans"], "fullatt_block_indexes": tuple(vision["fullatt_block_indexes"])}
    text = values | {"mrope_section": tuple(values["rope_scaling"]["mrope_section"])}
    parts = {"text_config": _record(TextConfig, text), "vision_config": _record(VisionConfig, vision)}
    return _record(QwenVLConfig, values | parts | {"eos_token_ids": (values["eos_token_id"],)})


def _record(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
