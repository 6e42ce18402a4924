"""Encoders of pictures: a vision model of transformers, an ONNX file, or a function of the user's.

    load_image_encoder("google/siglip2-base-patch16-224")
    load_image_encoder("onnx:lite0.onnx")            # with lite0.json beside it, as preprocessor_config.json
    load_image_encoder("module:function")            # def function(pictures: list[PIL.Image.Image]) -> array [n, d]

Naming a function runs it, so that only a caller may name one, as for texts (:mod:`recbole_llm.content.encoders.function`).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.content.encoder_settings import ONNX, is_function, is_onnx
from recbole_llm.content.encoders.function import function_fingerprint, load_function, vectors_of
from recbole_llm.content.encoders.resolve import file_digest
from recbole_llm.content.encoders.sentence_modules import content_digest
from recbole_llm.content.images.preprocessing import Preprocessing, read_preprocessing
from recbole_llm.content.images.reading import require_pillow
from recbole_llm.content.images.sample import FORMAT, PictureSample
from recbole_llm.text_files import read_text

if TYPE_CHECKING:
    from PIL import Image

    from recbole_llm.content.encoders.vision import VisionEncoder

FUNCTION_SIDE = 512  # a function gets pictures whose shorter side is reduced to not less than twice of this


class OnnxEncoder:
    """A vision model in an ONNX file. A file of that form holds numbers and no code.

    Its first output is ``[n, d]``, or ``[n, d, height, width]``, of which the mean over the places is taken.

    Args:
        file: the ``.onnx``; its preprocessing is in the ``.json`` of the same name.

    Raises:
        ValueError: if onnxruntime is missing, or the files are not there or not understood.
    """

    modality = "image"
    batch_cost: int | None = None
    batch_size = 8  # 16 and 32 take longer on a CPU

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file).expanduser()
        self.name = f"{ONNX}{file}"
        beside = self.file.with_suffix(".json")
        for path in (self.file, beside):
            if not path.is_file():
                raise ValueError(
                    f"encoder {self.name!r}: there is no {str(path)!r}. An ONNX file needs its preprocessing beside it, as a JSON "
                    'with the entries of a preprocessor_config.json: {"size": {"height": 224, "width": 224}, "image_mean": [...], '
                    '"image_std": [...]}.'
                )
        try:
            config = json.loads(read_text(beside, f"encoder {self.name!r}: the JSON beside it"))
        except json.JSONDecodeError as error:
            raise ValueError(f"encoder {self.name!r}: {beside.name} is not JSON ({error}).") from error
        if not isinstance(config, dict):
            raise ValueError(f"encoder {self.name!r}: {beside.name} holds {type(config).__name__}; expected an object.")
        self.preprocessing: Preprocessing = read_preprocessing(config, self.name)
        self._session = onnx_session(self.file, self.name)
        given = self._session.get_inputs()
        if len(given) != 1:
            raise ValueError(f"encoder {self.name!r}: it has {len(given)} inputs; expected one, the pictures.")
        self._input, first = given[0].name, given[0].shape[0] if given[0].shape else None
        self._fixed = first if isinstance(first, int) else None  # pictures of a batch, where the file says so
        self.dim = self.encode(self.prepare([_blank()])).shape[1]
        self.fingerprint = content_digest(
            json.dumps(
                {
                    "format": FORMAT,
                    "kind": "onnx",
                    "files": [file_digest(path) for path in onnx_weights(self.file)],
                    "preprocessing": self.preprocessing.identity(),
                    "pillow": require_pillow().__version__,
                },
                sort_keys=True,
            )
        )

    @property
    def side(self) -> int:
        """The shorter side that pictures should have at least."""
        return self.preprocessing.side

    def prepare(self, raw: Sequence["Image.Image"]) -> list[PictureSample]:
        """Resize, crop and scale RGB pictures."""
        return [PictureSample(self.preprocessing(picture)) for picture in raw]

    def encode(self, batch: Sequence[PictureSample]) -> Tensor:
        """Encode pictures to float32 vectors ``[len(batch), dim]`` on the CPU."""
        if not batch:
            return torch.zeros(0, self.dim)
        pixels = np.stack([sample.pixels for sample in batch])
        if self._fixed is None:
            return torch.from_numpy(self._run(pixels))
        parts = []
        for at in range(0, len(pixels), self._fixed):
            part = pixels[at : at + self._fixed]
            rest = self._fixed - len(part)
            filled = np.concatenate([part, np.repeat(part[:1], rest, 0)]) if rest else part
            parts.append(self._run(filled)[: len(part)])
        return torch.from_numpy(np.concatenate(parts))

    def describe(self) -> dict[str, Any]:
        """Name and preprocessing."""
        return {"name": self.file.name, "kind": "onnx", "dim": self.dim, **self.preprocessing.identity()}

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        found = np.asarray(self._session.run(None, {self._input: pixels})[0], np.float32)
        if found.ndim == 4:
            found = found.mean((2, 3), dtype=np.float32)
        if found.ndim != 2 or len(found) != len(pixels) or not found.shape[1]:
            raise ValueError(
                f"encoder {self.name!r}: its first output is {found.shape} for {len(pixels)} pictures; expected "
                f"({len(pixels)}, d) or ({len(pixels)}, d, height, width)."
            )
        return found


def _blank() -> "Image.Image":
    return require_pillow().new("RGB", (64, 64))


def onnx_weights(file: Path) -> list[Path]:
    """List the file, and those beside it that hold its larger tensors."""
    return [file, *sorted(path for path in file.parent.glob(f"{file.name}*") if path != file and path.is_file())]


def onnx_session(file: Path, name: str) -> Any:
    """Open an ONNX file; raises ``ValueError`` where onnxruntime is missing or cannot read it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"encoder {name!r} needs onnxruntime: pip install -e '.[onnx]' in the checkout.") from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own classes, which have no common base but this
        raise ValueError(
            f"encoder {name!r}: onnxruntime cannot read the file ({str(error).splitlines()[0]})."
        ) from error


class FunctionImageEncoder:
    """A function of the user's as an encoder of pictures, as :class:`recbole_llm.content.encoders.function.FunctionEncoder`.

    Args:
        name: ``module:function``, of a function from RGB pictures of Pillow to an array ``[n, d]``.

    Raises:
        ValueError: if the module or the function is not there, or it gives no vectors.
    """

    modality = "image"
    batch_cost: int | None = None
    batch_size = 16
    side = FUNCTION_SIDE

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = load_function(name)
        self.dim = vectors_of(name, self._function, [_blank()], "pictures").shape[1]
        self.fingerprint = hashlib.sha256(
            f"image {FORMAT} {require_pillow().__version__} {function_fingerprint(name, self._function, self.dim)}".encode()
        ).hexdigest()

    def prepare(self, raw: Sequence["Image.Image"]) -> list[PictureSample]:
        """Leave pictures as they are."""
        return [PictureSample(picture) for picture in raw]

    def encode(self, batch: Sequence[PictureSample]) -> Tensor:
        """Encode pictures to float32 vectors ``[len(batch), dim]`` on the CPU.

        Raises:
            ValueError: if the function gives another shape.
        """
        if not batch:
            return torch.zeros(0, self.dim)
        vectors = vectors_of(self.name, self._function, [sample.pixels for sample in batch], "pictures")
        if vectors.shape[1] != self.dim:
            raise ValueError(
                f"encoder {self.name!r} gave vectors of {self.dim} dimensions, and now of {vectors.shape[1]}. "
                "Every picture must have a vector of the same length."
            )
        return torch.from_numpy(vectors)

    def describe(self) -> dict[str, Any]:
        """Name and dimension."""
        return {"name": self.name, "kind": "function", "dim": self.dim}


def load_image_encoder(
    name: str, *, revision: str | None = None, dtype: str = "float32", device: str | torch.device = "cpu"
) -> "VisionEncoder | OnnxEncoder | FunctionImageEncoder":
    """Find an encoder of pictures.

    Args:
        name: a folder or a name on the Hugging Face hub, ``onnx:FILE``, or ``module:function``, which runs that function.
        revision: branch, tag or commit on the hub.
        dtype: of a transformer.
        device: where a transformer runs.

    Raises:
        EncoderNotFoundError: if the model is nowhere to be had; names the ways out.
        ValueError: on a model that is not understood, or where Pillow is missing.
    """
    require_pillow()
    if is_onnx(name):
        return OnnxEncoder(name[len(ONNX) :])
    if is_function(name):
        return FunctionImageEncoder(name)
    from recbole_llm.content.encoders.resolve import resolve_encoder
    from recbole_llm.content.encoders.vision import VisionEncoder

    return VisionEncoder(resolve_encoder(name, revision), dtype=dtype, device=device)
