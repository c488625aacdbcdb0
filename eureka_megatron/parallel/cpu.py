"""Megatron-Core on CPU ranks over gloo.

Megatron-Core 0.16 names CUDA in a few dozen places. None of them lies in the mathematics: they allocate a scalar, compare a
type name or synchronise. `use_cpu` answers those places once, in this process; forward and backward then run untouched code at
untouched speed (no `TorchFunctionMode`, nothing per operation):

- `torch.cuda.current_device()` is the CPU device, `synchronize` and `Tensor.cuda` do nothing: those are looked up at call time
  all over Megatron.
- Modules that write `device="cuda"` literals get a `torch` of their own in which the factory functions say "cpu".
- The CUDA random-state tracker forks nothing: this package trains without dropout, so no draw inside it matters.
- Activation recomputation saves and restores CUDA's random state with every checkpoint: there is none.
- The optimizers compare `param.type()` with `'torch.cuda.FloatTensor'`; `cuda_type_names` answers that, only while they run.

Never active where a GPU is in use: `use_cpu` refuses.
"""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

# Modules with `device="cuda"` literals on a path that a dense model takes.
_MODULES_WITH_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full")


class _TorchOnCpu(ModuleType):
    """`torch`, except that factories asked for CUDA answer on the CPU and norms are exact. Only the modules above see it."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    @staticmethod
    def norm(tensor: torch.Tensor) -> torch.Tensor:
        """Of gradients. On a CPU torch adds fp32 squares one after another: 5e-5 off over three million of them."""
        return torch.norm(tensor, dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _make_tracker() -> Any:
    from megatron.core.tensor_parallel import random

    class NoRandomness(random.CudaRNGStatesTracker):
        """Nothing random happens inside the tracked regions (dropout is 0), and there is no CUDA state to fork."""

        @contextlib.contextmanager
        def fork(self, name: str = "") -> Iterator[None]:
            yield

    return NoRandomness()


_active = False


def use_cpu() -> None:
    """Let Megatron-Core run in this process without CUDA; calling it again changes nothing.

    Raises:
        RuntimeError: a GPU is visible: hide it (CUDA_VISIBLE_DEVICES="") or use it.
    """
    global _active
    if _active:
        return
    if torch.cuda.is_available():
        raise RuntimeError('a GPU is visible; set CUDA_VISIBLE_DEVICES="" to run Megatron on the CPU')
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    shim = _TorchOnCpu()
    for name in _MODULES_WITH_LITERALS:
        importlib.import_module(name).torch = shim  # type: ignore[attr-defined]
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = _make_tracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda **_: None
    random._set_cuda_rng_state = lambda *_, **__: None
    _active = True


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While active on a CPU, `tensor.type()` says 'torch.cuda.FloatTensor': the optimizers sort parameters by that name."""
    if not _active:
        yield
        return
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]
