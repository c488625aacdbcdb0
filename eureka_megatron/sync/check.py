"""Do both sides hold the same weights? A fingerprint of every tensor as sent, against what the engine computes with.

The engine side reads **back** what its kernels use, not what it received: vLLM fuses q, k, v and gate, up, and on a CPU repacks
every linear weight into an opaque oneDNN buffer and frees the original. A fused parameter is split; a repacked one is recovered by
multiplying the identity matrix through the layer: each output is one weight times 1 plus zeros, which is exact in fp32 and bf16
(only the sign of zero and subnormal numbers may be lost, so fingerprints treat all of these as 0).

A worker of a tensor-parallel engine fingerprints its own shards, as `Piece`s; `combine` makes those of whole tensors from all workers' pieces, so
no weight travels for a comparison. The fingerprint is a sum over elements, each weighed by its position in the whole tensor:

    mlp.down_proj [3, 4] over two workers, an element's position in each cell          v_proj [2, 2], one kv head for both

    worker 0 | 0  1 |  worker 1 | 2  3 |     digest = sum of bits(p) × weight(p)       worker 0 | 0  1 |  worker 1 | 0  1 |
             | 4  5 |           | 6  7 |            = digest(worker 0)                          | 2  3 |           | 2  3 |
             | 8  9 |           |10 11 |            + digest(worker 1)   modulo 2^64   copies must agree, and count once

Everything streams: one layer's weights are in memory at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from eureka_megatron.sync.source import SyncError, TensorMeta
from eureka_megatron.weights.table import hub_name

_CHUNK = 1 << 20  # elements hashed at a time: 8 MiB of int64
_CHUNK_FACTOR = 0x9E3779B97F4A7C15  # odd
_BITS = (1 << 64) - 1
_LISTED = 8  # names shown in an error


@dataclass(frozen=True)
class Fingerprint:
    """Example: Fingerprint(dtype="float32", shape=(128,), digest=0x3f…, mean=0.012): equal iff the tensors are equal."""

    dtype: str
    shape: tuple[int, ...]
    digest: int  # 64 bits; any single changed element changes it, permutations too
    mean: float  # for the reader of an error, not compared

    def same(self, other: Fingerprint) -> bool:
        return (self.dtype, self.shape, self.digest) == (other.dtype, other.shape, other.digest)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} {self.digest:016x} (mean {self.mean:.6g})"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that one worker holds. Example: Piece("lm_head.weight", "float32", (400, 128), (200, 0), (200, 128), 0x3f…, 1.7)."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    place: tuple[int, int]  # first row and first column in it, all dimensions but the first taken as one
    size: tuple[int, int]
    digest: int  # of the elements here, by their positions in the whole tensor; these add up
    total: float  # sum of the elements


@cache
def _multipliers(device: torch.device) -> Tensor:
    """int64 [_CHUNK]: pseudo-random odd numbers by position (splitmix64's finaliser), the key of a multilinear hash."""
    x = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1


def _weights(first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count]: odd numbers of the positions from `first` on: key[p mod _CHUNK] × _CHUNK_FACTOR^(p div _CHUNK)."""
    parts = []
    while count:
        chunk, start = divmod(first, _CHUNK)
        size = min(count, _CHUNK - start)
        factor = pow(_CHUNK_FACTOR, chunk, 1 << 64)
        parts.append(_multipliers(device)[start : start + size] * (factor - ((factor >> 63) << 64)))  # as int64 has it
        first, count = first + size, count - size
    return torch.cat(parts)


def piece(meta: TensorMeta, values: Tensor, place: tuple[int, int] = (0, 0)) -> Piece:
    """Hash of all bits of a floating-point tensor, or of its part at `place`; on its own device, in integers, so the same everywhere.

    Sum of bits × odd multiplier modulo 2^64: one changed element always changes it, as odd numbers are invertible.
    """
    matrix = values.detach().reshape(len(values), -1) if values.numel() else values.new_empty(0, 1)
    size = (len(values), matrix.shape[1])
    (row, column), width = place, math.prod(meta.shape[1:])
    if matrix.shape[1] == width:  # whole rows: consecutive positions
        matrix, row, width = matrix.reshape(-1, 1), row * width, 1
    integer = {4: torch.int32, 2: torch.int16}[values.dtype.itemsize]
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    smallest = torch.finfo(values.dtype).tiny
    digest = torch.zeros((), dtype=torch.int64, device=values.device)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for rows in matrix.split(max(1, _CHUNK // width)):
        weights = _weights(row * width, len(rows) * width, values.device).view(len(rows), width)
        canonical = torch.where(rows.abs() < smallest, zero, rows).contiguous()
        digest += (canonical.view(integer).to(torch.int64) * weights[:, column : column + rows.shape[1]]).sum()
        total += canonical.sum(dtype=torch.float64)
        row += len(rows)
    dtype = str(values.dtype).removeprefix("torch.")
    return Piece(meta.name, dtype, tuple(meta.shape), place, size, int(digest) & _BITS, float(total))


def combine(parts: Iterable[Sequence[Piece]]) -> dict[str, Fingerprint]:
    """Fingerprints of whole tensors, by name, from the pieces that every worker holds.

    Raises SyncError naming tensors of which several workers hold the same part, but not with the same values.
    """
    found: dict[str, dict[Any, Piece]] = {}
    differing = set()
    for part in (part for parts_of_one in parts for part in parts_of_one):
        first = found.setdefault(part.name, {}).setdefault((part.place, part.size), part)
        if first.digest != part.digest:
            differing.add(part.name)
    if problems := tally(differing, "are not the same in all workers of the engine that hold a copy of them"):
        raise SyncError(problems[0])
    whole = {}
    for name, pieces in found.items():
        one = next(iter(pieces.values()))
        digest = sum(part.digest for part in pieces.values()) & _BITS
        mean = sum(part.total for part in pieces.values()) / max(math.prod(one.shape), 1)
        whole[name] = Fingerprint(one.dtype, one.shape, digest, mean)
    return whole


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Of a whole tensor, see `piece`."""
    return combine([[piece(TensorMeta("", tensor.dtype, tuple(tensor.shape)), tensor)]])[""]


def fingerprints(weights: Iterable[tuple[str, Tensor | None]]) -> dict[str, Fingerprint]:
    """Of a stream such as MegatronWeightSource, under hub names. Ranks that yield None only keep step."""
    return {hub_name(name): fingerprint(tensor) for name, tensor in weights if tensor is not None}


def compare(sent: Mapping[str, Fingerprint], engine: Mapping[str, Fingerprint], where: str = "rollout engine") -> None:
    """Raise SyncError naming the tensors that differ, with both values; missing and extra tensors too.

    A tied output layer is compared when the engine has its own copy of it, though it is not sent.
    """
    expected = dict(sent)
    if "lm_head.weight" in engine and "model.embed_tokens.weight" in sent:
        expected.setdefault("lm_head.weight", sent["model.embed_tokens.weight"])
    problems = tally(expected.keys() - engine.keys(), f"are not in the {where}")
    problems += tally(engine.keys() - expected.keys(), f"of the {where} were never sent")
    wrong = [name for name in sorted(expected.keys() & engine.keys()) if not expected[name].same(engine[name])]
    if wrong:
        shown = "; ".join(f"{name}: sent {expected[name]}, engine {engine[name]}" for name in wrong[:_LISTED])
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        problems.append(f"{len(wrong)} of {len(expected)} tensors differ in the {where}: {shown}{more}")
    if problems:
        raise SyncError(". ".join(problems))


def check_announced(
    announced: Sequence[TensorMeta], expected: Mapping[str, TensorMeta], unchanged: Sequence[str] = ()
) -> None:
    """Before anything is loaded: the announced tensors and the unchanged ones are exactly those the engine computes with.

    Raises SyncError naming missing, unexpected and repeated tensors, and wrong shapes or dtypes with both values.
    """
    named = {hub_name(meta.name): meta for meta in announced}
    times = Counter(map(hub_name, [*(meta.name for meta in announced), *unchanged]))
    problems = tally(expected.keys() - times.keys(), "are missing")
    problems += tally(
        times.keys() - expected.keys() - {"lm_head.weight"}, "are unexpected"
    )  # tied: a copy may come along
    problems += tally({name for name, count in times.items() if count > 1}, "come twice")
    for name in sorted(expected.keys() & named.keys()):
        found, right = named[name], expected[name]
        if (tuple(found.shape), found.dtype) != (right.shape, right.dtype):
            problems.append(
                f"{name} comes as {found.dtype} {list(found.shape)}, the engine has {right.dtype} {list(right.shape)}"
            )
    if problems:
        shown = "; ".join(problems[:_LISTED])
        raise SyncError(f"weight update refused, nothing was loaded: {shown}")


def tally(names: Set[str], verdict: str) -> list[str]:
    """One line about these tensors, none when there are none. Example: "2 tensors are missing: a, b"."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{len(names)} tensors {verdict}: {', '.join(sorted(names)[:_LISTED])}{more}"] if names else []


# ---- the engine's side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineTensor:
    """One Hugging Face tensor of a vLLM model or a part of it, the parameter that holds it, and how to read back what the kernels use."""

    meta: TensorMeta  # of the whole tensor
    parameter: str
    read: Callable[[], Tensor]
    place: tuple[int, int] = (0, 0)  # first row and column in the whole tensor


def engine_tensors(model: Any) -> Iterator[EngineTensor]:
    """Every weight of a vLLM model under hub names, fused parameters split. `model` is the worker's module.

    A tied output layer appears as `lm_head.weight` of its own, because on a CPU its kernel holds a packed copy.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    packed: Mapping[str, Sequence[str]] = model.packed_modules_mapping
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = hub_name(f"{path}.{leaf}")
            if isinstance(module, VocabParallelEmbedding):
                meta = TensorMeta(name, parameter.dtype, (module.org_vocab_size, module.embedding_dim))
                first = module.shard_indices.org_vocab_start_index
                yield EngineTensor(meta, f"{path}.{leaf}", partial(_read_vocabulary, module), (first, 0))
            elif isinstance(module, LinearBase):
                yield from _linear_tensors(module, path, leaf, packed)
            else:
                meta = TensorMeta(name, parameter.dtype, tuple(parameter.shape))
                yield EngineTensor(meta, f"{path}.{leaf}", parameter.detach)


def expected_tensors(model: Any) -> dict[str, TensorMeta]:
    """What an update must bring, by hub name: everything the engine computes with, a tied output layer once."""
    found = {tensor.meta.name: tensor.meta for tensor in engine_tensors(model)}
    if has_tied_head(model):
        found.pop("lm_head.weight", None)
    return found


def has_tied_head(model: Any) -> bool:
    """Whether a vLLM model's output layer is its embedding: asked of the modules, for where configurations say it depends on their form."""
    language = model.language_model
    return language.lm_head.weight is language.model.embed_tokens.weight


def parameters_of(model: Any, names: Sequence[str]) -> set[str]:
    """The engine's own names of the parameters that hold these tensors (hub names)."""
    wanted = {*names}
    return {tensor.parameter for tensor in engine_tensors(model) if tensor.meta.name in wanted} if wanted else set()


def engine_pieces(model: Any) -> list[Piece]:
    """Of every weight that a worker computes with."""
    with torch.no_grad():
        return [piece(tensor.meta, tensor.read(), tensor.place) for tensor in engine_tensors(model)]


def _linear_tensors(module: Any, path: str, leaf: str, packed: Mapping[str, Sequence[str]]) -> Iterator[EngineTensor]:
    """The tensors of one linear layer that a worker holds, or its parts of them.

    Fused, with heads of 32, on one worker of one, and on worker 1 of two:

    rows      0         256    320    384          0          128      160      192
    qkv_proj  | q_proj  | k_proj | v_proj |        | q 128-255 | k 32-63 | v 32-63 |       a tensor each
    qkv       | 0-255   | 256-319 | 320-383 |      | 128-255   | 288-319 | 352-383 |       parts of one tensor
    """
    from vllm.model_executor.layers.linear import RowParallelLinear

    parent, _, own = path.rpartition(".")
    parts = packed.get(own, [own])
    blocks = _blocks(module)
    # Some CPU kernels keep the bias in fp32; its values are still those of the model's dtype.
    dtype = module.weight.dtype
    columns = (int(module.input_size),) if leaf == "weight" else ()
    by_columns = leaf == "weight" and isinstance(module, RowParallelLinear)
    column = int(module.tp_rank * module.input_size_per_partition) if by_columns else 0
    local = cache(partial(_read_linear, module, leaf, dtype))  # q, k and v share one pass; freed with the last of them
    own_row = whole_row = 0
    for number, (size, first, whole) in enumerate(blocks):
        rows, start = whole, first
        if len(parts) == 1:
            rows, start = sum(block[2] for block in blocks), whole_row + first
        name = hub_name(f"{parent}.{parts[number if len(parts) > 1 else 0]}.{leaf}")
        meta = TensorMeta(name, dtype, (rows, *columns))
        yield EngineTensor(meta, f"{path}.{leaf}", partial(_rows_of, local, own_row, size), (start, column))
        own_row, whole_row = own_row + size, whole_row + whole


def _blocks(module: Any) -> list[tuple[int, int, int]]:
    """Of every matrix fused into a linear layer: its rows here, the first of them in the whole matrix, the rows of that."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

    sizes = [int(size) for size in getattr(module, "output_partition_sizes", [module.output_size])]
    if not isinstance(module, ColumnParallelLinear):
        return [(size, 0, size) for size in sizes]
    # Fewer key and value heads than workers: several workers hold the same one.
    copies = [1, *[int(module.num_kv_head_replicas)] * 2] if isinstance(module, QKVParallelLinear) else [1] * len(sizes)
    return [
        (size, module.tp_rank // copy * size, module.tp_size // copy * size)
        for size, copy in zip(sizes, copies, strict=True)
    ]


def _rows_of(local: Callable[[], Tensor], first: int, size: int) -> Tensor:
    return local()[first : first + size]


def _read_linear(module: Any, leaf: str, dtype: torch.dtype) -> Tensor:
    if leaf != "weight" or not hasattr(module, "cpu_linear"):
        return getattr(module, leaf).detach().to(dtype)
    return _through_identity(module, int(getattr(module, "input_size_per_partition", module.input_size)), dtype)


def _read_vocabulary(module: Any) -> Tensor:
    """The rows of real tokens here. An output layer multiplies by its packed copy, an embedding reads the table itself."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    local: Tensor = module.weight
    if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
        local = _through_identity(module, module.embedding_dim, local.dtype)
    return local.detach()[: module.shard_indices.num_org_elements]


def _through_identity(module: Any, columns: int, dtype: torch.dtype, rows_at_once: int = 1024) -> Tensor:
    """[outputs, columns]: the weight the CPU kernel multiplies by, exactly, from what it does to unit vectors."""
    pieces = []
    for first in range(0, columns, rows_at_once):
        last = min(first + rows_at_once, columns)
        units = torch.zeros(last - first, columns, dtype=dtype)
        units[torch.arange(last - first), torch.arange(first, last)] = 1
        pieces.append(module.cpu_linear(units, module.weight, None))
    return torch.cat(pieces).t()
