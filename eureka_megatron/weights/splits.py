"""How the tensors of a Hugging Face checkpoint become the shards of a Megatron parameter, and back, exactly.

A split says one thing: which rows of which HF tensor stand where in the Megatron tensor (`spans`), and along which axis tensor
parallelism cuts it. From that, `copies` derives the rectangular copies that make shard r of n; `cut` runs them one way and `merge`
the other way, so there is no second description that could disagree with the first. Gated linears of 4 rows, n = 2:

    gate  g0 g1 g2 g3      shard 0   g0 g1 u0 u1      copies of shard 1   gate[2:4] ↔ shard[0:2]
    up    u0 u1 u2 u3      shard 1   g2 g3 u2 u3                          up[2:4]   ↔ shard[2:4]

Tensors of more than two axes are seen as matrices [first, rest]. Left out: process groups, names, files. Sources may be anything that
slices like a tensor (a memory-mapped file).

Legend: n shards (tensor-parallel size), r index of a shard, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from eureka_megatron.errors import UserError

Shape = tuple[int, ...]


class Source(Protocol):
    """What slices like a tensor; `view` makes a matrix of it."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def view(self, rows: int, columns: int, /) -> Any: ...
    def __getitem__(self, index: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Span:
    """Rows start … stop-1 of HF tensor number `source`."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Copy:
    """`rows` rows of HF tensor number `source` from `start` on ↔ rows of a shard from `at` on; `columns` are of the HF tensor."""

    source: int
    start: int
    rows: int
    at: int
    columns: tuple[slice, ...] = ()

    def clip(self, start: int, stop: int) -> Copy:
        """The part within rows start … stop-1 of the HF tensor; with 0 rows or less it is nothing."""
        begin, end = max(self.start, start), min(self.start + self.rows, stop)
        return Copy(self.source, begin, end - begin, self.at + begin - self.start, self.columns)

    @property
    def at_source(self) -> tuple[slice, ...]:
        return (slice(self.start, self.start + self.rows), *self.columns)

    @property
    def at_shard(self) -> slice:
        return slice(self.at, self.at + self.rows)


@dataclass(frozen=True)
class Run:
    """Rows row … row+rows-1 of a shard stand from `whole_row` and `column` on in the tensor that one rank alone would hold."""

    row: int
    whole_row: int
    rows: int
    column: int


def matrix_shape(shape: Shape) -> Shape:
    """A convolution over whole patches is a linear map: HF [out, c, t, h, w] → Megatron [out, c·t·h·w]."""
    return (shape[0], prod(shape[1:])) if len(shape) > 2 else shape


@dataclass(frozen=True)
class Split:
    """The common part: everything follows from `spans` and `axis`.

    Invariants (each has a test): the spans of n shards cover every row of every HF tensor once;
    `merge([cut(hf, r, n) for r in range(n)]) == hf`, bitwise, for every n that divides.
    """

    axis = 0  # of the Megatron tensor, the one that tensor parallelism cuts

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        """The HF rows in the order in which the Megatron tensor of n concatenated shards has them."""
        return [Span(source, 0, count) for source, count in enumerate(rows)]

    def shards(self, n: int) -> int:
        """How many different shards n tensor-parallel ranks hold: n, or 1 when all hold the same."""
        return n

    def shard_shape(self, shapes: Sequence[Shape], n: int) -> Shape:
        """Shape of each of n shards, from the HF shapes. UserError when the axis does not divide by n."""
        full = [sum(shape[0] for shape in shapes), *matrix_shape(shapes[0])[1:]]
        if full[self.axis] % n:
            raise UserError(f"{full[self.axis]} {'columns' if self.axis else 'rows'} do not divide into {n} shards")
        full[self.axis] //= n
        return tuple(full)

    def copies(self, shapes: Sequence[Shape], r: int, n: int) -> Iterator[Copy]:
        """The copies that make shard r of n; inverted, the copies that take it apart."""
        shape = self.shard_shape(shapes, n)
        mine = slice(r * shape[self.axis], (r + 1) * shape[self.axis])
        columns = (mine,) if self.axis == 1 else ()
        at = 0 if self.axis == 1 else -mine.start  # row of the shard where the span begins
        for span in self.spans([shape[0] for shape in shapes], n):
            first = span.start - at  # the row of the HF tensor that would stand in the shard's first
            copy = Copy(span.source, span.start, span.stop - span.start, at, columns).clip(first, first + shape[0])
            if copy.rows > 0:
                yield copy
            at += span.stop - span.start

    def fill(self, block: Tensor, sources: Sequence[Source], r: int = 0, n: int = 1, start: int = 0) -> None:
        """Writes rows start, start+1, … of shard r of n into `block`, casting to its dtype; reads only the slices it needs."""
        for whole in self.copies([tuple(source.shape) for source in sources], r, n):
            first = whole.start + start - whole.at
            copy = whole.clip(first, first + len(block))
            if copy.rows > 0:
                at = copy.at - start
                block[at : at + copy.rows].copy_(_matrix(sources[copy.source])[copy.at_source])

    def runs(self, shapes: Sequence[Shape], r: int, n: int) -> list[Run]:
        """Where the rows of shard r of n stand in the tensor that one rank alone would hold; in the shard's order.

        Above: shard 1 of 2 is rows g2 g3 u2 u3 of g0 g1 g2 g3 u0 u1 u2 u3 → [Run(0, 2, 2, 0), Run(2, 6, 2, 0)].
        """
        found: list[Run] = []
        whole = list(self.copies(shapes, 0, 1))
        for copy in self.copies(shapes, r, n):
            column = copy.columns[0].start if copy.columns else 0
            for other in whole:
                common = other.clip(copy.start, copy.start + copy.rows)
                if other.source == copy.source and common.rows > 0:
                    found.append(Run(copy.at + common.start - copy.start, common.at, common.rows, column))
        joined: list[Run] = []
        for run in sorted(found, key=lambda run: run.row):
            last = joined[-1] if joined else None
            if last and (last.row + last.rows, last.whole_row + last.rows) == (run.row, run.whole_row):
                joined[-1] = Run(last.row, last.whole_row, last.rows + run.rows, last.column)
            else:
                joined.append(run)
        return joined

    def cut(self, sources: Sequence[Source], r: int, n: int) -> Tensor:
        """Shard r of n of the Megatron parameter, as a new tensor."""
        shard = torch.empty(self.shard_shape([tuple(s.shape) for s in sources], n), dtype=sources[0].dtype)
        self.fill(shard, sources, r, n)
        return shard

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The HF tensors of these shapes from all `shards(n)` different shards; always new tensors."""
        merged = [shards[0].new_empty(shape) for shape in shapes]
        for r, shard in enumerate(shards):
            for copy in self.copies(shapes, r, len(shards)):
                _matrix(merged[copy.source])[copy.at_source] = shard[copy.at_shard]
        return merged


def _matrix(tensor: Source) -> Any:
    """The HF tensor with as many axes as the Megatron parameter has; always a view."""
    return tensor.view(tensor.shape[0], -1) if len(tensor.shape) > 2 else tensor


@dataclass(frozen=True)
class ByRows(Split):
    """Cut along rows as they stand: column-parallel linears, embeddings."""


@dataclass(frozen=True)
class ByColumns(Split):
    """Cut along the input axis: weights of row-parallel linears."""

    axis = 1


@dataclass(frozen=True)
class FusedQKV(Split):
    """q, k, v → linear_qkv: for each kv head its query heads, then its key, then its value.

    Sources: q [heads·head_dim, H], k and v [kv_heads·head_dim, H], or the biases. With fewer kv heads than shards the
    interleaved rows are still cut plainly; Megatron gathers the activations.
    """

    heads: int
    kv_heads: int
    head_dim: int

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        queries = self.heads // self.kv_heads * self.head_dim
        widths = (queries, self.head_dim, self.head_dim)
        return [
            Span(source, group * width, (group + 1) * width)
            for group in range(self.kv_heads)
            for source, width in enumerate(widths)
        ]


@dataclass(frozen=True)
class VisionQKV(Split):
    """One HF tensor [q; k; v] of the vision tower → linear_qkv: for each head q, k, v."""

    heads: int

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        third = rows[0] // 3
        width = third // self.heads
        starts = [part * third + head * width for head in range(self.heads) for part in range(3)]
        return [Span(0, start, start + width) for start in starts]


@dataclass(frozen=True)
class GatedUp(Split):
    """gate, up → linear_fc1: each shard holds [gate_r; up_r], so the order of rows depends on n."""

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        if rows[0] % n:
            raise UserError(f"{rows[0]} rows do not divide into {n} shards")
        width = rows[0] // n
        return [Span(source, r * width, (r + 1) * width) for r in range(n) for source in range(2)]


@dataclass(frozen=True)
class Replicated(Split):
    """Every rank holds the whole tensor, with its rows in the order that `inner` gives them on one rank."""

    inner: Split = field(default_factory=ByRows)

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        return self.inner.spans(rows, 1)

    def shards(self, n: int) -> int:
        return 1

    def shard_shape(self, shapes: Sequence[Shape], n: int) -> Shape:
        return self.inner.shard_shape(shapes, 1)

    def copies(self, shapes: Sequence[Shape], r: int, n: int) -> Iterator[Copy]:
        return self.inner.copies(shapes, 0, 1)
