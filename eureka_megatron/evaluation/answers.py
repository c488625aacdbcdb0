"""The answers of one benchmark on disk: a JSON line each, written as they come, so that a kill loses none that was finished.

OUTPUT/mathvista/settings.json      what they were sampled with
OUTPUT/mathvista/answers.jsonl      {"id": "17", "sample": 0, "prompt": …, "pictures": [keys], "response": …, verdicts once judged}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eureka_megatron.errors import UserError

Key = tuple[str, int]  # id of the row, number of the sample


class Answers:
    """What is there already, and where more goes. A context manager.

    Raises:
        UserError: the folder holds answers that were sampled otherwise; names what differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / "answers.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[Key, dict[str, Any]] = {}
        self._compare(settings)
        self._read()

    def __enter__(self) -> Answers:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Append one answer; it is in the file when this returns."""
        self.known[record["id"], record["sample"]] = record
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """All answers anew, in this order: whole or not at all."""
        fresh = self.path.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            for record in records:
                self.known[record["id"], record["sample"]] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(fresh, self.path)

    def _compare(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        differ = [name for name in settings if earlier.get(name) != settings[name]]
        if differ and self.path.exists() and self.path.stat().st_size:
            told = "; ".join(f"{name} {earlier.get(name)!r:.120} there, {settings[name]!r:.120} now" for name in differ)
            raise UserError(
                f"{self.folder} holds answers that were sampled otherwise: {told}; name another --output, or remove it"
            )
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _read(self) -> None:
        """The lines that are there; a last one that a kill cut short goes, so that the next line begins a line. Raises UserError for others."""
        if not self.path.exists():
            return
        good = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    self.known[str(record["id"]), record["sample"]] = record | {"response": record["response"]}
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}:{number}: a line must be a JSON object with id, sample (from 0) and response; mend it, or name another "
                        "--output"
                    ) from None
                good += len(line)
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)
