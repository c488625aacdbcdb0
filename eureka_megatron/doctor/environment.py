"""What the environment names: TMPDIR, HOME, RAY_ADDRESS. A run meets them late, in a library's words; here they are told first."""

import os
import shutil
import tempfile
from pathlib import Path

from eureka_megatron.doctor.finding import Finding
from eureka_megatron.session import LONGEST_PLACE, silence_of

GIB = 2**30
LEAST_FREE = 2 * GIB  # Ray's log files, spilled objects, compiled kernels


def environment_findings() -> list[Finding]:
    return [_tmpdir(), _home(), _ray_address()]


def _tmpdir() -> Finding:
    named = os.environ.get("TMPDIR")
    folder = Path(named or tempfile.gettempdir())
    problem, note = _unusable(folder), ""
    if not problem:
        free = shutil.disk_usage(folder).free
        note = f", {free / GIB:.0f} GiB free"
        if free < LEAST_FREE:
            problem = f"needs {LEAST_FREE // GIB} GiB"
        elif os.statvfs(folder).f_flag & os.ST_NOEXEC:
            problem = "mounted noexec: what Triton and torch compile there does not load"
        elif len(os.fsencode(folder.absolute() / "eureka-x3k9q2ab")) > LONGEST_PLACE:
            note += ", too long a path for Ray's sockets: they go to a shorter one"
    return Finding(
        "TMPDIR",
        "limited" if problem else "present",
        f"{folder}{note}" + (f": {problem}" if problem else ""),
        required=False,
        lost="the place of Ray's sockets and log files, of spilled objects and of what is compiled for GPUs",
        fix="unset TMPDIR (then it is /tmp; or name a folder that exists, with room, that you may write to)",
    )


def _home() -> Finding:
    folder = Path(os.path.expanduser("~"))
    problem = _unusable(folder) if os.environ.get("HOME") else "not set"
    return Finding(
        "HOME",
        "limited" if problem else "present",
        f"{folder}" + (f": {problem}" if problem else ""),
        required=False,
        lost="what is kept between runs: models of the hub, vLLM's and Triton's compiled kernels, the wandb login",
        fix="sudo chown $USER $HOME (or export HOME=DIR, a folder that you may write to)",
    )


def _ray_address() -> Finding:
    named = os.environ.get("RAY_ADDRESS", "")
    problem = "" if named in ("", "local") else _silence(named)
    return Finding(
        "RAY_ADDRESS",
        "absent" if problem else "present",
        f"{named}: {problem or 'answers'}" if named else "not set: runs start Ray by themselves",
        required=bool(problem),  # a run would join that cluster, and no other
        lost="every run: it would wait for this cluster",
        fix="unset RAY_ADDRESS (runs then start Ray by themselves; or ray start --head on that node)",
    )


def _unusable(folder: Path) -> str:
    """Why nothing can be written there, or ""."""
    if not folder.is_dir():
        return "does not exist" if not os.path.lexists(folder) else "is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def _silence(address: str) -> str:
    """Why no Ray cluster is behind the address, or ""."""
    if address == "auto":
        try:  # Ray leaves there where the last cluster of this machine was started
            temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
            address = (Path(temporary) / "ray" / "ray_current_cluster").read_text().strip()
        except OSError:
            return "no cluster runs on this machine"
    return silence_of(address)
