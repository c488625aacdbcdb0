"""Six algorithms on the made-up counting task, from one cold start, with real ranks and a real engine: do they learn?

    python tools/benchmark/algorithms.py --out runs/algorithms            all recipes of examples/counting (about half an hour on 2 cores)
    python tools/benchmark/algorithms.py --out runs/algorithms --only cpgd rloo
    python tools/benchmark/algorithms.py --out runs/algorithms --draw     only the picture and the table, of the runs that are there

Every run is the command a user would type: `eureka train examples/counting/NAME.yaml …`. A finished run is not repeated. Writes
OUT/NAME/metrics.jsonl, OUT/curves.png and OUT/summary.json; exit code 1 when a run starts above 0.6 or ends below 0.8 test accuracy.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("grpo", "rloo", "reinforce_pp", "dapo", "cpgd", "adora")
BEFORE, AFTER = 0.6, 0.8  # most before, least afterwards: accuracy on unseen pictures, sampled at temperature 1
NOISE = 0.55  # of the teacher's answers, as in the demo


def eureka(*arguments: str) -> None:
    """One command of the package, with its output on this terminal."""
    print("$ eureka", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "eureka_megatron", *arguments], check=True, cwd=ROOT)


def cold_start(out: Path) -> Path:
    """The checkpoint all runs start from: the demo's model after imitation of a careless teacher."""
    checkpoint = out / "sft" / "hf"
    if not (checkpoint / "config.json").is_file():
        from eureka_megatron.demo.forms import build_published
        from eureka_megatron.demo.story import INITIALIZER_RANGE

        if not (out / "data" / "train.jsonl").is_file():
            eureka("data", "counting", "--output", str(out / "data"), "--noise", str(NOISE))
        if not (out / "model" / "config.json").is_file():
            build_published(out / "model", seed=0, initializer_range=INITIALIZER_RANGE)
        paths = {"model.path": out / "model", "data.train": out / "data" / "train.jsonl", "run.output": out / "sft"}
        eureka("sft", "examples/counting/sft.yaml", *(f"{key}={value}" for key, value in paths.items()))
    return checkpoint


def train(name: str, checkpoint: Path, out: Path) -> None:
    """One recipe, unless it has been run."""
    if (out / name / "hf" / "config.json").is_file():
        return
    paths = {
        "model.path": checkpoint,
        "data.train": out / "data" / "train.jsonl",
        "data.test": out / "data" / "test.jsonl",
        "run.output": out / name,
    }
    started = time.monotonic()
    eureka("train", f"examples/counting/{name}.yaml", *(f"{key}={value}" for key, value in paths.items()))
    (out / name / "seconds.json").write_text(json.dumps(round(time.monotonic() - started, 1)))


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summarise(out: Path) -> dict[str, dict[str, float]]:
    """Accuracy on unseen pictures before and after, and the time of each run that is there."""
    found = {}
    for name in RECIPES:
        if not (out / name / "hf" / "config.json").is_file():
            continue
        lines = history(out / name)
        after = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
        found[name] = {
            "before": next(line["eval_before/accuracy"] for line in lines if "eval_before/accuracy" in line),
            "after": after[-1],
            "seconds": json.loads((out / name / "seconds.json").read_text()),
        }
    return found


def draw(out: Path, summary: dict[str, dict[str, float]]) -> None:
    """All runs in one picture: accuracy of what was sampled in training, and on unseen pictures."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for name, values in summary.items():
        lines = history(out / name)
        sampled = [
            (k, x["train/accuracy_rewards_original"])
            for k, x in enumerate(lines)
            if "train/accuracy_rewards_original" in x
        ]
        mean, smooth = sampled[0][1], []
        for _, value in sampled:
            mean += 0.3 * (value - mean)
            smooth.append(mean)
        left.plot([k for k, _ in sampled], smooth, label=name)
        tests = [(k + 1, x["eval/accuracy"]) for k, x in enumerate(lines) if "eval/accuracy" in x]
        right.plot(
            [0, *(k for k, _ in tests)], [values["before"], *(value for _, value in tests)], marker="o", label=name
        )
    left.set(xlabel="rollout step", ylabel="accuracy", title="rollouts, before any filter (running mean)")
    right.set(xlabel="rollout step", title="unseen test pictures, sampled", ylim=(0, 1))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--draw", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if not arguments.draw:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = cold_start(out)
        for name in arguments.only:
            train(name, checkpoint, out)
    summary = summarise(out)
    if not summary:
        print(f"no finished run in {out}")
        return 1
    draw(out, summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{'algorithm':<14}{'before':>8}{'after':>8}{'seconds':>9}")
    for name, values in summary.items():
        print(f"{name:<14}{values['before']:>8.3f}{values['after']:>8.3f}{values['seconds']:>9.0f}")
    print(f"picture: {out / 'curves.png'}")
    return 0 if all(v["before"] <= BEFORE and v["after"] >= AFTER for v in summary.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
