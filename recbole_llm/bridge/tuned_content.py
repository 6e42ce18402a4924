"""A fine-tuned encoder in a dataset: every vector and every question then goes through it and not through its base."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recbole_llm.bridge.options import Options
from recbole_llm.content.encoders.resolve import resolve_encoder
from recbole_llm.content.tuning.merge import merged_folder

TUNED = "_tuned"  # attribute of a dataset


@dataclass(frozen=True, eq=False)
class TunedContent:
    """What a fine-tuning left.

    Attributes:
        modality: ``text`` or ``image``.
        adapters: bytes of :class:`recbole_llm.content.tuning.adapter_file.Adapters`.
        vectors: ``[N, F]``, the items' as the towers read them.
    """

    modality: str
    adapters: bytes
    vectors: Tensor

    def to_state(self) -> dict[str, Any]:
        """As plain values and tensors, for a checkpoint."""
        data = torch.frombuffer(bytearray(self.adapters), dtype=torch.uint8)
        return {"modality": self.modality, "adapters": data, "vectors": self.vectors.cpu()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TunedContent":
        """The inverse of :meth:`to_state`.

        Raises:
            ValueError: if it is of another form.
        """
        modality, adapters, vectors = state["modality"], state["adapters"], state["vectors"]
        if modality not in ("text", "image") or adapters.dtype != torch.uint8 or vectors.dim() != 2:
            raise ValueError("The checkpoint's fine-tuned encoder is of another form than this version's.")
        return cls(modality, adapters.cpu().numpy().tobytes(), vectors)


def options_of(dataset: Any) -> Options:
    """Our options of a dataset, which name its fine-tuned encoder where it has one.

    Raises:
        ValueError: if the base is not at hand, or another one.
    """
    options, tuned = Options.from_config(dataset.config), dataset.__dict__.get(TUNED)
    if tuned is None:
        return options
    if tuned.modality == "text":
        files = resolve_encoder(str(options.encoder), options.encoder_revision)
        return replace(options, encoder=str(merged_folder(files, tuned.adapters)), encoder_revision=None)
    sources = dict(options.item_modalities or {})
    files = resolve_encoder(sources["image"].encoder)
    sources["image"] = replace(sources["image"], encoder=str(merged_folder(files, tuned.adapters)))
    return replace(options, item_modalities=sources)


def take_tuned(dataset: Any, tuned: TunedContent | None) -> None:
    """Let a dataset's vectors be those of a fine-tuned encoder; ``None`` changes nothing."""
    present = dataset.__dict__.get(TUNED)
    if tuned is None or (present is not None and present.adapters == tuned.adapters):
        return
    dataset.__dict__[TUNED] = tuned
    dataset.__dict__.pop("_item_features", None)
