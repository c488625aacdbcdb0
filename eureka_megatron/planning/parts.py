"""Which part of the model computes: floating-point operations of the tower, the text layers and the head, linears apart from attention.

torch's own attribution by module loses its place in Megatron's backward passes. Here three borders are marked instead, and what is counted
between two of them belongs to the part that was entered last:

    forward    text │ tower │ text layers │ head │             backward    head │ text layers │ tower (its output's gradient has come)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eureka_megatron.models.qwen2_5_vl.model import QwenVLModel
from eureka_megatron.models.qwen2_5_vl.vision import VisionTower
from eureka_megatron.rl.logprobs import _TokenLogprobs

TOWER, TEXT, HEAD = "vision", "text", "head"
_LINEARS = {"mm", "addmm"}  # all other products are attention's


class Parts:
    """Operations by part; see `found`."""

    def __init__(self, flops: FlopCounterMode) -> None:
        self._flops = flops
        self._part = TEXT
        self._before: Counter[Any] = Counter()
        self._found: Counter[str] = Counter()

    def found(self, windows: int = 0) -> dict[str, int]:
        """What has been counted. windows: operations of the tower's attention that were within windows."""
        self._enter(TEXT)
        own = {
            name: self._found[name] for name in ("vision linears", "vision attention", "text linears", "text attention")
        }
        if windows:
            own["vision attention"] -= windows
            own["vision attention in windows"] = windows
        return own | {HEAD: self._found["head linears"] + self._found["head attention"]}

    @contextmanager
    def marked(self) -> Iterator[None]:
        """While active, the borders are."""

        def inside(function: Callable[..., Any], part: str) -> Callable[..., Any]:
            def marked(*args: Any, **kwargs: Any) -> Any:
                outer = self._enter(part)
                out = function(*args, **kwargs)
                self._enter(outer)
                if part == TOWER and isinstance(out, Tensor) and out.requires_grad:
                    out.register_hook(lambda _: self._enter(TOWER) and None)
                return out

            return marked

        with (
            mock.patch.object(QwenVLModel, "forward", inside(QwenVLModel.forward, TEXT)),
            mock.patch.object(VisionTower, "forward", inside(VisionTower.forward, TOWER)),
            mock.patch.object(VisionTower, "encode", inside(VisionTower.encode, TOWER)),
            mock.patch.object(_TokenLogprobs, "forward", staticmethod(inside(_TokenLogprobs.forward, HEAD))),
            mock.patch.object(_TokenLogprobs, "backward", staticmethod(inside(_TokenLogprobs.backward, HEAD))),
        ):
            yield

    def _enter(self, part: str) -> str:
        """→ the part before"""
        now = Counter(self._flops.get_flop_counts().get("Global", {}))
        for operator, number in (now - self._before).items():
            kind = "linears" if operator.__name__ in _LINEARS else "attention"
            self._found[f"{self._part} {kind}"] += number
        self._before, before = now, self._part
        self._part = part
        return before
