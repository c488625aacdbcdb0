"""Stored rollouts for a page: an index of all responses, and each step's text packed by itself, unpacked when it is looked at."""

import base64
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from eureka_megatron.report.contents import clean
from eureka_megatron.tracking.rollouts import FOLDER, step_files

COLUMNS = [
    "group", "response", "prompt_id", "prompt", "answer", "pictures", "picture_tokens", "prompt_tokens", "text", "pieces", "logprobs",
    "trainer_logprobs", "entropy", "advantage", "rewards", "finish_reason", "weight_version",
]  # fmt: skip
LOGPROB_UNIT, DIFFERENCE_UNIT = 0.01, 1e-4  # nats; as in static/rollouts.js
PICTURE_BYTES = 40_000  # a larger one is shown smaller, as WebP
PICTURE_SIDE = 640  # pixels at most, then


class StoredRollouts:
    """Of one run's folder. `steps` first: it fills `index` and `pictures`.

    index: columns over all responses, in order: step, group, response, total, accuracy, length (tokens), advantage.
    pictures: keys of those that are shown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, list[Any]] = {
            name: [] for name in ("step", "group", "response", "total", "accuracy", "length", "advantage")
        }
        self.pictures: set[str] = set()
        self.problems: list[str] = []

    def steps(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(step, what is shown of it). A file that cannot be read is named in `problems` and left out."""
        for step, path in step_files(self.folder).items():
            try:
                table = pq.read_table(path, columns=COLUMNS)
            except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are among these
                self.problems.append(f"{FOLDER}/{path.name} cannot be read: {str(error).splitlines()[0][:200]}")
                continue
            yield step, self._step(step, table)

    def _step(self, step: int, table: pa.Table) -> dict[str, Any]:
        arrays = ["logprobs", "trainer_logprobs", "entropy"]
        plain = table.drop_columns(arrays).to_pylist()
        groups: dict[int, dict[str, Any]] = {}
        for row, engine_R, trainer_R, entropy_R in zip(plain, *(_lists(table[name]) for name in arrays), strict=True):
            rewards = clean(dict(row["rewards"]))
            numbers = (row["group"], row["response"], rewards.get("total"), rewards.get("accuracy"), len(row["pieces"]))
            for name, value in zip(self.index, (step, *numbers, clean(row["advantage"])), strict=True):
                self.index[name].append(value)
            self.pictures.update(row["pictures"])
            kept = ("prompt_id", "prompt", "answer", "pictures", "picture_tokens", "prompt_tokens")
            group = groups.setdefault(row["group"], {name: row[name] for name in kept} | {"responses": {}})
            group["responses"][row["response"]] = {
                "pieces": row["pieces"] or [row["text"]],
                "logprobs": _counted(engine_R, LOGPROB_UNIT),
                "difference": None if trainer_R is None else _counted(trainer_R - engine_R, DIFFERENCE_UNIT),
                "entropy": _counted(entropy_R, LOGPROB_UNIT),
                "advantage": clean(row["advantage"]),
                "rewards": rewards,
                "finish_reason": row["finish_reason"],
                "weight_version": row["weight_version"],
            }
        return {"groups": groups}

    def picture(self, key: str) -> str | None:
        """A data URL; None when there is no such picture (any more)."""
        path = self.folder / FOLDER / "pictures" / f"{key}.png"
        if not re.fullmatch(r"[\w-]+", key):  # it becomes a path and an element's id
            self.problems.append(f"{key!r} is no key of a picture")
            return None
        try:
            data, kind = path.read_bytes(), "png"
            if len(data) > PICTURE_BYTES:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
                smaller = io.BytesIO()
                image.save(smaller, "WEBP", quality=80)
                data, kind = smaller.getvalue(), "webp"
        except (OSError, ValueError) as error:
            self.problems.append(f"{FOLDER}/pictures/{path.name} cannot be read: {error}")
            return None
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def packed(value: Any) -> str:
    """JSON, compressed, as ASCII."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _lists(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """One array a row, without a Python number for each value."""
    array = column.combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [
        values[start:stop] if valid else None
        for start, stop, valid in zip(offsets, offsets[1:], array.is_valid().to_pylist(), strict=False)
    ]


def _counted(values_R: np.ndarray | None, unit: float) -> list[int | None] | None:
    """In whole units, which compress well; nothing finer is seen as a colour. None for what is not finite."""
    if values_R is None:
        return None
    finite = np.isfinite(values_R)
    units = np.rint(np.where(finite, values_R, 0) / unit).astype(int).tolist()
    return units if finite.all() else [value if known else None for value, known in zip(units, finite, strict=True)]
