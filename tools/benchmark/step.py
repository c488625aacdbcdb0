"""A whole GRPO step, rollouts, training and weight sync, against TRL's GRPOTrainer on the same model, prompts and numbers of responses and tokens.

    python tools/benchmark/step.py [--sizes tiny medium] [--rounds 3] [--steps 10] [--threads N] [--peer-venv .venv-trl] [--json FILE]

tiny: 1.8 M parameters, 8 prompts × 8 responses × 32 tokens, pictures of 84 × 84; medium: 39 M, 8 × 8 × 64 tokens, 224 × 224. Ours is the real run: driver,
trainer ranks, vLLM engines, judges, syncs; TRL is a process of its own with transformers' generation in a virtual environment of its own,
made from requirements/benchmark-trl.txt when it is not there (the same torch and transformers). Both make one AdamW update a step, in fp32, with as many
cores (--threads): TRL's process has so many threads; ours has so many data-parallel trainer ranks and so many engines, each with one thread.

Every response has its full length on both sides: ours are sampled with end tokens that end nothing (`ignore_eos`), TRL's with `min_new_tokens`.
Ours and TRL's processes take turns; of each the median over steps counts, the first two left out, and of the ratios the median over rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from common import ROOT, Result, arguments, build_model, median_ratio, opened, report, run_config, write_questions

PINS = ROOT / "requirements" / "benchmark-trl.txt"
PROMPTS = SAMPLES = 8
LEFT_OUT = 2  # steps at the beginning: libraries load, buffers grow


@dataclass(frozen=True)
class Work:
    tokens: int  # of a response
    side: int  # of a picture, in pixels
    goal: float
    steps: int  # at most


WHERE = (
    "a rollout of a small model is vLLM's scheduler and small operators, some 11 ms a token of all responses; "
    "a sync its layer-wise reload, 0.35 ms a tensor, and Ray's calls (docs/performance.md)"
)
WORK = {"tiny": Work(32, 84, 1.5, 20), "medium": Work(64, 224, 2.0, 3)}


def make_peer(directory: Path) -> Path:
    """TRL's environment. → its interpreter."""
    stamp, python = directory / ".installed", directory / "bin" / "python"
    if not stamp.is_file() or stamp.read_text() != PINS.read_text():
        print(f"installing {PINS.name} into {directory} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "-r", str(PINS)], check=True)
        subprocess.run([str(python), str(ROOT / "tools" / "mend_torchvision.py")], check=True)
        stamp.write_text(PINS.read_text())
    return python


# --- ours: in a process of its own, too ---


def own_steps(folder: Path, work: Work, steps: int, cores: int) -> list[dict[str, float]]:
    """Seconds of each step and of its phases."""
    from eureka_megatron.loop import reinforce
    from eureka_megatron.tracking.tracker import Tracker

    overrides = [
        f"training.steps={steps}",
        f"training.prompts_per_step={PROMPTS}",
        f"training.responses_per_update={PROMPTS * SAMPLES}",
        f"rollout.samples_per_prompt={SAMPLES}",
        f"rollout.max_response_tokens={work.tokens}",
        f"rollout.engines={cores}",
        f"parallel.data={cores}",
    ]
    config = run_config(folder, "run", overrides)
    shutil.rmtree(config.run.output, ignore_errors=True)
    with opened(config) as run, Tracker(config, config.run.output) as tracker:
        run.sync_weights()
        reinforce(run, tracker)
    lines = [json.loads(line) for line in (config.run.output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["rollout/truncated"] == 1 for line in lines), "responses that ended early"
    return [
        {"step": line["time"] - before["time"], **{part: line[f"time/{part}"] for part in ("rollout", "train", "sync")}}
        for before, line in itertools.pairwise(lines)
    ]


# --- both ---


def steps_of(command: Sequence[str], threads: int) -> dict[str, float]:
    """Medians over the steps that a process prints as its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    steps = json.loads(done.stdout.splitlines()[-1])[LEFT_OUT - 1 :]  # the first has no end before it already
    return {name: median(step[name] for step in steps) for name in steps[0]}


def compare(folder: Path, size: str, python: Path, options: argparse.Namespace) -> Result:
    work = WORK[size]
    steps = min(options.steps, work.steps)
    build_model(folder / "model", size)
    data = write_questions(folder / "data", PROMPTS * 8, work.side)
    own = [sys.executable, __file__, "--side", size, "--folder", str(folder), "--steps", str(steps)]
    own += ["--threads", str(min(options.threads, PROMPTS))]
    peer = [
        str(python),
        str(Path(__file__).with_name("trl_peer.py")),
        "--model",
        str(folder / "model"),
        "--data",
        str(data),
    ]
    for name, value in (("prompts", PROMPTS), ("samples", SAMPLES), ("tokens", work.tokens), ("steps", steps)):
        peer += [f"--{name}", str(value)]
    found: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
    for number in range(options.rounds):
        for name, command, threads in (("ours", own, 1), ("TRL", peer, options.threads))[
            :: 1 if number % 2 == 0 else -1
        ]:
            found[name].append(steps_of(command, threads))
            print(f"  {size}, {name:5}" + "".join(f"  {k} {v:.3f}" for k, v in found[name][-1].items()), flush=True)
    split = {name: {k: median(one[k] for one in rounds) for k in rounds[0]} for name, rounds in found.items()}
    texts = {name: " + ".join(f"{k} {v:.2f}" for k, v in parts.items() if k != "step") for name, parts in split.items()}
    ratio = median_ratio([one["step"] for one in found["TRL"]], [one["step"] for one in found["ours"]])
    peer_text = (
        f"TRL {split['TRL']['step']:.2f} s ({texts['TRL']}), ours {split['ours']['step']:.2f} s ({texts['ours']})"
    )
    what = f"GRPO step, {size}, {PROMPTS} × {SAMPLES} × {work.tokens} tokens, against TRL"
    return Result(
        what,
        ratio,
        "×",
        work.goal,
        peer=peer_text,
        where=WHERE,
        details={"split": split, "rounds": found, "threads": options.threads},
    )


def main() -> None:
    parser = arguments(__doc__, rounds=3, threads=True)
    parser.add_argument("--sizes", nargs="+", choices=sorted(WORK), default=list(WORK))
    parser.add_argument("--steps", type=int, default=20, help="of a process, at most; medium has 3 at most")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / ".venv-trl", metavar="DIR")
    parser.add_argument("--side", choices=sorted(WORK), help=argparse.SUPPRESS)  # in the measuring process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(own_steps(options.folder, WORK[options.side], options.steps, options.threads)))
        return
    if options.steps <= LEFT_OUT:
        parser.error(f"--steps {options.steps}: the first {LEFT_OUT} are left out")
    python = make_peer(options.peer_venv.absolute())
    results = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="step-") as name:
            results.append(compare(Path(name), size, python, options))
    report(results, options.json)


if __name__ == "__main__":
    main()
