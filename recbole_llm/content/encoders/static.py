"""Text encoders that average a table of token vectors, through the optional package model2vec."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm.content.encoders.resolve import ModelFiles, file_digest, relevant_config
from recbole_llm.content.encoders.sentence_modules import content_digest

FINGERPRINT_FORMAT = 1
# model2vec's own limit where a model states none
DEFAULT_MAX_TOKENS = 512


def is_static(files: ModelFiles) -> bool:
    """Return whether a folder holds a static model."""
    modules = files.json("modules.json").get("", [])
    first = modules[0].get("type", "") if modules else ""
    return first.endswith("StaticEmbedding") or files.json("config.json").get("model_type") == "model2vec"


@dataclass(frozen=True)
class StaticText:
    """A text, cut to what is read.

    Attributes:
        text: the part within the limit of tokens.
        size: its tokens.
        cut: tokens behind the limit.
    """

    text: str
    size: int
    cut: int


class StaticEncoder:
    """A static model: the mean of token vectors, no transformer; some thousand texts a second on one CPU core.

    Gradients do not pass through model2vec. It runs on the CPU in the table's precision.

    Args:
        files: from :func:`recbole_llm.content.encoders.resolve.resolve_encoder`.
        prompt: put before each text.
        max_tokens: tokens read per text. ``None``: the model's own limit, or :data:`DEFAULT_MAX_TOKENS`.
        overflow: ``truncate``, or ``chunk_mean``: every token is read (their mean is the mean of the windows).
        dim: first dimensions kept; normalised again where the model normalises.

    Raises:
        ValueError: if model2vec is not installed, or a setting has no meaning for a static model.
    """

    modality = "text"
    batch_cost: int | None = None

    def __init__(
        self,
        files: ModelFiles,
        *,
        prompt: str | None = None,
        max_tokens: int | None = None,
        overflow: str = "truncate",
        dim: int | None = None,
    ) -> None:
        if overflow not in ("truncate", "chunk_mean"):
            raise ValueError(
                f"encoder_overflow {overflow!r} has no meaning for the static model {files.name!r}: its vector is a mean "
                "over tokens. Take truncate, or chunk_mean to read every token."
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"encoder_max_tokens must be at least 1, got {max_tokens}.")
        self.files = files
        self.prompt = prompt or ""
        self._config = {**files.json("config_sentence_transformers.json"), **files.json("config.json")}
        own = self._config.get("max_length") or DEFAULT_MAX_TOKENS
        self.max_tokens = None if overflow == "chunk_mean" else max_tokens or own
        self._dim = dim
        if dim is not None and not 1 <= dim <= self._model.dim:
            raise ValueError(f"encoder_dim must be between 1 and {self._model.dim}, the model's dimension, got {dim}.")

    @cached_property
    def _model(self) -> Any:
        try:
            from model2vec import StaticModel
        except ImportError as error:
            raise ValueError(
                f"encoder {self.files.name!r} is a static model, which needs the package model2vec. pip install model2vec"
            ) from error
        return StaticModel.from_pretrained(str(self.files.folder))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        # the model's own, without its limit: what is cut is to be counted
        tokenizer = Tokenizer.from_file(str(self.files.transformer().tokenizer()[0]))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self._dim or int(self._model.dim)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of table, tokenizer and every setting that changes a vector."""
        inner = self.files.transformer()
        identity = {
            "format": FINGERPRINT_FORMAT,
            "kind": "static",
            "weights": [file_digest(path) for path in inner.weights()],
            "tokenizer": [file_digest(path) for path in inner.tokenizer()],
            "config": relevant_config(self._config),
            "modules": self.files.json("modules.json").get("", []),
            **self._settings(),
        }
        return content_digest(json.dumps(identity, sort_keys=True))

    def _settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "dim": self._dim}

    def describe(self) -> dict[str, Any]:
        """Return name, source and settings as JSON, for logs and manifests."""
        return {"name": self.files.name, "source": self.files.source, "pooling": "static", **self._settings()}

    def prepare(self, raw: Sequence[str]) -> list[StaticText]:
        """Cut texts behind the last token that is read."""
        texts = [self.prompt + text for text in raw]
        samples = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            size = len(encoding.ids)
            if self.max_tokens is not None and size > self.max_tokens:
                text, cut = text[: encoding.offsets[self.max_tokens - 1][1]], size - self.max_tokens
                size = self.max_tokens
            else:
                cut = 0
            samples.append(StaticText(text, size, cut))
        return samples

    def encode(self, batch: Sequence[StaticText]) -> Tensor:
        """Encode texts to vectors, float32 ``[len(batch), dim]`` on the CPU."""
        if not batch:
            return torch.zeros(0, self.dim)
        texts = [sample.text for sample in batch]
        vectors = self._model.encode(texts, max_length=None, use_multiprocessing=False)
        result = torch.from_numpy(np.asarray(vectors, dtype=np.float32))
        if self._dim:
            result = result[:, : self._dim]
            if self._model.normalize:
                result = F.normalize(result, dim=-1)
        return result
