"""Where rows lie: a JSONL file, a parquet file, or a directory that `datasets` wrote; and how the rows of MMK12's form become chats.

Nothing of a file stays in memory: JSONL is read again at the byte where a row begins; tables are memory maps (parquet is first written out as
Arrow by `datasets`, once, into its cache: `HF_DATASETS_CACHE` says where).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eureka_megatron.errors import UserError

MARKER = re.compile(r"<image\d*>|<video\d*>")  # where a picture or video stands in a question
BATCH = 64  # rows of a table in memory while it is scanned


class Lines:
    """A JSONL file. A row's place is the byte at which its line begins."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent

    def scan(self) -> Iterator[tuple[int, int, bytes]]:
        """(line number from 1, place, line) of every line that is not blank."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, start, line
                start += len(line)

    def raw(self, place: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place)
            return file.readline()

    @staticmethod
    def parse(line: bytes) -> dict[str, Any]:
        """Raises UserError: no JSON object."""
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 (byte {error.start} of the line)") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"a row must be a JSON object, found {type(row).__name__}")
        return row

    @staticmethod
    def text(line: bytes) -> str:
        """The row for rejected.jsonl."""
        return line.decode(errors="replace").rstrip("\n")


class Table:
    """A parquet file, a directory of them, or one written by `datasets`. A row's place is its number from 0."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path if path.is_dir() else path.parent
        # "arrow" hands out what is stored: pictures stay bytes and are decoded by our rules, not by those of `datasets`.
        self._rows = _open_table(path).with_format("arrow")

    def scan(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(row number from 1, place, row) of every row."""
        place = 0
        for batch in self._rows.iter(batch_size=BATCH):
            for row in batch.to_pylist():
                yield place + 1, place, row
                place += 1

    def raw(self, place: int) -> dict[str, Any]:
        return self._rows[place].to_pylist()[0]

    @staticmethod
    def parse(row: dict[str, Any]) -> dict[str, Any]:
        return row

    @staticmethod
    def text(row: dict[str, Any]) -> str:
        """The row for rejected.jsonl, without the bytes of its pictures."""
        return json.dumps(row, ensure_ascii=False, default=_abbreviated)


def open_source(path: Path) -> Lines | Table:
    """The rows of a file or directory, whatever its form.

    Raises:
        UserError: there is none, or it holds no rows of a known form.
    """
    if path.is_dir() or path.suffix == ".parquet":
        return Table(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    return Lines(path)


def _open_table(path: Path) -> Any:
    import datasets
    import pyarrow
    from pyarrow import parquet

    if not path.exists():
        raise UserError(f"data file {path} does not exist")
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        raise UserError(
            f"{path} holds the splits {', '.join(splits)}; name one of them: {path / (splits or ['train'])[0]}"
        )
    if (path / "state.json").is_file():
        try:
            return datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read by datasets: {str(error).splitlines()[0]}") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is neither written by datasets (save_to_disk) nor holds parquet files")
    for file in files:
        try:
            parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is no parquet file: {str(error).splitlines()[0]}") from error
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files])
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {str(error.__cause__ or error).splitlines()[0]}") from error


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MMK12's form, `question` and `image` (or `images`, `video`, `videos`), with the `message` they make; others as they are.

    One picture or video comes before the question; several stand where the question says `<image>` or `<video>`, or all before it.

    Raises:
        UserError: the question names another number of them than the row has.
    """
    if row.get("message") is not None or not isinstance(row.get("question"), str):
        return row
    shown = [{"type": kind, kind: value} for kind in ("image", "video") for value in _values(row, kind)]
    question: str = row["question"]
    marks = MARKER.findall(question)
    if len(marks) not in (0, len(shown)):
        raise UserError(
            f"the question has {len(marks)} of <image> and <video>, the row {len(shown)} pictures and videos"
        )
    if len(shown) > 1 and marks:
        waiting = {kind: [part for part in shown if part["type"] == kind] for kind in ("image", "video")}
        texts = MARKER.split(question)
        content: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
        for mark, text in zip(marks, texts[1:], strict=True):
            kind = "image" if mark.startswith("<image") else "video"
            if not waiting[kind]:
                raise UserError(f"the question has more {mark} than the row has {kind}s")
            content += [waiting[kind].pop(0), {"type": "text", "text": text}]
        content = [part for part in content if part["type"] != "text" or part["text"].strip()]
    else:
        content = [*shown, {"type": "text", "text": MARKER.sub("", question).strip()}]
    return row | {"message": [{"role": "user", "content": content}]}


def _values(row: dict[str, Any], kind: str) -> list[Any]:
    """What the row shows of a kind. A list under `image` are several pictures, under `video` the frames of one."""
    found = []
    for key in (kind, f"{kind}s"):
        value = row.get(key)
        if value is not None:
            found += value if isinstance(value, list) and key != "video" else [value]
    return found


def _abbreviated(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
