"""The rotation as GPUs compute it: one compiled kernel that rounds where the single operations do.

Not yet run on hardware.
"""

import pytest
import torch

from eureka_megatron.models.qwen2_5_vl.rope import Rotation, fused_rotation, rotation_formula

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("angles", [torch.bfloat16, torch.float32])
def test_the_compiled_rotation_is_the_eager_one(angles: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(1000, 1, 18, 128, device="cuda").bfloat16()
    rotation = Rotation.of(torch.randn(1000, 64, device="cuda"), angles)
    for states in (wide[:, :, :16], wide[:, :, 16:]):
        for sines in (rotation.sin, rotation.back):
            found, wanted = (way(states, rotation.cos, sines) for way in (fused_rotation, rotation_formula))
            if angles == torch.bfloat16:
                assert torch.equal(found, wanted)
            else:  # a fused multiply-add in fp32 may round the last bit of bf16 the other way
                torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6)
