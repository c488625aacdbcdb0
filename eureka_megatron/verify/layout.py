"""The layout that is verified: one field an axis. A new axis is a new field here and, by its name, an option of the command line."""

from dataclasses import dataclass, fields
from typing import Any

from eureka_megatron.types import Sample

# Which of the fields the model is built with; the others are those of `init_parallel`.
OF_THE_MODEL = ("vision_parallel", "recompute", "backend")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and values are those of `init_parallel` and `build_model`. Example: Layout(tensor=2, pipeline=2) on 4 ranks."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks a stage
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    layers_first_stage: int | None = None
    layers_last_stage: int | None = None
    vision_parallel: str = "replicated"
    recompute: str = "none"
    backend: str = "local"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in fields(Layout)}
        return {name: value for name, value in values.items() if value != _DEFAULTS[name]}

    @property
    def parallel_options(self) -> dict[str, Any]:
        """Arguments of `init_parallel`. Data parallelism is whatever ranks remain."""
        return {name: value for name, value in self.chosen.items() if name not in (*OF_THE_MODEL, "data")}

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `PolicyTrainer`."""
        return {name: value for name, value in self.chosen.items() if name in OF_THE_MODEL}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.chosen.items()) or "one rank"


_DEFAULTS = {field.name: field.default for field in fields(Layout)}


@dataclass(frozen=True)
class Job(Layout):
    """What every rank needs to know. `reference` is the file of transformers' outputs on the samples, see `write_reference`;
    `rounded` is another, of transformers computing in `dtype` where that is not fp32 (`rounding`)."""

    hf_dir: str
    reference: str
    samples: tuple[Sample, ...]
    grads: bool = True
    max_tokens: int = 4096
    dtype: str = "float32"
    rounded: str = ""
