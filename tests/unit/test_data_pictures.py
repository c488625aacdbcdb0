"""Addresses of pictures in data files are not trusted, and neither are the bytes behind them."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from eureka_megatron.data import pictures
from eureka_megatron.data.pictures import load_picture, locate
from eureka_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    Image.new("RGB", (30, 20), (200, 10, 10)).save(data / "images" / "red one.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    return data


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims any size in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_picture_is_found_by_every_kind_of_address(folder):
    path = folder / "images" / "red one.png"
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for address in ("images/red one.png", str(path), f"file://{path}", path.as_uri(), f"file://localhost{path}", url):
        picture = load_picture(address, [folder])
        assert picture.size == (30, 20), address
        assert picture.getpixel((3, 3)) == (200, 10, 10)


def test_media_folders_are_searched_too(folder, tmp_path):
    with pytest.raises(UserError, match="outside the allowed folders"):
        locate(str(tmp_path / "secret.png"), [folder])
    assert locate("secret.png", [folder, tmp_path]) == (tmp_path / "secret.png").resolve()


@pytest.mark.parametrize(
    "address", ["../secret.png", "images/../../secret.png", "/etc/hostname", "file:///etc/hostname"]
)
def test_pictures_outside_the_allowed_folders_are_refused(folder, address):
    with pytest.raises(UserError, match=r"outside the allowed folders .* add its folder to data\.media"):
        load_picture(address, [folder])


def test_a_link_does_not_lead_out_of_the_allowed_folders(folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="outside the allowed folders"):
        load_picture("link.png", [folder])


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("images/none.png", "does not exist"),
        ("images", "does not exist"),
        ("https://example.org/a.png", "not fetched from https://"),
        ("file://host/a.png", "three slashes"),
        ("data:text/plain;base64,AAAA", "data URL starts with"),
        ("data:image/png,AAAA", "data URL starts with"),
        ("data:image/png;base64,A?AA", "not base64"),
        ("data:image/png;base64,AAAA", "corrupt or no picture"),
        ("a\0b.png", "NUL"),
    ],
)
def test_addresses_that_lead_nowhere_are_named(folder, address, reason):
    with pytest.raises(UserError, match=reason):
        load_picture(address, [folder])


def test_corrupt_and_truncated_pictures_are_named(folder):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(whole, "PNG")
    for name, data in {"cut.png": whole.getvalue()[:3000], "text.png": b"hello", "empty.png": b""}.items():
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=f"'{name}' is corrupt or no picture"):
            load_picture(name, [folder])


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (60000, 60000)])
def test_decompression_bombs_are_refused_before_decoding(folder, width, height):
    (folder / "bomb.png").write_bytes(png_header(width, height))
    with pytest.raises(UserError, match=r"'bomb.png' has .*67108864"):
        load_picture("bomb.png", [folder])


def test_huge_files_are_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 1 << 20)
    (folder / "huge.png").write_bytes(b"\0" * ((1 << 20) + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load_picture("huge.png", [folder])


def test_formats_that_run_programs_are_not_opened(folder):
    (folder / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="corrupt or no picture"):
        load_picture("a.eps", [folder])


def test_every_mode_becomes_rgb_as_a_person_sees_it(folder):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "clear.png")
    assert load_picture("clear.png", [folder]).getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (4, 4), 77).save(folder / "grey.png")
    assert load_picture("grey.png", [folder]).getpixel((0, 0)) == (77, 77, 77)
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(folder / "deep.png")
    assert load_picture("deep.png", [folder]).getpixel((0, 0)) == (156, 156, 156)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(folder / "palette.png")
    assert load_picture("palette.png", [folder]).getpixel((0, 0)) == (9, 8, 7)


def test_the_cameras_orientation_mark_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    assert load_picture("turned.jpg", [folder]).size == (20, 30)
