"""Videos to prompts: frames, patches, times; against the checkpoint's own video processor. And videos that cannot be read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from eureka_megatron.data import videos
from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.model_inputs import reading_order
from eureka_megatron.data.processor import Processor
from eureka_megatron.demo.forms import build_published
from eureka_megatron.errors import UserError
from eureka_megatron.types import Picture


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build_published(tmp_path_factory.mktemp("tiny"), weights=False)


@pytest.fixture(scope="module")
def processor(model_dir):
    return Processor(model_dir, min_pixels=28 * 28, max_pixels=200 * 28 * 28, video_max_pixels=16 * 28 * 28)


def noise(count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save(frames: np.ndarray, folder, name: str = "f") -> list[str]:
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{name}{number}.png")
    return [f"{name}{number}.png" for number in range(len(frames))]


def chat(*parts) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def video(address, **options) -> dict:
    return {"type": "video", "video": address, **options}


def write_mp4(path, count: int, fps: float, size=(84, 56), codec: str = "mp4v") -> None:
    """Frame k shows k in six black or white bars: no codec can blur that."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size)
    assert writer.isOpened()
    for number in range(count):
        bits = np.array([number >> place & 1 for place in range(6)], dtype=np.uint8)
        row = np.repeat(255 * bits, size[0] // 6)
        writer.write(np.ascontiguousarray(np.broadcast_to(row[None, :, None], (size[1], size[0], 3))))
    writer.release()


def numbers(picture: Picture) -> list[int]:
    """Which frames of `write_mp4` these are."""
    bars = picture.frames.reshape(len(picture.frames), 56, 6, 14, 3).mean(axis=(1, 3, 4)) > 128
    return (bars @ (1 << np.arange(6))).tolist()


# ---------------------------------------------------------------------------------------------------- lists of frames


def test_prompt_equals_the_checkpoints_own_processor(processor, model_dir, tmp_path):
    """Pictures and videos mixed; frames are resized, the reference gets the originals."""
    clips = [noise(6, 100, 61), noise(5, 56, 84, 1)]
    save(noise(1, 84, 84, 2), tmp_path, "image")
    message = chat(
        "Look:",
        video(save(clips[0], tmp_path, "a"), fps=1.7),
        {"type": "image", "image": "image0.png"},
        "then",
        video(save(clips[1], tmp_path, "b")),
        "How many?",
    )
    prompt = processor.prompt(message, id="a", answer="3", folders=[tmp_path])
    reference = AutoProcessor.from_pretrained(model_dir)
    bounds = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    expected = reference(
        text=[prompt.text],
        images=[prompt.pictures[1].image],
        videos=clips,
        video_metadata=[
            {"total_num_frames": len(clip), "fps": fps, "frames_indices": list(range(len(clip)))}
            for clip, fps in zip(clips, (1.7, 2.0), strict=True)
        ],
        videos_kwargs={"size": bounds, "do_sample_frames": False},
        return_tensors="pt",
    )
    np.testing.assert_array_equal(prompt.tokens_S, expected["input_ids"][0].numpy())
    shown = [picture for picture in prompt.pictures if picture.is_video]
    assert [picture.grid_thw for picture in shown] == [tuple(grid) for grid in expected["video_grid_thw"].tolist()]
    assert [picture.grid_thw[0] for picture in shown] == [3, 3]  # five frames: the last one twice
    assert [picture.seconds_per_grid for picture in shown] == expected["second_per_grid_ts"].tolist()
    patches = torch.cat([reading_order(picture) for picture in shown])
    torch.testing.assert_close(patches, expected["pixel_values_videos"], rtol=0, atol=0)
    for picture, offset in zip(prompt.pictures, prompt.picture_offsets, strict=True):
        pad = processor.video_token_id if picture.is_video else processor.image_token_id
        assert (prompt.tokens_S[offset : offset + picture.units] == pad).all()
        assert prompt.tokens_S[offset - 1] != pad


def test_the_records_of_a_video_fit_each_other(processor, tmp_path):
    names = save(noise(7, 84, 56), tmp_path)
    picture = processor.prompt(chat(video(names, fps=4)), folders=[tmp_path]).pictures[0]
    assert picture.grid_thw == (4, 4, 6)
    assert picture.image is None
    assert picture.frames.shape == (8, 56, 84, 3)
    np.testing.assert_array_equal(picture.frames[7], picture.frames[6])
    assert picture.seconds_per_grid == 0.5
    assert picture.units == 4 * 6
    assert picture.patches_PD.shape == (96, 1176)
    assert picture.frame_lengths_F.tolist() == [24] * 4
    assert picture.window_lengths_W.sum() == 96


def test_a_checkpoint_without_a_video_processor_file_uses_that_of_pictures(model_dir, tmp_path):
    assert not (model_dir / "video_preprocessor_config.json").exists()
    names = save(noise(2, 56, 56), tmp_path)
    prompt = Processor(model_dir, min_pixels=28 * 28).prompt(chat(video(names)), folders=[tmp_path])
    assert prompt.pictures[0].grid_thw == (1, 4, 4)


@pytest.mark.parametrize(("dtype", "seconds"), [("float32", np.float32(2 / 1.7)), ("bfloat16", 1.1796875)])
def test_the_seconds_of_a_time_step_are_in_the_engines_type(model_dir, tmp_path, dtype, seconds):
    processor = Processor(model_dir, min_pixels=28 * 28, dtype=dtype)
    prompt = processor.prompt(chat(video(save(noise(8, 28, 28), tmp_path), fps=1.7)), folders=[tmp_path])
    assert prompt.pictures[0].seconds_per_grid == seconds
    start = prompt.picture_offsets[0]
    steps = np.floor(2 * np.arange(4) * float(seconds))
    assert (prompt.positions_3S[0, start : start + 4] - start).tolist() == steps.tolist()
    assert prompt.next_position == prompt.positions_3S.max() + 1


def test_equal_frames_have_equal_keys_whatever_their_rate(processor, tmp_path):
    names = save(noise(4, 28, 28), tmp_path)
    keys = [
        processor.prompt(chat(video(list(order), **options)), folders=[tmp_path]).pictures[0].key
        for order, options in ((names, {}), (names, {"fps": 5}), (names[::-1], {}), (names[:2], {}))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_bounds_of_a_row_decide_on_the_size_of_its_frames_and_pictures(processor, tmp_path):
    names = save(noise(2, 280, 280), tmp_path)

    def grid(part):
        return processor.prompt(chat(part), folders=[tmp_path]).pictures[0].grid_thw

    assert grid(video(names)) == (1, 8, 8)  # 16 units, the processor's video_max_pixels
    assert grid(video(names, max_pixels=4 * 28 * 28)) == (1, 4, 4)
    assert grid(video(names, min_pixels=50 * 28 * 28)) == (
        1,
        14,
        14,
    )  # transformers' rule: the larger bound rounds down
    assert grid({"type": "image", "image": names[0]}) == (1, 20, 20)
    assert grid({"type": "image", "image": names[0], "max_pixels": 4 * 28 * 28}) == (1, 4, 4)
    assert grid({"type": "image", "image": names[0], "max_pixels": 10**9}) == (1, 20, 20)


def test_a_video_that_is_too_long_is_refused_before_it_is_decoded(processor, tmp_path, monkeypatch):
    processor = Processor(processor.model_dir, min_pixels=28 * 28, max_prompt_tokens=100, video_max_frames=90)
    names = save(noise(1, 56, 56), tmp_path) * 60
    decoded = []
    load = videos.load_picture
    monkeypatch.setattr(videos, "load_picture", lambda *args: decoded.append(args) or load(*args))
    with pytest.raises(UserError, match=r"60 frames of 56×56 pixels are 120 tokens; data\.max_prompt_tokens=100"):
        processor.prompt(chat(video(names)), folders=[tmp_path])
    assert len(decoded) == 1
    with pytest.raises(UserError, match=r"'f0.png' … has 120 frames; data\.video_max_frames=90"):
        processor.prompt(chat(video(names * 2)), folders=[tmp_path])
    message = chat(video(names[:4]), "How many circles? " * 100)
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens; data.max_prompt_tokens=100"):
        processor.prompt(message, folders=[tmp_path])


# -------------------------------------------------------------------------------------------------------- video files


@pytest.mark.parametrize(
    ("options", "frames", "seconds"),
    [
        ({}, [0, 5, 10, 15, 20, 25], 1.0),  # two a second of 10
        ({"fps": 1}, [0, 7, 15, 22], 1.5),  # not fewer than four
        ({"fps": 10}, list(range(30)), 0.2),
        ({"fps": 60}, list(range(30)), 0.2),
        ({"nframes": 10}, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27], 0.6),
        ({"nframes": 7}, [0, 3, 7, 11, 15, 18, 22, 26], 0.75),
    ],
)
def test_frames_of_a_file_are_chosen_by_the_checkpoints_rule(processor, tmp_path, options, frames, seconds):
    write_mp4(tmp_path / "a.mp4", 30, 10.0)
    picture = processor.prompt(chat(video("a.mp4", **options)), folders=[tmp_path]).pictures[0]
    assert numbers(picture) == frames
    assert picture.seconds_per_grid == pytest.approx(seconds, rel=1e-6)


def test_no_more_frames_are_taken_than_allowed(model_dir, tmp_path):
    write_mp4(tmp_path / "a.mp4", 30, 10.0)
    processor = Processor(model_dir, min_pixels=28 * 28, video_max_frames=5, video_fps=10)
    picture = processor.prompt(chat(video("a.mp4")), folders=[tmp_path]).pictures[0]
    assert numbers(picture) == [0, 7, 15, 22]
    with pytest.raises(UserError, match=r"'a.mp4' has nframes=6, but only 30 frames; data.video_max_frames=5"):
        processor.prompt(chat(video("a.mp4", nframes=6)), folders=[tmp_path])


@pytest.mark.parametrize(("count", "expected"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 1]), (5, [0, 1, 2, 3])])
def test_short_files_are_read_too(processor, tmp_path, count, expected):
    write_mp4(tmp_path / "a.mp4", count, 2.0)
    picture = processor.prompt(chat(video("a.mp4")), folders=[tmp_path]).pictures[0]
    assert numbers(picture) == expected


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.mov", "mp4v")]
)
def test_kinds_of_files(processor, tmp_path, name, codec):
    write_mp4(tmp_path / name, 12, 6.0, codec=codec)
    picture = processor.prompt(chat(video((tmp_path / name).as_uri(), nframes=6)), folders=[tmp_path]).pictures[0]
    assert numbers(picture) == [0, 2, 4, 6, 8, 10]


def test_without_a_decoder_files_are_refused_and_lists_are_read(processor, tmp_path, monkeypatch):
    import sys

    write_mp4(tmp_path / "a.mp4", 4, 2.0)
    names = save(noise(2, 28, 28), tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install 'eureka-megatron\[video\]'"):
        processor.prompt(chat(video("a.mp4")), folders=[tmp_path])
    assert processor.prompt(chat(video(names)), folders=[tmp_path]).pictures


# ------------------------------------------------------------------------------------------------------------ bad ones


def bad_part(kind: str, folder):
    """A part that cannot be read, and what is said of it."""
    names = save(noise(4, 56, 28), folder, "g")
    outside = folder.parent / "outside.png"
    Image.new("RGB", (28, 28)).save(outside)
    if kind == "missing frame":
        return video([*names[:2], "g9.png"]), "picture 'g9.png' does not exist"
    if kind == "frame outside":
        return video([*names, str(outside)]), "outside the allowed folders"
    if kind == "corrupt frame":
        (folder / "g1.png").write_bytes(b"\x89PNG broken")
        return video(names), "picture 'g1.png' is corrupt"
    if kind == "odd frame size":
        Image.new("RGB", (28, 28)).save(folder / "g2.png")
        return video(names), "frame 3 is 28×28, the first is 56×28"
    if kind == "thin frames":
        return video(save(noise(2, 401, 2), folder, "t")), "more than 200 times as long as wide"
    if kind == "missing file":
        return video("no.mp4"), "video 'no.mp4' does not exist"
    if kind == "file outside":
        return video("/etc/hostname"), "video '/etc/hostname' lies outside the allowed folders"
    if kind == "address of a host":
        return video("https://example.org/a.mp4"), "videos are not fetched from https://"
    if kind == "data url":
        return video("data:video/mp4;base64,AAAA"), "not from data URLs"
    if kind == "playlist":  # FFmpeg would follow it
        (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
        return video("list.mp4"), "'list.mp4' is corrupt or no MP4"
    write_mp4(folder / "cut.mp4", 40, 10.0)
    whole = (folder / "cut.mp4").read_bytes()
    if kind == "no index":
        (folder / "cut.mp4").write_bytes(whole[:600])
        return video("cut.mp4"), "'cut.mp4' is corrupt"
    assert kind == "broken frames"
    place = whole.index(b"mdat") + 4
    end = whole.index(b"moov")
    (folder / "cut.mp4").write_bytes(whole[: place + 200] + b"\0" * (end - place - 200) + whole[end:])
    return video("cut.mp4"), "'cut.mp4' is corrupt"


KINDS_OF_BAD = [
    "missing frame",
    "frame outside",
    "corrupt frame",
    "odd frame size",
    "thin frames",
    "missing file",
    "file outside",
    "address of a host",
    "data url",
    "playlist",
    "no index",
    "broken frames",
]


@pytest.mark.parametrize("kind", KINDS_OF_BAD)
def test_a_bad_video_is_named_with_file_and_line_or_skipped(processor, tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    part, reason = bad_part(kind, folder)
    good = video(save(noise(2, 28, 28), folder, "good"))
    path = folder / "rows.jsonl"
    rows = [{"id": str(n), "message": chat(one, "?"), "answer": "1"} for n, one in enumerate((good, part, good))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        list(load_dataset(path, processor))
    assert str(error.value).startswith(f"{path}:2: ")
    assert reason in str(error.value)
    dataset = load_dataset(path, processor, on_bad_row="skip", rejected=tmp_path / "rejected.jsonl")
    assert [p.id for p in map(dataset.get, range(len(dataset))) if p is not None] == ["0", "2"]
    assert dataset.rejected == 1
    assert reason in json.loads((tmp_path / "rejected.jsonl").read_text())["reason"]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "video"}, "needs the address of a file or of each frame"),
        (video([]), "needs the address"),
        (video(["a.png", 3]), "needs the address"),
        (video("a.mp4", fps=0), "fps must be a positive number, found 0"),
        (video("a.mp4", fps="2"), "fps must be a positive number, found '2'"),
        (video("a.mp4", fps=1, nframes=4), "both fps and nframes"),
        (video("a.mp4", nframes=2.5), "nframes must be a whole number, found 2.5"),
        (video(["a.png", "b.png"], nframes=4), "nframes=4 and a list of 2 frames"),
        (video("a.mp4", video_start=3), "has the key 'video_start', which is not read"),
        (video("a.mp4", max_pixel=3), "did you mean 'max_pixels'"),
        (video("a.mp4", min_pixels=900, max_pixels=800), "min_pixels=900 above max_pixels=800"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(processor, part, reason):
    with pytest.raises(UserError, match=reason):
        processor.prompt(chat(part), origin="d.jsonl:1")


def test_options_of_qwens_message_format_are_understood(processor, tmp_path):
    names = save(noise(4, 28, 28), tmp_path)
    write_mp4(tmp_path / "a.mp4", 8, 4.0)
    for part in (
        video(names, sample_fps=4),
        video(names, fps=4, nframes=4),
        {"video": names, "fps": 4, "nframes": None, "image": None},
        {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 4},
        video(str(tmp_path / "a.mp4"), fps=4),
    ):
        assert processor.prompt(chat(part), folders=[tmp_path]).pictures[0].seconds_per_grid == 0.5


def test_placeholders_written_as_text_are_refused(processor, tmp_path):
    message = chat(video(save(noise(2, 28, 28), tmp_path)), "what is <|video_pad|>?")
    with pytest.raises(UserError, match=r"the text has 2 <\|video_pad\|> for 1 videos"):
        processor.prompt(message, folders=[tmp_path])


def test_a_huge_file_is_refused_unread(processor, tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", 4, 2.0)
    monkeypatch.setattr(videos, "MAX_VIDEO_BYTES", 100)
    with pytest.raises(UserError, match="larger than 0 MiB"):
        processor.prompt(chat(video("a.mp4")), folders=[tmp_path])


def test_frames_of_more_pixels_than_a_picture_may_have_are_refused(processor, tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", 4, 2.0)
    monkeypatch.setattr(videos, "MAX_PICTURE_PIXELS", 84 * 56 - 1)
    with pytest.raises(UserError, match="has 84×56 pixels a frame; 4703 are the most"):
        processor.prompt(chat(video("a.mp4")), folders=[tmp_path])


def test_an_engine_gets_frames_and_a_rate_that_gives_back_the_seconds():
    from eureka_megatron.rollout.engine import _video_item

    for fps in (0.3, 1.7, 2.0, 2.997, 23.976, 59.94):
        for dtype in (torch.float32, torch.bfloat16):
            seconds = torch.tensor(2 / fps).to(dtype).item()
            picture = replace(_plain(), seconds_per_grid=seconds)
            _, metadata = _video_item(picture)
            sampled = len(metadata["frames_indices"]) / metadata["total_num_frames"] * metadata["fps"]
            assert torch.tensor([2 / sampled]).to(dtype).item() == seconds


def _plain() -> Picture:
    empty = np.zeros(0, dtype=np.int64)
    return Picture(
        "k", None, (31, 4, 4), torch.empty(0, 1176), np.zeros((0, 2)), empty, empty, empty, frames=noise(62, 28, 28)
    )
