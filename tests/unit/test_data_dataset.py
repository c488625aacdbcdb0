"""JSONL files: every bad row is named, good ones are read as needed, streams resume exactly."""

import base64
import gc
import json
import weakref
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from eureka_megatron.data.dataset import PromptStream, load_dataset
from eureka_megatron.data.prepare import show_validation, validate
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    model_dir = build_published(tmp_path_factory.mktemp("tiny"), weights=False)
    return Processor(model_dir, min_pixels=28 * 28, max_prompt_tokens=60)


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        Image.new("RGB", (56, 28), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def row(number: int, **changes) -> dict:
    content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "How many?"}]
    message = json.dumps([{"role": "user", "content": content}])
    return {
        "id": f"r{number}",
        "message": message,
        "answer": str(number),
        "response": f"<think>{number}</think>",
    } | changes


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def test_rows_become_prompts_in_order(folder, processor):
    path = write(folder, [row(0), b"", row(1, id=17, answer=2.5), row(2, message=json.loads(row(2)["message"]))])
    dataset = load_dataset(path, processor)
    assert [prompt.id for prompt in dataset] == ["r0", "17", "r2"]
    assert [prompt.answer for prompt in dataset] == ["0", "2.5", "2"]
    assert [prompt.origin for prompt in dataset] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert dataset[1].pictures[0].image.getpixel((0, 0)) == (40, 0, 0)
    assert dataset.rejected == 0


BAD = [
    (b"{", "not JSON"),
    (b"[1]", "must be a JSON object, found list"),
    (b'{"a": "\xff"}', "not UTF-8"),
    ({"id": "x", "answer": "1"}, "key 'message' is missing; found answer, id"),
    ({"id": "x", "message": row(0)["message"]}, "key 'answer' is missing"),
    (row(0, answer="  "), "'answer' must be a non-empty string or a number"),
    (row(0, answer=["3"]), "'answer' must be a non-empty string or a number"),
    (row(0, message="hello"), "not JSON"),
    (row(9), "'9.png' does not exist"),
    (row(0, message=row(0)["message"].replace("0.png", "/etc/hostname")), "outside the allowed folders"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_row_is_an_error_with_file_and_line(folder, processor, bad, reason):
    path = write(folder, [row(0), bad, row(1)])
    with pytest.raises(UserError) as error:
        load_dataset(path, processor)
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)


def test_bad_rows_are_skipped_counted_and_written_down(folder, processor):
    rejected = folder / "out" / "rejected.jsonl"
    path = write(folder, [row(0), *(bad for bad, _ in BAD), row(1)])
    dataset = load_dataset(path, processor, on_bad_row="skip", rejected=rejected)
    assert [prompt.id for prompt in dataset] == ["r0", "r1"]
    records = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert dataset.rejected == len(records) == len(BAD)
    assert [record["origin"] for record in records] == [f"{path}:{line}" for line in range(2, 2 + len(BAD))]
    assert all(reason in record["reason"] for record, (_, reason) in zip(records, BAD, strict=True))
    assert json.loads(records[3]["row"]) == BAD[3][0]


def raw_row(answer: str = '"3"', text: str = "q", image: str = "0.png", more: str = "") -> bytes:
    """A row as bytes, with JSON that json.dumps would not write."""
    content = f'[{{"type": "image", "image": "{image}"}}, {{"type": "text", "text": "{text}"}}]'
    return f'{{"message": [{{"role": "user", "content": {content}}}], "answer": {answer}{more}}}'.encode()


WILD = {
    "half a pair in text": raw_row(text="cut \\ud83d off"),
    "the other half": raw_row(text="\\udE00"),
    "half a pair in a message of text": json.dumps(row(0, message='[{"role": "user", "content": "\\ud83d"}]')).encode(),
    "half a pair in an answer": raw_row(answer='"\\ud83d"'),
    "half a pair in an id": raw_row(more=', "id": "\\ud83d"'),
    "half a pair in a key": b'{"\\ud83d": 1}',
    "half a pair in an address": raw_row(image="\\ud83d.png"),
    "half a pair as bytes": raw_row(text="x").replace(b'"x"', b'"\xed\xa0\xbd"'),
    "lines end here for some": raw_row(text="one\u2028two\u2029three\x85four", image="none.png"),
    "a long name": raw_row(image="x" * 300 + ".png"),
    "a long path": raw_row(image="x/" * 3000 + "0.png"),
    "base64 of a picture alone": raw_row(image="iVBORw0KGgo" + "A" * 9000),
    "base64 of a JPEG alone": raw_row(image="/9j/4AAQSkZJRg" + "A/" * 4500),
    "a circle of links": raw_row(image="circle.png"),
    "no address": raw_row(image="file://[0.png"),
    "not a number": raw_row(answer="NaN"),
    "infinity": raw_row(answer="Infinity"),
    "minus infinity": raw_row(answer="-Infinity"),
    "beyond floating point": raw_row(answer="1e999"),
    "a whole number without end": raw_row(answer="1" * 5000),
    "such a number elsewhere": raw_row(more=f', "level": {"1" * 5000}'),
    "such a number of pixels": raw_row(more="").replace(
        b'"type": "image"', b'"type": "image", "min_pixels": 1' + b"0" * 400
    ),
    "brackets without end": raw_row(answer="[" * 100_000),
    "brackets that do end": raw_row(answer="[" * 20_000 + "]" * 20_000),
    "brackets in a message of text": json.dumps(row(0, message="[" * 100_000)).encode(),
    "junk": bytes(range(128, 256)) * 3,
    "markup": raw_row(image="[/bold].png"),
}


@pytest.mark.parametrize("bad", WILD.values(), ids=WILD)
def test_no_row_is_wild_enough_to_end_a_run(folder, processor, capsys, bad):
    """Reader, stream, supervised stream and validation name it, count it, go on, and lose nothing of it."""
    (folder / "circle.png").symlink_to("circle.png")
    path, rejected = write(folder, [row(0), bad, row(1)]), folder / "rejected.jsonl"
    with pytest.raises(UserError) as told:
        list(load_dataset(path, processor))
    assert str(told.value).startswith(f"{path}:2: ")
    str(told.value).encode()
    for key in (None, "response"):
        dataset = load_dataset(path, processor, on_bad_row="skip", rejected=rejected, response_key=key)
        stream = PromptStream(dataset, workers=2, prefetch=2)
        assert len(stream.next_samples(4) if key else stream.next(4)) == 4
        assert dataset.rejected == 1
    assert [prompt.id for index in range(len(dataset)) if (prompt := dataset.get(index))] == ["r0", "r1"]
    (line,) = rejected.read_text(encoding="utf-8").splitlines()  # which ends lines at all of Unicode's line ends
    record = json.loads(line)
    assert record["origin"] == f"{path}:2"
    lost_nothing = base64.b64decode(record["row_base64"]) if "row_base64" in record else record["row"].encode()
    assert lost_nothing == bad
    assert show_validation(path, processor) == 1
    assert "2 good rows, 1 bad" in capsys.readouterr().out
    (problem,) = validate(path, processor).problems
    assert problem.origin == f"{path}:2"


@pytest.mark.parametrize("response", ["a<|im_end|>b", "<|im_start|>", "<|image_pad|>", "<|im_end|>", "cut \ud83d off"])
def test_a_response_that_cannot_be_imitated_is_a_bad_row(folder, processor, response):
    path = write(folder, [row(0), row(1, response=response), row(2, response="3<|im_end|>")])
    with pytest.raises(UserError, match=rf"^{path}:2: .*response"):
        PromptStream(load_dataset(path, processor, response_key="response")).next_samples(3)
    rejected = folder / "rejected.jsonl"
    dataset = load_dataset(path, processor, on_bad_row="skip", rejected=rejected, response_key="response")
    samples = PromptStream(dataset, workers=1, prefetch=2).next_samples(4)
    assert {processor.decode(sample.tokens_S[sample.mask_S == 1]) for sample in samples} == {"<think>0</think>", "3"}
    assert all((sample.tokens_S[sample.mask_S == 1] == processor.end_token_id).sum() == 1 for sample in samples)
    assert dataset.rejected == len(rejected.read_text().splitlines()) == 1


def test_many_bad_rows_give_five_lines_and_a_count(folder, processor):
    path = write(folder, [b"{"] * 9 + [row(0)])
    with pytest.raises(UserError, match="9 bad rows in all") as error:
        load_dataset(path, processor)
    assert str(error.value).count("not JSON") == 5


def test_answers_that_cannot_be_judged_are_bad_rows(folder, processor):
    path = write(folder, [row(0), row(1, answer="??")])
    with pytest.raises(UserError, match=r":2: 'answer' '\?\?' cannot be judged: no number"):
        load_dataset(path, processor, check_answer=lambda answer: None if answer.isdigit() else "no number")


def test_files_without_usable_rows_are_refused(folder, processor):
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(folder / "none.jsonl", processor)
    with pytest.raises(UserError, match="no usable row"):
        load_dataset(write(folder, []), processor)
    with pytest.raises(UserError, match=r"no usable row; the first is bad: .*data.jsonl:1: not JSON"):
        load_dataset(write(folder, [b"{"]), processor, on_bad_row="skip")


def test_what_only_decoding_shows_is_reported_when_the_row_is_used(folder, processor):
    (folder / "2.png").write_bytes(b"\x89PNG broken")
    path = write(folder, [row(0), row(2), row(1, message=json.dumps([{"role": "user", "content": "why " * 99}]))])
    dataset = load_dataset(path, processor)
    with pytest.raises(UserError, match=rf"{path}:2: picture '2.png' is corrupt"):
        dataset[1]
    with pytest.raises(UserError, match=rf"{path}:3: the prompt has \d+ tokens"):
        dataset[2]
    rejected = folder / "rejected.jsonl"
    stream = PromptStream(load_dataset(path, processor, on_bad_row="skip", rejected=rejected))
    assert [prompt.id for prompt in stream.next(5)] == ["r0"] * 5
    assert stream.dataset.rejected == 2  # counted once each, however often they come up
    assert len(rejected.read_text().splitlines()) == 2


def test_a_stream_over_nothing_but_bad_rows_ends_with_an_error(folder, processor):
    (folder / "2.png").write_bytes(b"broken")
    stream = PromptStream(load_dataset(write(folder, [row(2)]), processor, on_bad_row="skip"))
    with pytest.raises(UserError, match="no usable row is left; 1 were rejected"):
        stream.next(1)


def test_each_epoch_shows_every_row_once_in_an_order_of_its_own(folder, processor):
    dataset = load_dataset(write(folder, [row(number) for number in range(6)]), processor)
    stream = PromptStream(dataset, seed=3)
    epochs = [[prompt.id for prompt in stream.next(6)] for _ in range(4)]
    assert all(sorted(epoch) == [f"r{number}" for number in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [prompt.id for prompt in PromptStream(dataset, seed=3).next(24)] == list(chain.from_iterable(epochs))
    assert [prompt.id for prompt in PromptStream(dataset, seed=4).next(24)] != list(chain.from_iterable(epochs))


@pytest.mark.parametrize("before", [0, 4, 6, 11, 18])
def test_a_resumed_stream_gives_what_an_uninterrupted_one_gives(folder, processor, before):
    path = write(folder, [row(number) for number in range(6)])
    whole = PromptStream(load_dataset(path, processor), seed=1)
    expected = [prompt.id for prompt in whole.next(30)][before:]
    first = PromptStream(load_dataset(path, processor), seed=1)
    first.next(before)
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptStream(load_dataset(path, processor), seed=1)
    second.load_state_dict(state)
    assert [prompt.id for prompt in second.next(30 - before)] == expected


def test_a_stream_is_not_resumed_on_other_data(folder, processor):
    state = PromptStream(load_dataset(write(folder, [row(0), row(1)]), processor)).state_dict()
    for rows, seed in (([row(0), row(2)], 0), ([row(1), row(0)], 0), ([row(0), row(1)], 5)):
        with pytest.raises(UserError, match="cannot resume"):
            PromptStream(load_dataset(write(folder, rows), processor), seed).load_state_dict(state)


def test_rows_with_a_response_become_supervised_samples(folder, processor):
    path = write(folder, [row(0), row(1)])
    stream = PromptStream(load_dataset(path, processor, response_key="response"))
    samples = stream.next_samples(2)
    texts = {processor.decode(sample.tokens_S[sample.mask_S == 1]) for sample in samples}
    assert texts == {"<think>0</think>", "<think>1</think>"}
    with pytest.raises(UserError, match=":1: key 'text' is missing"):
        load_dataset(path, processor, response_key="text")
    with pytest.raises(UserError, match=":1: 'response' must be a non-empty string"):
        load_dataset(write(folder, [row(0, response="")]), processor, response_key="response")


def test_the_cache_is_bounded_and_changes_nothing(folder, processor):
    dataset = load_dataset(write(folder, [row(number) for number in range(6)]), processor)
    kept = dataset[0]
    assert dataset[0] is kept
    dataset._cache_bytes = 3 * dataset._cached_bytes
    again = [dataset[number] for number in range(6)]
    assert len(dataset._cache) == 3
    assert dataset._cached_bytes <= dataset._cache_bytes
    assert dataset[0] is not kept
    np.testing.assert_array_equal(dataset[0].pictures[0].patches_PD, again[0].pictures[0].patches_PD)


def test_a_supervised_row_that_cannot_fit_is_told_when_the_data_are_opened(folder, processor):
    """Nothing that passes fails later: the limit is met to the token."""
    rows = [row(n, response="1 " * 20 * n) for n in range(1, 6)]
    dataset = load_dataset(write(folder, rows), processor, response_key="response")
    lengths = [len(dataset.sample(index, dataset[index])) for index in range(5)]
    assert lengths == sorted(lengths)
    path = write(folder, rows, "tight.jsonl")
    tight = {"response_key": "response", "max_tokens": lengths[2]}
    with pytest.raises(UserError) as told:
        load_dataset(path, processor, **tight)
    first, second, advice = str(told.value).splitlines()
    assert first.startswith(f"{path}:4: prompt (")
    assert second.startswith(f"{path}:5: prompt (")
    assert f"do not fit the {lengths[2]} tokens that training.max_tokens_per_micro_batch allows" in first
    assert "on_bad_row=skip" in advice
    rejected = folder / "rejected.jsonl"
    dataset = load_dataset(path, processor, on_bad_row="skip", rejected=rejected, **tight)
    samples = PromptStream(dataset).next_samples(6)
    assert max(map(len, samples)) == lengths[2]
    assert dataset.rejected == len(rejected.read_text().splitlines()) == 2
    assert len(load_dataset(path, processor, response_key="response", max_tokens=lengths[4])) == 5
    # An RL run's rows may have responses that nobody imitates.
    assert len(load_dataset(path, processor, max_tokens=lengths[2])) == 5


def test_an_optional_response_is_looked_at_where_there_is_one(folder, processor):
    rows = [row(0), row(1, response=None), row(2, response=" "), row(3, response="<|im_start|>"), row(4, response=7)]
    rejected = folder / "rejected.jsonl"
    options = {"response_key": "response", "response_optional": True}
    dataset = load_dataset(write(folder, rows), processor, on_bad_row="skip", rejected=rejected, **options)
    assert [prompt.id for prompt in dataset] == ["r0", "r1"]
    assert [json.loads(line)["origin"].rpartition(":")[2] for line in rejected.open()] == ["3", "4", "5"]


def test_a_message_is_one_line_whatever_the_row_holds(folder, processor):
    bad = raw_row(image="a\\nb\\u001b[2J\u2028c.png").replace(b'"answer"', '"an\u2028swer\x85"'.encode())
    with pytest.raises(UserError) as told:
        load_dataset(write(folder, [row(0), bad]), processor)
    first, _ = str(told.value).splitlines()
    assert first.endswith("found an\\u2028swer\\x85, message")


def test_rows_that_are_left_out_keep_no_picture(folder, processor, monkeypatch):
    """An error's frames would: every picture of every bad row, for the rest of the run."""
    alive = []
    made = processor.picture

    def watched(*arguments, **options):
        picture = made(*arguments, **options)
        alive.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(processor, "picture", watched)
    long = json.dumps([{"role": "user", "content": [{"type": "image", "image": "1.png"}, "why " * 99]}])
    path = write(folder, [row(0), *[row(n, message=long) for n in range(8)]])
    dataset = load_dataset(path, processor, on_bad_row="skip")
    for number in range(len(dataset)):
        dataset.get(number, keep=False)
    gc.collect()
    assert (len(alive), dataset.rejected) == (9, 8)
    assert not [one for one in alive if one() is not None]
    assert not dataset._cache
