"""What the present model does not have yet, on plain modules with the contracted names: virtual pipeline, the te backend's
names, a vision tower cut over tensor ranks; and a model that disagrees with the table."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.parallel.runtime import Axis, Parallel
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.online import iter_hf_weights, load_hf, own_parameters
from eureka_megatron.weights.table import expand, hf_metadata, hub_name, rows
from tests.helpers.ranks import run_ranks


class Tree(nn.Module):
    """Empty modules made as names come; enough of a model for whoever goes by names."""

    def plant(self, name: str, parameter: nn.Parameter) -> None:
        head, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(head, parameter)
            return
        if head not in self._modules:
            self.add_module(head, Tree())
        self._modules[head].plant(rest, parameter)


def axes(rank: int, tensor: int, pipeline: int) -> Parallel:
    """Tensor ranks next to each other, then pipeline stages, as Megatron orders them."""
    groups = {}
    for name, members in {
        "tensor": [[stage * tensor + r for r in range(tensor)] for stage in range(pipeline)],
        "pipeline": [[stage * tensor + r for stage in range(pipeline)] for r in range(tensor)],
    }.items():
        for ranks in members:
            group = dist.new_group(ranks)
            if rank in ranks:
                groups[name] = Axis(ranks.index(rank), len(ranks), group)
    return Parallel(**groups, world=Axis(rank, tensor * pipeline, dist.group.WORLD))


def chunk_trees(hf_config, parallel: Parallel, layers_of_chunks: list[list[int]], **options) -> list[nn.Module]:
    """Chunks of this rank that hold these text layers each; local numbering from 0."""
    chunks = []
    first_chunk = parallel.first_stage
    for number, layers in enumerate(layers_of_chunks):
        tree = Tree()
        last_chunk = parallel.last_stage and number == len(layers_of_chunks) - 1
        for row in expand(rows(hf_config, **options)):
            name = row.megatron
            if name.startswith("decoder.layers."):
                layer, rest = int(name.split(".")[2]), name.split(".", 3)[3]
                if layer not in layers:
                    continue
                name = f"decoder.layers.{layers.index(layer)}.{rest}"
            elif name.startswith(("decoder.final", "output_layer.")):
                if not last_chunk or (row.copy and parallel.first_stage):
                    continue
            elif not (first_chunk and number == 0):
                continue
            shape = row.split.shard_shape(row.shapes, parallel.tensor.size)
            tree.plant(name, nn.Parameter(torch.full(shape, torch.nan)))
        for index, layer in enumerate(layers):
            tree.decoder.layers._modules[str(index)].layer_number = layer + 1
        tree.decoder.layers.__class__ = ListOfTrees
        tree.hf_config = hf_config
        for key, value in options.items():
            setattr(tree, key, value)
        chunks.append(tree)
    return chunks


class ListOfTrees(Tree):
    def __getitem__(self, index: int) -> nn.Module:
        return self._modules[str(index)]


def round_trip(rank: int, directory: str, tensor: int, layers: list[list[list[int]]], options: dict) -> list[str]:
    parallel = axes(rank, tensor, len(layers))
    chunks = chunk_trees(read_hf_config(directory), parallel, layers[parallel.pipeline.rank], **options)
    load_hf(chunks, directory, parallel)
    source = Reader(directory, rename=hub_name)
    weights = list(iter_hf_weights(chunks, parallel))
    assert [name for name, _ in weights] == [name for name, _ in hf_metadata(chunks[0].hf_config)]
    assert all((weight is None) == (rank > 0) for _, weight in weights)
    return [name for name, weight in weights if rank == 0 and not torch.equal(weight, source[name])]


@pytest.mark.parametrize(
    ("tensor", "layers", "options"),
    [
        (1, [[[0], [2]], [[1], [3]]], {}),  # virtual pipeline: chunks interleave
        (2, [[[0, 1, 2]], [[3]]], {}),  # uneven stages
        (2, [[[0, 1, 2, 3]]], {"backend": "te"}),
        (4, [[[0, 1, 2, 3]]], {"vision_parallel": "tensor"}),
        (2, [[[0], [2]], [[1], [3]]], {"backend": "te", "vision_parallel": "tensor"}),
    ],
    ids=str,
)
def test_round_trip_is_bitwise_where_the_table_goes_beyond_the_present_model(tmp_path, tensor, layers, options):
    directory = build_published(tmp_path, tied=True, randomize_all=True)
    world = tensor * len(layers)
    assert run_ranks(round_trip, world, str(directory), tensor, layers, options) == [[]] * world


def disagreeing_model(rank: int, directory: str) -> tuple[str, bool]:
    """The two stages lack, misshape and add a parameter."""
    parallel = axes(rank, 1, 2)
    chunks = chunk_trees(read_hf_config(directory), parallel, [[0, 1]] if rank == 0 else [[2, 3]])
    if rank == 0:
        del chunks[0].vision.patch_embed.weight
        chunks[0].decoder.layers[1].mlp.linear_fc1.weight = nn.Parameter(torch.full((3, 3), torch.nan))
    else:
        chunks[0].plant("adapter.weight", nn.Parameter(torch.full((2,), torch.nan)))
    messages = []
    for attempt in (lambda: load_hf(chunks, directory, parallel), lambda: iter_hf_weights(chunks, parallel)):
        with pytest.raises(UserError) as raised:
            attempt()
        messages.append(str(raised.value))
    assert sorted(messages[0].splitlines()) == sorted(messages[1].splitlines())
    return messages[0], all(bool(parameter.isnan().all()) for parameter in own_parameters(chunks).values())


def test_a_model_that_disagrees_with_the_table_is_named_on_every_rank(tmp_path):
    directory = build_published(tmp_path)
    results = run_ranks(disagreeing_model, 2, str(directory))
    assert results[0] == results[1]
    message, untouched = results[0]
    assert untouched
    assert "1 rows of the table have no parameter on any stage: vision.patch_embed.weight" in message
    assert "decoder.layers.1.mlp.linear_fc1.weight (3, 3), expected (512, 128)" in message
    assert "1 parameters have no row in the table: adapter.weight" in message


def wrong_sizes(rank: int, directory: str) -> str:
    parallel = axes(rank, 3, 1)
    chunks = chunk_trees(read_hf_config(directory), Parallel(), [[0, 1, 2, 3]])
    with pytest.raises(UserError) as raised:
        load_hf(chunks, directory, parallel)
    return str(raised.value)


def test_a_tensor_parallel_size_that_does_not_divide_is_explained(tmp_path):
    directory = build_published(tmp_path)
    for message in run_ranks(wrong_sizes, 3, str(directory)):
        assert "decoder.layers.0.mlp.linear_fc1.weight (512 rows do not divide into 3 shards)" in message
