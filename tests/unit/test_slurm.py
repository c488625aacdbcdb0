"""`eureka slurm` as far as it goes without Slurm: what it writes, and what it refuses. The jobs run in tests/system/test_slurm.py."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from eureka_megatron.cli.commands import main
from eureka_megatron.config import load_config
from eureka_megatron.errors import ConfigError
from eureka_megatron.run.inputs import settle
from eureka_megatron.run.slurm import limit_seconds

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"


@pytest.fixture
def run_file(tiny_dir: Path, tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {tiny_dir}}}\ndata: {{train: {tmp_path / 'rows.jsonl'}, max_prompt_tokens: 96}}\n"
        f"run: {{output: {tmp_path / 'out put'}}}\nrollout: {{max_response_tokens: 16, max_model_tokens: 128}}\n"
        "training: {max_tokens_per_micro_batch: 512}\n"
    )
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["slurm", *map(str, arguments)]) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading torch")]
    return line


def test_a_dry_run_prints_the_configuration_the_jobs_would_read_and_writes_nothing(run_file, capsys, tmp_path):
    words = [
        "parallel.tensor=2",
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--time",
        "1-00",
        "--partition",
        "gpu",
        "--chain",
        "2",
        "--dry-run",
    ]
    assert main(["slurm", str(run_file), *words]) == 0
    head, _, jobs = capsys.readouterr().out.partition("# submitted as\n")
    assert not (tmp_path / "out put").exists()
    written = tmp_path / "written.yaml"
    written.write_text(head)
    assert load_config(written) == settle(load_config(run_file, ["parallel.tensor=2"]))
    first, second = jobs.strip().splitlines()
    file = tmp_path / "out put" / "slurm" / "submission_1" / "config.yaml"
    assert f"EUREKA_LOGS='{tmp_path}/out put/slurm' EUREKA_COMMAND=train" in first
    for word in (
        "--nodes=2",
        "--gpus-per-node=4",
        "--time=1-00",
        "--partition=gpu",
        "--signal=B:USR1@600",
        f"'{file}'",
    ):
        assert word in first.split(" sbatch ")[1]
    assert "EUREKA_CHAIN=1/2" in first
    assert "EUREKA_CHAIN=2/2" in second
    assert "--dependency" not in first
    assert "--dependency=afterany:PREVIOUS" in second


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nodes", "1"], "sbatch is not on this machine's PATH"),
        (["--nodes", "1", "parallel.tensor=3", "--dry-run"], "3"),
        (
            ["--nodes", "1", "--gpus-per-node", "1", "parallel.tensor=2"],
            "parallel.tensor=2 needs so many GPUs on one node, the largest has 1",
        ),
        (
            ["--nodes", "1", "--gpus-per-node", "8", "parallel.data=8"],
            "this run needs 9 GPUs (8 trainer ranks, 1 engine × 1), the cluster has 8: placement=colocated",
        ),
        (
            ["--nodes", "1", "--gpus-per-node", "3", "parallel.tensor=2", "parallel.data=2"],
            "this run needs 5 GPUs",
        ),
        (["--nodes", "1", "--time", "10"], "--time 10 leaves nothing before the signal, 600 s ahead of its end"),
        (["--nodes", "1", "--time", "soon"], "--time 'soon': need minutes"),
        (["--nodes", "1", "data.train=none.jsonl"], "none.jsonl: no such data file"),
        (["--nodes", "1", "algorithm.loss=ppo_clp"], "ppo_clp"),
        ([], "the following arguments are required: --nodes"),
        (["--nodes", "0"], "--nodes: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_written(
    run_file, capsys, monkeypatch, arguments, expected
):
    monkeypatch.setenv("PATH", "")
    assert expected in refused(capsys, run_file, *arguments)
    assert not (run_file.parent / "out put").exists()


def test_what_sbatch_refuses_is_told_in_its_words(run_file, capsys, monkeypatch, tmp_path):
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert (
        refused(capsys, run_file, "--nodes", "1", "--partition", "x")
        == "error: sbatch: error: invalid partition specified: x"
    )


def test_time_limits_are_read_as_slurm_does():
    expected = {"90": 5400, "1:30": 90, "1:00:30": 3630, "2-00": 172800, "1-02:03": 93780, "1-02:03:04": 93784}
    assert {text: limit_seconds(text) for text in expected} == expected
    with pytest.raises(ConfigError):
        limit_seconds("1d")


def test_the_scripts_stay_short_and_shellcheck_finds_nothing_in_them():
    scripts = sorted(SCRIPTS.iterdir())
    assert {"train.sbatch", "convert.sbatch", "export.sbatch", "eval.sbatch", "env.sh"} <= {
        path.name for path in scripts
    }
    assert all(len(path.read_text().splitlines()) < 150 for path in scripts)
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=SCRIPTS.parent)
    assert done.returncode == 0, done.stdout


def test_the_submitted_configuration_of_a_cold_start_has_its_learning_rate(run_file, capsys):
    assert main(["slurm", str(run_file), "--nodes", "1", "--stage", "sft", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out.partition("# submitted as")[0])["optimizer"]["lr"] == 1e-5
    assert "EUREKA_COMMAND=sft" in out
