"""What a command takes of the machine and gives back: locks, temporary places, a home, signals. In processes of their own where it matters."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from eureka_megatron import session as module
from eureka_megatron.errors import Stopped, UserError
from eureka_megatron.run.cluster import require_cluster
from eureka_megatron.session import LOCK_FILE, LONGEST_PLACE, occupied, session, socket_folder, temporary_folder


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


# --- the folder ---


def test_a_folder_is_held_once_and_is_as_it_was_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with occupied(folder):
        with (
            pytest.raises(
                UserError, match=rf"run.output={folder}: another run writes there \(process {os.getpid()} on "
            ),
            occupied(folder),
        ):
            pass
        assert (folder / LOCK_FILE).exists()
    assert not folder.parent.exists()
    with occupied(folder):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    with occupied(folder):
        pass


def test_the_lock_of_a_killed_run_does_not_stay(tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from eureka_megatron.session import occupied
        with occupied(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    with python(code) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on"), occupied(tmp_path):
            pass
        other.kill()
        other.wait()
    with occupied(tmp_path):
        pass


def test_a_folder_that_cannot_be_one_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        with pytest.raises(UserError, match=f"run.output={folder} cannot be a run's folder: "), occupied(folder):
            pass


# --- temporary files ---


def test_temporary_files_of_everybody_lie_in_one_folder_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with temporary_folder() as folder:
        assert folder.parent == tmp_path
        assert Path(tempfile.gettempdir()) == folder
        assert os.environ["TMPDIR"] == str(folder)
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path  # worth keeping
        tempfile.mkdtemp()
        with temporary_folder() as again:
            assert again == folder
    assert list(tmp_path.iterdir()) == []
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path)


def test_a_path_that_compilers_cannot_read_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my files").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "my files"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with temporary_folder() as folder:
        assert " " not in str(folder)


@pytest.mark.parametrize("length", [1, LONGEST_PLACE, LONGEST_PLACE + 1, 200])
def test_sockets_find_a_short_place(length: int) -> None:
    folder = Path("/" + "t" * (length - 1))
    with socket_folder(folder) as found:
        assert (found == folder) == (length <= LONGEST_PLACE)
        assert len(str(found)) <= LONGEST_PLACE
    assert found == folder or not found.exists()


def test_without_a_short_place_one_line_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT_PLACES", ("/nowhere",))
    with (
        pytest.raises(UserError, match=r"TMPDIR=/t+ is too long for Ray's sockets"),
        socket_folder(Path("/" + "t" * 90) / "x"),
    ):
        pass


@pytest.mark.parametrize("home", ["/dev/null/home", "/nonexistent"])
def test_a_home_that_cannot_be_written_is_replaced(
    home: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    with session():
        stand_in = Path("~").expanduser()
        assert os.access(stand_in, os.W_OK)
    assert not stand_in.exists()
    assert os.environ["HOME"] == home
    assert f"HOME={home} cannot be written" in capfd.readouterr().err


# --- signals ---

# Test runs in the background, or below nohup, ignore some signals, and what they start inherits that.
WAITS = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from eureka_megatron.cli.commands import _complain
    from eureka_megatron.errors import Stopped
    from eureka_megatron.session import session, stop_requested
    try:
        with session(save_on_signal={save}):
            print("ready", flush=True)
            deadline = time.monotonic() + 1000
            while time.monotonic() < deadline:
                time.sleep(0.02)
                if stop_requested():
                    print("asked by", stop_requested().name, flush=True)
                    break
            {after}
    except Stopped as stop:
        print(stop, stop.exit_code)
"""


def told(process: subprocess.Popen[str], *numbers: int) -> str:
    """What it prints after "ready". Each signal but the last is answered before the next is sent."""
    said = ""
    with process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers[:-1]:
            process.send_signal(number)
            for line in process.stdout:
                said += line
                if line.startswith("asked by "):
                    break
        process.send_signal(numbers[-1])
        return said + process.stdout.read()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_in_order(name: str, tmp_path: Path) -> None:
    number = getattr(signal, name)
    words = told(python(WAITS.format(save=False, after="pass"), TMPDIR=str(tmp_path)), number)
    assert words.strip() == ("interrupted" if name == "SIGINT" else f"stopped by {name}") + f" {128 + number}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("eureka-")]


def test_a_run_that_saves_is_asked_first_and_ended_by_the_second(tmp_path: Path) -> None:
    waits = python(WAITS.format(save=True, after="time.sleep(1000)"), TMPDIR=str(tmp_path))
    words = told(waits, signal.SIGUSR1, signal.SIGTERM).splitlines()
    assert words == [
        "SIGUSR1: the run ends after this step, with a checkpoint",
        "asked by SIGUSR1",
        f"stopped by SIGTERM {128 + signal.SIGTERM}",
    ]


def test_what_fails_after_a_signal_is_its_consequence(tmp_path: Path) -> None:
    code = """
        import time
        from eureka_megatron.errors import Stopped
        from eureka_megatron.session import session
        try:
            with session():
                print("ready", flush=True)
                try:
                    time.sleep(1000)
                finally:
                    raise OSError("a process that got the signal, too, is gone")
        except Stopped as stop:
            print(stop, stop.exit_code)
    """
    words = told(python(code, TMPDIR=str(tmp_path)), signal.SIGTERM)
    assert words.strip() == f"stopped by SIGTERM {128 + signal.SIGTERM}"


def test_what_is_ignored_stays_ignored() -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with session():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert Stopped(signal.SIGTERM, exit_code=85).exit_code == 85


# --- RAY_ADDRESS ---


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1", "here:there", "[::1]:9"])
def test_a_cluster_that_is_gone_is_told_at_once(address: str) -> None:
    with pytest.raises(UserError) as raised:
        require_cluster(address)
    assert re.match(rf"RAY_ADDRESS={re.escape(address)}: (nobody answers at|need HOST:PORT)", str(raised.value))
    assert "\n" not in str(raised.value)


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(UserError, match="RAY_ADDRESS=auto: no cluster runs on this machine"):
        require_cluster("auto")
