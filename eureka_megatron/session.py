"""What a command takes of this machine and gives back: the lock of its folder, a place for temporary files, a home, the signals.

`eureka train`, `sft`, `demo`, `verify` and `export` run within `session`, entered before anything heavy is imported:

    TMPDIR/eureka-x3k9q2ab/     everything temporary of all processes, Ray's too; gone at the end, however it comes
    RUN_FOLDER/lock             held from the first moment on, so that two runs never write into one folder

Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from eureka_megatron.errors import Stopped, UserError

LOCK_FILE = "lock"
# A socket's path has 107 bytes at most. Below our folder Ray makes session_2026-11-26_15-55-17_505773_1234567/sockets/plasma_store.
LONGEST_PLACE = 107 - len("/session_2026-11-26_15-55-17_505773_1234567/sockets/plasma_store")
CONNECT_SECONDS = 5.0
SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
# What ends a run; the last two are what batch systems are told to send some time before its end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PLAIN = re.compile(r"[\w./+=@%,:-]+", re.ASCII)  # torch does not quote paths when it calls a compiler
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems know none

_folder: Path | None = None  # of the session that is open
_asked: signal.Signals | None = None  # a signal that the run shall end after this step, with a checkpoint
_ending: signal.Signals | None = None  # the signal that raised Stopped


@contextmanager
def session(output: Path | None = None, *, save_on_signal: bool = False) -> Iterator[None]:
    """Everything above for one command.

    Args:
        output: the run's folder, to be locked.
        save_on_signal: the first SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 is for the run to see (`stop_requested`).

    Raises:
        Stopped: a signal came; everything is given back by then.
        UserError: another run writes into `output`.
    """
    with _signals(save_on_signal), ExitStack() as stack:
        if output is not None:
            stack.enter_context(occupied(output))
        folder = stack.enter_context(temporary_folder())
        stack.enter_context(_home(folder))
        yield


# --- signals ---


def stop_requested() -> signal.Signals | None:
    """The signal that asked the run to end after the present step, with a checkpoint."""
    return _asked


def stop_behind(error: BaseException) -> Stopped | None:
    """The signal that ended the run, if one did: what else fails then (processes that got it too) is its consequence."""
    if isinstance(error, Stopped):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    return None if _ending is None else Stopped(_ending)


@contextmanager
def _signals(save: bool) -> Iterator[None]:
    """Within, a signal raises `Stopped` in the main thread, once."""
    global _asked, _ending
    _asked = _ending = None

    def receive(number: int, _frame: Any) -> None:
        global _asked, _ending
        came = signal.Signals(number)
        if save and _asked is None and came != signal.SIGINT:
            _asked = came
            with suppress(OSError):  # of a terminal that is gone
                print(f"{came.name}: the run ends after this step, with a checkpoint", file=sys.stderr, flush=True)
            return
        for caught in before:  # while everything is given back; whoever cannot wait has SIGKILL
            signal.signal(caught, signal.SIG_IGN)
        _ending = came
        raise Stopped(came)

    # What is ignored stays so (nohup, a shell's background jobs).
    before = {caught: signal.getsignal(caught) for caught in SIGNALS if signal.getsignal(caught) != signal.SIG_IGN}
    for caught in before:
        signal.signal(caught, receive)
    try:
        yield
    except BaseException as error:
        stop = stop_behind(error)
        if stop is None or stop is error:
            raise
        raise stop from error
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def rearm() -> None:
    """Python's handlers once more, for libraries put their own below them: Ray's core has one that dumps its stack at SIGTERM."""
    for caught in SIGNALS:
        with suppress(ValueError, TypeError):  # not in the main thread; a handler that Python does not know
            signal.signal(caught, signal.getsignal(caught))


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started within hold back what a batch system sends to every process of a job: the driver ends them in order, by SIGKILL."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # whatever is forked now inherits the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- the run's folder ---


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Holds the folder (made when missing) for this process; afterwards it is as empty as the run has left it.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    path = folder / LOCK_FILE
    try:
        made = [missing for missing in (folder, *folder.parents) if not missing.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as error:
        raise UserError(f"run.output={folder} cannot be a run's folder: {error.filename}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.close()
        with suppress(OSError):  # not empty
            for missing in made:
                missing.rmdir()


def _locked(path: Path) -> IO[str]:
    while True:
        lock = path.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise UserError(
                f"run.output={path.parent}: another run writes there{f' ({holder})' if holder else ''}; choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        # Whoever held it before may have removed the file between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                lock.flush()
                return lock
        lock.close()


# --- temporary files ---


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder in TMPDIR for all temporary files of this process and those it starts; within a session, that one's.

    Libraries leave files behind, those of killed processes above all.
    """
    global _folder
    if _folder is not None:
        yield _folder
        return
    usual = tempfile.gettempdir()
    if not _PLAIN.fullmatch(usual):
        usual = _writable(SHORT_PLACES) or usual
    folder = Path(tempfile.mkdtemp(prefix="eureka-", dir=usual))
    # Caches of compiled code outlive a run.
    cache = os.path.join(usual, "torchinductor_" + re.sub(r"[^\w-]", "_", _user()))
    changes = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache)}
    _folder = folder
    try:
        with environment(changes):
            tempfile.tempdir = None  # is asked for again
            yield folder
    finally:
        _folder = tempfile.tempdir = None
        _remove(folder)


@contextmanager
def socket_folder(folder: Path) -> Iterator[Path]:
    """This folder, if its path is short enough for Ray's sockets, or a new one that is.

    Raises:
        UserError: there is no such place; names TMPDIR.
    """
    if len(os.fsencode(folder)) <= LONGEST_PLACE:
        yield folder
        return
    place = _writable(SHORT_PLACES)
    if place is None:
        raise UserError(
            f"TMPDIR={folder.parent} is too long for Ray's sockets ({LONGEST_PLACE - len('/eureka-x3k9q2ab')} bytes at most), and none of "
            f"{', '.join(SHORT_PLACES)} can be written; set TMPDIR to a shorter path"
        )
    short = Path(tempfile.mkdtemp(prefix="eureka-", dir=place))
    try:
        yield short
    finally:
        _remove(short)


def _writable(places: Sequence[str]) -> str | None:
    return next((place for place in places if os.access(place, os.W_OK | os.X_OK)), None)


def _remove(folder: Path, seconds: float = 5.0) -> None:
    """Processes that are being ended may still write there for a moment."""
    deadline = time.monotonic() + seconds
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.1)


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for this process and those it starts; afterwards as before."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container with an arbitrary user
        return str(os.getuid())


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    """A home in `folder` where there is none that can be written; what can be read of the real one still is."""
    home = Path(os.path.expanduser("~"))  # "~" itself where there is none at all
    changes = {} if "USER" in os.environ or "LOGNAME" in os.environ else {"USER": _user()}
    if not (home.is_absolute() and os.access(home, os.W_OK | os.X_OK)):
        stand_in = folder / "home"
        stand_in.mkdir(exist_ok=True)
        changes["HOME"] = str(stand_in)
        for name, path in (("HF_HOME", home / ".cache" / "huggingface"), ("NETRC", home / ".netrc")):
            if name not in os.environ and path.exists():
                changes[name] = str(path)
        print(f"HOME={home} cannot be written: caches of libraries last for this run only", file=sys.stderr, flush=True)
    with environment(changes):
        yield


# --- RAY_ADDRESS ---


def silence_of(address: str) -> str:
    """Why no Ray cluster can be behind HOST:PORT or ray://HOST:PORT, or "": asked by a plain connection, for Ray waits for minutes."""
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((place.hostname or "", place.port or 0), timeout=CONNECT_SECONDS):
            return ""
    except ValueError:
        return "need HOST:PORT, ray://HOST:PORT, auto or local"
    except OSError as error:
        return f"nobody answers at {address} ({error.strerror or error})"
