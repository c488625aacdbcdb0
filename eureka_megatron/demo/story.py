"""`eureka demo`: the whole story on this machine, with the same code that runs on a cluster.

Made-up data → a tiny Qwen2.5-VL → supervised cold start → GRPO on two trainer ranks and one vLLM engine → Hugging Face export → the export
loaded in transformers and in a fresh vLLM engine, both scored on the test set. Nothing is downloaded and nothing is mocked.

The cold start imitates a teacher who sees well and answers carelessly, on purpose: imitation cannot get past 0.56, what the accuracy gains
afterwards the reward has taught.
"""

import json
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from eureka_megatron.config import OptimizerSection, RunConfig, load_config
from eureka_megatron.data.dataset import PromptStream
from eureka_megatron.data.processor import make_processor
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.loop import reinforce
from eureka_megatron.rewards import Rewarder
from eureka_megatron.rollout.collector import Collector
from eureka_megatron.rollout.pool import RolloutPool
from eureka_megatron.run.cluster import start_ray
from eureka_megatron.run.inputs import open_dataset, reward_rules
from eureka_megatron.run.run import Run
from eureka_megatron.run.sft import in_steps, supervise
from eureka_megatron.session import LOCK_FILE
from eureka_megatron.tracking.console import tell
from eureka_megatron.tracking.curves import draw_curves
from eureka_megatron.tracking.tracker import Tracker
from eureka_megatron.types import Prompt

MARKER = ".eureka-demo"  # only a folder that holds this is ever replaced
CONFIG = Path(__file__).with_name("demo.yaml")
TEACHER_NOISE = 0.55  # share of the teacher's answers drawn at random: imitation ends at 1 − 0.8 · 0.55 = 0.56 at best
SFT_OPTIMIZER = OptimizerSection(name="adam", lr=2e-3, schedule="cosine", warmup_ratio=0.05, clip_grad=1.0)
# About 1/√width. From the large models' 0.02 a tower this narrow needs several times as many steps until it sees.
INITIALIZER_RANGE = 0.08
TRAIN_PICTURES, TEST_PICTURES = 6000, 200


def run_demo(out: Path, overrides: list[str]) -> dict[str, Any]:
    """Everything into `out`; → what stands in its summary.json.

    Raises:
        UserError: `out` holds something that no earlier demo wrote.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # flashes of a hundred tiny tensors
    started = time.monotonic()
    _claim(out)
    config = demo_config(out.absolute(), overrides)  # workers start in folders of their own
    tell(f"drawing {TRAIN_PICTURES:,} pictures to count in, and a small model to learn it …")
    with PeakMemory() as memory:
        write_counting(
            out / "data", train=TRAIN_PICTURES, test=TEST_PICTURES, seed=config.run.seed, noise=TEACHER_NOISE
        )
        build_published(config.model.path, seed=config.run.seed, initializer_range=INITIALIZER_RANGE)
        story = _train(config, out)
        print("loading the export in transformers and in a fresh vLLM engine …", flush=True)
        story |= score_export(config, out / "hf")
    levels = {"Accuracy": {"before": story["accuracy_before"], "after": story["accuracy_after"]}}
    draw_curves(out / "metrics.jsonl", out / "curves.png", title="eureka demo: learning to count", levels=levels)
    summary = story | {
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gib": round(memory.peak_bytes / 2**30, 2),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"accuracy on unseen pictures {summary['accuracy_before']:.2f} → {summary['accuracy_after']:.2f} by reward alone, "
        f"in {summary['seconds']:.0f} s\nlook at {out / 'curves.png'}, {out / 'summary.json'} and the model in {out / 'hf'}"
    )
    return summary


def demo_config(out: Path, overrides: list[str]) -> RunConfig:
    """demo.yaml with this folder's paths."""
    paths = {
        "run.output": out,
        "model.path": out / "model",
        "data.train": out / "data" / "train.jsonl",
        "data.test": out / "data" / "test.jsonl",
    }
    return load_config(CONFIG, [*(f"{key}={value}" for key, value in paths.items()), *overrides])


def _claim(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found = [path for path in out.iterdir() if path.name != LOCK_FILE]
    if found and not (out / MARKER).is_file():
        raise UserError(f"{out} is not empty and not from an earlier demo; name another folder with --out")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / MARKER).touch()


def _train(config: RunConfig, out: Path) -> dict[str, Any]:
    """Cold start, evaluation, reinforcement learning, evaluation, export: one set of ranks and one engine throughout."""
    with Run(config) as run:
        dataset = open_dataset(config, config.data.train, run.processor, response_key=config.sft.responses)
        cold_start = in_steps(config.model_copy(update={"optimizer": SFT_OPTIMIZER}), len(dataset))
        with Tracker(cold_start, out, stage="sft") as tracker:
            supervise(run.trainer, dataset, cold_start, tracker)
        with Tracker(config, out) as tracker:
            run.sync_weights(check=True)
            tracker.say("how well it counts after the cold start …")
            before = run.evaluate()
            tracker.say(f"after the cold start: accuracy {before['accuracy']:.3f} sampled on unseen test pictures")
            history = reinforce(run, tracker)
            after = run.evaluate()
            tracker.say(f"after reinforcement learning: accuracy {after['accuracy']:.3f}, sampled alike")
        run.export(out / "hf", {"accuracy on the test set, sampled": after["accuracy"]})
        layout = run.layout
    trained = [metrics for metrics in history if "train/reward" in metrics]
    return {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "reward_before": before["total"],
        "reward_after": after["total"],
        "reward_first": trained[0]["rollout/reward"],
        "reward_last": trained[-1]["rollout/reward"],
        "sft_steps": cold_start.sft.steps,
        "steps": len(history),
        "trainer_layout": layout,
        "rollout_engine": "vllm",
        "logprob_max_abs_diff": max(metrics["train/logprob_abs_diff_max"] for metrics in trained),
        "weight_sync_seconds": median(metrics["sync/seconds"] for metrics in trained),
    }


def score_export(config: RunConfig, directory: Path) -> dict[str, float]:
    """Accuracy on the test set of the exported directory, sampled at temperature 1, by transformers and by vLLM."""
    exported = config.model_copy(update={"model": config.model.model_copy(update={"path": directory})})
    with ExitStack() as stack:
        rewarder = stack.enter_context(Rewarder(reward_rules(config)))
        start_ray(stack)
        pool = RolloutPool(exported)  # loads while transformers generates
        stack.callback(pool.shutdown)
        assert exported.data.test is not None, "demo.yaml names it"
        dataset = open_dataset(exported, exported.data.test, make_processor(exported))
        prompts = list(dataset)

        texts = _generate_with_transformers(exported, prompts)
        verdicts = rewarder.judge(
            [
                {"id": one.id, "prompt": one.text, "response": text, "answer": one.answer, "length_tokens": 0}
                for text, one in zip(texts, prompts, strict=True)
            ]
        )
        pool.start()
        # The same seeds as in training: the fresh engine must repeat the trained one's answers.
        by_vllm = Collector(pool, rewarder.judge, PromptStream(dataset), config).evaluate(prompts)["accuracy"]
    by_transformers = sum(verdict["accuracy"] for verdict in verdicts) / len(verdicts)
    return {"accuracy_export_transformers": by_transformers, "accuracy_export_vllm": by_vllm}


def _generate_with_transformers(config: RunConfig, prompts: list[Prompt], batch_size: int = 50) -> list[str]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = config.model.path
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    torch.manual_seed(config.run.seed)
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        inputs = processor(
            text=[prompt.text for prompt in part],
            images=[picture.image for prompt in part for picture in prompt.pictures],
            padding=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                repetition_penalty=1.0,  # all of it said here: published sampling defaults would go before
                max_new_tokens=config.rollout.max_response_tokens,
            )
        answers = output[:, inputs["input_ids"].shape[1] :]
        texts += processor.batch_decode(answers, skip_special_tokens=True)
    return texts


class PeakMemory:
    """Largest sum of proportional set sizes of this process and its descendants, sampled every two seconds."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(2.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue  # ended between listing and asking
            self.peak_bytes = max(self.peak_bytes, total)
