"""How the tensors of a Hugging Face checkpoint become the shards of a Megatron parameter, and back, exactly.

A layout says one thing: which rows of which HF tensor stand where in the Megatron tensor (`spans`), and along which
axis tensor parallelism cuts it. From that, `pieces` derives the rectangular copies that make shard r of n; `split` runs
them one way and `merge` the other way, so there is no second description that could disagree with the first.

Left out: process groups, names, files. Sources may be anything that slices like a tensor (a memory-mapped file).

Legend: n shards (tensor-parallel size), r index of a shard, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from eureka_megatron.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Rows start … stop-1 of HF tensor number `source`."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """One rectangular copy between an HF tensor and a shard: `source[at_source] ↔ shard[at_shard]`."""

    source: int
    at_source: tuple[slice, ...]
    at_shard: tuple[slice, ...]


@dataclass(frozen=True)
class Run:
    """Rows row … row+rows-1 of a shard stand from `whole_row` and `column` on in the tensor that one rank alone would hold."""

    row: int
    whole_row: int
    rows: int
    column: int


@dataclass(frozen=True)
class Layout:
    """The common part: everything follows from `spans` and `axis`.

    Invariants (each has a test): the spans of n shards cover every row of every HF tensor once;
    `merge([split(hf, r, n) for r in range(n)]) == hf`, bitwise, for every n that divides.
    """

    axis = 0  # the axis of the Megatron tensor that tensor parallelism cuts

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        """The HF rows in the order in which the Megatron tensor of n concatenated shards has them."""
        return [Span(source, 0, count) for source, count in enumerate(rows)]

    def hf_view(self, tensor: Tensor) -> Tensor:
        """The HF tensor in the rank that the Megatron parameter has; always a view."""
        return tensor

    def flat_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes of `hf_view` of HF tensors with these shapes."""
        return list(shapes)

    def shards(self, n: int) -> int:
        """How many different shards n tensor-parallel ranks hold: n, or 1 when all hold the same."""
        return n

    def shard_shape(self, shapes: Sequence[Shape], n: int) -> Shape:
        """Shape of each of n shards, from the HF shapes. UserError when the axis does not divide by n."""
        flat = self.flat_shapes(shapes)
        full = [sum(shape[0] for shape in flat), *flat[0][1:]]
        if full[self.axis] % n:
            raise UserError(f"{full[self.axis]} {'columns' if self.axis else 'rows'} do not divide into {n} shards")
        full[self.axis] //= n
        return tuple(full)

    def pieces(self, shapes: Sequence[Shape], r: int, n: int) -> Iterator[Piece]:
        """The copies that make shard r of n; inverted, the copies that take it apart."""
        shape = self.shard_shape(shapes, n)
        per_shard = shape[self.axis]
        first_row = r * per_shard if self.axis == 0 else 0
        columns = (slice(r * per_shard, (r + 1) * per_shard),) if self.axis == 1 else ()
        at = 0  # row of the Megatron tensor where the span begins
        for span in self.spans([flat[0] for flat in self.flat_shapes(shapes)], n):
            begin = max(at, first_row)
            end = min(at + span.stop - span.start, first_row + shape[0])
            if begin < end:
                rows = slice(span.start + begin - at, span.start + end - at)
                yield Piece(span.source, (rows, *columns), (slice(begin - first_row, end - first_row),))
            at += span.stop - span.start

    def fill(self, shard: Tensor, sources: Sequence[Tensor], r: int, n: int) -> None:
        """Writes shard r of n into `shard` (casting to its dtype), reading only the slices it needs."""
        for piece in self.pieces([tuple(source.shape) for source in sources], r, n):
            shard[piece.at_shard].copy_(self.hf_view(sources[piece.source])[piece.at_source])

    def fill_rows(self, block: Tensor, sources: Sequence[Tensor], start: int, r: int = 0, n: int = 1) -> None:
        """Writes rows start, start+1, … of shard r of n into `block`; without r and n, of the tensor one rank alone holds."""
        for piece in self.pieces([tuple(source.shape) for source in sources], r, n):
            at, rows = piece.at_shard[0], piece.at_source[0]
            begin, end = max(at.start, start), min(at.stop, start + len(block))
            if begin < end:
                wanted = slice(rows.start + begin - at.start, rows.start + end - at.start)
                view = self.hf_view(sources[piece.source])
                block[begin - start : end - start].copy_(view[(wanted, *piece.at_source[1:])])

    def runs(self, shapes: Sequence[Shape], r: int, n: int) -> list[Run]:
        """Where the rows of shard r of n stand in the tensor that one rank alone would hold; in the shard's order."""
        found: list[Run] = []
        whole = list(self.pieces(shapes, 0, 1))
        for piece in self.pieces(shapes, r, n):
            column = piece.at_source[1].start if len(piece.at_source) > 1 else 0
            for other in (other for other in whole if other.source == piece.source):
                mine, theirs = piece.at_source[0], other.at_source[0]
                begin, end = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
                if begin < end:
                    row = piece.at_shard[0].start + begin - mine.start
                    found.append(Run(row, other.at_shard[0].start + begin - theirs.start, end - begin, column))
        joined: list[Run] = []
        for run in sorted(found, key=lambda run: run.row):
            last = joined[-1] if joined else None
            if last and (last.row + last.rows, last.whole_row + last.rows) == (run.row, run.whole_row):
                joined[-1] = Run(last.row, last.whole_row, last.rows + run.rows, column=last.column)
            else:
                joined.append(run)
        return joined

    def split(self, sources: Sequence[Tensor], r: int, n: int) -> Tensor:
        """Shard r of n of the Megatron parameter, as a new tensor."""
        shard = torch.empty(self.shard_shape([tuple(s.shape) for s in sources], n), dtype=sources[0].dtype)
        self.fill(shard, sources, r, n)
        return shard

    def merge(self, shards: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The HF tensors of these shapes from all `shards(n)` different shards; always new tensors."""
        merged = [shards[0].new_empty(shape) for shape in shapes]
        for r, shard in enumerate(shards):
            for piece in self.pieces(shapes, r, len(shards)):
                self.hf_view(merged[piece.source])[piece.at_source] = shard[piece.at_shard]
        return merged


@dataclass(frozen=True)
class Rows(Layout):
    """Cut along rows as they stand: column-parallel linears, embeddings."""


@dataclass(frozen=True)
class Columns(Layout):
    """Cut along the input axis: weights of row-parallel linears."""

    axis = 1


@dataclass(frozen=True)
class FusedQKV(Layout):
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
class VisionQKV(Layout):
    """One HF tensor [q; k; v] of the vision tower → linear_qkv: for each head q, k, v."""

    heads: int

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        third = rows[0] // 3
        width = third // self.heads
        return [
            Span(0, part * third + head * width, part * third + (head + 1) * width)
            for head in range(self.heads)
            for part in range(3)
        ]


@dataclass(frozen=True)
class GatedUp(Layout):
    """gate, up → linear_fc1: each shard holds [gate_r; up_r], so the order of rows depends on n."""

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        if rows[0] % n:
            raise UserError(f"{rows[0]} rows do not divide into {n} shards")
        width = rows[0] // n
        return [Span(source, r * width, (r + 1) * width) for r in range(n) for source in range(2)]


@dataclass(frozen=True)
class Replicated(Layout):
    """Every rank holds the whole tensor, with its rows in the order that `inner` gives them on one rank."""

    inner: Layout = field(default_factory=Rows)

    def spans(self, rows: Sequence[int], n: int) -> list[Span]:
        return self.inner.spans(rows, 1)

    def shards(self, n: int) -> int:
        return 1

    def hf_view(self, tensor: Tensor) -> Tensor:
        return self.inner.hf_view(tensor)

    def flat_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return self.inner.flat_shapes(shapes)

    def shard_shape(self, shapes: Sequence[Shape], n: int) -> Shape:
        return self.inner.shard_shape(shapes, 1)

    def pieces(self, shapes: Sequence[Shape], r: int, n: int) -> Iterator[Piece]:
        return self.inner.pieces(shapes, 0, 1)


@dataclass(frozen=True)
class Reshaped(Layout):
    """A convolution over whole patches is a linear map: HF [out, c, t, h, w] → Megatron [out, c·t·h·w], cut by rows."""

    def hf_view(self, tensor: Tensor) -> Tensor:
        return tensor.view(tensor.shape[0], -1)

    def flat_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [(shape[0], prod(shape[1:])) for shape in shapes]
