"""The commands: one function of the package called, an exit code out. No logic lives here.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted. What a user did wrong is told in `error: …`
lines without a traceback; `--debug`, anywhere in the line, adds the traceback. Everything heavy is imported inside the
commands, so that `eureka --help` answers at once.
"""

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from typing import IO, Any

from eureka_megatron.cli.arguments import parse
from eureka_megatron.errors import MACHINE_ERRORS, Stopped, UserError
from eureka_megatron.session import session, stop_behind


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Only defects of this package escape as exceptions."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    _quieten()
    try:
        parsed = parse([argument for argument in arguments if argument != "--debug"])
        return int(COMMANDS[parsed.prog](parsed) or 0)
    except SystemExit as ended:  # --help and --version
        return int(ended.code or 0)
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
        assert stop is not None, "it was one itself"
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


def _first_word(stream: IO[str] | None = None) -> None:
    """The imports that follow take seconds, on a cold network file system a minute."""
    from eureka_megatron.tracking.console import tell

    tell("loading torch and Megatron-Core …", stream)


def _demo(args: argparse.Namespace) -> None:
    _first_word()
    with session(args.out):
        from eureka_megatron.demo.story import run_demo

        run_demo(args.out, args.overrides)


def _sft(args: argparse.Namespace) -> None:
    from eureka_megatron.config import SFT_DEFAULTS, load_config

    config = load_config(args.config, args.overrides, SFT_DEFAULTS)
    _first_word()
    if args.dry_run:
        return _dry_run(args, config, supervised=True)
    with _run_session(config):
        from eureka_megatron.run.sft import run_sft

        run_sft(config, args.resume)


def _train(args: argparse.Namespace) -> None:
    from eureka_megatron.config import load_config

    # Before torch, Megatron and Ray are imported: a typing mistake is told within a second.
    config = load_config(args.config, args.overrides)
    _first_word()
    if args.dry_run:
        return _dry_run(args, config)
    with _run_session(config):
        from eureka_megatron.loop import train

        train(config, args.resume)


def _dry_run(args: argparse.Namespace, config: Any, *, supervised: bool = False) -> None:
    from eureka_megatron.planning.dry_run import Machine, dry_run

    machine = Machine.named(args.gpu, args.gpu_memory, args.nodes, args.gpus_per_node)
    with session():
        dry_run(config, machine, supervised=supervised, resume=args.resume is not None)


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


def _convert(args: argparse.Namespace) -> None:
    import torch

    from eureka_megatron.places import model_directory
    from eureka_megatron.weights import offline

    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: need at least 1")
    kind = args.prog.rpartition(" ")[2]
    convert = {"hf-to-megatron": offline.hf_to_megatron, "megatron-to-hf": offline.megatron_to_hf}[kind]
    options = {"dtype": args.dtype and getattr(torch, args.dtype), "workers": args.workers, "verify": args.verify}
    with _progress_bar(kind, args.quiet) as progress:
        convert(model_directory(args.input), args.output, **options, progress=progress)
    if not args.quiet:
        print(f"{args.output} written{' and verified' if args.verify else ''}")


def _inspect(args: argparse.Namespace) -> int:
    from eureka_megatron.places import model_directory
    from eureka_megatron.tracking.console import tell
    from eureka_megatron.weights import listing

    if len(args.directories) > 2:
        raise UserError("inspect takes one directory, or two to compare")
    first, *others = map(listing.describe, map(model_directory, args.directories))
    if not others:
        print(listing.to_json(first) if args.json else listing.to_text(first))
        return 0
    tell("comparing every tensor …", sys.stderr)  # stdout is for what differs
    differences = listing.differences(first, others[0])
    print("\n".join(differences) if differences else "no differences in names, shapes, dtypes and values")
    return 1 if differences else 0


@contextmanager
def _progress_bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes and time left on a terminal, lines in a log; None when there shall be none."""
    if quiet or not sys.stdout.isatty():
        from eureka_megatron.tracking.console import progress_lines

        yield None if quiet else progress_lines(title)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _export(args: argparse.Namespace) -> None:
    import torch

    from eureka_megatron.places import model_directory
    from eureka_megatron.release.export import ExportOptions, export

    options = ExportOptions(
        dtype=args.dtype and getattr(torch, args.dtype),
        quantize=args.quantize,
        calibrate=args.calibrate,
        calibration_prompts=args.calibration_prompts,
        base_model=args.base_model,
        push=args.push,
        public=args.public,
    )
    with session(), _progress_bar("export", args.quiet) as progress:
        lines = export(model_directory(args.checkpoint), args.output, options, progress)
    print("\n".join(lines))


def _eval(args: argparse.Namespace) -> None:
    from dataclasses import fields

    _first_word(sys.stderr if args.json else None)
    from eureka_megatron.run.evaluate import EvalOptions, pair_up, run_eval

    named = {field.name: getattr(args, field.name) for field in fields(EvalOptions) if hasattr(args, field.name)}
    named |= {"benchmarks": pair_up(args.model, args.benchmark, args.data), "media": tuple(args.media)}
    with session(args.output), redirect_stdout(sys.stderr if args.json else sys.stdout):
        summary = run_eval(EvalOptions(**named))
    if args.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        from eureka_megatron.evaluation.tables import show

        show(summary)
        print(f"answers and verdicts in {args.output}, the figures in {args.output / 'summary.json'}")


def _replay(args: argparse.Namespace) -> int:
    _first_word()
    from eureka_megatron.run.replay import replay

    with session():
        return 0 if replay(args.run.absolute(), args.step, args.only) else 1


def _mmk12(args: argparse.Namespace) -> None:
    from eureka_megatron.data.prepare import convert_mmk12, kinds
    from eureka_megatron.tracking.console import progress_lines

    written = progress_lines(str(args.output), "rows")
    target, problems = convert_mmk12(args.input, args.output, name=args.name, progress=lambda rows: written(rows, 0))
    print(f"{target} written" + (f"; {len(problems)} rows left out: {kinds(problems)}" if problems else ""))


def _validate(args: argparse.Namespace) -> int:
    from eureka_megatron.config import DataSection
    from eureka_megatron.run.inputs import validate_named

    limits = {name: getattr(args, name) for name in DataSection.model_fields if getattr(args, name, None) is not None}
    options = {name: getattr(args, name) for name in ("config", "model", "responses", "clean")}
    return validate_named(args.prog, args.overrides, limits=limits, **options)


def _counting(args: argparse.Namespace) -> None:
    from eureka_megatron.demo.counting import write_counting

    paths = write_counting(args.output, train=args.train, test=args.test, seed=args.seed, noise=args.noise)
    print(f"{args.train} training rows in {paths.train}, {args.test} test rows in {paths.test}")


def _plan(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from eureka_megatron.planning.command import Options, run_plan

    named = {field.name: getattr(args, field.name) for field in fields(Options) if hasattr(args, field.name)}
    with session():
        run_plan(Options(**named, as_json=args.json), args.overrides)


def _slurm(args: argparse.Namespace) -> None:
    from eureka_megatron.config import SFT_DEFAULTS, load_config

    config = load_config(args.config, args.overrides, SFT_DEFAULTS if args.stage == "sft" else None)
    _first_word(sys.stderr)
    from eureka_megatron.run.slurm import Request, submit

    named = [f"--{name}={getattr(args, name)}" for name in ("partition", "account") if getattr(args, name)]
    request = Request(
        args.stage, args.nodes, args.gpus_per_node, args.time, args.grace, args.chain, (*named, *args.sbatch)
    )
    submit(config, request, dry_run=args.dry_run)


def _report(args: argparse.Namespace) -> None:
    from eureka_megatron.report.page import write_report
    from eureka_megatron.tracking.console import tell

    page = write_report(args.runs, args.output)
    tell(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")


def _doctor(args: argparse.Namespace) -> int:
    from eureka_megatron.doctor import run_doctor

    return run_doctor(as_json=args.json)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "eureka demo": _demo,
    "eureka sft": _sft,
    "eureka train": _train,
    "eureka verify": _verify,
    "eureka convert hf-to-megatron": _convert,
    "eureka convert megatron-to-hf": _convert,
    "eureka convert inspect": _inspect,
    "eureka export": _export,
    "eureka eval": _eval,
    "eureka replay": _replay,
    "eureka data counting": _counting,
    "eureka data mmk12": _mmk12,
    "eureka data validate": _validate,
    "eureka plan": _plan,
    "eureka slurm": _slurm,
    "eureka report": _report,
    "eureka doctor": _doctor,
}
