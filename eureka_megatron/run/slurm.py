"""`eureka slurm`: a run's configuration, checked here, becomes jobs of slurm/train.sbatch.

    run.output/slurm/submission_1/config.yaml     every key, paths made absolute: what the jobs read, also when they are queued again
    run.output/slurm/submission_1/submit.sh       the commands that were given
    run.output/slurm/job_12/attempt_0/            phases.log, driver.log, node_NAME.log, ray_NAME/; written by the jobs

Standard sbatch does the rest: what it refuses is told in its own words.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import yaml

from eureka_megatron.config import RunConfig
from eureka_megatron.data.dataset import read_mixture
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.run.checks import check_algorithm, check_rollout, check_run
from eureka_megatron.run.inputs import settle
from eureka_megatron.run.seats import Demand, check_seats
from eureka_megatron.tracking.console import tell

HOME = Path(__file__).resolve().parents[2]  # of slurm/, beside the package
SCRIPT = HOME / "slurm" / "train.sbatch"
TRAIN, SFT = "train", "sft"  # the commands of eureka that the jobs run
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm.

    Example: Request(stage="train", nodes=2, gpus_per_node=8, time="1-00:00:00", grace=600, chain=1, options=("--partition=gpu",))
    """

    stage: str  # TRAIN or SFT
    nodes: int
    gpus_per_node: int | None  # None: the job asks for none
    time: str | None  # as sbatch takes it; None: the partition's default
    grace: int  # seconds before the limit at which the run is told to save and end
    chain: int  # jobs, one after the other
    options: tuple[str, ...] = ()  # further ones of sbatch


def submit(config: RunConfig, request: Request, *, dry_run: bool) -> None:
    """Check the run, write its configuration below `run.output` and submit the jobs; with `dry_run` print all that instead.

    Raises:
        UserError: the run cannot be, or not in this request; there is no sbatch, or it refuses.
    """
    config = settle(config)
    check(config, request)
    folder = config.run.output / "slurm"
    folder = next(path for n in count(1) if not (path := folder / f"submission_{n}").exists())
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    jobs = [command(config, request, folder / "config.yaml", number) for number in range(1, request.chain + 1)]
    if dry_run:
        print(f"# {folder / 'config.yaml'}\n{text}# submitted as\n" + "\n".join(map(shown, jobs)))
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine's PATH: submit from a login node, or see with --dry-run what would be submitted"
        )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    (folder / "submit.sh").write_text("\n".join(map(shown, jobs)) + "\n", encoding="utf-8")
    before = ""
    for environment, words in jobs:
        before = _sbatch(environment, words, before)
        tell(f"job {before} submitted; its logs go to {folder.parent / f'job_{before}'}")


def check(config: RunConfig, request: Request) -> None:
    """Refuse what the jobs would end with, or could never hold. Raises UserError."""
    check_run(config)
    if request.stage == TRAIN:
        check_rollout(config)
        check_algorithm(config)
    for path in [path for path, _ in read_mixture(config.data.train)] + [*filter(None, [config.data.test])]:
        if not path.exists():
            raise UserError(f"{path}: no such data file")
    if not SCRIPT.is_file():
        raise UserError(
            f"{SCRIPT} does not exist: install eureka_megatron from its repository (pip install --editable)"
        )
    seconds = limit_seconds(request.time) if request.time else None
    if seconds is not None and seconds <= request.grace + 60:  # Slurm may send the signal a minute early
        raise ConfigError(
            f"--time {request.time} leaves nothing before the signal, {request.grace} s ahead of its end: ask for more, or lower --grace"
        )
    if request.gpus_per_node is not None:
        check_seats(Demand.of(config, engines=request.stage == TRAIN), request.nodes, request.gpus_per_node)


def limit_seconds(text: str) -> int:
    """Of a time as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ConfigError(f"--time {text!r}: need minutes, hours:minutes:seconds or days-hours")
    fields = [int(field) for field in found["fields"].split(":")]
    units = (3600, 60, 1)
    if found["days"] is None and len(fields) < 3:
        units = (60, 1, 0)
    return int(found["days"] or 0) * 86400 + sum(number * unit for number, unit in zip(fields, units, strict=False))


Job = tuple[dict[str, str], list[str]]  # variables for the job, and the words of its command


def command(config: RunConfig, request: Request, file: Path, number: int) -> Job:
    """The command that submits job `number` of the chain; what it depends on is added once it is known."""
    variables = {
        "EUREKA_HOME": str(HOME),
        "EUREKA_LOGS": str(config.run.output / "slurm"),
        "EUREKA_COMMAND": request.stage,
    }
    if sys.prefix != sys.base_prefix:
        variables["EUREKA_VENV"] = sys.prefix
    if request.chain > 1:
        variables["EUREKA_CHAIN"] = f"{number}/{request.chain}"
    words = ["sbatch", "--parsable", "--export=ALL", f"--job-name={config.run.name}", f"--nodes={request.nodes}"]
    words += [f"--output={config.run.output / 'slurm' / 'job_%j.out'}", f"--signal=B:USR1@{request.grace}"]
    words += [f"--gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []
    words += [f"--time={request.time}"] if request.time else []
    return variables, [*words, *request.options, str(SCRIPT), str(file)]


def shown(job: Job) -> str:
    """As a shell would take it. The jobs of a chain show `afterany:PREVIOUS`."""
    variables, words = job
    first = variables.get("EUREKA_CHAIN", "1/1").startswith("1/")
    words = words if first else [words[0], "--dependency=afterany:PREVIOUS", *words[1:]]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(words)])


def _sbatch(variables: dict[str, str], words: Sequence[str], before: str) -> str:
    """Submit. → the job's number"""
    words = [words[0], *([f"--dependency=afterany:{before}"] if before else []), *words[1:]]
    done = subprocess.run(words, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        earlier = f" (job {before} of the chain is submitted)" if before else ""
        raise UserError(
            "; ".join(done.stderr.strip().splitlines() or [f"sbatch ended with {done.returncode}"]) + earlier
        )
    return done.stdout.strip().partition(";")[0]
