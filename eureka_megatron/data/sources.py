"""Where rows lie: a JSONL file, a parquet file, or a directory that `datasets` wrote; and how the rows of MMK12's form become chats.

Nothing of a file stays in memory: JSONL is read again at the byte where a row begins; tables are memory maps (parquet is first written out as
Arrow by `datasets`, once, into its cache: `HF_DATASETS_CACHE` says where).
"""

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eureka_megatron.errors import UserError

MARKER = re.compile(r"<(image|video)[ _]?(\d*)>")  # where a picture or video stands in a question; which one, from 1
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
    def record(line: bytes) -> dict[str, str]:
        """The row for rejected.jsonl; in base64, too, where it is no text."""
        text = line.rstrip(b"\n")
        try:
            return {"row": text.decode()}
        except UnicodeDecodeError:
            return {"row": text.decode(errors="replace"), "row_base64": base64.b64encode(text).decode()}


class Table:
    """A parquet file, a directory of them, or one written by `datasets`. A row's place is its number from 0."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path if path.is_dir() else path.parent
        # "arrow" hands out what is stored: pictures stay bytes and are decoded by our rules, not by those of `datasets`.
        self._rows = _open_table(path).with_format("arrow")

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        """(row number from 1, place, Arrow table of one row) of every row."""
        place = 0
        for batch in self._rows.iter(batch_size=BATCH):
            for row in rows_of(batch):
                yield place + 1, place, row
                place += 1

    def raw(self, place: int) -> Any:
        return self._rows[place]

    @staticmethod
    def parse(row: Any) -> dict[str, Any]:
        """Arrow checks neither text nor dates before they are asked for: anything may be raised."""
        return row.to_pylist()[0]

    @staticmethod
    def record(row: Any) -> dict[str, str]:
        """The row for rejected.jsonl, without the bytes of its pictures."""
        cells = {name: _cell(row[name]) for name in row.column_names}
        return {"row": json.dumps(cells, ensure_ascii=False, default=_abbreviated)}


def open_source(path: Path) -> Lines | Table:
    """The rows of a file or directory, whatever its form.

    Raises:
        UserError: there is none, or it holds no rows of a known form.
    """
    # os.path, not Path: names that are too long and circles of links are no files, and no errors.
    if not os.path.exists(path):
        raise UserError(f"data file {path} does not exist")
    if os.path.isdir(path) or path.suffix == ".parquet":
        return Table(path)
    if not os.path.isfile(path):
        raise UserError(f"data file {path} is no regular file")
    return Lines(path)


def rows_of(batch: Any) -> Iterator[Any]:
    """An Arrow table or record batch, row by row: one that cannot be read does then not take the others along."""
    return (batch.slice(number, 1) for number in range(batch.num_rows))


def _open_table(path: Path) -> Any:
    try:
        return _read_table(path)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise nearly anything on broken files
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(f"{path} cannot be read: {reason}") from error


def _read_table(path: Path) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        raise UserError(
            f"{path} holds the splits {', '.join(splits)}; name one of them: {path / (splits or ['train'])[0]}"
        )
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is neither written by datasets (save_to_disk) nor holds parquet files")
    for file in files:
        open_parquet(file)
    datasets.disable_progress_bars()
    return datasets.Dataset.from_parquet([str(file) for file in files])


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: it is none.
    """
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is no parquet file: {reason}") from error


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MMK12's form, `question` and `image` (or `images`, `video`, `videos`), with the `message` they make; others as they are.

    One picture or video comes before the question; several stand where the question says `<image>` or `<video>`, or all before it.
    `<image2>` is the row's second picture wherever it stands, and as often; `<image>` is the next one.

    Raises:
        UserError: the question names one that the row does not have, or not all that it has.
    """
    if row.get("message") is not None or not isinstance(row.get("question"), str):
        return row
    shown = {kind: [{"type": kind, kind: value} for value in _values(row, kind)] for kind in ("image", "video")}
    first, *pieces = MARKER.split(row["question"])
    named: dict[str, list[int]] = {"image": [], "video": []}
    content: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for kind, number, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        named[kind].append(int(number) if number else len(named[kind]) + 1)
        content += [{"type": kind, "place": named[kind][-1]}, {"type": "text", "text": text}]
    for kind, parts in shown.items():
        if pieces and set(named[kind]) != set(range(1, len(parts) + 1)):
            asked = ", ".join(map(str, named[kind])) or "none"
            raise UserError(f"the question shows {kind}s {asked} of the row's {len(parts)}; every one must be shown")
    if pieces and sum(map(len, shown.values())) > 1:
        content = [shown[part["type"]][part["place"] - 1] if "place" in part else part for part in content]
        content = [part for part in content if part["type"] != "text" or part["text"].strip()]
    else:
        content = [*shown["image"], *shown["video"], {"type": "text", "text": MARKER.sub("", row["question"]).strip()}]
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


def _cell(column: Any) -> Any:
    try:
        return column.to_pylist()[0]
    except Exception as error:  # the very thing the row may have been left out for
        return f"<{column.type}: {error}>"
