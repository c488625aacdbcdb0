"""The rotary embedding is transformers' own, bit for bit: in fp32 for vision whatever the dtype, in the dtype of the states for text."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

from eureka_megatron.models.qwen2_5_vl.rope import Rotation, rotation_formula, text_angles, vision_angles

HEADS, DTYPES = 3, [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_vision_turns_as_in_transformers(dtype: torch.dtype) -> None:
    config = Qwen2_5_VLConfig().vision_config  # heads of 80
    size = config.hidden_size // config.num_heads
    torch.manual_seed(0)
    coordinates = torch.randint(0, 1000, (50, 2))
    query, key = torch.randn(2, 50, HEADS, size).to(dtype)
    rotary = theirs.Qwen2_5_VLVisionRotaryEmbedding(config)
    expected = theirs.apply_rotary_pos_emb_vision(query, key, *rotary(query, coordinates))
    rotation = Rotation.of(vision_angles(coordinates, size), torch.float32)
    for found, wanted in zip((rotation(query[:, None]), rotation(key[:, None])), expected, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found[:, 0], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_turns_as_in_transformers(dtype: torch.dtype) -> None:
    config = Qwen2_5_VLConfig(
        text_config={"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    ).text_config
    size = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    positions = torch.randint(0, 20000, (3, 50))
    query, key = torch.randn(2, 50, HEADS, size).to(dtype)
    cos, sin = theirs.Qwen2_5_VLRotaryEmbedding(config)(query, positions[:, None])
    expected = theirs.apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    rotation = Rotation.of(text_angles(positions, size, 1e6, (16, 24, 24)), dtype)
    for states, wanted in zip((query, key), expected, strict=True):
        assert torch.equal(rotation(states[:, None])[:, 0], wanted[0].transpose(0, 1))


def test_the_formula_that_gpus_compile_is_the_same_and_compiled_once_for_rows_of_any_length() -> None:
    """Bit for bit, with a compiler that leaves the operations as they are. Queries are views of a wider tensor, their gradients are not."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(rotation_formula, dynamic=True, backend=graphs)
    for dtype, angles in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        for rows in (50, 77, 128, 1000):
            wide = torch.randn(rows, 1, 16, 256).to(dtype)
            rotation = Rotation.of(torch.randn(rows, 64), angles)
            for states in (wide[:, :, :12, :128], wide[:, :, 12:, :128], wide[..., :128].contiguous()):
                assert torch.equal(compiled(states, rotation.cos, rotation.sin), rotation(states))
                assert torch.equal(
                    compiled(states, rotation.cos, rotation.back), Rotation(rotation.cos, -rotation.sin)(states)
                )
    assert graphs.frame_count <= 4  # torch gives up at 8
