"""Metrics survive what runs meet: NaN, a kill in the middle of a line, a resume, no network, no terminal."""

import errno
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from eureka_megatron.config import RewardsSection, RunConfig, load_config, make_config
from eureka_megatron.data.batch import distributions
from eureka_megatron.data.samples import training_sample
from eureka_megatron.errors import UserError
from eureka_megatron.tracking.console import Console, format_seconds, format_value, progress_lines, sparkline
from eureka_megatron.tracking.curves import SECTIONS, draw_curves, read_series, smooth
from eureka_megatron.tracking.line import describe_step
from eureka_megatron.tracking.login import has_wandb_login, wandb_mode
from eureka_megatron.tracking.memory import held_memory, memory_metrics
from eureka_megatron.tracking.tracker import Tracker, format_line, read_metrics
from eureka_megatron.tracking.watch import Watch
from eureka_megatron.types import Batch, Group, Prompt, Rollout
from tests.helpers.made_run import MadeRun, make_run

ROOT = Path(__file__).resolve().parents[2]


def run_config(**tracking: object) -> RunConfig:
    plain = {"wandb": "disabled", "tensorboard": False, "console": False}
    return make_config(
        {
            "model": {"path": "model"},
            "data": {"train": "train.jsonl", "media": ["pictures"]},
            "training": {"steps": 5},
            "tracking": plain | tracking,
        }
    )


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


# ---------------------------------------------------------------------------------------------------------- JSON lines


def test_each_line_is_strict_json_with_step_stage_and_time(tmp_path):
    with Tracker(run_config(), tmp_path) as tracker:
        tracker.log(0, {"train/reward": 0.5, "train/kl": np.float32(0.25), "train/updates": 3})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"step": 0, "stage": "train", "train/reward": 0.5, "train/kl": 0.25, "train/updates": 3}


def test_values_that_are_not_finite_are_null_and_named():
    line = format_line(3, "train", {"a": math.nan, "b": -math.inf, "c": 1.0})
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["a"], record["b"], record["c"]) == (None, None, 1.0)
    assert record["non_finite"] == {"a": "nan", "b": "-inf"}


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Tracker(run_config(), tmp_path) as tracker:
        tracker.log(0, {"train/reward": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_metric_that_is_no_number_is_named(tmp_path):
    with Tracker(run_config(), tmp_path) as tracker, pytest.raises(TypeError, match=r"'train/x' must be a number.*str"):
        tracker.log(0, {"train/x": "much"})


def test_a_resume_cuts_what_will_be_computed_again_and_leaves_other_stages(tmp_path):
    for stage in ("sft", "train"):
        with Tracker(run_config(), tmp_path, stage=stage) as tracker:
            for step in range(4):
                tracker.log(step, {f"{stage}/loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 4, "stage": "tra')  # a kill in the middle of a line
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 8
    with Tracker(run_config(), tmp_path, start_step=2) as tracker:
        tracker.log(2, {"train/loss": 20})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["train/loss"]) for r in records if r["stage"] == "train"] == [(0, 0), (1, 1), (2, 20)]
    assert [r["step"] for r in records if r["stage"] == "sft"] == [0, 1, 2, 3]
    replaced = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert len(replaced) == 3
    assert replaced[-1] == '{"step": 4, "stage": "tra'


def test_the_recorded_configuration_gives_the_same_configuration_again(tmp_path):
    config = run_config()
    with Tracker(config, tmp_path):
        pass
    assert load_config(tmp_path / "config.yaml") == config
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"python", "torch", "transformers", "eureka-megatron"} <= set(versions)


def test_another_configuration_in_the_same_folder_stands_beside_the_first(tmp_path):
    first, second = run_config(), run_config(project="another")
    for config, step in ((first, 0), (second, 3)):
        with Tracker(config, tmp_path, start_step=step):
            pass
    assert load_config(tmp_path / "config.yaml") == first
    assert load_config(tmp_path / "config-train-3.yaml") == second


def test_what_failed_before_its_first_step_is_not_what_the_folder_records(tmp_path):
    failed, good = run_config(), run_config(project="another")
    for config in (failed, good):
        with Tracker(config, tmp_path) as tracker:
            pass
    assert load_config(tmp_path / "config.yaml") == good
    assert not list(tmp_path.glob("config-*"))
    with Tracker(good, tmp_path) as tracker:
        tracker.log(0, {})
    with Tracker(failed, tmp_path):  # begins once more, in a folder with steps
        pass
    assert load_config(tmp_path / "config.yaml") == good
    assert load_config(tmp_path / "config-train-0.yaml") == failed


def test_what_depends_on_the_machine_stands_together_in_a_line():
    record = json.loads(format_line(3, "train", {"perf/mfu": 0.4, "train/loss": 1.0, "perf/sync_bytes": math.nan}))
    assert record["timed"] == {"perf/mfu": 0.4, "perf/sync_bytes": None}
    assert record["non_finite"] == {"perf/sync_bytes": "nan"}
    assert read_series([record])["perf/mfu"][1].tolist() == [0.4]
    assert not [name for name in record if name.startswith("perf/")]


# ------------------------------------------------------------------------------------------------- TensorBoard and wandb


def test_tensorboard_holds_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(run_config(tensorboard=True), tmp_path) as tracker:
        for step in range(3):
            tracker.log(step, {"train/reward": step / 2})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_wandb_records_offline_and_a_resume_keeps_its_id(tmp_path, no_login):
    for start in (0, 2):
        with Tracker(run_config(wandb="auto"), tmp_path, start_step=start) as tracker:
            tracker.log(start, {"train/reward": 1.0})
    name = (tmp_path / "wandb-train.id").read_text()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert runs
    assert all(b"train/reward" in run.read_bytes() for run in runs)


def wandb_rows(folder: Path) -> list[tuple[int, int]]:
    """(its own step, ours) of each row, in the order in which they were recorded, of all offline files of the folder."""
    return [(int(row["_step"]), int(row["step"])) for row in wandb_history(folder)]


def wandb_history(folder: Path) -> list[dict[str, str]]:
    """Key → JSON of its value, of each row."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in leveldb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                found.append({item.key or item.nested_key[0]: item.value_json for item in record.history.item})
    return found


def leveldb_records(data: bytes) -> list[bytes]:
    """Of a log in LevelDB's format behind wandb's 7 bytes: blocks of 32 KiB; before each piece a checksum, its length and its kind."""
    found, place, record = [], 7, b""
    while place < len(data):
        if (rest := 2**15 - place % 2**15) < 7:
            place += rest
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(record)
            record = b""
    return found


def test_no_step_comes_twice_in_wandb_however_often_a_run_is_resumed(tmp_path, no_login):
    ids = set()
    for start, end in ((0, 4), (2, 3), (1, 6)):  # the second has gone back by two steps, the third by more
        with Tracker(run_config(wandb="offline"), tmp_path, start_step=start) as tracker:
            for step in range(start, end):
                tracker.log(step, {"train/reward": step}, {"rewards": np.array([0.0, 1.0, math.nan])})
        ids.add((tmp_path / "wandb-train.id").read_text())
    assert len(ids) == 1
    assert wandb_rows(tmp_path) == [(step, step) for step in range(6)]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(6))
    with Tracker(run_config(wandb="offline"), tmp_path) as tracker:  # begins anew: another run of wandb's
        tracker.log(0, {})
    assert (tmp_path / "wandb-train.id").read_text() not in ids
    assert wandb_rows(tmp_path)[6:] == [(0, 0)]


def test_a_step_with_a_table_of_rollouts_is_one_row_in_wandb_with_its_metrics(tmp_path, no_login):
    make_run(
        tmp_path, MadeRun(steps=3, responses=2), tracking={"wandb": "offline", "console": False, "rollouts_every": 1}
    )
    assert wandb_rows(tmp_path) == [(step, step) for step in range(3)]
    assert all(row.keys() >= {"rollouts", "train/reward"} for row in wandb_history(tmp_path))


def test_distributions_hold_one_value_a_response():
    def rollout(tokens, total):
        return Rollout(np.arange(tokens), np.zeros(tokens, np.float32), "", "stop", 0, {"total": total})

    prompt = Prompt("0", "", "3", np.arange(2), np.zeros((3, 2), int))
    samples = [training_sample(prompt, np.arange(tokens), advantage=value) for tokens, value in ((3, 0.5), (5, -0.5))]
    found = distributions([Group(prompt, (rollout(3, 1.5), rollout(5, 0.0)))], Batch.of(samples))
    expected = {"rewards": [1.5, 0.0], "response_lengths": [3, 5], "advantages": [0.5, -0.5]}
    assert {name: values.tolist() for name, values in found.items()} == expected


def test_memory_of_each_process_while_there_are_few():
    own = held_memory()
    assert held_memory([os.getpid(), os.getppid()])["memory_gib"] > own["memory_gib"] > 0.01
    few = memory_metrics("engine", [{"memory_gib": 1.0}, {"memory_gib": 2.0, "gpu_memory_gib": 5.0}])
    assert few == {
        "perf/memory_gib_engine_max": 2.0,
        "perf/memory_gib_engine_0": 1.0,
        "perf/memory_gib_engine_1": 2.0,
        "perf/gpu_memory_gib_engine_max": 5.0,
        "perf/gpu_memory_gib_engine_1": 5.0,
    }
    assert memory_metrics("trainer", [own] * 64).keys() == {f"perf/{name}_trainer_max" for name in own}
    assert memory_metrics("engine", []) == {}


def test_freed_heap_goes_back_to_the_system() -> None:
    """Blocks too small to be mapped one by one, below one that lives on: glibc alone would keep their pages."""
    blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
    full = held_memory()["memory_gib"]
    del blocks[:-1]
    assert full - held_memory()["memory_gib"] > 0.12  # of 0.186; measured 0.186


def test_histograms_are_of_bounded_size_and_not_in_the_lines(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = np.append(np.random.default_rng(0).normal(size=10_000), math.inf)
    with Tracker(run_config(tensorboard=True), tmp_path) as tracker:
        tracker.log(0, {}, {"advantages": values, "rewards": np.zeros(4), "response_lengths": np.array([])})
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    assert events.Tags()["histograms"] == ["histograms/advantages", "histograms/rewards"]
    found = events.Histograms("histograms/advantages")[0].histogram_value
    assert found.num == 10_000
    assert len(found.bucket) <= 66
    assert read_metrics(tmp_path / "metrics.jsonl")[0].keys() == {"step", "stage", "time"}


def test_wandb_that_cannot_start_is_one_warning_and_the_run_goes_on(tmp_path, no_login, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with Tracker(run_config(wandb="auto"), tmp_path) as tracker:
        tracker.log(0, {"train/reward": 1.0})
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "wandb" in warnings[0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_online_without_a_login_neither_asks_nor_waits(tmp_path, no_login, capsys):
    with Tracker(run_config(wandb="online"), tmp_path) as tracker:
        tracker.log(0, {"train/reward": 1.0})
    assert "there is no login (`wandb login`); recording offline" in capsys.readouterr().out
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_wandb_run_that_fails_later_is_dropped_after_one_warning(tmp_path, no_login, capsys):
    with Tracker(run_config(wandb="offline"), tmp_path) as tracker:
        tracker._wandb.finish()  # as if its service had died: wandb raises from here on
        for step in range(3):
            tracker.log(step, {"train/reward": 1.0})
    assert capsys.readouterr().out.count("wandb failed") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_login_is_found_in_the_environment_and_in_netrc(no_login, monkeypatch):
    assert not has_wandb_login()
    assert wandb_mode("auto") == "offline"
    no_login.write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert has_wandb_login()
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("offline") == "offline"  # the configuration, when explicit, wins
    no_login.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_login()


# --------------------------------------------------------------------------------------------------------------- console


def test_a_log_file_gets_the_first_and_the_last_step_and_few_between():
    stream = io.StringIO()
    with Console(100, title="demo", stream=stream) as console:
        for step in range(100):
            console.show(step, {"train/reward": step / 100})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("demo 1/100 · reward 0 · ")
    assert lines[1] == "demo 100/100 · reward 0.99"
    assert "\x1b" not in stream.getvalue()


STEP = {
    "rollout/reward": 1.1649,
    "rewards/accuracy": 0.68,
    "rewards/format": 0.97,
    "rewards/timeouts": 3.0,
    "train/reward": 0.9,
    "train/response_length": 1183.4,
    "train/truncated": 0.02,
    "rollout/groups": 16.0,
    "filter/kept": 14.0,
    "filter/skipped": 0.0,
    "train/logprob_abs_diff_max": 1.2e-7,
    "perf/tokens_per_second_per_rank": 5321.4,
    "perf/mfu": 0.413,
    "time/rollout": 1.91,
    "time/train": 1.12,
    "time/sync": 0.09,
}


def test_the_line_of_a_step_says_what_came_out_and_what_it_cost():
    assert describe_step(STEP) == [
        "reward 1.16 (accuracy 0.68, format 0.97)",
        "1,183 tokens a response (2% cut)",
        "kept 14 of 16 groups",
        "engine gap 1e-07",
        "5,321 tokens/s a rank (41% MFU)",
        "3.1 s (rollout 1.9, train 1.1, sync 0.1)",
    ]
    supervised = {"sft/loss": 0.5219, "sft/actor_lr": 1e-5, "sft/epoch": 1.25, "time/train": 0.84}
    expected = ["loss 0.522 a token", "learning rate 1e-05", "epoch 1.25", "0.8 s"]
    assert describe_step(supervised) == expected
    assert describe_step({"rollout/groups": 4.0, "filter/kept": 0.0, "filter/skipped": 1.0}) == [
        "kept 0 of 4 groups, too few: step skipped"
    ]


@pytest.mark.parametrize("left_out", STEP)
def test_what_was_not_measured_is_left_out_of_the_line(left_out):
    metrics = {name: value for name, value in STEP.items() if name != left_out}
    line = Console(40, title="demo train", stream=io.StringIO()).line(metrics)
    assert line.startswith("demo train 0/40 · ")
    assert line.endswith("estimating the time to go")


def test_a_slow_run_gets_a_line_for_every_step():
    stream = io.StringIO()
    with Console(4, stream=stream, line_seconds=0.0) as console:
        for step in range(4):
            console.show(step, {})
    assert len(stream.getvalue().splitlines()) == 4


def test_a_long_phase_says_in_a_log_that_it_goes_on(monkeypatch):
    monkeypatch.setattr("eureka_megatron.tracking.console.BEAT_SECONDS", 0.05)
    stream = io.StringIO()
    with Console(4, title="demo", stream=stream) as console:
        time.sleep(0.2)  # no phase: nothing to tell
        assert stream.getvalue() == ""
        with console.phase("rollout"):
            time.sleep(0.3)
    said = stream.getvalue().splitlines()
    assert said
    assert all(line.startswith("demo 0/4 · rollout  ") for line in said)
    time.sleep(0.2)
    assert stream.getvalue().splitlines() == said


def test_work_without_a_terminal_is_told_in_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 30.0, 40.0, 45.0, 60.0, 60.0, 80.0])
    monkeypatch.setattr("eureka_megatron.tracking.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    stream = io.StringIO()
    told = progress_lines("convert", stream=stream)
    for done in (1, 2, 3, 4):
        told(done * 10**9, 10**10)
    progress_lines("reading", "rows", stream)(1234, 0)
    assert stream.getvalue().splitlines() == [
        "convert: 1.0 of 10.0 GB",
        "convert: 2.0 of 10.0 GB, 1m20s left",
        "convert: 4.0 of 10.0 GB, 1m00s left",
        "reading: 1,234 rows",
    ]


def test_a_console_that_is_off_still_says_what_matters():
    stream = io.StringIO()
    with Console(2, stream=stream, enabled=False) as console:
        console.show(0, {"a": 1.0})
        console.say("warning: disk nearly full")
    assert stream.getvalue() == "warning: disk nearly full\n"


def test_phases_are_timed_summed_and_reset_by_taking_them():
    console = Console(1, stream=io.StringIO())
    for _ in range(2):
        with console.phase("rollout"):
            time.sleep(0.02)
            with console.phase("judge"):
                time.sleep(0.01)
    times = console.take_times()
    assert times["time/rollout"] >= 0.06
    assert 0.02 <= times["time/judge"] < times["time/rollout"]
    assert console.take_times() == {}


def test_a_phase_that_fails_is_closed():
    console = Console(1, stream=io.StringIO())
    with pytest.raises(KeyError), console.phase("train"):
        raise KeyError
    assert list(console.take_times()) == ["time/train"]


def test_tracker_logs_the_seconds_of_its_phases(tmp_path):
    with Tracker(run_config(), tmp_path) as tracker:
        for step in range(2):
            with tracker.phase("train"):
                time.sleep(0.01)
            tracker.log(step, {})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert all(record["time/train"] >= 0.01 for record in records)
    assert all(record["timed"] == {"perf/train_seconds": record["time/train"]} for record in records)


def test_time_left_follows_the_last_steps_and_not_the_first_with_its_warm_up(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0, 108.0])  # a start of 100 s, then steps of 2, 2 and 4
    monkeypatch.setattr("eureka_megatron.tracking.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console, left = Console(10, stream=io.StringIO()), []
    for step in range(4):
        console.show(step, {})
        left.append(console.seconds_left())
    assert left == [None, 8 * 2.0, 7 * 2.0, pytest.approx(6 * 8 / 3)]
    assert console.line({}).endswith("16s left")


def rollout_step(**figures: float) -> dict[str, float]:
    """Metrics of a step in which everything is as it should be, but for these."""
    good = {"skipped": 0, "all_wrong": 1, "all_right": 1, "mixed": 2}
    values = {f"filter/{name}": float(figures.pop(name, value)) for name, value in good.items()}
    return values | {"rollout/reward": 0.7, "rollout/truncated": 0.0, "train/rewards_differ": 0.5} | figures


SKIPPED = rollout_step(skipped=1, all_wrong=4, all_right=0, mixed=0)
EQUAL = rollout_step(**{"train/rewards_differ": 0.0, "rollout/reward": 0.0}, all_wrong=4, all_right=0, mixed=0)
CUT = rollout_step(**{"rollout/truncated": 1.0})


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([rollout_step()] * 4, []),
        ([rollout_step(), SKIPPED, EQUAL, rollout_step()], []),  # now and then is as it should be
        ([SKIPPED] * 2, ["no step trained, the weights are those it began with: 2 skipped, because algorithm.filter (0.1 <="]),
        ([EQUAL] * 2, ["no step trained, the weights are no better: in 2 all responses to a prompt earned the same"]),
        ([EQUAL] * 2, ["no response earned any reward, neither for its answer nor for its form"]),
        ([SKIPPED] * 2, ["most prompts are never answered right: take easier data"]),
        ([rollout_step(skipped=1, all_right=9)], ["most prompts are answered right every time: take harder data"]),
        ([SKIPPED | {"rollout/truncated": 1.0}], ["nearly all responses were cut off at rollout.max_response_tokens=4096"]),
        ([SKIPPED, EQUAL, rollout_step()], ["nothing was learnt in 2 of 3 steps: 1 skipped, because"]),
        ([CUT] * 2, ["in every step nearly all responses were cut off"]),
        ([CUT] * 2 + [rollout_step()], []),
        ([{"eval/accuracy": 0.5}], []),
    ],
)  # fmt: skip
def test_a_run_that_learns_nothing_says_so_at_its_end(steps, said):
    watch = Watch(run_config())
    assert [watch.after(step) for step in steps] == [None] * len(steps)
    found = watch.at_end()
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))


@pytest.mark.parametrize("step", [SKIPPED, EQUAL, CUT])
def test_and_while_it_goes_on_early_then_sparingly(step):
    watch = Watch(run_config())
    assert [number for number in range(1, 101) if watch.after(step)] == [3, 30]
    assert watch.after(rollout_step()) is None
    assert [number for number in range(1, 6) if watch.after(step)] == [3]


def test_a_reward_function_that_gives_nothing_is_named():
    config = run_config().model_copy(update={"rewards": RewardsSection(function="mine:score")})
    watch = Watch(config)
    watch.after(EQUAL)
    assert "every response was given 0: look at rewards.function" in watch.at_end()[0]


def test_the_tracker_warns_after_a_good_end_only(tmp_path, capsys):
    with Tracker(run_config(), tmp_path) as tracker:
        tracker.log(0, SKIPPED)
    assert capsys.readouterr().out.startswith("warning: no step trained, ")
    tracker = Tracker(run_config(), tmp_path).__enter__()
    tracker.log(0, SKIPPED)
    tracker.__exit__(KeyError, KeyError(), None)
    assert capsys.readouterr().out == ""


def test_the_live_table_shows_phase_and_values_on_a_terminal():
    code = """
import time
from eureka_megatron.tracking.console import Console
with Console(3, title="demo") as console:
    for step in range(2):
        with console.phase("rollout"):
            time.sleep(0.3)
        console.show(step, {"train/reward": 0.25 + step})
    console.say("engine ready")
"""
    script = f"import pty; pty.spawn([{sys.executable!r}, '-c', {code!r}])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=60, stdin=subprocess.DEVNULL)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout.decode())
    assert "rollout  0s" in text
    assert "train/reward" in text
    assert "1.25" in text
    assert "2/3" in text
    assert "engine ready" in text


def test_small_pictures_and_formats():
    assert sparkline([0, 1, 2], 24) == "▁▅█"
    assert sparkline([1.0, math.nan, 1.0], 24) == "▁ ▁"
    assert sparkline(list(range(100)), 4) == "▁▃▆█"
    assert sparkline([math.nan], 4) == " "
    assert [format_value(v) for v in (0.71834, 1024.0, 3.14e-7, math.nan, math.inf)] == [
        "0.7183",
        "1024",
        "3.14e-07",
        "nan",
        "inf",
    ]
    assert [format_seconds(s) for s in (42.4, 190, 7500)] == ["42s", "3m10s", "2h05m"]


# ---------------------------------------------------------------------------------------------------------------- curves


def write_run(path: Path) -> Path:
    source = np.random.default_rng(0)
    lines = [
        format_line(step, "sft", {"sft/loss": 2 * math.exp(-step / 50) + 0.5, "time/sft": 0.2}) for step in range(200)
    ]
    for step in range(40):
        accuracy = 0.4 + 0.4 * step / 40
        values = {
            "train/reward": accuracy + 0.5,
            "train/accuracy_rewards": accuracy + source.normal(0, 0.03),
            "train/logprob_abs_diff_max": 10.0 ** source.normal(-6, 0.2) if step else 0.0,
            "train/response_length": 30.0,
            "time/rollout": 1.0,
            "time/train": 2.0,
        }
        lines.append(format_line(step, "train", values))
        if step % 10 == 9:
            lines.append(format_line(step, "train", {"eval/accuracy": accuracy, "train/kl": math.nan}))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_picture_has_every_panel_and_uses_its_colours(tmp_path):
    metrics = write_run(tmp_path / "metrics.jsonl")
    draw_curves(
        metrics, tmp_path / "out" / "curves.png", title="demo", levels={"Accuracy": {"before": 0.4, "after": 0.8}}
    )
    picture = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB"))
    height, width, _ = picture.shape
    assert width > 1500
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves.png"]
    for row in range(2):
        for column in range(3):  # six panels: ink in each
            panel = picture[
                row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3
            ]
            assert (panel < 100).all(axis=2).mean() > 0.001


def test_panels_without_metrics_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(format_line(0, "train", {"train/reward": 1.0, "time/train": 1.0}) + "\n")
    draw_curves(path, tmp_path / "curves.png")
    whole = write_run(tmp_path / "whole.jsonl")
    draw_curves(whole, tmp_path / "whole.png")
    assert Image.open(tmp_path / "curves.png").height < Image.open(tmp_path / "whole.png").height


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        draw_curves(tmp_path / "none.jsonl", tmp_path / "curves.png")
    (tmp_path / "metrics.jsonl").write_text(format_line(0, "train", {"other": 1.0}) + "\n")
    with pytest.raises(UserError, match="holds none of the metrics"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_series_leave_out_nulls_and_keep_the_order_of_steps():
    records = [{"step": 2, "a": 2.0}, {"step": 0, "a": 0.0}, {"step": 1, "a": None, "stage": "train"}]
    steps, values = read_series(records)["a"]
    assert steps.tolist() == [0, 2]
    assert values.tolist() == [0.0, 2.0]


def test_smoothing_is_a_mean_that_shortens_at_the_ends():
    assert smooth(np.array([0.0, 3.0, 0.0]), 3).tolist() == [1.5, 1.0, 1.5]
    assert smooth(np.full(5, 2.0), 99).tolist() == [2.0] * 5


def test_every_panel_has_axis_labels():
    assert all(section.ylabel and section.xlabel and section.title for section in SECTIONS)


# ---------------------------------------------------------------------------------------------------------- a full disk


def test_lines_wait_for_room_on_a_full_disk_and_none_is_torn(tmp_path, monkeypatch, capsys):
    full, write = [False], os.write

    def limited(descriptor, data):
        if full[0] and len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) - 15] if full[0] else data)  # all but the end, then nothing

    with Tracker(run_config(), tmp_path) as tracker:
        monkeypatch.setattr("eureka_megatron.tracking.tracker.os.write", limited)
        tracker.log(0, {"a": 1.0})
        full[0] = True
        tracker.log(1, {"a": 2.0})
        tracker.log(2, {"a": 3.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0]
        full[0] = False
        tracker.log(3, {"a": 4.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    said = capsys.readouterr().out
    assert said.count("No space left on device; its lines wait") == 1


def test_a_run_that_ends_on_a_full_disk_says_what_is_lacking(tmp_path, monkeypatch, capsys):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Tracker(run_config(), tmp_path) as tracker:
        tracker.log(0, {"a": 1.0})
        monkeypatch.setattr("eureka_megatron.tracking.tracker.os.write", full)
        tracker.log(1, {"a": 2.0})
    assert "lacks the last 1 lines" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard_that_cannot_write_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder must be")
    with Tracker(run_config(tensorboard=True), tmp_path) as tracker:
        tracker.log(0, {"a": 1.0})
    assert "warning: tensorboard failed (" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
