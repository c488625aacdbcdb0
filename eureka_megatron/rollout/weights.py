"""A model directory's weights for vLLM, also when Megatron wrote them: converted checkpoints, and those of training runs.

vLLM reads Hugging Face files by itself. For the torch_dist format it is given a loader of its own registry, which hands the model one
Hugging Face tensor after the other, so that whatever the trainer can begin from an engine can as well. vLLM is imported on use only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.weights.online import check_hf, open_checkpoint
from eureka_megatron.weights.table import expand, rows
from eureka_megatron.weights.torch_dist_metadata import METADATA_FILE

TORCH_DIST = "torch_dist"  # in vLLM's registry


def load_format(directory: Path) -> str:
    """What vLLM calls the way to read a model directory. Example: "auto"."""
    return register_loader() if (directory / METADATA_FILE).is_file() else "auto"


def hf_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(hub name, whole tensor in the stored dtype) of every weight of a torch_dist directory, one at a time in memory.

    UserError, before the first, naming all that is missing or does not fit the model.
    """
    reader = open_checkpoint(directory)
    if problems := check_hf(reader, {row.megatron: row for row in expand(rows(read_hf_config(directory)))}):
        raise UserError("; ".join(problems))
    for name, info in reader.tensors.items():
        yield name, reader[name][:].view(info.shape)


@cache
def register_loader() -> str:
    """Make vLLM know how to read torch_dist, once in a process; returns its name for it. Imports vLLM."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class TorchDistLoader(BaseModelLoader):
        """Called by vLLM: creates the model, has it filled here, packs it for its kernels."""

        def download_model(self, model_config: Any) -> None:
            """Nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            model.load_weights(hf_tensors(Path(model_config.model)))

    register_model_loader(TORCH_DIST)(TorchDistLoader)
    return TORCH_DIST
