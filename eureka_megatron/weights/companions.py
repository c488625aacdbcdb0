"""What a checkpoint directory holds besides weights: configuration, tokenizer and processor files."""

import json
import shutil
from pathlib import Path

import torch

# Only files known by name are copied: no weights, no code, nothing that merely lies about.
COPIED_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """config.json, saying `dtype`, and the tokenizer and processor files that `source` has."""
    config = json.loads((source / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = name  # transformers loads in what it finds here
    for part in (config[key] for key in ("text_config", "vision_config") if config.get(key)):
        part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in COPIED_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
