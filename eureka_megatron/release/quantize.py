"""An FP8 release from a Hugging Face directory, in the format that vLLM reads as `quantization="modelopt"`.

The linears of the text layers become float8_e4m3fn with one scale a matrix; the scale of what goes into each is measured on real
prompts and pictures by NVIDIA's modelopt. Vision tower, embeddings, norms and lm_head stay as they are. vLLM fuses q, k, v and
gate, up: each of those groups gets one common scale, so that nothing is rounded twice.

Files: `weight` (fp8), `weight_scale`, `input_scale` (fp32 scalars) for each linear, hf_quant_config.json, and the same in config.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eureka_megatron.errors import UserError
from eureka_megatron.weights.companions import copy_companions
from eureka_megatron.weights.hf_files import MAX_SHARD_BYTES, Reader, Writer, atomic_directory
from eureka_megatron.weights.table import hub_name

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
EXCLUDED = ["lm_head", "visual*"]  # in the hub's naming; embeddings and norms are no linears
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
QUANTIZER = {"num_bits": (4, 3), "axis": None, "enable": True}  # E4M3, one scale a tensor
RECIPE = {
    "quant_cfg": {
        "*": {"enable": False},
        "*language_model.layers*weight_quantizer": QUANTIZER,
        "*language_model.layers*input_quantizer": QUANTIZER,
        "default": {"enable": False},
    },
    "algorithm": "max",
}

Inputs = Mapping[str, Any]  # keyword arguments of the model's forward, a batch of one


@dataclass(frozen=True)
class Quality:
    """What the rounding costs, measured on prompts that were not calibrated on: ‖logits − original‖ / ‖original‖.

    First of the dequantised weights, as the files hold them, in the original model; then with the inputs of the linears rounded too, as
    the FP8 kernels do; and of the latter the share of positions whose likeliest token stayed the same.
    """

    weights: float
    weights_and_activations: float
    same_choice: float


def quantize_fp8(
    source: Path,
    output: Path,
    calibration: Sequence[Inputs],
    check: Sequence[Inputs],
    *,
    card: Callable[[Quality], str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Quality:
    """Writes the release of an HF directory in FP8. Takes the memory of the model once; on a GPU where there is one.

    Args:
        source: a directory in the hub's naming.
        output: must not exist, or be empty.
        card: makes README.md.

    Raises:
        UserError: the output exists or cannot be written; nothing is left there.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    with warnings.catch_warnings():  # of versions it was not tried with; the quality is measured below
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    transformers_logging.disable_progress_bar()
    assert calibration
    assert check
    with atomic_directory(output) as directory:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto").eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        original = _logits(model, check)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it found
            model = mtq.quantize(model, RECIPE, lambda quantized: _logits(quantized, calibration))
        scales = _scales(model)
        dtype = _write(source, directory, scales, max_shard_bytes)
        copy_companions(source, directory, dtype)
        _write_config(directory)
        quality = _measure(model, Reader(directory), check, original)
        (directory / "README.md").write_text(card(quality))
    return quality


@dataclass(frozen=True)
class Scales:
    """A value times its scale is the real one."""

    weight: Tensor
    input: Tensor


def _scales(model: nn.Module) -> dict[str, Scales]:
    """Hub name of each quantised weight → scales, fp32 scalars; common ones within the groups that vLLM fuses."""
    largest: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False):
            pair = module.weight_quantizer.amax, module.input_quantizer.amax
            largest[hub_name(f"{name}.weight")] = tuple(value.detach().float().cpu() for value in pair)
    expected = [
        name for name in largest if re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight", name)
    ]
    assert expected == list(largest), "only linears of the text layers"
    scales = {}
    for name in largest:
        parent, linear, _ = name.rsplit(".", 2)
        group = next((fused for fused in FUSED if linear in fused), (linear,))
        together = [largest[f"{parent}.{member}.weight"] for member in group]
        weight, activation = (torch.stack(values).amax() / LARGEST for values in zip(*together, strict=True))
        scales[name] = Scales(weight, activation)
    return scales


def _write(source: Path, directory: Path, scales: Mapping[str, Scales], max_shard_bytes: int) -> torch.dtype:
    """The weights, streaming, each followed by its scales; → dtype of what was not quantised."""
    reader = Reader(source, rename=hub_name)
    if missing := sorted(scales.keys() - reader.tensors.keys()):
        raise UserError(f"{source} lacks {', '.join(missing)}, which the model has")
    plan: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for name, info in reader.tensors.items():
        if name in scales:
            plan += [(name, info.shape, FP8), (f"{name}_scale", (), torch.float32)]
            plan += [(_input_scale(name), (), torch.float32)]
        else:
            plan.append((name, info.shape, info.dtype))
    with Writer(directory, plan, max_shard_bytes=max_shard_bytes) as writer:
        for name in reader.tensors:
            if name not in scales:
                writer.write(name, reader[name])
                continue
            scale = scales[name].weight
            writer.write(name, (reader[name].float() / scale).clamp(-LARGEST, LARGEST).to(FP8))
            writer.write(f"{name}_scale", scale)
            writer.write(_input_scale(name), scales[name].input)
    return next(info.dtype for name, info in reader.tensors.items() if name not in scales)


def _input_scale(name: str) -> str:
    return f"{name.removesuffix('.weight')}.input_scale"


def _write_config(directory: Path) -> None:
    """hf_quant_config.json, and the same in config.json, where vLLM looks first."""
    import modelopt
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    described = {
        "producer": {"name": "modelopt", "version": modelopt.__version__},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": EXCLUDED},
    }
    (directory / "hf_quant_config.json").write_text(json.dumps(described, indent=2) + "\n")
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": convert_hf_quant_config_format(described)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def dequantized(reader: Reader, name: str) -> Tensor:
    """fp32 values of a weight of an FP8 directory; as it stands when it was not quantised."""
    values = reader[name]
    return values.float() * reader[f"{name}_scale"] if values.dtype == FP8 else values


def _measure(model: Any, reader: Reader, check: Sequence[Inputs], original: Tensor) -> Quality:
    """Puts what the files hold into the model and compares its logits with the original's."""
    for name, module in model.named_modules():
        hub = hub_name(f"{name}.weight")
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False):
            module.weight_quantizer.disable()
            module.weight.data.copy_(dequantized(reader, hub))
            module.input_quantizer.amax = reader[_input_scale(hub)].to(module.weight.device) * LARGEST
    both = _logits(model, check)
    for module in model.modules():
        if getattr(getattr(module, "input_quantizer", None), "is_enabled", False):
            module.input_quantizer.disable()
    alone = _logits(model, check)
    weights, with_activations = (float((logits - original).norm() / original.norm()) for logits in (alone, both))
    return Quality(weights, with_activations, float((both.argmax(-1) == original.argmax(-1)).float().mean()))


@torch.no_grad()
def _logits(model: nn.Module, batches: Sequence[Inputs]) -> Tensor:
    """fp32 [tokens of all batches, vocabulary], on the CPU."""
    found = []
    for batch in batches:
        placed = {name: value.to(model.device) for name, value in batch.items()}
        found.append(model(**placed).logits[0].float().cpu())
    return torch.cat(found)
