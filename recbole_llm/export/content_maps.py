"""Read the maps of texts and of pictures of an export, and check them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import CONTENT, PICTURE_MAP, TEXT_MAP, Manifest
from recbole_llm.export.tensor_file import parse_tensors, take
from recbole_llm.export.text_map import TextMap


def read_map(opened: Mapping[str, memoryview], file: str, manifest: Manifest) -> TextMap | None:
    """Read the map of texts or of pictures, ``None`` where there is none.

    Args:
        opened: the files by name.
        file: ``TEXT_MAP`` or ``PICTURE_MAP``.
        manifest: of the export.

    Raises:
        ExportError: if the file is damaged, or of another model.
    """
    if file not in opened:
        return None
    tensors = parse_tensors(opened[file], file)
    is_text = file == TEXT_MAP
    described = (manifest.text_map if is_text else manifest.picture_map) or {}
    encoder = manifest.encoder if is_text else manifest.pictures
    D = manifest.dim
    get = lambda key, *shape: take(tensors, file, key, np.float32, shape)  # noqa: E731
    optional = lambda key, *shape: get(key, *shape) if key in tensors else None  # noqa: E731
    center = get("center", None)
    gamma = optional("gamma")
    arguments: dict[str, Any] = {
        "vector": get("vector", None, D),
        "source": get("source", None, D),
        "bias": get("bias", None),
        "vector_offset": get("vector_offset", D),
        "source_offset": get("source_offset", D),
        "bias_offset": float(get("bias_offset")),
        "transform": optional("transform", len(center), None),
        "support": optional("support", None, None),
        "gamma": None if gamma is None else float(gamma),
    }
    if tensors:
        raise ExportError(f"{file} holds tensors that do not belong there: {', '.join(sorted(tensors))[:200]}.")
    if encoder is not None and encoder.feature_dim != len(center):
        raise ExportError(f"{file} maps vectors of {len(center)} dimensions, the encoder gives another number.")
    try:
        return TextMap(
            kind=described.get("kind", ""), center=center, normalize=bool(described.get("normalize")), **arguments
        )
    except ValueError as error:
        raise ExportError(f"{file}: {error}") from None


def read_picture_map(
    opened: Mapping[str, memoryview], manifest: Manifest, content: Mapping[str, np.ndarray]
) -> TextMap | None:
    """Read the map of pictures, and check it against their vectors: what an item of the export has goes through it too.

    Raises:
        ExportError: as :func:`read_map`, or if the vectors are of another kind.
    """
    found, pictures = read_map(opened, PICTURE_MAP, manifest), content.get("image")
    if found is not None and (pictures is None or pictures.shape[1] != found.width):
        raise ExportError(f"{PICTURE_MAP} maps no vectors of the kind of 'image' in {CONTENT}.")
    return found
