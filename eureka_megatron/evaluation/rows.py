"""The rows of a benchmark, from the files in which it is published.

| form | what is read |
|---|---|
| parquet | a file, or a folder of them such as a snapshot of the hub: the benchmark's own split is chosen |
| `datasets` | a folder that `save_to_disk` wrote |
| JSON | a list of rows, or a dictionary of them by id (MathVista); pictures in a folder beside it or in `media` |
| JSONL | a row a line |
| TSV | VLMEvalKit's: pictures in base64, one column an option; brought into the published schema |

Pictures of tables stay in their file until they are shown.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eureka_megatron.data.chat import located
from eureka_megatron.data.pictures import locate
from eureka_megatron.data.rows import SHOWN
from eureka_megatron.data.sources import open_source
from eureka_megatron.errors import UserError
from eureka_megatron.evaluation.judging import benchmark_named
from eureka_megatron.evaluation.queries import message, pictures, query
from eureka_megatron.evaluation.verdict import Row, absent, items

IDS = {"mathvista": "pid", "mathverse": "sample_index", "wemath": "ID"}
GOLDS = {"olympiadbench": "final_answer"}
# Which files of a folder are the benchmark's, by their path in it; all where none is.
SPLITS = {
    "mmk12": r"(^|/)test\b",
    "mathvista": r"(^|/)testmini\b",
    "mathverse": r"(^|/)testmini(?!_text_only)\b",
    "mathvision": r"(^|/)test\b",
    "olympiadbench": r"OE_(MM|TO)_(maths|physics)_en_COMP",
    "wemath": r"(^|/)testmini\b",
    "counting": r"(^|/)test\b",
}
_CONFIG = re.compile(r"(OE|TP)_(MM|TO)_(maths|physics)_(en|zh)_(COMP|CEE)")
_OPTIONS = "ABCDEFGH"
# VLMEvalKit's column → the published one, where they differ
_COLUMNS = {"mathvision": {"choices": "options", "category": "subject"}}


class Rows(Sequence[dict[str, Any]]):
    """The rows of one benchmark, in order, as they are published.

    Attributes:
        ids: of each row, unique: where several share one, the later ones have #2, #3 … behind it.
        left_out: rows that the benchmark's score does not count, and why.
        folders: where the rows' pictures may lie.
    """

    def __init__(self, benchmark: str, path: Path, media: Sequence[Path] = (), limit: int | None = None) -> None:
        self.benchmark, self.path = benchmark_named(benchmark), path
        self._parts = [_open(file, self.benchmark) for file in _files(self.benchmark, path)]
        self.folders = (*dict.fromkeys(part.folder for part in self._parts), *media)
        self._places: list[tuple[int, Any, str]] = []  # part, place, "file:number"
        self.ids: list[str] = []
        self.left_out: Counter[str] = Counter()
        problems: list[str] = []
        for part, source in enumerate(self._parts):
            for number, place, raw in source.scan():
                if limit is not None and len(self._places) == limit:
                    break
                origin = f"{source.path}:{number}"
                try:
                    with located(origin):
                        row = self._published(source.parse(raw), source)
                        if self._counts(row):
                            self._check(row)
                            self._places.append((part, place, origin))
                            self.ids.append(_id(self.benchmark, row, len(self.ids)))
                except UserError as error:
                    problems.append(str(error))
        if problems:
            more = f"\n… {len(problems)} bad rows in all" if len(problems) > SHOWN else ""
            if any(": picture " in problem for problem in problems):
                more += "\n(further folders of pictures: data.media; of eureka eval --media)"
            raise UserError("\n".join(problems[:SHOWN]) + more)
        if not self._places:
            raise UserError(f"{path} holds no rows of {self.benchmark}")
        self.ids = _unique(self.ids)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """A row, its pictures with it."""
        part, place, origin = self._places[index]
        source = self._parts[part]
        with located(origin):
            return self._published(source.parse(source.raw(place)), source)

    @property
    def nbytes(self) -> int:
        """Of the files, which tells one release of the data from another."""
        return sum(part.path.stat().st_size for part in self._parts if part.path.is_file())

    def origin(self, index: int) -> str:
        """ "file:number"."""
        return self._places[index][2]

    def chat(self, index: int) -> list[dict[str, Any]]:
        """What the model is asked, as a chat with its pictures."""
        return message(self.benchmark, self[index])

    def _published(self, row: dict[str, Any], source: Any) -> dict[str, Any]:
        if isinstance(source, _TabSeparated):
            row = _from_vlmevalkit(self.benchmark, row)
        if self.benchmark == "olympiadbench" and (config := _CONFIG.search(str(source.path))):
            row = {"config": config[0], "subject": config[3]} | {k: v for k, v in row.items() if not absent(v)}
        if self.benchmark == "mathverse" and isinstance(row.get("metadata"), str):
            row |= {"metadata": json.loads(row["metadata"])}
        return row

    def _counts(self, row: Row) -> bool:
        version = row.get("problem_version")
        if self.benchmark == "mathverse" and version in ("Text Only", "Text_Only"):
            self.left_out["Text Only, which MathVerse's overall score does not count"] += 1
            return False
        if self.benchmark == "olympiadbench" and str(row.get("config", "")).startswith("TP"):
            self.left_out["proofs, which no rule can judge"] += 1
            return False
        if self.benchmark == "olympiadbench" and ("_zh_" in str(row.get("config")) or row.get("language") == "Chinese"):
            self.left_out["Chinese questions, which the English prompt does not ask"] += 1
            return False
        return True

    def _check(self, row: Row) -> None:
        """Raises UserError: the row cannot be asked or judged, as far as that shows without decoding a picture."""
        gold = GOLDS.get(self.benchmark, "answer")
        if absent(row.get(gold)) or not items(row[gold]):
            raise UserError(
                f"the row has no {gold!r}, so nothing can be judged; found {', '.join(sorted(map(str, row)))} (splits without answers "
                "are scored by the benchmark's authors alone)"
            )
        if row.get("message") is None:
            query(self.benchmark, row)
            for address in pictures(self.benchmark, row):
                locate(address, self.folders)


def groups(benchmark: str, row: Row) -> dict[str, list[str]]:
    """What a row is counted under besides the whole. Example: {"subject": ["algebra"], "level": ["3"]}."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    whole = {**(metadata if isinstance(metadata, Mapping) else {}), **row}
    found = {}
    for column in _GROUPS[benchmark_named(benchmark)]:
        name, _, other = column.partition(" × ")
        cells = [whole.get(one) for one in (name, other) if one]
        values = [[str(cell)] if isinstance(cell, int | float) and not absent(cell) else items(cell) for cell in cells]
        if all(values):
            found[column] = [" × ".join(pair) for pair in zip(*values, strict=True)] if other else values[0]
    return found


_GROUPS = {
    "mmk12": ("subject",),
    "mathvista": (
        "question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills"
    ),
    "mathverse": ("problem_version", "subject", "subfield", "question_type"),
    "mathvision": ("subject", "level", "subject × level"),
    "olympiadbench": ("config", "subject", "subfield", "answer_type"),
    "wemath": ("key", "knowledge concept"),
    "counting": ("level",),
}  # fmt: skip


def _files(benchmark: str, path: Path) -> list[Path]:
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [path]
    found = sorted(file for kind in ("parquet", "jsonl", "json", "tsv") for file in path.rglob(f"*.{kind}"))
    tables = [file for file in found if file.suffix == ".parquet"] or found
    own = [file for file in tables if re.search(SPLITS[benchmark], str(file.relative_to(path)))]
    if not tables:
        raise UserError(f"{path} holds no parquet, JSONL, JSON or TSV file")
    return own or tables


def _open(path: Path, benchmark: str) -> Any:
    if path.suffix == ".json":
        return _Whole(path, IDS.get(benchmark, "id"))
    if path.suffix == ".tsv":
        return _TabSeparated(path)
    return open_source(path)


class _Memory:
    """Rows that are read whole; a row's place is its number from 0."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"data file {path} does not exist")
        self.path, self.folder = path, path.parent
        self.rows: list[dict[str, Any]] = []

    def scan(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        return ((place + 1, place, row) for place, row in enumerate(self.rows))

    def raw(self, place: int) -> dict[str, Any]:
        return self.rows[place]

    @staticmethod
    def parse(row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise UserError(f"a row must be a JSON object, found {type(row).__name__}")
        return dict(row)


class _Whole(_Memory):
    """A JSON file: a list of rows, or a dictionary whose keys are their ids."""

    def __init__(self, path: Path, id_column: str) -> None:
        super().__init__(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not JSON: {error}; a file of one row a line is named .jsonl") from None
        if isinstance(found, dict):
            found = [{id_column: key, **row} if isinstance(row, dict) else row for key, row in found.items()]
        if not isinstance(found, list):
            raise UserError(f"{path}: neither a list of rows nor a dictionary of them, found {type(found).__name__}")
        self.rows = found


class _TabSeparated(_Memory):
    """A table of VLMEvalKit; an empty cell is None."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        csv.field_size_limit(sys.maxsize)  # a cell may be a picture
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file, delimiter="\t")
                self.rows = [{name: value or None for name, value in row.items() if name} for row in table]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: no table of tab-separated columns: {error}") from None
        shown = {row.get("index"): row.get("image") for row in self.rows}
        for row in self.rows:  # a short cell names the row that holds the picture
            if (image := row.get("image")) is not None and len(image) < 64 and shown.get(image):
                row["image"] = shown[image]


def _from_vlmevalkit(benchmark: str, row: dict[str, Any]) -> dict[str, Any]:
    """In the published schema: options in one column, `index` as the id, other names of columns."""
    for theirs, ours in _COLUMNS.get(benchmark, {}).items():
        if theirs in row and absent(row.get(ours)):
            row[ours] = row.pop(theirs)
    options = [(letter, row[letter]) for letter in _OPTIONS if not absent(row.get(letter))]
    if options and benchmark == "wemath" and absent(row.get("option")):
        row["option"] = "; ".join(f"{letter}. {text}" for letter, text in options)
    elif options and benchmark == "mathvision" and absent(row.get("options")):
        row["options"] = [text for _, text in options]
    elif options and benchmark == "mathvista" and absent(row.get("choices")):
        row["choices"] = [text for _, text in options]
    elif options and benchmark == "mmk12" and "\nA" not in str(row.get("question")):
        row["question"] = "\n".join([str(row.get("question")), *(f"{letter}. {text}" for letter, text in options)])
    name = IDS.get(benchmark, "id")
    if absent(row.get(name)) and not absent(row.get("index")):
        row[name] = row["index"]
    # Letters stand where the published files have the choice's text.
    choices = items(row.get("choices"))
    if benchmark == "mathvista" and choices and row.get("answer") not in choices:
        letter = str(row.get("answer_option") or row.get("answer"))
        place = _OPTIONS.find(letter) if len(letter) == 1 else -1
        if 0 <= place < len(choices):
            row["answer"] = choices[place]
    return row


def _id(benchmark: str, row: Row, number: int) -> str:
    value = row.get(IDS.get(benchmark, "id"))
    name = str(number) if absent(value) else str(value)
    parts = [row.get("config")] if benchmark == "olympiadbench" else [row.get("key")] if benchmark == "wemath" else []
    return "/".join([name, *(str(part) for part in parts if not absent(part))])


def _unique(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found
