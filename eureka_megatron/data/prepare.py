"""Data preparation commands: MMK12's parquet files to MM-EUREKA rows, and a full check of any data file.

Left out: downloads. The files are expected on disk.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from eureka_megatron.data.chat import located
from eureka_megatron.data.dataset import Dataset, load_dataset
from eureka_megatron.data.pictures import FORMATS, load_picture
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.rows import RowOptions, read_answer
from eureka_megatron.data.sources import Table, as_chat, open_parquet, open_source, rows_of
from eureka_megatron.errors import UserError
from eureka_megatron.tracking.console import progress_lines

COLUMNS = ("id", "question", "image", "answer", "subject")
SHOWN = 50  # problems in the table
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used. Example: Problem("train.jsonl:17", "picture a.png does not exist")."""

    origin: str
    reason: str


def convert_mmk12(
    sources: Sequence[Path], output: Path, *, name: str = "train", progress: Callable[[int], None] | None = None
) -> tuple[Path, list[Problem]]:
    """Write `<output>/<name>.jsonl` and `<output>/images/` from parquet files with the columns of `COLUMNS`.

    The pictures' bytes are written as they are, one row group at a time in memory. Rows without a readable picture, a question or an
    answer are left out and returned as problems. The JSONL appears only when all of it is there.

    Raises:
        UserError: a file is missing, is no parquet, or lacks a column; or `<name>.jsonl` exists.
    """
    target = output / f"{name}.jsonl"
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; remove it or choose another output or name")
    images = output / "images"
    problems: list[Problem] = []
    partial = target.with_suffix(".jsonl.partial")
    tables = [_open_parquet(source) for source in sources]  # all are checked before anything is written
    images.mkdir(parents=True, exist_ok=True)
    written = 0
    with partial.open("w", encoding="utf-8") as file:
        for source, table in zip(sources, tables, strict=True):
            for number, record in enumerate(_records(table), start=1):
                origin = f"{source}:{number}"
                try:
                    with located(origin):
                        line, data, picture = _row(record.to_pylist()[0], f"images/{name}-{written:06d}")
                except UserError as error:
                    problems.append(Problem(origin, str(error).removeprefix(f"{origin}: ")))
                    continue
                (output / picture).write_bytes(data)
                file.write(line + "\n")
                written += 1
                if progress is not None:
                    progress(written)
    if not written:
        partial.unlink()
        raise UserError(f"no usable row in {', '.join(map(str, sources))}; the first problem: {problems[0].reason}")
    os.replace(partial, target)
    return target, problems


def _open_parquet(path: Path) -> Any:
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    table = open_parquet(path)
    missing = [column for column in COLUMNS if column not in table.schema_arrow.names]
    if missing:
        raise UserError(f"{path}: columns {missing} are missing; found {table.schema_arrow.names}")
    return table


def _records(table: Any) -> Iterator[Any]:
    for batch in table.iter_batches(batch_size=64, columns=list(COLUMNS)):
        yield from rows_of(batch)


def _row(record: dict[str, Any], stem: str) -> tuple[str, bytes, str]:
    """The row as a line, the bytes of its picture, and the address they are to lie at: `stem` and an extension."""
    question, answer = record["question"], read_answer(record["answer"])
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"'question' must be a non-empty string, found {question!r}")
    data = record["image"].get("bytes") if isinstance(record["image"], dict) else None
    if not isinstance(data, bytes) or not data:
        raise UserError("'image' holds no bytes")
    load_picture(data, ())  # as the reader will
    with Image.open(BytesIO(data), formats=FORMATS) as picture:
        address = f"{stem}.{EXTENSIONS[picture.format or '']}"
    row = {
        "id": str(record["id"]),
        "message": json.dumps(as_chat({"question": question, "image": address})["message"], ensure_ascii=False),
        "answer": answer.strip(),
        "subject": record["subject"],
    }
    return json.dumps(row, ensure_ascii=False), data, address


@dataclass(frozen=True)
class Validation:
    """What a data file holds. Counts are those of the good rows."""

    rows: int
    pictures: int
    videos: int
    longest_tokens: int  # of a prompt, placeholders expanded
    problems: tuple[Problem, ...]  # in file order
    responses: int = 0  # to imitate


class ValidationOptions(RowOptions, total=False):
    """The keywords of `load_dataset` that a validation takes."""

    media: Sequence[Path | str]


def validate(
    path: Path,
    processor: Processor,
    *,
    clean: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **rules: Unpack[ValidationOptions],
) -> Validation:
    """Read every row as training would, pictures and videos decoded and the prompt's tokens counted.

    Args:
        clean: a file to write the good lines to, unchanged; it must lie in the same folder, since pictures are found from there.
        rules: further arguments of `load_dataset`.

    Raises:
        UserError: the file is missing or holds no good row; `clean` exists or lies elsewhere, or the file is a table.
    """
    if clean is not None and clean.exists():
        raise UserError(f"{clean} exists and is not overwritten")
    if clean is not None and os.path.dirname(os.path.realpath(clean)) != os.path.dirname(os.path.realpath(path)):
        raise UserError(
            f"{clean} must lie beside {path}: relative picture paths are looked up from the data file's folder"
        )
    if clean is not None and isinstance(open_source(path), Table):
        raise UserError(f"{path} is a table; good rows can be copied from JSONL files only")
    with tempfile.TemporaryDirectory() as folder:
        rejected = Path(folder) / "rejected.jsonl"
        dataset = load_dataset(path, processor, on_bad_row="skip", rejected=rejected, **rules)
        assert isinstance(dataset, Dataset), "one file is no mixture"
        good: list[int] = []
        counts: Counter[str] = Counter()
        for index in range(len(dataset)):
            prompt = dataset.get(index, keep=False)
            if prompt is not None:
                good.append(index)
                counts["videos"] += sum(picture.is_video for picture in prompt.pictures)
                counts["pictures"] += sum(not picture.is_video for picture in prompt.pictures)
                counts["responses"] += dataset.rules.response(dataset.raw(index)) is not None
                counts["tokens"] = max(counts["tokens"], len(prompt.tokens_S))
            if progress is not None:
                progress(index + 1, len(dataset))
        with rejected.open("rb") as file:  # line by line: a row may be as large as its pictures
            problems = [_problem(json.loads(line)) for line in file]
    if clean is not None:
        partial = clean.with_name(clean.name + ".partial")
        with partial.open("wb") as file:
            file.writelines(dataset.line(index) for index in good)
        os.replace(partial, clean)
    problems.sort(key=lambda problem: int(problem.origin.rpartition(":")[2]))
    figures = {name: counts[name] for name in ("pictures", "videos", "responses")}
    return Validation(len(good), **figures, longest_tokens=counts["tokens"], problems=tuple(problems))


def _problem(record: dict[str, str]) -> Problem:
    return Problem(record["origin"], record["reason"].removeprefix(f"{record['origin']}: "))


def show_validation(
    path: Path, processor: Processor, *, clean: Path | None = None, **rules: Unpack[ValidationOptions]
) -> int:
    """Validate with a progress bar, print a table of problems. → exit code 0 when there are none, else 1. Arguments: see `validate`."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console()
    told = progress_lines(f"reading {path}", "rows")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("reading rows", total=None)

        def progress(done: int, total: int) -> None:
            if console.is_terminal:
                bar.update(task, completed=done, total=total)
            else:
                told(done, total)

        found = validate(path, processor, clean=clean, progress=progress, **rules)
    problems = found.problems
    if problems:
        # Text: brackets in names and reasons are no markup.
        grid = Grid("line", "problem", title=Text(f"{path}: {len(problems)} bad rows"))
        for problem in problems[:SHOWN]:
            grid.add_row(problem.origin.rpartition(":")[2], Text(problem.reason))
        console.print(grid)
        if len(problems) > SHOWN:
            console.print(f"… and {len(problems) - SHOWN} more; by kind: {kinds(problems)}", markup=False)
    console.print(
        f"{path}: {found.rows} good rows, {len(problems)} bad; {found.pictures} pictures, {found.videos} videos, "
        f"{found.responses} responses, longest prompt {found.longest_tokens} tokens"
        + (f"; good rows in {clean}" if clean else ""),
        markup=False,
        soft_wrap=True,
    )
    return 1 if problems else 0


def kinds(problems: Sequence[Problem]) -> dict[str, int]:
    """How many problems begin alike, most first: a summary when there are thousands."""
    return dict(Counter(problem.reason.split(":")[0][:60] for problem in problems).most_common())
