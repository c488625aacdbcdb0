"""The trainer rests while engines sample: what it gives back, and that its updates do not notice. Two data-parallel ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eureka_megatron.config import OptimizerSection
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.types import Batch
from eureka_megatron.verify import made_up_samples
from tests.helpers.ranks import run_ranks

SECTION = OptimizerSection(name="adam", lr=1e-3, schedule="constant", warmup_ratio=0.0)


def batch_of(directory: str) -> Batch:
    samples = [
        replace(sample, advantages_S=sample.mask_S * (number - 0.5), rollout_logprobs_S=sample.mask_S * -6.0)
        for number in range(2)
        for sample in made_up_samples(directory, pictures=(((3, 3),), ()))
    ]
    return Batch(tuple(samples), ((0, 1), (2, 3)))


def contents(trainer: Any) -> list[tuple[str, bytes]]:
    """What a checkpoint would hold: weights, masters, Adam's averages."""
    from eureka_megatron.train.checkpointing import _blocks

    return [
        (f"{block.key}{block.offsets}", block.values.view(torch.uint8).numpy().tobytes())
        for block in _blocks(trainer, None)
    ]


def course(rank: int, directory: str, dtype: str) -> list[dict[str, Any]]:
    """Three steps without and with rests between them."""
    from eureka_megatron.train.offload import _states
    from eureka_megatron.train.trainer import PolicyTrainer

    found = []
    parallel = init_parallel(Layout(data=2), rank=rank, world_size=2)
    for rests in (False, True):
        trainer = PolicyTrainer(directory, parallel, Execution(dtype=dtype))  # type: ignore[arg-type]
        metrics, moved = [], []
        for step in range(3):
            if rests:
                trainer.rest()
                whole = contents(trainer) if step else []
                trainer.rest()  # again changes nothing
                buffers = [buffer for chunk in trainer.chunks for buffer in chunk.buffers]
                assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in buffers)
                places = {id(state): state.data_ptr() for state in _states(trainer.optimizer)}
                trainer.resume()
                moved.append(sum(state.data_ptr() != places[id(state)] for state in _states(trainer.optimizer)))
                assert not step or contents(trainer) == whole, "a checkpoint can be written meanwhile"
            if step == 0:
                trainer.start_phase(SECTION, 6)
            metrics += trainer.train(batch_of(directory), "ppo_clip", {})
        found.append({"metrics": metrics, "contents": contents(trainer), "moved": moved})
    return found


def test_rests_leave_the_updates_bit_for_bit(tiny_dir: Path) -> None:
    for dtype, kinds in (("float32", 2), ("bfloat16", 3)):
        for without, rested in run_ranks(course, 2, str(tiny_dir), dtype):
            assert rested["metrics"] == without["metrics"]
            assert rested["contents"] == without["contents"]
            tensors, again = rested["moved"][1:]
            # Masters that are views of fp32 parameters stay; Adam's averages move, and bf16's masters.
            assert rested["moved"][0] == 0
            assert tensors == again > 0
            assert tensors % kinds == 0
