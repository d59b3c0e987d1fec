"""Pictures from strangers: what is decoded, what is refused, and that small ones stay crisp."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from hub.adapters.pictures import (
    BadPicture,
    Facts,
    cached_thumbnail,
    make_thumbnail,
    read_facts,
    thumbnail_size,
)
from tests.fixtures.catalogue import picture


def put(folder: Path, content: bytes) -> Path:
    path = folder / "picture"
    path.write_bytes(content)
    return path


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_becomes_a_webp_of_the_asked_width(tmp_path: Path, format: str) -> None:
    made = make_thumbnail(put(tmp_path, picture(800, 400, format=format)), 320)
    with Image.open(io.BytesIO(made)) as image:
        assert (image.format, image.size) == ("WEBP", (320, 160))


def test_tiny_pictures_are_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    source = Image.new("RGB", (4, 2))
    source.putdata([(i * 30, 255 - i * 30, i) for i in range(8)])
    source.save(tmp_path / "tiny.png")
    made = make_thumbnail(tmp_path / "tiny.png", 160)
    with Image.open(io.BytesIO(made)) as image:
        assert image.size == (160, 80)
        pixels = image.convert("RGB")
        for x in range(160):
            for y in range(80):
                assert pixels.getpixel((x, y)) == source.getpixel((x // 40, y // 40))


@pytest.mark.parametrize(
    ("source", "target", "size"),
    [
        ((64, 64), 160, (192, 192)),
        ((64, 64), 320, (320, 320)),
        ((256, 128), 320, (512, 256)),
        ((1, 256), 320, (5, 1280)),
        ((2, 200), 320, (12, 1200)),
        ((300, 200), 640, (300, 200)),
        ((1024, 1536), 320, (320, 480)),
        ((10, 4000), 160, (2, 640)),
        ((4000, 1), 160, (160, 1)),
    ],
)
def test_sizes(source: tuple[int, int], target: int, size: tuple[int, int]) -> None:
    assert thumbnail_size(*source, target) == size


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (png_claiming(50_000, 50_000), "pixels"),
        (png_claiming(8_000, 5_001), "more than 40,000,000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "not a PNG"),
        (b"", "not a PNG"),
        (b"II*\0\x08\0\0\0", "not a PNG"),
    ],
)
def test_what_is_not_a_picture_here_is_refused_before_it_is_decoded(
    tmp_path: Path, content: bytes, why: str
) -> None:
    with pytest.raises(BadPicture, match=why):
        read_facts(put(tmp_path, content))


def test_a_picture_that_ends_early_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = put(tmp_path, picture(300, 300)[:-200])
    cache = tmp_path / "thumbs"
    with pytest.raises(BadPicture, match="damaged"):
        cached_thumbnail(cache, "ab" * 32, path, 320)
    assert not cache.exists()


def test_nothing_but_pixels_is_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    exif[0x010F] = "Camera of a named person"
    Image.new("RGB", (400, 300), "red").save(tmp_path / "p.jpg", exif=exif, comment=b"secret")
    assert read_facts(tmp_path / "p.jpg") == Facts(300, 400, None, None)
    with Image.open(io.BytesIO(make_thumbnail(tmp_path / "p.jpg", 160))) as image:
        assert image.size == (160, 213)
        assert not image.getexif()
        assert set(image.info) <= {"loop", "background", "timestamp", "duration"}


@pytest.mark.parametrize(
    ("parameters", "prompt", "negative"),
    [
        ("a fox\nNegative prompt: blur\nSteps: 20, Seed: 1", "a fox", "blur"),
        ("a fox\nSteps: 20", "a fox", None),
        ('{"nodes": []}', None, None),
        ("x" * 5000, "x" * 2000, None),
    ],
)
def test_prompts_in_png_files(
    tmp_path: Path, parameters: str, prompt: str, negative: str | None
) -> None:
    facts = read_facts(put(tmp_path, picture(parameters=parameters)))
    assert (facts.prompt, facts.negative_prompt) == (prompt, negative)


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (400, 400), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(make_thumbnail(tmp_path / "a.webp", 160))) as image:
        assert getattr(image, "n_frames", 1) == 1
        red, _, blue = image.convert("RGB").getpixel((80, 80))
        assert red > 200
        assert blue < 50
