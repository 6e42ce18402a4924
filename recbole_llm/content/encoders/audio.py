"""Audio models of transformers as encoders of sounds.

| model | vector of a window |
|---|---|
| CLAP | what ``get_audio_features`` gives: the space of its texts |
| AST | the pooled output |
| Wav2Vec2, HuBERT, WavLM | the mean over the frames of the last layer |
| Whisper | the mean over the encoder's frames that hear the window; those of its padding are left out |
"""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.content.encoders.pretrained import DTYPES, load_pretrained
from recbole_llm.content.encoders.resolve import ModelFiles, file_digest, refuse_code_from_elsewhere, relevant_config
from recbole_llm.content.encoders.sentence_modules import content_digest
from recbole_llm.content.encoders.windows import (
    FORMAT,
    SECONDS,
    SoundSample,
    WindowedEncoder,
    decoder_identity,
    probe,
    read_seconds,
)
from recbole_llm.content.sounds.reading import MAX_RATE, MIN_RATE

EXTRACTOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
KINDS = {
    "clap": "ClapFeatureExtractor",
    "audio-spectrogram-transformer": "ASTFeatureExtractor",
    "wav2vec2": "Wav2Vec2FeatureExtractor",
    "hubert": "Wav2Vec2FeatureExtractor",
    "wavlm": "Wav2Vec2FeatureExtractor",
    "whisper": "WhisperFeatureExtractor",
}
_NAMES = "CLAP, AST, Wav2Vec2, HuBERT, WavLM or Whisper"
# tensors that no vector reads: of pooling heads, of masks for training, and of Whisper's decoder
_UNREAD = ("pooler.", "masked_spec_embed", "decoder.")


class AudioEncoder(WindowedEncoder):
    """An audio model as an encoder of sounds.

    Weights are loaded with the first sound; the fingerprint comes from the files.

    Args:
        files: from :func:`recbole_llm.content.encoders.resolve.resolve_encoder`.
        seconds: of a window; ``None`` for as many as the model reads, ``SECONDS`` where it reads any number.
        dtype: of the model; vectors are float32.
        device: where it runs.

    Raises:
        ValueError: on a model that is not understood, or that would run code of its own.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        seconds: float | None = None,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"encoder_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.files, self.dtype, self.device, self.name = files, dtype, torch.device(device), files.name
        self._config = files.json("config.json")
        if not self._config:
            raise ValueError(f"encoder {files.name!r}: there is no config.json in {files.folder}.")
        refuse_code_from_elsewhere(files)
        self.kind = str(self._config.get("model_type"))
        if self.kind not in KINDS:
            raise ValueError(
                f"encoder {files.name!r}: its kind {self.kind!r} is no audio model that is supported. Give {_NAMES}, onnx:FILE, "
                "module:function, or vectors made elsewhere (item_features_file)."
            )
        given = files.json(EXTRACTOR) or files.json(PROCESSOR).get("feature_extractor")
        self._settings: dict[str, Any] = given if isinstance(given, dict) else {}
        if not self._settings:
            raise ValueError(
                f"encoder {files.name!r}: it has no {EXTRACTOR}. Give {_NAMES} with its feature extractor."
            )
        rate = self._settings.get("sampling_rate", self._extractor.sampling_rate)
        if not isinstance(rate, int) or not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(
                f"encoder {files.name!r}: its sampling_rate is {rate!r}; expected {MIN_RATE} to {MAX_RATE}."
            )
        self.rate: int = rate
        wanted, most = read_seconds(files.name, seconds), self._most_seconds()
        self.seconds = min(wanted or most or SECONDS, most or math.inf)

    @property
    def joint(self) -> bool:
        """Whether it has a text tower in the same space."""
        return self.kind == "clap"

    @cached_property
    def dim(self) -> int:
        """Dimension of the vectors."""
        with torch.no_grad():
            return self._vectors(probe(self.rate)[None]).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of weights, feature extraction and every setting that changes a vector."""
        import transformers

        identity = {
            "format": FORMAT,
            "kind": "sound",
            "weights": [file_digest(path) for path in self.files.weights()],
            "config": relevant_config(self._config),
            "extractor": self._settings,
            "seconds": self.seconds,
            "dtype": self.dtype,
            "transformers": transformers.__version__,  # whose feature extractors these are
            **decoder_identity(),
        }
        return content_digest(json.dumps(identity, sort_keys=True))

    def encode(self, batch: Sequence[SoundSample]) -> Tensor:
        """Encode sounds.

        Returns:
            float32 ``[len(batch), dim]`` on the encoder's device; carries gradients unless the caller turned them off.
        """
        return super().encode(batch).to(self.device)

    def describe(self) -> dict[str, Any]:
        """Return name, source and settings as JSON, for logs and manifests."""
        return {
            "name": self.files.name,
            "source": self.files.source,
            "kind": self.kind,
            "dtype": self.dtype,
            "rate": self.rate,
            "seconds": self.seconds,
        }

    def _most_seconds(self) -> float | None:
        """The longest window that the model reads whole."""
        extractor = self._extractor
        if self.kind == "clap":
            return float(extractor.nb_max_samples / self.rate)
        if self.kind == "whisper":
            return float(extractor.n_samples / self.rate)
        if self.kind == "audio-spectrogram-transformer":  # frames of 25 ms every 10 ms
            return float((self._settings.get("max_length", extractor.max_length) - 1) * 0.01 + 0.025)
        return None

    @cached_property
    def _extractor(self) -> Any:
        import transformers

        known = {key: value for key, value in self._settings.items() if not key.endswith(("_type", "_class"))}
        try:
            return getattr(transformers, KINDS[self.kind])(**known)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"encoder {self.files.name!r}: its feature extractor is not understood ({error})."
            ) from error

    def _vectors(self, windows: np.ndarray) -> Tensor:
        given: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "pt"}
        if self.kind == "whisper":
            given["return_attention_mask"] = True
        values = self._extractor(list(windows), **given)
        ways = {"clap": self._of_clap, "audio-spectrogram-transformer": self._of_ast, "whisper": self._of_whisper}
        found = ways.get(self.kind, self._of_frames)(values)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(windows):
            raise ValueError(
                f"encoder {self.files.name!r}: {type(self._model).__name__} gives no vector of a sound. Make vectors elsewhere "
                "(item_features_file)."
            )
        return found.float()

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self.device, DTYPES[self.dtype])

    def _of_clap(self, values: Any) -> Tensor:
        # windows are never longer than the model reads; transformers marks one of them at random
        longer = torch.zeros(len(values["input_features"]), 1, dtype=torch.bool, device=self.device)
        found = self._model.get_audio_features(input_features=self._moved(values["input_features"]), is_longer=longer)
        vectors: Tensor = getattr(found, "pooler_output", found)  # transformers 4 gives the tensor itself
        return vectors

    def _of_ast(self, values: Any) -> Tensor:
        pooled: Tensor = self._model(self._moved(values["input_values"])).pooler_output
        return pooled

    def _of_frames(self, values: Any) -> Tensor:
        frames: Tensor = self._model(self._moved(values["input_values"]))[0]
        return frames.mean(1)

    def _of_whisper(self, values: Any) -> Tensor:
        frames: Tensor = self._model.get_encoder()(self._moved(values["input_features"]))[0]
        heard = values["attention_mask"][:, :: values["attention_mask"].shape[1] // frames.shape[1]].to(frames)
        return (frames * heard[:, :, None]).sum(1) / heard.sum(1, keepdim=True)

    @cached_property
    def _model(self) -> Any:
        return load_pretrained(self.files, self.dtype, self.device, _UNREAD)
