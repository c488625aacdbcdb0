"""The command line: arguments in, one function of the package called, an exit code out. No logic lives here.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted. What a user did wrong is told in `error: …`
lines without a traceback; `--debug`, anywhere in the line, adds the traceback. Everything heavy is imported inside the
commands, so that `eureka --help` answers at once.
"""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from eureka_megatron import __version__
from eureka_megatron.errors import MACHINE_ERRORS, ConfigError, Stopped, UserError, nearest
from eureka_megatron.session import session, stop_behind


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors that show the nearest valid name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.option_strings[0] if action.option_strings else "command"
            raise ConfigError(f"{self.prog}: unknown {what} {value!r}{nearest(str(value), map(str, action.choices))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Only defects of this package escape as exceptions."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    _quieten()
    try:
        parsed = _parse([argument for argument in arguments if argument != "--debug"])
        return int(parsed.command(parsed) or 0)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except UserError as error:
        # Ray hands on what a remote rank raised with the remote traceback in its text; `cause` is the plain error.
        return _complain(getattr(error, "cause", None) or error, error.exit_code, debug)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == "eureka_megatron":
            raise
        return _complain(f"the package {missing!r} is not installed; `eureka doctor` says how to get it", 1, debug)
    except (Stopped, KeyboardInterrupt) as error:
        stop = stop_behind(error)
        return _complain("; ".join(filter(None, (str(stop), stop.note))), stop.exit_code, debug)
    except BrokenPipeError:  # `eureka doctor | head`: nobody reads on, also not at interpreter shutdown
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        # A full disk shows when writing, and then names no file.
        where = error.filename or "where the run writes (run.output, TMPDIR, caches)"
        return _complain(f"{where}: {error.strerror}", 1, debug)


def _quieten() -> None:
    """Megatron-Core warns nine times, in every rank, that optional parts are absent; `eureka doctor` says so once."""
    absent = ("Transformer Engine and Apex are not installed", "Apex is not installed")
    for text in absent:
        warnings.filterwarnings("ignore", text)
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{text}:UserWarning" for text in absent))


def _complain(message: object, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    with suppress(OSError):  # of a terminal that is gone
        for line in str(message).splitlines() or ["failed without a message"]:
            print(f"error: {line}", file=sys.stderr)
    return exit_code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = _build(with_conversions="convert" in arguments)
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
    from eureka_megatron.places import from_home

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(one) for one in value]
        return type(value)(from_home(str(value))) if isinstance(value, str | Path) and str(value)[:1] == "~" else value

    vars(parsed).update({name: whole(value) for name, value in vars(parsed).items()})


def _build(*, with_conversions: bool) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and the parser of every command by its full name (`eureka data counting`).

    The options of `eureka convert` are declared beside the conversions, behind torch, so only that command asks for them.
    """
    parser = _Parser(
        prog="eureka",
        description="MM-EUREKA on Megatron-Core: rule-based reinforcement learning for Qwen2.5-VL.",
        epilog="--debug, anywhere in the line, shows the traceback behind an error.",
    )
    parser.add_argument("--version", action="version", version=f"eureka-megatron {__version__}")
    commands: dict[str, argparse.ArgumentParser] = {}
    children = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(group: Any, name: str, command: Callable[[argparse.Namespace], int | None] | None, text: str) -> Any:
        child = group.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        child.set_defaults(command=command, prog=child.prog)
        commands[child.prog] = child
        return child

    demo = add(
        children, "demo", _demo, "the whole story on this machine in minutes: data, cold start, RL, export, score"
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where everything goes (demo)")
    demo.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="e.g. training.steps=10")

    for name, command, text in (
        ("sft", _sft, "supervised cold start on Megatron ranks"),
        ("train", _train, "reinforcement learning: vLLM rollouts, rewards, Megatron updates"),
    ):
        training = add(children, name, command, text)
        _add_run(training)
        training.add_argument(
            "--resume",
            metavar="auto|DIR",
            help="go on from run.output's newest whole checkpoint, or from this one (or run's folder)",
        )

    verify = add(children, "verify", _verify, "compare the Megatron model with transformers at a parallel layout")
    verify.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="Qwen2.5-VL checkpoint directory, or hub id"
    )
    _add_layout(verify)
    verify.add_argument(
        "--against",
        choices=("transformers", "vllm"),
        default="transformers",
        help="vllm: log-probabilities of a rollout engine (transformers)",
    )
    verify.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: as it trains; no further from fp32 than transformers' own bf16 (float32)",
    )
    verify.add_argument("--grads", action="store_true", help="compare the gradient of every parameter too")
    verify.add_argument("--json", action="store_true", help="print the figures as one JSON object")

    convert = add(children, "convert", None, "checkpoints between Hugging Face and Megatron, and what is inside them")
    if with_conversions:
        from eureka_megatron.cli.conversions import add_conversion_arguments, add_inspection_arguments

        kinds = convert.add_subparsers(metavar="KIND", required=True, dest="kind")
        for kind, text in (
            ("hf-to-megatron", "a checkpoint that loads at every parallel layout, from a Hugging Face directory"),
            ("megatron-to-hf", "a Hugging Face directory, from a Megatron checkpoint"),
        ):
            add_conversion_arguments(add(kinds, kind, _convert, text))
        add_inspection_arguments(add(kinds, "inspect", _inspect, "list the tensors of one checkpoint, or compare two"))

    _add_export(
        add(children, "export", _export, "a release: Hugging Face directory with a model card, or FP8 for vLLM")
    )
    _add_data(add, children)

    doctor = add(children, "doctor", _doctor, "what this machine has and lacks, what is lost, and the fix")
    doctor.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    return parser, commands


def _add_layout(parser: argparse.ArgumentParser) -> None:
    """A parallel layout; destinations are the fields of layout.Layout and layout.Execution."""
    for option, name, text in (
        ("--tp", "tensor", "tensor-parallel size"),
        ("--pp", "pipeline", "pipeline stages"),
        ("--vpp", "virtual_pipeline", "model chunks a stage (interleaved schedule)"),
        ("--cp", "context", "context-parallel size"),
        ("--dp", "data", "data-parallel size"),
    ):
        parser.add_argument(option, dest=name, type=_positive, default=1, metavar="N", help=f"{text} (1)")
    for end in ("first", "last"):
        parser.add_argument(
            f"--layers-{end}-stage", type=_positive, metavar="N", help=f"text layers of the {end} stage (equal shares)"
        )
    parser.add_argument("--sequence-parallel", action="store_true", help="split the sequence over the tensor ranks")
    for option, choices, text in (
        ("--vision-parallel", ("replicated", "data", "tensor"), "how tensor ranks share the vision tower"),
        ("--recompute", ("none", "selective", "full"), "what the backward pass computes again"),
        ("--backend", ("local", "te"), "torch only, or Transformer Engine"),
    ):
        parser.add_argument(option, choices=choices, default=choices[0], help=f"{text} ({choices[0]})")


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="training checkpoint (or a run's folder), converted or HF directory, or hub id",
    )
    export.add_argument("--output", type=Path, metavar="DIR", help="must not exist; not for what is only pushed")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (as they are)")
    export.add_argument("--quantize", choices=("fp8",), help="text linears in FP8, calibrated, for vLLM")
    export.add_argument("--calibrate", type=Path, metavar="FILE", help="MM-EUREKA rows (the run's training data)")
    export.add_argument("--calibration-prompts", type=_positive, default=128, metavar="N", help="(128)")
    export.add_argument("--base-model", metavar="NAME", help="for the model card, e.g. Qwen/Qwen2.5-VL-7B-Instruct")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload to this hub repository, private unless --public")
    export.add_argument("--public", action="store_true", help="make the repository public when it is new")
    export.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_data(add: Callable[..., Any], children: Any) -> None:
    """`eureka data` and its kinds."""
    data = add(children, "data", None, "data sets: made-up counting task, MMK12 conversion, validation")
    kinds = data.add_subparsers(metavar="KIND", required=True)
    counting = add(kinds, "counting", _counting, "write the counting task: pictures and MM-EUREKA rows, train and test")
    counting.add_argument("--output", type=Path, required=True, metavar="DIR", help="train.jsonl, test.jsonl, images/")
    counting.add_argument("--train", type=_positive, default=6000, metavar="N", help="training rows (6000)")
    counting.add_argument("--test", type=_positive, default=200, metavar="N", help="test rows, on other pictures (200)")
    counting.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal files (0)")
    counting.add_argument("--noise", type=_share, default=0.0, metavar="P", help="share of wrong teacher answers (0)")
    mmk12 = add(kinds, "mmk12", _mmk12, "MMK12's parquet files to MM-EUREKA rows and pictures")
    mmk12.add_argument("--input", type=Path, required=True, nargs="+", metavar="FILE", help="parquet files")
    mmk12.add_argument("--output", type=Path, required=True, metavar="DIR", help="NAME.jsonl and images/ go here")
    mmk12.add_argument("--name", default="train", metavar="NAME", help="of the JSONL file (train)")
    validate = add(
        kinds, "validate", _validate, "read every row as training would; list what is wrong, with line numbers"
    )
    validate.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE",
        help="JSONL or parquet file, or directory of `datasets`; or a run's YAML file, for all it reads, and KEY=VALUE",
    )
    validate.add_argument("--config", type=Path, metavar="YAML", help="the run whose model, limits and folders hold")
    for option, kind, name, text in (
        ("--model", Path, "DIR", "checkpoint (or hub id) whose processor reads it; required without a run"),
        ("--max-prompt-tokens", _positive, "N", "longest prompt (3000)"),
        ("--max-pixels", _positive, "N", "of a picture (501760)"),
        ("--min-pixels", _positive, "N", "of a picture (3136)"),
        ("--video-max-pixels", _positive, "N", "of a frame (100352)"),
        ("--video-fps", _rate, "F", "frames a second of files (2)"),
        ("--video-max-frames", _positive, "N", "of a video (768)"),
        ("--responses", str, "KEY", "of the text to imitate, which every row must have; without, those that have one"),
        ("--clean", Path, "FILE", "write the good rows here, beside the data file"),
    ):
        validate.add_argument(option, type=kind, metavar=name, help=text)
    validate.add_argument("--media", type=Path, nargs="*", metavar="DIR", help="further picture and video folders")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. optimizer.lr=1e-6")


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


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def _first_word(stream: IO[str] | None = None) -> None:
    """The imports that follow take seconds, on a cold network file system a minute."""
    from eureka_megatron.tracking.console import tell

    tell("loading torch and Megatron-Core …", stream)


def _demo(args: argparse.Namespace) -> None:
    with session(args.out):
        from eureka_megatron.demo.story import run_demo

        run_demo(args.out, args.overrides)


def _sft(args: argparse.Namespace) -> None:
    from eureka_megatron.config import SFT_DEFAULTS, load_config

    config = load_config(args.config, args.overrides, SFT_DEFAULTS)
    _first_word()
    with _run_session(config):
        from eureka_megatron.run.sft import run_sft

        run_sft(config, args.resume)


def _train(args: argparse.Namespace) -> None:
    from eureka_megatron.config import load_config

    # Before torch, Megatron and Ray are imported: a typing mistake is told within a second.
    config = load_config(args.config, args.overrides)
    _first_word()
    with _run_session(config):
        from eureka_megatron.loop import train

        train(config, args.resume)


def _run_session(config: Any) -> AbstractContextManager[None]:
    return session(config.run.output, save_on_signal=config.checkpoint.on_signal)


def _verify(args: argparse.Namespace) -> int:
    _first_word(sys.stderr if args.json else None)
    from eureka_megatron.layout import Execution, Layout, from_options
    from eureka_megatron.places import model_directory

    layout, execution = from_options(Layout, args), from_options(Execution, args)
    from eureka_megatron.verify.command import run_verify

    options = {"against": args.against, "grads": args.grads, "as_json": args.json}
    with session():
        return run_verify(model_directory(args.hf), layout, execution, **options)


def _convert(args: argparse.Namespace) -> int:
    from eureka_megatron.cli.conversions import run_conversion

    return run_conversion(args.kind, args)


def _inspect(args: argparse.Namespace) -> int:
    from eureka_megatron.cli.conversions import run_inspection

    return run_inspection(args)


def _export(args: argparse.Namespace) -> None:
    from eureka_megatron.cli.conversions import DTYPES, progress_bar
    from eureka_megatron.places import model_directory
    from eureka_megatron.release.export import ExportOptions, export

    options = ExportOptions(
        dtype=DTYPES[args.dtype] if args.dtype else None,
        quantize=args.quantize,
        calibrate=args.calibrate,
        calibration_prompts=args.calibration_prompts,
        base_model=args.base_model,
        push=args.push,
        public=args.public,
    )
    with session(), progress_bar("export", args.quiet) as progress:
        lines = export(model_directory(args.checkpoint), args.output, options, progress)
    print("\n".join(lines))


def _mmk12(args: argparse.Namespace) -> None:
    from eureka_megatron.data.prepare import convert_mmk12, kinds

    target, problems = convert_mmk12(args.input, args.output, name=args.name)
    print(f"{target} written" + (f"; {len(problems)} rows left out: {kinds(problems)}" if problems else ""))


def _validate(args: argparse.Namespace) -> int:
    from eureka_megatron.config import DataSection, load_config, make_config

    files = [Path(word) for word in args.overrides if "=" not in word or os.path.exists(word)]
    overrides = [word for word in args.overrides if Path(word) not in files]
    run = args.config or next((file for file in files if file.suffix in (".yaml", ".yml")), None)
    files = [file for file in files if file != run]
    if len(files) + bool(run) == 0 or len(files) > 1 or not (run or args.model):
        raise ConfigError(f"{args.prog}: needs a data file and --model, or a run's YAML file; see `{args.prog} --help`")
    if overrides and not run:
        raise ConfigError(f"{args.prog}: {overrides[0]!r}: overrides are for a run's YAML file")
    given = {"model": {"path": args.model}, "data": {"train": str(files[0])}} if not run else {}
    config = load_config(run, overrides) if run else make_config(given, args.prog)
    limits = {name: getattr(args, name) for name in DataSection.model_fields if getattr(args, name, None) is not None}
    changes = {"data": config.data.model_copy(update=limits)}
    if args.model:
        changes["model"] = config.model.model_copy(update={"path": args.model})
    if args.responses:
        changes["sft"] = config.sft.model_copy(update={"responses": args.responses})
    from eureka_megatron.run.inputs import settle, validate_data

    config = settle(config.model_copy(update=changes))
    return validate_data(config, files, whole_run=bool(run), responses=bool(args.responses), clean=args.clean)


def _counting(args: argparse.Namespace) -> None:
    from eureka_megatron.demo.counting import write_counting

    paths = write_counting(args.output, train=args.train, test=args.test, seed=args.seed, noise=args.noise)
    print(f"{args.train} training rows in {paths.train}, {args.test} test rows in {paths.test}")


def _doctor(args: argparse.Namespace) -> int:
    from eureka_megatron.doctor import run_doctor

    return run_doctor(as_json=args.json)


if __name__ == "__main__":
    raise SystemExit(main())
