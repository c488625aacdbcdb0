"""A made-up visual task: count coloured circles and squares. Pictures, questions and a careless teacher from one seed.

Three levels of question about an 84×84 picture with at most nine shapes:

1. "How many circles are there in the picture?"
2. "How many red circles are in the picture?"
3. "How many more circles than squares are there?"

The shapes sit in a 3×3 grid of 28-pixel cells (one vision embedding each), moved and sized at random within their
cell. Answers are drawn first, evenly over 0–4, and the scene is built to fit, so guessing scores 0.2 at every level.
No scene of the test set occurs in the training set, whatever its offsets.

`response` is what a *careless* teacher says. It thinks in a map of the picture, row by row, capitals for circles and small letters for
squares, and keeps a tally behind each shape that matters: `<think>R1 . b / . . G2 / r . .</think><answer>\\boxed{2}</answer>`. It looks well,
but in a share `noise` of the training rows it then answers with a number drawn at random. Imitation therefore ends at 1 − 0.8·noise at best;
what lies above that, only a reward can teach.

Why so (measured, tiny model from scratch, 16 samples a step): answers alone teach a tower to see only after many hundred steps, and reinforcement
learning from there goes nowhere; a map gives every vision embedding a target of its own and is right in 97 % of its tokens after 400 steps.
The questions of all levels have equally many tokens, so that the map's cells stand at fixed distances from the picture's.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 84  # pixels of a picture
CELL = 28  # pixels of a cell: one merge unit (2×2 patches of 14) of the vision tower
ROW = SIDE // CELL  # cells in a row
CELLS = ROW**2
LARGEST = 4  # answers are 0 … 4
GREYS = (240, 255)  # background brightness
JITTER = 1  # pixels a shape may lie off the middle of its cell
RADII = (9, 11)  # pixels
SHAPES = ("circle", "square")
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 91, 180)}

Thing = tuple[str, str]  # (colour, shape)
LETTERS: dict[Thing, str] = {
    (colour, shape): colour[0].upper() if shape == "circle" else colour[0] for colour in COLOURS for shape in SHAPES
}


@dataclass(frozen=True)
class Placed:
    """One shape. Example: Placed(cell=4, colour="red", shape="circle", dx=-2, dy=1, radius=9)."""

    cell: int  # 0 … 8 in reading order
    colour: str
    shape: str
    dx: int  # pixels from the middle of the cell
    dy: int
    radius: int  # pixels; half the side of a square


@dataclass(frozen=True)
class Example:
    """One question.

    Example: level 3, "How many more circles than squares are there?", answer 2, values {("red", "circle"): 1, ("blue", "square"): −1, …}.
    """

    level: int
    question: str
    answer: int
    values: Mapping[Thing, int]  # what each kind of shape adds to the answer; kinds that do not matter are absent
    things: tuple[Placed, ...]
    grey: int  # background brightness

    @property
    def scene(self) -> frozenset[tuple[int, str, str]]:
        """What makes two pictures the same task: which shape in which cell, whatever the offsets."""
        return frozenset((thing.cell, thing.colour, thing.shape) for thing in self.things)


@dataclass(frozen=True)
class CountingPaths:
    train: Path
    test: Path


def write_counting(
    directory: Path | str, *, train: int = 6000, test: int = 200, seed: int = 0, noise: float = 0.0
) -> CountingPaths:
    """Write `train.jsonl`, `test.jsonl` (MM-EUREKA rows) and `images/*.png` into `directory`.

    Equal arguments give equal bytes. Each JSONL appears only after all its pictures are there. Rows have the keys id, message, answer, and response: the
    teacher's text, wrong in a share `noise` of the training rows and never in the test rows.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise} must lie in [0, 1]")
    directory = Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    stream = examples(seed)
    # Test rows come first, so they do not depend on the number of training rows.
    tested = list(islice(stream, test))
    scenes = {example.scene for example in tested}
    unseen = (example for example in stream if example.scene not in scenes)
    drawn = {"test": tested, "train": list(islice(unseen, train))}
    paths = {split: directory / f"{split}.jsonl" for split in ("test", "train")}
    for split, chosen in drawn.items():
        teacher = random.Random(f"{seed}-{split}-teacher")
        lines = []
        for index, example in enumerate(chosen):
            picture = f"images/{split}-{index:05d}.png"
            draw(example).save(directory / picture, compress_level=1)
            text = response(example, teacher, noise if split == "train" else 0.0)
            lines.append(json.dumps(_row(f"{split}-{index:05d}", picture, example, text), ensure_ascii=False) + "\n")
        partial = paths[split].with_suffix(".jsonl.partial")
        partial.write_text("".join(lines))
        os.replace(partial, paths[split])
    return CountingPaths(**paths)


def examples(seed: int = 0) -> Iterator[Example]:
    """An endless stream of examples, levels 1, 2, 3 in turn."""
    source = random.Random(seed)
    for level in cycle((1, 2, 3)):
        yield _example(level, source)


def draw(example: Example) -> Image.Image:
    """The RGB picture, 84×84."""
    picture = Image.new("RGB", (SIDE, SIDE), (example.grey,) * 3)
    pen = ImageDraw.Draw(picture)
    for thing in example.things:
        row, column = divmod(thing.cell, ROW)
        x, y = column * CELL + CELL // 2 + thing.dx, row * CELL + CELL // 2 + thing.dy
        box = (x - thing.radius, y - thing.radius, x + thing.radius, y + thing.radius)
        (pen.ellipse if thing.shape == "circle" else pen.rectangle)(box, fill=COLOURS[thing.colour])
    return picture


def response(example: Example, teacher: random.Random, noise: float = 0.0) -> str:
    """The teacher's text, for instance `<think>R1 . b / . . G2 / r . .</think><answer>\\boxed{2}</answer>`.

    The map and its tally are always right; with probability `noise` the answer is drawn at random instead.
    """
    answer = example.answer
    if teacher.random() < noise:
        answer = teacher.randint(0, LARGEST)
    return f"<think>{tallied_map(example)}</think><answer>\\boxed{{{answer}}}</answer>"


def tallied_map(example: Example) -> str:
    """The picture as text, with the running total behind each shape that matters. Example: "R1 . b / . . G2 / r . ."."""
    by_cell = {thing.cell: thing for thing in example.things}
    words, total = [], 0
    for cell in range(CELLS):
        if cell and cell % ROW == 0:
            words.append("/")
        thing = by_cell.get(cell)
        if thing is None:
            words.append(".")
            continue
        value = example.values.get((thing.colour, thing.shape), 0)
        total += value
        words.append(LETTERS[thing.colour, thing.shape] + (str(total) if value else ""))
    return " ".join(words)


def _example(level: int, source: random.Random) -> Example:
    answer = source.randint(0, LARGEST)
    shape = source.choice(SHAPES)
    colours = tuple(COLOURS)
    if level == 1:
        others = [(source.choice(colours), _other(shape)) for _ in range(source.randint(0, LARGEST))]
        things = [(source.choice(colours), shape) for _ in range(answer)] + others
        values = {(colour, shape): 1 for colour in colours}
        question = f"How many {shape}s are there in the picture?"
    elif level == 2:
        colour = source.choice(colours)
        rest = [(c, s) for c in colours for s in SHAPES if (c, s) != (colour, shape)]
        things = [(colour, shape)] * answer + source.choices(rest, k=source.randint(0, LARGEST))
        values = {(colour, shape): 1}
        question = f"How many {colour} {shape}s are in the picture?"
    else:
        fewer = source.randint(0, min(LARGEST, (CELLS - answer) // 2))
        things = [(source.choice(colours), "circle") for _ in range(fewer + answer)]
        things += [(source.choice(colours), "square") for _ in range(fewer)]
        values = {(colour, kind): sign for colour in colours for kind, sign in (("circle", 1), ("square", -1))}
        question = "How many more circles than squares are there?"
    return Example(level, question, answer, values, _place(things, source), source.randint(*GREYS))


def _place(things: list[Thing], source: random.Random) -> tuple[Placed, ...]:
    cells = source.sample(range(CELLS), len(things))
    return tuple(
        Placed(
            cell,
            colour,
            shape,
            source.randint(-JITTER, JITTER),
            source.randint(-JITTER, JITTER),
            source.randint(*RADII),
        )
        for cell, (colour, shape) in zip(cells, things, strict=True)
    )


def _other(shape: str) -> str:
    return SHAPES[1 - SHAPES.index(shape)]


def _row(name: str, picture: str, example: Example, text: str) -> dict[str, str]:
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": example.question}],
        }
    ]
    return {
        "id": name,
        "message": json.dumps(message, ensure_ascii=False),
        "answer": str(example.answer),
        "response": text,
        "level": str(example.level),
    }
