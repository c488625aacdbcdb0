"""Do both sides hold the same weights? A fingerprint of every tensor as sent, against what the engine computes with.

The engine side reads **back** what its kernels use, not what it received: vLLM fuses q, k, v and gate, up, and on a CPU repacks
every linear weight into an opaque oneDNN buffer and frees the original. A fused parameter is split; a repacked one is recovered by
multiplying the identity matrix through the layer: each output is one weight times 1 plus zeros, which is exact in fp32 and bf16
(only the sign of zero and subnormal numbers may be lost, so fingerprints treat all of these as 0).

Everything streams: one layer's weights are in memory at a time. Left out: engines that are themselves tensor parallel.
"""

from __future__ import annotations

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


@cache
def _multipliers(device: torch.device) -> Tensor:
    """int64 [_CHUNK]: pseudo-random odd numbers by position (splitmix64's finaliser), the key of a multilinear hash."""
    x = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return (x ^ (x >> 31)) | 1


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Hash of all bits of a floating-point tensor, on its own device; integer arithmetic, so the same everywhere.

    Sum of bits × odd multiplier modulo 2^64: one changed element always changes it, as odd numbers are invertible.
    """
    flat = tensor.detach().reshape(-1)
    integer = {4: torch.int32, 2: torch.int16}[flat.dtype.itemsize]
    smallest = torch.finfo(flat.dtype).tiny
    key = _multipliers(flat.device)
    digest, total = 0, 0.0
    for chunk in flat.split(_CHUNK):
        canonical = torch.where(chunk.abs() < smallest, torch.zeros((), dtype=chunk.dtype, device=chunk.device), chunk)
        part = (canonical.contiguous().view(integer).to(torch.int64) * key[: len(chunk)]).sum()
        digest = (digest * 0x9E3779B97F4A7C15 + int(part)) & _BITS
        total += float(canonical.sum(dtype=torch.float64))
    return Fingerprint(
        str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest, total / max(flat.numel(), 1)
    )


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
    """One Hugging Face tensor of a vLLM model, the parameter it is part of, and how to read back what the kernels use."""

    meta: TensorMeta
    parameter: str
    read: Callable[[], Tensor]


def engine_tensors(model: Any) -> Iterator[EngineTensor]:
    """Every weight of a vLLM model under hub names, fused parameters split. `model` is the worker's module, not sharded.

    A tied output layer appears as `lm_head.weight` of its own, because on a CPU its kernel holds a packed copy.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    packed: Mapping[str, Sequence[str]] = model.packed_modules_mapping
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = hub_name(f"{path}.{leaf}")
            if isinstance(module, VocabParallelEmbedding):
                shape = (module.org_vocab_size, module.embedding_dim)
                meta = TensorMeta(name, parameter.dtype, shape)
                yield EngineTensor(meta, f"{path}.{leaf}", partial(_read_vocabulary, module))
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
    return {tensor.parameter for tensor in engine_tensors(model) if tensor.meta.name in set(names)}


def engine_fingerprints(model: Any) -> dict[str, Fingerprint]:
    """Fingerprint of every weight a vLLM model computes with, by hub name."""
    with torch.no_grad():
        return {tensor.meta.name: fingerprint(tensor.read()) for tensor in engine_tensors(model)}


def _linear_tensors(module: Any, path: str, leaf: str, packed: Mapping[str, Sequence[str]]) -> Iterator[EngineTensor]:
    """The tensors of one linear layer; of a fused one, each its own rows.

    rows      0         256    320    384
    qkv_proj  | q_proj  | k_proj | v_proj |      output_partition_sizes [256, 64, 64]
    """
    parent, _, own = path.rpartition(".")
    parts = packed.get(own, [own])
    rows = [int(size) for size in getattr(module, "output_partition_sizes", [module.output_size])]
    if len(parts) == 1:
        rows = [sum(rows)]
    columns = (int(module.input_size),) if leaf == "weight" else ()
    # Some CPU kernels keep the bias in fp32; its values are still those of the model's dtype.
    dtype = module.weight.dtype
    whole = cache(partial(_read_linear, module, leaf, dtype))  # q, k and v share one pass; freed with the last of them
    first = 0
    for part, size in zip(parts, rows, strict=True):
        name = hub_name(f"{parent}.{part}.{leaf}")
        meta = TensorMeta(name, dtype, (size, *columns))
        yield EngineTensor(meta, f"{path}.{leaf}", partial(_rows_of, whole, first, size))
        first += size


def _rows_of(whole: Callable[[], Tensor], first: int, size: int) -> Tensor:
    return whole()[first : first + size]


def _read_linear(module: Any, leaf: str, dtype: torch.dtype) -> Tensor:
    if leaf != "weight" or not hasattr(module, "cpu_linear"):
        return getattr(module, leaf).detach().to(dtype)
    return _through_identity(module, int(module.input_size), dtype)


def _read_vocabulary(module: Any) -> Tensor:
    """The rows of real tokens. An output layer multiplies by its packed copy, an embedding reads the table itself."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    whole: Tensor = module.weight
    if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
        return _through_identity(module, module.embedding_dim, whole.dtype)[: module.org_vocab_size]
    return whole.detach()[: module.org_vocab_size]


def _through_identity(module: Any, columns: int, dtype: torch.dtype, rows_at_once: int = 1024) -> Tensor:
    """[outputs, columns]: the weight the CPU kernel multiplies by, exactly, from what it does to unit vectors."""
    pieces = []
    for first in range(0, columns, rows_at_once):
        last = min(first + rows_at_once, columns)
        units = torch.zeros(last - first, columns, dtype=dtype)
        units[torch.arange(last - first), torch.arange(first, last)] = 1
        pieces.append(module.cpu_linear(units, module.weight, None))
    return torch.cat(pieces).t()
