"""The GPU's attention, as far as shapes and dtypes go: on the meta device torch says what its kernels would return, forward and backward.

Values are compared on hardware, in tests/gpu.
"""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from eureka_megatron.models.qwen2_5_vl import context
from eureka_megatron.models.qwen2_5_vl.attention import SegmentAttention, Segments
from eureka_megatron.models.qwen2_5_vl.rope import Rotation
from eureka_megatron.types import ContextShare

TEXT_3B, VISION = (16, 2, 128), (16, 16, 80)  # query heads, key heads, head size
LENGTHS = [20, 4, 28]
ROWS = sum(LENGTHS)


def states(rows: int, *heads: int, size: int) -> list[torch.Tensor]:
    return [torch.empty(rows, n, size, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in heads]


@pytest.mark.parametrize(("shape", "mask"), [(TEXT_3B, AttnMaskType.causal), (VISION, AttnMaskType.no_mask)])
def test_segments_in_the_variable_length_kernel(shape: tuple[int, int, int], mask: AttnMaskType) -> None:
    heads, groups, size = shape
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * size, num_attention_heads=heads, num_query_groups=groups, kv_channels=size
    )
    attention = SegmentAttention(config, 1, mask, "self", ProcessGroupCollection(cp=None))
    rotation = Rotation.of(torch.zeros(ROWS, size // 2), torch.float32)
    inputs = states(ROWS, heads, groups, groups, size=size)
    out = attention._flash(*inputs, Segments(torch.tensor([0, *LENGTHS]).cumsum(0).int(), rotation))
    out.backward(torch.empty_like(out))
    assert (out.shape, out.dtype) == ((ROWS, heads, size), torch.bfloat16)
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


def test_context_shares_in_the_variable_length_kernel() -> None:
    heads, groups, size = TEXT_3B
    query, key, value = states(ROWS // 2, heads, groups, groups, size=size)
    share = ContextShare(1, 2, torch.arange(ROWS // 2), torch.arange(ROWS, device="meta"))
    pair = torch.cat((key, value), dim=-1).repeat(2, 1, 1)  # as gathered from two ranks
    out = context._flash(query, pair, context.query_plan(LENGTHS, share))
    out.backward(torch.empty_like(out))
    assert out.shape == query.shape
    assert value.grad.shape == value.shape
