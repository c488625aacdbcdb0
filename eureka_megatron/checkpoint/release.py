"""A checkpoint to give away: weights under HF names, configuration, tokenizer and processor files, a model card.

Written streaming by world rank 0 while all ranks of the first replica send; appears whole or not at all. The weights go
through the same iteration as the online sync. transformers' `from_pretrained` and vLLM read the directory as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from eureka_megatron.checkpoint.convert import iter_hf_weights, raise_together
from eureka_megatron.checkpoint.hf_io import MAX_SHARD_BYTES, Writer, atomic_directory, refuse_to_overwrite
from eureka_megatron.checkpoint.qwen2_5_vl import hf_metadata
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.places import hub_origin

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

CARD_KEYS = (
    "title",
    "tags",
    "base_model",
    "base_revision",
    "data",
    "algorithm",
    "hyperparameters",
    "scores",
    "license",
    "run_id",
    "git_commit",
    "quantization",
)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the hub


def export_hf(
    model_chunks: Sequence[nn.Module],
    parallel: Parallel,
    source_dir: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a release directory. Collective over all ranks; world rank 0 writes.

    Args:
        source_dir: the checkpoint the training began from; configuration, tokenizer and processor come from there.
        output: must not exist, or be empty.
        dtype: of the written weights; default: that of the parameters.
        card: any of `CARD_KEYS`, for README.md. "hyperparameters" and "scores" are mappings. `git_commit` is asked from git
            when absent.

    Raises:
        UserError: on every rank alike; `output` is then as it was before.
    """
    problems = []
    if parallel.world.rank == 0:
        try:
            unknown = sorted(set(card) - set(CARD_KEYS))
            if unknown:
                raise UserError(f"unknown model card keys {', '.join(unknown)}; valid: {', '.join(CARD_KEYS)}")
            refuse_to_overwrite(output)
            read_hf_config(source_dir)
        except UserError as error:
            problems.append(str(error))
    raise_together(problems, parallel)
    failure: Exception | None = None
    if parallel.data.rank == 0 and parallel.context.rank == 0:
        weights = iter_hf_weights(model_chunks, parallel, dtype=dtype)
        if parallel.world.rank == 0:
            try:
                _write(weights, Path(source_dir), Path(output), card, max_shard_bytes)
            except Exception as error:  # of any kind: the others are waiting, they are told before it goes on
                failure = error
        for _ in weights:  # after a failure as well: the other ranks still send
            pass
    try:
        raise_together([str(failure) or repr(failure)] if failure else [], parallel)
    except UserError as shared:
        raise (failure or shared) from None


def _write(
    weights: Iterator[tuple[str, Tensor | None]], source: Path, output: Path, card: Mapping[str, Any], max_shard: int
) -> None:
    """Consumes the weights; the first one tells the dtype of all."""
    metadata = hf_metadata(read_hf_config(source))
    with atomic_directory(output) as directory:
        with ExitStack() as stack:
            writer = None
            for name, tensor in weights:
                assert tensor is not None
                if writer is None:
                    kind = tensor.dtype
                    plan = [(announced, shape, kind) for announced, shape in metadata]
                    writer = stack.enter_context(Writer(directory, plan, max_shard_bytes=max_shard))
                writer.write(name, tensor)
        copy_companions(source, directory, kind)
        (directory / "README.md").write_text(model_card(card))


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


def model_card(card: Mapping[str, Any]) -> str:
    """README.md of the release: the hub's metadata block, then what a reader wants to know.

    Example: model_card({"base_model": "Qwen/Qwen2.5-VL-7B-Instruct", "algorithm": "GRPO", "scores": {"MathVista": 0.73}})
    """
    base = str(card.get("base_model", ""))
    head = {
        "base_model": base if REPOSITORY.fullmatch(base) else None,  # the hub refuses a card that names anything else
        "license": card.get("license"),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [*card.get("tags", ["reinforcement-learning"]), "multimodal", "eureka-megatron"],
    }
    head = {key: value for key, value in head.items() if value is not None}
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {card.get('title', 'Qwen2.5-VL trained by rule-based reinforcement learning')}", ""]
    facts = {
        "Base model": card.get("base_model"),
        "Revision of the base model": card.get("base_revision"),
        "Training data": card.get("data"),
        "Algorithm": card.get("algorithm"),
        "Run": card.get("run_id"),
        "Code": card.get("git_commit") or git_commit(),
        "Quantisation": card.get("quantization"),
    }
    lines += [f"- **{key}**: {value}" for key, value in facts.items() if value is not None]
    lines += _card_table("Hyper-parameters", ("name", "value"), card.get("hyperparameters"))
    lines += _card_table("Scores", ("benchmark", "score"), card.get("scores"))
    lines += ["", "## Use", "", "```python"]
    if card.get("quantization"):
        lines += ["from vllm import LLM", "", 'model = LLM("<this directory>", quantization="modelopt")']
    else:
        lines += ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
        lines += ['model = AutoModelForImageTextToText.from_pretrained("<this directory>")']
        lines += ['processor = AutoProcessor.from_pretrained("<this directory>")']
    lines += ["```", ""]
    return "\n".join(lines)


def run_card(
    config: Mapping[str, Any], scores: Mapping[str, float] | None = None, stage: str = "train"
) -> dict[str, Any]:
    """What a run's release says of it (keys of CARD_KEYS), from its configuration as plain values.

    Args:
        stage: "train" or "sft", as the command is called.
    """
    algorithm = config["algorithm"]

    origin = hub_origin(config["model"]["path"])
    card = {
        "algorithm": f"{algorithm['advantage']} advantages, {algorithm['loss']} loss",
        "base_model": public(config["model"]["path"]),
        "data": public(config["data"]["train"]),
        "run_id": config["run"]["name"],
        "hyperparameters": {
            f"{section}.{key}": public(value) if (section, key) == ("algorithm", "reference") and value else value
            for section in (
                ("optimizer", "sft") if stage == "sft" else ("optimizer", "rollout", "training", "algorithm")
            )
            for key, value in config[section].items()
        },
        "scores": dict(scores or {}),
    } | ({"base_revision": origin[1]} if origin else {})
    if stage == "sft":
        card |= {"title": "Qwen2.5-VL after a supervised cold start", "algorithm": "supervised fine-tuning", "tags": []}
    return card


def public(path: str) -> str:
    """What a card calls a file or model: where it lay on the machine that trained is nobody's business."""
    if origin := hub_origin(path):
        return origin[0]
    return Path(path).name if Path(path).is_absolute() else path


def _card_table(title: str, columns: tuple[str, str], values: Mapping[str, Any] | None) -> list[str]:
    if not values:
        return []
    cells = [(str(key), f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in values.items()]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    return ["", f"## {title}", "", f"| {columns[0]} | {columns[1]} |", "|---|---|"] + [
        f"| {left} | {right} |" for left, right in escaped
    ]


def git_commit() -> str | None:
    """The commit of this package's working copy, marked when files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed somewhere inside another project's repository
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
