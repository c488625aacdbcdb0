"""kill -9, again and again: a run that is resumed each time is, bit for bit, the run that was never stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from eureka_megatron.checkpoint.store import list_checkpoints, newest_whole, problems_of
from eureka_megatron.cli.commands import main
from eureka_megatron.config import load_config
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.layout import Layout
from eureka_megatron.run.resume import choose_checkpoint
from eureka_megatron.tracking.tracker import read_metrics
from tests.helpers.course import Course, course_samples, run_course
from tests.helpers.ranks import RankError, run_ranks

pytestmark = pytest.mark.system

KILLS = 20
# In turn; those behind a save move the course on, however slow the machine is.
MOMENTS = ("training", "saving", "saved", "saving")


def watched(rank: int, course: Course, notes: str) -> dict[str, Any]:
    """The course, resumed where it can be; leaves its process id and, step by step, its figures in `notes`."""
    Path(notes, f"pid-{rank}").write_text(str(os.getpid()))
    return run_course(rank, course, "auto", notes=Path(notes, f"figures-{rank}"))


def kill_at(moment: str, folder: Path, notes: Path, world: int, delay: float, over: threading.Event) -> None:
    """SIGKILL to all ranks: `delay` seconds after their first step; later, as soon as a checkpoint is half-written, or the first is whole."""
    before = list_checkpoints(folder)[-1:]
    while not over.is_set() and len(list(notes.glob("figures-*"))) < world:
        time.sleep(0.005)
    end = time.monotonic() + delay
    while not over.is_set() and time.monotonic() < end:
        time.sleep(0.002)
    while moment == "saving" and not over.is_set() and not list(folder.glob("*.tmp")):
        time.sleep(0.0002)
    while moment == "saved" and not over.is_set() and list_checkpoints(folder)[-1:] == before:
        time.sleep(0.002)
    pids = [int((notes / f"pid-{rank}").read_text()) for rank in range(world)]
    for wanted in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: who sees the other die would say so
        for pid in pids:
            try:
                os.kill(pid, wanted)
            except ProcessLookupError:  # it had ended: the course was over
                assert over.is_set()


@pytest.mark.timeout(1200)
def test_twenty_kills_do_not_change_a_bit(tiny_dir: Path, tmp_path: Path) -> None:
    """Two tensor-parallel ranks with Adam, a checkpoint after every step; the kills fall into training, into saves and behind them."""
    course = Course(
        str(tiny_dir),
        course_samples(tiny_dir),
        str(tmp_path / "whole"),
        steps=60,  # more than twenty times what a fast machine does before it is killed
        every=1,
        keep_last=2,
        layout=Layout(tensor=2, sequence_parallel=True),
        world=2,
    )
    whole = run_ranks(run_course, 2, course)
    killed = replace(course, folder=str(tmp_path / "killed"))
    draw, torn, seen = random.Random(0), 0, dict[int, list]()
    for attempt in range(KILLS):
        notes = tmp_path / f"notes-{attempt}"
        notes.mkdir()
        over = threading.Event()
        arguments = (MOMENTS[attempt % len(MOMENTS)], Path(killed.folder), notes, 2, draw.uniform(0, 0.3), over)
        killer = threading.Thread(target=kill_at, args=arguments)
        killer.start()
        try:
            with pytest.raises(RankError, match="died without a word"):
                run_ranks(watched, 2, killed, str(notes))
        finally:
            over.set()
            killer.join()
        torn += bool(list(Path(killed.folder).glob("*.tmp")))
        for line in (notes / "figures-1").read_text().splitlines():
            step, figures = json.loads(line)
            assert figures == whole[1]["losses"][step], f"kill {attempt}, step {step}"
            seen[step] = figures
    reached = newest_whole(Path(killed.folder))[0]
    assert reached is not None
    print(f"{KILLS} kills, {torn} of them during a save, reached {reached.name} of {course.steps}")
    assert torn >= KILLS // 4
    last = run_ranks(watched, 2, killed, str(notes))
    for before, after in zip(whole, last, strict=True):
        assert after["weights"] == before["weights"]
        assert after["losses"] == {step: before["losses"][step] for step in range(after["first"], course.steps)}
        seen |= after["losses"]
    assert seen.keys() == set(range(course.steps)), "every step was seen, and each was equal"
    assert [step for step, _ in list_checkpoints(Path(killed.folder))] == [course.steps - 1, course.steps]
    assert not list(Path(killed.folder).glob("*.tmp"))


CONFIG = """
run: {{name: killed, output: {output}}}
model: {{path: {model}, dtype: float32}}
data: {{train: {data}, min_pixels: 784, max_pixels: 50176, max_prompt_tokens: 96}}
rollout: {{samples_per_prompt: 2, max_response_tokens: 16, max_model_tokens: 160, kv_cache_gib: 0.25}}
algorithm: {{loss_options: {{entropy_coefficient: 0.01}}, filter: {{enabled: false}}}}
optimizer: {{lr: 1.0e-3, warmup_ratio: 0.0}}
training: {{steps: 5, prompts_per_step: 4, responses_per_update: 4}}
checkpoint: {{every: 1}}
tracking: {{wandb: offline, tensorboard: false, rollouts_every: 2}}
"""
# A random model earns no reward; the entropy bonus makes it learn all the same, so that every step's rollouts differ.


class Training:
    """`eureka train` (or sft) in a process of its own, with Ray and vLLM below it."""

    def __init__(self, config: Path, *arguments: str, command: str = "train") -> None:
        # A private Ray keeps sockets below the temporary folder, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="eureka-kill-"))
        self.log = config.with_name(f"log-{self.folder.name}")
        words = [sys.executable, "-m", "eureka_megatron", command, str(config), *arguments]
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(self.folder)}
            )

    def kill_after(self, step: int, folder: Path) -> int:
        """Kills everything once a checkpoint of this step is there. → step of the newest"""
        deadline = time.monotonic() + 400
        while not [found for found, _ in list_checkpoints(folder) if found >= step]:
            assert self.process.is_running(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)
        self.kill()
        return list_checkpoints(folder)[-1][0]

    def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        family = [self.process, *self.process.children(recursive=True)]
        for one in family:
            one.kill()
        psutil.wait_procs(family, timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)


def eureka(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """A command in this process, which has imported everything and has a Ray. → what it printed"""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def numbers(path: Path) -> dict[int, dict[str, float]]:
    """Step → metrics that do not depend on the time a step took."""
    timed = ("time", "sync/", "rollout/seconds", "rollout/judge_seconds", "rollout/tokens_per_second", "checkpoint/")
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(path):
        kept = {name: value for name, value in line.items() if not name.startswith(timed)}
        steps.setdefault(line["step"], {}).update(kept)
    return steps


@pytest.mark.timeout(1200)  # three starts of the whole system
def test_a_killed_training_run_goes_on_to_the_same_metrics_and_the_same_model(
    one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real thing: driver, Ray, trainer rank, vLLM engine, all killed after the second checkpoint; the command is then given again."""
    build_published(tmp_path / "model", seed=3, randomize_all=True)
    data = write_counting(tmp_path / "data", train=40, test=4).train
    configs = {}
    for name in ("whole", "killed"):
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(CONFIG.format(output=tmp_path / name, model=tmp_path / "model", data=data))
    killed = Training(configs["killed"], "--resume", "auto")
    folder = tmp_path / "killed" / "checkpoints"
    reached = killed.kill_after(2, folder)
    assert "starting from the beginning" in killed.log.read_text()
    assert reached < 5
    capsys.readouterr()
    assert main(["train", str(configs["killed"])]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert "go on from there with --resume auto" in refused
    resumed = eureka(capsys, "train", configs["killed"], "--resume", "auto")
    assert f"going on after step {reached}, from {folder / f'step_{reached:06d}'}" in resumed
    eureka(capsys, "train", configs["whole"], "tracking.wandb=disabled")
    whole, found = (numbers(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert whole.keys() == set(range(5))
    assert len({metrics["train/entropy"] for metrics in whole.values()}) == 5, "every step must be another"
    assert found == whole
    again = eureka(capsys, "replay", tmp_path / "killed", "--step", 4)
    assert "rollouts: 8 of 8 stored responses came out the same, token by token; log-probabilities within 0\n" in again
    assert ", 0 differ\n" in again
    assert main(["replay", str(tmp_path / "whole"), "--step", "1"]) == 1
    assert "has no checkpoint right before step 1; steps that can be replayed: 4 (" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "whole"), "--step", "5"]) == 1
    assert "ended before step 5; steps that can be replayed: 4 (" in capsys.readouterr().err
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    eureka(capsys, "export", folder / "step_000005", "--output", tmp_path / "out", "--quiet")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights[0], "what the run itself exports"
    assert "- **Run**: killed, step 5" in (tmp_path / "out" / "README.md").read_text().splitlines()
    assert all(problems_of(directory) == [] for _, directory in list_checkpoints(folder))
    assert len(list((tmp_path / "killed" / "wandb").glob("offline-run-*"))) == 2
    assert len(list((tmp_path / "killed").glob("wandb-*.id"))) == 1, "both parts have one id"


@pytest.mark.timeout(1200)
def test_a_killed_cold_start_goes_on_to_the_same_metrics_and_the_same_model(
    one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_published(tmp_path / "model", seed=3, randomize_all=True)
    data = write_counting(tmp_path / "data", train=40, test=4).train
    sections = "sft: {steps: 12, samples_per_step: 6}\n"
    configs = {name: tmp_path / f"{name}.yaml" for name in ("whole", "killed")}
    for name, path in configs.items():
        text = CONFIG.format(output=tmp_path / name, model=tmp_path / "model", data=data) + sections
        path.write_text(text.replace("every: 1", "every: 2").replace("wandb: offline", "wandb: disabled"))
    folder = tmp_path / "killed" / "checkpoints"
    reached = Training(configs["killed"], command="sft").kill_after(4, folder)
    assert reached < 12
    resumed = eureka(capsys, "sft", configs["killed"], "--resume", "auto")
    assert f"going on after step {reached}, from {folder / f'step_{reached:06d}'}" in resumed
    eureka(capsys, "sft", configs["whole"])
    whole, found = (numbers(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert whole.keys() == set(range(12))
    assert len({metrics["sft/loss"] for metrics in whole.values()}) == 12, "every step must be another"
    assert found == whole
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    card = (tmp_path / "killed" / "hf" / "README.md").read_text()
    assert "- **Algorithm**: supervised fine-tuning" in card.splitlines()
    assert "reinforcement" not in card
    with pytest.raises(UserError, match=r"is a checkpoint of eureka sft; eureka train begins from it by model\.path="):
        choose_checkpoint(load_config(configs["killed"]), "auto")
