"""Vision models of transformers as encoders of pictures.

| model | vector |
|---|---|
| CLIP, SigLIP and others with a text tower | what ``get_image_features`` gives: the space of its texts |
| ViT, DeiT, BEiT, DINOv2, DINOv3 | the first token of the last layer |
| ConvNeXt, ResNet, RegNet, MobileNet, EfficientNet, Swin | the pooled output |
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.content.encoders.pretrained import DTYPES, load_pretrained
from recbole_llm.content.encoders.resolve import ModelFiles, file_digest, refuse_code_from_elsewhere, relevant_config
from recbole_llm.content.encoders.sentence_modules import content_digest
from recbole_llm.content.images.preprocessing import Preprocessing, read_preprocessing
from recbole_llm.content.images.reading import require_pillow
from recbole_llm.content.images.sample import FORMAT, PictureSample

if TYPE_CHECKING:
    from PIL import Image

# by model_type; others are pooled as they pool themselves
FIRST_TOKEN = frozenset({"vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "data2vec-vision"})
PROCESSOR = "preprocessor_config.json"
_NO_PICTURES = "it is no vision model. Give one with a {0}, such as CLIP, SigLIP, DINOv2, ViT, ConvNeXt or ResNet"


class VisionEncoder:
    """A vision model as an encoder of pictures.

    Weights are loaded with the first picture; the fingerprint comes from the files.

    Args:
        files: from :func:`recbole_llm.content.encoders.resolve.resolve_encoder`.
        dtype: of the model; vectors are float32.
        device: where it runs.

    Raises:
        ValueError: on a model that is not understood, or that would run code of its own.
    """

    modality = "image"
    batch_cost: int | None = None

    def __init__(self, files: ModelFiles, *, dtype: str = "float32", device: str | torch.device = "cpu") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"encoder_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.files, self.dtype, self.device = files, dtype, torch.device(device)
        self._config = files.json("config.json")
        if not self._config:
            raise ValueError(f"encoder {files.name!r}: there is no config.json in {files.folder}.")
        refuse_code_from_elsewhere(files)
        processor = files.json(PROCESSOR)
        if not processor:
            raise ValueError(
                f"encoder {files.name!r}: {_NO_PICTURES.format(PROCESSOR)}, or make vectors elsewhere (item_features_file)."
            )
        self.preprocessing: Preprocessing = read_preprocessing(processor, files.name)

    @property
    def side(self) -> int:
        """The shorter side that pictures should have at least."""
        return self.preprocessing.side

    @property
    def batch_size(self) -> int:
        """Pictures of a forward pass that run well."""
        return 8 if self.device.type == "cpu" else 64

    @property
    def joint(self) -> bool:
        """Whether it has a text tower in the same space."""
        return "vision_config" in self._config

    @cached_property
    def dim(self) -> int:
        """Dimension of the vectors."""
        blank = self.preprocessing(require_pillow().new("RGB", (64, 64)))
        with torch.no_grad():
            return self._vectors(blank[None]).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of weights, preprocessing and every setting that changes a vector."""
        identity = {
            "format": FORMAT,
            "kind": "vision",
            "weights": [file_digest(path) for path in self.files.weights()],
            "config": relevant_config(self._config),
            "preprocessing": self.preprocessing.identity(),
            "dtype": self.dtype,
            "pillow": require_pillow().__version__,
        }
        return content_digest(json.dumps(identity, sort_keys=True))

    def prepare(self, raw: Sequence["Image.Image"]) -> list[PictureSample]:
        """Resize, crop and scale RGB pictures."""
        return [PictureSample(self.preprocessing(picture)) for picture in raw]

    def encode(self, batch: Sequence[PictureSample]) -> Tensor:
        """Encode pictures.

        Returns:
            float32 ``[len(batch), dim]`` on the encoder's device; carries gradients unless the caller turned them off.
        """
        if not batch:
            return torch.zeros(0, self.dim, device=self.device)
        return self._vectors(np.stack([sample.pixels for sample in batch]))

    def describe(self) -> dict[str, Any]:
        """Return name, source and settings as JSON, for logs and manifests."""
        return {
            "name": self.files.name,
            "source": self.files.source,
            "kind": str(self._config.get("model_type")),
            "dtype": self.dtype,
            **self.preprocessing.identity(),
        }

    @property
    def module(self) -> torch.nn.Module:
        """The vision model itself, which is loaded for it."""
        found: torch.nn.Module = self._model
        return found

    def _vectors(self, pixels: np.ndarray) -> Tensor:
        model = self._model
        values = torch.from_numpy(pixels).to(self.device, DTYPES[self.dtype])
        if self.joint:
            found = model.get_image_features(pixel_values=values)
            found = getattr(found, "pooler_output", found)  # transformers 4 gives the tensor itself
        elif self._config.get("model_type") in FIRST_TOKEN:
            found = model(pixel_values=values)[0][:, 0]
        else:
            found = model(pixel_values=values).pooler_output
        if not isinstance(found, Tensor) or found.dim() not in (2, 4) or found.shape[2:].numel() != 1:
            raise ValueError(
                f"encoder {self.files.name!r}: {type(model).__name__} gives no vector of a picture; its kind "
                f"{self._config.get('model_type')!r} is not supported. Make vectors elsewhere (item_features_file)."
            )
        return found.flatten(1).float()

    @cached_property
    def _model(self) -> Any:
        model = load_pretrained(self.files, self.dtype, self.device, ("pooler.",))
        if self.joint and not hasattr(model, "get_image_features"):
            raise ValueError(f"encoder {self.files.name!r}: {_NO_PICTURES.format(PROCESSOR)}.")
        return model
