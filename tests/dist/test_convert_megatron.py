"""A converted checkpoint loads at any layout, by `load_hf` and by Megatron's own loader; Megatron's own saves convert back."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from eureka_megatron.demo.forms import build_published
from eureka_megatron.layout import Execution, Layout
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.models.qwen2_5_vl.model import build_model
from eureka_megatron.parallel.runtime import Parallel, init_parallel
from eureka_megatron.release.live import export_hf
from eureka_megatron.weights import iter_hf_weights, load_hf
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.listing import describe, differences
from eureka_megatron.weights.offline import hf_to_megatron, megatron_to_hf
from eureka_megatron.weights.online import sharded_state
from eureka_megatron.weights.table import hub_name
from tests.helpers.naming import newer_name
from tests.helpers.ranks import run_ranks

LAYOUTS = [  # kv heads are 2
    Layout(),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(pipeline=4),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(pipeline=2, layers_first_stage=1),
    Layout(tensor=2, context=2, vision_parallel="data"),
    Layout(tensor=4, vision_parallel="tensor"),
]


def both_namings(directory: Path) -> list[Path]:
    """The directory, and a copy whose tensors go by transformers 5's names (sharded ones keep their index)."""
    new = shutil.copytree(directory, directory.with_name(directory.name + "-new"))
    names = {name: newer_name(name) for name in Reader(directory).tensors}
    for file in new.glob("*.safetensors"):
        save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    for index in new.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {names[name]: file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    return [directory, new]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """(source, converted): tied and untied, one and two key heads, in one file and in shards, fp32 and bf16, both namings."""
    folder, found = tmp_path_factory.mktemp("kinds"), []
    for tied, kv_heads, shard, dtype in (
        (True, 2, "5GB", torch.float32),
        (True, 1, "500KB", torch.bfloat16),
        (False, 2, "500KB", torch.float32),
        (False, 1, "5GB", torch.bfloat16),
    ):
        sizes = {"tied": tied, "kv_heads": kv_heads, "dtype": dtype, "max_shard_size": shard, "randomize_all": True}
        made = build_published(folder / f"{'tied' if tied else 'untied'}-{kv_heads}-{shard}", **sizes)
        for source in both_namings(made):
            hf_to_megatron(source, folder / f"{source.name}-megatron", verify=True)
            found.append((source, folder / f"{source.name}-megatron"))
    return found


def load_both_ways(parallel: Parallel, hf: Path, converted: Path, saved: Path) -> list[str]:
    """HF names that differ after `load_hf`, and after Megatron's loader; keys that Megatron's loader misses. Then Megatron saves it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    chunks = build_model(read_hf_config(hf), parallel)
    source = Reader(hf)
    wrong = []

    def compare(how: str) -> None:
        for name, weight in iter_hf_weights(chunks, parallel):
            if parallel.world.rank == 0 and not torch.equal(weight, source[name]):
                wrong.append(f"{how}: {name}")

    def forget() -> None:
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.data.fill_(torch.nan)

    forget()
    load_hf(chunks, converted, parallel)
    compare("load_hf")
    forget()
    wanted = sharded_state(chunks, parallel)
    state, missing, _ = dist_checkpointing.load(wanted, converted, strict=StrictHandling.RETURN_ALL)
    wrong.extend(f"missing: {key}" for key in missing if "_extra_state" not in key)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state if len(chunks) == 1 else state[f"model{number}"], strict=False)
    compare("megatron")
    load_hf(chunks, hf, parallel)
    if parallel.world.rank == 0:
        saved.mkdir()
    dist.barrier()
    dist_checkpointing.save(sharded_state(chunks, parallel), saved)
    return wrong


def go_round(parallel: Parallel, converted: list[Path], output: Path) -> None:
    """Loads each converted checkpoint and exports it from there."""
    for directory in converted:
        config = read_hf_config(directory)
        dtype = describe(directory).tensors["visual.patch_embed.proj.weight"][1]
        chunks = build_model(config, parallel, Execution(dtype=str(dtype).removeprefix("torch.")))
        load_hf(chunks, directory, parallel)
        export_hf(chunks, parallel, directory, output / directory.name, card={})


@dataclass(frozen=True)
class Passage:
    """What has gone through ranks at a layout."""

    layout: Layout
    source: Path  # loaded both ways
    wrong: list[list[str]]  # of each rank
    saved: Path  # by Megatron, from `source`
    exported: Path  # every kind, by names


def go_through(rank: int, layout: Layout, kinds: list[tuple[Path, Path]], one: int, folder: Path) -> list[str]:
    parallel = init_parallel(layout, rank=rank)
    wrong = load_both_ways(parallel, *kinds[one], folder / "saved")
    go_round(parallel, [converted for _, converted in kinds], folder)
    return wrong


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def passage(request: pytest.FixtureRequest, kinds: list[tuple[Path, Path]], tmp_path_factory: Any) -> Passage:
    """Everything that ranks at this layout are for, at one start of them."""
    layout, folder = request.param, tmp_path_factory.mktemp("layout")
    one = 0 if layout.pipeline == 2 else 4  # tied, untied
    wrong = run_ranks(go_through, layout.world_size, layout, kinds, one, folder)
    return Passage(layout, kinds[one][0], wrong, folder / "saved", folder)


def test_a_converted_checkpoint_loads_at_any_layout(passage: Passage) -> None:
    assert passage.wrong == [[]] * passage.layout.world_size


def test_every_kind_of_checkpoint_comes_back_bitwise_through_every_layout(
    kinds: list[tuple[Path, Path]], passage: Passage
) -> None:
    for source, converted in kinds:
        expected, found = Reader(source, rename=hub_name), Reader(passage.exported / converted.name)
        assert expected.tensors.keys() == found.tensors.keys()
        for name in expected.tensors:
            assert expected[name].dtype == found[name].dtype
            assert torch.equal(expected[name], found[name]), (source.name, name)


def test_what_megatron_saves_at_any_layout_converts_back_bitwise(passage: Passage, tmp_path: Path) -> None:
    shutil.copyfile(passage.source / "config.json", passage.saved / "config.json")
    megatron_to_hf(passage.saved, tmp_path / "back", verify=True)
    assert differences(describe(passage.source), describe(tmp_path / "back")) == []
