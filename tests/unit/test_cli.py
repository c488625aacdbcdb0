"""The command line as a user meets it: one error line with the nearest valid name, exit codes, no waiting for help."""

import errno
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from eureka_megatron import __version__
from eureka_megatron.cli.arguments import parse
from eureka_megatron.cli.commands import main

ROOT = Path(__file__).resolve().parents[2]


def eureka(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eureka_megatron", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error line of a command that must end with 2."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: model}\ndata: {train: train.jsonl}\n")
    return path


def test_help_answers_at_once_and_imports_nothing_heavy():
    code = (
        "import sys; from eureka_megatron.cli.commands import main; main(['--help']);"
        "heavy = {'torch', 'numpy', 'ray', 'vllm', 'megatron', 'pydantic', 'rich', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "sft", "train", "verify", "convert", "data", "doctor"):
        assert f"\n    {command} " in done.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"eureka-megatron {__version__}"


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().err
    assert "usage: eureka" in shown
    assert "error: eureka: a command is required" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "x.yaml"], "unknown command 'trian'; did you mean 'train'?"),
        (["data", "countng"], "eureka data: unknown command 'countng'; did you mean 'counting'?"),
        (["verify", "--hf", "x", "--tpp", "2"], "eureka verify: unknown option '--tpp'; did you mean '--tp'?"),
        (["verify", "--hf", "x", "--sequence"], "did you mean '--sequence-parallel'?"),
        (["verify", "--hf", "x", "--tp", "0"], "--tp: expected a whole number of at least 1, found '0'"),
        (
            ["convert", "hf-to-megatrn"],
            "eureka convert: unknown command 'hf-to-megatrn'; did you mean 'hf-to-megatron'?",
        ),
        (
            ["convert", "inspect", "x", "--jsn"],
            "eureka convert inspect: unknown option '--jsn'; did you mean '--json'?",
        ),
        (["verify"], "required: --hf; see `eureka verify --help`"),
        (["train"], "eureka train: the following arguments are required: CONFIG"),
        (["demo", "extra"], "unexpected argument 'extra'; overrides have the form section.key=value"),
        (["doctor", "extra"], "eureka doctor: unexpected argument 'extra'"),
        (["data", "counting", "--output", "x", "--noise", "2"], "expected a number from 0 to 1, found '2'"),
        (["train", "missing.yaml"], "configuration file missing.yaml does not exist"),
    ],
)
def test_bad_usage_is_one_line_that_names_what_would_be_right(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize("command", ["sft", "train"])
def test_a_bad_configuration_ends_before_anything_heavy_is_imported(config_file, command):
    done = eureka(command, config_file, "optimizer.lrr=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {config_file}: unknown key 'optimizer.lrr'; did you mean 'lr'?\n"


def test_the_first_word_comes_before_what_is_slow_to_import(config_file, tmp_path):
    for command, stream in ((["train", config_file], "stdout"), (["verify", "--hf", "x", "--json"], "stderr")):
        # An import of torch that never ends; what has been said is there all the same.
        code = (
            "import sys, time; from eureka_megatron.cli.commands import main\n"
            "class Slow:\n def find_spec(self, name, *_):\n  if name == 'torch': time.sleep(60)\n"
            f"sys.meta_path.insert(0, Slow()); main({[str(word) for word in command]})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        line = getattr(process, stream).readline()
        process.kill()
        process.communicate()
        assert line.startswith("loading torch and Megatron-Core")


def test_each_of_several_problems_has_its_line(capsys, config_file):
    assert main(["train", str(config_file), "optimizer.lrr=1", "trainin.steps=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_debug_is_taken_anywhere_and_adds_the_traceback():
    for arguments in (["--debug", "train", "missing.yaml"], ["train", "missing.yaml", "--debug"]):
        done = eureka(*arguments)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert done.stderr.endswith("error: configuration file missing.yaml does not exist\n")
    assert "Traceback" not in eureka("train", "missing.yaml").stderr


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["data", "counting", "--output=~/x y", "--train", "1", "--test", "1"]) == 0
    assert (tmp_path / "x y" / "train.jsonl").exists()
    parsed = parse(["data", "mmk12", "--input", "~/a", "b~", "--output=~"])
    assert (parsed.input, parsed.output) == ([tmp_path / "a", Path("b~")], tmp_path)
    parsed = parse(["sft", "~/run.yaml", "--resume=~/runs/1", "run.name=~"])
    assert (parsed.config, parsed.resume, parsed.overrides) == (
        tmp_path / "run.yaml",
        f"{tmp_path}/runs/1",
        ["run.name=~"],
    )
    assert "there is no such home folder" in refused(capsys, "train", "~nobody-here/run.yaml")


def test_counting_writes_the_task(tmp_path, capsys):
    assert main(["data", "counting", "--output", str(tmp_path), "--train", "3", "--test", "2"]) == 0
    assert "3 training rows" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert len(list((tmp_path / "images").glob("*.png"))) == 5


def test_a_checkpoint_goes_to_megatron_and_back_bitwise(tiny_dir, tmp_path, capsys):
    megatron, back = tmp_path / "megatron", tmp_path / "hf"
    for kind, source, target in (("hf-to-megatron", tiny_dir, megatron), ("megatron-to-hf", megatron, back)):
        assert main(["convert", kind, "--input", str(source), "--output", str(target), "--verify", "--quiet"]) == 0
    assert main(["convert", "inspect", str(tiny_dir), str(back)]) == 0
    assert "no differences" in capsys.readouterr().out
    assert main(["convert", "hf-to-megatron", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_where_a_folder_must_be_is_an_error_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["data", "counting", "--output", str(tmp_path / "file" / "x"), "--train", "1", "--test", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Not a directory" in error


def test_a_missing_package_is_told_with_the_way_out(tmp_path):
    # None in sys.modules is how the import system itself marks a package that is not there.
    arguments = ["data", "counting", "--output", str(tmp_path)]
    code = f"import sys; sys.modules['PIL'] = None; from eureka_megatron.cli.commands import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "error: the package 'PIL' is not installed; `eureka doctor` says how to get it\n"


def test_ctrl_c_ends_with_130(tmp_path):
    command = [
        sys.executable,
        "-m",
        "eureka_megatron",
        "data",
        "counting",
        "--output",
        str(tmp_path),
        "--train",
        "99999",
    ]
    # A shell starts what runs in the background with Ctrl-C ignored, and so would everything below it: not here.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "images").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "error: interrupted\n"
    assert not (tmp_path / "train.jsonl").exists()


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m eureka_megatron doctor --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_errors_of_remote_processes_become_one_line_unless_they_are_defects() -> None:
    from eureka_megatron.errors import UserError, from_remote, last_message

    def remote(cause: Exception) -> Exception:
        error = RuntimeError("the whole remote traceback")
        error.cause = cause
        return from_remote("trainer rank 1", error)

    assert str(remote(UserError("a.jsonl:3: bad"))) == "a.jsonl:3: bad"
    full = remote(OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, UserError)
    assert str(full) == "trainer rank 1: where it writes: No space left on device"
    memory = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "trainer rank 1: CUDA out of memory" in str(remote(memory))
    assert "training.max_tokens_per_micro_batch" in str(remote(memory))
    assert str(remote(KeyError("x"))) == "the whole remote traceback"

    text = (
        'The actor died\n  File "a.py", line 3, in f\n    M(x=1)\nlib.ValidationError: 1 validation error for M\n'
        "  Value error, too long\nTo allow it [type=x]\n    For further information visit https://a.example\n"
    )
    assert last_message(RuntimeError(text)) == (
        "lib.ValidationError: 1 validation error for M Value error, too long To allow it [type=x]"
    )
