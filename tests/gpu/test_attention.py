"""Attention kernels on a GPU against attention written out in fp32. Tolerances are relative to what torch's own kernels reach in bf16.

Not yet run on hardware: whoever first does puts the measured maxima beside the bars.
"""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from eureka_megatron.models.qwen2_5_vl import context
from eureka_megatron.models.qwen2_5_vl.attention import SegmentAttention, Segments
from eureka_megatron.models.qwen2_5_vl.rope import Rotation
from eureka_megatron.types import ContextShare

pytestmark = pytest.mark.gpu

TEXT_3B = (16, 2, 128, AttnMaskType.causal)  # query heads, key heads, head size
TEXT_7B = (28, 4, 128, AttnMaskType.causal)
VISION = (16, 16, 80, AttnMaskType.no_mask)
LENGTHS = [700, 4, 64, 64, 256, 16]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def draw(*heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), n, size).to(device(), dtype).requires_grad_() for n in heads]


def by_torch(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Segment by segment through scaled_dot_product_attention, in the inputs' dtype."""
    parts = []
    for q, k, v in zip(*(x.transpose(0, 1).split(LENGTHS, dim=1) for x in (query, key, value)), strict=True):
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=causal, enable_gqa=True
            )
        )
    return torch.cat([part[0] for part in parts], dim=1).transpose(0, 1)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    weights = torch.randn(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of the output and of each gradient: largest difference over the largest value."""
    return [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]


def turned(rotation: Rotation, *states: Tensor) -> list[Tensor]:
    return [rotation(x[:, None])[:, 0] for x in states]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [TEXT_3B, TEXT_7B, VISION], ids=["text-3b", "text-7b", "vision"])
def test_segments(shape: tuple, dtype: torch.dtype) -> None:
    heads, groups, size, mask = shape
    causal = mask == AttnMaskType.causal
    rotation = Rotation.of(torch.rand(sum(LENGTHS), size // 2, device=device()) * 100, torch.float32)
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * size, num_attention_heads=heads, num_query_groups=groups, kv_channels=size
    )
    attention = SegmentAttention(config, 1, mask, "self", ProcessGroupCollection(cp=None))
    segments = Segments(torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device()), rotation)
    inputs = draw(heads, groups, groups, size=size, dtype=dtype)
    out = attention(*(x[:, None] for x in inputs), None, packed_seq_params=segments)
    found = with_gradients(out.view(-1, heads, size), inputs)

    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = with_gradients(by_torch(*turned(rotation, *wide[:2]), wide[2], causal), wide)
    theirs = errors(with_gradients(by_torch(*turned(rotation, *inputs[:2]), inputs[2], causal), inputs), exact)
    ours = errors(found, exact)
    print(f"ours {ours}, torch {theirs}")
    for own, other in zip(ours, theirs, strict=True):
        assert own <= (1e-5 if dtype == torch.float32 else 3 * other)  # the CPU path: 2.0 times at most


def test_context_shares() -> None:
    """Two shares of one row, as two ranks would have them, against the whole row; gradients are the sums over the ranks."""
    heads, groups, size, _ = TEXT_3B
    inputs = query, key, value = draw(heads, groups, groups, size=size, dtype=torch.bfloat16)
    rows = [_rows_of(rank).to(device()) for rank in range(2)]
    order = torch.argsort(torch.cat(rows))
    pair = torch.cat((key, value), dim=-1)[torch.cat(rows)]  # as gathered from both ranks
    parts = []
    for rank in range(2):
        plan = context.query_plan(LENGTHS, ContextShare(rank, 2, rows[rank], order))
        parts.append(context._flash(query[rows[rank]], pair, plan))
    found = with_gradients(torch.cat(parts)[order], inputs)

    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = with_gradients(by_torch(*wide, causal=True), wide)
    theirs = errors(with_gradients(by_torch(*inputs, causal=True), inputs), exact)
    ours = errors(found, exact)
    print(f"ours {ours}, torch {theirs}")
    for own, other in zip(ours, theirs, strict=True):
        assert own <= 3 * other


def _rows_of(rank: int) -> Tensor:
    """Chunks `rank` and `3 − rank` of the four chunks of every sequence."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1].tolist()
    pieces = []
    for start, length in zip(starts, LENGTHS, strict=True):
        chunks = torch.arange(start, start + length).chunk(4)
        pieces += [chunks[rank], chunks[3 - rank]]
    return torch.cat(pieces)
