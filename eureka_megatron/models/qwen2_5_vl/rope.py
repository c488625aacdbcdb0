"""Rotary embedding of text (multimodal, three axes) and vision (rows and columns).

Frequencies are computed where they are used, in fp32, from integer positions. They are never buffers: Megatron's Float16Module casts
buffers to bf16, and a bf16 `inv_freq` is off by 0.18 rad within 100 patches.

Angles belong to rows of the packed micro-batch, so nothing here knows of sequences. The core attention modules rotate queries and keys, not
Megatron's `apply_rotary_pos_emb`: that casts cos and sin to the hidden states' dtype (the vision tower wants fp32), computes them anew in
every layer, and for packed rows finds each sequence's angles by a rule of its own.

    head of 8 values, mrope_section (1, 2, 1)      x0   x1   x2   x3 | x4   x5   x6   x7
    pair (x_j, x_{j+4}) is rotated by              time h    h    w  | time h    h    w      position · theta^(−2j/8)

Sources: Qwen2-VL (arXiv:2409.12191, section 2.1, M-RoPE); Qwen2.5-VL (arXiv:2502.13923, section 2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotates pair (x_j, x_{j + head_dim/2}) of every head of row t by angle [t, j], in the dtype of cos and sin.

    That is the dtype of the hidden states for text, and fp32 for vision whatever that is: as in transformers' modules, the model's
    definition (vLLM's text does the same).
    """

    # [T, 1, 1, head_dim/2]
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """From angles [T, head_dim/2] in fp32; their cosines are rounded to `dtype`."""
        angles = angles[:, None, None]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    @cached_property
    def back(self) -> Tensor:
        """The sines of the rotation back."""
        return -self.sin

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, 1, heads, head_dim] → the same, rotated."""
        return _Rotate.apply(x, self.cos, self.sin, self.back)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing of x is kept, and nothing is laid side by side once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(cos, back)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _rotated(gradients[0], *ctx.saved_tensors), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.is_cuda:
        return fused_rotation(x, cos, sin)
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    out = torch.empty_like(wide)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).sub_(second * sin)
    torch.mul(second, cos, out=right).add_(first * sin)
    return out.to(x.dtype)


def rotation_formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as one expression, for a compiler."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# One kernel, as Megatron's activation is: eager it would be six or more, for queries and for keys of every layer. Compiled on first use; rows have
# many lengths, so sizes are symbols from the beginning. Products are rounded as they would be alone: bf16 stays transformers' and vLLM's.
fused_rotation = torch.compile(rotation_formula, dynamic=True, options={"emulate_precision_casts": True})


def text_angles(positions_3T: Tensor, head_dim: int, theta: float, mrope_section: tuple[int, ...]) -> Tensor:
    """Angles [T, head_dim/2] in fp32 for positions [3, T] (time, height, width).

    Pair j follows the time axis for the first mrope_section[0] pairs, then height, then width.
    """
    # Slices, no table of axes: its length would depend on values, and the host would wait for the GPU to know it.
    axes = [axis[:, None].expand(-1, pairs) for axis, pairs in zip(positions_3T, mrope_section, strict=True)]
    return torch.cat(axes, dim=1).float() * _frequencies(head_dim, theta, positions_3T.device)


def vision_angles(coordinates_P2: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Angles [P, head_dim/2] in fp32 for patch coordinates [P, 2]: half the pairs follow the row, half the column."""
    return (coordinates_P2.float()[:, :, None] * _frequencies(head_dim // 2, theta, coordinates_P2.device)).flatten(1)


def _frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    """[size/2] in fp32: theta^(−2j/size)."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
