"""From the address of a picture in a data file to RGB pixels, without trusting either.

An address is `file://…`, a plain path (relative ones are looked up in the allowed folders), a base64 data URL, or the bytes themselves. Files must
lie, links resolved, inside an allowed folder: a data file from elsewhere can then not read this machine's other files. Size
is judged from the header before a pixel is decoded, and only formats whose decoders run nothing else are opened.
"""

import base64
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from eureka_megatron.data.chat import Address
from eureka_megatron.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # a JPEG of several pictures, MPO, is opened as JPEG
MAX_PICTURE_PIXELS = 64 * 1024 * 1024  # decoded: 192 MiB as RGB
MAX_PICTURE_BYTES = 64 * 1024 * 1024
MAX_ADDRESS = 255  # characters that a message shows where a file was looked for; what is longer is hardly a path
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's number of the orientation


def locate(address: Address, folders: Sequence[Path], what: str = "picture") -> Path | None:
    """The file an address points to; None for a data URL and for bytes. `what` is for messages.

    Raises:
        UserError: the file is missing, lies outside `folders`, or the address is of another kind.
    """
    if isinstance(address, bytes) or address.startswith("data:"):
        return None
    scheme, separator, _ = address.partition("://")
    if separator and scheme != "file":
        raise UserError(f"{what} {short(address)}: {what}s are not fetched from {scheme}:// addresses; download them")
    path = Path(address)
    if separator:
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise UserError(
                f"{what} {short(address)}: file:// addresses have three slashes (found host {parts.netloc})"
            )
        path = Path(unquote(address.removeprefix("file://").removeprefix("localhost")))
    if "\0" in str(path):
        raise UserError(f"{what} {short(address)}: the path holds a NUL character")
    candidates = [path] if path.is_absolute() else [folder / path for folder in folders]
    # os.path, not Path: names that are too long and circles of links are no files, and no errors.
    roots = [os.path.realpath(folder) for folder in folders]
    inside = [
        found for found in (Path(os.path.realpath(candidate)) for candidate in candidates) if _within(found, roots)
    ]
    if existing := next((found for found in inside if os.path.isfile(found)), None):
        return existing
    if len(address) > MAX_ADDRESS:
        raise UserError(f"{what} {short(address)} is no file's path; base64 data begin with data:image/…;base64,")
    if not inside:
        raise UserError(
            f"{what} {short(address)} lies outside the allowed folders ({', '.join(map(str, folders))}); "
            "add its folder to data.media"
        )
    raise UserError(f"{what} {short(address)} does not exist (looked for {inside[0]})")


def load_picture(address: Address, folders: Sequence[Path]) -> Image.Image:
    """Decode a picture to RGB; transparency becomes white, the camera's orientation mark is applied, other EXIF is not looked at.

    Raises:
        UserError: as `locate`; or the data are corrupt, of another format, or too large. Names the picture.
    """
    with _opened(address, folders) as picture:
        picture.load()
        turn = _rotation(picture)
        return _to_rgb(picture) if turn is None else _to_rgb(picture).transpose(turn)


def picture_size(address: Address, folders: Sequence[Path]) -> tuple[int, int]:
    """Width and height by the header, before any orientation mark. Raises as `load_picture`, but for what only decoding shows."""
    with _opened(address, folders) as picture:
        return picture.size


@contextmanager
def _opened(address: Address, folders: Sequence[Path]) -> Iterator[Image.Image]:
    """A picture whose header has been read; what goes wrong inside the block is an error of the picture, too."""
    path = locate(address, folders)
    try:
        data = path.read_bytes() if path and path.stat().st_size <= MAX_PICTURE_BYTES else None
    except OSError as error:
        raise UserError(f"picture {short(address)} cannot be read: {error.strerror}") from error
    if path is None:
        data = address if isinstance(address, bytes) else _decode_data_url(address)
    if data is None or len(data) > MAX_PICTURE_BYTES:
        raise UserError(f"picture {short(address)} is larger than {MAX_PICTURE_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # our own limit of pixels is lower and an error; broken EXIF does not matter
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PICTURE_PIXELS:
                    raise UserError(
                        f"picture {short(address)} has {picture.width}×{picture.height} pixels; "
                        f"{MAX_PICTURE_PIXELS} are the most"
                    )
                yield picture
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"picture {short(address)} is corrupt or no picture ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise UserError(f"picture {short(address)} has far more than {MAX_PICTURE_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        raise UserError(f"picture {short(address)} is corrupt or no picture: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":  # Pillow would clip everything above 255 to white
        return Image.fromarray(_eight_bits(picture)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _rotation(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _ROTATIONS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF, of which Pillow raises nearly anything, does not cost a sound picture
        return None


def _eight_bits(picture: Image.Image) -> np.ndarray:
    """uint8 [height, width] of grey with more bits, of any byte order.

    16 bits span black to white. Of 32 bits, whole or floating, files do not say what is white: it is the smallest of 1 (floating), 255, 65535
    and 2³¹ − 1 that no pixel exceeds.
    """
    grey = np.nan_to_num(np.asarray(picture).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    most = grey.max()
    if picture.mode == "F" and most <= 1:
        values = np.rint(255 * grey)
    elif picture.mode.startswith("I;16") or 255 < most <= 65535:
        values = grey / 2**8
    else:
        values = grey if most <= 255 else grey / 2**23
    clear = picture.info.get("transparency")
    return np.where(grey == clear if isinstance(clear, int) else False, 255, values.clip(0, 255)).astype(np.uint8)


def _decode_data_url(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64") or not head.startswith("data:image/"):
        raise UserError(f"picture {short(address)}: a data URL starts with data:image/…;base64,")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise UserError(f"picture {short(address)}: not base64 ({error})") from None


def _within(path: Path, roots: Sequence[str]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def short(address: Address) -> str:
    """An address as a message shows it: quoted, and cut when it is a data URL."""
    if isinstance(address, bytes):
        return f"of {len(address)} bytes in the row"
    return repr(address if len(address) <= 120 else address[:60] + "…")
