"""The other way models come: output layer tied to the embedding, weights in bfloat16. One engine for the module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eureka_megatron.sync.check import compare
from tests.helpers.engines import load_reference, module_source, run_config

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def pool(one_ray: None, tied_tiny_dir: Path) -> Iterator[Any]:
    from eureka_megatron.rollout.pool import RolloutPool

    pool = RolloutPool(run_config(tied_tiny_dir, dtype="bfloat16"))
    pool.start()
    yield pool
    pool.shutdown()


def test_the_engine_starts_with_the_checkpoints_weights_and_takes_new_ones(pool: Any, tied_tiny_dir: Path) -> None:
    """The packed copy of a tied output layer must follow: vLLM's own reload leaves it behind on a CPU."""
    from eureka_megatron.sync.check import fingerprints
    from eureka_megatron.sync.ray_transfer import send_weights

    model = load_reference(tied_tiny_dir)
    source = module_source(model, dtype=torch.bfloat16)  # fp32 on the trainer's side, cast as it is sent
    engine = pool.fingerprints()[0]
    compare(fingerprints(source), engine)
    assert "lm_head.weight" in engine
    assert "lm_head.weight" not in dict(source)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        report = send_weights(
            source, pool.actors, version=version, bucket_mib=64, is_sender=True, with_fingerprints=True
        )
        pool.weights_sent(report)
        compare(report.fingerprints, pool.fingerprints()[0])
