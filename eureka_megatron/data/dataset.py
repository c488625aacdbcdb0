"""Rows of a data file, checked when it is opened and read as they are needed; mixtures of several files; endless shuffled streams.

A row is MM-EUREKA's `{"id", "message", "answer"}` or MMK12's `{"id", "question", "image", "answer"}` and, for supervised training, has a
response. Loading checks every row (`rows`) but decodes nothing. Rows stay in their file; what stays in memory is where each one lies, a bounded cache of prompts, and a
bounded number of prompts read ahead, so the host's memory does not grow with the data. What only decoding shows (corrupt pictures,
prompts that are too long) comes up when the row is used, and `on_bad_row` then decides as it does at loading.
"""

import json
import math
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from eureka_megatron.data.chat import located
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.rows import SHOWN, Rejects, Row, RowOptions, RowRules, good_rows
from eureka_megatron.data.sources import Lines, Table, as_chat, open_source
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.types import Prompt, Sample

CACHE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Share:
    """A run of rows that a stream shuffles by itself, and how often it draws from it."""

    start: int  # index of the first row
    rows: int
    weight: float  # of all draws; the weights of a dataset add up to 1


class Dataset:
    """The good rows of a file, in order; `dataset[i]` is a `Prompt`. Made by `load_dataset`. `load` may be called by several threads.

    Attributes:
        rows: where they lie.
        rules: what was asked of them.
    """

    def __init__(
        self,
        source: Lines | Table,
        rows: Sequence[Row],
        processor: Processor,
        *,
        rules: RowRules,
        rejects: Rejects,
        on_bad_row: Literal["error", "skip"] = "error",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.path, self.rows, self.processor = source.path, tuple(rows), processor
        self.rules, self.on_bad_row = rules, on_bad_row
        self._source, self._rejects = source, rejects
        self._rejected_rows: dict[int, UserError] = {}
        self._cache: OrderedDict[int, Prompt] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shares(self) -> tuple[Share, ...]:
        """For a stream: all rows, alike."""
        return (Share(0, len(self), 1.0),)

    def __getitem__(self, index: int) -> Prompt:
        """Raises UserError, with file and line, when the row turns out to be bad."""
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        prompt = self.read(index)
        with self._lock:
            self._remember(index, prompt)
        return prompt

    @property
    def rejected(self) -> int:
        """Rows left out so far (`on_bad_row="skip"`), at loading or when used."""
        return self._rejects.count

    def read(self, index: int) -> Prompt:
        """`self[index]`, made anew and kept nowhere: for those who use a row once."""
        row, origin = self.rows[index], self.origin(index)
        with located(origin):
            values = self.raw(index)
            prompt = self.processor.prompt(
                values["message"], id=row.id, answer=row.answer, folders=self.rules.folders, origin=origin
            )
            if (response := self.rules.response(values)) is not None:
                # What is wrong with it costs this row, not the run.
                self.rules.check_length(len(prompt.tokens_S), len(self.processor.encode_response(response)))
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def load(self, index: int, *, keep: bool = True) -> Prompt | UserError:
        """The prompt, or what is wrong with the row. `accept` decides what becomes of that. keep: in the cache."""
        if index in self._rejected_rows:
            return self._rejected_rows[index]
        try:
            return self[index] if keep else self.read(index)
        except UserError as error:
            if self.on_bad_row == "skip":  # it is kept for good, and its frames would keep the row's pictures
                error.__traceback__ = error.__cause__ = error.__context__ = None
            return error

    def accept(self, index: int, found: Prompt | UserError) -> Prompt | None:
        """What `load` found; None for a bad row when those are skipped (counted and written down once)."""
        if isinstance(found, Prompt):
            return found
        if self.on_bad_row == "error":
            raise found
        if index not in self._rejected_rows:
            self._rejected_rows[index] = found
            record = self._source.record(self._source.raw(self.rows[index].place))
            self._rejects.add(self.origin(index), found, record)
        return None

    def get(self, index: int, *, keep: bool = True) -> Prompt | None:
        """The prompt; None for a bad row when those are skipped."""
        return self.accept(index, self.load(index, keep=keep))

    def sample(self, index: int, prompt: Prompt) -> Sample:
        """The row as a supervised sample, with the text to imitate under the key named at loading."""
        return self.processor.sft_sample(prompt, self.response(index))

    def response(self, index: int) -> str:
        """The text to imitate, of the key named at loading."""
        if self.rules.response_key is None:
            raise ValueError("load_dataset(response_key=…) names the key that holds the response")
        return self.raw(index)[self.rules.response_key]

    def raw(self, index: int) -> dict[str, Any]:
        """The row as it stands in the file, all keys, and its `message`."""
        with located(self.origin(index)):
            return as_chat(self._source.parse(self._source.raw(self.rows[index].place)))

    def line(self, index: int) -> bytes:
        """The row of a JSONL file to the byte, with its line end."""
        return self._source.raw(self.rows[index].place).rstrip(b"\r\n") + b"\n"

    def origin(self, index: int) -> str:
        """ "file:line"."""
        return f"{self.path}:{self.rows[index].number}"

    def fingerprint(self) -> str:
        """Changes when rows are added, dropped, renamed, reordered or get another answer; part of a resumed stream."""
        content = json.dumps([[row.id, row.answer] for row in self.rows]).encode()
        return blake2b(content, digest_size=8).hexdigest()

    def _remember(self, index: int, prompt: Prompt) -> None:
        if index in self._cache:  # another thread was faster
            return
        self._cache[index] = prompt
        self._cached_bytes += prompt.nbytes
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes


class Mixture:
    """Several datasets one behind the other; a stream draws from each by its weight. Made by `load_dataset`."""

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.path = ",".join(str(part.path) for part in parts)
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        self.shares = tuple(
            Share(start, len(part), weight / sum(weights))
            for start, part, weight in zip(starts, parts, weights, strict=False)
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Prompt:
        part, own = self._find(index)
        return part[own]

    def __iter__(self) -> Iterator[Prompt]:
        return (prompt for part in self.parts for prompt in part)

    @property
    def rejected(self) -> int:
        return sum(part.rejected for part in self.parts)

    def load(self, index: int, *, keep: bool = True) -> Prompt | UserError:
        """See Dataset.load."""
        part, own = self._find(index)
        return part.load(own, keep=keep)

    def accept(self, index: int, found: Prompt | UserError) -> Prompt | None:
        """See Dataset.accept."""
        part, own = self._find(index)
        return part.accept(own, found)

    def get(self, index: int, *, keep: bool = True) -> Prompt | None:
        """See Dataset.get."""
        part, own = self._find(index)
        return part.get(own, keep=keep)

    def sample(self, index: int, prompt: Prompt) -> Sample:
        """See Dataset.sample."""
        part, own = self._find(index)
        return part.sample(own, prompt)

    def origin(self, index: int) -> str:
        """See Dataset.origin."""
        part, own = self._find(index)
        return part.origin(own)

    def fingerprint(self) -> str:
        """Of all parts and their weights."""
        parts = [(part.fingerprint(), share.weight) for part, share in zip(self.parts, self.shares, strict=True)]
        return blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def _find(self, index: int) -> tuple[Dataset, int]:
        for part, share in zip(self.parts, self.shares, strict=True):
            if share.start <= index < share.start + share.rows:
                return part, index - share.start
        raise IndexError(index)


Rows = Dataset | Mixture


def load_dataset(
    data: Path | str,
    processor: Processor,
    *,
    media: Sequence[Path | str] = (),
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | str | None = None,
    **rules: Unpack[RowOptions],
) -> Rows:
    """Open and check a JSONL file, a parquet file, a directory of `datasets`, or a mixture `a.jsonl:0.7,b.parquet:0.3`.

    Args:
        media: folders pictures and videos may come from besides the data file's own.
        on_bad_row: "error" raises, naming up to five bad rows; "skip" counts them and writes them to `rejected`.
        rejected: a JSONL file, begun anew, of `{"origin", "reason", "row"}` and, where a line is no UTF-8, `"row_base64"`; None writes none.
        rules: the fields of `RowRules`; without `check_answer` answers need only be non-empty.

    Raises:
        UserError: a file is missing or holds no good row; or bad rows, as `file:line: reason`.
        ConfigError: the weights of a mixture make no sense.
    """
    rejected_path = None if rejected is None else Path(rejected)
    if rejected_path is not None:
        rejected_path.parent.mkdir(parents=True, exist_ok=True)
        rejected_path.write_text("")
    mixture = read_mixture(data)
    parts = []
    for path, _ in mixture:
        source = open_source(path)
        row_rules = RowRules((source.folder, *map(Path, media)), **rules)
        rejects = Rejects(rejected_path)
        rows = good_rows(source, processor, row_rules, rejects)
        if rejects.count and on_bad_row == "error":
            more = f"\n… {rejects.count} bad rows in all" if rejects.count > SHOWN else ""
            raise UserError("\n".join(rejects.first) + f"{more}\n(data.on_bad_row=skip leaves bad rows out)")
        if not rows:
            raise UserError(
                f"{path} holds no usable row" + (f"; the first is bad: {rejects.first[0]}" if rejects.first else "")
            )
        dataset = Dataset(
            source,
            rows,
            processor,
            rules=row_rules,
            rejects=rejects,
            on_bad_row=on_bad_row,
            cache_bytes=CACHE_BYTES // len(mixture),
        )
        parts.append(dataset)
    if len(parts) == 1:
        return parts[0]
    return Mixture(parts, [weight or len(part) for part, (_, weight) in zip(parts, mixture, strict=True)])


def read_mixture(data: Path | str) -> list[tuple[Path, float | None]]:
    """Paths and weights of `a.jsonl:0.7,b.parquet:0.3`; without weights (None) each row counts the same.

    Raises:
        ConfigError: a part has no path, a weight is not positive, or only some parts have one.
    """
    if isinstance(data, Path) or os.path.exists(data):  # not Path.exists, which a long mixture makes raise
        return [(Path(data), None)]
    parts: list[tuple[Path, float | None]] = []
    for part in map(str.strip, data.split(",")):
        path, _, number = part.rpartition(":")
        weight = _as_number(number) if path and not os.path.exists(part) else None
        if not part or (weight is not None and not 0 < weight < math.inf):
            raise ConfigError(
                f"data.train: {part!r} of {data!r} is not of the form path or path:weight, weight above 0"
            )
        parts.append((Path(part if weight is None else path), weight))
    if len({weight is None for _, weight in parts}) > 1:
        raise ConfigError(f"data.train={data!r}: either every part has a weight or none has")
    return parts


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # the colon belongs to a name
        return None


class PromptStream:
    """Endless epochs over a dataset, each in its own order; where it stands is a small dictionary.

    The order of epoch e depends on seed and e alone, so a resumed stream gives what an uninterrupted one would have given. Of a mixture every
    part has its own epochs, and after any number of draws each part has had its weight's share of them to within one row.

    With workers, the next rows are read and decoded in the background: at most `prefetch` prompts wait at any time. Order, errors and state
    are those of a stream without: what has been read ahead but not taken is not part of the state.
    """

    def __init__(self, dataset: Rows, seed: int = 0, *, workers: int = 0, prefetch: int = 0) -> None:
        self.dataset, self.seed, self.prefetch = dataset, seed, prefetch
        self._drawn = [0] * len(dataset.shares)  # rows taken of each share
        self._planned = [0] * len(dataset.shares)  # and those being read ahead
        self._ahead: deque[tuple[int, Future[Prompt | UserError]]] = deque()
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._readers = ThreadPoolExecutor(workers, "prompts") if workers and prefetch else None
        if self._readers is not None:
            weakref.finalize(self, self._readers.shutdown, wait=False, cancel_futures=True)

    def next(self, number: int) -> list[Prompt]:
        """The next `number` prompts; bad rows are passed over when the dataset skips them."""
        return [prompt for _, prompt in self._take(number)]

    def next_samples(self, number: int) -> list[Sample]:
        """The next `number` rows as supervised samples."""
        return [self.dataset.sample(index, prompt) for index, prompt in self._take(number)]

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "seed": self.seed,
            "drawn": list(self._drawn),
            "rows": [share.rows for share in self.dataset.shares],
            "fingerprint": self.dataset.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when data, weights or seed are not those of the saved stream."""
        now = self.state_dict()
        for key in ("seed", "rows", "fingerprint"):
            if state[key] != now[key]:
                raise UserError(
                    f"{self.dataset.path}: cannot resume, {key} was {state[key]!r} when the checkpoint was written "
                    f"and is {now[key]!r} now"
                )
        while self._ahead:
            self._ahead.pop()[1].cancel()
        self._drawn, self._planned = list(state["drawn"]), list(state["drawn"])

    def _take(self, number: int) -> list[tuple[int, Prompt]]:
        taken: list[tuple[int, Prompt]] = []
        fruitless = 0
        while len(taken) < number:
            index, found = self._draw()
            prompt = self.dataset.accept(index, found)
            if prompt is not None:
                taken.append((index, prompt))
            fruitless = 0 if prompt is not None else fruitless + 1
            if fruitless > 2 * len(self.dataset):
                raise UserError(f"{self.dataset.path}: no usable row is left; {self.dataset.rejected} were rejected")
        return taken

    def _draw(self) -> tuple[int, Prompt | UserError]:
        if self._readers is None:
            index = self._advance(self._drawn)
            return index, self.dataset.load(index)
        self._read_ahead()
        index, future = self._ahead.popleft()
        self._advance(self._drawn)  # the same rule from the same place: the same row
        found = future.result()
        self._read_ahead()  # while the caller is busy with this one
        return index, found

    def _read_ahead(self) -> None:
        while self._readers is not None and len(self._ahead) < self.prefetch:
            index = self._advance(self._planned)
            self._ahead.append((index, self._readers.submit(self.dataset.load, index)))

    def _advance(self, drawn: list[int]) -> int:
        """Count one more draw from the share that lags most behind its weight. → the row it gives."""
        shares, draws = self.dataset.shares, sum(drawn) + 1
        chosen = max(range(len(shares)), key=lambda place: shares[place].weight * draws - drawn[place])
        epoch, place = divmod(drawn[chosen], shares[chosen].rows)
        drawn[chosen] += 1
        return shares[chosen].start + int(self._order(chosen, epoch)[place])

    def _order(self, share: int, epoch: int) -> np.ndarray:
        if (share, epoch) not in self._orders:
            rows = self.dataset.shares[share].rows
            self._orders[share, epoch] = np.random.default_rng([self.seed, epoch, share]).permutation(rows)
            if len(self._orders) > 2 * len(self.dataset.shares):  # this epoch's, and the next one's for reading ahead
                self._orders.popitem(last=False)
        return self._orders[share, epoch]
