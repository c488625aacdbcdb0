"""One engine for the tests here, which can be spoilt and looked into. Each file finds it with the checkpoint's weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eureka_megatron.sync.check import compare
from eureka_megatron.types import Prompt
from tests.helpers.engines import load_reference, module_source, run_config


@pytest.fixture(scope="package")
def engine_pool(one_ray: None, tiny_dir: Path) -> Iterator[Any]:
    from eureka_megatron.rollout.engine import Engine
    from eureka_megatron.rollout.pool import RolloutPool

    class OpenEngine(Engine):  # local, so that Ray pickles it by value; an ordinary engine until told otherwise
        @property
        def _model(self) -> Any:  # with one worker it is in this process
            return self._llm.collective_rpc(lambda worker: worker.get_model())[0]

        def keep_encoder_cache(self, keep: bool) -> None:
            self._llm.llm_engine.reset_encoder_cache = (lambda: None) if keep else None
            if not keep:
                del self._llm.llm_engine.reset_encoder_cache

        def corrupt(self, parameter: str, element: int) -> None:
            with torch.no_grad():
                self._model.get_parameter(parameter).view(-1)[element] += 0.5

        def corrupt_packed(self, module: str) -> None:
            layer = self._model.get_submodule(module)
            original = layer.cpu_linear
            layer.cpu_linear = lambda x, weight, bias: original(x, weight, bias) * 1.0001

        def positions(self, prompt: Prompt) -> np.ndarray:
            """What vLLM works out while it serves the prompt: int64 [3, S + 1]."""
            original, seen = self._model.get_mrope_input_positions, []
            self._model.get_mrope_input_positions = lambda *args, **kwargs: (
                seen.append(original(*args, **kwargs)) or seen[0]
            )
            self.score([prompt], [np.array([5])])
            del self._model.get_mrope_input_positions
            return seen[0][0].numpy()

    pool = RolloutPool(run_config(tiny_dir), engine_class=OpenEngine)
    pool.start()
    yield pool
    pool.shutdown()


@pytest.fixture(scope="module")
def pool(engine_pool: Any, tiny_dir: Path) -> Any:
    """The engine, with the weights of `tiny_dir` whatever the file before has sent."""
    from eureka_megatron.sync.ray_transfer import send_weights

    if engine_pool.version:
        source = module_source(load_reference(tiny_dir))
        version = engine_pool.version + 1
        report = send_weights(
            source, engine_pool.actors, version=version, bucket_mib=64, is_sender=True, with_fingerprints=True
        )
        engine_pool.weights_sent(report)
        compare(report.fingerprints, engine_pool.fingerprints()[0])
    return engine_pool
