"""The published sizes of Qwen2.5-VL: their config.json, without weights, beside this file."""

from __future__ import annotations

import re
from pathlib import Path

from eureka_megatron.errors import ConfigError
from eureka_megatron.places import HUB_ID, model_directory

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
    directory = model_directory(name)
    if not directory.is_dir() and not HUB_ID.fullmatch(name):
        raise ConfigError(f"--model {name}: neither a directory nor one of {', '.join(SIZES)} nor a model of the hub")
    return directory
