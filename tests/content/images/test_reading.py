"""Pictures of every form come to RGB, and what is too large or damaged is refused before it costs anything."""

import io
import os
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from recbole_llm.content.images import reading
from recbole_llm.content.images.reading import PictureError, open_picture, read_bytes

RNG = np.random.default_rng(0)


def saved(picture, kind="PNG", **settings):
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def coloured(width=40, height=30):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_formats_that_lose_nothing_give_their_pixels():
    picture = coloured()
    for data in (saved(picture), saved(picture, "WEBP", lossless=True)):
        found = open_picture(data, 224)
        assert found.mode == "RGB" and (np.asarray(found) == np.asarray(picture)).all()


def test_what_is_transparent_is_white():
    rgba = np.zeros((10, 12, 4), np.uint8)
    rgba[..., 0] = 255  # red under full transparency
    rgba[:, :4, 3], rgba[:, 4:8, 3] = 255, 128
    found = np.asarray(open_picture(saved(Image.fromarray(rgba)), 8))
    assert found[0, 0].tolist() == [255, 0, 0] and found[0, 11].tolist() == [255, 255, 255]
    assert found[0, 5].tolist() == [255, 127, 127]
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    index = palette.getpixel((0, 0))
    assert np.asarray(open_picture(saved(palette, transparency=index), 8)).min() == 255
    grey = Image.fromarray(np.dstack([np.zeros((5, 5), np.uint8)] * 2), "LA")
    assert np.asarray(open_picture(saved(grey), 8)).min() == 255


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped():
    levels = np.linspace(0, 65535, 200).reshape(10, 20).astype(np.uint16)
    found = np.asarray(open_picture(saved(Image.fromarray(levels)), 8))
    assert (found[..., 0] == levels >> 8).all()


def test_the_camera_says_what_is_up():
    picture = coloured(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    found = open_picture(saved(picture, exif=exif), 8)
    assert found.size == (20, 40)
    assert (np.asarray(found) == np.asarray(picture.transpose(Image.Transpose.ROTATE_270))).all()


def test_the_first_frame_counts():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = saved(red, "GIF", save_all=True, append_images=[blue], duration=10)
    assert np.asarray(open_picture(data, 8))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_large_pictures_are_reduced_strip_by_strip_as_at_once(mode, monkeypatch):
    picture = coloured(330, 250)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(RNG.integers(0, 256, (250, 330), dtype=np.uint8)))
    data = saved(picture)
    white = Image.new("RGBA", picture.size, "white")
    whole = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB").reduce(3)
    for pixels in (1 << 20, 5000, 1):
        monkeypatch.setattr(reading, "STRIP_PIXELS", pixels)
        found = open_picture(data, 40)
        assert found.size == (110, 84)
        assert (np.asarray(found) == np.asarray(whole)).all()


def png_of(width, height):
    """A PNG that says it has so many pixels, and holds few bytes."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    packed = zlib.compress(b"\0" * min(height * (width + 1), 10**6))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BOMBS = {
    "megapixels": png_of(9000, 9000),
    "more megapixels": png_of(60000, 60000),
    "a line": png_of(20000, 1),
    "a column": png_of(1, 20000),
    "cut off": saved(coloured(200, 200))[:3000],
    "cut off JPEG": saved(coloured(200, 200), "JPEG")[:4000],
    "text": b"<html>not found</html>",
    "an EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n",
    "a TIFF": saved(coloured(), "TIFF"),
    "a BMP": saved(coloured(), "BMP"),
    "a header alone": b"\x89PNG\r\n\x1a\n",
    "a GIF's header": b"GIF89a",
    "a broken chunk": saved(coloured(100, 100)).replace(b"IDAT", b"IDAX"),
}


def test_formats_whose_decoders_hold_more_have_a_lower_limit(monkeypatch):
    picture = coloured(60, 50)
    assert reading.MAX_WEBP_PIXELS == 9_000_000
    monkeypatch.setattr(reading, "MAX_WEBP_PIXELS", 2_999)
    with pytest.raises(PictureError, match="more than 0 megapixels"):
        open_picture(saved(picture, "WEBP"), 224)
    assert open_picture(saved(picture), 224).size == (60, 50)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB")])
def test_the_largest_pictures_take_bounded_memory(kind, mode):
    """The largest that is read takes at most 150 MB more than before; told by the kernel, of a process of its own."""
    import resource

    side = 3000 if kind == "WEBP" else 5000
    data = saved(Image.new(mode, (side, side)), kind)
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert open_picture(data, 224).mode == "RGB"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(send, str(grown * (1 if sys.platform == "darwin" else 1024)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(send)
    assert 0 <= int(os.read(receive, 100)) < 150 << 20


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_name_without_memory(name):
    tracemalloc.start()
    with pytest.raises(PictureError) as refused:
        open_picture(BOMBS[name], 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(refused.value) and peak < 5 << 20
    if "megapixels" in name:
        assert str(refused.value) == "more than 25 megapixels"
    if name in ("a line", "a column"):
        assert "40 times the other" in str(refused.value)
    if name in ("text", "an EPS", "a TIFF", "a BMP"):
        assert str(refused.value) == "none of JPEG, PNG, WEBP, GIF"


def test_files_have_limits(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    data = saved(coloured())
    file.write_bytes(data)
    assert read_bytes(file) == data
    monkeypatch.setattr(reading, "MAX_BYTES", len(data) - 1)
    with pytest.raises(PictureError, match="larger than"):
        read_bytes(file)
    (tmp_path / "empty.png").touch()
    for name, reason in (("empty.png", "empty file"), ("none.png", "no such file"), (".", "no such file")):
        with pytest.raises(PictureError, match=reason):
            read_bytes(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(PictureError, match="no such file"):
        read_bytes(tmp_path / "p.png")
