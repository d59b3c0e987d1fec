"""Pictures that people send: what may be decoded, and the thumbnails that are shown instead.

Originals are never served inside a page: everything shown is re-encoded here, one frame,
without metadata.
"""

import io
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

# An explicit list: Pillow would also open EPS (through Ghostscript), TIFF and JPEG 2000.
FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 40_000_000
MAX_BYTES = 64 * 2**20
MAX_PROMPT = 2000
WIDTHS = (160, 320, 640, 1280)
CARD_WIDTH = 320
# A source this small is pixels that somebody drew or a tiny model made: enlarged, never blurred.
TINY = 256

# Decoding is the one thing here that takes much memory: one picture at a time.
_decoding = threading.Semaphore(1)

log = logging.getLogger(__name__)


class BadPicture(Exception):
    """A file that is not shown; the message says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """`prompt` is what AUTOMATIC1111 and others write into a PNG's `parameters`."""

    width: int
    height: int
    prompt: str | None
    negative_prompt: str | None


def read_facts(path: Path) -> Facts:
    """From the picture's header alone; BadPicture."""
    with _open(path) as image:
        width, height = _upright(image)
        prompt, negative = _parameters(image.info.get("parameters"))
    return Facts(width, height, prompt, negative)


def thumbnail_size(width: int, height: int, target: int) -> tuple[int, int]:
    """Of the thumbnail for a class of WIDTHS: at most that wide and four times that high.

    A tiny picture is enlarged a whole number of times, until it is about as wide.
    """
    if max(width, height) <= TINY:
        times = max(1, min(-(-target // width), 4 * target // height))
        return width * times, height * times
    scale = min(1.0, target / width, 4 * target / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def make_thumbnail(source: Path, target: int) -> bytes:
    """WebP of `source`; BadPicture."""
    with _decoding, _open(source) as image:
        size = thumbnail_size(*_upright(image), target)
        is_tiny = max(image.size) <= TINY
        try:
            if image.format == "JPEG":
                image.draft("RGB", (size[0] * 2, size[1] * 2))
            shown = image if image.format == "PNG" else ImageOps.exif_transpose(image)
            shown = shown.convert("RGBA" if shown.has_transparency_data else "RGB")
            resample = Image.Resampling.NEAREST if is_tiny else Image.Resampling.LANCZOS
            shown = shown.resize(size, resample)
            # Pixel pictures as they are: lossy coding would smear their edges.
            out = io.BytesIO()
            shown.save(out, "WEBP", lossless=is_tiny, quality=80, method=4)
        except (OSError, ValueError, SyntaxError) as error:
            raise BadPicture(f"the picture is damaged: {error}") from None
    return out.getvalue()


def cached_thumbnail(cache: Path, sha256: str, source: Path, target: int) -> bytes:
    """The thumbnail from the cache folder, made first if need be; BadPicture.

    A cache that cannot be written to, on a full disk, costs time and nothing else.
    """
    place = cache / sha256[:2] / f"{sha256}-{target}.webp"
    try:
        return place.read_bytes()
    except OSError:  # not made yet, or the cache is out of order
        data = make_thumbnail(source, target)
    temporary = place.with_suffix(f".{threading.get_ident()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(place)
    except OSError as error:
        log.warning("thumbnail %s is not cached: %s", place.name, error)
        with suppress(OSError):
            temporary.unlink()
    return data


def _open(path: Path) -> Image.Image:
    if path.stat().st_size > MAX_BYTES:
        raise BadPicture(f"the picture has more than {MAX_BYTES // 2**20} MiB")
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        raise BadPicture("not a PNG, JPEG or WebP picture") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture(f"more than {MAX_PIXELS:,} pixels") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadPicture(f"the picture is damaged: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise BadPicture(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


def _upright(image: Image.Image) -> tuple[int, int]:
    # EXIF orientations 5 to 8 lie on their side. For a PNG, Pillow would decode all of it to know.
    if image.format != "PNG" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
        return image.height, image.width
    return image.width, image.height


def _parameters(text: object) -> tuple[str | None, str | None]:
    """Prompt and negative prompt; ComfyUI and others put JSON there, which says nothing here."""
    if not isinstance(text, str) or text.lstrip().startswith(("{", "[")):
        return None, None
    prompt, _, rest = text.partition("\nSteps: ")[0].partition("\nNegative prompt:")
    return prompt.strip()[:MAX_PROMPT] or None, rest.strip()[:MAX_PROMPT] or None
