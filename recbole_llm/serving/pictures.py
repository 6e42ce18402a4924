"""Pictures of requests to vectors and small copies, decoded and encoded one at a time in a thread of their own."""

import base64
from collections.abc import Callable
from functools import partial
from logging import getLogger

from recbole_llm.export.manifest import Manifest
from recbole_llm.serving.batching import Batcher
from recbole_llm.serving.encoding import Encoding
from recbole_llm.serving.picture_encoder import EncodedPicture, PictureEncoder, picture_encoder_refusal
from recbole_llm.serving.problem import Problem
from recbole_llm.serving.settings import Limits, Settings

# for clients; the log has the name, which may be a folder
UNNAMED = (
    "The service was not told to load the encoder of pictures: they cannot be used until it is started with "
    "--image-encoder NAME. Its log says which."
)

log = getLogger(__name__)


class PictureEncoding(Encoding[PictureEncoder]):
    """Encodes pictures of requests.

    Args:
        load: makes the encoder; called once, in a thread. ``None``: there is none.
        limits: bounds.
        reason: why there is none.
    """

    def __init__(
        self,
        load: Callable[[], PictureEncoder] | None,
        limits: Limits,
        reason: str = "This export takes no pictures: its model has none, or no encoder of them.",
    ) -> None:
        super().__init__(load, reason, "encoder of pictures")
        self._most = limits.image_bytes
        self._batcher: Batcher[bytes | str, EncodedPicture] = Batcher(
            self._encode, max_batch=1, max_queue=limits.image_queue, name="pictures"
        )

    @property
    def fingerprint(self) -> str | None:
        """Of the loaded encoder."""
        return None if self._encoder is None else self._encoder.fingerprint

    async def encode(self, picture: bytes | str, seconds: float) -> EncodedPicture:
        """Encode a picture.

        Args:
            picture: the file's bytes, or base64 of them.
            seconds: until the deadline.

        Raises:
            EncoderUnavailable: if there is no encoder (now).
            Problem: 413 if it is too large, 422 if it is no picture that can be read.
            QueueFull: if too many pictures wait.
            DeadlineExceeded: if the deadline passes.
        """
        self.loaded()
        return await self._batcher.submit(picture, seconds)

    def _encode(self, pictures: list[bytes | str]) -> list[EncodedPicture | BaseException]:
        found: list[EncodedPicture | BaseException] = []
        for picture in pictures:
            try:
                found.append(self.loaded().encode(self._bytes_of(picture)))
            except ValueError as error:
                found.append(Problem(422, str(error)))
            except (Problem, MemoryError) as error:
                found.append(error)
        return found

    def _bytes_of(self, picture: bytes | str) -> bytes:
        if isinstance(picture, str):
            try:
                picture = base64.b64decode(picture, validate=True)
            except ValueError:  # binascii.Error is one, and so are letters that are not ASCII
                raise Problem(422, "image: it is not base64.") from None
        if len(picture) > self._most:
            raise Problem(413, f"The picture is larger than {self._most} bytes.")
        if not picture:
            raise Problem(422, "image: there is no picture in the request.")
        return picture

    def close(self) -> None:
        """Let the thread end."""
        self._batcher.close()


def picture_encoding(manifest: Manifest, settings: Settings) -> PictureEncoding:
    """Choose the encoding of pictures that a service of these settings has for an export.

    :meth:`PictureEncoding.start` loads it.
    """
    spec = manifest.pictures
    if spec is None:
        return PictureEncoding(None, settings.limits)
    refusal = picture_encoder_refusal(spec, settings.image_encoders, "--image-encoder")
    if refusal is not None:
        log.warning("%s", refusal)
        encoding = PictureEncoding(None, settings.limits, UNNAMED)
        encoding.unnamed = refusal
        return encoding
    return PictureEncoding(partial(PictureEncoder, spec, settings.image_encoders), settings.limits)
