"""The text tower of a model that has texts and pictures, or texts and sounds, in one space: CLIP, SigLIP, CLAP.

    load_encoder("google/siglip2-base-patch16-224")        # texts of the items, in the space of its pictures

CLIP and CLAP read a text's tokens. SigLIP reads as many as it was trained with, the rest padding that it does not mask.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from recbole_llm.content.encoders.pretrained import DTYPES, load_pretrained, quiet_transformers
from recbole_llm.content.encoders.resolve import ModelFiles, file_digest, refuse_code_from_elsewhere, relevant_config
from recbole_llm.content.encoders.sentence_modules import content_digest

FORMAT = 1
PADS_TO_THE_END = ("siglip", "siglip2")
_OTHER_TOWERS = ("vision_config", "audio_config")


@dataclass(frozen=True)
class TowerText:
    """A text ready for a tower.

    Attributes:
        ids: its tokens, special ones too.
        size: their number.
        cut: tokens that the tower does not see.
    """

    ids: tuple[int, ...]
    size: int
    cut: int


def is_joint(files: ModelFiles) -> bool:
    """Return whether a model has a text tower beside one of pictures or sounds."""
    config = files.json("config.json")
    return "text_config" in config and any(name in config for name in _OTHER_TOWERS)


class TextTower:
    """A text tower as an encoder of texts.

    Args:
        files: from :func:`recbole_llm.content.encoders.resolve.resolve_encoder`.
        prompt: put before each text.
        max_tokens: tokens read of a text; ``None`` for as many as the tower takes.
        overflow: ``truncate``.
        dim: ``None``; the space is that of the other tower.
        dtype: of the model; vectors are float32.
        device: where it runs.

    Raises:
        ValueError: on a setting that would leave the common space, or a model that would run code of its own.
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
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"encoder_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if overflow != "truncate" or dim is not None:
            raise ValueError(
                f"encoder {files.name!r} is the text tower of a common space: encoder_overflow {overflow!r} and encoder_dim "
                f"{dim!r} have no meaning for it. Leave them empty."
            )
        refuse_code_from_elsewhere(files)
        self.files, self.prompt, self.dtype, self.device = files, prompt or "", dtype, torch.device(device)
        self._config = files.json("config.json")
        self.kind = str(self._config.get("model_type"))
        own = int(self._tower.get("max_position_embeddings", 77))
        own -= (
            2 if self._tower.get("model_type") in ("roberta", "clap_text_model") else 0
        )  # positions start behind padding
        if max_tokens is not None and not 3 <= max_tokens <= own:
            raise ValueError(f"encoder_max_tokens must be between 3 and {own} for {files.name!r}, got {max_tokens}.")
        self.max_tokens = max_tokens or own

    @property
    def _tower(self) -> dict[str, Any]:
        found = self._config.get("text_config")
        return found if isinstance(found, dict) else {}

    @cached_property
    def dim(self) -> int:
        """Dimension of the vectors."""
        with torch.no_grad():
            return self.encode(self.prepare(["a"])).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of weights, tokenizer and every setting that changes a vector."""
        identity = {
            "format": FORMAT,
            "kind": "text tower",
            "weights": [file_digest(path) for path in self.files.weights()],
            "tokenizer": [file_digest(path) for path in self.files.tokenizer()],
            "config": relevant_config(self._config),
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
        }
        return content_digest(json.dumps(identity, sort_keys=True))

    def describe(self) -> dict[str, Any]:
        """Return name, source and settings as JSON, for logs and manifests."""
        return {
            "name": self.files.name,
            "source": self.files.source,
            "pooling": f"{self.kind} text tower",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
        }

    def prepare(self, raw: Sequence[str]) -> list[TowerText]:
        """Tokenise texts and cut them behind the last token that the tower reads; its last one stays the end's."""
        samples = []
        for text in raw:
            ids = list(self._tokenizer(self.prompt + text)["input_ids"])
            cut = max(len(ids) - self.max_tokens, 0)
            if cut:
                ids = [*ids[: self.max_tokens - 1], ids[-1]]
            samples.append(TowerText(tuple(ids), len(ids), cut))
        return samples

    def encode(self, batch: Sequence[TowerText]) -> Tensor:
        """Encode tokenised texts to float32 vectors ``[len(batch), dim]`` on the encoder's device."""
        if not batch:
            return torch.zeros(0, self.dim, device=self.device)
        whole = self.kind in PADS_TO_THE_END
        width = self.max_tokens if whole else max(text.size for text in batch)
        ids = torch.full((len(batch), width), self._tokenizer.pad_token_id or 0)
        for row, text in zip(ids, batch, strict=True):
            row[: text.size] = torch.tensor(text.ids)
        mask = torch.arange(width) < torch.tensor([text.size for text in batch])[:, None]
        given = {"input_ids": ids.to(self.device)}
        if not whole:
            given["attention_mask"] = mask.long().to(self.device)
        found = self._model.get_text_features(**given)
        vectors: Tensor = getattr(found, "pooler_output", found)  # transformers 4 gives the tensor itself
        return vectors.float()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(self.files.folder), local_files_only=True)

    @cached_property
    def _model(self) -> Any:
        model = load_pretrained(self.files, self.dtype, self.device, ())
        if not hasattr(model, "get_text_features"):
            raise ValueError(
                f"encoder {self.files.name!r}: {type(model).__name__} has no text tower (get_text_features)."
            )
        return model
