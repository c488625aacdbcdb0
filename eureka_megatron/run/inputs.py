"""What a run reads, by its configuration: data sets and how responses are judged."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eureka_megatron.config import RunConfig, load_config, make_config
from eureka_megatron.data.dataset import Rows, load_dataset, read_mixture
from eureka_megatron.data.prepare import show_validation
from eureka_megatron.data.processor import Processor, make_processor
from eureka_megatron.data.rows import AnswerCheck
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.places import absolute, model_directory
from eureka_megatron.rewards import RewardRules, ScoringRules, parseable_gold


def settle(config: RunConfig, *, download: bool = True) -> RunConfig:
    """The configuration with absolute paths, and with directories where it names models of the hub.

    Raises:
        UserError: such a model is not in the cache and cannot be downloaded.
    """
    reference = config.algorithm.reference
    changes: dict[str, dict[str, Any]] = {
        "model": {"path": model_directory(config.model.path, download=download)},
        "run": {"output": absolute(config.run.output)},
        "algorithm": {"reference": reference and model_directory(reference, download=download)},
    }
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


def open_dataset(config: RunConfig, data: Path | str, processor: Processor, response_key: str | None = None) -> Rows:
    """Data read by the run's rules; rows left out go to `run.output`/rejected_<name>.jsonl.

    response_key: of the text to imitate, for supervised training, which needs no answer that can be judged.
    """
    name = "+".join(path.stem for path, _ in read_mixture(data))
    return load_dataset(
        data,
        processor,
        media=config.data.media,
        on_bad_row=config.data.on_bad_row,
        rejected=config.run.output / f"rejected_{name}.jsonl" if config.data.on_bad_row == "skip" else None,
        check_answer=None if response_key else answer_check(config),
        response_key=response_key,
        max_tokens=config.longest_sample,
    )


def answer_check(config: RunConfig) -> AnswerCheck | None:
    """Why an answer can never be judged; None where not the rules judge, which alone must be able to read it."""
    return None if config.rewards.function or config.rewards.urls else unjudgeable


def validate_named(
    command: str,
    words: Sequence[str],
    *,
    config: Path | None,
    model: Path | None,
    limits: dict[str, Any],
    responses: str | None,
    clean: Path | None,
) -> int:
    """`validate_data` for what a command line names. → exit code.

    Args:
        command: named in messages, e.g. "eureka data validate".
        words: a data file, or a run's YAML file (or `config`) and overrides of it.
        model: whose processor reads; needed without a run.
        limits: values of the section `data` that go before the run's.
        responses: the key of the text to imitate, which every row must then have.

    Raises:
        ConfigError: nothing, too much, or overrides without a run are named.
    """
    files = [Path(word) for word in words if "=" not in word or os.path.exists(word)]
    overrides = [word for word in words if Path(word) not in files]
    run = config or next((file for file in files if file.suffix in (".yaml", ".yml")), None)
    files = [file for file in files if file != run]
    if len(files) + bool(run) == 0 or len(files) > 1 or not (run or model):
        raise ConfigError(f"{command}: needs a data file and --model, or a run's YAML file; see `{command} --help`")
    if overrides and not run:
        raise ConfigError(f"{command}: {overrides[0]!r}: overrides are for a run's YAML file")
    given = {} if run else {"model": {"path": model}, "data": {"train": str(files[0])}}
    found = load_config(run, overrides) if run else make_config(given, command)
    changes: dict[str, Any] = {"data": found.data.model_copy(update=limits)}
    if model:
        changes["model"] = found.model.model_copy(update={"path": model})
    if responses:
        changes["sft"] = found.sft.model_copy(update={"responses": responses})
    found = settle(found.model_copy(update=changes))
    return validate_data(found, files, whole_run=bool(run), responses=bool(responses), clean=clean)


def validate_data(
    config: RunConfig, files: Sequence[Path], *, whole_run: bool, responses: bool, clean: Path | None = None
) -> int:
    """Read data files as this run would and print what is wrong with them. → exit code, 1 when anything is.

    Args:
        files: none: all that the run reads.
        whole_run: whether the configuration is a run's, whose micro-batches must take the rows.
        responses: whether every row must have the text to imitate; those that have one are looked at in any case.
        clean: where the good rows of a single file go.

    Raises:
        UserError: a file is missing or holds no good row; `clean` and several files.
    """
    files = list(files) or [path for path, _ in read_mixture(config.data.train)] + list(
        filter(None, [config.data.test])
    )
    if clean is not None and len(files) > 1:
        raise UserError(f"--clean is for one file, but the run reads {', '.join(map(str, files))}; name one of them")
    processor = make_processor(config)
    found = [
        show_validation(
            file,
            processor,
            clean=clean,
            media=config.data.media,
            check_answer=answer_check(config),
            response_key=config.sft.responses,
            response_optional=not responses,
            max_tokens=config.longest_sample if whole_run else None,
        )
        for file in files
    ]
    return max(found)


def reward_rules(config: RunConfig) -> RewardRules:
    """How this run judges responses."""
    rewards = config.rewards
    return RewardRules(
        options=ScoringRules(
            compat=config.algorithm.compat,
            think=rewards.think,
            strict_ends=rewards.strict_ends,
            decimals=rewards.decimals,
            units=rewards.units,
            weights={"accuracy": rewards.accuracy_weight, "format": rewards.format_weight},
        ),
        workers=rewards.workers,
        time_limit_seconds=rewards.time_limit_seconds,
        function=rewards.function,
        urls=rewards.urls,
        remote_attempts=rewards.remote_attempts,
        remote_timeout_seconds=rewards.remote_timeout_seconds,
        repetition=rewards.repetition_penalty,
        repetition_ngram=rewards.repetition_ngram,
        overlong_buffer_tokens=rewards.overlong_buffer_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def unjudgeable(answer: Any) -> str | None:
    """Why no response could ever be right for this answer, or None."""
    return None if parseable_gold(answer) else "it cannot be parsed"
