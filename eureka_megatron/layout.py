"""How a model is laid out over ranks and how its layers are computed: two records from the configuration down to the model.

`Section` is the base of every record of the configuration: frozen, checked when it is made, no unknown keys.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eureka_megatron.errors import ConfigError

Record = TypeVar("Record", bound=BaseModel)
VisionParallel = Literal["replicated", "data", "tensor"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # for `run.name: ${run.seed}`
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """`true` is no number, although Python thinks so; YAML writes it for `on` and `yes`, too."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation in (int, float):
                raise ValueError(f"{name}: needs a number, found {str(value).lower()}")
        return values


class ParallelSection(Section):
    """Sizes of the parallel axes. Example: tensor 2, pipeline 2, data 3 on 12 ranks."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    # model chunks a stage (interleaved schedule); 1: off
    virtual_pipeline: int = Field(1, ge=1)
    # ranks that share the tokens of a packed row
    context: int = Field(1, ge=1)
    data: int = Field(1, ge=1)
    sequence_parallel: bool = False
    # text layers beside the vision tower; None: as many as elsewhere
    layers_first_stage: int | None = Field(None, ge=1)
    # text layers beside the output layer
    layers_last_stage: int | None = Field(None, ge=1)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @model_validator(mode="after")
    def _consistent(self) -> "ParallelSection":
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline needs pipeline > 1 (it interleaves the chunks of pipeline stages)")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "sequence_parallel needs tensor > 1 (it splits the sequence over the tensor-parallel ranks)"
            )
        return self


class Layout(ParallelSection):
    """All that says which rank holds and computes what."""

    # how tensor-parallel ranks divide the vision tower's work; key model.vision_parallel of the configuration
    vision_parallel: VisionParallel = "replicated"

    def __str__(self) -> str:
        return (
            ", ".join(f"{name} {value}" for name, value in self.model_dump(exclude_defaults=True).items()) or "one rank"
        )


class Execution(Section):
    """How the layers are computed. What they compute depends on it by rounding only."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    backend: Literal["local", "te"] = "local"
    # what training computes again instead of keeping it: nothing, attention within segments, or whole layers (least memory)
    recompute: Literal["none", "selective", "full"] = "none"
    # matrix products of the text decoder in 8 bits (backend te): hybrid has E4M3 forward and E5M2 for gradients
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    # FP8 scales: from earlier steps, of each tensor as it comes, or of blocks of 128 values (Hopper, CUDA 12.9)
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"

    @model_validator(mode="after")
    def _backend_fits(self) -> "Execution":
        if self.fp8 != "none" and self.backend != "te":
            raise ValueError(f"fp8={self.fp8!r} needs backend 'te' (Transformer Engine), found {self.backend!r}")
        if self.backend == "te" and self.dtype != "bfloat16":
            raise ValueError(
                f"backend 'te' computes in bfloat16, found dtype {self.dtype!r}; use backend 'local' for it"
            )
        return self


def from_options(record: type[Record], options: object) -> Record:
    """The record from the attributes that are named as its fields; others keep their defaults. Raises ConfigError in one line."""
    try:
        return record(**{name: getattr(options, name) for name in record.model_fields if hasattr(options, name)})
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
