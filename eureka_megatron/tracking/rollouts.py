"""What was sampled, kept to be looked at: some groups of some steps, as `tracking.rollouts_every` and `rollouts_per_step` say.

Files in the run folder:

    rollouts/step_000010.parquet    one row a response, columns as in SCHEMA
    rollouts/pictures/KEY.png       a picture, or a video's middle frame, once however often it is shown
    rollouts/replaced/              of steps that a resumed run has done again

Groups are those the step trained on, the oldest first: what the online filter dropped is not among them. A step has the number it has in
metrics.jsonl. A file is there whole or not at all.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from eureka_megatron.types import Batch, BeganWith, Group, Picture

FOLDER = "rollouts"
PREFIX = "step_"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),  # place among the step's groups
        ("response", pa.int32()),  # place within the group
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),  # chat template applied, one placeholder a picture
        ("answer", pa.string()),
        ("pictures", pa.list_(pa.string())),  # keys
        ("picture_tokens", pa.list_(pa.int32())),  # placeholder tokens of each picture in the expanded prompt
        ("prompt_tokens", pa.int32()),  # with these
        ("text", pa.string()),  # decoded without special tokens
        ("tokens", pa.list_(pa.int32())),
        ("pieces", pa.list_(pa.string())),  # the text of each token; a character of several tokens stands at its last
        ("logprobs", pa.list_(pa.float32())),  # of each token: log μ, the engine's
        # of each token, by the weights that the step began with: log π and, in nats, the entropy it was drawn with; null: not computed
        ("trainer_logprobs", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
        # of every token, before what the trainer adds by token (KL in the reward, discount)
        ("advantage", pa.float32()),
        ("rewards", pa.map_(pa.string(), pa.float64())),  # every part, and "total"
        ("finish_reason", pa.string()),
        ("weight_version", pa.int32()),
    ]
)

Decode = Callable[[list[int]], str]


def store(
    folder: Path, step: int, groups: Sequence[Group], batch: Batch, decode: Decode, trained: Mapping[int, BeganWith]
) -> None:
    """Write the groups, whose responses are the first samples of the batch, in order.

    Args:
        decode: tokens → text, special tokens included.
        trained: what the trainer thinks of a sample, by place in the batch; of those that are known.

    Raises:
        OSError: the disk does not take them; the step's file then is not there.
    """
    rows = list(rollout_rows(step, groups, batch, decode, trained))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
    for picture in {picture.key: picture for group in groups for picture in group.prompt.pictures}.values():
        path = folder / FOLDER / "pictures" / f"{picture.key}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, partial(still(picture).save, format="PNG"))
    path = step_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, lambda place: place.write_bytes(buffer.getvalue()))


def rollout_rows(
    step: int, groups: Sequence[Group], batch: Batch, decode: Decode, trained: Mapping[int, BeganWith]
) -> Iterator[dict[str, Any]]:
    """The rows of a step's file."""
    texts: dict[int, str] = {}
    place = 0
    for number, group in enumerate(groups):
        prompt = group.prompt
        shown = {
            "prompt_id": prompt.id,
            "prompt": _valid(prompt.text),
            "answer": _valid(prompt.answer),
            "pictures": [picture.key for picture in prompt.pictures],
            "picture_tokens": [picture.units for picture in prompt.pictures],
            "prompt_tokens": len(prompt.tokens_S),
        }
        for index, rollout in enumerate(group.rollouts):
            tokens, known = rollout.tokens_R.tolist(), trained.get(place)
            yield {
                "step": step,
                "group": number,
                "response": index,
                **shown,
                "text": _valid(rollout.text),
                "tokens": tokens,
                "pieces": pieces(tokens, decode, texts),
                "logprobs": rollout.logprobs_R,
                "trainer_logprobs": None if known is None else known.logprobs_S[-len(tokens) :],
                "entropy": None if known is None or known.entropy_S is None else known.entropy_S[-len(tokens) :],
                "advantage": float(batch.samples[place].advantages_S[-1]),
                "rewards": list(rollout.rewards.items()),
                "finish_reason": rollout.finish_reason,
                "weight_version": rollout.weight_version,
            }
            place += 1


def pieces(tokens: Sequence[int], decode: Decode, texts: dict[int, str]) -> list[str]:
    """The text of each token, of tokens that may be parts of a character.

    Such tokens wait for the one that completes it, and are "" themselves. texts: of tokens that were met before.
    Example: tokens of "4", the two halves of "√" and "2" give ["4", "", "√", "2"].
    """
    found, waiting = list[str](), list[int]()
    for token in tokens:
        if token not in texts:
            texts[token] = _valid(decode([token]))
        waiting.append(token)
        text = texts[token] if len(waiting) == 1 else _valid(decode(waiting))
        if text.endswith("\ufffd") and len(waiting) < 4:  # no character has more than four bytes
            found.append("")
            continue
        found.append(text)
        waiting = []
    if waiting:
        found[-1] = _valid(decode(waiting))
    return found


def _valid(text: str) -> str:
    """Without lone surrogates, which a decoder may leave and no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def still(picture: Picture) -> Image.Image:
    """What stands for a picture on a page: itself, or a video's middle frame."""
    if picture.image is not None:
        return picture.image
    assert picture.frames is not None, "a video has frames"
    return Image.fromarray(picture.frames[len(picture.frames) // 2])


def step_file(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"{PREFIX}{step:06d}.parquet"


def step_files(folder: Path) -> dict[int, Path]:
    """Step → its file, in order."""
    found = (folder / FOLDER).glob(f"{PREFIX}*.parquet")
    numbered = {int(path.stem.removeprefix(PREFIX)): path for path in found if path.stem[len(PREFIX) :].isdigit()}
    return dict(sorted(numbered.items()))


def set_aside(folder: Path, start_step: int) -> None:
    """Move files of steps from `start_step` on, which will be done again, to rollouts/replaced."""
    for step, path in step_files(folder).items():
        if step >= start_step:
            (path.parent / "replaced").mkdir(exist_ok=True)
            path.replace(path.parent / "replaced" / path.name)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """All of it or nothing."""
    unfinished = path.with_suffix(".partial")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
