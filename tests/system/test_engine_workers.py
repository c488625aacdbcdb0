"""An engine of two workers, each a process with its shards: it samples, takes weights, is compared and ends as one. One engine for the module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from eureka_megatron.demo.forms import build_published
from eureka_megatron.sync.check import compare
from eureka_megatron.sync.ray_transfer import send_weights
from eureka_megatron.sync.source import MegatronWeightSource, SyncError, TensorMeta
from tests.helpers.engines import Prompts, load_reference, module_source, run_config, score, worst

pytestmark = pytest.mark.system

OPTIONS: dict[str, Any] = {"n": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 16}
PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one key and value head, of which both workers have a copy; everything else is split."""
    return build_published(tmp_path_factory.mktemp("one-kv-head") / "hf", kv_heads=1, randomize_all=True)


@pytest.fixture(scope="module")
def pool(one_ray: None, tiny_dir: Path) -> Iterator[Any]:
    from eureka_megatron.rollout.engine import Engine
    from eureka_megatron.rollout.pool import RolloutPool

    class Corruptible(Engine):  # local, so that Ray pickles it by value
        def corrupt(self, rank: int, parameter: str) -> None:
            def change(worker: Any) -> None:
                if worker.rank != rank:
                    return
                path, _, leaf = parameter.rpartition(".")
                module = worker.get_model().get_submodule(path)
                if not getattr(module, leaf).numel():  # packed for the CPU's kernels, and freed
                    original = module.cpu_linear
                    module.cpu_linear = lambda x, weight, bias: original(x, weight, bias) * 1.0001
                else:
                    with torch.no_grad():
                        getattr(module, leaf).view(-1)[1] += 0.5

            self._llm.collective_rpc(change)

    pool = RolloutPool(run_config(tiny_dir, tensor=2), engine_class=Corruptible)
    pool.start()
    yield pool
    pool.shutdown()


@pytest.fixture
def trainer(tiny_dir: Path) -> Any:
    return load_reference(tiny_dir)


def _change(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # of the vision tower too
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _send(pool: Any, source: MegatronWeightSource, version: int) -> Any:
    report = send_weights(source, pool.actors, version=version, is_sender=True, bucket_mib=1, with_fingerprints=True)
    pool.weights_sent(report)
    return report


def test_two_workers_take_new_weights_and_serve_them(pool: Any, trainer: Any, tiny_dir: Path) -> None:
    mixture = Prompts(tiny_dir).mixture()
    before = pool.generate(mixture, **OPTIONS, seed=1)  # fills the caches with these pictures
    assert worst(trainer, tiny_dir, mixture, before) <= 1e-5
    _change(trainer, 1)
    report = _send(pool, module_source(trainer), 1)
    assert report.buckets > 5  # of layers that span two buckets the first half must stay
    compare(report.fingerprints, pool.fingerprints()[0])
    for temperature in (1.0, 0.6):
        after = pool.generate(mixture, **OPTIONS | {"temperature": temperature}, seed=1)
        difference = worst(trainer, tiny_dir, mixture, after, temperature)
        print(f"largest difference to transformers at temperature {temperature}: {difference:.2e}")
        assert difference <= 1e-5  # measured 2.4e-6
    assert worst(trainer, tiny_dir, mixture, before) > 1e-3  # so the change did matter


def test_asleep_they_take_weights_before_their_kv_cache_is_back(pool: Any, trainer: Any, tiny_dir: Path) -> None:
    mixture = Prompts(tiny_dir).mixture()
    pool.sleep()
    pool.wake("weights")
    _change(trainer, 2)
    compare(_send(pool, module_source(trainer), 1).fingerprints, pool.fingerprints()[0])
    pool.wake("kv_cache")
    difference = worst(trainer, tiny_dir, mixture, pool.generate(mixture, **OPTIONS, seed=2))
    print(f"largest difference to transformers after sleep: {difference:.2e}")
    assert difference <= 1e-5  # measured 1.4e-6


@pytest.mark.parametrize(
    ("rank", "parameter", "said"),
    [
        (0, "language_model.model.embed_tokens.weight", r"1 of 105 tensors differ .*: model.embed_tokens.weight: sent"),
        (1, "language_model.model.embed_tokens.weight", r"1 of 105 tensors differ .*: model.embed_tokens.weight: sent"),
        (1, "visual.blocks.1.attn.qkv.bias", r"1 of 105 tensors differ .*: visual.blocks.1.attn.qkv.bias: sent"),
        (0, "language_model.model.layers.1.self_attn.o_proj.weight", r"1 of 105 .*: model.layers.1.self_attn.o_proj.w"),
        (1, "language_model.model.norm.weight", r"1 tensors are not the same in all workers .*: model.norm.weight"),
    ],
)
def test_a_shard_that_is_wrong_in_one_worker_is_named(
    pool: Any, trainer: Any, rank: int, parameter: str, said: str
) -> None:
    report = _send(pool, module_source(trainer), 2)
    ray.get(pool.actors[0].corrupt.remote(rank, parameter))
    with pytest.raises(SyncError, match=said):
        compare(report.fingerprints, pool.fingerprints()[0])


def test_an_update_that_breaks_off_serves_nothing_until_a_whole_one_came(
    pool: Any, trainer: Any, tiny_dir: Path
) -> None:
    """Every worker's error is taken back with it: none is left for the next call."""
    named = list(module_source(trainer))
    declared = [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield from named[:60]
        raise RuntimeError("a rank lost its shard")

    with pytest.raises(SyncError, match="1 tensors are missing"):
        _send(pool, MegatronWeightSource(lambda: named[1:], declared[1:]), 3)
    with pytest.raises(RuntimeError, match="a rank lost its shard"):
        _send(pool, MegatronWeightSource(breaking, declared), 3)
    with pytest.raises(SyncError, match="weights are a mixture: weight update to version 3 failed half-way"):
        score(pool, Prompts(tiny_dir).mixture()[:1], [np.array([5])])
    start = pool.actors[0].start_weight_update.remote(declared, 4)
    with pytest.raises(ray.exceptions.RayTaskError, match=r"never came: .*of the engine were not loaded"):
        ray.get([start, pool.actors[0].finish_weight_update.remote()])
    compare(_send(pool, module_source(trainer), 5).fingerprints, pool.fingerprints()[0])


def test_no_engine_outlives_a_worker_and_no_worker_its_engine(pool: Any, trainer: Any, tiny_dir: Path) -> None:
    def send(engines: list[Any], wait: bool = True) -> Any:
        return send_weights(module_source(trainer), engines, version=5, is_sender=True, bucket_mib=64)

    pool.resend = send
    mixture = Prompts(tiny_dir).mixture()
    processes = _processes(pool)
    processes[2].kill()
    assert _alive(processes) == []
    assert worst(trainer, tiny_dir, mixture, pool.generate(mixture, **OPTIONS, seed=1)) <= 1e-5
    assert pool.restarts == 1
    engine, _, worker = processes = _processes(pool)
    worker.suspend()  # reads no pipe, as if it were in a kernel
    engine.kill()
    assert _alive(processes) == []


def _processes(pool: Any) -> list[psutil.Process]:
    """The engine's and its workers'."""
    status = pool.status()[0]
    assert len({status["pid"], *status["workers"]}) == 3
    return [psutil.Process(pid) for pid in (status["pid"], *status["workers"])]


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, left = psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
    return [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
