"""Host memory of every process over many small steps: does it grow?

    python tools/benchmark/memory.py [--steps 200] [--json FILE]

The real run on the tiny model, 2 prompts × 4 responses × 16 tokens a step; resident memory of the driver, each trainer rank and each engine after every step. Reported is the
slope of the line of least squares after step 20, of the process that grows fastest: a sum would hide it behind one that shrinks. Exit code 1 when it is above 0.1 MB (10^6 bytes) a step.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from common import Result, arguments, build_model, opened, report, run_config, slope, write_questions

GOAL = 0.1
LEFT_OUT = 20  # steps in which buffers and caches grow to their size
CONFIG = [
    "training.prompts_per_step=2",
    "training.responses_per_update=8",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_tokens=16",
]


def measure(folder: Path, steps: int) -> dict[str, list[float]]:
    """Resident MB after each step, by process."""
    import ray

    from eureka_megatron.loop import reinforce
    from eureka_megatron.tracking.tracker import Tracker

    build_model(folder / "model", "tiny")
    write_questions(folder / "data", 64, 84)
    found: dict[str, list[float]] = {}
    pids: dict[str, int] = {}

    class Watched(Tracker):
        def log(self, *arguments: Any, **named: Any) -> None:
            super().log(*arguments, **named)
            for name, pid in pids.items():
                found.setdefault(name, []).append(psutil.Process(pid).memory_info().rss / 1e6)

    config = run_config(folder, "run", [*CONFIG, f"training.steps={steps}"])
    with opened(config) as run, Watched(config, config.run.output) as tracker:
        pids["driver"] = os.getpid()
        pids |= {f"trainer {rank}": seat.pid for rank, seat in enumerate(run.trainer.seats)}
        states = ray.get([actor.status.remote() for actor in run.pool.actors])
        pids |= {f"engine {number}": state["pid"] for number, state in enumerate(states)}
        run.sync_weights()
        reinforce(run, tracker)
    return found


def main() -> int:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if options.steps < LEFT_OUT + 10:
        parser.error(f"--steps {options.steps}: the first {LEFT_OUT} are left out, and 10 more are the least")
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        found = measure(Path(name), options.steps)
    slopes = {name: slope(values[LEFT_OUT:]) for name, values in found.items()}
    for name, values in found.items():
        print(
            f"  {name:12} {values[0]:7.1f} MB at first, {values[LEFT_OUT]:7.1f} after {LEFT_OUT} steps, {values[-1]:7.1f} at last, {slopes[name]:+.4f} MB a step"
        )
    peer = ", ".join(f"{name} {value:+.3f}" for name, value in slopes.items())
    details = {
        "slopes": slopes,
        "megabytes": {name: [round(value, 2) for value in values] for name, values in found.items()},
    }
    result = Result(
        f"host memory, growth over {options.steps} steps, of the worst process",
        max(slopes.values()),
        "MB a step",
        GOAL,
        at_least=False,
        peer=peer,
        where="what the trimmed heap cannot give back: living blocks, other allocators, pages of Ray's store",
        details=details,
    )
    report([result], options.json)
    return 0 if result.met else 1


if __name__ == "__main__":
    sys.exit(main())
