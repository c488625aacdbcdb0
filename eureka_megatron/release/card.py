"""The model card of a release: what it is made of, in words, and the hub's metadata block."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eureka_megatron.places import hub_origin

CARD_KEYS: tuple[str, ...] = (
    "title",
    "tags",
    "base_model",
    "base_revision",
    "data",
    "algorithm",
    "hyperparameters",
    "scores",
)
CARD_KEYS += ("license", "run_id", "git_commit", "quantization")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the hub


def model_card(card: Mapping[str, Any]) -> str:
    """README.md of the release: the hub's metadata block, then what a reader wants to know.

    Example: model_card({"base_model": "Qwen/Qwen2.5-VL-7B-Instruct", "algorithm": "GRPO", "scores": {"MathVista": 0.73}})
    """
    from huggingface_hub import ModelCardData

    base = str(card.get("base_model", ""))
    head = ModelCardData(
        base_model=base if REPOSITORY.fullmatch(base) else None,  # the hub refuses a card that names anything else
        license=card.get("license"),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*card.get("tags", ["reinforcement-learning"]), "multimodal", "eureka-megatron"],
    )
    lines = ["---", head.to_yaml(line_break="\n"), "---", ""]
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
    lines += _card_table("Hyper-parameters", "name | value", card.get("hyperparameters"))
    lines += _card_table("Scores", "benchmark | score", card.get("scores"))
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
    algorithm, origin = config["algorithm"], hub_origin(config["model"]["path"])
    sections = ("optimizer", "sft") if stage == "sft" else ("optimizer", "rollout", "training", "algorithm")
    card = {
        "algorithm": f"{algorithm['advantage']} advantages, {algorithm['loss']} loss",
        "base_model": public(config["model"]["path"]),
        "data": public(config["data"]["train"]),
        "run_id": config["run"]["name"],
        "hyperparameters": {
            f"{section}.{key}": public(value) if (section, key) == ("algorithm", "reference") and value else value
            for section in sections
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


def _card_table(title: str, columns: str, values: Mapping[str, Any] | None) -> list[str]:
    if not values:
        return []
    lines = ["", f"## {title}", "", f"| {columns} |", "|---|---|"]
    for key, value in values.items():
        cells = str(key), f"{value:.6g}" if isinstance(value, float) else str(value)
        left, right = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| {left} | {right} |")
    return lines


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
