"""Whole runs through the command line, on a machine as people have it: a home that cannot be written, a long TMPDIR, signals to everybody.

Three commands share one folder of data; what needs no processes of its own is tested in tests/unit.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.tracking.tracker import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.system]

SECTIONS = {
    "data": {"train": "count/train.jsonl", "min_pixels": 784, "max_pixels": 50176, "max_prompt_tokens": 96},
    "model": {"path": "tiny", "dtype": "float32"},
    "rollout": {"samples_per_prompt": 4, "max_response_tokens": 40, "max_model_tokens": 160, "kv_cache_gib": 0.3},
    "algorithm": {"filter": {"enabled": False}},
    "training": {"prompts_per_step": 4, "responses_per_update": 8, "max_tokens_per_micro_batch": 8192},
    "checkpoint": {"every": 0},
    "tracking": {"wandb": "offline"},
}
SECONDS = 240


class Place:
    """A folder with data, a checkpoint, a configuration and TMPDIRs of its own, 90 characters long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_counting(folder / "count", train=24, test=4, noise=0.3)
        rows = [json.loads(line) for line in (folder / "count/train.jsonl").read_text().splitlines()]
        answers = [json.dumps(row | {"response": "R . B"}) for row in rows]
        (folder / "count/short.jsonl").write_text("\n".join(answers) + "\n")
        build_published(folder / "tiny", randomize_all=True)
        (folder / "run.yaml").write_text(json.dumps(SECTIONS))
        self.temporary = folder.parent / ("t" * (90 - len(str(folder.parent))))
        self.temporary.mkdir()

    def start(self, *arguments: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "eureka_megatron", *arguments]
        with (self.folder / f"{log}.log").open("wb") as file:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.temporary), **environment},
            )

    def words(self, log: str) -> str:
        return (self.folder / f"{log}.log").read_text()

    def run(self, *arguments: str, log: str, **environment: str) -> int:
        return self.start(*arguments, log=log, **environment).wait(SECONDS)

    def wait_for(self, words: str, log: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + SECONDS
        while words not in self.words(log):
            assert process.poll() is None, self.words(log)
            assert time.monotonic() < deadline, self.words(log)
            time.sleep(0.2)

    def leftovers(self) -> set[str]:
        """What stands in TMPDIR, compilers' caches aside, and Ray's folders elsewhere."""
        return {path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    short = set(Path("/tmp").glob("eureka-*"))
    yield Place(tmp_path_factory.mktemp("Bilder und Zahlen ä"))
    assert set(Path("/tmp").glob("eureka-*")) == short, "a run with a long TMPDIR has left its short folder behind"


@pytest.fixture(scope="module")
def imitated(place: Place) -> Path:
    """A model that closes its turn with <|im_end|>, in a directory whose files name only <|endoftext|>: after a run without a home."""
    settings = ["data.train=count/short.jsonl", "run.output=imitated", "optimizer.lr=2e-3"]
    code = place.run(
        "sft", "run.yaml", *settings, "sft.steps=60", "sft.samples_per_step=8", log="sft", HOME="/dev/null/x"
    )
    assert code == 0, place.words("sft")
    assert "HOME=/dev/null/x cannot be written" in place.words("sft")
    assert place.leftovers() == set()
    model = place.folder / "closing"
    shutil.copytree(place.folder / "imitated/hf", model)
    (model / "generation_config.json").unlink()
    edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    values = json.loads((model / "config.json").read_text())
    edit(model / "config.json", eos_token_id=values["bos_token_id"])
    return model


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def everybody(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The driver first: the order in which its own end would be noticed last."""
    driver = psutil.Process(process.pid)
    return [driver, *driver.children(recursive=True)]


def send(processes: list[psutil.Process], number: int) -> None:
    for one in processes:
        try:
            one.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def test_a_signal_to_every_process_saves_and_the_run_goes_on(place: Place, imitated: Path) -> None:
    """As `sbatch --signal=USR1@300` sends it; at a temperature, with ends that only the chat template tells."""
    command = ("train", "run.yaml", "run.output=rl", f"model.path={imitated}", "rollout.temperature=0.5")
    asked = ("checkpoint.on_signal=true", "checkpoint.signal_exit_code=85")
    first = place.start(*command, *asked, "training.steps=400", log="first")
    place.wait_for(" train 1/400", "first", first)
    processes = everybody(first)
    send(processes, signal.SIGUSR1)
    assert first.wait(SECONDS) == 85, place.words("first")
    words = place.words("first")
    assert "closes an assistant's turn in the chat template" in words
    assert "Traceback" not in words
    assert "SIGUSR1 received" not in words
    assert "error: stopped by SIGUSR1; " in words
    assert "--resume auto" in words
    assert place.leftovers() == set()
    assert not psutil.wait_procs(processes, timeout=60)[1]
    done = len(read_metrics(place.folder / "rl/metrics.jsonl"))

    code = place.run(*command, f"training.steps={done + 1}", "--resume", "rl", log="second")
    assert code == 0, place.words("second")
    metrics = read_metrics(place.folder / "rl/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(done + 1))
    for row in metrics:
        assert row["train/truncated"] < 0.2  # measured 0; where nothing but <|endoftext|> ends a response 1
        assert row["train/logprob_abs_diff_max"] <= 1e-5  # at temperature 0.5; measured 1.2e-7 (answers it is sure of)
    assert place.leftovers() == set()


def test_a_second_run_in_the_folder_is_refused_and_a_signal_ends_the_first(place: Place) -> None:
    command = ("sft", "run.yaml", "data.train=count/short.jsonl", "run.output=busy", "sft.steps=5000")
    first = place.start(*command, "checkpoint.every=10", log="busy")
    place.wait_for(" sft 1/5000", "busy", first)
    assert place.run(*command, log="refused") == 1
    assert (
        place.words("refused").splitlines()[-1].startswith("error: run.output=busy: another run writes there (process ")
    )
    processes = everybody(first)
    send(processes, signal.SIGTERM)
    assert first.wait(SECONDS) == 128 + signal.SIGTERM, place.words("busy")
    words = place.words("busy")
    assert "Traceback" not in words
    assert "SIGTERM received" not in words
    assert words.splitlines()[-1].startswith("error: stopped by SIGTERM; ")
    assert not psutil.wait_procs(processes, timeout=60)[1]
    assert place.leftovers() == set()
    steps = [row["step"] for row in read_metrics(place.folder / "busy/metrics.jsonl")]
    assert steps == list(range(len(steps)))
