"""What the environment names: TMPDIR, HOME, RAY_ADDRESS. A run meets them late, in a library's words; here they are told first."""

import os
import shutil
import tempfile
from pathlib import Path

from eureka_megatron.doctor.finding import Answer
from eureka_megatron.doctor.gpu import Machine
from eureka_megatron.session import LONGEST_PLACE, silence_of

GIB = 2**30
LEAST_FREE = 2 * GIB  # Ray's log files, spilled objects, compiled kernels


def ask_tmpdir(machine: Machine) -> Answer:
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
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
    return _of_folder(f"{folder}{note}", problem)


def ask_home(machine: Machine) -> Answer:
    folder = Path(os.path.expanduser("~"))
    return _of_folder(str(folder), _unusable(folder) if os.environ.get("HOME") else "not set")


def _of_folder(found: str, problem: str) -> Answer:
    return Answer("limited", f"{found}: {problem}") if problem else Answer("present", found)


def ask_ray_address(machine: Machine) -> Answer:
    """An address that leads nowhere blocks: a run would join that cluster, and no other."""
    named = os.environ.get("RAY_ADDRESS", "")
    if not named:
        return Answer("present", "not set: runs start Ray by themselves")
    problem = "" if named == "local" else _silence(named)
    return Answer("absent" if problem else "present", f"{named}: {problem or 'answers'}", required=bool(problem))


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
