"""MM-EUREKA's `message` field: a chat, as a JSON string or a list, read into one plain form.

Understood: `content` as a string or a list of parts; text parts; picture parts written `{"type": "image", "image": …}` or
`{"type": "image_url", "image_url": {"url": …}}`. What a picture's address means is the business of `pictures`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eureka_megatron.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """A chat and the addresses of its pictures, in reading order.

    Example: turns [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
    pictures ("images/7.png",).
    """

    turns: list[dict[str, Any]]  # what a chat template takes; a picture part holds nothing but its type
    pictures: tuple[str, ...]


def read_chat(message: Any, *, system_prompt: str | None = None) -> Chat:
    """Check and normalise one `message`.

    Args:
        system_prompt: takes the place of the row's own system turn; None keeps it.

    Raises:
        UserError: not a chat that ends with a user's turn; says what was found. The caller adds file and line.
    """
    if isinstance(message, str):
        try:
            message = json.loads(message)
        except json.JSONDecodeError as error:
            raise UserError(f"'message' is a string but not JSON ({error.msg}, character {error.pos})") from None
    if not isinstance(message, list) or not message:
        raise UserError(f"'message' must be a non-empty list of turns, found {_kind(message)}")
    pictures: list[str] = []
    turns = [_read_turn(turn, number, pictures) for number, turn in enumerate(message, start=1)]
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise UserError("'message' has a system turn that is not the first")
    if turns[-1]["role"] != "user":
        raise UserError(f"'message' must end with a user's turn, found {turns[-1]['role']!r}")
    if system_prompt is not None:
        turns = [turn for turn in turns if turn["role"] != "system"]
        turns.insert(0, {"role": "system", "content": system_prompt})
    return Chat(turns, tuple(pictures))


def _read_turn(turn: Any, number: int, pictures: list[str]) -> dict[str, Any]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise UserError(f"turn {number} of 'message' needs the keys role and content, found {_kind(turn)}")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise UserError(f"turn {number} of 'message' has role {role!r}; valid: {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise UserError(f"content of turn {number} must be a string or a list of parts, found {_kind(content)}")
    return {"role": role, "content": [_read_part(part, number, pictures) for part in content]}


def _read_part(part: Any, number: int, pictures: list[str]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise UserError(f"a part of turn {number} must be an object, found {_kind(part)}")
    kind = part.get("type") or next((key for key in ("text", "image", "image_url", "video") if key in part), None)
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        address = part.get("image", part.get("image_url"))
        if isinstance(address, dict):
            address = address.get("url")
        if not isinstance(address, str) or not address:
            raise UserError(f"a picture of turn {number} has no address, found {_kind(address)}")
        pictures.append(address)
        return {"type": "image"}
    if kind == "video":
        raise UserError(f"turn {number} holds a video; only pictures are read from data files")
    raise UserError(f"a part of turn {number} is neither text nor picture: type {kind!r}, keys {sorted(part)}")


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with keys {sorted(map(str, value))}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


@contextmanager
def located(origin: str) -> Iterator[None]:
    """Put `origin` ("file:line") before the message of a UserError that leaves this block."""
    try:
        yield
    except UserError as error:
        if not origin or str(error).startswith(origin):
            raise
        raise type(error)(f"{origin}: {error}") from error
