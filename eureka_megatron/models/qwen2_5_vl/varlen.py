"""torch's variable-length flash attention, the one place that knows how its signature changed between releases.

bf16 and fp16 on NVIDIA GPUs, head sizes that are multiples of 8 (the towers have 128 and 80). Not yet run on hardware.
"""

import inspect

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Query heads that share a key head: since torch 2.12 that must be asked for, 2.11's kernel just does it.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    causal: bool,
) -> Tensor:
    """query [T, N, D], key and value [U, K, D], each segment's rows at cu[i] … cu[i+1] (int32) → [T, N, D].

    With `causal` the last query of a segment sees all its keys, the one before all but one, and so on.
    """
    return varlen_attn(
        query,
        key,
        value,
        cu_query,
        cu_key,
        longest_query,
        longest_key,
        window_size=(-1, 0) if causal else (-1, -1),
        **(_GROUPED if query.shape[1] != key.shape[1] else {}),
    )
