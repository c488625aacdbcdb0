"""What CUDA IPC starts from: every rank has every tensor whole. The handles themselves need a GPU (tests/gpu/test_colocated.py)."""

from pathlib import Path

import torch

from eureka_megatron.layout import Layout
from eureka_megatron.parallel.runtime import init_parallel
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.table import hub_name
from tests.helpers.ranks import run_ranks


def received(rank: int, directory: str) -> list[str]:
    """Names of the tensors that came, all of them equal to the checkpoint's."""
    from eureka_megatron.sync.ipc_transfer import everywhere
    from eureka_megatron.train.trainer import PolicyTrainer

    trainer = PolicyTrainer(directory, init_parallel(Layout(tensor=2), rank=rank, world_size=2), freeze=("vision",))
    source, checkpoint = trainer.weight_source(), Reader(directory, rename=hub_name)
    names = []
    for name, tensor in everywhere(iter(source), source.metadata(), torch.device("cpu")):
        assert torch.equal(tensor, checkpoint[name]), name
        names.append(name)
    return names


def test_every_rank_gets_every_tensor_that_learns(tiny_dir: Path) -> None:
    first, second = run_ranks(received, 2, str(tiny_dir))
    assert first == second
    assert first
    assert not [name for name in first if name.startswith("visual.blocks")]
