"""Read a picture whose maker nobody knows: limits before anything is decoded, and one way to get to red, green and blue.

A picture is never a reason to stop. What cannot be read raises :class:`PictureError` with the reason in words; whoever reads
many counts the reasons.
"""

import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_llm.content.media.kinds import UnreadableError, read_limited

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # Pillow would try some forty, one of which starts another program
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MAX_BYTES = 20 << 20
MAX_PIXELS = 25_000_000
MAX_WEBP_PIXELS = 9_000_000  # its decoder holds four copies: 390 MB for 25 megapixels
MAX_ASPECT = 40  # of the sides; a line of one pixel would become a huge picture where the shorter side is enlarged
STRIP_PIXELS = 1 << 20  # of a large picture that are converted at once


class PictureError(UnreadableError):
    """A picture that counts as missing; the message is the reason, in words that are the same for the same fault."""


def require_pillow() -> Any:
    """Import Pillow's ``Image``.

    Raises:
        ValueError: if it is not installed; says how.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("Pictures need Pillow: pip install -e '.[images]' in the checkout.") from error
    return Image


def read_bytes(path: Path) -> bytes:
    """Read a picture's file.

    Raises:
        PictureError: if it is no file, is empty or is larger than ``MAX_BYTES``.
    """
    return read_limited(path, MAX_BYTES, PictureError)


def check_header(data: bytes) -> None:
    """Check what a picture's header says; nothing is decoded.

    Raises:
        PictureError: if it is none of ``FORMATS``, too large or too narrow.
    """
    Image = require_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_size(Image.open(BytesIO(data), formats=FORMATS))
    except PictureError:
        raise
    except Exception as error:
        raise _refusal(error) from None


def open_picture(data: bytes, side: int) -> "Image.Image":
    """Decode a picture to RGB: its first frame, upright as its camera says, transparency on white.

    Args:
        data: the file.
        side: the shorter side that is wanted. Larger pictures are reduced by whole numbers, to not less than twice of it.

    Raises:
        PictureError: if it is none of ``FORMATS``, too large, too narrow, or damaged.
    """
    Image = require_pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below, and of damaged metadata
            picture = Image.open(BytesIO(data), formats=FORMATS)
            _check_size(picture)
            if picture.format == "JPEG":
                picture.draft("RGB", (2 * side, 2 * side))
            picture.load()
            return _upright(_reduced(picture, side))
    except PictureError:
        raise
    except Exception as error:  # decoders raise whatever their input makes them trip over
        raise _refusal(error) from None


def _refusal(error: Exception) -> PictureError:
    """The reason in words."""
    Image = require_pillow()
    if isinstance(error, Image.DecompressionBombError):
        return PictureError(f"more than {MAX_PIXELS // 10**6} megapixels")
    if isinstance(error, MemoryError):
        return PictureError("not enough memory to decode it")
    if isinstance(error, Image.UnidentifiedImageError):
        return PictureError(f"none of {', '.join(FORMATS)}")
    return PictureError(f"damaged ({type(error).__name__})")


def _check_size(picture: "Image.Image") -> None:
    (width, height), most = picture.size, MAX_WEBP_PIXELS if picture.format == "WEBP" else MAX_PIXELS
    if width < 1 or height < 1:
        raise PictureError("no pixels")
    if width * height > most:
        raise PictureError(f"more than {most // 10**6} megapixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PictureError(f"one side is more than {MAX_ASPECT} times the other")


def _reduced(picture: "Image.Image", side: int) -> "Image.Image":
    """The picture as RGB, reduced strip by strip, so that no second one of its size is held."""
    Image = require_pillow()
    width, height = picture.size
    factor = max(min(width, height) // (2 * side), 1)
    rows = max(STRIP_PIXELS // width // factor, 1) * factor
    if factor == 1 and height <= rows:
        return _on_white(picture)
    size = -(-width // factor), -(-height // factor)
    whole = Image.new("RGB", size)
    for top in range(0, height, rows):
        strip = _on_white(picture.crop((0, top, width, min(top + rows, height))))
        whole.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    whole.info["exif"] = picture.info.get("exif", b"")
    return whole


def _on_white(picture: "Image.Image") -> "Image.Image":
    """RGB; what is transparent is white, whatever colour is hidden under it."""
    Image = require_pillow()
    exif = picture.info.get("exif", b"")
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert would clip
        levels = np.clip(np.asarray(picture).astype(np.int64), 0, 65535) >> 8
        picture = Image.fromarray(levels.astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        shown = picture.convert("RGBA")
        white = Image.new("RGBA", shown.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, shown)
    found = picture.convert("RGB")
    found.info["exif"] = exif
    return found


def _upright(picture: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged metadata says nothing of the pixels
        return picture
