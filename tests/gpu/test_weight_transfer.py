"""Weights by NCCL into engines on GPUs of their own: all of them arrive, and an engine that dies in a broadcast holds up nobody. Not run yet."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from eureka_megatron.sync.check import compare
from tests.helpers.engines import load_reference, module_source, private_ray, run_config

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs: trainer and engine")]


def _sender(directory: Path) -> Any:
    """An actor with a GPU, in the place of trainer rank 0."""

    class Sender:
        def __init__(self) -> None:
            self.model = load_reference(directory).to("cuda", torch.bfloat16)
            self.transfer: Any = None

        def send(self, engines: Sequence[Any], version: int, workers: int) -> Any:
            """To a new group each time, as after an engine was replaced."""
            from eureka_megatron.sync.ray_transfer import NcclTransfer

            if self.transfer is not None:
                self.transfer.shutdown()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            source = module_source(self.model)
            self.transfer = NcclTransfer(source, engines, rank=0, bucket_mib=1, workers=workers)
            return self.transfer.send(version, with_fingerprints=True)

    return ray.remote(Sender).options(num_gpus=1).remote()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 3, reason="needs three GPUs"))])
def test_every_worker_gets_its_shards(workers: int, tiny_dir: Path) -> None:
    from eureka_megatron.rollout.pool import RolloutPool

    with private_ray(gpus=GPUS):
        pool = RolloutPool(run_config(tiny_dir, dtype="bfloat16", tensor=workers))
        pool.start()
        sender = _sender(tiny_dir)
        for version in (1, 2):
            report = ray.get(sender.send.remote(pool.actors, version, workers))
            pool.weights_sent(report)
            compare(report.fingerprints, pool.fingerprints()[0])  # raises on any difference
            assert (report.broken, report.lost) == (False, ())
        pool.shutdown()


@pytest.mark.skipif(GPUS < 3, reason="needs three GPUs: trainer and two engines")
def test_an_engine_that_dies_in_a_broadcast_holds_up_nobody(tiny_dir: Path) -> None:
    from eureka_megatron.rollout.engine import Engine
    from eureka_megatron.rollout.pool import RolloutPool

    class Doomed(Engine):  # local, so that Ray pickles it by value
        doomed = False

        def doom(self) -> None:
            self.doomed = True

        def update_weights(self, *arguments: Any) -> None:
            if self.doomed:
                os._exit(1)
            super().update_weights(*arguments)

    with private_ray(gpus=GPUS):
        pool = RolloutPool(run_config(tiny_dir, dtype="bfloat16", engines=2), engine_class=Doomed)
        pool.start()
        survivor, victim = pool.actors
        ray.get(victim.doom.remote())
        sender = _sender(tiny_dir)
        report = ray.get(sender.send.remote(pool.actors, 1, 1), timeout=120)
        assert (report.broken, report.lost) == (True, (1,))
        report = ray.get(sender.send.remote([survivor], 1, 1))
        compare(report.fingerprints, ray.get(survivor.checksums.remote()))
        pool.shutdown()
