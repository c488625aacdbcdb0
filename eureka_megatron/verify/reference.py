"""What transformers computes on the samples, as a file for all ranks."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eureka_megatron.data.model_inputs import model_inputs
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.types import Sample
from eureka_megatron.verify.depths import reference_depths, watch_reference
from eureka_megatron.weights.table import hub_name


class Reference(Mapping[str, torch.Tensor]):
    """The file's tensors, each read when it is asked for: gradients of a real model are as large as the model.

    Names: "loss"; "logits.<sample>"; "logprobs.<sample>" (of every token but the first, in nats); "depth.<sample>.<depth>" (see `depths`); "grad.<hub name>" when gradients were asked for.
    """

    def __init__(self, path: Path | str) -> None:
        self._file = safe_open(str(path), "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def gradient_names(self) -> list[str]:
        """Hub names of the parameters whose gradients are here."""
        return [name.removeprefix("grad.") for name in self._names if name.startswith("grad.")]


def write_reference(
    hf_dir: Path | str,
    output: Path,
    samples: list[Sample],
    *,
    grads: bool,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
) -> None:
    """transformers' outputs on the samples, one at a time, as a file for `Reference`.

    Args:
        dtype: what it computes in.
        weights: what the weights are rounded to before; in fp32 with bf16 weights it computes what bf16 models should.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging as quiet

    quiet.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf_dir, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(weights))
    image_token = read_hf_config(hf_dir).image_token_id
    tokens_learned = sum(float(sample.mask_S[1:].sum()) for sample in samples)
    tensors: dict[str, torch.Tensor] = {}
    total = 0.0
    for index, sample in enumerate(samples):
        tokens = torch.from_numpy(sample.tokens_S)[None]
        with torch.set_grad_enabled(grads), watch_reference(model) as seen:
            logits = (
                model(**model_inputs(sample, image_token), attention_mask=torch.ones_like(tokens)).logits[0].float()
            )
            logprobs = logits[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
            loss = -(logprobs * torch.from_numpy(sample.mask_S[1:])).sum() / tokens_learned
        if grads:
            loss.backward()
        total += loss.item()
        tensors |= {f"logits.{index}": logits.detach(), f"logprobs.{index}": logprobs.detach()}
        tensors |= {f"depth.{index}.{name}": value for name, value in reference_depths(seen, sample).items()}
    tensors["loss"] = torch.tensor(total, dtype=torch.float64)
    if grads:
        # A tower that saw no picture has no gradient at all: zeros, which the native model must have too.
        tensors |= {
            f"grad.{hub_name(name)}": torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in model.named_parameters()
        }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)
