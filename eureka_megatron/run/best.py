"""The weights that an evaluation liked most: `run.output`/hf_best, a Hugging Face directory, with best.json beside it.

{"metric": "eval/accuracy", "value": 0.81, "step": 120}
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from eureka_megatron.config import RunConfig

if TYPE_CHECKING:
    from eureka_megatron.run.run import Run


class Best:
    """Watches `training.evaluate_best`. A resumed run goes on from what is written down."""

    def __init__(self, config: RunConfig) -> None:
        self.metric, self.folder = config.training.evaluate_best, config.run.output / "hf_best"
        self.path = config.run.output / "best.json"
        self.value = -float("inf")
        if self.metric and self.path.exists() and self.folder.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["metric"] == self.metric:
                self.value = found["value"]

    def after(self, step: int, metrics: Mapping[str, float], run: Run) -> None:
        """Export the present weights if this step's evaluation is better than all before. Raises UserError: the disk is full."""
        if self.metric is None or not metrics.get(self.metric, -float("inf")) > self.value:
            return
        fresh = self.folder.with_name("hf_best.new")
        shutil.rmtree(fresh, ignore_errors=True)
        run.export(fresh, {f"{self.metric} at step {step + 1}": metrics[self.metric]})
        shutil.rmtree(self.folder, ignore_errors=True)
        fresh.rename(self.folder)
        self.value = metrics[self.metric]
        record = {"metric": self.metric, "value": self.value, "step": step + 1}
        self.path.write_text(json.dumps(record) + "\n", encoding="utf-8")
