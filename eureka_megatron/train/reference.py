"""The reference policy of the KL terms: a second set of weights on the host, no second model on the device.

Its log-probabilities are computed once a rollout step, forward only, with its weights swapped into the policy's own parameters. What is
frozen is the same in both and is not kept twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.weights import load_hf


class ReferenceWeights:
    """This rank's shards of the reference, in host memory.

    Args:
        chunks: the model, before anything is wrapped around it; its weights are overwritten: load the policy afterwards.
        hf_dir: the reference's Hugging Face directory, of the policy's architecture.
        same_checkpoint: whether the policy starts from the same weights, so that frozen parameters need not be kept.

    Raises:
        UserError: the directory does not fit the model (see load_hf).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        hf_dir: Path,
        parallel: Parallel,
        *,
        allow_narrowing: bool,
        same_checkpoint: bool,
    ) -> None:
        load_hf(chunks, hf_dir, parallel, allow_narrowing=allow_narrowing)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._pairs = [
            (parameter, parameter.detach().to("cpu", copy=True))
            for parameter in parameters
            if parameter.requires_grad or not same_checkpoint
        ]

    @property
    def nbytes(self) -> int:
        """Host memory it takes on this rank; as much again while it is swapped in."""
        return sum(kept.nbytes for _, kept in self._pairs)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Within, the model computes with the reference's weights; afterwards with its own again, bit for bit."""
        own = [parameter.detach().to("cpu", copy=True) for parameter, _ in self._pairs]
        try:
            for parameter, kept in self._pairs:
                parameter.data.copy_(kept)
            yield
        finally:
            for (parameter, _), value in zip(self._pairs, own, strict=True):
                parameter.data.copy_(value)
