"""The made-up task: honest pictures, honest answers, a teacher as wrong as it says, equal seeds giving equal bytes."""

import json
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.counting import (
    COLOURS,
    LARGEST,
    LETTERS,
    draw,
    examples,
    response,
    tallied_map,
    write_counting,
)
from eureka_megatron.demo.forms import build_published


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def things_seen(picture) -> dict[tuple[int, int], tuple[str, str]]:
    """(colour, shapes) in each cell from the pixels alone; a square fills its bounding box."""
    pixels = np.asarray(picture).astype(int)
    seen = {}
    for top in range(0, 84, 28):
        for left in range(0, 84, 28):
            cell = pixels[top : top + 28, left : left + 28]
            for colour, value in COLOURS.items():
                mask = (cell == np.array(value)).all(axis=-1)
                if not mask.any():
                    continue
                ys, xs = np.nonzero(mask)
                box = (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
                seen[top, left] = (colour, "squares" if mask.sum() == box else "circles")
    return seen


def answer_from_pixels(question: str, picture) -> int:
    seen = Counter(things_seen(picture).values())
    words = question.split()
    total = Counter(shape for _, shape in things_seen(picture).values())
    if words[2] == "more":
        return total["circles"] - total["squares"]
    if words[2] in COLOURS:
        return seen[words[2], words[3]]
    return total[words[2]]


def test_answers_are_what_the_pixels_show():
    for example in islice(examples(3), 300):
        assert answer_from_pixels(example.question, draw(example)) == example.answer, example


def test_levels_take_turns_and_answers_are_even():
    drawn = list(islice(examples(0), 3000))
    assert [example.level for example in drawn[:6]] == [1, 2, 3, 1, 2, 3]
    for level in (1, 2, 3):
        shares = Counter(example.answer for example in drawn if example.level == level)
        assert set(shares) == set(range(LARGEST + 1))
        assert max(shares.values()) / 1000 < 0.25  # measured maximum: 0.234; guessing one number scores no more


def test_no_test_scene_occurs_in_training_whatever_the_offsets(tmp_path):
    write_counting(tmp_path, train=600, test=200)
    scenes = {
        split: {frozenset(things_seen(Image.open(path)).items()) for path in tmp_path.glob(f"images/{split}-*.png")}
        for split in ("train", "test")
    }
    assert len(scenes["train"]) > 500
    assert not scenes["train"] & scenes["test"]


def test_equal_arguments_give_equal_bytes_and_more_rows_leave_the_test_set_alone(tmp_path):
    for name, train in (("a", 30), ("b", 30), ("c", 60)):
        write_counting(tmp_path / name, train=train, test=12, seed=4, noise=0.5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 30 + 12
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert (tmp_path / "a" / "test.jsonl").read_bytes() == (tmp_path / "c" / "test.jsonl").read_bytes()
    assert rows(tmp_path / "c" / "train.jsonl")[:30] == rows(tmp_path / "a" / "train.jsonl")
    other = write_counting(tmp_path / "d", train=30, test=12, seed=5)
    assert other.test.read_bytes() != (tmp_path / "a" / "test.jsonl").read_bytes()


def test_the_teacher_errs_as_often_as_it_should_and_never_on_test_rows(tmp_path):
    paths = write_counting(tmp_path, train=1500, test=60, noise=0.5)
    right = [f"\\boxed{{{row['answer']}}}" in row["response"] for row in rows(paths.train)]
    assert pytest.approx(np.mean(right), abs=0.04) == 1 - 0.8 * 0.5  # a wrong teacher guesses right one time in five
    assert all(f"\\boxed{{{row['answer']}}}" in row["response"] for row in rows(paths.test))


def test_noise_outside_0_and_1_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"noise=1\.5"):
        write_counting(tmp_path, train=1, test=1, noise=1.5)


def test_the_task_goes_through_reader_and_processor_with_short_responses(tmp_path):
    paths = write_counting(tmp_path / "data", train=60, test=6)
    processor = Processor(build_published(tmp_path / "model", weights=False), min_pixels=84 * 84, max_pixels=84 * 84)
    dataset = load_dataset(paths.train, processor, response_key="response")
    for index, prompt in enumerate(dataset):
        assert prompt.pictures[0].grid_thw == (1, 6, 6)
        assert len(prompt.tokens_S) <= 40
        assert len(processor.encode_response(dataset.response(index))) <= 32


def test_the_teachers_map_and_tally_are_what_the_pixels_show():
    for example in islice(examples(1), 60):
        seen = things_seen(draw(example))
        words = [word for word in tallied_map(example).split() if word != "/"]
        assert len(words) == 9
        for place, word in enumerate(words):
            thing = seen.get((place // 3 * 28, place % 3 * 28))
            assert word[0] == ("." if thing is None else LETTERS[thing[0], thing[1].removesuffix("s")])
        tallies = [int(word[1:]) for word in words if len(word) > 1]
        assert (tallies or [0])[-1] == example.answer


def test_a_careful_teacher_answers_with_its_tally():
    example = next(example for example in examples(0) if example.level == 3 and example.answer == 2)
    text = response(example, random.Random(0))
    assert text == f"<think>{tallied_map(example)}</think><answer>\\boxed{{2}}</answer>"


def test_questions_of_all_levels_have_equally_many_tokens(tmp_path):
    processor = Processor(build_published(tmp_path / "model", weights=False), min_pixels=84 * 84, max_pixels=84 * 84)
    lengths = {len(processor.tokenizer.encode(example.question)) for example in islice(examples(0), 60)}
    assert len(lengths) == 1
