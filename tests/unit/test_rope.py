"""The rotary embedding is transformers' own, bit for bit: in fp32 for vision whatever the dtype, in the dtype of the states for text."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

from eureka_megatron.models.qwen2_5_vl.rope import Rotation, text_angles, vision_angles

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
