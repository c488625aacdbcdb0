"""The peer of step.py: steps of TRL's GRPOTrainer, timed. Runs in TRL's own environment, knows nothing of this package.

    PEER/bin/python tools/benchmark/trl_peer.py --model DIR --data FILE.jsonl --prompts 8 --samples 8 --tokens 32 --steps 10

Prints one JSON line: seconds of each step, and of them in generation (tokenizing and processing of pictures included), forward, backward.
Settings are TRL's fastest for this work: no recomputation, fp32 as it is on CPUs, no reference, all responses in one batch, so that it needs no pass for old
log-probabilities. All responses are `--tokens` long: `min_new_tokens` bars the end tokens.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as Picture
from transformers import AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def questions(file: Path, count: int) -> Dataset:
    """Prompts as TRL wants them, with the picture in a column of its own; rows repeat when the file has fewer."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = []
    for number in range(count):
        (turn,) = json.loads(rows[number % len(rows)]["message"])
        picture, text = turn["content"]
        content = [{"type": "image"}, {"type": "text", "text": text["text"]}]
        found.append({"prompt": [{"role": "user", "content": content}], "image": str(file.parent / picture["image"])})
    return Dataset.from_list(found).cast_column("image", Picture())


def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Cheap, and different within a group."""
    return [float(sum(tokens) % 7) for tokens in completion_ids]


class Clock(TrainerCallback):
    """Seconds between ends of steps, and those spent inside of wrapped functions meanwhile."""

    def __init__(self) -> None:
        self.last = 0.0
        self.inside: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.lengths: set[int] = set()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = inner(*arguments, **options)
            self.inside[part] = self.inside.get(part, 0.0) + time.perf_counter() - start
            return found

        setattr(owner, name, timed)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        if self.last:
            self.steps.append({"step": now - self.last, **self.inside})
        self.last, self.inside = now, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    for name in ("prompts", "samples", "tokens", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    clock = Clock()

    def judged(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.lengths.update(map(len, completion_ids))
        return reward(completions, completion_ids)

    with tempfile.TemporaryDirectory() as output:
        config = GRPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=options.prompts * options.samples,
            gradient_accumulation_steps=1,
            num_generations=options.samples,
            num_iterations=1,
            max_completion_length=options.tokens,
            generation_kwargs={"min_new_tokens": options.tokens},
            temperature=1.0,
            beta=0.0,
            loss_type="grpo",
            learning_rate=1e-6,
            max_steps=options.steps,
            model_init_kwargs={"dtype": "float32"},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        processor = AutoProcessor.from_pretrained(options.model)
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        trainer = GRPOTrainer(
            model=options.model,
            reward_funcs=judged,
            args=config,
            train_dataset=questions(options.data, options.prompts * options.steps),
            processing_class=processor,
            callbacks=[clock],
        )
        clock.wrap(trainer, "_generate", "generate")
        clock.wrap(trainer, "compute_loss", "forward")
        clock.wrap(trainer.accelerator, "backward", "backward")
        trainer.train()
    assert clock.lengths == {options.tokens}, f"responses of {sorted(clock.lengths)} tokens"
    print(json.dumps(clock.steps))


if __name__ == "__main__":
    main()
