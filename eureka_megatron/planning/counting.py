"""Counts what torch is asked to do: collectives, host synchronisations, and the bytes of all tensors alive. On real and on fake tensors alike.

A dispatch mode sees every operation below autograd. Operations are counted by torch's own FlopCounterMode, entered beside this one.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_WAITS = {"wait", "monitored_barrier_", "check_for_nan"}  # of c10d, which move nothing
# Of aten: what is bound by arithmetic, and what only makes room or another view.
_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", *_ROOM}
# Of all operators: what starts no kernel, beside views.
_NO_KERNEL = {"_local_scalar_dense", *_ROOM, *_WAITS}


class Counts(TorchDispatchMode):
    """What happens while it is active.

    Args:
        groups: what to call a process group, by its world ranks. Example: {(0, 1): "tensor"}.
        answer: whether values that the host asks for are made up (1, 1.0, True): fake tensors have none.

    Attributes:
        collectives: (operation, group) → bytes of the tensors handed over on this rank. Example: {("allreduce_", "tensor"): 4096}.
        calls: (operation, group) → how often.
        synchronisations: times the host has asked for a value on the device.
        live, peak: bytes of the storages made under this mode that are alive, now and at most.
        kernels: operations that a GPU would be given, each of them a kernel at least.
        moved: bytes that operations other than matrix products and attention read and wrote.
    """

    def __init__(self, groups: Mapping[tuple[int, ...], str], *, answer: bool = False) -> None:
        super().__init__()
        self.groups, self.answer = groups, answer
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.synchronisations = self.kernels = 0
        self.peak = self.moved = self._held = 0
        self._known: dict[int, int] = {}  # storages alive, by the address of torch's own record → bytes
        self._freed: deque[int] = deque()  # gloo's threads let go of tensors too: only this mode's thread may subtract

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.synchronisations += 1
            if self.answer:
                return _one(args[0].dtype)
        self.kernels += func.namespace != "prim" and not func.is_view and func._opname not in _NO_KERNEL
        if func.namespace == "c10d" and func._opname not in _WAITS:
            self._collective(func._opname, args)
        if func.namespace == "c10d" and self.answer:
            return _communicated(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view of what is not known is of what was there before
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._track(tensor)
            if func.namespace == "aten" and func._opname not in _PRODUCTS:
                self.moved += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out

    @property
    def live(self) -> int:
        while self._freed:
            self._held -= self._known.pop(self._freed.popleft(), 0)
        return self._held

    def restart(self) -> None:
        """Everything but `live` counts from here on."""
        self.collectives.clear()
        self.calls.clear()
        self.peak, self.moved, self.synchronisations, self.kernels = self.live, 0, 0, 0

    def _collective(self, operation: str, args: tuple[Any, ...]) -> None:
        group = next(leaf for leaf in args if isinstance(leaf, torch.ScriptObject) and _is_group(leaf))
        ranks = tuple(dist.get_process_group_ranks(ProcessGroup.unbox(group)))
        key = (operation, self.groups.get(ranks, f"{len(ranks)} ranks"))
        # The first argument: what is received into, or for a sending what is sent.
        self.collectives[key] += sum(
            t.numel() * t.element_size() for t in tree_leaves(args[0]) if isinstance(t, Tensor)
        )
        self.calls[key] += 1

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, live = storage._cdata, self.live  # that first: an address may be another's, freed
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self._held = live + self._known[key]
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._freed.append, key)


def _communicated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a collective on fake tensors returns. torch knows not all of them: the fake group gets empty tensors instead, which it leaves alone."""
    with unset_fake_temporarily():
        emptied = tree_map(lambda leaf: torch.empty(0) if isinstance(leaf, Tensor) else leaf, args)
        result = func(*emptied, **kwargs)
    return (args[0], *result[1:]) if isinstance(result, tuple) else result


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().qualified_name().endswith("ProcessGroup")


def _one(dtype: torch.dtype) -> Any:
    """A finite number, and yes: what the code that trains expects to hear (are the gradients finite, how many steps)."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
