"""The encoder of an export's pictures, which whoever opens the export names: a file's word alone loads nothing."""

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recbole_llm.export.manifest import EncoderSpec
from recbole_llm.export.thumbnails import MAX_BYTES, SIDE


class EncodedPicture(NamedTuple):
    """A picture's vector ``[F]`` float32, and its small copy, a JPEG."""

    vector: np.ndarray
    thumbnail: bytes


def picture_encoder_refusal(spec: EncoderSpec, named: Sequence[str], option: str, form: str = "%s") -> str | None:
    """Say why the encoder of pictures must not be loaded, with the way out; ``None`` if it may be.

    Args:
        spec: what the export says of it.
        named: what the caller has named.
        option: of a command line, by which it is named.
        form: of the option's value, with ``%s`` for the name.
    """
    if named:
        return None
    return (
        f"image: the pictures of this export need the encoder {spec.name!r}, and nothing is loaded because a file names it. "
        f"Name it yourself: {option} {shlex.quote(form % spec.name)}."
    )


def load_picture_encoder(spec: EncoderSpec, named: Sequence[str], option: str, form: str = "%s") -> Any:
    """Load the first encoder that the caller has named which is the one that the model was trained with.

    Args:
        spec: as :func:`picture_encoder_refusal`, like the rest.
        named: as there.
        option: as there.
        form: as there.

    Raises:
        ValueError: if the caller has named none, or none of them is to be had and the same.
    """
    from recbole_llm.content.encoders.images import load_image_encoder

    refusal = picture_encoder_refusal(spec, named, option, form)
    if refusal is not None:
        raise ValueError(refusal)
    failures = []
    for name in named:
        try:
            encoder = load_image_encoder(name)
        except ValueError as error:
            failures.append(str(error))
            continue
        if encoder.fingerprint == spec.fingerprint:
            return encoder
        failures.append(f"{name!r} is another one than the model was trained with, or Pillow is of another version")
    raise ValueError(f"image: {' '.join(failures)}")


class PictureEncoder:
    """The encoder, loaded; decodes and encodes one picture at a time, so that its vector depends on nothing beside it.

    Args:
        spec: as :func:`load_picture_encoder`.
        named: as there.
    """

    def __init__(self, spec: EncoderSpec, named: Sequence[str]) -> None:
        import torch

        torch.set_num_threads(1)
        self._encoder = load_picture_encoder(spec, named, "--image-encoder")
        self.fingerprint: str = self._encoder.fingerprint

    def encode(self, data: bytes) -> EncodedPicture:
        """Encode a picture's file, and make a small copy of it.

        Raises:
            ValueError: if it cannot be read as a picture; the message is for the sender.
        """
        import torch

        from recbole_llm.content.images.reading import PictureError, open_picture
        from recbole_llm.content.images.thumbnails import thumbnail

        try:
            picture = open_picture(data, self._encoder.side)
            with torch.inference_mode():
                vector = self._encoder.encode(self._encoder.prepare([picture]))[0].float().cpu().numpy()
            if self._encoder.side < SIDE:  # reduced to less than the copy has
                picture = open_picture(data, SIDE)
            small = thumbnail(picture, SIDE, MAX_BYTES)
        except PictureError as error:
            raise ValueError(f"image: it cannot be read as a picture: {error}.") from None
        if not np.isfinite(vector).all():
            raise ValueError("image: the encoder gives no finite vector for this picture.")
        return EncodedPicture(vector, small)
