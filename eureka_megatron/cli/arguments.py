"""The arguments of `eureka`, in one parser; a wrong one is a ConfigError that shows the nearest valid name. Imports nothing heavy."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from eureka_megatron import __version__
from eureka_megatron.errors import ConfigError, nearest
from eureka_megatron.places import from_home

DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors that show the nearest valid name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.option_strings[0] if action.option_strings else "command"
            raise ConfigError(f"{self.prog}: unknown {what} {value!r}{nearest(str(value), map(str, action.choices))}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = _build()
    if not arguments:
        parser.print_help(sys.stderr)
        raise ConfigError("eureka: a command is required")
    parsed, rest = parser.parse_known_args(arguments)
    _spell_homes_out(parsed)
    # argparse gives up on `key=value` once an option stood between them; they are as good behind it as before it.
    if hasattr(parsed, "overrides"):
        parsed.overrides = [*parsed.overrides, *(word for word in rest if "=" in word and not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-") or "=" not in word]
    if rest:
        used = commands[parsed.prog]
        name = rest[0].partition("=")[0]
        if name.startswith("-"):
            options = [option for option in used._option_string_actions if option.startswith("--")]
            raise ConfigError(f"{used.prog}: unknown option {name!r}{nearest(name, [*options, '--debug'])}")
        expected = "; overrides have the form section.key=value" if hasattr(parsed, "overrides") else ""
        raise ConfigError(f"{used.prog}: unexpected argument {rest[0]!r}{expected}")
    return parsed


def _spell_homes_out(parsed: argparse.Namespace) -> None:
    """No shell does it in `--input=~/x`: whatever begins with `~` is a path, and its home folder is meant."""

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(one) for one in value]
        return type(value)(from_home(str(value))) if isinstance(value, str | Path) and str(value)[:1] == "~" else value

    vars(parsed).update({name: whole(value) for name, value in vars(parsed).items()})


Argument = tuple[str, dict[str, Any]]


def _flag(name: str, text: str) -> Argument:
    return name, {"action": "store_true", "help": text}


def _value(name: str, metavar: str | None, text: str, **more: Any) -> Argument:
    return name, {"metavar": metavar, "help": text, **more}


def _path(name: str, metavar: str, text: str, **more: Any) -> Argument:
    return _value(name, metavar, text, type=Path, **more)


def _number(name: str, text: str, **more: Any) -> Argument:
    return _value(name, "N", text, type=_positive, **more)


def _choice(name: str, choices: tuple[str, ...], text: str) -> Argument:
    return name, {"choices": choices, "default": choices[0], "help": f"{text} ({choices[0]})"}


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _rate(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


_RUN = (
    _path("config", "CONFIG", "YAML file"),
    _value("overrides", "KEY=VALUE", "e.g. optimizer.lr=1e-6", nargs="*", default=[]),
    _value(
        "--resume", "auto|DIR", "go on from run.output's newest whole checkpoint, or from this one (or run's folder)"
    ),
)
_DRY = (
    _flag("--dry-run", "check all that can be without the GPUs, memory of every kind of rank included; start nothing"),
    _value("--gpu", "NAME", "of --dry-run: a100, h100, h200, b200, … (h100)", default="h100"),
    _value("--gpu-memory", "GIB", "of --dry-run: of each, if not the usual of that GPU", type=_rate),
    _number("--nodes", "of --dry-run: nodes of the job (as many as needed)"),
    _number("--gpus-per-node", "of --dry-run: GPUs of each (8)", default=8),
)
# A parallel layout; destinations are the fields of layout.Layout and layout.Execution.
_LAYOUT = (
    _number("--tp", "tensor-parallel size (1)", dest="tensor", default=1),
    _number("--pp", "pipeline stages (1)", dest="pipeline", default=1),
    _number("--vpp", "model chunks a stage (interleaved schedule) (1)", dest="virtual_pipeline", default=1),
    _number("--cp", "context-parallel size (1)", dest="context", default=1),
    _number("--dp", "data-parallel size (1)", dest="data", default=1),
    _number("--layers-first-stage", "text layers of the first stage (equal shares)"),
    _number("--layers-last-stage", "text layers of the last stage (equal shares)"),
    _flag("--sequence-parallel", "split the sequence over the tensor ranks"),
    _choice("--vision-parallel", ("replicated", "data", "tensor"), "how tensor ranks share the vision tower"),
    _choice("--recompute", ("none", "selective", "full"), "what the backward pass computes again"),
    _choice("--backend", ("local", "te"), "torch only, or Transformer Engine"),
)
_CONVERSION = (
    _path("--input", "DIR", "or hub id", required=True),
    _path("--output", "DIR", "must not exist", required=True),
    _value("--dtype", None, "of the written weights (default: as they are)", choices=DTYPES),
    _value("--workers", "N", "processes (default: 1, enough for one disk)", type=int, default=1),
    _flag("--verify", "read everything back and compare bitwise"),
    _flag("--quiet", "no progress bar"),
)
# Every command: what it does, and its arguments; None for a group of commands.
_COMMANDS: dict[str, tuple[str, tuple[Argument, ...] | None]] = {
    "demo": (
        "the whole story on this machine in minutes: data, cold start, RL, export, score",
        (
            _path("--out", "DIR", "where everything goes (demo)", default=Path("demo")),
            _value("--overrides", "KEY=VALUE", "e.g. training.steps=10", nargs="+", default=[]),
        ),
    ),
    "sft": ("supervised cold start on Megatron ranks", (*_RUN, *_DRY)),
    "train": ("reinforcement learning: vLLM rollouts, rewards, Megatron updates", (*_RUN, *_DRY)),
    "verify": (
        "compare the Megatron model with transformers at a parallel layout",
        (
            _path("--hf", "DIR", "Qwen2.5-VL checkpoint directory, or hub id", required=True),
            *_LAYOUT,
            _choice("--against", ("transformers", "vllm"), "vllm: log-probabilities of a rollout engine"),
            _choice(
                "--dtype",
                ("float32", "bfloat16"),
                "bfloat16: as it trains; no further from fp32 than transformers' own bf16",
            ),
            _flag("--grads", "compare the gradient of every parameter too"),
            _flag("--json", "print the figures as one JSON object"),
        ),
    ),
    "convert": ("checkpoints between Hugging Face and Megatron, and what is inside them", None),
    "convert hf-to-megatron": (
        "a checkpoint that loads at every parallel layout, from a Hugging Face directory",
        _CONVERSION,
    ),
    "convert megatron-to-hf": ("a Hugging Face directory, from a Megatron checkpoint", _CONVERSION),
    "convert inspect": (
        "list the tensors of one checkpoint, or compare two",
        (
            _path("directories", "DIR", "one to list, two to compare", nargs="+"),
            _flag("--json", "print them as one JSON object"),
        ),
    ),
    "export": (
        "a release: Hugging Face directory with a model card, or FP8 for vLLM",
        (
            _path(
                "checkpoint",
                "CHECKPOINT",
                "training checkpoint (or a run's folder), converted or HF directory, or hub id",
            ),
            _path("--output", "DIR", "must not exist; not for what is only pushed"),
            _value("--dtype", None, "of the weights (as they are)", choices=DTYPES),
            _value("--quantize", None, "text linears in FP8, calibrated, for vLLM", choices=("fp8",)),
            _path("--calibrate", "FILE", "MM-EUREKA rows (the run's training data)"),
            _number("--calibration-prompts", "(128)", default=128),
            _value("--base-model", "NAME", "for the model card, e.g. Qwen/Qwen2.5-VL-7B-Instruct"),
            _value("--push", "OWNER/NAME", "upload to this hub repository, private unless --public"),
            _flag("--public", "make the repository public when it is new"),
            _flag("--quiet", "no progress bar"),
        ),
    ),
    "eval": (
        "score a model on benchmarks: sampled by vLLM, judged by the authors' rules and by the original's",
        (
            _path("--model", "DIR", "Hugging Face or Megatron directory, or hub id", required=True),
            _value(
                "--benchmark",
                "NAME",
                "mmk12, mathvista, mathverse, mathvision, olympiadbench, wemath or counting; repeatable, each with its --data",
                action="append",
                required=True,
            ),
            _path(
                "--data",
                "PATH",
                "its published file or folder: parquet, JSON, JSONL, or VLMEvalKit's TSV (of counting the demo's, beside the model)",
                action="append",
                default=[],
            ),
            _path(
                "--output",
                "DIR",
                "answers, verdicts and summary.json; what is there is not asked again (evaluation)",
                default=Path("evaluation"),
            ),
            _path("--media", "DIR", "further picture folders", nargs="*", default=[]),
            _number("--limit", "the first so many rows of each"),
            _number("--samples", "of each row: mean and pass@k (1)", default=1),
            _value("--temperature", "T", "(0: greedy)", type=_not_negative),
            _value("--top-p", "P", "(1)", type=_share),
            _number("--max-tokens", "of a response (4096)"),
            _number("--max-prompt-tokens", "longest prompt (20480)"),
            _value("--system-prompt", "NAME", "none, mm_eureka_7b or mm_eureka_32b (mm_eureka_32b, as the original's)"),
            _value("--seed", "N", "of the samples (0)", type=int, default=0),
            _number("--engines", "that share the rows (all GPUs)"),
            _number("--tensor", "GPUs of an engine (1)", default=1),
            _value("--dtype", None, "to compute in (the checkpoint's)", choices=("float32", "bfloat16")),
            _number("--min-pixels", "of a picture (the checkpoint's)"),
            _number("--max-pixels", "of a picture (the checkpoint's)"),
            _number("--max-concurrent", "answers at once, of an engine (256)", default=256),
            _value("--kv-cache-gib", "GIB", "of an engine on CPUs (1)", type=_rate, default=1.0),
            _value("--gpu-memory-utilization", "P", "of an engine's GPUs (0.85)", type=_share, default=0.85),
            _value(
                "--judge-url",
                "URL",
                "OpenAI-compatible, asked where rules leave a verdict open; its key: OPENAI_API_KEY",
            ),
            _value("--judge-model", "NAME", "at that address"),
            _flag("--json", "print the summary as one JSON object"),
        ),
    ),
    "replay": (
        "do one step of a run again from the checkpoint before it, and say whether the numbers come out the same",
        (
            _path("run", "RUN_DIR", "its folder, into which nothing is written"),
            _value("--step", "N", "as metrics.jsonl numbers it", type=_count, required=True),
            _value(
                "--only", None, "sample again, or train again on what is stored (both)", choices=("rollout", "train")
            ),
        ),
    ),
    "data": ("data sets: made-up counting task, MMK12 conversion, validation", None),
    "data counting": (
        "write the counting task: pictures and MM-EUREKA rows, train and test",
        (
            _path("--output", "DIR", "train.jsonl, test.jsonl, images/", required=True),
            _number("--train", "training rows (6000)", default=6000),
            _number("--test", "test rows, on other pictures (200)", default=200),
            _value("--seed", "N", "equal seeds give equal files (0)", type=int, default=0),
            _value("--noise", "P", "share of wrong teacher answers (0)", type=_share, default=0.0),
        ),
    ),
    "data mmk12": (
        "MMK12's parquet files to MM-EUREKA rows and pictures",
        (
            _path("--input", "FILE", "parquet files", required=True, nargs="+"),
            _path("--output", "DIR", "NAME.jsonl and images/ go here", required=True),
            _value("--name", "NAME", "of the JSONL file (train)", default="train"),
        ),
    ),
    "data validate": (
        "read every row as training would; list what is wrong, with line numbers",
        (
            _value(
                "overrides",
                "FILE",
                "JSONL or parquet file, or directory of `datasets`; or a run's YAML file, for all it reads, and KEY=VALUE",
                nargs="*",
            ),
            _path("--config", "YAML", "the run whose model, limits and folders hold"),
            _path("--model", "DIR", "checkpoint (or hub id) whose processor reads it; required without a run"),
            _number("--max-prompt-tokens", "longest prompt (3000)"),
            _number("--max-pixels", "of a picture (501760)"),
            _number("--min-pixels", "of a picture (3136)"),
            _number("--video-max-pixels", "of a frame (100352)"),
            _value("--video-fps", "F", "frames a second of files (2)", type=_rate),
            _number("--video-max-frames", "of a video (768)"),
            _value(
                "--responses",
                "KEY",
                "of the text to imitate, which every row must have; without, those that have one",
            ),
            _path("--clean", "FILE", "write the good rows here, beside the data file"),
            _path("--media", "DIR", "further picture and video folders", nargs="*"),
        ),
    ),
    "plan": (
        "which layout fits these GPUs, how long a step takes, what a run costs: rehearsed without them",
        (
            _value("overrides", "KEY=VALUE", "of the recipe", nargs="*", default=[]),
            _number("--gpus", "how many", required=True),
            _value("--model", "SIZE|DIR", "3b, 7b, 32b, 72b, a directory or a hub id (the recipe's)"),
            _path("--recipe", "FILE", "YAML of a run, for all but the layout (published settings)"),
            _value("--gpu", "NAME", "a100, h100, h200, b200, … (h100)", default="h100"),
            _value("--gpu-memory", "GIB", "of each, if not the usual of that GPU", type=_rate),
            _number("--gpus-per-node", "(8)", default=8),
            _number("--max-pixels", "of a picture (501760)"),
            _number("--tokens", "prompt and response of the longest sample (7096)"),
            _number("--response-tokens", "of a response, on average (1024)", default=1024),
            _value("--price", "P", "of a GPU-hour, for the cost", type=_rate),
            _path("--out", "DIR", "layout.yaml and plan.png go here (plan)", default=Path("plan")),
            _flag("--json", "print the answer as one JSON object"),
        ),
    ),
    "slurm": (
        "a run as Slurm jobs: checked here, submitted with sbatch",
        (
            *_RUN[:2],
            _number("--nodes", "nodes of the job", required=True),
            _number("--gpus-per-node", "GPUs of each (none)"),
            _value("--time", "LIMIT", "of a job, as sbatch takes it: minutes, H:M:S or D-H (the partition's)"),
            _value("--partition", "NAME", "of Slurm"),
            _value("--account", "NAME", "of Slurm"),
            _number("--chain", "jobs one after the other, for runs longer than the limit (1)", default=1),
            _number("--grace", "seconds before the limit at which the run saves and ends (600)", default=600),
            _choice("--stage", ("train", "sft"), "which command the jobs run"),
            _value(
                "--sbatch",
                "OPTION",
                "a further one, such as --sbatch=--exclusive; repeatable",
                action="append",
                default=[],
            ),
            _flag("--dry-run", "print configuration and command, submit nothing"),
        ),
    ),
    "report": (
        "a run as one HTML page that needs no network: curves, phases, rollouts with their pictures; two are compared",
        (
            _path("runs", "RUN_DIR", "a run's folder (run.output), also of one in progress; two to compare", nargs="+"),
            _path("--output", "FILE", "(report.html in the first one)"),
        ),
    ),
    "doctor": (
        "what this machine has and lacks, what is lost, and the fix",
        (_flag("--json", "print the findings as one JSON object"),),
    ),
}


def _build() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and the parser of every command by its full name (`eureka data counting`)."""
    parser = _Parser(
        prog="eureka",
        description="MM-EUREKA on Megatron-Core: rule-based reinforcement learning for Qwen2.5-VL.",
        epilog="--debug, anywhere in the line, shows the traceback behind an error.",
    )
    parser.add_argument("--version", action="version", version=f"eureka-megatron {__version__}")
    commands: dict[str, argparse.ArgumentParser] = {}
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    for command, (text, arguments) in _COMMANDS.items():
        group, _, name = command.rpartition(" ")
        child = groups[group].add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        child.set_defaults(prog=child.prog)
        commands[child.prog] = child
        if arguments is None:
            groups[command] = child.add_subparsers(metavar="KIND", required=True)
        for argument, options in arguments or ():
            child.add_argument(argument, **options)
    return parser, commands
