"""From the address of a video in a data file to RGB frames, one after the other, without trusting either.

A video is a list of pictures, one a frame, or a file of one of the kinds in `KINDS`; their addresses obey the rules of `pictures`. A file
is recognised by its first bytes, because the decoder goes by content and would follow a playlist named a.mp4 to other files and hosts.

Files are decoded by OpenCV (FFmpeg inside), imported when the first one is opened. At most one frame of full size is in memory.
"""

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eureka_megatron.data.chat import Address, Visual
from eureka_megatron.data.pictures import MAX_PICTURE_PIXELS, load_picture, locate, short
from eureka_megatron.errors import UserError

MAX_VIDEO_BYTES = 2 * 1024**3
LOST_FRAMES = 2  # how many fewer frames than its header says a sound file may hold: headers round

# Which frames of a file to take: (frames of the file, frames a second of the file) → indices, ascending.
Choose = Callable[[int, float], Sequence[int]]


@dataclass(frozen=True)
class Clip:
    """The frames of a video, not decoded yet. Example: Clip(frames=…, count=12, fps=2.0) lasts six seconds."""

    frames: Generator[np.ndarray, None, None]  # uint8 RGB [height, width, 3] each
    count: int
    fps: float  # of these frames, not of the file they come from


def check_video(visual: Visual, folders: Sequence[Path]) -> None:
    """What can be told of a video without decoding it.

    Raises:
        UserError: a file is missing, lies outside `folders`, is no video, or there is nothing to decode it with.
    """
    if visual.listed:
        for address in visual.addresses:
            locate(address, folders)
    else:
        _check_file(visual.addresses[0], folders)


def open_clip(visual: Visual, folders: Sequence[Path], *, choose: Choose, fps: float, max_frames: int) -> Clip:
    """The frames of a video.

    Args:
        choose: called for a file only; a list of frames is taken whole.
        fps: of a list of frames that does not say.
        max_frames: of a list; `choose` minds it for files.

    Raises:
        UserError: as `check_video`; too many or too large frames, or a file whose header makes no sense. Iterating raises it for a
            corrupt frame. Names the video or frame.
    """
    if not visual.listed:
        return _open_file(visual.addresses[0], folders, choose)
    count = len(visual.addresses)
    if count > max_frames:
        raise UserError(
            f"the video of {short(visual.addresses[0])} … has {count} frames; data.video_max_frames={max_frames}"
        )
    frames = (np.asarray(load_picture(address, folders)) for address in visual.addresses)
    return Clip(frames, count, visual.fps or fps)


def _check_file(address: Address, folders: Sequence[Path]) -> Path:
    path = locate(address, folders, "video")
    if path is None:
        raise UserError(f"video {short(address)}: videos are read from files, not from data URLs or bytes")
    if path.stat().st_size > MAX_VIDEO_BYTES:
        raise UserError(f"video {short(address)} is larger than {MAX_VIDEO_BYTES >> 20} MiB")
    with path.open("rb") as file:
        head = file.read(12)
    if not (head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or (head[:4] == b"RIFF" and head[8:] == b"AVI ")):
        raise UserError(f"video {short(address)} is corrupt or no MP4, MOV, MKV, WebM or AVI file")
    _decoder()
    return path


def _decoder() -> Any:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a file is told in our error
    try:
        import cv2
    except ImportError:
        raise UserError(
            "video files are decoded by OpenCV, which is not installed: pip install 'eureka-megatron[video]' "
            "(a video given as a list of pictures needs no decoder)"
        ) from None
    return cv2


def _open_file(address: Address, folders: Sequence[Path], choose: Choose) -> Clip:
    path, cv2 = _check_file(address, folders), _decoder()
    # One thread a file: parallelism is that of data.workers.
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise UserError(f"video {short(address)} is corrupt or of a kind that OpenCV does not decode")
    total, fps = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > MAX_PICTURE_PIXELS:
        raise UserError(
            f"video {short(address)} has {width}×{height} pixels a frame; {MAX_PICTURE_PIXELS} are the most"
        )
    if total < 1 or not 0 < fps < 1e4:
        raise UserError(f"video {short(address)} is corrupt: its header says {total} frames at {fps:g} a second")
    indices = [int(index) for index in choose(total, fps)]
    return Clip(_decode(capture, indices, total, address), len(indices), len(indices) / total * fps)


def _decode(capture: Any, indices: Sequence[int], total: int, address: Address) -> Generator[np.ndarray, None, None]:
    """The frames at `indices`. Frames between them are skipped, yet must be decoded: each builds upon the last."""
    cv2, place, frame = _decoder(), -1, None
    try:
        for index in indices:
            while place < index and capture.grab():
                place += 1
            if place == index:
                found, frame = capture.retrieve()
                if not found:
                    raise UserError(f"video {short(address)} is corrupt at frame {index}")
            elif frame is None or place + 1 < total - LOST_FRAMES:
                raise UserError(f"video {short(address)} is corrupt: it breaks off after {place + 1} of {total} frames")
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
