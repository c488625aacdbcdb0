"""Two engines, one of which is killed: the work is finished, by an engine that has the current weights."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from eureka_megatron.errors import UserError
from tests.helpers.engines import Prompts, load_reference, module_source, noise_picture, run_config, worst

pytestmark = pytest.mark.system

OPTIONS: dict[str, Any] = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_tokens": 200}


@pytest.fixture(scope="module")
def pool(one_ray: None, tiny_dir: Path) -> Iterator[Any]:
    from eureka_megatron.rollout.pool import RolloutPool

    pool = RolloutPool(run_config(tiny_dir, engines=2))
    pool.start()
    yield pool
    pool.shutdown()


@pytest.fixture(scope="module")
def trainer(tiny_dir: Path) -> Any:
    model = load_reference(tiny_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def questions(tiny_dir: Path) -> list[Any]:
    prompts = Prompts(tiny_dir)
    return [prompts.make(f"q{i}", "How many circles are there?", [noise_picture(i)]) for i in range(12)]


def _kill_soon(pid: int) -> threading.Thread:
    """While the engine of this process is sampling: once it has computed for a tenth of a second."""
    process = psutil.Process(pid)
    before = process.cpu_times().user

    def kill() -> None:
        while process.cpu_times().user < before + 0.1:
            time.sleep(0.005)
        process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _gone(pid: int) -> bool:
    """Whether a process ends within half a minute; Ray gives one that it kills some seconds to end by itself."""
    try:
        process = psutil.Process(pid)
        for _ in range(150):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.2)
    except psutil.NoSuchProcess:
        return True
    return False


def test_the_prompts_of_killed_engines_are_done_again_with_the_current_weights(
    pool: Any, trainer: Any, questions: list[Any], tiny_dir: Path
) -> None:
    """Once there is a source of weights: the first call ends with an error for want of one, and the second replaces both engines."""
    from eureka_megatron.sync.ray_transfer import send_weights

    def send(engines: list[Any], wait: bool = True) -> Any:
        return send_weights(module_source(trainer), engines, version=1, bucket_mib=64, is_sender=True)

    pool.weights_sent(send(pool.actors))
    undisturbed = pool.generate(questions, **OPTIONS, seed=2)
    victims = [status["pid"] for status in pool.status()]
    thread = _kill_soon(victims[1])
    with pytest.raises(UserError, match=r"engine 1 died and its replacement cannot get the weights of version 1"):
        pool.generate(questions, **OPTIONS, seed=1)
    thread.join()
    assert pool.restarts == 0
    pool.resend = send
    thread = _kill_soon(victims[0])
    groups = pool.generate(questions, **OPTIONS, seed=2)
    thread.join()
    assert pool.restarts == 2
    assert [status["weight_version"] for status in pool.status()] == [1, 1]
    assert not {status["pid"] for status in pool.status()} & set(victims)
    assert [group.prompt.id for group in groups] == [question.id for question in questions]
    assert {rollout.weight_version for group in groups for rollout in group.rollouts} == {1}
    assert worst(trainer, tiny_dir, questions, groups) <= 1e-5
    for group, expected in zip(groups, undisturbed, strict=True):  # per-request seeds: nothing shows that it happened
        for rollout, other in zip(group.rollouts, expected.rollouts, strict=True):
            assert np.array_equal(rollout.tokens_R, other.tokens_R)


def test_an_engine_that_no_longer_answers_is_replaced(pool: Any, questions: list[Any]) -> None:
    undisturbed = pool.generate(questions, **OPTIONS, seed=3)
    restarts, victim = pool.restarts, pool.status()[1]["pid"]
    pool.timeout_seconds = 8.0  # a slice takes a fraction of a second
    os.kill(victim, signal.SIGSTOP)
    try:
        groups = pool.generate(questions, **OPTIONS, seed=3)
        assert _gone(victim), "its memory and its GPU are free again"
    finally:
        pool.timeout_seconds = 3600.0
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    assert pool.restarts == restarts + 1
    assert pool.status()[1]["pid"] != victim
    for group, expected in zip(groups, undisturbed, strict=True):
        for rollout, other in zip(group.rollouts, expected.rollouts, strict=True):
            assert np.array_equal(rollout.tokens_R, other.tokens_R)


def test_an_engine_that_dies_during_a_sync_is_replaced_and_the_others_are_complete(pool: Any, trainer: Any) -> None:
    from eureka_megatron.sync.check import compare
    from eureka_megatron.sync.ray_transfer import send_weights

    def send(engines: list[Any], version: int) -> Any:
        return send_weights(
            module_source(trainer), engines, version=version, bucket_mib=1, is_sender=True, with_fingerprints=True
        )

    os.kill(pool.status()[1]["pid"], signal.SIGKILL)
    report = send(pool.actors, 5)
    assert report.lost == (1,)
    pool.resend = lambda engines, wait: send(engines, 5)
    pool.weights_sent(report)
    assert [status["weight_version"] for status in pool.status()] == [5, 5]
    for found in pool.fingerprints().values():
        compare(report.fingerprints, found)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, pool: Any) -> None:
    from eureka_megatron.rollout.pool import RolloutPool

    broken = RolloutPool(run_config(tmp_path))
    with pytest.raises(
        UserError, match=rf"rollout engine 0 did not start: .*{tmp_path.name}/config.json does not exist"
    ):
        broken.start()
    broken.shutdown()
