"""Weights from trainer ranks to vLLM engines: through Ray's object store (anywhere), or by NCCL (GPUs).

`send_weights` is the transport for machines without NCCL. Tensors are packed into flat byte buffers of about `bucket_mib`; each buffer
is put into the object store once, every engine maps it without a copy, and at most two are in flight, so neither side ever holds
the whole model twice. On the engine it arrives in a transfer engine registered with vLLM's `WeightTransferEngineFactory`, which loads
it by vLLM's own layer-wise reload (repacking for the kernels, keeping the addresses of captured graphs). It works on GPUs too.

`NcclTransfer` drives vLLM's `nccl` backend with the same source. **It has not run**: the project's machines have no two GPUs. It is
written against the installed sources of vLLM 0.32, and run through vLLM's own classes with a stand-in for NCCL (tests/unit/test_nccl_transfer.py).
NCCL has no timeout of its own here: who dies in a broadcast would hold up all others. So whoever sees it says so in the store through which the group
was formed, every worker of an engine watches that store while it receives, and all give the communicator up (ncclCommAbort).

Both are collective over the trainer's ranks: all call them in lockstep, because producing a full tensor is a collective; only the
sender (world rank 0) talks to engines. On an error the sender finishes the pass before it raises, so that no rank is left waiting.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from eureka_megatron.sync.check import Fingerprint, fingerprint, fingerprints
from eureka_megatron.sync.source import MegatronWeightSource, SyncError, TensorMeta
from eureka_megatron.weights.table import hub_name

log = logging.getLogger(__name__)

BACKEND = "eureka"  # of vLLM's registry
_ALIGNMENT = 64  # bytes: every tensor starts where any dtype may, and on a cache line
_IN_STORE = 1  # buckets; with the one being packed that makes two in flight
_DEADLINE_SECONDS = 900.0  # for one call of one engine
# vLLM 0.32 keeps what has come of a layer until all of it is there, as views of the buffers it came in. With two buffers it would read
# those of one stream on another without waiting for it; 0.33 waits.
_PACKED_BUFFERS = 1
_BROKEN_OFF = "eureka_broken_off"  # key of a transfer group's store: its communicator is given up
_GLANCE_SECONDS = 1.0  # how often a receiving worker looks for it


@dataclass(frozen=True)
class SyncReport:
    """What one weight update did. `lost` are the engines (by place in the list) that died meanwhile; the others are complete, unless it broke."""

    version: int
    tensors: int
    nbytes: int
    buckets: int
    seconds: float
    lost: tuple[int, ...] = ()
    broken: bool = False  # with the lost ones the whole update broke off: to be sent again to the others
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)  # of the tensors as sent, when asked for


@dataclass(frozen=True)
class BucketEntry:
    """Where a tensor lies in its bucket."""

    meta: TensorMeta
    offset: int  # bytes


def default_backend() -> str:
    """How a trainer rank should send: "nccl" where it has a GPU and NCCL, else "ray"."""
    return "nccl" if torch.cuda.is_available() and torch.distributed.is_nccl_available() else "ray"


# ---- trainer side ---------------------------------------------------------------------------------------------------


def send_weights(
    source: MegatronWeightSource,
    engines: Sequence[Any],
    *,
    version: int,
    bucket_mib: int,
    is_sender: bool,
    with_fingerprints: bool = False,
) -> SyncReport | None:
    """Send every tensor of `source` to all engines. Called on every trainer rank; returns a report on the sender, else None.

    engines: Ray actor handles of rollout.engine.Engine. version: the number that rollouts sampled from these weights will carry.

    An engine that dies is left out and reported; the others get the whole model. Raises SyncError when an engine refuses the
    announced tensors (then no engine has loaded anything), or when none is left.
    """
    metadata = source.metadata()
    if not is_sender:
        for _ in source:
            pass
        return None
    start = time.perf_counter()
    update = _Update(engines, version)
    stream = iter(source)
    sent: dict[str, Fingerprint] = {}
    pending: deque[list[Any]] = deque()
    try:
        update.settle(
            update.call("start_weight_update", metadata, version, source.unchanged)
        )  # one refuses: none starts
        buckets = 0
        for buffer, entries in pack(_tapped(stream, sent) if with_fingerprints else stream, metadata, bucket_mib << 20):
            if len(pending) == _IN_STORE:  # one bucket loads while the next is packed
                update.settle(pending.popleft())
            pending.append(update.call("update_weights", {"entries": entries}, ray.put(buffer)))
            buckets += 1
        while pending:
            update.settle(pending.popleft())
        update.settle(update.call("finish_weight_update"))
    except Exception as error:
        update.abort(str(error).splitlines()[0] if str(error) else type(error).__name__)
        for _ in stream:  # the other ranks are in the collectives that produce the rest
            pass
        raise
    nbytes = sum(meta.nbytes for meta in metadata)
    return SyncReport(
        version, len(metadata), nbytes, buckets, time.perf_counter() - start, update.lost, fingerprints=sent
    )


def pack(
    weights: Iterable[tuple[str, Tensor | None]], metadata: Sequence[TensorMeta], bucket_bytes: int
) -> Iterator[tuple[np.ndarray, list[BucketEntry]]]:
    """Copy tensors into uint8 buffers of at most `bucket_bytes` (one tensor may exceed it alone).

    The buffer is reused: it is valid until the next step of the iterator.

        bytes     0          64         128                   256
        buffer    | a .. pad | b .. pad | c .............. pad |     offsets 0, 64, 128; every size rounded up to 64
    """
    sizes = [-(-meta.nbytes // _ALIGNMENT) * _ALIGNMENT for meta in metadata]
    capacity = max([min(bucket_bytes, sum(sizes)), *sizes], default=0)
    buffer = np.empty(capacity, dtype=np.uint8)
    entries: list[BucketEntry] = []
    used = 0
    for meta, size, (name, tensor) in zip(metadata, sizes, weights, strict=True):
        if tensor is None:
            raise SyncError(f"the sending rank has no tensor for {name}")
        if entries and used + size > bucket_bytes:
            yield buffer[:used], entries
            entries, used = [], 0
        view = torch.from_numpy(buffer[used : used + meta.nbytes]).view(meta.dtype).view(meta.shape)
        view.copy_(tensor)
        entries.append(BucketEntry(meta, used))
        used += size
    if entries:
        yield buffer[:used], entries


def unpack(buffer: np.ndarray, entries: Sequence[BucketEntry]) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket, as views of it."""
    with warnings.catch_warnings():  # object-store memory is read-only, and so is every use made of these views
        warnings.filterwarnings("ignore", message=".*not writable.*")
        flat = torch.from_numpy(buffer)
    return [
        (
            entry.meta.name,
            flat[entry.offset : entry.offset + entry.meta.nbytes].view(entry.meta.dtype).view(entry.meta.shape),
        )
        for entry in entries
    ]


class _Update:
    """One update of several engines: sends calls, waits for them, drops engines that died, ends those that do not answer.

    free: called at the first engine that dies or fails, so that those which wait for it can answer.
    """

    def __init__(self, engines: Sequence[Any], version: int, free: Callable[[], None] | None = None) -> None:
        self.version = version
        self._engines = dict(enumerate(engines))
        self._total = len(engines)
        self._free = free

    @property
    def lost(self) -> tuple[int, ...]:
        return tuple(index for index in range(self._total) if index not in self._engines)

    def call(self, method: str, *arguments: Any) -> list[tuple[int, Any]]:
        return [(index, getattr(engine, method).remote(*arguments)) for index, engine in self._engines.items()]

    def settle(self, calls: Sequence[tuple[int, Any]]) -> None:
        """Wait for all calls before raising the first failure. A dead engine is no failure while another lives."""
        failure: Exception | None = None
        waiting = {reference: index for index, reference in calls}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_DEADLINE_SECONDS)
            if not ready:
                self._end(waiting.values())
                continue
            index = waiting.pop(ready[0])
            try:
                ray.get(ready[0])
                continue
            except RayActorError:
                self._engines.pop(index, None)
            except RayTaskError as error:  # without Ray's wrapping when the user can read it
                failure = failure or (error.cause if isinstance(error.cause, SyncError) else error)
            if self._free:
                self._free()
        if failure is not None and not (self._free and self.lost):  # else they failed because of the lost
            raise failure
        if not self._engines:
            raise SyncError(
                f"all {self._total} rollout engines died during the weight update to version {self.version}"
            )

    def abort(self, reason: str) -> None:
        try:
            self.settle(self.call("abort_weight_update", reason))
        except (RayTaskError, SyncError) as error:  # the first error is the one to raise
            log.warning("the update to version %d could not be aborted: %s", self.version, error)

    def _end(self, indices: Iterable[int]) -> None:
        """Engines that do not answer: their calls then end as those of dead ones do."""
        for index in self._engines.keys() & {*indices}:
            log.warning(
                "rollout engine %d has not answered for %g s in the update to version %d; it is ended",
                index,
                _DEADLINE_SECONDS,
                self.version,
            )
            ray.kill(self._engines[index])


def _tapped(
    stream: Iterator[tuple[str, Tensor | None]], found: dict[str, Fingerprint]
) -> Iterator[tuple[str, Tensor | None]]:
    """The stream itself; fingerprints of what passes are added to `found`."""
    for name, tensor in stream:
        if tensor is not None:
            found[hub_name(name)] = fingerprint(tensor)
        yield name, tensor


# ---- engine side ----------------------------------------------------------------------------------------------------


@cache
def register_backend() -> str:
    """Make vLLM know our transfer engine, once in a process; returns its backend name. Imports vLLM.

    It is vLLM's NCCL engine that takes Ray's buckets as well, so the trainer alone decides how weights travel.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    @dataclass
    class Bucket(WeightTransferUpdateInfo):
        entries: list[BucketEntry]
        buffer: np.ndarray  # uint8, usually a view of shared memory

    class TransferEngine(NCCLWeightTransferEngine):
        """Start and finish (vLLM's layer-wise reload) are inherited."""

        def init_transfer_engine(self, init_info: Any) -> None:
            self.shutdown()  # of the group before, whose trainer or whose other engines are gone: vLLM would only forget it
            super().init_transfer_engine(init_info)

        def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
            return Bucket(**update_dict) if "buffer" in update_dict else super().parse_update_info(update_dict)

        def receive_weights(self, update_info: Any) -> None:
            if not isinstance(update_info, Bucket):
                with _given_up_when_broken(self.model_update_group):
                    return super().receive_weights(update_info)
            views = unpack(update_info.buffer, update_info.entries)
            model: Any = self.model
            model.load_weights((name, tensor.to(self.device)) for name, tensor in views)
            return None

    WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)
    return BACKEND


# ---- NCCL -----------------------------------------------------------------------------------------------------------


class NcclTransfer:
    """vLLM's `nccl` backend: one broadcast from world rank 0 to all engines. Not run yet, see the module docstring.

    Built on every trainer rank whenever the set of engines changes (a restarted engine needs a new NCCL group), or after `broken`.

        rank      0         1          2          3          4          two engines of two workers: world 1 + 2 × 2
                  trainer   engine 0   engine 0   engine 1   engine 1   rank_offset 1 + engine × 2, then the worker's own rank
    """

    def __init__(
        self, source: MegatronWeightSource, engines: Sequence[Any], *, rank: int, bucket_mib: int, workers: int
    ) -> None:
        """workers: of each engine (`rollout.tensor`)."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        self.broken = False
        self._source = source
        self._engines = engines
        self._client = _EngineClient(engines, workers)
        self._is_sender = rank == 0
        self._lock = threading.Lock()
        self._stream = _vllm_source(source)
        info = NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=1 + len(engines) * workers,
            packed_buffer_size_bytes=bucket_mib << 20,
            packed_num_buffers=_PACKED_BUFFERS,  # the engines hear of it from here
            rank=rank,
        )
        self._engine: Any = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._stream)

    def send(self, version: int, *, with_fingerprints: bool = False) -> SyncReport | None:
        """As `send_weights`, but when an engine dies the others do not have all weights either: the report is `broken`.

        Fingerprints cost a second pass over the source here.
        """
        start = time.perf_counter()
        metadata = self._source.metadata()
        update = _Update(self._engines, version, self._give_up)
        self._client.begin(update, (metadata, version, self._source.unchanged))
        self._stream.current = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # vLLM reads on a stream of its own, which does not wait for the optimizer's
        failure: Exception | None = None
        try:
            self._engine.send_weights()
        except Exception as error:
            failure = error
            self._give_up()
            for _ in self._stream.current or iter(self._source):  # the other ranks are in the collectives of this pass
                pass
            if self._is_sender:
                update.abort(str(error).splitlines()[0] if str(error) else type(error).__name__)
        found = fingerprints(self._source) if with_fingerprints else {}
        if failure is not None and not isinstance(failure, _EngineLost):
            raise failure
        if not self._is_sender:
            return None
        nbytes = sum(meta.nbytes for meta in metadata)
        seconds = time.perf_counter() - start
        return SyncReport(version, len(metadata), nbytes, 0, seconds, update.lost, failure is not None, found)

    def shutdown(self) -> None:
        self._engine.shutdown()

    def _give_up(self) -> None:
        """Abort the communicator, here and, through the store, in the engines. From any thread: the sending one may be stuck in it.

        What the sender still has to broadcast goes nowhere; it ends the pass over the source, which the other ranks take part in.
        """
        group = self._engine.model_update_group
        with self._lock:
            if self.broken or group is None:
                return
            self.broken = True
        group.group.store.set(_BROKEN_OFF, "")
        _abort(group, lambda *_, **__: None)


class _EngineLost(SyncError):
    """An engine died in an update by NCCL, which ended it for all."""


class _EngineClient:
    """vLLM's control-plane protocol over actor handles. vLLM's own Ray client gives all handles one NCCL rank; these are
    separate engines, so each needs its own."""

    def __init__(self, engines: Sequence[Any], workers: int) -> None:
        self._engines = list(engines)
        self._workers = workers

    def begin(self, update: _Update, announced: tuple[Sequence[TensorMeta], int, Sequence[str]]) -> None:
        """announced: metadata, version and unchanged names of the update."""
        self._update, self._announced = update, announced

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = init_info["rank_offset"]
        ray.get(
            [
                engine.init_weight_transfer_engine.remote(init_info | {"rank_offset": first + index * self._workers})
                for index, engine in enumerate(self._engines)
            ]
        )

    def start_weight_update(self) -> None:
        self._on_all("start_weight_update", *self._announced)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._on_all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._update.settle(self._update.call("finish_weight_update"))  # who dies now takes nobody along

    def _on_all(self, method: str, *arguments: Any) -> None:
        self._update.settle(self._update.call(method, *arguments))
        if lost := self._update.lost:
            raise _EngineLost(f"rollout engines {list(lost)} died during {method}")


@contextmanager
def _given_up_when_broken(group: Any) -> Iterator[None]:
    """While a worker receives: a second thread looks whether the trainer has given the communicator up, or is gone, and does so here."""
    done, broken = threading.Event(), threading.Event()

    def refuse(*_: Any, **__: Any) -> None:
        raise SyncError("the broadcast of weights broke off")

    def watch() -> None:
        while not done.wait(_GLANCE_SECONDS):
            try:
                if not group.group.store.check([_BROKEN_OFF]):
                    continue
            except RuntimeError as error:
                log.warning("the trainer's store does not answer: %s", error)
            broken.set()
            _abort(group, refuse)
            return

    thread = threading.Thread(target=watch, name="watch over a broadcast", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if broken.is_set():
        refuse()  # what came last is not what was sent


def _abort(group: Any, broadcast: Callable[..., None]) -> None:
    """ncclCommAbort, which is made to be called while another thread waits in the communicator."""
    group.broadcast = broadcast  # first: nobody may take up a communicator that is being freed
    group.destroy()


def _vllm_source(source: MegatronWeightSource) -> Any:
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):
        current: Iterator[tuple[str, Tensor | None]] | None = None  # the pass under way

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            self.current = iter(source)
            return self.current  # type: ignore[return-value]  # None only on ranks that do not send

    return Source()
