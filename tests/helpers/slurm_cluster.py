"""A real Slurm on this machine: munged, slurmctld and two slurmd, each node in namespaces of its own. A helper of tests/system/test_slurm.py.

    controller   network and uts namespace, with the bridge 10.213.7.254     slurmctld, munged; sbatch and scontrol run in here
    node1, node2 network, mount, uts, ipc and pid namespaces, 10.213.7.K     slurmd; own /dev/shm and own local disk (`scratch`)

Every namespace lives as long as the first process in it, so nothing is left when that ends: no bridge, no mount. It takes root.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "unshare", "nsenter", "setpriv", "ip")
ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
CONF = """
ClusterName=eureka
SlurmctldHost=controller(10.213.7.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=5
OverTimeLimit=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
GresTypes=gpu
{more}
NodeName=node1 NodeAddr=10.213.7.1 CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeAddr=10.213.7.2 CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""
# The first process of a node, and its reaper. It says `ready` once in its namespaces, and goes on when its network is there.
NODE = """
set -eu
hostname "$1"
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$2/scratch"
mount --bind "$2/hosts" /etc/hosts
echo ready
read -r _
slurmd -D -N "$1" &
wait
"""
CONTROLLER = 'set -eu; hostname controller; echo ready; read -r _; "$@"'


class SlurmCluster:
    """Started on construction; `close` ends it. Folders: `base`, with `scratch`, which is another disk on each node."""

    def __init__(self, base: Path) -> None:
        self.base, self.conf = base, base / "slurm.conf"
        self._processes: dict[str, subprocess.Popen[str]] = {}
        for folder in ("state", "spool", "scratch"):
            (base / folder).mkdir()
        (base / "hosts").write_text(
            "127.0.0.1 localhost\n10.213.7.254 controller\n10.213.7.1 node1\n10.213.7.2 node2\n"
        )
        for number in range(2):  # no GPU computes behind these, but Slurm hands them out
            os.mknod(base / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (base / "gres.conf").write_text(f"Name=gpu File={base}/gpu[0-1]\n")
        key = base / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.configure("RequeueExit=75")
        try:
            munge = [
                f"--{name}={base}/munge.{name.partition('-')[0]}"
                for name in ("socket", "log-file", "pid-file", "seed-file")
            ]
            self._enter(
                "munged", ["-n", "-u"], CONTROLLER, "munged", "--foreground", "--force", f"--key-file={key}", *munge
            )
            self._go("munged")
            wait_until((base / "munge.socket").exists, 20, "munged")
            self._enter("controller", ["-n", "-u"], CONTROLLER, "slurmctld", "-D")
            self._inside(
                "controller",
                "ip link set lo up",
                "ip link add bridge type bridge",
                "ip addr add 10.213.7.254/24 dev bridge",
                "ip link set bridge up",
            )
            self._go("controller")
            for node in NODES:
                self.start(node)
            wait_until(lambda: all(self.state(node) == "IDLE" for node in NODES), 60, "the nodes")
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """Of Slurm's commands."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.conf)}

    def configure(self, *more: str) -> None:
        """slurm.conf with these lines besides; a controller that runs reads it again."""
        self.conf.write_text(CONF.format(base=self.base, more="\n".join(more)))
        if "controller" in self._processes:
            self.run("scontrol", "reconfigure")

    def start(self, node: str) -> None:
        """A node, or one that was killed."""
        self._enter(
            node, ["-n", "-m", "-u", "-i", "-p", "-f", "--kill-child", "--mount-proc"], NODE, node, str(self.base)
        )
        self._inside(
            "controller",
            f"ip link add {node} type veth peer name eth0 netns {self._processes[node].pid}",
            f"ip link set {node} master bridge up",
        )
        address = f"10.213.7.{NODES.index(node) + 1}/24"
        self._inside(node, "ip link set lo up", f"ip addr add {address} dev eth0", "ip link set eth0 up")
        self._go(node)

    def kill(self, node: str) -> None:
        """Everything on the node at once, as when its power fails."""
        process = self._processes.pop(node)
        for first in psutil.Process(process.pid).children():
            first.kill()
        process.wait(timeout=30)

    def run(self, *command: str) -> str:
        """A command on the login node. → its output; AssertionError with it when it fails."""
        inside = ["nsenter", "--target", str(self._processes["controller"].pid), "--net", "--uts", *command]
        done = subprocess.run(inside, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it. Example: {"JobState": "RUNNING", "Restarts": "0", …}"""
        return fields(self.run("scontrol", "--oneliner", "show", "job", job))

    def while_alive(self, job: str, condition: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Waits for it. AssertionError with what the job's logs say when the job fails first, or does not get there in time."""

        def found() -> object:
            assert self.job(job)["JobState"] in (*ALIVE, "COMPLETED"), self.said(job)
            return condition()

        wait_until(found, seconds, f"job {job}: {what}", lambda: self.said(job))

    def runs_out(self, job: str) -> None:
        """Waits for its good end."""
        self.while_alive(job, lambda: self.job(job)["JobState"] == "COMPLETED", "end", seconds=500)

    def is_queued_again(self, job: str, restarts: int) -> None:
        """Waits until it was requeued so often. On its way there Slurm may call it FAILED for a moment."""

        def requeued() -> bool:
            found = self.job(job)
            return (found["JobState"], found["Restarts"]) == ("PENDING", str(restarts))

        wait_until(requeued, 400, f"job {job}: requeue {restarts}", lambda: self.said(job))

    def start_soon(self, job: str) -> None:
        """Of a requeued job, which by itself starts two minutes later; at once it could not: its node has just revoked its credential."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def said(self, job: str) -> str:
        """The end of what it has printed, and its driver."""
        output = Path(self.job(job)["StdOut"])
        logs = [output, *sorted(output.parent.glob(f"job_{job}/*/driver.log"))]
        return "\n".join(log.read_text()[-2000:] for log in logs if log.exists())

    def state(self, node: str) -> str:
        return fields(self.run("scontrol", "--oneliner", "show", "node", node))["State"]

    def close(self) -> None:
        """Ends every process, and with them the namespaces."""
        for name, process in reversed(self._processes.items()):
            if name in NODES:
                for first in psutil.Process(process.pid).children() if process.poll() is None else ():
                    first.kill()
            else:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _enter(self, name: str, namespaces: list[str], script: str, *arguments: str) -> None:
        """A process in namespaces of its own, which waits there for its network; it ends when this one does."""
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "bash", "-c", script, name, *arguments]
        with (self.base / f"{name}.out").open("a") as log:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.base,
            )
        self._processes[name] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", (self.base / f"{name}.out").read_text()

    def _go(self, name: str) -> None:
        stdin = self._processes[name].stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.close()

    def _inside(self, name: str, *commands: str) -> None:
        for command in commands:
            inside = ["nsenter", "--target", str(self._processes[name].pid), "--net"]
            subprocess.run([*inside, *command.split()], check=True, capture_output=True)


def fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def wait_until(condition: Callable[[], object], seconds: float, what: str, say: Callable[[], str] = str) -> None:
    """Until it is true. AssertionError after so many seconds, with what `say` finds then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{say()}"
        time.sleep(0.2)


def lacking() -> str:
    """Why no Slurm can be started here, or ""."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "-u", "-i", "-p", "-f", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def slurm_cluster(base: Path) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(base)
    try:
        yield cluster
    finally:
        cluster.close()
