"""The run configuration: one YAML file plus dotted overrides, validated once, frozen.

Every key is declared here with its unit and default; an unknown key is an error that shows the nearest valid name, and a test
asserts that every key declared here is read somewhere (`tests/unit/test_config.py`). Defaults are the published 7B settings
of MM-EUREKA where it has one (ALGORITHMS: hyper-parameters of the published runs).

Reads no environment variables and evaluates no expressions: OmegaConf interpolation such as `${run.name}` works, resolvers do not.
Names and paths stay as they are written (`yaml_values`), and `~` in a path is the home folder.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from eureka_megatron.errors import ConfigError, nearest
from eureka_megatron.layout import Execution, Layout, ParallelSection, Section, VisionParallel
from eureka_megatron.places import from_home
from eureka_megatron.yaml_values import is_section, read_override, read_yaml


def _place(path: Any) -> Any:
    """Also of a number, which a reference such as ${run.seed} may be."""
    return from_home(str(path)) if type(path) in (int, float) or isinstance(path, str | Path) else path


Place = Annotated[Path, BeforeValidator(_place)]
# Text that begins with a path, or with several behind commas.
Places = Annotated[str, AfterValidator(lambda text: ",".join(map(from_home, text.split(","))))]
# Where `eureka sft` has another default: imitation bears, and needs, a higher rate than reinforcement learning.
SFT_DEFAULTS = {"optimizer": {"lr": 1e-5}}
SFT_EPOCHS = 3
_RESOLVER = re.compile(r"\$\{[^{}]*:")


class RunSection(Section):
    name: str = "eureka"
    # everything the run writes lies below this folder
    output: Place = Path("runs/eureka")
    seed: int = Field(0, ge=0)


class ModelSection(Execution):
    # Hugging Face directory, one in Megatron's format (converted, or a training checkpoint), or a hub id such as
    # Qwen/Qwen2.5-VL-7B-Instruct (@REVISION may follow): weights, config, tokenizer, processor
    path: Place
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # parts (vision, merger, language) or patterns of tensor names ("visual.blocks.0.*") that do not learn
    freeze: tuple[str, ...] = ()
    # replicated: every tensor-parallel rank encodes all pictures; data: the ranks share them; tensor: its weights are split
    vision_parallel: VisionParallel = "replicated"


class DataSection(Section):
    # a JSONL or parquet file, a directory of `datasets`, or a mixture such as a.jsonl:0.7,b.parquet:0.3
    train: Places
    # of any of these kinds, but no mixture; evaluated every `training.evaluate_every` steps
    test: Place | None = None
    # folders pictures and videos may come from, besides the data file's own
    media: tuple[Place, ...] = ()
    # of a picture, or of a frame of a video
    min_pixels: int = Field(4 * 28 * 28, ge=1)
    # of a picture
    max_pixels: int = Field(640 * 28 * 28, ge=1)
    # of a frame; a row's own max_pixels goes before
    video_max_pixels: int = Field(128 * 28 * 28, ge=28 * 28)
    # frames a second taken from a file; a row's own fps or nframes goes before
    video_fps: float = Field(2.0, gt=0)
    # taken from a file at most; a longer list of frames is a bad row
    video_max_frames: int = Field(768, ge=2)
    # with expanded placeholders; longer prompts are bad rows
    max_prompt_tokens: int = Field(3000, ge=1)
    # a named template of data/prompts.py, or "none"
    system_prompt: str = "none"
    on_bad_row: Literal["error", "skip"] = "error"
    # threads that decode pictures and videos ahead of their use; 0: none
    workers: int = Field(2, ge=0)
    # prompts decoded ahead, at most (some 10 MiB each for the largest pictures); 0: none
    prefetch: int = Field(32, ge=0)


# What samplers elsewhere take besides the temperature → values that change nothing
_OTHER_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1, None),
    "top_k": (-1, 0, None),
    "min_p": (0, None),
    "repetition_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
}


class RolloutSection(Section):
    engines: int = Field(1, ge=1)
    # tensor-parallel workers of an engine, a GPU each
    tensor: int = Field(1, ge=1)
    samples_per_prompt: int = Field(8, ge=2)
    # T: the policy that is sampled and trained is softmax(logits / T), in log-probabilities, ratios, KL, entropy and gradients
    temperature: float = Field(1.0, gt=0)
    max_response_tokens: int = Field(4096, ge=1)
    # prompt and response together
    max_model_tokens: int = Field(8192, ge=2)
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    # on a CPU
    kv_cache_gib: float = Field(1.0, gt=0)
    # sequences an engine runs at once
    max_concurrent: int = Field(256, ge=1)
    # an engine that has not answered a call by then is ended and replaced
    timeout_seconds: float = Field(600.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _whole_policy(cls, values: Any) -> Any:
        """Settings of other samplers, known by name: what changes the sampled policy is refused, what does not is passed over."""
        if not isinstance(values, dict):
            return values
        for name, neutral in _OTHER_SAMPLING.items():
            if name in values and values[name] not in neutral:
                raise ValueError(
                    f"{name}={values[name]}: rollouts come from the whole policy, or log-probabilities and gradients would be those of "
                    "another one than was sampled; set rollout.temperature, and for evaluation training.evaluate_temperature and "
                    "training.evaluate_top_p"
                )
        return {name: value for name, value in values.items() if name not in _OTHER_SAMPLING}


class RewardsSection(Section):
    accuracy_weight: float = 1.0
    format_weight: float = 0.5
    think: Literal["required", "optional"] = "required"
    strict_ends: bool = False
    # rounded: 1.4142 is the root of 2, 0.3333 is 1/3 (four places or more)
    decimals: Literal["exact", "rounded"] = "exact"
    # converted: 1 m is 100 cm; a missing unit is forgiven in both
    units: Literal["same", "converted"] = "same"
    # largest, for repeated n-grams; 0: none
    repetition_penalty: float = Field(0.0, ge=0)
    # words; characters of Chinese or Japanese, fours of them of Thai or Khmer
    repetition_ngram: int = Field(20, ge=1)
    # DAPO: from 0 to -1 over the last so many response tokens; 0: none
    overlong_buffer_tokens: int = Field(0, ge=0)
    # package.module:function or path.py:function that judges instead of the rules
    function: Places | None = None
    # reward services that judge instead, with the original's request and answer
    urls: tuple[str, ...] = ()
    # of each URL, with growing pauses
    remote_attempts: int = Field(5, ge=1)
    # of one request, up to the last byte of its answer
    remote_timeout_seconds: float = Field(180.0, gt=0)
    # judge processes
    workers: int = Field(2, ge=1)
    # of one answer
    time_limit_seconds: float = Field(10.0, gt=0)


class FilterSection(Section):
    enabled: bool = True
    lower: float = 0.1
    upper: float = 0.9
    # the filter acts once step > freezing_steps
    freezing_steps: int = Field(-1, ge=-1)
    max_generation_batches: int = Field(10, ge=1)
    # weight versions a surplus group may lie behind before it is dropped
    max_age: int = Field(1, ge=0)
    # train on fewer than prompts_per_step groups, but not on fewer than this
    min_groups: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "FilterSection":
        if not 0 <= self.lower <= self.upper <= 1:
            raise ValueError(f"need 0 <= lower <= upper <= 1, got lower={self.lower}, upper={self.upper}")
        return self


class AlgorithmSection(Section):
    # a name of rl.advantages
    advantage: str = "grpo"
    # keyword options of that estimator: adora, clip_filter, reward_clip
    advantage_options: dict[str, float | tuple[float, float]] = Field(default_factory=dict)
    # a name of rl.losses
    loss: str = "ppo_clip"
    # keyword options of that loss
    loss_options: dict[str, float | str | bool | None] = Field(default_factory=dict)
    # β; 0 builds no reference at all
    kl_coefficient: float = Field(0.0, ge=0)
    # log-ratios are bounded to 20 nats before any exponential
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    # directory of the reference policy, of the kinds of model.path; none: that one
    reference: Place | None = None
    # discount of later rewards, per response token
    gamma: float = Field(1.0, gt=0, le=1)
    compat: Literal["mm_eureka"] | None = None
    filter: FilterSection = FilterSection()


class OptimizerSection(Section):
    name: Literal["adam", "sgd"] = "adam"
    # largest; of eureka sft 1.0e-5, where the key is not given
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    # 0: no clipping
    clip_grad: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _averages(self) -> "OptimizerSection":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class TrainingSection(Section):
    # rollout steps
    steps: int = Field(1000, ge=1)
    prompts_per_step: int = Field(128, ge=1)
    # responses of one optimizer step
    responses_per_update: int = Field(128, ge=1)
    # over the responses of one rollout step
    passes: int = Field(1, ge=1)
    # rollout steps whose responses are sampled while an earlier one trains, by weights so many steps older at most; 0: in turn.
    # Above 0 the rollout correction is on (algorithm.loss_options: correction, of itself token_tis)
    async_steps: Literal[0, 1, 2] = 0
    # prompt and response of the longest sample must fit
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    # responses to one prompt share its rows and pictures within a micro-batch, wherever that saves rows: the same numbers for less work
    share_prompts: bool = True
    # a trainer rank that gives no sign of life for so long ends the run
    stall_seconds: float = Field(60.0, gt=0)
    # rollout steps; 0: never
    evaluate_every: int = Field(0, ge=0)
    # also before the first step, as eval_before/*
    evaluate_before: bool = False
    # 0: greedy
    evaluate_temperature: float = Field(1.0, ge=0)
    # the likeliest tokens that hold this share of the probability
    evaluate_top_p: float = Field(1.0, gt=0, le=1)
    # mmk12, mathvista, mathverse, mathvision, olympiadbench, wemath → its published file or folder: asked as `eureka eval` does, but with the
    # run's system prompt, lengths and temperature; logged as eval/NAME_official and eval/NAME_paper
    evaluate_benchmarks: dict[str, Place] = Field(default_factory=dict)
    # rows of each benchmark, from the first on; null: all
    evaluate_limit: int | None = Field(None, ge=1)
    # an evaluation's metric such as eval/accuracy or eval/mathvista_paper: the weights with its highest value lie in run.output/hf_best
    evaluate_best: str | None = None
    # rollout steps between HF exports; 0: only at the end
    export_every: int = Field(0, ge=0)
    # colocated: while engines sample, the optimizer's state waits in host memory and the gradients' memory is free
    offload: bool = True


class CheckpointSection(Section):
    """Training checkpoints, in `run.output`/checkpoints; `--resume auto` of `eureka train` and `eureka sft` goes on from the newest whole one."""

    # rollout steps (of eureka sft: optimizer steps) between two, and one after the last; 0: none. While one is written, a copy of it
    # stands in host memory
    every: int = Field(50, ge=0)
    # of all finished ones
    keep_last: int = Field(2, ge=1)
    # besides the last ones, those whose step is a multiple of this stay; 0: none does
    keep_every: int = Field(0, ge=0)
    # SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 (scancel, sbatch --signal, a time limit) end the run after the present step, with a checkpoint;
    # a second signal ends it at once, as the first does without this
    on_signal: bool = False
    # of a run that a signal ended, e.g. one that a batch system requeues; null: 128 + the signal's number
    signal_exit_code: int | None = Field(None, ge=0, le=255)


class SFTSection(Section):
    """Of `eureka sft` and the demo's cold start. `eureka sft` also has another default of optimizer.lr: 1.0e-5."""

    # optimizer steps; null: as many as sft.epochs make
    steps: int | None = Field(None, ge=1)
    # over the rows of data.train, in place of sft.steps; neither: 3
    epochs: float | None = Field(None, gt=0)
    samples_per_step: int = Field(32, ge=1)
    # the row's key that holds the text to imitate
    responses: str = "response"

    @model_validator(mode="after")
    def _one_measure(self) -> "SFTSection":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps={self.steps} and epochs={self.epochs:g} both say how long: give one, the other is null"
            )
        return self


class SyncSection(Section):
    # rollout steps between checksum comparisons; always at start-up; 0: only then
    check_every: int = Field(10, ge=0)
    # tensors travel in buckets of about this size
    bucket_mib: int = Field(512, ge=1)


class TrackingSection(Section):
    # auto: online with a login, else offline
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "eureka_megatron"
    tensorboard: bool = True
    console: bool = True
    # steps between those whose rollouts are stored to be looked at (`eureka report`), the first and the last among them; 0: none
    rollouts_every: int = Field(10, ge=0)
    # prompts of such a step that are stored, with all their responses and pictures
    rollouts_per_step: int = Field(8, ge=1)


class RunConfig(Section):
    """Everything a run needs. `parallel.world_size` trainer ranks; each rollout engine is one more process."""

    model: ModelSection
    data: DataSection
    # split: engines have GPUs of their own; colocated: they take turns with the trainer ranks on the same ones
    placement: Literal["split", "colocated"] = "split"
    run: RunSection = RunSection()
    parallel: ParallelSection = ParallelSection()
    rollout: RolloutSection = RolloutSection()
    rewards: RewardsSection = RewardsSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    sft: SFTSection = SFTSection()
    sync: SyncSection = SyncSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def layout(self) -> Layout:
        return Layout(**self.parallel.model_dump(), vision_parallel=self.model.vision_parallel)

    @property
    def loss_options(self) -> dict[str, Any]:
        """`algorithm.loss_options`, the KL term where that stands in the loss, and the correction of responses that older weights sampled."""
        rule = self.algorithm
        kl = {"kl_coefficient": rule.kl_coefficient, "kl_estimator": rule.kl_estimator}
        correction = {"correction": "token_tis"} if self.training.async_steps else {}
        return {**correction, **rule.loss_options, **(kl if rule.kl_coefficient and rule.kl_in == "loss" else {})}

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample that a micro-batch takes; under context parallelism each is padded to a multiple of 2 · context."""
        multiple = 2 * self.parallel.context if self.parallel.context > 1 else 1
        return self.training.max_tokens_per_micro_batch // multiple * multiple

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.placement == "colocated" and self.training.async_steps:
            raise ValueError(
                f"training.async_steps={self.training.async_steps} needs placement=split: colocated engines sleep while the trainer works"
            )
        responses = self.training.prompts_per_step * self.rollout.samples_per_prompt
        if responses % self.training.responses_per_update:
            raise ValueError(
                f"training.responses_per_update={self.training.responses_per_update} must divide training.prompts_per_step × "
                f"rollout.samples_per_prompt = {responses}"
            )
        if self.data.min_pixels > self.data.max_pixels:
            raise ValueError(f"data.min_pixels={self.data.min_pixels} exceeds data.max_pixels={self.data.max_pixels}")
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if longest > self.rollout.max_model_tokens:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds rollout.max_model_tokens="
                f"{self.rollout.max_model_tokens}"
            )
        engines, world = self.rollout.engines * self.rollout.tensor, self.parallel.world_size
        if self.placement == "colocated" and world % engines:
            right = [n for n in range(1, world + 1) if world % (n * self.rollout.tensor) == 0]
            fitting = (
                f"rollout.engines={' or '.join(map(str, right))}" if right else f"rollout.tensor that divides {world}"
            )
            raise ValueError(
                f"placement=colocated needs rollout.engines × rollout.tensor = {engines} to divide the {world} trainer ranks whose GPUs "
                f"the engines share: {fitting}"
            )
        return self


def load_config(
    path: Path | str, overrides: list[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides, resolve references, validate.

    Args:
        defaults: of a command, where they differ from those declared above.

    Raises:
        ConfigError: file, key, value or combination is wrong; names it and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}") from error
    given = read_yaml(text, RunConfig, str(path))
    if not isinstance(given, dict | None):
        raise ConfigError(f"{path} must be a mapping of sections, found {type(given).__name__}")
    layers = [(str(path), given or {})]
    layers += [(f"override {line!r}", read_override(line, RunConfig)) for line in overrides or []]
    origin, merged = str(path), OmegaConf.merge(_defaults_of(RunConfig), dict(defaults or {}))
    try:
        for origin, values in layers:
            if any(_RESOLVER.search(text) for text in _texts(values)):
                raise ConfigError(f"{origin}: resolvers such as ${{oc.env:…}} are not allowed; write the value")
            merged = OmegaConf.merge(merged, values)
        origin = str(path)
        whole = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_reason(error)}") from error
    return make_config(whole, origin=str(path))


def _defaults_of(section: type[BaseModel]) -> dict[str, Any]:
    """Every key that has one, as plain values: keys may refer to them."""
    annotations = {name: field.annotation for name, field in section.model_fields.items()}
    inner = {name: _defaults_of(kind) for name, kind in annotations.items() if is_section(kind)}
    left = {name for name, field in section.model_fields.items() if name not in inner and not field.is_required()}
    return inner | section.model_construct().model_dump(mode="json", include=left)


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _texts(value)


def _reason(error: OmegaConfBaseException) -> str:
    reason = f"{error.full_key}: {str(error).splitlines()[0]}" if error.full_key else str(error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        reason += " (keys are written ${section.key}; environment variables are not read)"
    return reason


def make_config(values: Any, origin: str = "configuration") -> RunConfig:
    """Validate a plain dictionary. Raises ConfigError naming the first wrong key; `origin` stands before it."""
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must be a mapping of sections, found {type(values).__name__}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem, origin) for problem in error.errors()[:5])) from error


def _describe(problem: Any, origin: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        return f"{origin}: unknown key {key!r}{nearest(location[-1], section.model_fields)}"
    if problem["type"] == "missing" and not location[-1].isdigit():
        return f"{origin}: key {key!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{origin}: {message}"
    shown = isinstance(problem["input"], dict | BaseModel) or str(problem["input"]) in message
    found = "" if shown else f", found {problem['input']!r}"
    return f"{origin}: {key}: {message}{found}"
