"""What every rank of a verified layout needs to know, and the model it then has."""

from __future__ import annotations

from dataclasses import dataclass

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.train.trainer import PolicyTrainer
from eureka_megatron.types import Sample


@dataclass(frozen=True)
class Job:
    """Example: Job("hf", "reference.safetensors", samples, Layout(tensor=2, pipeline=2)) on 4 ranks."""

    hf_dir: str
    # the file of transformers' outputs on the samples, see `write_reference`
    reference: str
    samples: tuple[Sample, ...]
    layout: Layout = Layout()
    execution: Execution = Execution()
    grads: bool = True
    max_tokens: int = 4096
    # another such file, of transformers computing in the dtype of `execution` where that is not fp32 (`rounding`)
    rounded: str = ""

    def trainer(self, rank: int, address: str, optimizer: OptimizerSection | None = None) -> PolicyTrainer:
        """This rank's share of the model, loaded. Collective."""
        return PolicyTrainer(
            self.hf_dir,
            init_parallel(self.layout, rank=rank, init_method=address),
            self.execution,
            max_tokens_per_micro_batch=self.max_tokens,
            optimizer=optimizer,
        )
