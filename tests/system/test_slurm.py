"""The shipped batch scripts on a real Slurm of two nodes, each in network, mount and process namespaces of its own.

One Slurm for the module. Runs are the counting task with a tiny model: reinforcement learning where weights and rollouts matter, the
cold start where only the job's life does.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eureka_megatron.checkpoint.store import list_checkpoints
from eureka_megatron.demo.counting import write_counting
from eureka_megatron.demo.forms import build_published
from tests.helpers.slurm_cluster import SlurmCluster, lacking, slurm_cluster, wait_until
from tests.system.test_resume import CONFIG, numbers

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200), pytest.mark.skipif(bool(lacking()), reason=lacking())]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5  # of CONFIG
SFT = "sft: {{steps: {steps}, samples_per_step: 6}}\n"


class Site:
    """The cluster, and runs of it."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster, self.base = cluster, cluster.base
        build_published(self.base / "model", seed=3, randomize_all=True)
        self.data = write_counting(self.base / "data", train=40, test=4).train

    def config(self, name: str, more: str) -> Path:
        path = self.base / f"{name}.yaml"
        path.write_text(CONFIG.format(output=self.base / name, model=self.base / "model", data=self.data) + more)
        return path

    def submit(self, config: Path, *options: str) -> list[str]:
        """`eureka slurm` on the login node. → the jobs' numbers"""
        said = self.cluster.run(sys.executable, "-m", "eureka_megatron", "slurm", str(config), *options)
        return re.findall(r"^job (\d+) submitted", said, re.MULTILINE)

    def saved(self, name: str) -> int:
        """Steps that the newest checkpoint of the run holds."""
        return max([step for step, _ in list_checkpoints(self.base / name / "checkpoints")], default=0)

    def stop(self, job: str) -> None:
        """The signal that Slurm sends before the limit, now."""
        self.cluster.run("scancel", "--signal=USR1", "--batch", job)

    def phases(self, name: str, job: str, attempt: int) -> str:
        return (self.base / name / "slurm" / f"job_{job}" / f"attempt_{attempt}" / "phases.log").read_text()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # Ray's sockets: a short path
        base = Path(folder)
        settings = {
            "PYTHONPATH": str(ROOT),
            "EUREKA_SCRATCH": str(base / "scratch"),
            "EUREKA_OBJECT_STORE_BYTES": str(200 * 2**20),
        }
        with pytest.MonkeyPatch.context() as patch, slurm_cluster(base) as cluster:
            for name, value in settings.items():
                patch.setenv(name, value)
            yield Site(cluster)


TWO_RANKS = "parallel: {data: 2}\n"
TWO_NODES = ("--nodes", "2", "--sbatch=--cpus-per-task=2")


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> str:
    """A run of reinforcement learning over two nodes, begun. → its job"""
    return site.submit(site.config("whole", TWO_RANKS), *TWO_NODES)[0]


def test_a_job_saves_before_its_limit_and_goes_on_beside_another_one_on_its_node(site: Site, undisturbed: str) -> None:
    """The limit's own signal; Slurm requeues on exit code 75."""
    cluster, steps = site.cluster, "steps: 1000000"
    options = ("--stage", "sft", "--nodes", "1", "--time", "60", "--grace", "60", "--sbatch=--nodelist=node1")
    (job,) = site.submit(site.config("limit", SFT.format(steps=1000000)), *options)
    submitted = site.base / "limit" / "slurm" / "submission_1" / "config.yaml"
    assert steps in submitted.read_text()
    cluster.while_alive(job, lambda: site.saved("limit") > 0, "a step")
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    cluster.is_queued_again(job, 1)
    first = site.phases("limit", job, 0)
    assert "signal: the run is to end with a checkpoint" in first
    assert "driver ended with exit code 75" in first
    reached = site.saved("limit")
    assert reached > 0
    submitted.write_text(submitted.read_text().replace(steps, f"steps: {site.saved('limit') + 2}"))
    cluster.start_soon(job)
    cluster.runs_out(job)
    assert numbers(site.base / "limit" / "metrics.jsonl").keys() == set(range(site.saved("limit")))
    assert (site.base / "limit" / "hf" / "model.safetensors").exists()
    logs = site.base / "limit" / "slurm" / f"job_{job}"
    assert sorted(path.name for path in logs.iterdir()) == ["attempt_0", "attempt_1"]
    assert all(
        (attempt / "driver.log").exists() and (attempt / "node_node1.log").exists() for attempt in logs.iterdir()
    )

    cluster.runs_out(undisturbed)
    other = site.phases("whole", undisturbed, 0)
    assert first.splitlines()[0].split()[0] < other.splitlines()[-1].split()[0], "they did not run at once"
    assert cluster.job(undisturbed)["BatchHost"] == cluster.job(job)["BatchHost"] == "node1"


def test_a_run_whose_node_dies_goes_on_to_the_numbers_of_one_that_never_stopped(site: Site, undisturbed: str) -> None:
    cluster = site.cluster
    (job,) = site.submit(site.config("killed", TWO_RANKS), *TWO_NODES)
    cluster.configure()  # without RequeueExit: a script that sees the loss before Slurm does asks for it
    cluster.while_alive(job, lambda: site.saved("killed") >= 2, "two steps")
    cluster.kill("node2")
    cluster.is_queued_again(job, 1)
    cluster.configure("RequeueExit=75")
    assert site.saved("killed") < STEPS
    cluster.start("node2")
    cluster.start_soon(job)
    cluster.runs_out(job)
    cluster.runs_out(undisturbed)
    whole, killed = (numbers(site.base / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert whole.keys() == set(range(STEPS))
    assert len({metrics["train/entropy"] for metrics in whole.values()}) == STEPS, "every step must be another"
    assert killed == whole
    for name in ("whole", "killed"):
        seats = json.loads((site.base / name / "topology.json").read_text())["seats"]
        assert {seat["node"] for seat in seats if seat["role"] == "trainer"} == {"node1", "node2"}


def test_a_chain_of_three_jobs_does_one_run(site: Site) -> None:
    cluster = site.cluster
    jobs = site.submit(
        site.config("chain", SFT.format(steps=1000000)), "--stage", "sft", "--nodes", "1", "--chain", "3"
    )
    assert len(jobs) == 3
    cluster.run("scontrol", "hold", jobs[2])
    reached = 0
    for job in jobs[:2]:
        cluster.while_alive(job, lambda: site.saved("chain") > reached, "a step")  # noqa: B023
        site.stop(job)
        cluster.runs_out(job)
        assert "the next job of the chain goes on" in site.phases("chain", job, 0)
        reached = site.saved("chain")
    submitted = site.base / "chain" / "slurm" / "submission_1" / "config.yaml"
    submitted.write_text(submitted.read_text().replace("steps: 1000000", f"steps: {reached + 2}"))
    cluster.run("scontrol", "release", jobs[2])
    cluster.runs_out(jobs[2])
    assert numbers(site.base / "chain" / "metrics.jsonl").keys() == set(range(site.saved("chain")))
    assert (site.base / "chain" / "hf" / "model.safetensors").exists()
    logs = site.base / "chain" / "slurm" / f"job_{jobs[2]}" / "attempt_0"
    assert (logs / "ray_node1" / "raylet.out").exists(), "what Ray has logged is kept"


def test_a_run_that_fails_by_itself_is_not_queued_again(site: Site) -> None:
    """With GPUs, as Slurm gives them to the steps: those of Ray and of the driver share them."""
    cluster, logs = site.cluster, site.base / "failed"
    words = ("--gpus-per-node=2", f"--output={logs}/job_%j.out", str(ROOT / "slurm" / "train.sbatch"), "none.yaml")
    logs.mkdir()
    job = cluster.run(
        "env", f"EUREKA_HOME={ROOT}", f"EUREKA_LOGS={logs}", "sbatch", "--parsable", "--nodes=1", *words
    ).strip()
    wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", 200, "the failure", lambda: cluster.said(job))
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert (cluster.job(job)["Restarts"], cluster.job(job)["TresPerNode"]) == ("0", "gres:gpu:2")
    assert "error: configuration file none.yaml does not exist" in cluster.said(job)
    assert "every node answers" in (logs / f"job_{job}" / "attempt_0" / "phases.log").read_text()


def test_an_array_evaluates_what_its_list_names_and_a_conversion_goes_back_and_forth(site: Site) -> None:
    cluster = site.cluster
    (site.base / "list").write_text(
        f"convert inspect {site.base / 'model'} --json\nverify --hf {site.base / 'model'} --json\n"
    )
    scripts = ROOT / "slurm"
    (site.base / "logs").mkdir()
    environment = [f"EUREKA_HOME={ROOT}", f"EUREKA_LOGS={site.base / 'logs'}"]
    output = f"--output={site.base / 'logs' / 'job_%A_%a.out'}"
    submit = ("env", *environment, "sbatch", "--parsable", output)
    array = cluster.run(*submit, "--array=1-2", str(scripts / "eval.sbatch"), str(site.base / "list")).strip()
    megatron, back = site.base / "megatron", site.base / "back"
    there = ("hf-to-megatron", "--input", str(site.base / "model"), "--output", str(megatron), "--quiet")
    convert = cluster.run(*submit, str(scripts / "convert.sbatch"), *there).strip()
    export = cluster.run(
        *submit,
        f"--dependency=afterok:{convert}",
        str(scripts / "export.sbatch"),
        str(megatron),
        "--output",
        str(back),
        "--quiet",
    ).strip()
    for job in (f"{array}_1", f"{array}_2", convert, export):
        cluster.runs_out(job)
    found = [(site.base / "logs" / f"job_{array}_{task}" / "attempt_0" / "output.log").read_text() for task in (1, 2)]
    assert '"tensors"' in found[0]
    assert '"passed": true' in found[1]
    assert (back / "model.safetensors").exists()


def test_nothing_is_left_of_the_cluster(tmp_path: Path) -> None:
    def traces() -> tuple[str, str, int]:
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return Path("/proc/self/mounts").read_text(), links, sum(str(tmp_path) in command for command in commands)

    before = traces()
    with slurm_cluster(tmp_path):
        assert traces()[2]
    assert traces() == before
