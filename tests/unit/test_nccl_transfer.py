"""NcclTransfer through vLLM's own sender and receiver, on a machine without NCCL.

vLLM's classes are the real ones: trainer engine, worker engine, packed producer and consumer. Stand-ins are what a CPU lacks: NCCL's
group is a queue between threads, Ray's calls are threads, and `Streams` plays torch's CUDA streams: it notes who reads what where, and
says when a GPU would not have waited. What NCCL and CUDA themselves do is not shown here.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eureka_megatron.sync import ray_transfer
from eureka_megatron.sync.source import MegatronWeightSource, TensorMeta

WEIGHTS = [(f"model.layers.{n // 2}.{'ab'[n % 2]}.weight", torch.randn(120_000, dtype=torch.float32)) for n in range(8)]
BUCKET_MIB = 1  # two layers and a half: one of them spans two buckets


class Streams:
    """torch's CUDA streams as far as order goes: work that is queued on one is seen by another only after a synchronisation."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.made: list[str] = []
        self.pending = False  # an optimizer step that stands in the default stream's queue
        self.trouble: list[str] = []

    @property
    def current(self) -> str:
        return getattr(self.here, "name", "default")

    def synchronize(self, *_: Any) -> None:
        self.pending = False

    def new(self, device: Any = None) -> Any:
        name = f"{threading.current_thread().name} {len(self.made)}"
        self.made.append(name)
        return SimpleNamespace(name=name, synchronize=lambda: None)

    @contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before = self.current
        self.here.name = stream.name
        try:
            yield
        finally:
            self.here.name = before


class Group:
    """One end of a broadcast from rank 0 to one engine."""

    def __init__(self, wire: queue.Queue, log: list[str], name: str) -> None:
        self.wire, self.log, self.name = wire, log, name
        log.append(f"{name} made")

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        if self.name.startswith("trainer"):
            self.wire.put(tensor.clone())
        else:
            tensor.copy_(self.wire.get(timeout=10))

    def destroy(self) -> None:
        self.log.append(f"{self.name} destroyed")


class Model(torch.nn.Module):
    """Takes weights as vLLM's layer-wise reload does: views are kept until the layer is whole, and read then, on the stream of that moment."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams, self.found = streams, {}
        self.waiting: dict[str, list[tuple[str, Tensor, str]]] = {}

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            layer = self.waiting.setdefault(name.rsplit(".", 2)[0], [])
            layer.append((name, tensor, self.streams.current))
            if len(layer) == 2:
                for kept, values, arrived in layer:
                    if arrived != self.streams.current:
                        self.streams.trouble.append(f"{kept} came on {arrived}, is read on {self.streams.current}")
                    self.found[kept] = values.clone()


class Engine:
    """An engine's actor handle: every method has `.remote`, which answers with a future. Behind it is vLLM's worker-side engine."""

    def __init__(self, streams: Streams) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        self.model = Model(streams)
        shape = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        self.worker = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=ray_transfer.register_backend()),
            SimpleNamespace(parallel_config=shape, model_config=None),
            torch.device("cpu"),
            self.model,
        )
        self.pool = ThreadPoolExecutor(1, "engine")
        self.init_weight_transfer_engine = self._remote(
            lambda info: self.worker.init_transfer_engine(self.worker.parse_init_info(info))
        )
        self.update_weights = self._remote(
            lambda info: self.worker.receive_weights(self.worker.parse_update_info(info))
        )
        self.start_weight_update = self.finish_weight_update = self._remote(lambda *_: None)

    def _remote(self, call: Callable[..., Any]) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.pool.submit(call, *arguments))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    # All of vLLM that the transfer imports comes before the machine seems to have a GPU.
    from vllm.distributed.weight_transfer import packed_tensor
    from vllm.model_executor.model_loader import mtp_validation  # noqa: F401

    ray_transfer.register_backend()
    found = Streams()
    packed_tensor._get_streams.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", found.new)
    monkeypatch.setattr(torch.cuda, "stream", found.entered)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    # By thread, because both sides are in this process and vLLM keeps the streams of a device.
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: threading.current_thread().name)
    yield found
    packed_tensor._get_streams.cache_clear()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of NCCL groups made and destroyed, in order."""
    from vllm.distributed.weight_transfer import nccl_engine

    found: list[str] = []
    wires: dict[int, queue.Queue] = {}

    def wire(info: Any) -> queue.Queue:
        return wires.setdefault(info.master_port, queue.Queue())

    def group(side: str, info: Any) -> Group:
        return Group(wire(info), found, f"{side} group {[*wires].index(info.master_port)}")

    def trainer_side(info: Any) -> Group:
        wire(info)
        return group("trainer", info)

    def engine_side(info: Any, _: Any) -> Group:
        wire(info)
        return group("engine", info)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", trainer_side)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", engine_side)
    monkeypatch.setattr(ray_transfer.ray, "get", lambda futures: [future.result(10) for future in futures])
    monkeypatch.setattr(ray_transfer.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    return found


def source(streams: Streams) -> MegatronWeightSource:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in WEIGHTS:
            if streams.pending and streams.current != "default":
                streams.trouble.append(f"{name} is read on {streams.current} while the optimizer may still write it")
            yield name, tensor

    return MegatronWeightSource(weights, [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in WEIGHTS])


def test_weights_arrive_in_an_order_that_a_gpu_keeps(streams: Streams, log: list[str]) -> None:
    """Of a layer that spans two buckets both halves come on one stream, and nothing is read before the optimizer has written it."""
    engine = Engine(streams)
    transfer = ray_transfer.NcclTransfer(source(streams), [engine], rank=0, bucket_mib=BUCKET_MIB)
    assert transfer._engine.packed
    assert engine.worker.packed
    assert transfer._engine.packed_num_buffers == engine.worker.packed_num_buffers == 1
    assert transfer._engine.packed_buffer_size_bytes == engine.worker.packed_buffer_size_bytes == BUCKET_MIB << 20
    for version in (1, 2):
        streams.pending = True  # the optimizer's last kernels are queued, not done
        report = transfer.send(version, with_fingerprints=True)
        assert not streams.trouble
        assert {name: found.tolist() for name, found in engine.model.found.items()} == {
            name: tensor.tolist() for name, tensor in WEIGHTS
        }
        assert len(report.fingerprints) == len(WEIGHTS)
        engine.model.found.clear()
        engine.model.waiting.clear()
    assert len(streams.made) == 2  # one of the sender, one of the engine


def test_an_engine_gives_its_group_back_before_it_joins_another(streams: Streams, log: list[str]) -> None:
    """A second group is made whenever an engine was replaced; the survivors hold memory of the GPU in the first."""
    engine = Engine(streams)
    first = ray_transfer.NcclTransfer(source(streams), [engine], rank=0, bucket_mib=BUCKET_MIB)
    first.shutdown()
    ray_transfer.NcclTransfer(source(streams), [engine], rank=0, bucket_mib=BUCKET_MIB)
    engines = [entry for entry in log if entry.startswith("engine")]
    assert engines == ["engine group 0 made", "engine group 0 destroyed", "engine group 1 made"]
    assert "trainer group 0 destroyed" in log
