"""What can be refused before any process starts, is refused here."""

from typing import Any

import torch

from eureka_megatron.config import RunConfig
from eureka_megatron.errors import ConfigError
from eureka_megatron.models.qwen2_5_vl.config import check_engine, check_layout, read_hf_config
from eureka_megatron.rl import advantages
from eureka_megatron.rl.losses import resolve_options
from eureka_megatron.weights.table import expand, frozen_rows, rows

# Set by keys of their own, because the reference policy depends on them, too.
_KL_KEYS = ("kl_coefficient", "kl_estimator")


def check_run(config: RunConfig) -> None:
    """Refuse a layout, a reference or a `model.freeze` that does not fit the checkpoint. Raises ConfigError."""
    hf_config = read_hf_config(config.model.path)
    check_layout(hf_config, config.layout)
    frozen_rows(expand(rows(hf_config)), config.model.freeze)
    reference = config.algorithm.reference
    if reference is not None and read_hf_config(reference) != hf_config:
        raise ConfigError(
            f"algorithm.reference={reference} has another architecture than model.path={config.model.path}"
        )


def check_rollout(config: RunConfig) -> None:
    """Refuse engines that the model cannot be split over, and rollouts longer than its positions, or than training could take. Raises ConfigError."""
    asked, model = config.rollout.max_model_tokens, config.model.path
    hf_config = read_hf_config(model)
    check_engine(hf_config, config.rollout.tensor)
    known = hf_config.text_config.max_position_embeddings
    if asked > known:
        raise ConfigError(
            f"rollout.max_model_tokens={asked} is more than max_position_embeddings={known} in {model / 'config.json'}"
        )
    check_lengths(config)


def check_lengths(config: RunConfig) -> None:
    """Refuse rollouts that training could not take. Raises ConfigError."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > config.longest_sample:
        limit = config.training.max_tokens_per_micro_batch
        filled = "" if limit == config.longest_sample else f" ({config.longest_sample}, filled up for parallel.context)"
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds training.max_tokens_per_micro_batch={limit}{filled}: "
            "raise that or lower one of the two"
        )


def check_algorithm(config: RunConfig) -> None:
    """Refuse names and options that `rl` does not know. Raises ConfigError."""
    algorithm = config.algorithm
    for key in _KL_KEYS:
        if key in algorithm.loss_options:
            raise ConfigError(f"algorithm.loss_options.{key}: set algorithm.{key} instead (and algorithm.kl_in)")
    if algorithm.reference is not None and algorithm.kl_coefficient == 0:
        raise ConfigError("algorithm.reference is set but algorithm.kl_coefficient is 0: no reference would be built")
    options: dict[str, Any] = {**algorithm.advantage_options, "compat": algorithm.compat}
    try:
        resolve_options(algorithm.loss, algorithm.compat, **config.loss_options)
        advantages.compute(algorithm.advantage, torch.zeros(1, 2), lengths_GN=torch.ones(1, 2), **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"algorithm: {error}") from error
