"""What a rehearsal says of a GPU's memory, on a GPU: the first 8 layers of a 3B model, one policy update.

Not yet run on hardware: whoever first does puts the measured figures beside the bar.
"""

import pytest
import torch

from eureka_megatron.layout import Execution, Layout
from eureka_megatron.parallel.cpu import cuda_type_names
from eureka_megatron.parallel.runtime import Parallel, init_parallel
from eureka_megatron.planning.published import CONFIGS
from eureka_megatron.planning.rehearsal import Drawn, Plan, of_layers, one_step, rehearse
from eureka_megatron.planning.twins import PLAIN
from eureka_megatron.planning.workload import Workload
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.gpu
PLAN = Plan(
    CONFIGS / "3b",
    Layout(),
    Execution(dtype="bfloat16"),
    Workload(8192, 4096, 28 * 28 * 256, 1),
    8192,
    freeze=("vision", "merger"),
    objective=PLAIN,
    on_gpu=True,
    layers=8,
)


def peak(rank: int) -> int:
    parallel: Parallel = init_parallel(PLAN.layout, rank=rank)
    with of_layers(PLAN.layers):
        trainer = Drawn(PLAN.model, parallel, PLAN.execution, freeze=PLAN.freeze, max_tokens_per_micro_batch=8192)
    trainer.start_phase(PLAN.optimizer, 2)
    with cuda_type_names():
        trainer.optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    one_step(trainer, PLAN)
    return torch.cuda.max_memory_allocated()


def test_a_gpu_needs_the_memory_that_was_rehearsed() -> None:
    if torch.cuda.device_count() < 1:
        pytest.skip("needs a GPU")
    (told,) = rehearse([(PLAN, 0)])
    (done,) = run_ranks(peak, 1)
    print(f"rehearsed {told.peak:,}, on the GPU {done:,}: {told.peak / done:.3f}")
    assert told.peak == pytest.approx(done, rel=0.05)
