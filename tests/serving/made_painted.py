"""The made export with pictures: each item in the colour of its topic, an ONNX file as their encoder, small copies."""

import base64
import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
from made_export import WordEncoder, make_contents

pytest.importorskip("onnx", reason="extra 'test': onnx")
pytest.importorskip("onnxruntime", reason="extra 'onnx'")
from PIL import Image

from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.content.images.reading import open_picture, read_bytes
from recbole_llm.content.images.thumbnails import thumbnails_of
from recbole_llm.export.manifest import EncoderSpec
from recbole_llm.export.search_tables import SearchTables, TextSpace
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.thumbnails import MAX_BYTES, SIDE, Thumbnails
from tests.made_pictures import write_onnx, write_picture

WITHOUT = (3, 9)  # items without a picture


def vector_of(encoder, path):
    """What the encoder makes of a picture's file, ``[F]`` float32."""
    sample = encoder.prepare([open_picture(read_bytes(path), encoder.side)])
    return encoder.encode(sample)[0].numpy()


def make_painted(folder, **changes):
    """The contents of the export, its encoder's name, and the folder of the pictures."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    name = write_onnx(folder / "flat.onnx")
    encoder = load_image_encoder(name)
    made = make_contents()
    n_items, D = made.vector.shape
    paths = [pictures / f"i{at}.png" for at in range(n_items)]
    for at, path in enumerate(paths):
        write_picture(path, at)  # those of WITHOUT are for new items
    raw = np.stack([vector_of(encoder, path) for path in paths])
    has = ~np.isin(np.arange(n_items), WITHOUT)
    space = TextSpace(raw[has].mean(0))
    directions = np.where(has[:, None], space.directions(raw), np.float32(0))
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    anchors = np.flatnonzero(has)[:20]
    offsets = {"vector_offset": made.text_map.vector_offset, "source_offset": made.text_map.source_offset}
    picture_map = TextMap(
        "rbf", space.center, normal(20, D), normal(20, D), normal(20), **offsets,
        bias_offset=made.text_map.bias_offset, normalize=True, support=directions[anchors], gamma=1.25,
    )  # fmt: skip
    texts = made.text_map.directions(WordEncoder().encode([record.text for record in made.records])[0])
    small, _ = thumbnails_of([[path] if one else [] for path, one in zip(paths, has, strict=True)], SIDE, MAX_BYTES)
    contents = replace(
        made,
        content={"image": directions, "text": texts},
        search=SearchTables(
            np.zeros(n_items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), picture_space=space
        ),
        pictures=EncoderSpec(name, None, {}, encoder.dim, encoder.fingerprint),
        picture_map=picture_map,
        thumbnails=Thumbnails.join(small),
        **changes,
    )
    return contents, name, pictures


def jpeg(size=(40, 30), **options):
    """A JPEG of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG", **options)
    return written.getvalue()


def base64_of(data):
    return base64.b64encode(data).decode()


def hostile():
    """Name to a file that is no picture that may be read, and what the answer says of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bomb, long = io.BytesIO(), io.BytesIO()
        Image.new("1", (9000, 9000)).save(bomb, "PNG")
        Image.new("1", (4000, 8)).save(long, "PNG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    return {
        "bomb": (bomb.getvalue(), "more than 25 megapixels"),
        "line": (long.getvalue(), "one side is more than 40 times the other"),
        "eps": (eps, "none of JPEG, PNG, WEBP, GIF"),
        "truncated": (jpeg((400, 300))[:2000], "damaged"),
        "text": (b"<html>" * 50, "none of JPEG"),
        "tiff": (b"II*\x00\x08\x00\x00\x00" + b"\x00" * 40, "none of JPEG"),
    }
