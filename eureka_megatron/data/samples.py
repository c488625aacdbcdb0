"""A prompt and a response put together to learn from."""

import numpy as np

from eureka_megatron.data.positions import extend_positions
from eureka_megatron.types import Prompt, Sample


def training_sample(
    prompt: Prompt,
    tokens_R: np.ndarray,
    *,
    advantage: float = 1.0,
    logprobs_R: np.ndarray | None = None,
    weight_lag: int = 0,
) -> Sample:
    """The sequence prompt + response; mask, advantage and rollout log-probabilities stand on the response's tokens.

    Args:
        tokens_R: int64, with the end token when the response has one.
        advantage: of every response token.
        logprobs_R: float32, log μ of the sampled tokens; None for supervised training.
        weight_lag: how many weight updates ago they were sampled.
    """
    tokens_R = np.asarray(tokens_R, dtype=np.int64)
    if logprobs_R is not None and len(logprobs_R) != len(tokens_R):
        raise ValueError(f"{prompt.id}: {len(logprobs_R)} log-probabilities for {len(tokens_R)} tokens")
    return Sample(
        tokens_S=np.concatenate([prompt.tokens_S, tokens_R]),
        positions_3S=extend_positions(prompt.positions_3S, len(tokens_R)),
        mask_S=_on_response(prompt, np.ones(len(tokens_R))),
        advantages_S=_on_response(prompt, np.full(len(tokens_R), advantage)),
        rollout_logprobs_S=None if logprobs_R is None else _on_response(prompt, logprobs_R),
        pictures=prompt.pictures,
        picture_offsets=prompt.picture_offsets,
        weight_lag=weight_lag,
    )


def _on_response(prompt: Prompt, values_R: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(len(prompt.tokens_S)), values_R]).astype(np.float32)
