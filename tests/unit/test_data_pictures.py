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
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(folder / "palette.png")
    assert load_picture("palette.png", [folder]).getpixel((0, 0)) == (9, 8, 7)


def test_the_cameras_orientation_mark_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    assert load_picture("turned.jpg", [folder]).size == (20, 30)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_tiff(values: np.ndarray, order: str) -> bytes:
    """Uncompressed grey of any width and byte order, written by hand: Pillow writes only the machine's own order."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    fields = [
        (256, width),
        (257, height),
        (258, 8 * values.dtype.itemsize),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 12 * 9 + 4),
    ]
    fields += [(278, height), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in fields)
    mark = b"MM" if order == ">" else b"II"
    return mark + struct.pack(f"{order}HIH", 42, 8, len(fields)) + entries + bytes(4) + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("u2", [0, 255, 256, 32768, 40000, 65535], [0, 0, 1, 128, 156, 255]),
        ("i2", [-5, 0, 128, 255], [0, 0, 128, 255]),
        ("i2", [-5, 256, 32767], [0, 1, 127]),
        ("i4", [0, 128, 255], [0, 128, 255]),
        ("i4", [-1, 300, 32768, 65535], [0, 1, 128, 255]),
        ("i4", [0, 2**30, 2**31 - 1], [0, 128, 255]),
        ("f4", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("f4", [-1.0, 0.5, 128.0, 255.0], [0, 0, 128, 255]),
        ("f4", [0.0, 32768.0, 65535.0, np.nan], [0, 128, 255, 0]),
    ],
)
def test_grey_of_more_than_eight_bits_keeps_its_shade(dtype, values, expected, order):
    found = load_picture(grey_tiff(np.array([values], dtype=dtype), order), ())
    assert [found.getpixel((x, 0)) for x in range(len(values))] == [(value,) * 3 for value in expected]


def test_grey_of_sixteen_bits_in_other_files():
    deep = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert load_picture(encoded(deep, "PNG"), ()).getpixel((0, 0)) == (156, 156, 156)
    assert load_picture(encoded(deep, "PNG", transparency=40000), ()).getpixel((0, 0)) == (255, 255, 255)
    assert load_picture(encoded(deep, "PNG", transparency=40001), ()).getpixel((0, 0)) == (156, 156, 156)


def broken_exif() -> list[bytes]:
    """A sound block of EXIF with its bytes overwritten and cut in every which way, and noise."""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    exif[0x8769] = {0x9286: b"abc", 0xA002: 30}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    random, sound = np.random.default_rng(0), exif.tobytes()
    found = [b"", b"\0", b"II*\0", b"Exif\0\0MM", sound[:20], bytes.fromhex("00080002011200030000")]
    for _ in range(60):
        block = np.frombuffer(sound, np.uint8).copy()
        block[random.integers(0, len(block), 4)] = random.choice([0, 255, 18, 1], 4)
        found += [block.tobytes(), block.tobytes()[: random.integers(0, len(block))], random.bytes(40)]
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO", "TIFF"])
def test_broken_exif_does_not_cost_a_sound_picture(kind):
    for block in broken_exif():
        try:
            data = encoded(Image.new("RGB", (30, 20), (90, 90, 90)), kind, exif=block)
        except Exception:  # Pillow reads the block to write a TIFF
            continue
        found = load_picture(data, ())
        assert sorted(found.size) == [20, 30]
        assert found.getpixel((3, 3)) == (90, 90, 90)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_applied_once(kind, orientation):
    corner = Image.new("L", (32, 16), 0)
    corner.paste(255, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = load_picture(encoded(corner, kind, exif=exif), ())
    width, height = found.size
    places = {"left top": (2, 2), "right top": (-3, 2), "left bottom": (2, -3), "right bottom": (-3, -3)}
    bright = [name for name, (x, y) in places.items() if found.getpixel((x % width, y % height))[0] > 128]
    turned = {2: "right top", 3: "right bottom", 4: "left bottom", 6: "right top", 7: "right bottom", 8: "left bottom"}
    assert bright == [turned.get(orientation, "left top")]
    assert (width, height) == ((16, 32) if 5 <= orientation <= 8 else (32, 16))


def test_the_first_picture_of_a_file_of_several_is_shown():
    several = [Image.new("RGB", (30, 20), (shade,) * 3) for shade in (90, 200)]
    data = encoded(several[0], "MPO", save_all=True, append_images=several[1:])
    for found in (data, data[: data.index(b"\xff\xd9") + 2]):  # the second cut off, as uploads do
        assert load_picture(found, ()).getpixel((0, 0)) == (90, 90, 90)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP", b"II*\0", b"BM"]
)
def test_what_is_no_picture_is_told_with_the_kinds_that_are(data):
    with pytest.raises(UserError, match="corrupt or no picture") as told:
        load_picture(data, ())
    assert "MPO" not in str(told.value)
    assert "0x" not in str(told.value)  # no address of a Python object


def test_what_cannot_be_a_path_is_told_and_not_tried(folder):
    loop = folder / "loop.png"
    loop.symlink_to(loop)
    (folder / "there.png").symlink_to("back.png")
    (folder / "back.png").symlink_to("there.png")
    picture = base64.b64encode((folder / "images" / "red one.png").read_bytes() * 3).decode()
    addresses = {"loop.png": "does not exist", "there.png": "does not exist", "x" * 250 + ".png": "does not exist"}
    addresses |= dict.fromkeys((picture, "/9j/" + picture, "a/" * 3000), "base64 data begin with data:image/…;base64,")
    for address, reason in addresses.items():
        with pytest.raises(UserError, match=reason) as told:
            load_picture(address, [folder])
        assert len(str(told.value)) < 500


def test_a_data_url_of_other_characters_is_told(folder):
    with pytest.raises(UserError, match="not base64"):
        load_picture("data:image/png;base64,Ä", [folder])
