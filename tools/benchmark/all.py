"""Every benchmark that two CPU cores can run, one after another at small sizes, and one table of all figures: `make benchmark`.

    python tools/benchmark/all.py [--only NAME …] [--peer-venv .venv-trl] [--json FILE]

At most half an hour on two idle cores. Each script can be called alone with more rounds and larger sizes; see its --help. Exit code 1 when one of them fails; a
goal that is missed is no failure. What needs a GPU is in gpu.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, Result, report


def lines(text: str) -> list[Result]:
    """Of scripts that write a JSON line a result."""
    return [Result.read(line) for line in text.splitlines()]


def of_rewards(text: str) -> list[Result]:
    figures = json.loads(text)
    peer = f"{figures['workers']} workers, {figures['timeouts']} ran out of time"
    return [Result("judge: verdicts", figures["verdicts_per_second"], "a second", peer=peer, details=figures)]


def of_logprobs(text: str) -> list[Result]:
    found = json.loads(text)
    ratios, naive = found["ratios"], found["figures"]["naive"]
    return [
        Result(
            "log-probabilities: memory, of the naive way's",
            ratios["extra_bytes"],
            "×",
            peer=f"naive {naive['extra_bytes'] / 2**30:.2f} GiB",
            details=found,
        ),
        Result(
            "log-probabilities: time, of the naive way's",
            ratios["seconds"],
            "×",
            peer=f"naive {naive['seconds']:.2f} s",
        ),
    ]


def of_convert(text: str) -> list[Result]:
    return [
        Result(
            f"convert {name}: time, of cp's", one["ratio_to_cp"], "×", peer=f"cp -r {one['cp_seconds']} s", details=one
        )
        for name, one in json.loads(text).items()
    ]


def of_overlap(text: str) -> list[Result]:
    found: Mapping[str, Mapping[str, float]] = json.loads(text)
    return [
        Result(
            f"step's time, of its longer side's, at async_steps {depth}",
            one["ratio"],
            "×",
            1.15 if int(depth) else None,
            at_least=False,
            where="in what does not overlap: the sync, the first rollout and the store",
            peer=f"rollouts {one['generate']:.2f} s, training {one['train']:.2f} s",
            details=one,
        )
        for depth, one in found.items()
    ]


@dataclass(frozen=True)
class Script:
    options: tuple[str, ...] = ()
    read: Callable[[str], list[Result]] = lines
    prints: bool = False  # its JSON on standard output, at a --json without a file


SCRIPTS: dict[str, Script] = {
    "train": Script(("--rounds", "3")),
    "step": Script(("--rounds", "2", "--steps", "10")),
    "sync": Script(("--rounds", "3", "--sizes", "tiny", "large")),
    "data": Script(("--rounds", "5")),
    "scaling": Script(("--rounds", "3")),
    "memory": Script(("--steps", "200")),
    "rewards": Script(("--samples", "8000"), of_rewards, prints=True),
    "logprobs": Script(("--tokens", "1024", "--vocab", "32768", "--hidden", "512", "--rounds", "3"), of_logprobs),
    "convert": Script(("--size", "3b", "--rounds", "1"), of_convert),
    "overlap": Script(("--generate", "1.5", "--train", "1.5", "--steps", "6", "--async", "0", "1"), of_overlap),
}


def run(name: str, script: Script, file: Path, extra: list[str]) -> list[Result] | None:
    """The script's results; None when it ended without any."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *script.options, *extra]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    start = time.perf_counter()
    if script.prints:
        done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        print(done.stdout, flush=True)
        text = done.stdout if done.returncode == 0 else ""
    else:  # with figures in the file, an exit code of its own says that a goal is missed
        subprocess.run([*command, "--json", str(file)], cwd=ROOT)
        text = file.read_text() if file.is_file() else ""
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return script.read(text) if text else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), metavar="NAME", help=", ".join(SCRIPTS)
    )
    parser.add_argument("--peer-venv", type=Path, default=ROOT / ".venv-trl", metavar="DIR", help="see step.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON lines here too")
    options = parser.parse_args()
    results: list[Result] = []
    failed = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name in options.only:
            extra: list[Any] = ["--peer-venv", str(options.peer_venv)] if name == "step" else []
            found = run(name, SCRIPTS[name], Path(folder) / f"{name}.json", extra)
            results += found or []
            failed += [name] if found is None else []
    report(results, options.json)
    print(f"{time.perf_counter() - start:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
