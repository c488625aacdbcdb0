"""Ranks and an engine that take turns on the same machine: the same run, call by call, as with processes apart, also when the engine is killed."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from eureka_megatron.config import load_config
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.rollout.pool import RolloutPool
from eureka_megatron.run.placement import FILE
from eureka_megatron.tracking.tracker import read_metrics
from eureka_megatron.train.actor import TrainerGroup

pytestmark = [pytest.mark.slow, pytest.mark.system]

CONFIG = """
model: {path: model, dtype: float32, freeze: [vision]}
data: {train: data/train.jsonl, min_pixels: 784, max_pixels: 50176, max_prompt_tokens: 96}
rollout: {samples_per_prompt: 4, max_response_tokens: 16, max_model_tokens: 160, kv_cache_gib: 0.3}
algorithm: {loss_options: {entropy_coefficient: 0.1}, filter: {enabled: false}}
optimizer: {lr: 1.0e-3, schedule: constant, warmup_ratio: 0}
training: {steps: 2, prompts_per_step: 4, responses_per_update: 8, max_tokens_per_micro_batch: 4096}
checkpoint: {every: 1}
sync: {check_every: 1}
tracking: {wandb: disabled, tensorboard: false}
"""
# What the driver asks for, in order; what a call brings with it stands behind it.
START = ["start", "rest", "init", "send_weights", "start_phase", "sleep", "resume"]
STEPS = [
    *("generate", "rest", "wake weights kv_cache", "train", "sleep", "kill", "resume"),
    # the first of the two to the engine that was killed
    *("rest", "wake weights", "send_weights", "send_weights", "save"),
    *("generate", "wake kv_cache", "train", "sleep", "resume"),
    *("rest", "wake weights", "send_weights", "save"),
]
COLOCATED_ONLY = {"rest", "resume", "sleep", "wake weights", "wake kv_cache", "wake weights kv_cache", "kill"}


def watch(patch: pytest.MonkeyPatch, calls: list[str], bytes_asleep: list[int], *, kills: bool) -> None:
    """Note the calls that matter, in the order in which the driver makes them. kills: the engine, once it sleeps for the first update."""
    import ray

    def kv_bytes(engine: Any) -> int:  # local, so that Ray pickles it by value
        """Of an engine's KV cache."""
        core = engine._llm.llm_engine.engine_core.engine_core
        caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
        return sum(cache.untyped_storage().nbytes() for cache in caches)

    def noted(owner: type, method: str, name: str | None = None) -> None:
        whole = getattr(owner, method)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            calls.append(name or " ".join([method, *(a for a in arguments if isinstance(a, str))]))
            answer = whole(self, *arguments, **options)
            if method == "sleep":
                bytes_asleep.extend(ray.get([actor.__ray_call__.remote(kv_bytes) for actor in self.actors]))
                if kills and calls.count("train") == 1:
                    calls.append("kill")
                    os.kill(self.status()[0]["pid"], signal.SIGKILL)
            return answer

        patch.setattr(owner, method, call)

    for method in ("start", "rest", "resume", "start_phase", "train", "send_weights", "save"):
        noted(TrainerGroup, method)
    for method in ("sleep", "wake", "generate"):
        noted(RolloutPool, method)
    noted(RolloutPool, "__init__", "init")


def test_a_colocated_run_is_the_split_run(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from eureka_megatron.loop import train

    write_counting(tmp_path / "data", train=24, test=4, noise=0.3)
    build_published(tmp_path / "model", randomize_all=True)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    metrics: dict[str, list[dict[str, float]]] = {}
    calls: dict[str, list[str]] = {"split": [], "colocated": []}
    asleep: list[int] = []
    for placement, found in calls.items():
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, found, asleep, kills=placement == "colocated")
            train(load_config("run.yaml", [f"placement={placement}", f"run.output={placement}"]))
        rows = read_metrics(tmp_path / placement / "metrics.jsonl")
        timed = ("time", "second")
        metrics[placement] = [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in rows]
        assert f'"placement": "{placement}"' in (tmp_path / placement / FILE).read_text()
        assert "trainer" in capsys.readouterr().out
    # But for the engine's rounding, which depends on the responses that its steps happen to hold together:
    # equal in three runs of four, and what differed in the fourth was not printed.
    for own, other in zip(metrics["colocated"], metrics["split"], strict=True):
        assert own.keys() == other.keys()
        pairs = {name: (value, other[name]) for name, value in own.items() if value != other[name]}
        assert not {n: p for n, p in pairs.items() if p[0] != pytest.approx(p[1], rel=1e-4, abs=1e-5)}
    assert [row["train/grad_norm"] > 0 for row in metrics["split"]] == [True, True], "it learns"
    assert calls["colocated"] == START + STEPS
    together = [call for call in calls["colocated"] if call not in COLOCATED_ONLY]
    assert sorted([*calls["split"], "send_weights"]) == sorted(together), "and nothing else is called"
    assert asleep == [0, 0, 0], "bytes of KV cache while the trainer works"
