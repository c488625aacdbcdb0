"""From the address of a picture in a data file to RGB pixels, without trusting either.

An address is `file://…`, a plain path (relative ones are looked up in the allowed folders), a base64 data URL, or the bytes themselves. Files must
lie, links resolved, inside an allowed folder: a data file from elsewhere can then not read this machine's other files. Size
is judged from the header before a pixel is decoded, and only formats whose decoders run nothing else are opened.
"""

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps

from eureka_megatron.data.chat import Address
from eureka_megatron.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
MAX_PICTURE_PIXELS = 64 * 1024 * 1024  # decoded: 192 MiB as RGB
MAX_PICTURE_BYTES = 64 * 1024 * 1024


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
    roots = [folder.resolve() for folder in folders]
    inside = [found for found in (candidate.resolve() for candidate in candidates) if _within(found, roots)]
    if not inside:
        raise UserError(
            f"{what} {short(address)} lies outside the allowed folders ({', '.join(map(str, folders))}); "
            "add its folder to data.media"
        )
    existing = next((found for found in inside if found.is_file()), None)
    if existing is None:
        raise UserError(f"{what} {short(address)} does not exist (looked for {inside[0]})")
    return existing


def load_picture(address: Address, folders: Sequence[Path]) -> Image.Image:
    """Decode a picture to RGB; transparency becomes white, the camera's orientation mark is applied.

    Raises:
        UserError: as `locate`; or the data are corrupt, of another format, or too large. Names the picture.
    """
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
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower and an error
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PICTURE_PIXELS:
                    raise UserError(
                        f"picture {short(address)} has {picture.width}×{picture.height} pixels; "
                        f"{MAX_PICTURE_PIXELS} are the most"
                    )
                return _to_rgb(ImageOps.exif_transpose(picture))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"picture {short(address)} has far more than {MAX_PICTURE_PIXELS} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        raise UserError(f"picture {short(address)} is corrupt or no picture: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":  # 16-bit grey: Pillow would clip it to white
        return picture.point(lambda value: value / 256).convert("L").convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _decode_data_url(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64") or not head.startswith("data:image/"):
        raise UserError(f"picture {short(address)}: a data URL starts with data:image/…;base64,")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"picture {short(address)}: not base64 ({error})") from None


def _within(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def short(address: Address) -> str:
    """An address as a message shows it: quoted, and cut when it is a data URL."""
    if isinstance(address, bytes):
        return f"of {len(address)} bytes in the row"
    return repr(address if len(address) <= 120 else address[:60] + "…")
