"""Parquet files, directories of `datasets`, mixtures: the same rows whatever they lie in, the same order whoever reads ahead."""

import json
import threading
import weakref
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eureka_megatron.data.dataset import Mixture, PromptStream, load_dataset, read_mixture
from eureka_megatron.data.prepare import convert_mmk12
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import ConfigError, UserError
from eureka_megatron.types import Prompt


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(build_published(tmp_path_factory.mktemp("tiny"), weights=False), min_pixels=28 * 28)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(number: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (56, 28), (5 * number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def mmk12(numbers, **changes) -> list[dict[str, Any]]:
    return [
        {
            "id": f"m{n}",
            "question": "<image>How many?",
            "image": {"bytes": png(n), "path": f"{n}.png"},
            "answer": str(n),
        }
        | changes
        for n in numbers
    ]


def table(rows: list[dict[str, Any]], picture: str | None = "image") -> datasets.Dataset:
    found = datasets.Dataset.from_list(rows)
    return found if picture is None else found.cast_column(picture, datasets.Image())


def jsonl(folder: Path, numbers, name: str = "rows.jsonl") -> Path:
    """The same rows as `mmk12` gives, as MM-EUREKA has them."""
    lines = []
    for n in numbers:
        (folder / f"{n}.png").write_bytes(png(n))
        content = [{"type": "image", "image": f"{n}.png"}, {"type": "text", "text": "How many?"}]
        row = {"id": f"m{n}", "message": json.dumps([{"role": "user", "content": content}]), "answer": str(n)}
        lines.append(json.dumps(row | {"response": f"<answer>{n}</answer>"}) + "\n")
    (folder / name).write_text("".join(lines))
    return folder / name


def assert_equal(a: Prompt, b: Prompt) -> None:
    assert (a.id, a.answer, a.text) == (b.id, b.answer, b.text)
    np.testing.assert_array_equal(a.tokens_S, b.tokens_S)
    np.testing.assert_array_equal(a.positions_3S, b.positions_3S)
    assert [picture.key for picture in a.pictures] == [picture.key for picture in b.pictures]


def ids(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


# ------------------------------------------------------------------------------------------------------------- tables


def test_all_forms_of_a_data_set_give_the_same_prompts(processor, tmp_path):
    rows = table(mmk12(range(5)))
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "parts").mkdir()
    table(mmk12(range(3))).to_parquet(tmp_path / "parts" / "0.parquet")
    table(mmk12(range(3, 5))).to_parquet(tmp_path / "parts" / "1.parquet")
    converted, _ = convert_mmk12([with_subject(tmp_path)], tmp_path / "converted")
    forms = [jsonl(tmp_path, range(5)), *(tmp_path / name for name in ("a.parquet", "saved", "parts")), converted]
    expected, *others = [load_dataset(form, processor) for form in forms]
    for dataset in others:
        assert len(dataset) == 5
        for a, b in zip(expected, dataset, strict=True):
            assert_equal(a, b)
    assert others[0][2].origin == f"{tmp_path / 'a.parquet'}:3"
    assert len({dataset.fingerprint() for dataset in [expected, *others]}) == 1


def with_subject(folder: Path) -> Path:
    table(mmk12(range(5), subject="math")).to_parquet(folder / "subject.parquet")
    return folder / "subject.parquet"


def test_messages_of_a_table_may_be_text_or_structures_with_pictures_inside(processor, tmp_path):
    content = [
        {"type": "image", "image": {"bytes": png(1), "path": None}, "text": None},
        {"type": "text", "image": None, "text": "How many?"},
    ]
    structured = [{"id": "m1", "message": [{"role": "user", "content": content}], "answer": "1"}]
    table(structured, None).to_parquet(tmp_path / "structured.parquet")
    lines = jsonl(tmp_path, [1])
    table([json.loads(lines.read_text())], None).to_parquet(tmp_path / "text.parquet")
    expected = load_dataset(lines, processor)[0]
    for name in ("structured", "text"):
        assert_equal(load_dataset(tmp_path / f"{name}.parquet", processor)[0], expected)


@pytest.mark.parametrize(
    ("question", "row", "shown"),
    [
        ("Why?", {}, "Why?"),
        ("Why?", {"image": 0}, "[i0]Why?"),
        ("Look at <image1> closely.", {"image": 0}, "[i0]Look at  closely."),
        ("Is <image1> as <image2>?", {"images": [0, 1]}, "Is [i0] as [i1]?"),
        ("Is <image2> as <image 1>?", {"images": [0, 1]}, "Is [i1] as [i0]?"),
        ("<image_3><image_1><image_2>", {"images": [0, 1, 2]}, "[i2][i0][i1]"),
        ("<image2> and <image1>; <image2> again?", {"images": [0, 1]}, "[i1] and [i0]; [i1] again?"),
        ("<image1> and <image>?", {"images": [0, 1]}, "[i0] and [i1]?"),
        ("Is <image1> what <image1> is?", {"image": 0}, "[i0]Is  what  is?"),
        ("<image2>, <video1>, <image1>?", {"images": [0, 1], "video": [1, 2]}, "[i1], [v1,2], [i0]?"),
        ("Same?", {"images": [0, 1]}, "[i0][i1]Same?"),
        ("<video>Same as <image>?", {"image": 0, "video": [1, 2]}, "[v1,2]Same as [i0]?"),
    ],
)
def test_questions_with_pictures_beside_them_become_chats(processor, tmp_path, question, row, shown):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))

    def named(value):
        return [f"{n}.png" for n in value] if isinstance(value, list) else f"{value}.png"

    written = {"question": question, "answer": "1"} | {key: named(value) for key, value in row.items()}
    (tmp_path / "q.jsonl").write_text(json.dumps(written) + "\n")
    found = ""
    for part in load_dataset(tmp_path / "q.jsonl", processor).raw(0)["message"][0]["content"]:
        if part["type"] == "text":
            found += part["text"]
        else:
            value = part[part["type"]]
            numbers = ",".join(one.removesuffix(".png") for one in (value if isinstance(value, list) else [value]))
            found += f"[{part['type'][0]}{numbers}]"
    assert found == shown


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": "<image> and <image>"}, "the question shows images 1, 2 of the row's 1"),
        ({"question": "Is <image2> large?"}, "the question shows images 2 of the row's 1"),
        ({"question": None}, "key 'message' is missing"),
        ({"answer": None}, "key 'answer' is missing"),
        ({"image": {"bytes": b"", "path": None}}, "has no address"),
        ({"image": {"bytes": None, "path": "/etc/hostname"}}, "outside the allowed folders"),
        ({"image": {"bytes": None, "path": "none.png"}}, "'none.png' does not exist"),
        ({"image": {"bytes": b"junk", "path": "a.png"}}, "of 4 bytes in the row is corrupt or no picture"),
    ],
)
def test_bad_rows_of_a_table_are_named_with_their_number(processor, tmp_path, changes, reason):
    rows = [*mmk12([0]), mmk12([1])[0] | changes, *mmk12([2])]
    table(rows, None).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        list(load_dataset(tmp_path / "a.parquet", processor))
    assert str(error.value).startswith(f"{tmp_path / 'a.parquet'}:2: ")
    assert reason in str(error.value)
    dataset = load_dataset(tmp_path / "a.parquet", processor, on_bad_row="skip", rejected=tmp_path / "rejected.jsonl")
    assert ids(prompt for prompt in map(dataset.get, range(len(dataset))) if prompt) == ["m0", "m2"]
    record = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert "PNG" not in record["row"]


def test_what_is_no_table_is_refused(processor, tmp_path):
    (tmp_path / "a.parquet").write_text("hello")
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": table(mmk12([0])), "test": table(mmk12([1]))}).save_to_disk(tmp_path / "splits")
    for name, reason in (
        ("a.parquet", "is no parquet file"),
        ("none.parquet", "does not exist"),
        ("empty", "neither written by datasets .* nor holds parquet files"),
        ("splits", rf"holds the splits train, test; name one of them: {tmp_path / 'splits' / 'train'}"),
    ):
        with pytest.raises(UserError, match=reason):
            load_dataset(tmp_path / name, processor)
    assert ids(load_dataset(tmp_path / "splits" / "test", processor)) == ["m1"]


# ------------------------------------------------------------------------------------------------------------ mixtures


@pytest.fixture
def mixture(processor, tmp_path) -> Mixture:
    jsonl(tmp_path, range(4), "a.jsonl")
    table(mmk12(range(10, 16))).to_parquet(tmp_path / "b.parquet")
    return load_dataset(f"{tmp_path}/a.jsonl:1.5,{tmp_path}/b.parquet:0.5", processor)


def test_every_part_of_a_mixture_gets_its_share_at_any_time(mixture):
    assert [share.weight for share in mixture.shares] == [0.75, 0.25]
    drawn = ids(PromptStream(mixture, seed=1).next(80))
    first = np.cumsum([int(name[1:]) < 10 for name in drawn])
    assert np.abs(first - 0.75 * np.arange(1, 81)).max() <= 1
    counts = Counter(drawn)
    assert {counts[f"m{n}"] for n in range(4)} == {15}  # 60 draws of four rows
    assert {counts[f"m{n}"] for n in range(10, 16)} <= {3, 4}  # 20 draws of six
    assert ids(PromptStream(mixture, seed=2).next(80)) != drawn


def test_a_mixture_is_indexed_as_its_parts_one_behind_the_other(mixture):
    assert ids(mixture) == [f"m{n}" for n in (*range(4), *range(10, 16))]
    assert len(mixture) == 10
    assert mixture.get(5).id == "m11"
    with pytest.raises(IndexError):
        mixture[10]


@pytest.mark.parametrize("before", [0, 5, 31])
def test_a_mixture_is_resumed_exactly(mixture, before):
    expected = ids(PromptStream(mixture, seed=1).next(60))[before:]
    first = PromptStream(mixture, seed=1)
    first.next(before)
    second = PromptStream(mixture, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids(second.next(60 - before)) == expected


def test_a_mixture_is_not_resumed_with_other_weights(mixture):
    state = PromptStream(mixture).state_dict()
    other = Mixture(mixture.parts, [1, 1])
    with pytest.raises(UserError, match="cannot resume, fingerprint was"):
        PromptStream(other).load_state_dict(state)


def test_without_weights_every_row_counts_the_same(processor, tmp_path):
    dataset = load_dataset(
        f"{jsonl(tmp_path, range(2), 'a.jsonl')},{jsonl(tmp_path, range(2, 8), 'b.jsonl')}", processor
    )
    assert set(Counter(ids(PromptStream(dataset).next(16))).values()) == {2}


def test_supervised_samples_come_from_mixtures_too(processor, tmp_path):
    spec = f"{jsonl(tmp_path, range(2), 'a.jsonl')}:1,{jsonl(tmp_path, range(2, 4), 'b.jsonl')}:1"
    samples = PromptStream(load_dataset(spec, processor, response_key="response")).next_samples(4)
    texts = {processor.decode(sample.tokens_S[sample.mask_S == 1]) for sample in samples}
    assert texts == {f"<answer>{n}</answer>" for n in range(4)}


@pytest.mark.parametrize(
    ("question", "row"),
    [
        ("<image1> and <image1>?", {"images": ["0.png", "1.png"]}),
        ("<image3> and <image1>?", {"images": ["0.png", "1.png"]}),
        ("<image0> and <image1>?", {"images": ["0.png", "1.png"]}),
        ("<image2> and <image>?", {"images": ["0.png", "1.png"]}),
        ("Only <image1>?", {"images": ["0.png", "1.png"]}),
        ("<image1>?", {"images": []}),
        ("<video1>?", {"image": "0.png"}),
        ("<image1>?", {"image": "0.png", "video": ["0.png", "1.png"]}),
        (f"<image{'1' * 5000}>?", {"image": "0.png"}),
    ],
)
def test_a_number_without_a_picture_and_a_picture_never_shown_are_refused(processor, tmp_path, question, row):
    jsonl(tmp_path, range(2))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": question, "answer": "1"} | row) + "\n")
    with pytest.raises(UserError, match=r"q\.jsonl:1: "):
        load_dataset(tmp_path / "q.jsonl", processor)


def test_a_row_that_arrow_cannot_read_costs_itself_alone(processor, tmp_path):
    texts = pa.array([b"one?", b"\xff\xfe", b"three?", b"four?"], pa.binary()).view(pa.string())
    dates = pa.array([0, 0, 2**50, 0], pa.int64()).cast(pa.timestamp("ms"))
    answers = pa.array([1.0, 2.0, 3.0, float("nan")])
    pq.write_table(pa.table({"question": texts, "answer": answers, "date": dates}), tmp_path / "a.parquet")
    rejected = tmp_path / "rejected.jsonl"
    dataset = load_dataset(tmp_path / "a.parquet", processor, on_bad_row="skip", rejected=rejected)
    assert [prompt.answer for prompt in dataset] == ["1.0"]
    records = [json.loads(line) for line in rejected.read_bytes().splitlines()]
    reasons = ("UnicodeDecodeError", "OverflowError", "'answer' must be a non-empty string or a number, found nan")
    for number, (record, reason) in enumerate(zip(records, reasons, strict=True), start=2):
        assert record["reason"].startswith(f"{tmp_path / 'a.parquet'}:{number}: {reason}")
    assert [json.loads(record["row"])["answer"] for record in records[:2]] == [2.0, 3.0]


@pytest.mark.parametrize(
    "name", ["junk.parquet", "cut.parquet", "junk.jsonl", "saved", "split", "loop.jsonl", "x" * 300]
)
def test_files_of_garbage_are_named(processor, tmp_path, name):
    path = tmp_path / name
    junk = bytes(range(256)) * 9
    if name == "cut.parquet":
        table(mmk12(range(3))).to_parquet(path)
        path.write_bytes(path.read_bytes()[:40] + b"\xff" * 200 + path.read_bytes()[240:])
    elif name in ("saved", "split"):
        path.mkdir()
        (path / ("state.json" if name == "saved" else "dataset_dict.json")).write_bytes(junk)
    elif name == "loop.jsonl":
        path.symlink_to(path)
    elif len(name) < 255:
        path.write_bytes(junk)
    with pytest.raises(UserError, match=name) as told:
        load_dataset(path, processor, on_bad_row="skip")
    assert "\n" not in str(told.value)


def test_bad_rows_of_all_parts_go_to_one_file(processor, tmp_path):
    for name, numbers in (("a.jsonl", [0]), ("b.jsonl", [1])):
        path = jsonl(tmp_path, numbers, name)
        path.write_text(path.read_text() + "{\n")
    spec = f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    dataset = load_dataset(spec, processor, on_bad_row="skip", rejected=tmp_path / "rejected.jsonl")
    origins = [json.loads(line)["origin"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert origins == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:2"]
    assert dataset.rejected == 2


def test_what_a_mixture_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd,name:2").touch()
    (tmp_path / "odd:3").touch()
    for text, expected in (
        ("a.jsonl", [("a.jsonl", None)]),
        ("a.jsonl:2", [("a.jsonl", 2)]),
        ("a.jsonl:0.7, b/c.parquet:3e-1", [("a.jsonl", 0.7), ("b/c.parquet", 0.3)]),
        ("a:b.jsonl,c", [("a:b.jsonl", None), ("c", None)]),
        ("odd,name:2", [("odd,name:2", None)]),
        ("odd:3:2,c:1", [("odd:3", 2), ("c", 1)]),
    ):
        assert read_mixture(text) == [(Path(path), weight) for path, weight in expected]
    for text in ("a:0,b:1", "a:-1,b:1", "a:nan,b:1", "a:inf,b:1", "a,,b", "a:1,"):
        with pytest.raises(ConfigError, match="path or path:weight"):
            read_mixture(text)
    long = ",".join(f"folder{n}/data.jsonl:1" for n in range(500))
    assert len(read_mixture(long)) == 500
    with pytest.raises(ConfigError, match="either every part has a weight or none has"):
        read_mixture("a:1,b")


# ----------------------------------------------------------------------------------------------------- reading ahead


def test_reading_ahead_changes_neither_order_nor_prompts_nor_state(processor, mixture, tmp_path):
    for dataset in (mixture, load_dataset(jsonl(tmp_path, range(7)), processor)):
        plain, ahead = PromptStream(dataset, 1), PromptStream(dataset, 1, workers=3, prefetch=5)
        for number in (1, 4, 13, 0, 20):
            for a, b in zip(plain.next(number), ahead.next(number), strict=True):
                assert_equal(a, b)
            assert plain.state_dict() == ahead.state_dict()
        resumed = PromptStream(dataset, 1, workers=3, prefetch=5)
        resumed.next(3)
        resumed.load_state_dict(plain.state_dict())
        assert ids(resumed.next(20)) == ids(plain.next(20))


def test_bad_rows_are_met_in_the_same_order_when_read_ahead(processor, tmp_path):
    path = jsonl(tmp_path, range(8))
    for n in (2, 5):
        (tmp_path / f"{n}.png").write_bytes(b"broken")
    records = {}
    for workers in (0, 3):
        rejected = tmp_path / f"rejected{workers}.jsonl"
        dataset = load_dataset(path, processor, on_bad_row="skip", rejected=rejected)
        stream = PromptStream(dataset, workers=workers, prefetch=4)
        records[workers] = [(ids(stream.next(1)), dataset.rejected) for _ in range(20)], rejected.read_text()
        assert dataset.rejected == 2
    assert records[0] == records[3]
    stream = PromptStream(load_dataset(path, processor), workers=2, prefetch=8)
    with pytest.raises(UserError, match=r"rows.jsonl:[36]: picture '[25].png' is corrupt"):
        stream.next(8)


def test_a_defect_in_the_background_is_not_swallowed(processor, tmp_path, monkeypatch):
    stream = PromptStream(load_dataset(jsonl(tmp_path, range(3)), processor), workers=1, prefetch=2)
    monkeypatch.setattr(processor, "render", lambda chat: 1 / 0)
    with pytest.raises(UserError, match=r"rows\.jsonl:\d: ZeroDivisionError: division by zero") as told:
        stream.next(1)
    assert isinstance(told.value.__cause__, ZeroDivisionError)


class Watched:
    """A dataset that counts the prompts that are alive; prompts are made, not read."""

    def __init__(self, rows: int) -> None:
        from eureka_megatron.data.dataset import Share

        self.shares, self.made, self.alive, self.most = (Share(0, rows, 1.0),), 0, 0, 0
        self.lock, self.path, self.rejected = threading.Lock(), "watched", 0

    def __len__(self) -> int:
        return self.shares[0].rows

    def load(self, index: int) -> Prompt:
        empty = np.zeros(0, dtype=np.int64)
        prompt = Prompt(str(index), "", "", empty, np.zeros((3, 0), dtype=np.int64))
        weakref.finalize(prompt, self._gone)
        with self.lock:
            self.made += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
        return prompt

    def _gone(self) -> None:
        with self.lock:
            self.alive -= 1

    def accept(self, index: int, found: Prompt) -> Prompt:
        return found


def test_no_more_prompts_wait_than_were_allowed():
    dataset = Watched(1000)
    stream = PromptStream(dataset, workers=4, prefetch=6)
    for taken in range(1, 200):
        stream.next(1)
        assert dataset.made <= taken + 6
    assert dataset.most <= 6 + 2  # waiting, and the one in hand while the next is taken


def test_decoded_pictures_in_memory_are_bounded_however_long_the_stream(processor, tmp_path):
    dataset = load_dataset(jsonl(tmp_path, range(30)), processor)
    dataset._cache_bytes = 200_000  # some eight prompts
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    original = processor.picture

    def counted(*args: Any, **options: Any) -> Any:
        picture = original(*args, **options)
        alive.add(picture.patches_PD)
        return picture

    processor.picture = counted
    try:
        stream = PromptStream(dataset, workers=2, prefetch=4)
        most = 0
        for _ in range(90):
            stream.next(1)
            most = max(most, len(alive))
    finally:
        del processor.picture
    assert most <= 8 + 4 + 3


def test_a_prompt_is_decoded_once_for_all_its_samples(processor, tmp_path):
    """And travels once: samples of a group share their pictures, which pickling respects."""
    import pickle

    from eureka_megatron.data.samples import training_sample

    prompt = load_dataset(jsonl(tmp_path, [1]), processor)[0]
    samples = [training_sample(prompt, np.arange(5, 9 + n)) for n in range(8)]
    assert all(sample.pictures[0] is prompt.pictures[0] for sample in samples)
    sizes = [len(pickle.dumps(samples[:n])) for n in range(1, 9)]
    assert all(b - a < 0.2 * prompt.pictures[0].patches_PD.nbytes for a, b in pairwise(sizes))
