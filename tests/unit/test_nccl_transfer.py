"""NcclTransfer through vLLM's own sender and receiver, on a machine without NCCL.

vLLM's classes are the real ones: trainer engine, worker engine, packed producer and consumer, the store through which a group is formed.
Stand-ins are what a CPU lacks: NCCL's communicator is queues between threads, Ray's calls are threads, and `Streams` plays torch's CUDA
streams: it notes who reads what where, and says when a GPU would not have waited. As NCCL's, a broadcast ends when all have taken part, or
when the communicator is aborted here. What NCCL and CUDA themselves do is not shown here.
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor

from eureka_megatron.sync import ray_transfer
from eureka_megatron.sync.ray_transfer import NcclTransfer, SyncReport
from eureka_megatron.sync.source import MegatronWeightSource, SyncError, TensorMeta

WEIGHTS = [(f"model.layers.{n // 2}.{'ab'[n % 2]}.weight", torch.randn(120_000, dtype=torch.float32)) for n in range(8)]
PATIENCE_SECONDS = 30.0
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


ABORTED = "aborted"


class Wire:
    """What the ends of one communicator share."""

    def __init__(self, world: int) -> None:
        self.to = [queue.Queue() for _ in range(world)]
        self.taken: queue.Queue = queue.Queue()


class Group:
    """One end of a communicator, as PyNcclCommunicator has it."""

    def __init__(self, group: Any, wire: Wire, log: list[str], name: str) -> None:
        self.group, self.wire, self.log, self.name = group, wire, log, name
        log.append(f"{name} made")

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        if self.group.rank == src:
            for receiver in self.wire.to[1:]:
                receiver.put(tensor.clone())
            for _ in self.wire.to[1:]:
                if self.wire.taken.get(timeout=PATIENCE_SECONDS) is ABORTED:
                    return
        elif (found := self.wire.to[self.group.rank].get(timeout=PATIENCE_SECONDS)) is not ABORTED:
            tensor.copy_(found)
            self.wire.taken.put(self.group.rank)

    def destroy(self) -> None:
        self.log.append(f"{self.name} destroyed")
        (self.wire.taken if self.group.rank == 0 else self.wire.to[self.group.rank]).put(ABORTED)


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
    """An engine's actor handle: every method has `.remote`, which answers with a future. Behind it are vLLM's worker-side engines."""

    def __init__(self, streams: Streams, workers: int = 1) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        self.models = [Model(streams) for _ in range(workers)]
        self.workers = [
            WeightTransferEngineFactory.create_engine(
                WeightTransferConfig(backend=ray_transfer.register_backend()),
                SimpleNamespace(
                    parallel_config=SimpleNamespace(data_parallel_index=0, world_size=workers, rank=rank),
                    model_config=None,
                ),
                torch.device("cpu"),
                model,
            )
            for rank, model in enumerate(self.models)
        ]
        self.pools = [ThreadPoolExecutor(1, f"worker {rank}") for rank in range(workers)]
        self.pool = ThreadPoolExecutor(1, "engine")
        self.aborted: list[str] = []
        self.init_weight_transfer_engine = self._remote(
            lambda info: self._on_workers(lambda worker: worker.init_transfer_engine(worker.parse_init_info(info)))
        )
        self.update_weights = self._remote(
            lambda info: self._on_workers(lambda worker: worker.receive_weights(worker.parse_update_info(info)))
        )
        self.start_weight_update = self._remote(
            lambda *_: self._on_workers(lambda worker: worker.model.waiting.clear())
        )
        self.finish_weight_update = self._remote(lambda *_: None)
        self.abort_weight_update = self._remote(self.aborted.append)

    def _on_workers(self, call: Callable[..., Any]) -> None:
        """In every worker at once. As in the real engine all of them have ended before the first one's error is raised."""
        calls = [pool.submit(call, worker) for pool, worker in zip(self.pools, self.workers, strict=True)]
        for error in [done.exception(PATIENCE_SECONDS) for done in calls]:
            if isinstance(error, SyncError):
                raise RayTaskError("update_weights", str(error), error)
            if error:
                raise error

    def _remote(self, call: Callable[..., Any]) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.pool.submit(call, *arguments))

    @property
    def found(self) -> list[dict[str, bool]]:
        """Of each worker: the tensors it has read, and whether their values are those that were sent."""
        sent = dict(WEIGHTS)
        return [
            {name: torch.equal(values, sent[name]) for name, values in model.found.items()} for model in self.models
        ]


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
    """Of ends of communicators made and destroyed, in order."""
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_common

    found: list[str] = []
    wires: list[Wire] = []

    def join(address: str, port: int, rank: int, world_size: int, device: Any) -> Group:
        group = StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=world_size)
        if rank == 0:
            wires.append(Wire(world_size))
        number = group.broadcast_obj(len(wires) - 1, src=0)  # not by the port, which the next group may be given again
        return Group(group, wires[number], found, f"rank {rank} of {world_size} in group {number}")

    def wait(futures: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done, _ = concurrent.futures.wait(futures, PATIENCE_SECONDS, concurrent.futures.FIRST_COMPLETED)
        return [*done][:1], []

    def get(futures: Any) -> Any:
        listed = futures if isinstance(futures, list) else [futures]
        return [future.result(PATIENCE_SECONDS) for future in listed]

    monkeypatch.setattr(nccl_common, "stateless_init_process_group", join)
    monkeypatch.setattr(ray_transfer.ray, "get", get)
    monkeypatch.setattr(ray_transfer.ray, "wait", wait)
    monkeypatch.setattr(ray_transfer.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ray_transfer, "_GLANCE_SECONDS", 0.05)
    return found


def source(streams: Streams) -> MegatronWeightSource:
    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in WEIGHTS:
            if streams.pending and streams.current != "default":
                streams.trouble.append(f"{name} is read on {streams.current} while the optimizer may still write it")
            yield name, tensor

    return MegatronWeightSource(weights, [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in WEIGHTS])


def transfer_to(engines: list[Engine], streams: Streams, workers: int = 1) -> NcclTransfer:
    return NcclTransfer(source(streams), engines, rank=0, bucket_mib=BUCKET_MIB, workers=workers)


ALL = {name: True for name, _ in WEIGHTS}


def test_weights_arrive_in_an_order_that_a_gpu_keeps(streams: Streams, log: list[str]) -> None:
    """Of a layer that spans two buckets both halves come on one stream, and nothing is read before the optimizer has written it."""
    engine = Engine(streams)
    transfer, [worker], [model] = transfer_to([engine], streams), engine.workers, engine.models
    assert transfer._engine.packed
    assert worker.packed
    assert transfer._engine.packed_num_buffers == worker.packed_num_buffers == 1
    assert transfer._engine.packed_buffer_size_bytes == worker.packed_buffer_size_bytes == BUCKET_MIB << 20
    for version in (1, 2):
        streams.pending = True  # the optimizer's last kernels are queued, not done
        report = transfer.send(version, with_fingerprints=True)
        assert not streams.trouble
        assert engine.found == [ALL]
        assert len(report.fingerprints) == len(WEIGHTS)
        assert not report.broken
        model.found.clear()
    assert len(streams.made) == 2  # one of the sender, one of the engine


def test_every_worker_of_every_engine_has_a_rank_of_its_own(streams: Streams, log: list[str]) -> None:
    engines = [Engine(streams, workers=2) for _ in range(2)]
    transfer = transfer_to(engines, streams, workers=2)
    assert sorted(log) == [f"rank {rank} of 5 in group 0 made" for rank in range(5)]
    ranks = [worker.model_update_group.group.rank for engine in engines for worker in engine.workers]
    assert ranks == [1, 2, 3, 4]
    transfer.send(1)
    assert [found for engine in engines for found in engine.found] == [ALL] * 4


def test_an_engine_gives_its_group_back_before_it_joins_another(streams: Streams, log: list[str]) -> None:
    """A second group is made whenever an engine was replaced; the survivors hold memory of the GPU in the first."""
    engine = Engine(streams)
    first = transfer_to([engine], streams)
    first.shutdown()
    transfer_to([engine], streams)
    own = [entry for entry in log if entry.startswith("rank 1")]
    assert own == [f"rank 1 of 2 in group {what}" for what in ("0 made", "0 destroyed", "1 made")]
    assert "rank 0 of 2 in group 0 destroyed" in log


@pytest.mark.parametrize("victim", [0, 1])
def test_an_engine_that_dies_in_a_broadcast_holds_up_nobody(victim: int, streams: Streams, log: list[str]) -> None:
    """Trainer and survivors give the communicator up, no survivor takes what was left of it for weights, and they get all in a new group."""
    engines = [Engine(streams, workers=2) for _ in range(2)]
    transfer = transfer_to(engines, streams, workers=2)

    def die(*_: Any) -> None:
        raise RayActorError

    engines[victim].update_weights = engines[victim]._remote(die)
    passes = []
    original = transfer._source._weights
    transfer._source._weights = lambda: (passes.append(name) or (name, tensor) for name, tensor in original())
    report = transfer.send(1)
    assert report.broken
    assert report.lost == (victim,)
    assert passes == [name for name, _ in WEIGHTS], "the other ranks of the trainer take part in a whole pass"
    survivor = engines[1 - victim]
    assert survivor.aborted == [f"rollout engines [{victim}] died during update_weights"]
    assert ALL not in survivor.found

    transfer.shutdown()
    report = transfer_to([survivor], streams, workers=2).send(1)
    assert not report.broken
    assert survivor.found == [ALL] * 2
    for rank in (1, 2) if victim == 1 else (3, 4):
        assert f"rank {rank} of 5 in group 0 destroyed" in log


def test_an_engine_that_died_before_the_update_is_left_out_of_the_next_group(streams: Streams, log: list[str]) -> None:
    engines = [Engine(streams) for _ in range(2)]
    transfer = transfer_to(engines, streams)

    def die(*_: Any) -> None:
        raise RayActorError

    engines[0].start_weight_update = engines[0]._remote(die)
    report = transfer.send(1)
    assert (report.broken, report.lost) == (True, (0,))
    assert engines[1].found == [{}]


def test_an_engine_that_refuses_is_an_error_and_ends_the_pass(streams: Streams, log: list[str]) -> None:
    engines = [Engine(streams) for _ in range(2)]
    transfer = transfer_to(engines, streams)
    refusal = SyncError("1 tensors are missing: a")

    def refuse(*_: Any) -> None:
        raise RayTaskError("start_weight_update", "", refusal)

    engines[1].start_weight_update = engines[1]._remote(refuse)
    with pytest.raises(SyncError, match="1 tensors are missing"):
        transfer.send(1)
    assert transfer.broken
    assert engines[0].aborted == ["1 tensors are missing: a"]


def test_a_trainer_that_dies_in_a_broadcast_leaves_no_engine_waiting(streams: Streams, log: list[str]) -> None:
    engine = Engine(streams)
    transfer = transfer_to([engine], streams)
    waiting = engine.update_weights.remote(
        {"names": ["model.layers.0.a.weight"], "dtype_names": ["float32"], "shapes": [[120_000]]}
    )
    del transfer._engine.model_update_group.group.store  # and with it the server
    with pytest.raises(RayTaskError, match="the broadcast of weights broke off"):
        waiting.result(PATIENCE_SECONDS)


def test_the_driver_sends_again_to_the_engines_that_live() -> None:
    from eureka_megatron.train.actor import TrainerGroup

    reports = [SyncReport(1, 8, 0, 0, 0.0, lost=(1,), broken=True), SyncReport(1, 8, 0, 0, 0.0, lost=(1,))]
    asked = []

    class Group(TrainerGroup):
        def __init__(self) -> None:
            pass

        def _all(self, method: str, *arguments: Any) -> list[Any]:
            asked.append(arguments[0])
            return [reports.pop(0)]

    report = Group().send_weights(["a", "b", "c", "d"], 1)
    assert asked == [["a", "b", "c", "d"], ["a", "c", "d"]]
    assert report.lost == (1, 2)
