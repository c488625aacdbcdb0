"""Weights between Hugging Face checkpoints and the Megatron chunks of this rank, through THE TABLE, one tensor at a time.

`load_hf` reads the slices that this rank holds. `iter_hf_weights` goes the other way: shards are gathered over pipeline and
tensor ranks and come out as full HF tensors; HF export and online sync both are consumers of it.

What a model must offer: parameter names of the table (layers counted from 0 in each chunk, `decoder.layers[i].layer_number`
says which layer of the model it is, from 1), `hf_config`, and, where they differ from "local" and "replicated", the
attributes `backend` and `vision_parallel`. Wrappers (DDP, Float16Module) are looked through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eureka_megatron.errors import UserError
from eureka_megatron.models.qwen2_5_vl.config import read_hf_config
from eureka_megatron.parallel.runtime import Parallel
from eureka_megatron.weights.hf_files import Reader
from eureka_megatron.weights.splits import ByRows
from eureka_megatron.weights.table import Row, expand, hub_name, rows
from eureka_megatron.weights.torch_dist import DistReader
from eureka_megatron.weights.torch_dist_metadata import METADATA_FILE

Select = Callable[[nn.Parameter], Tensor]

READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_hf(
    model_chunks: Sequence[nn.Module], hf_dir: str | Path, parallel: Parallel, *, allow_narrowing: bool = False
) -> None:
    """Fills all parameters of this rank from an HF directory in either naming, or a converted one. Collective.

    Names, shapes and dtypes of everything are compared first, on all ranks; nothing is written when anything is wrong.
    Widening casts (bfloat16 into float32) are exact and always made, others only with `allow_narrowing`.

    Raises:
        UserError: on every rank alike, listing all missing, unexpected and mismatched tensors.
    """
    table = table_of(model_chunks)
    parameters = own_parameters(model_chunks)
    problems = check_model(parameters, table, parallel)
    reader: Reader | DistReader | None = None
    try:
        read_hf_config(hf_dir)  # names another architecture before its tensors are missed one by one
        reader = open_checkpoint(hf_dir)
        problems += check_hf(reader, table)
        problems += check_spare_head(reader, table, parallel)
        if not problems and not allow_narrowing:
            problems += _check_casts(reader, table, parameters)
    except UserError as error:
        problems.append(str(error))
    raise_together(problems, parallel)
    assert reader is not None
    for name, parameter in parameters.items():
        row = table[name]
        row.split.fill(parameter.data, [reader[hf] for hf in row.hf], parallel.tensor.rank, parallel.tensor.size)


def iter_hf_weights(
    model_chunks: Sequence[nn.Module],
    parallel: Parallel,
    *,
    select: Select | None = None,
    dtype: torch.dtype | None = None,
    skip: Container[str] = (),
) -> Iterator[tuple[str, Tensor | None]]:
    """(HF name, full tensor) of every weight, in table order. Collective, from the call on and in lockstep.

    Every rank of a model replica iterates to the end; each replica (data or context parallel) is independent, so it is
    enough that the first does it. Tensor rank 0 of the first stage gets new tensors on its device, the others None; at most one row of
    the table is held.

    Guaranteed, so that nobody need look again: exactly the names of `tensors_of(table, skip)`, in that order, each once, with those
    shapes. The model is compared with the table at the call, before the first tensor; shapes are the table's by construction.

    Args:
        select: what of a parameter is exported, of the parameter's shape: `lambda p: p.main_grad` exports gradients. It is
            called twice (the first time for the dtype). Tied embeddings come from the embedding's own copy.
        dtype: cast before sending.
        skip: Megatron names that are left out, equal on all ranks.

    Raises:
        UserError: on every rank of the pipeline alike: parameters and table disagree.
    """
    table = table_of(model_chunks)
    parameters = own_parameters(model_chunks)
    raise_together(check_model(parameters, table, parallel), parallel, parallel.pipeline.group)

    def chosen(parameter: nn.Parameter) -> Tensor:
        return (select(parameter) if select else parameter).detach()

    mine = {name: dtype or chosen(parameter).dtype for name, parameter in parameters.items() if name not in skip}
    owners = {
        name: (stage, kind)
        for stage, owned in enumerate(_gather_objects(mine, parallel.pipeline.group))
        for name, kind in owned.items()
    }

    def weights() -> Iterator[tuple[str, Tensor | None]]:
        for row in table.values():
            if row.copy or row.megatron in skip:
                continue
            stage, kind = owners[row.megatron]
            parameter = parameters.get(row.megatron)
            shard = None if parameter is None else chosen(parameter).to(kind)
            shards = _collect(row, shard, stage, kind, parallel)
            merged = [None] * len(row.hf) if shards is None else row.split.merge(shards, row.shapes)
            del shard, shards
            yield from zip(row.hf, merged, strict=True)

    return weights()


def sharded_state(model_chunks: Sequence[nn.Module], parallel: Parallel) -> dict[str, Any]:
    """Megatron's sharded state dict of this rank, for megatron.core.dist_checkpointing; several chunks as model0, model1, …

    The replicated vision tower believes to be alone on its tensor rank; here every copy but the first becomes a replica, so
    that it is written once.
    """
    whole = getattr(unwrap(model_chunks[0]), "vision_parallel", "replicated") != "tensor"
    states = [unwrap(chunk).sharded_state_dict() for chunk in model_chunks]
    for state in states:
        for entry in state.values() if whole else ():
            if entry.key.startswith("vision."):
                replica = parallel.data.rank * parallel.context.size + parallel.context.rank
                entry.replica_id = (entry.replica_id[0], parallel.tensor.rank, replica)
    return states[0] if len(states) == 1 else {f"model{number}": state for number, state in enumerate(states)}


# --- the two sides compared with the table ---


def patterns_of(model_chunks: Sequence[nn.Module]) -> tuple[Row, ...]:
    """The table for the model these chunks belong to."""
    model = unwrap(model_chunks[0])
    return rows(
        model.hf_config,
        backend=getattr(model, "backend", "local"),
        vision_parallel=getattr(model, "vision_parallel", "replicated"),
    )


def table_of(model_chunks: Sequence[nn.Module]) -> dict[str, Row]:
    """Megatron name → row without patterns, in table order."""
    return {row.megatron: row for row in expand(patterns_of(model_chunks))}


def unwrap(chunk: nn.Module) -> Any:
    """The model inside DistributedDataParallel and Float16Module, with the attributes that are named above."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def own_parameters(model_chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters of this rank by the name they have in the whole model: text layers counted over all stages."""
    parameters = {}
    for chunk in map(unwrap, model_chunks):
        for local, parameter in chunk.named_parameters():
            name = local
            if match := re.match(r"decoder\.layers\.(\d+)\.", local):
                layer = chunk.decoder.layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{layer}.{local[match.end() :]}"
            assert name not in parameters, f"{name} stands in two chunks of one rank"
            parameters[name] = parameter
    return parameters


def check_model(parameters: dict[str, nn.Parameter], table: dict[str, Row], parallel: Parallel) -> list[str]:
    """What is wrong between the model and the table, for the whole pipeline. Collective over the pipeline."""
    n = parallel.tensor.size
    problems = _listing("parameters have no row in the table", [name for name in parameters if name not in table])
    wrong = []
    for name in parameters.keys() & table.keys():
        found, expected = tuple(parameters[name].shape), None
        try:
            expected = table[name].split.shard_shape(table[name].shapes, n)
        except UserError as error:
            wrong.append(f"{name} ({error})")
        if expected and found != expected:
            wrong.append(f"{name} {found}, expected {expected}")
    problems += _listing(f"parameters have a wrong shape at tensor-parallel size {n}", sorted(wrong))
    existing = set().union(*_gather_objects(set(parameters), parallel.pipeline.group))
    absent = [name for name, row in table.items() if name not in existing and not row.copy]
    return problems + _listing("rows of the table have no parameter on any stage", absent)


def open_checkpoint(directory: str | Path) -> Reader | DistReader:
    """The HF tensors, under hub names, of an HF directory or of one that was converted to Megatron's format."""
    if (Path(directory) / METADATA_FILE).is_file():
        return DistReader(directory, read_hf_config(directory))
    return Reader(directory, rename=hub_name)


def check_hf(reader: Reader | DistReader, table: dict[str, Row]) -> list[str]:
    """What is wrong between a checkpoint and the table: all missing, unexpected, misshapen and unreadable tensors."""
    expected = {name: shape for row in table.values() for name, shape in row.hf.items()}
    known, found = {*expected, *_spare_head(table)}, reader.tensors

    def said(name: str) -> str:
        return f"{found[name].name} ({found[name].file.name})"

    missing = [name for name in expected if name not in found]
    # Rotary frequencies, which transformers once saved, follow from the configuration; vLLM passes them over too.
    unexpected = [said(name) for name in found if name not in known and not name.endswith(".inv_freq")]
    present = [name for name in expected if name in found]
    shapes = [
        f"{said(name)} is {found[name].shape}, expected {expected[name]}"
        for name in present
        if found[name].shape != expected[name]
    ]
    dtypes = [f"{said(name)} is {found[name].dtype}" for name in present if found[name].dtype not in READABLE]
    problems = _listing("tensors are missing", missing)
    problems += _listing("tensors have no place in this model", unexpected)
    problems += _listing("tensors have a wrong shape", shapes)
    problems += _listing("tensors have a dtype that cannot be loaded", dtypes)
    return [f"{reader.directory}: {problem}" for problem in problems]


def _spare_head(table: dict[str, Row]) -> tuple[str, ...]:
    """Some tied checkpoints store the output layer once more; it may stand there if it equals the embedding."""
    tied = any(row.copy for row in table.values())
    return ("lm_head.weight",) if tied else ()


def check_spare_head(reader: Reader | DistReader, table: dict[str, Row], parallel: Parallel) -> list[str]:
    """What is wrong with a tied checkpoint's output layer; each tensor rank compares its own rows."""
    problems = []
    for name in _spare_head(table):
        if name in reader and parallel.first_stage and "model.embed_tokens.weight" in reader:
            pair = [reader[name], reader["model.embed_tokens.weight"]]
            shards = [ByRows().cut([tensor], parallel.tensor.rank, parallel.tensor.size) for tensor in pair]
            if not torch.equal(*shards):
                problems.append(f"{reader.directory}: {name} differs from the embedding it should be tied to")
    return problems


def _check_casts(reader: Reader | DistReader, table: dict[str, Row], parameters: dict[str, nn.Parameter]) -> list[str]:
    lossy = [
        f"{hf} is {reader.tensors[hf].dtype}, the parameter {parameter.dtype}"
        for name, parameter in parameters.items()
        for hf in table[name].hf
        if torch.promote_types(reader.tensors[hf].dtype, parameter.dtype) != parameter.dtype
    ]
    problems = _listing("tensors would lose precision (allow_narrowing=True permits it)", lossy)
    return [f"{reader.directory}: {problem}" for problem in problems]


def _listing(what: str, items: Sequence[str]) -> list[str]:
    return [f"{len(items)} {what}: {', '.join(items)}"] if items else []


# --- communication ---


def raise_together(problems: list[str], parallel: Parallel, group: dist.ProcessGroup | None = None) -> None:
    """Raises the same UserError on all ranks of `group` (default: all) when any of them has a problem. Collective.

    A rank that raised alone would leave the others waiting in the next collective.
    """
    everywhere = _gather_objects(problems, group or parallel.world.group)
    distinct = dict.fromkeys(problem for found in everywhere for problem in found)
    if distinct:
        raise UserError("\n".join(distinct))


def _gather_objects(value: object, group: dist.ProcessGroup | None) -> list:
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _collect(row: Row, shard: Tensor | None, stage: int, dtype: torch.dtype, parallel: Parallel) -> list[Tensor] | None:
    """All different shards of a parameter of `stage`, on tensor rank 0 of the first stage; None on the others."""
    tensor, pipeline = parallel.tensor, parallel.pipeline
    n = row.split.shards(tensor.size)
    if n == 1 and tensor.rank > 0:  # replicated: tensor rank 0 has it all
        return None
    shape = row.split.shard_shape(row.shapes, tensor.size)
    if stage > 0 and pipeline.rank == stage:
        assert shard is not None
        dist.send(_as_bytes(shard), group=pipeline.group, group_dst=0)
    if pipeline.rank > 0:
        return None
    if stage > 0:
        data = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8, device=parallel.device)
        dist.recv(data, group=pipeline.group, group_src=stage)
        shard = data.view(dtype).view(shape)
    assert shard is not None
    if n == 1:
        return [shard]
    data = _as_bytes(shard)
    parts = [torch.empty_like(data) for _ in range(n)] if tensor.rank == 0 else None
    dist.gather(data, parts, group=tensor.group, group_dst=0)
    return parts and [part.view(dtype).view(shape) for part in parts]


def _as_bytes(tensor: Tensor) -> Tensor:
    """Flat bytes: every backend moves them, whatever the dtype, and bit for bit."""
    return tensor.contiguous().flatten().view(torch.uint8)
