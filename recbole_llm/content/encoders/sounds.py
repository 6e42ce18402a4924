"""Encoders of sounds: an audio model of transformers, an ONNX file, or a function of the user's.

    load_sound_encoder("laion/clap-htsat-unfused")
    load_sound_encoder("onnx:speech.onnx")            # with {"sampling_rate": 16000, "seconds": 10} in speech.json
    load_sound_encoder("module:function")             # def function(sounds: list[array [n] at 16 kHz]) -> array [m, d]

A sound is cut into windows that lie side by side. Each is encoded by itself, and the sound's vector is their mean, a window
weighted by its length. Windows of one length go through an encoder together, so that none is padded to another's length.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.content.encoder_settings import ONNX, is_function, is_onnx
from recbole_llm.content.encoders.function import function_fingerprint, load_function, vectors_of
from recbole_llm.content.encoders.images import onnx_session, onnx_weights
from recbole_llm.content.encoders.resolve import file_digest
from recbole_llm.content.encoders.sentence_modules import content_digest
from recbole_llm.content.encoders.windows import (
    FORMAT,
    SECONDS,
    WindowedEncoder,
    decoder_identity,
    probe,
    read_seconds,
)
from recbole_llm.content.sounds.reading import MAX_RATE, MIN_RATE, require_soundfile
from recbole_llm.text_files import read_text

if TYPE_CHECKING:
    from recbole_llm.content.encoders.audio import AudioEncoder

FUNCTION_RATE = 16_000


class OnnxSoundEncoder(WindowedEncoder):
    """An ONNX file from samples ``[w, n]`` to vectors ``[w, d]``; n is always that of a whole window, shorter ones end in zeros.

    Args:
        file: the ``.onnx``; the ``.json`` of the same name holds ``sampling_rate`` and ``seconds``.
        seconds: of a window; ``None`` for what the JSON says.

    Raises:
        ValueError: if onnxruntime is missing, or the files are not there or not understood.
    """

    def __init__(self, file: str | Path, seconds: float | None = None) -> None:
        self.file = Path(file).expanduser()
        self.name = f"{ONNX}{file}"
        beside = self.file.with_suffix(".json")
        for path in (self.file, beside):
            if not path.is_file():
                raise ValueError(
                    f"encoder {self.name!r}: there is no {str(path)!r}. An ONNX file of sounds needs a JSON beside it: "
                    '{"sampling_rate": 16000, "seconds": 10}.'
                )
        self.rate, self.seconds = self._settings(beside, seconds)
        self._session = onnx_session(self.file, self.name)
        given = self._session.get_inputs()
        if len(given) != 1 or len(given[0].shape) != 2:
            raise ValueError(f"encoder {self.name!r}: expected one input [sounds, samples].")
        self._input = given[0].name
        self._dim = self._vectors(probe(round(self.seconds * self.rate))[None]).shape[1]
        self.fingerprint = content_digest(
            json.dumps(
                {
                    "format": FORMAT,
                    "kind": "onnx sound",
                    "files": [file_digest(path) for path in onnx_weights(self.file)],
                    "rate": self.rate,
                    "seconds": self.seconds,
                    **decoder_identity(),
                },
                sort_keys=True,
            )
        )

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self._dim

    def describe(self) -> dict[str, Any]:
        """Name and settings."""
        return {"name": self.file.name, "kind": "onnx", "dim": self.dim, "rate": self.rate, "seconds": self.seconds}

    def _settings(self, beside: Path, seconds: float | None) -> tuple[int, float]:
        try:
            config = json.loads(read_text(beside, f"encoder {self.name!r}: the JSON beside it"))
        except json.JSONDecodeError as error:
            raise ValueError(f"encoder {self.name!r}: {beside.name} is not JSON ({error}).") from error
        rate = config.get("sampling_rate") if isinstance(config, dict) else None
        if not isinstance(rate, int) or isinstance(rate, bool) or not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(
                f"encoder {self.name!r}: {beside.name} says sampling_rate {rate!r}; expected {MIN_RATE} to {MAX_RATE}."
            )
        told = config.get("seconds", SECONDS)
        if not isinstance(told, (int, float)) or isinstance(told, bool):
            raise ValueError(f"encoder {self.name!r}: {beside.name} says seconds {told!r}; expected a number.")
        return rate, float(read_seconds(self.name, seconds if seconds is not None else told) or SECONDS)

    def _vectors(self, windows: np.ndarray) -> Tensor:
        lacks = round(self.seconds * self.rate) - windows.shape[1]
        found = np.asarray(self._session.run(None, {self._input: np.pad(windows, ((0, 0), (0, lacks)))})[0], np.float32)
        if found.ndim != 2 or len(found) != len(windows) or not found.shape[1]:
            raise ValueError(
                f"encoder {self.name!r}: its first output is {found.shape} for {len(windows)} sounds; expected ({len(windows)}, d)."
            )
        return torch.from_numpy(found)


class FunctionSoundEncoder(WindowedEncoder):
    """A function of the user's as an encoder of sounds.

    Args:
        name: ``module:function``, of a function from a list of windows, each ``[n]`` float32 at 16 kHz, to an array ``[m, d]``.
        seconds: of a window; ``None`` for ``SECONDS``.

    Raises:
        ValueError: if the module or the function is not there, or it gives no vectors.
    """

    rate = FUNCTION_RATE

    def __init__(self, name: str, seconds: float | None = None) -> None:
        self.name = name
        self.seconds = read_seconds(name, seconds) or SECONDS
        self._function = load_function(name)
        self._dim = vectors_of(name, self._function, [probe(self.rate)], "sounds").shape[1]
        identity = f"audio {FORMAT} {self.seconds} {sorted(decoder_identity().items())}"
        own = function_fingerprint(name, self._function, self._dim)
        self.fingerprint = hashlib.sha256(f"{identity} {own}".encode()).hexdigest()

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self._dim

    def describe(self) -> dict[str, Any]:
        """Name and settings."""
        return {"name": self.name, "kind": "function", "dim": self.dim, "seconds": self.seconds}

    def _vectors(self, windows: np.ndarray) -> Tensor:
        vectors = vectors_of(self.name, self._function, list(windows), "sounds")
        if vectors.shape[1] != self.dim:
            raise ValueError(
                f"encoder {self.name!r} gave vectors of {self.dim} dimensions, and now of {vectors.shape[1]}. "
                "Every sound must have a vector of the same length."
            )
        return torch.from_numpy(vectors)


def load_sound_encoder(
    name: str,
    *,
    seconds: float | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> "AudioEncoder | OnnxSoundEncoder | FunctionSoundEncoder":
    """Find an encoder of sounds.

    Args:
        name: a folder or a name on the Hugging Face hub, ``onnx:FILE``, or ``module:function``, which runs that function.
        seconds: of a window; ``None`` for the encoder's own, at most what it reads.
        revision: branch, tag or commit on the hub.
        dtype: of a transformer.
        device: where a transformer runs.

    Raises:
        EncoderNotFoundError: if the model is nowhere to be had; names the ways out.
        ValueError: on a model that is not understood, or where soundfile is missing.
    """
    require_soundfile()
    if is_onnx(name):
        return OnnxSoundEncoder(name[len(ONNX) :], seconds)
    if is_function(name):
        return FunctionSoundEncoder(name, seconds)
    from recbole_llm.content.encoders.audio import AudioEncoder
    from recbole_llm.content.encoders.resolve import resolve_encoder

    return AudioEncoder(resolve_encoder(name, revision), seconds=seconds, dtype=dtype, device=device)
