"""torch's variable-length flash attention, the one place that knows how its signature changed between releases.

bf16 and fp16 on NVIDIA GPUs, head sizes that are multiples of 8 (the towers have 128 and 80). Not yet run on hardware.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Segments laid end to end. Example: lengths 3 and 2 have cu [0, 3, 5] and longest 3."""

    # int32: rows cu[i] … cu[i+1] are segment i
    cu: Tensor
    longest: int


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, queries: Spans, keys: Spans, *, causal: bool) -> Tensor:
    """query [T, N, D], key and value [U, K, D] → [T, N, D]; segment i of the queries sees segment i of the keys.

    With `causal` the last query of a segment sees all its keys, the one before all but one, and so on.
    """
    kernel, takes_groups = _kernel()
    options = {"enable_gqa": True} if takes_groups and query.shape[1] != key.shape[1] else {}
    window = (-1, 0) if causal else (-1, -1)
    cu, longest = (queries.cu, keys.cu), (queries.longest, keys.longest)
    return kernel(query, key, value, *cu, *longest, window_size=window, **options)


@cache
def _kernel() -> tuple[Any, bool]:
    """torch's kernel, which takes seconds to import; whether query heads that share a key head must be asked for (since torch 2.12)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters
