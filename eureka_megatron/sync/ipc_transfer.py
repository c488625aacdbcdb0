"""Weights from trainer ranks to engines on the same GPUs: vLLM's `ipc` backend, by CUDA IPC handles. **It has not run** on a GPU yet.

Every rank packs the same buckets, each in memory of its own GPU; a worker of an engine opens that of the rank whose GPU it shares, and copies from it
within the GPU. Between GPUs a tensor travels once, as a broadcast of the trainer's own:

    Megatron shards ── gather ──► world rank 0 ── broadcast ──► every rank: bucket ── CUDA IPC ──► the worker beside it

Collective over the trainer's ranks, like the other transports; only world rank 0 talks to engines. Written against vLLM 0.32.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eureka_megatron.sync.check import Fingerprint
from eureka_megatron.sync.ray_transfer import SyncReport, _tapped, _Update
from eureka_megatron.sync.source import MegatronWeightSource, SyncError, TensorMeta

BACKEND = "ipc"  # of vLLM's registry


def send_weights(
    source: MegatronWeightSource,
    engines: Sequence[Any],
    *,
    version: int,
    bucket_mib: int,
    rank: int,
    with_fingerprints: bool = False,
) -> SyncReport | None:
    """As `ray_transfer.send_weights`. rank: in the trainer's world, whose default process group must be up on GPUs."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    start = time.perf_counter()
    metadata = source.metadata()
    sent: dict[str, Fingerprint] = {}
    stream = _tapped(iter(source), sent) if with_fingerprints and rank == 0 else iter(source)
    client = _Client(engines, metadata, version, source.unchanged)
    info = IPCTrainerInitInfo(
        rank=rank,
        packed=True,
        # A tensor must fit into one bucket.
        packed_buffer_size_bytes=max([bucket_mib << 20, *(meta.nbytes for meta in metadata)]),
    )
    torch.cuda.synchronize()  # the optimizer's step, whatever stream it ran on
    whole = everywhere(stream, metadata, torch.device("cuda", torch.cuda.current_device()))
    WeightTransferTrainerFactory.trainer_init(info, client=client, source=_as_source(whole, metadata)).send_weights()
    if rank != 0:
        return None
    if client.failure is not None:
        raise client.failure
    nbytes, seconds = sum(meta.nbytes for meta in metadata), time.perf_counter() - start
    return SyncReport(version, len(metadata), nbytes, client.buckets, seconds, client.lost, fingerprints=sent)


def everywhere(
    stream: Iterable[tuple[str, Tensor | None]], metadata: Sequence[TensorMeta], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The stream of world rank 0, with its tensors, on every rank of the default process group. Collective, in lockstep."""
    rank = dist.get_rank()
    for meta, (name, tensor) in zip(metadata, stream, strict=True):
        if rank != 0:
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        elif tensor is None:
            raise SyncError(f"the sending rank has no tensor for {name}")
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        yield name, whole


class _Client:
    """vLLM's control-plane protocol over actor handles. A failure is kept, not raised: the other ranks wait in the collectives that follow."""

    def __init__(
        self, engines: Sequence[Any], metadata: Sequence[TensorMeta], version: int, unchanged: Sequence[str]
    ) -> None:
        self._update = _Update(engines, version)
        self._announced = metadata, version, unchanged
        self.buckets = 0
        self.failure: Exception | None = None

    @property
    def lost(self) -> tuple[int, ...]:
        return self._update.lost

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update", *self._announced)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.buckets += 1
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, *arguments: Any) -> None:
        if self.failure is not None:
            return
        try:
            self._update.settle(self._update.call(method, *arguments))
        except Exception as error:
            self.failure = error
            self._update.abort(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _as_source(stream: Iterator[tuple[str, Tensor]], metadata: Sequence[TensorMeta]) -> Any:
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in metadata]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return stream

    return Source()
