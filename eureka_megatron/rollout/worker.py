"""What an engine does inside each of its vLLM workers: where the model is. An engine has one worker for each of `rollout.tensor`.

With one, the worker is an object in the engine's own process; with more, vLLM starts a process for each. vLLM mixes `WorkerExtension` into its
worker class (`worker_extension_cls`), so methods are called by name and no function is ever pickled. Every worker loads the tensors of
an update whole and keeps its shard (vLLM's loaders cut it out); watches, fingerprints and temperature are each worker's own.

vLLM is imported on use only.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from eureka_megatron.errors import UserError
from eureka_megatron.rollout.weights import register_loader
from eureka_megatron.sync.check import Piece, engine_pieces, expected_tensors, has_tied_head, parameters_of, tally
from eureka_megatron.sync.source import SyncError, TensorMeta
from eureka_megatron.tracking.memory import give_back
from eureka_megatron.weights.table import hub_name

log = logging.getLogger(__name__)

EXTENSION = f"{__name__}.WorkerExtension"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Failure:
    """A worker's exception, as its answer."""

    error: Exception


class WorkerExtension:
    """Mixed into vLLM's worker class; `self` is the worker."""

    _hands: EngineWorker | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Before vLLM makes a worker: what it looks up in registries of its process must be there."""
        from eureka_megatron.sync.ray_transfer import register_backend

        if kwargs["vllm_config"].parallel_config.world_size > 1:
            _end_with_the_engine()
        register_backend()
        register_loader()
        return super().__new__(cls)

    def on_worker(self, method: str, *arguments: Any) -> Any:
        """A method of `EngineWorker`. Errors are answers: vLLM would leave the other workers' answers for its next call to take."""
        if self._hands is None:
            self._hands = EngineWorker(self)
        try:
            return getattr(self._hands, method)(*arguments)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("%s failed in a worker of the engine", method)
            return Failure(_sendable(error))


class EngineWorker:
    """One worker's part in what `Engine` does. Methods raise; `WorkerExtension.on_worker` is how they are called."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._update: _Update | None = None
        self._dropped: list[int] = []  # bytes of each layer's KV cache

    @property
    def _model(self) -> Any:
        return self._worker.get_model()

    def pid(self) -> int:
        """Of the process that holds this worker's shard."""
        return os.getpid()

    def scale_logits(self, scale: float) -> None:
        """Sample from softmax(scale × logits) from now on."""
        self._model.language_model.logits_processor.scale = scale

    def drop_kv_cache(self) -> None:
        """Free the memory of the KV cache on a CPU, which vLLM's sleep mode leaves out; the tensors stay."""
        storages = [cache.untyped_storage() for cache in self._worker.model_runner.kv_caches]
        self._dropped = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def restore_kv_cache(self) -> None:
        """Take it back, empty; nothing to do where it was not dropped."""
        for cache, nbytes in zip(self._worker.model_runner.kv_caches, self._dropped, strict=False):
            cache.untyped_storage().resize_(nbytes)
            cache.zero_()  # kernels read whole blocks, and what lies there may be no number
        self._dropped = []

    def expected(self) -> dict[str, TensorMeta]:
        """Whole tensors that an update must bring, by hub name."""
        return expected_tensors(self._model)

    def pieces(self) -> list[Piece]:
        """Fingerprints of this worker's shards."""
        return engine_pieces(self._model)

    def join(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's transfer group (NCCL) as rank_offset + this worker's rank."""
        self._worker.init_weight_transfer_engine(init_info)

    def start(self, metadata: Sequence[TensorMeta], version: int, unchanged: Sequence[str], flush: bool) -> None:
        """Make ready to load. flush: an earlier update broke off, whose leftovers vLLM's layer-wise reload would count as loaded."""
        if flush:
            self._flush()
        self._update = _Update(self._model, metadata, version, parameters_of(self._model, unchanged))
        self._worker.start_weight_update()

    def load(self, update_info: dict[str, Any]) -> None:
        """A part of the update: a bucket of Ray's, or what to receive by NCCL."""
        if isinstance(buffer := update_info.get("buffer"), SharedBytes):
            update_info = update_info | {"buffer": buffer.map()}
        self._worker.update_weights(update_info)

    def check_complete(self) -> int:
        """The number of tensors that came. SyncError when any is missing, or a parameter is not filled."""
        assert self._update is not None
        self._update.check_complete()
        return self._update.received

    def finish(self) -> None:
        """Put the new weights in place of the old."""
        assert self._update is not None
        self._worker.finish_weight_update()
        _repack_tied_head(self._model)
        self._update.close()
        self._update = None
        give_back()

    def abort(self) -> int:
        """End an update that cannot be finished. → the tensors that had come: with none, the old weights are whole."""
        received = 0
        if self._update is not None:
            received = self._update.received
            self._update.close()
            self._update = None
        self._flush()
        return received

    def _flush(self) -> None:
        """End vLLM's layer-wise reload in whatever state it is: layers not loaded keep their old tensors."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self._worker.vllm_config):
            finalize_layerwise_reload(self._model, self._worker.model_config)
        self._worker._weight_update_active = False


class _Update:
    """Watches one weight update: what vLLM was given and what it says it loaded, whatever the transport."""

    def __init__(self, model: Any, metadata: Sequence[TensorMeta], version: int, kept: set[str]) -> None:
        self.version = version
        self.received = 0
        # Announced tensors that have not come, and parameters that they have not filled.
        self._awaited = {hub_name(meta.name) for meta in metadata}
        self._unfilled = {name for name, _ in model.named_parameters()} - kept
        self._model = model
        self._load = model.load_weights
        model.load_weights = self._watch

    def close(self) -> None:
        self._model.__dict__.pop("load_weights", None)

    def check_complete(self) -> None:
        """Every announced tensor came, and every parameter of the model is filled that was to change."""
        if problems := tally(self._awaited, "never came") + tally(self._unfilled, "of the engine were not loaded"):
            raise SyncError(f"weight update to version {self.version} is incomplete: {'; '.join(problems)}")

    def _watch(self, weights: Any) -> set[str]:
        weights = list(weights)
        self.received += len(weights)
        for name, _ in weights:
            if hub_name(name) not in self._awaited:
                raise SyncError(f"weight update to version {self.version}: {name} was not announced, or came twice")
            self._awaited.remove(hub_name(name))
        loaded = self._load(weights)
        self._unfilled -= loaded
        return loaded


@dataclass(frozen=True)
class SharedBytes:
    """Bytes in memory that other processes of this user and machine can map. Example: SharedBytes("/proc/4711/fd/38", 268435456)."""

    path: str
    nbytes: int

    def map(self) -> np.ndarray:
        """uint8 [nbytes], read-only; the memory lives as long as any view of it."""
        with open(self.path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), self.nbytes, prot=mmap.PROT_READ), np.uint8)


@contextmanager
def shared_bytes(buffer: np.ndarray) -> Iterator[SharedBytes]:
    """A copy of a buffer for the workers to map while the context lasts. It has no name: a killed process leaves nothing behind.

    One copy an engine, of memory that is new each time, because vLLM keeps views of what it was given until a layer is whole. vLLM's own way would
    pickle it and write it into a socket for every worker.
    """
    descriptor = os.memfd_create("eureka-weights")
    try:
        rest = buffer.data
        while rest:  # at most 2 GiB at once
            rest = rest[os.write(descriptor, rest) :]
        yield SharedBytes(f"/proc/{os.getpid()}/fd/{descriptor}", len(buffer))
    finally:
        os.close(descriptor)


def _end_with_the_engine() -> None:
    """Have the kernel kill this worker's process when the engine's ends, however: vLLM's pipe is not read during a collective."""
    engine = multiprocessing.parent_process()
    assert engine is not None, "vLLM starts its workers with multiprocessing"
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != engine.pid:  # it ended before
        os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives the way to the engine, else one with its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _repack_tied_head(model: Any) -> None:
    """vLLM 0.32 on a CPU keeps a packed copy of a tied output layer that its reload forgets (no tensor is loaded into it)."""
    head = model.language_model.lm_head
    if hasattr(head, "cpu_linear") and has_tied_head(model):
        head.quant_method.process_weights_after_loading(head)
