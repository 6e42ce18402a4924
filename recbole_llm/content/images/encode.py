"""Picture files to a table of vectors: :mod:`recbole_llm.content.media.encode` with pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.content.images.files import PICTURES
from recbole_llm.content.media.encode import FileCounts, encode_files
from recbole_llm.content.store.feature_table import FeatureTable
from recbole_llm.content.store.store import FeatureStore


def encode_pictures(
    paths: Sequence[Sequence[Path]], encoder: Any, store: FeatureStore | None = None, *, show_progress: bool = False
) -> tuple[FeatureTable, FileCounts]:
    """Encode the pictures of items; arguments as :func:`recbole_llm.content.media.encode.encode_files`."""
    return encode_files(PICTURES, paths, encoder, store, show_progress=show_progress)
