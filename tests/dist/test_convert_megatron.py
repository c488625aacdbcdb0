"""A converted checkpoint loads at any layout, by `load_hf` and by Megatron's own loader; Megatron's own saves convert back."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eureka_megatron.checkpoint import iter_hf_weights, load_hf
from eureka_megatron.checkpoint.convert import sharded_state
from eureka_megatron.checkpoint.hf_io import Reader
from eureka_megatron.checkpoint.inspect import describe, differences
from eureka_megatron.checkpoint.offline import hf_to_megatron, megatron_to_hf
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.model import build_model
from eureka_megatron.models.qwen2_5_vl.tiny import build_tiny
from eureka_megatron.parallel.runtime import init_parallel
from tests.helpers.ranks import run_ranks

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)]  # tensor, pipeline; kv heads are 2


def load_both_ways(rank: int, hf: str, converted: str, layout: tuple[int, int]) -> list[str]:
    """HF names that differ after `load_hf`, and after Megatron's loader; keys that Megatron's loader misses."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    parallel = init_parallel(*layout, rank=rank, world_size=layout[0] * layout[1])
    source = Reader(hf)
    wrong = []

    def compare(how: str) -> None:
        weights = iter_hf_weights(chunks, parallel, to="all")
        wrong.extend(f"{how}: {name}" for name, weight in weights if not torch.equal(weight, source[name]))

    def forget() -> None:
        for parameter in chunks[0].parameters():
            parameter.data.fill_(torch.nan)

    chunks = build_model(read_hf_config(hf), parallel)
    forget()
    load_hf(chunks, converted, parallel)
    compare("load_hf")
    forget()
    wanted = sharded_state(chunks, parallel)
    state, missing, _ = dist_checkpointing.load(wanted, converted, strict=StrictHandling.RETURN_ALL)
    wrong.extend(f"missing: {key}" for key in missing if "_extra_state" not in key)
    chunks[0].load_state_dict(state, strict=False)
    compare("megatron")
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_converted_checkpoint_loads_at_any_layout(tmp_path, layout):
    source = build_tiny(tmp_path / "hf", tied=layout[1] == 2, randomize_all=True)
    hf_to_megatron(source, tmp_path / "megatron")
    world = layout[0] * layout[1]
    assert run_ranks(load_both_ways, world, str(source), str(tmp_path / "megatron"), layout) == [[]] * world


def save_by_megatron(rank: int, hf: str, output: str, layout: tuple[int, int]) -> None:
    from megatron.core import dist_checkpointing

    parallel = init_parallel(*layout, rank=rank, world_size=layout[0] * layout[1])
    chunks = build_model(read_hf_config(hf), parallel)
    load_hf(chunks, hf, parallel)
    if rank == 0:
        Path(output).mkdir()
    dist.barrier()
    dist_checkpointing.save(sharded_state(chunks, parallel), output)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 1)], ids=str)
def test_what_megatron_saves_at_any_layout_converts_back_bitwise(tmp_path, layout):
    source = build_tiny(tmp_path / "hf", tied=layout[1] == 2, randomize_all=True)
    run_ranks(save_by_megatron, layout[0] * layout[1], str(source), str(tmp_path / "saved"), layout)
    shutil.copyfile(source / "config.json", tmp_path / "saved" / "config.json")
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", verify=True)
    assert differences(describe(source), describe(tmp_path / "back")) == []
