"""Megatron shards into vLLM: every trainer rank in lockstep, tensors gathered under Hugging Face names, equal on both sides to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eureka_megatron.config import make_config
from eureka_megatron.sync.check import compare, fingerprints
from eureka_megatron.sync.source import module_source
from tests.helpers.engines import load_reference, private_ray, run_config

pytestmark = pytest.mark.system

LAYOUTS = {"tp2_sp": {"tensor": 2, "sequence_parallel": True}, "pp2": {"pipeline": 2}}


@pytest.fixture(scope="module")
def pool(tiny_dir: Path) -> Iterator[Any]:
    from eureka_megatron.rollout.pool import RolloutPool

    with private_ray():
        pool = RolloutPool(run_config(tiny_dir))
        pool.start()
        yield pool
        pool.shutdown()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_arrive_as_the_checkpoint_they_were_loaded_from(pool: Any, tiny_dir: Path, layout: str) -> None:
    from eureka_megatron.models.qwen2_5_vl.tiny import build_tiny
    from eureka_megatron.train.actor import TrainerGroup

    other = build_tiny(
        tiny_dir.parent / f"other_{layout}", seed=7, randomize_all=True
    )  # not what the engine started with
    values = run_config(other).model_dump() | {"parallel": LAYOUTS[layout]}
    group = TrainerGroup(make_config(values))
    try:
        group.start()
        for version in (1, 2):  # the second update finds everything set up
            report = group.send_weights(pool.actors, version, with_fingerprints=True)
            pool.weights_sent(report)
            compare(report.fingerprints, pool.fingerprints()[0])
            compare(fingerprints(module_source(load_reference(other))), report.fingerprints, where="trainer")
            print(f"{layout}: weight sync in {report.seconds:.3f} s")
    finally:
        group.close()
