"""`eureka export`: a release for others, from a training checkpoint, a converted one, or (to quantise or push) a release.

No ranks are needed, and no Megatron: weights stream from Megatron's files into safetensors. The directory loads in transformers and
vLLM as it is and says where it comes from; with `--quantize fp8` it is for vLLM alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eureka_megatron.checkpoint import store
from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.model_inputs import model_inputs
from eureka_megatron.data.processor import Processor, make_processor
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.places import hub_origin
from eureka_megatron.release.card import REPOSITORY, model_card, public, run_card
from eureka_megatron.tracking.console import tell
from eureka_megatron.types import Prompt
from eureka_megatron.weights.hf_files import disk_errors, refuse_to_overwrite
from eureka_megatron.weights.offline import Progress, megatron_to_hf
from eureka_megatron.weights.torch_dist_metadata import METADATA_FILE

CHECKED_PROMPTS = 16  # whose logits are compared, besides those that are calibrated on


@dataclass(frozen=True)
class ExportOptions:
    """What the command line says. `calibrate` is a data file; by default that of the run, which the checkpoint names."""

    dtype: torch.dtype | None = None
    quantize: str | None = None  # "fp8"
    calibrate: Path | None = None
    calibration_prompts: int = 128
    base_model: str | None = None  # for the model card, e.g. Qwen/Qwen2.5-VL-7B-Instruct
    push: str | None = None  # OWNER/NAME
    public: bool = False


def export(
    checkpoint: Path, output: Path | None, options: ExportOptions, progress: Progress | None = None
) -> list[str]:
    """Writes the release, pushes it where that is asked for. → lines for the user

    A release that is only pushed needs no output.

    Raises:
        UserError: the checkpoint is damaged or none, the output exists or cannot be written; nothing is left there.
        ConfigError: options that do not go together.
    """
    checkpoint = _newest(checkpoint)
    state, kind = _check(checkpoint, output, options)
    card = _card(state, checkpoint, options)
    lines = []
    if output is not None:
        if options.quantize:
            lines += _quantize(checkpoint, output, options, state, kind, card, progress)
        else:
            texts = {"README.md": model_card(card)}
            megatron_to_hf(checkpoint, output, dtype=options.dtype, progress=progress, texts=texts)
        lines.append(f"{output} written")
    if options.push:
        if progress:
            tell(f"sending it to {options.push} …")
        lines.append(_push(output or checkpoint, options.push, private=not options.public))
    return lines


def _newest(directory: Path) -> Path:
    """Of a run's folder its newest whole checkpoint; any other directory as it is."""
    found, warnings = store.newest_of_run(directory)
    if found != directory:
        print("".join(f"warning: {warning}\n" for warning in warnings) + f"exporting {found}", flush=True)
    return found


def _check(checkpoint: Path, output: Path | None, options: ExportOptions) -> tuple[dict[str, Any], str]:
    """(state.json where it is a training checkpoint, else {}; format), before anything is written."""
    if options.push and not REPOSITORY.fullmatch(options.push):
        raise ConfigError(f"--push {options.push!r}: need a repository as OWNER/NAME")
    if options.public and not options.push:
        raise ConfigError("--public says how to --push, which is not there")
    if options.quantize and options.dtype:
        raise ConfigError("--dtype and --quantize do not go together: what is not quantised keeps its dtype")
    read_hf_config(checkpoint)
    kind = "torch_dist" if (checkpoint / METADATA_FILE).is_file() else "HF"
    writes = kind == "torch_dist" or options.quantize is not None
    if writes and output is None:
        raise ConfigError("--output DIR is missing")
    if not writes and (output is not None or not options.push):
        raise UserError(f"{checkpoint} is a Hugging Face directory already; --quantize fp8, or --push without --output")
    if output is not None:
        refuse_to_overwrite(output)
    training = (checkpoint / store.STATE_FILE).exists()
    return store.read_state(checkpoint) if training else {}, kind


def _card(state: Mapping[str, Any], checkpoint: Path, options: ExportOptions) -> dict[str, Any]:
    """What the model card says; of the run, as far as the checkpoint knows it."""
    card: dict[str, Any] = {}
    if "config" in state:
        card = run_card(state["config"], state["scores"], state.get("stage", "train")) | {
            "git_commit": state["git_commit"]
        }
        card["run_id"] = f"{card['run_id']}, step {state['step']}"
    if origin := hub_origin(checkpoint):
        card |= {"base_model": origin[0], "base_revision": origin[1]}
    base = options.base_model or card.get("base_model") or _known_base(checkpoint)
    return card | ({"base_model": base} if base else {})


def _known_base(checkpoint: Path) -> str | None:
    """What transformers 4 noted in config.json: a hub id, or a folder of whoever saved it."""
    name = json.loads((checkpoint / "config.json").read_text()).get("_name_or_path")
    return public(name) if name else None


# --- FP8 ---


def _quantize(
    checkpoint: Path,
    output: Path,
    options: ExportOptions,
    state: Mapping[str, Any],
    kind: str,
    card: dict[str, Any],
    progress: Progress | None,
) -> list[str]:
    from eureka_megatron.release.quantize import Quality, quantize_fp8

    prompts = _prompts(checkpoint, options, state)
    image_token = read_hf_config(checkpoint).image_token_id
    inputs = [model_inputs(prompt, image_token) for prompt in prompts]  # type: ignore[arg-type]  # has what is taken
    cut = min(CHECKED_PROMPTS, len(inputs) // 2)

    def text(quality: Quality) -> str:
        described, own = _describe(quality, len(inputs) - cut), checkpoint / "README.md"
        if kind == "HF" and own.is_file():  # a release has a card already
            return f"{own.read_text(encoding='utf-8').rstrip()}\n\n## Quantisation\n\n{described}\n"
        return model_card(card | {"quantization": described})

    with _as_hf(checkpoint, output, kind, progress) as directory:
        if progress:
            tell(f"quantising, calibrated on {len(inputs) - cut} prompts and checked on {cut} …")
        quality = quantize_fp8(directory, output, inputs[cut:], inputs[:cut], card=text)
    return [_describe(quality, len(inputs) - cut)]


def _describe(quality: Any, prompts: int) -> str:
    return (
        f"FP8 (E4M3) linears of the text layers, calibrated on {prompts} prompts; relative error of the logits on other prompts "
        f"{quality.weights:.2%} from the weights, {quality.weights_and_activations:.2%} with activations rounded too; "
        f"{quality.same_choice:.1%} of the likeliest tokens are the same"
    )


@contextmanager
def _as_hf(checkpoint: Path, output: Path, kind: str, progress: Progress | None) -> Iterator[Path]:
    """The checkpoint as a Hugging Face directory, for as long as the block runs."""
    if kind == "HF":
        yield checkpoint
        return
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            megatron_to_hf(checkpoint, Path(folder) / "hf", progress=progress)
            yield Path(folder) / "hf"


def _prompts(checkpoint: Path, options: ExportOptions, state: Mapping[str, Any]) -> list[Prompt]:
    """Prompts to calibrate and to check on, spread over the data."""
    config = _run_config(state, checkpoint, options)
    processor = make_processor(config) if config else Processor(checkpoint)
    data: Path | str = options.calibrate or (config.data.train if config else "")
    if not data:
        raise ConfigError(f"{checkpoint} does not say what it was trained on: name a data file with --calibrate")
    media = config.data.media if config else ()
    dataset = load_dataset(data, processor, media=media, on_bad_row="skip")
    wanted = options.calibration_prompts + CHECKED_PROMPTS
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    found = [prompt for index in order[:wanted] if (prompt := dataset.get(index)) is not None]
    if len(found) < 2:
        raise UserError(f"{data}: {len(found)} usable prompts are too few to calibrate on")
    return found


def _run_config(state: Mapping[str, Any], checkpoint: Path, options: ExportOptions) -> RunConfig | None:
    if "config" not in state:
        return None
    values = {**state["config"], "model": {**state["config"]["model"], "path": str(checkpoint)}}
    return make_config(values, origin=str(checkpoint / store.STATE_FILE))


# --- the hub ---


def _push(directory: Path, repository: str, *, private: bool) -> str:
    """Uploads the release to exactly the repository that was named. → a line with its address"""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Release by eureka export")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory} is not pushed to {repository}: {first}; the directory stays") from error
    return f"pushed to {commit.repo_url}"
