"""`eureka eval`: a model's answers to benchmarks, sampled by vLLM engines under Ray, judged by the rules of `evaluation`, told in tables.

Answers go to disk as they are finished; a run that was killed asks only what is missing, and one that is complete starts no engine and
is judged again. Rows that could not be asked are asked once they can be. Each number stands beside the name of its rule.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from eureka_megatron.config import RunConfig, make_config
from eureka_megatron.data.hf_processor import load_hf_processor, picture_bounds
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.prompts import system_prompt
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.evaluation import judge_official, judge_paper, wemath_scores
from eureka_megatron.evaluation.answers import Answers
from eureka_megatron.evaluation.judge_model import JudgeModel, Question, undecided
from eureka_megatron.evaluation.judging import benchmark_named
from eureka_megatron.evaluation.rows import GOLDS, Rows, groups
from eureka_megatron.evaluation.scores import accuracy, by_group
from eureka_megatron.evaluation.verdict import items
from eureka_megatron.models.qwen2_5_vl.config import check_engine, read_hf_config
from eureka_megatron.places import absolute, model_directory
from eureka_megatron.rollout.collector import stream_seed
from eureka_megatron.rollout.pool import RolloutPool
from eureka_megatron.run.cluster import start_ray
from eureka_megatron.run.placement import cluster_nodes
from eureka_megatron.tracking.console import counted, tell
from eureka_megatron.tracking.progress import progress
from eureka_megatron.types import Prompt, Rollout, Sampling

READERS = 4  # threads that decode the next pictures while engines sample
ROWS_AHEAD = 1024  # asked at once, and of pictures no more than these bytes an engine
PICTURE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked. The six as MM-EUREKA's scripts do it, whatever the model; the demo's task as the demo does."""

    system_prompt: str = "mm_eureka_32b"
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 4096
    max_prompt_tokens: int = 20480  # the largest picture of the published processor is 16,384


PROTOCOLS = {"counting": Protocol("none", 1.0, 1.0, 40, 96)}


@dataclass(frozen=True)
class EvalOptions:
    """What `eureka eval` was asked. None: the benchmark's own, the checkpoint's own, or one engine for every `tensor` GPUs."""

    model: Path
    benchmarks: tuple[tuple[str, Path], ...]
    output: Path
    media: tuple[Path, ...] = ()
    limit: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    system_prompt: str | None = None
    seed: int = 0
    engines: int | None = None
    tensor: int = 1
    dtype: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_concurrent: int = 256
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    judge_url: str | None = None
    judge_model: str | None = None

    def protocol(self, benchmark: str) -> Protocol:
        own = PROTOCOLS.get(benchmark, Protocol())
        given = {name: getattr(self, name) for name in asdict(own) if getattr(self, name) is not None}
        return replace(own, **given)


@dataclass(frozen=True)
class Task:
    """One benchmark to be asked and judged."""

    rows: Rows
    protocol: Protocol
    answers: Answers
    samples: int = 1  # of each row
    seed: int = 0
    told: bool = True  # whether progress is shown; a run that trains has a view of its own

    @property
    def name(self) -> str:
        return self.rows.benchmark

    def missing(self) -> list[int]:
        """Rows that have not all their samples."""
        known, samples = self.answers.known, range(self.samples)
        return [index for index, name in enumerate(self.rows.ids) if not all((name, k) in known for k in samples)]

    def read(self, index: int, processor: Processor) -> Prompt | UserError:
        """A row as engines take it, or why it cannot be asked."""
        rows = self.rows
        try:
            chat, name, origin = rows.chat(index), rows.ids[index], rows.origin(index)
            return processor.prompt(chat, id=name, folders=rows.folders, origin=origin).without_patches()
        except UserError as error:
            return error

    def forget_mended(self, processor: Processor) -> None:
        """Make rows missing again that could not be asked and now can: their pictures were mended. Reads those rows."""
        for index, name in enumerate(self.rows.ids):
            failed = [
                key for key in ((name, k) for k in range(self.samples)) if "error" in self.answers.known.get(key, ())
            ]
            if failed and isinstance(self.read(index, processor), Prompt):
                for key in failed:
                    del self.answers.known[key]


def pair_up(model: Path, benchmarks: Sequence[str], data: Sequence[Path]) -> tuple[tuple[str, Path], ...]:
    """Each benchmark with its data; the demo's task finds its own where none are named: MODEL/../data/test.jsonl.

    Raises:
        ConfigError: their numbers differ, or a name is unknown.
    """
    names = [benchmark_named(name) for name in benchmarks]
    beside = model / ".." / "data" / "test.jsonl"
    if not data and names == ["counting"] and beside.is_file():
        data = [absolute(beside.resolve())]
    if len(names) != len(data):
        raise ConfigError(
            f"eureka eval: {counted(len(names), 'benchmark')} ({', '.join(names)}), but {len(data)} × --data: name the data of each, in order"
        )
    return tuple(zip(names, map(absolute, data), strict=True))


def run_eval(options: EvalOptions) -> dict[str, Any]:
    """Sample what is missing, judge everything. → what stands in OUTPUT/summary.json.

    Raises:
        UserError: rows that cannot be asked or judged, all at once and before any engine starts; answers of other settings in OUTPUT.
        ConfigError: options that cannot hold.
    """
    options = replace(options, model=model_directory(options.model), output=absolute(options.output))
    _check(options)
    check_engine(read_hf_config(options.model), options.tensor)
    bounds = picture_bounds(load_hf_processor(options.model).image_processor, options.model)
    pixels = options.min_pixels or bounds[0], options.max_pixels or bounds[1]
    options = replace(options, min_pixels=pixels[0], max_pixels=pixels[1], dtype=options.dtype or _dtype(options.model))
    tasks = []
    for name, path in options.benchmarks:
        tell(f"reading {path} …")
        rows = Rows(name, path, options.media, options.limit)
        for why, count in rows.left_out.items():
            tell(f"{counted(count, 'row')} left out: {why}")
        protocol = options.protocol(rows.benchmark)
        answers = Answers(options.output / rows.benchmark, _settings(options, protocol, rows))
        tasks.append(Task(rows, protocol, answers, options.samples, options.seed))
    processors = {task.name: _processor(task.protocol, options) for task in tasks}
    for task in tasks:
        task.forget_mended(processors[task.name])
    if any(task.missing() for task in tasks):
        _sample(tasks, options, processors)
    model = None
    if options.judge_url:
        assert options.judge_model, "checked"
        model = JudgeModel(options.judge_url, options.judge_model, options.output / "judge.jsonl")
    summary = {task.name: judge(task, model) for task in tasks}
    _keep(options.output, summary)
    return summary


def _keep(folder: Path, summary: dict[str, Any]) -> None:
    """In summary.json, beside other benchmarks' figures."""
    path = folder / "summary.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or cut short by a kill
        earlier = {}
    path.write_text(json.dumps(earlier | summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(options: EvalOptions) -> None:
    for name, _ in options.benchmarks:
        protocol = options.protocol(name)
        system_prompt(protocol.system_prompt)  # is there one of this name?
        if options.samples > 1 and protocol.temperature == 0:
            raise ConfigError(
                f"eureka eval: --samples {options.samples} needs --temperature above 0: at 0 all samples of {name} are equal"
            )
    if bool(options.judge_url) != bool(options.judge_model):
        raise ConfigError("eureka eval: --judge-url and --judge-model belong together")
    names = [name for name, _ in options.benchmarks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"eureka eval: --benchmark {min(twice)} is given twice; one --output holds one of each")


def _dtype(model: Path) -> str:
    """What the checkpoint says; half precision of either kind is computed in bfloat16, as in training."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return "float32" if str(config.get("dtype") or config.get("torch_dtype")).endswith("float32") else "bfloat16"


def _settings(options: EvalOptions, protocol: Protocol, rows: Rows) -> dict[str, Any]:
    """What the answers depend on. Weights by name, size and date of their files."""
    files = sorted(file for kind in ("*.safetensors", "*.distcp") for file in options.model.glob(kind))
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {
        "benchmark": rows.benchmark,
        "model": str(options.model),
        "weights": blake2b(json.dumps(stamp).encode(), digest_size=8).hexdigest(),
        "data": str(rows.path),
        "data_bytes": rows.nbytes,
        **asdict(protocol),
        **{name: getattr(options, name) for name in ("seed", "dtype", "min_pixels", "max_pixels")},
    }


# --- sampling ---


def _processor(protocol: Protocol, options: EvalOptions) -> Processor:
    return Processor(
        options.model,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        max_prompt_tokens=protocol.max_prompt_tokens,
        system_prompt=protocol.system_prompt,
    )


def _sample(tasks: Sequence[Task], options: EvalOptions, processors: Mapping[str, Processor]) -> None:
    with ExitStack() as stack:
        tell("starting Ray and the engines …")
        start_ray(stack)
        config = _engine_config(tasks, options, sum(node.gpus for node in cluster_nodes()))
        pool = RolloutPool(config)
        stack.callback(pool.shutdown)
        pool.start()
        for task in tasks:
            ask(task, pool, processors[task.name])


def _engine_config(tasks: Sequence[Task], options: EvalOptions, gpus: int) -> RunConfig:
    """As a run's, for engines alone."""
    prompt = max(task.protocol.max_prompt_tokens for task in tasks)
    response = max(task.protocol.max_tokens for task in tasks)
    longest = max(task.protocol.max_prompt_tokens + task.protocol.max_tokens for task in tasks)
    engines = options.engines or max(1, gpus // options.tensor)
    return make_config(
        {
            "model": {"path": options.model, "dtype": options.dtype},
            "data": {
                "train": str(tasks[0].rows.path),
                "min_pixels": options.min_pixels,
                "max_pixels": options.max_pixels,
                "max_prompt_tokens": prompt,
            },
            "rollout": {
                "engines": engines,
                "tensor": options.tensor,
                "max_response_tokens": response,
                "max_model_tokens": max(longest, prompt + response),
                **{k: getattr(options, k) for k in ("max_concurrent", "kv_cache_gib", "gpu_memory_utilization")},
            },
            "run": {"seed": options.seed, "output": options.output},
        },
        "eureka eval",
    )


def ask(task: Task, pool: RolloutPool, processor: Processor) -> None:
    """Sample the answers that are missing; each is on disk when its row is finished."""
    rows, protocol, samples = task.rows, task.protocol, task.samples
    sampling = Sampling(
        n=samples,
        temperature=protocol.temperature,
        top_p=protocol.top_p,
        max_tokens=protocol.max_tokens,
        seed=stream_seed(task.seed, "evaluate"),
    )
    missing = task.missing()
    read = partial(task.read, processor=processor)
    shown = progress(f"{task.name}: answers", len(rows), len(rows) - len(missing), silent=not task.told)
    with task.answers, shown as advance:
        for part in _parts(missing, read, PICTURE_BYTES * pool.config.rollout.engines):
            prompts = []
            for index, found in part:
                if isinstance(found, Prompt):
                    prompts.append(found)
                    continue
                for k in range(samples):
                    task.answers.add({"id": rows.ids[index], "sample": k, "response": "", "error": str(found)})
                advance()

            def finished(number: int, rollouts: Sequence[Rollout], asked: Sequence[Prompt] = tuple(prompts)) -> None:
                for k, rollout in enumerate(rollouts):
                    task.answers.add(_record(asked[number], k, rollout))
                advance()

            pool.generate(prompts, finished=finished, **sampling)


def _parts(
    missing: Sequence[int], read: Callable[[int], Prompt | UserError], most_bytes: int
) -> Iterator[list[tuple[int, Prompt | UserError]]]:
    """Rows with their prompts, many at a time; the next are read while engines are at work on these."""
    with ThreadPoolExecutor(READERS, "rows") as readers:
        ahead: list[tuple[int, Future[Prompt | UserError]]] = []
        rest = iter(missing)

        def look_ahead() -> None:
            for index in rest:
                ahead.append((index, readers.submit(read, index)))
                if len(ahead) == ROWS_AHEAD:
                    break

        look_ahead()
        while ahead:
            part: list[tuple[int, Prompt | UserError]] = []
            held = 0
            while ahead and held < most_bytes:
                index, future = ahead.pop(0)
                found = future.result()
                held += found.nbytes if isinstance(found, Prompt) else 0
                part.append((index, found))
            look_ahead()
            yield part


def _record(prompt: Prompt, sample: int, rollout: Rollout) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "sample": sample,
        "prompt": prompt.text,
        "pictures": [picture.key for picture in prompt.pictures],
        "response": rollout.text,
        "tokens": len(rollout.tokens_R),
        "finish_reason": rollout.finish_reason,
    }


# --- while a run trains ---


def open_benchmarks(config: RunConfig) -> list[Rows]:
    """Those of `training.evaluate_benchmarks`. Raises ConfigError: a name is unknown; UserError: bad rows."""
    training = config.training
    chosen = training.evaluate_benchmarks.items()
    return [Rows(name, path, config.data.media, training.evaluate_limit) for name, path in chosen]


def evaluate_in_training(
    config: RunConfig, rows: Rows, pool: RolloutPool, processor: Processor, step: int
) -> dict[str, float]:
    """`NAME_official` and `NAME_paper` of the weights that the engines have; answers and figures in run.output/evaluation/step_N."""
    training, data = config.training, config.data
    protocol = Protocol(
        data.system_prompt,
        training.evaluate_temperature,
        training.evaluate_top_p,
        config.rollout.max_response_tokens,
        data.max_prompt_tokens,
    )
    folder = config.run.output / "evaluation" / f"step_{step:06d}"
    shutil.rmtree(folder / rows.benchmark, ignore_errors=True)  # of a run that was stopped in it
    settings = {"data": str(rows.path), "step": step, "weight_version": pool.version, **asdict(protocol)}
    task = Task(rows, protocol, Answers(folder / rows.benchmark, settings), seed=config.run.seed, told=False)
    ask(task, pool, processor)
    found = judge(task)
    _keep(folder, {rows.benchmark: found})
    return {f"{rows.benchmark}_{rule}": score["accuracy"] for rule, score in found["scores"].items()}


# --- judging ---


def judge(task: Task, model: JudgeModel | None = None) -> dict[str, Any]:
    """Both verdicts on every answer, written beside it. → the figures, as in summary.json"""
    rows, samples = task.rows, task.samples
    records: dict[tuple[str, int], dict[str, Any]] = {}
    columns: list[dict[str, list[str]]] = []
    problems: list[dict[str, Any]] = []  # what We-Math's metric asks of a row
    doubts: dict[tuple[str, int], Question] = {}
    with progress(f"{task.name}: verdicts", len(rows), silent=not task.told) as advance:
        for index, name in enumerate(rows.ids):
            row = rows[index]
            columns.append(groups(task.name, row))
            problems.append({key: row.get(key) for key in ("ID", "key", "knowledge concept")})
            gold = ", ".join(items(row[GOLDS.get(task.name, "answer")]))
            for k in range(samples):
                record = records[name, k] = dict(task.answers.known[name, k])
                official, paper = (rule(task.name, row, record["response"]) for rule in (judge_official, judge_paper))
                record |= {"gold": gold, "official": asdict(official), "paper": asdict(paper)}
                record["stage"] = "unanswered" if "error" in record else "rules"
                if model is not None and undecided(paper, gold):
                    question = str(row.get("question_for_eval") or row.get("question") or record.get("prompt", ""))
                    doubts[name, k] = Question(question, gold, str(paper.extraction))
            advance()
    if model is not None:
        tell(f"{task.name}: asking {model.model} about {counted(len(doubts), 'answer')} that rules leave open …")
        for key, correct in model.ask(doubts).items():
            if correct is not None:
                records[key]["judge"] = correct
                records[key]["stage"] = "judge model"
    task.answers.replace({**task.answers.known, **records}.values())  # with --limit there may be more
    found = _figures(task, records, columns, model)
    if task.name == "wemath":
        for rule in found["scores"]:
            right = [_correct(records[name, 0], rule) for name in rows.ids]  # of several samples the first
            found["scores"][rule]["wemath"] = _wemath(problems, right)
    return found


def _correct(record: dict[str, Any], rule: str) -> bool:
    """Whether an answer is right by "official", "paper", or what stands behind the latter: a judge model's name."""
    if rule in ("official", "paper"):
        return record[rule]["correct"]
    return bool(record.get("judge", record["paper"]["correct"]))


def _figures(
    task: Task,
    records: dict[tuple[str, int], dict[str, Any]],
    columns: Sequence[dict[str, list[str]]],
    model: JudgeModel | None,
) -> dict[str, Any]:
    """What summary.json says of one benchmark: scores by rule, groups by rule, counts, what it was sampled with."""
    names = ["official", "paper", *([f"paper, then {model.model}"] if model else [])]
    rules = {
        rule: [[_correct(records[name, k], rule) for k in range(task.samples)] for name in task.rows.ids]
        for rule in names
    }
    values = list(records.values())
    found: dict[str, Any] = {
        "rows": len(task.rows),
        "samples": task.samples,
        "scores": {rule: accuracy(verdicts) for rule, verdicts in rules.items()},
        "groups": {rule: by_group(verdicts, columns) for rule, verdicts in rules.items()},
        "truncated": sum(record.get("finish_reason") == "length" for record in values),
        "unanswered": sum("error" in record for record in values),
        "tokens": sum(record.get("tokens", 0) for record in values) / max(len(values), 1),
        "protocol": asdict(task.protocol),
    }
    if model is not None:
        found["judge_model"] = {"asked": model.asked, "cached": model.cached, "failed": model.failed}
    return found


def _wemath(rows: Sequence[dict[str, Any]], right: Sequence[bool]) -> dict[str, Any] | str:
    """The four-way metric; a sentence where problems are not whole, as with --limit."""
    try:
        return wemath_scores(rows, right)
    except UserError as error:
        return str(error)
