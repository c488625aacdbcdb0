"""What makes a row good, told without decoding a picture; and what becomes of the bad ones.

Checked are form, keys, chat, pictures and videos (present, inside the allowed folders), the answer, and of supervised rows the response: that it
can be imitated and, together with its prompt, fits a micro-batch.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from eureka_megatron.data.chat import located, read_chat, sound_text
from eureka_megatron.data.pictures import locate
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.sources import Lines, Table, as_chat
from eureka_megatron.data.videos import check_video
from eureka_megatron.errors import UserError

SHOWN = 5  # bad rows that an error names
# Valid in JSON, yet some readers end a line there; and halves of surrogate pairs, which UTF-8 does not have.
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
AnswerCheck = Callable[[str], str | None]


@dataclass(frozen=True)
class Row:
    """Where a good row lies. Example: Row(id="train-00007", answer="3", number=8, place=2311)."""

    id: str
    answer: str
    number: int  # from 1: line of a file, row of a table
    place: int  # of the source: byte at which the line begins, row from 0


class RowOptions(TypedDict, total=False):
    """`RowRules` as keywords of `load_dataset`, without the folders."""

    check_answer: AnswerCheck | None
    response_key: str | None
    response_optional: bool
    max_tokens: int | None


@dataclass(frozen=True)
class RowRules:
    """What is asked of a row.

    Attributes:
        folders: where its pictures and videos may lie.
        check_answer: returns why an answer can never be judged, or None.
        response_key: the key of the text to imitate; None: there is none.
        response_optional: whether a row may be without it.
        max_tokens: of prompt and response together; None: as many as there are.
    """

    folders: Sequence[Path] = ()
    check_answer: AnswerCheck | None = None
    response_key: str | None = None
    response_optional: bool = False
    max_tokens: int | None = None

    def response(self, row: dict[str, Any]) -> str | None:
        """The text to imitate, of a row that has one."""
        return None if self.response_key is None else row.get(self.response_key)

    def check_length(self, prompt_tokens: int, response_tokens: int) -> None:
        """Raises UserError: together they are more than `max_tokens`."""
        if self.max_tokens is not None and prompt_tokens + response_tokens > self.max_tokens:
            raise UserError(
                f"prompt ({prompt_tokens} tokens) and response ({response_tokens}) do not fit the {self.max_tokens} tokens that "
                "training.max_tokens_per_micro_batch allows"
            )


class Rejects:
    """The bad rows of one source: counted, the first told, all written to a JSONL file where one is named. None is kept in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.count = path, 0
        self.first: list[str] = []

    def add(self, origin: str, reason: Exception, record: dict[str, str]) -> None:
        """Count a row that is left out and append it, as its source records it."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(reason))
        if self.path is not None:
            line = json.dumps({"origin": origin, "reason": str(reason)} | record, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")


def good_rows(source: Lines | Table, processor: Processor, rules: RowRules, rejects: Rejects) -> list[Row]:
    """The rows that nothing is wrong with; the others go to `rejects`."""
    rows: list[Row] = []
    for number, place, raw in source.scan():
        origin = f"{source.path}:{number}"
        try:
            with located(origin):
                row = as_chat(source.parse(raw))
                _check_row(row, processor, rules)
                rows.append(Row(str(row.get("id", number)), str(row["answer"]), number, place))
        except UserError as error:
            rejects.add(origin, error, source.record(raw))
    return rows


def _check_row(row: dict[str, Any], processor: Processor, rules: RowRules) -> None:
    wanted = ("message", "answer", None if rules.response_optional else rules.response_key)
    missing = [key for key in wanted if key is not None and row.get(key) is None]
    if missing:
        raise UserError(f"key {missing[0]!r} is missing; found {', '.join(sorted(row)) or 'no keys'}")
    for visual in read_chat(row["message"]).visuals:
        if visual.kind == "image":
            locate(visual.addresses[0], rules.folders)
        else:
            check_video(visual, rules.folders)
    for key in filter(None, ("id", "answer", rules.response_key)):
        if isinstance(row.get(key), str):
            sound_text(row[key], repr(key))
    answer = read_answer(row["answer"])
    if rules.check_answer is not None and (reason := rules.check_answer(answer)):
        raise UserError(f"'answer' {answer[:80]!r} cannot be judged: {reason}")
    if (response := rules.response(row)) is not None:
        if not (isinstance(response, str) and response.strip()):
            raise UserError(f"{rules.response_key!r} must be a non-empty string, found {response!r:.80}")
        _check_fit(row["message"], processor.response_text(response), processor, rules)
    if processor.outgrown:  # rare, and only the tokens themselves tell
        processor.length(row["message"], folders=rules.folders)


def _check_fit(message: Any, response: str, processor: Processor, rules: RowRules) -> None:
    """The cheapest look that settles it: a longer prompt is a bad row of its own, and a token is a byte (of NFC) at least."""
    room = math.inf if rules.max_tokens is None else rules.max_tokens - processor.max_prompt_tokens
    if not processor.outgrown and len(unicodedata.normalize("NFC", response).encode()) < room:
        return
    tokens = len(processor.encode_response(response))
    if tokens > room:
        rules.check_length(processor.length(message, folders=rules.folders), tokens)


def read_answer(answer: Any) -> str:
    """The text of an answer.

    Raises:
        UserError: it is neither a string with something in it nor a number; NaN and the infinities, which JSON does not have but Python
            reads, and which tables put where nothing is, are none.
    """
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not number and not (isinstance(answer, str) and answer.strip()):
        raise UserError(f"'answer' must be a non-empty string or a number, found {answer!r:.80}")
    return str(answer)
