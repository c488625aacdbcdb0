"""A GPU that is not there: what runs on device "cuda", without values, and every place where the host would wait for it.

    with FakeCuda() as gpu:
        x = torch.ones(3, device="cuda")
        int(x.max())                            # goes on with 0, and is noted
    gpu.waits                                   # Counter({Wait("item", "here.py:12 in f"): 1})

Operations on CUDA tensors yield shapes, dtypes and devices alone (torch's FakeTensorMode) and raise where devices are mixed; operations on CPU
tensors really run. What comes back from the device is made of zeros. Forward passes record autograd's graph, but backward passes need a
CUDA build of torch. For processes of their own (helpers.ranks): parts of torch are replaced.

A wait is whatever makes the host stop until the GPU has come this far: reading a value, a result whose size depends on values, and copies
from or to pageable memory.
"""

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = str(Path(__file__).resolve().parents[2] / "eureka_megatron") + "/"
DEVICE_CUDA, DEVICE_LAZY = 1, 17  # c10::DeviceType
# Results whose size depends on values, and what finds such a result on its way.
SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "isin",
    "repeat_interleave",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Wait(NamedTuple):
    """What the host waits for, and the line of this package that asks for it."""

    what: str
    where: str


class FakeCuda(TorchDispatchMode):
    """See the module's docstring. `waits` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[Wait] = Counter()
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no address is used twice
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "FakeCuda":
        give_cuda_a_guard()
        self._fake.__enter__()
        self._replace(torch.cuda, "current_device", lambda: torch.device("cuda", 0))
        self._replace(Tensor, "cuda", lambda tensor, *_, **__: tensor.to("cuda"))
        self._replace(Tensor, "pin_memory", lambda tensor: self._pin(tensor.clone()))
        self._replace(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for owner, name, value in reversed(self._replaced):
            setattr(owner, name, value) if value is not None else delattr(owner, name)
        self._fake.__exit__(*error)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def allocated_bytes(self) -> int:
        """What tensors hold on the device now."""
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(map(on_gpu, inputs)) and not is_gpu(kwargs.get("device")):
            pinned = kwargs.pop("pin_memory", False)
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            return self._pin(result) if pinned else result
        name = func._schema.name.removeprefix("aten::")
        reason = self._reason(name, args, kwargs)
        if reason:
            self.waits[Wait(reason, place())] += 1
        result = stand_in(name, args, kwargs) if reason else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and on_gpu(tensor):
                storage = tensor.untyped_storage()
                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _reason(self, name: str, args: tuple, kwargs: dict) -> str | None:
        """Why the host waits, or None when it does not."""
        if name in ("_local_scalar_dense", "equal"):
            return "item"
        if name in SIZED_BY_VALUES:
            return name if kwargs.get("output_size") is None else None
        if name in ("_to_copy", "copy_"):
            source, goal = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
            if goal is None or on_gpu(source) == is_gpu(goal):
                return None
            if on_gpu(source):
                return "to the host"
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            pinned = source.untyped_storage().data_ptr() in self._pinned
            return "from pageable memory" if waits or not pinned else None
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                # One mask and a number is a masked_fill, whose size does not depend on the mask.
                fills = name != "index" and len(indices) == 1 and args[2].dim() == 0 and not on_gpu(args[2])
                return None if fills else "mask as index"
            if not all(map(on_gpu, indices)):
                return "from pageable memory"
        return None


def stand_in(name: str, args: tuple, kwargs: dict) -> Any:
    """For a result that depends on values: zeros, of which there are as many as there can be. NotImplemented: it does not depend on them."""
    source = args[0]
    if name == "_local_scalar_dense":
        return False if source.dtype == torch.bool else 0.0 if source.dtype.is_floating_point else 0
    if name == "equal":
        return False
    if name == "_to_copy" and not is_gpu(kwargs["device"]):
        with unset_fake_temporarily():
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
    if name == "copy_" and not on_gpu(source):
        with unset_fake_temporarily():
            return source.zero_()
    if name == "nonzero":
        return torch.zeros(source.numel(), source.dim(), dtype=torch.int64, device=source.device)
    if name == "_unique2":
        places = torch.zeros(source.shape, dtype=torch.int64, device=source.device)
        return source.flatten(), places, places.flatten()
    if name == "masked_select":
        return source.flatten()
    if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
        return torch.ops.aten.index(source, [part for index in args[1] for part in _places(index)])
    return NotImplemented


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the numbers of its elements, as if all were set."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.int64, device=index.device)] * index.dim()


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def place() -> str:
    """The innermost line of this package on the way here, else of whoever called torch."""
    frame = sys._getframe(1)
    caller = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            return f"{code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} in {code.co_name}"
        if not caller and "/torch/" not in code.co_filename and code.co_filename != __file__:
            caller = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return caller


def give_cuda_a_guard() -> None:
    """Indexing asks for the current device, and a CPU build of torch has nobody to answer.

    torch has a guard that does nothing, for CUDA builds on machines without a GPU, and puts it in the place of one that counts no devices.
    A CPU build's place is empty; the lazy backend's guard counts none either.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (DEVICE_LAZY + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not registry[DEVICE_CUDA]:
        registry[DEVICE_CUDA] = registry[DEVICE_LAZY]
        torch._C._ensureCUDADeviceGuardSet()


@contextmanager
def fake_rank(rank: int, world_size: int, **layout: Any) -> Iterator[tuple[Any, FakeCuda]]:
    """This process as one rank of a world that is not there, on a GPU that is not there: (Parallel, FakeCuda). Collectives do nothing.

    Args:
        layout: fields of `Layout`.
    """
    import torch.distributed as dist
    from megatron.core.tensor_parallel import random
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from eureka_megatron.layout import Layout
    from eureka_megatron.parallel import cpu, runtime

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    torch._dynamo.config.disable = True  # Megatron compiles its fused functions; here they run as they are written
    # Without dropout nothing is drawn, and there are no generators.
    random.model_parallel_cuda_manual_seed = lambda _: None
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = cpu._make_tracker(), True
    available = {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda _: None}
    truth = {name: getattr(torch.cuda, name) for name in available}
    for name, function in available.items():
        setattr(torch.cuda, name, function)
    try:
        parallel = runtime.init_parallel(Layout(**layout), rank=rank, world_size=world_size)
    finally:
        for name, function in truth.items():
            setattr(torch.cuda, name, function)
    with FakeCuda() as gpu:
        yield parallel, gpu
