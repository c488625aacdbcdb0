"""Rotary angles of text (multimodal, three axes) and vision (rows and columns).

Frequencies are computed where they are used, in fp32, from integer positions. They are never buffers: Megatron's Float16Module casts
buffers to bf16, and a bf16 `inv_freq` is off by 0.18 rad within 100 patches.

Sources: Qwen2-VL (arXiv:2409.12191, section 2.1, M-RoPE); Qwen2.5-VL (arXiv:2502.13923, section 2.1.1).
"""

import torch
from torch import Tensor


def text_angles(positions_3T: Tensor, head_dim: int, theta: float, mrope_section: tuple[int, ...]) -> Tensor:
    """Angles [T, 1, 1, head_dim] in fp32 for positions [3, T] (time, height, width).

    Frequency pair j turns by the time axis for the first mrope_section[0] pairs, then by height, then by width.
    """
    device = positions_3T.device
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    axis = torch.repeat_interleave(torch.arange(3, device=device), torch.tensor(mrope_section, device=device))
    angles = positions_3T.float()[axis].T * inverse  # [T, head_dim/2]
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def vision_angles(coordinates_P2: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Angles [P, 1, 1, head_dim] in fp32 for patch coordinates [P, 2] (row, column): half the pairs turn by row, half by column."""
    half = head_dim // 2
    inverse = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=coordinates_P2.device) / half)
    angles = (coordinates_P2.float()[:, :, None] * inverse).flatten(1)  # [P, head_dim/2]
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]
