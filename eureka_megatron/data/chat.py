"""MM-EUREKA's `message` field: a chat, as a JSON string or a list, read into one plain form.

Understood: `content` as a string or a list of parts; text parts; pictures written `{"type": "image", "image": …}` or
`{"type": "image_url", "image_url": {"url": …}}`; videos written `{"type": "video", "video": …}` with the address of a file or a list of
addresses of pictures, one a frame, and the options of qwen-vl-utils: fps, nframes, min_pixels, max_pixels. What an address means is the
business of `pictures` and `videos`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from eureka_megatron.errors import UserError, nearest

ROLES = ("system", "user", "assistant")
KINDS = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}  # a part's type or key → what it shows
VIDEO_KEYS = ("type", "video", "video_url", "fps", "sample_fps", "nframes", "min_pixels", "max_pixels")

# In a message: what UTF-8 does not have, what ends a line for some, what moves a terminal's cursor.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")

Address = str | bytes  # of a picture or video; bytes are the file itself, as tables hold it


@dataclass(frozen=True)
class Visual:
    """A picture or video of a chat, by its address; nothing of it is read yet.

    Example: Visual("image", ("images/7.png",)); Visual("video", ("clips/7.mp4",), fps=1.0) takes one frame a second of a file;
    Visual("video", ("7/0.png", "7/1.png"), listed=True, fps=2.0) are frames half a second apart.
    """

    kind: Literal["image", "video"]
    addresses: tuple[Address, ...]  # one; of a listed video one a frame
    listed: bool = False  # a video given as a list of frames
    fps: float | None = None  # frames a second: to take from a file, or that the list was taken with
    frames: int | None = None  # how many to take from a file, evenly spread
    min_pixels: int | None = None  # of a picture or frame, after resizing
    max_pixels: int | None = None


@dataclass(frozen=True)
class Chat:
    """A chat and its pictures and videos, in reading order.

    Example: turns [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
    visuals (Visual("image", ("images/7.png",)),).
    """

    turns: list[dict[str, Any]]  # what a chat template takes; a picture or video part holds nothing but its type
    visuals: tuple[Visual, ...]


def read_chat(message: Any, *, system_prompt: str | None = None) -> Chat:
    """Check and normalise one `message`.

    Args:
        system_prompt: takes the place of the row's own system turn; None keeps it.

    Raises:
        UserError: not a chat of sound text that ends with a user's turn; says what was found. The caller adds file and line.
    """
    if isinstance(message, str):
        try:
            message = json.loads(message)
        except json.JSONDecodeError as error:
            raise UserError(f"'message' is a string but not JSON ({error.msg}, character {error.pos})") from None
    if not isinstance(message, list) or not message:
        raise UserError(f"'message' must be a non-empty list of turns, found {_kind(message)}")
    visuals: list[Visual] = []
    turns = [_read_turn(turn, number, visuals) for number, turn in enumerate(message, start=1)]
    turns = map_texts(turns, lambda text: sound_text(text, "text in 'message'"))
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise UserError("'message' has a system turn that is not the first")
    if turns[-1]["role"] != "user":
        raise UserError(f"'message' must end with a user's turn, found {turns[-1]['role']!r}")
    if system_prompt is not None:
        turns = [turn for turn in turns if turn["role"] != "system"]
        turns.insert(0, {"role": "system", "content": system_prompt})
    return Chat(turns, tuple(visuals))


def map_texts(turns: list[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The turns of a `Chat` with every text, whether all of a turn or a part of one, put through `change`, in reading order."""

    def changed(content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        if isinstance(content, str):
            return change(content)
        return [part | {"text": change(part["text"])} if part["type"] == "text" else part for part in content]

    return [turn | {"content": changed(turn["content"])} for turn in turns]


def sound_text(text: str, what: str) -> str:
    """The text. JSON can spell what no file, tokenizer or service takes.

    Raises:
        UserError: it holds half a surrogate pair.
    """
    if broken := _HALF_A_PAIR.search(text):
        raise UserError(f"{what} holds half a surrogate pair, {broken[0]!r}, which is no character")
    return text


def _read_turn(turn: Any, number: int, visuals: list[Visual]) -> dict[str, Any]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise UserError(f"turn {number} of 'message' needs the keys role and content, found {_kind(turn)}")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise UserError(f"turn {number} of 'message' has role {role!r}; valid: {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise UserError(f"content of turn {number} must be a string or a list of parts, found {_kind(content)}")
    return {"role": role, "content": [_read_part(part, number, visuals) for part in content]}


def _read_part(part: Any, number: int, visuals: list[Visual]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise UserError(f"a part of turn {number} must be an object, found {_kind(part)}")
    part = {key: value for key, value in part.items() if value is not None}  # tables fill in what a part does not have
    kind = part.get("type") or next((key for key in ("text", *KINDS) if key in part), None)
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in KINDS:
        raise UserError(
            f"a part of turn {number} is neither text nor picture nor video: type {kind!r}, keys {sorted(part)}"
        )
    visual = (_read_picture if KINDS[kind] == "image" else _read_video)(part, f"of turn {number}")
    if visual.min_pixels and visual.max_pixels and visual.min_pixels > visual.max_pixels:
        raise UserError(
            f"a {visual.kind} of turn {number} has min_pixels={visual.min_pixels} above max_pixels={visual.max_pixels}"
        )
    visuals.append(visual)
    return {"type": visual.kind}


def _read_picture(part: dict[str, Any], where: str) -> Visual:
    address = _address(part, "image")
    if not isinstance(address, Address) or not address:
        raise UserError(f"a picture {where} has no address, found {_kind(address)}")
    pixels = _pixels(part, f"a picture {where}")
    return Visual("image", (address,), min_pixels=pixels["min_pixels"], max_pixels=pixels["max_pixels"])


def _read_video(part: dict[str, Any], where: str) -> Visual:
    where = f"a video {where}"
    # An option that is not understood would change which frames are shown: it is not passed over.
    if unknown := [key for key in part if key not in VIDEO_KEYS]:
        raise UserError(f"{where} has the key {unknown[0]!r}, which is not read{nearest(unknown[0], VIDEO_KEYS)}")
    address = _address(part, "video")
    listed = isinstance(address, list)
    addresses = tuple(map(_plain, address)) if listed else (address,)
    if not addresses or not all(isinstance(one, Address) and one for one in addresses):
        raise UserError(f"{where} needs the address of a file or of each frame, found {_kind(address)}")
    fps = _number(part, "sample_fps" if listed and "sample_fps" in part else "fps", where)
    frames = _whole(part, "nframes", where)
    if listed and frames not in (None, len(addresses)):
        raise UserError(f"{where} has nframes={frames} and a list of {len(addresses)} frames, which is taken whole")
    if not listed and fps is not None and frames is not None:
        raise UserError(f"{where} has both fps and nframes; give one")
    return Visual("video", addresses, listed, fps, None if listed else frames, **_pixels(part, where))


def _address(part: dict[str, Any], key: str) -> Any:
    return _plain(part.get(key, part.get(f"{key}_url")))


def _plain(value: Any) -> Any:
    """An address out of `{"url"}`, or of `{"bytes", "path"}` as `datasets` stores pictures."""
    if isinstance(value, dict):
        return value.get("url") or value.get("bytes") or value.get("path")
    return value


def _pixels(part: dict[str, Any], where: str) -> dict[str, int | None]:
    return {name: _whole(part, name, where) for name in ("min_pixels", "max_pixels")}


def _whole(part: dict[str, Any], key: str, where: str) -> int | None:
    value = _number(part, key, where)
    if value is not None and value != int(value):
        raise UserError(f"{where}: {key} must be a whole number, found {part[key]!r}")
    return None if value is None else int(value)


def _number(part: dict[str, Any], key: str, where: str) -> float | None:
    value = part.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with keys {sorted(map(str, value))}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Whatever leaves this block is a UserError whose message begins with `origin` ("file:line") and can be written anywhere.

    Decoders and tokenizers raise nearly anything on broken data; here, and nowhere else, that becomes an error of the row.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, UserError)
        message = str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not message.startswith(origin):
            message = f"{origin}: {message}"
        message = _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], message)
        if known and message == str(error):
            raise
        raise (type(error) if known else UserError)(message) from error
