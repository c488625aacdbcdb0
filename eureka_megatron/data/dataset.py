"""MM-EUREKA's JSONL: one row a line, `{"id", "message", "answer"}` and, for supervised training, a response.

Loading checks every line (JSON, keys, chat, pictures present and inside the allowed folders, answers that can be judged) but
decodes nothing. Rows stay in the file and are read again when asked for; what stays in memory is where each one lies and a
bounded cache of prompts, so the host's memory does not grow with the data. What only decoding shows (corrupt pictures,
prompts that are too long) comes up when the row is used, and `on_bad_row` then decides as it does at loading.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eureka_megatron.data.chat import located, read_chat
from eureka_megatron.data.pictures import locate
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.videos import check_video
from eureka_megatron.errors import UserError
from eureka_megatron.types import Prompt, Sample

CACHE_BYTES = 256 * 1024 * 1024
AnswerCheck = Callable[[str], str | None]


@dataclass(frozen=True)
class Row:
    """Where a good row lies. Example: Row(id="train-00007", answer="3", line=8, start=2311)."""

    id: str
    answer: str
    line: int  # from 1
    start: int  # byte of the file at which the line begins


class Dataset:
    """The good rows of a file, in order; `dataset[i]` is a `Prompt`. Made by `load_dataset`.

    Attributes:
        rows: where they lie.
        rejected: rows left out so far (`on_bad_row="skip"`), at loading or when used.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[Row],
        processor: Processor,
        *,
        folders: Sequence[Path] = (),
        on_bad_row: Literal["error", "skip"] = "error",
        rejected_path: Path | None = None,
        response_key: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.path, self.rows, self.processor = path, tuple(rows), processor
        self.folders, self.on_bad_row, self.response_key = tuple(folders), on_bad_row, response_key
        self.rejected = 0
        self._rejected_path, self._rejected_rows = rejected_path, set[int]()
        self._cache: OrderedDict[int, Prompt] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        """Raises UserError, with file and line, when the row turns out to be bad."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        row = self.rows[index]
        prompt = self.processor.prompt(
            self.raw(index)["message"], id=row.id, answer=row.answer, folders=self.folders, origin=self.origin(index)
        )
        self._remember(index, prompt)
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def get(self, index: int) -> Prompt | None:
        """The prompt; None for a bad row when those are skipped (counted and written down once)."""
        if index in self._rejected_rows:
            return None
        try:
            return self[index]
        except UserError as error:
            if self.on_bad_row == "error":
                raise
            self._rejected_rows.add(index)
            self.reject(self.origin(index), error, self._line(index))
            return None

    def sample(self, index: int) -> Sample | None:
        """The row as a supervised sample; None as in `get`."""
        prompt = self.get(index)
        return None if prompt is None else self.processor.sft_sample(prompt, self.response(index))

    def response(self, index: int) -> str:
        """The text to imitate, of the key named at loading."""
        if self.response_key is None:
            raise ValueError("load_dataset(response_key=…) names the key that holds the response")
        return self.raw(index)[self.response_key]

    def raw(self, index: int) -> dict[str, Any]:
        """The row as it stands in the file, all keys."""
        with located(self.origin(index)):
            return _parse(self._line(index))

    def origin(self, index: int) -> str:
        """ "file:line"."""
        return f"{self.path}:{self.rows[index].line}"

    def fingerprint(self) -> str:
        """Changes when rows are added, dropped, renamed, reordered or get another answer; part of a resumed stream."""
        content = json.dumps([[row.id, row.answer] for row in self.rows]).encode()
        return blake2b(content, digest_size=8).hexdigest()

    def reject(self, origin: str, reason: Exception, line: bytes) -> None:
        """Count a row that is left out and append it to rejected.jsonl."""
        self.rejected += 1
        if self._rejected_path is not None:
            record = {"origin": origin, "reason": str(reason), "row": line.decode(errors="replace").rstrip("\n")}
            with self._rejected_path.open("a") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _line(self, index: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.rows[index].start)
            return file.readline()

    def _remember(self, index: int, prompt: Prompt) -> None:
        self._cache[index] = prompt
        self._cached_bytes += _bytes(prompt)
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= _bytes(self._cache.popitem(last=False)[1])


def load_dataset(
    path: Path | str,
    processor: Processor,
    *,
    media: Sequence[Path | str] = (),
    on_bad_row: Literal["error", "skip"] = "error",
    rejected: Path | str | None = None,
    check_answer: AnswerCheck | None = None,
    response_key: str | None = None,
) -> Dataset:
    """Read and check a JSONL file.

    Args:
        media: folders pictures may come from besides the file's own.
        on_bad_row: "error" raises, naming up to five bad rows; "skip" counts them and writes them to `rejected`.
        rejected: a JSONL file, begun anew, of `{"origin", "reason", "row"}`; None writes none.
        check_answer: returns why an answer can never be judged, or None; without it answers need only be non-empty.
        response_key: a further key that every row must have, with the text to imitate.

    Raises:
        UserError: the file is missing or holds no good row; or bad rows, as `file:line: reason`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    folders = (path.parent, *map(Path, media))
    rejected_path = None if rejected is None else Path(rejected)
    if rejected_path is not None:
        rejected_path.parent.mkdir(parents=True, exist_ok=True)
        rejected_path.write_text("")
    rows: list[Row] = []
    bad: list[tuple[str, UserError, bytes]] = []
    for number, start, line in _lines(path):
        origin = f"{path}:{number}"
        try:
            with located(origin):
                rows.append(_check_row(line, number, start, folders, check_answer, response_key))
        except UserError as error:
            bad.append((origin, error, line))
    if bad and on_bad_row == "error":
        more = f"\n… {len(bad)} bad rows in all" if len(bad) > 5 else ""
        raise UserError(
            "\n".join(str(error) for _, error, _ in bad[:5]) + f"{more}\n(data.on_bad_row=skip leaves bad rows out)"
        )
    if not rows:
        raise UserError(f"{path} holds no usable row" + (f"; the first is bad: {bad[0][1]}" if bad else ""))
    dataset = Dataset(
        path,
        rows,
        processor,
        folders=folders,
        on_bad_row=on_bad_row,
        rejected_path=rejected_path,
        response_key=response_key,
    )
    for origin, error, line in bad:
        dataset.reject(origin, error, line)
    return dataset


def _check_row(
    line: bytes,
    number: int,
    start: int,
    folders: Sequence[Path],
    check_answer: AnswerCheck | None,
    response_key: str | None,
) -> Row:
    row = _parse(line)
    missing = [key for key in ("message", "answer", response_key) if key is not None and key not in row]
    if missing:
        raise UserError(f"key {missing[0]!r} is missing; found {', '.join(sorted(row)) or 'no keys'}")
    for visual in read_chat(row["message"]).visuals:
        if visual.kind == "image":
            locate(visual.addresses[0], folders)
        else:
            check_video(visual, folders)
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"'answer' must be a non-empty string or a number, found {answer!r}")
    if check_answer is not None and (reason := check_answer(str(answer))):
        raise UserError(f"'answer' {str(answer)[:80]!r} cannot be judged: {reason}")
    if response_key is not None and not (isinstance(row[response_key], str) and row[response_key].strip()):
        raise UserError(f"{response_key!r} must be a non-empty string, found {row[response_key]!r:.80}")
    return Row(id=str(row.get("id", number)), answer=str(answer), line=number, start=start)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start} of the line)") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, found {type(row).__name__}")
    return row


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, first byte, line) of every line that is not blank."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, start, line
            start += len(line)


def _bytes(prompt: Prompt) -> int:
    pixels = 0
    for picture in prompt.pictures:
        pixels += 3 * picture.image.width * picture.image.height if picture.image is not None else 0
        pixels += picture.frames.nbytes if picture.frames is not None else 0
    patches = sum(picture.patches_PD.nbytes for picture in prompt.pictures)
    return patches + pixels + 4 * prompt.tokens_S.nbytes + 2 * len(prompt.text)


class PromptStream:
    """Endless epochs over a dataset, each in its own order; where it stands is a small dictionary.

    The order of epoch e depends on seed and e alone, so a resumed stream gives what an uninterrupted one would have given.
    """

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch, self.position = 0, 0

    def next(self, number: int) -> list[Prompt]:
        """The next `number` prompts; bad rows are passed over when the dataset skips them."""
        return self._take(number, self.dataset.get)

    def next_samples(self, number: int) -> list[Sample]:
        """The next `number` rows as supervised samples."""
        return self._take(number, self.dataset.sample)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "rows": len(self.dataset),
            "fingerprint": self.dataset.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when data or seed are not those of the saved stream."""
        now = self.state_dict()
        for key in ("seed", "rows", "fingerprint"):
            if state[key] != now[key]:
                raise UserError(
                    f"{self.dataset.path}: cannot resume, {key} was {state[key]!r} when the checkpoint was written "
                    f"and is {now[key]!r} now"
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _take(self, number: int, read: Callable[[int], Any]) -> list[Any]:
        taken: list[Any] = []
        fruitless = 0
        while len(taken) < number:
            item = read(self._next_index())
            if item is not None:
                taken.append(item)
            fruitless = 0 if item is not None else fruitless + 1
            if fruitless > 2 * len(self.dataset):
                raise UserError(f"{self.dataset.path}: no usable row is left; {self.dataset.rejected} were rejected")
        return taken

    def _next_index(self) -> int:
        if self.position == len(self.dataset):
            self.epoch, self.position = self.epoch + 1, 0
        order = self._order(self.epoch)
        index = int(order[self.position])
        self.position += 1
        return index

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_ordered_epoch", None) != epoch:
            self._ordered_epoch = epoch
            self._epoch_order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return self._epoch_order
