r"""What a search needs of an export beside the content: titles as vectors, how texts become vectors, who is bought with whom.

    search.safetensors   [titles f32[N,f]]  [center f32[F]]  [transform f32[F,f]]
                         neighbour.offsets i64[N+1]  neighbour.items i32[nnz]  neighbour.shares f32[nnz]
                         [picture.center f32[F]]  [picture.transform f32[F,f]]
                         [sound.center f32[F]]  [sound.transform f32[F,f]]  [sound_text.center f32[F]]

A text's vector e becomes the direction (e - center) T / |(e - center) T|, in the space of the export's ``content``. The
neighbours of item j are the items i with the largest

    c_ji = G_ji / ((G_jj + .05 g) (G_ii / g)^b),    G = X' diag(w) X of the training interactions, g its mean diagonal

about the share of j's buyers who bought i too, less for items that everybody buys. Plain NumPy.
"""

from dataclasses import dataclass
from html import unescape
from typing import Any

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import SEARCH
from recbole_llm.export.tensor_file import parse_tensors, take

TINY = np.float32(1e-12)
TEXTS_OF_A_CENTRE = 128  # of the items, by whose mean a text tower's vectors are centred


def plain(text: str) -> str:
    """Replace HTML entities: ``AT&amp;T`` is ``AT&T``. Titles, texts and queries all pass here."""
    return unescape(text)


@dataclass(frozen=True, eq=False)
class TextSpace:
    """The space of the items' content vectors, and the way of a text's vector into it.

    Attributes:
        center: ``[F]`` float32, subtracted from the encoder's vector.
        transform: ``[F, f]`` float32; ``None`` for the identity.
    """

    center: np.ndarray
    transform: np.ndarray | None = None

    @property
    def dim(self) -> int:
        """Dimensions f of a direction."""
        return len(self.center) if self.transform is None else self.transform.shape[1]

    def directions(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors ``[n, f]`` float32 of the encoder's vectors ``[n, F]``; zero where one lies at the centre.

        Raises:
            ValueError: if the vectors have another length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.center):
            raise ValueError(
                f"text_vector has {vectors.shape[-1]} dimensions, expected {len(self.center)}: another encoder made it."
            )
        z = vectors.astype(np.float32) - self.center
        if self.transform is not None:
            z = z @ self.transform
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        return np.where(norm > 1e-5 * np.linalg.norm(self.center), z / np.maximum(norm, TINY), np.float32(0))


@dataclass(frozen=True, eq=False)
class SearchTables:
    """Arrays of N items.

    Attributes:
        offsets: ``[N + 1]`` int64, where each item's neighbours begin.
        items: ``[nnz]`` int32 rows, ascending and unique within an item, never the item itself.
        shares: ``[nnz]`` float32, c of the module docstring, positive.
        titles: ``[N, f]`` float32 directions of the titles, or ``None``.
        space: how texts come into the space of the titles, or ``None``.
        picture_space: how pictures come into the space of the items' pictures, or ``None``.
        sound_space: likewise of sounds.
        sound_text_space: how texts come into the space of the items' sounds, where one encoder reads both, or ``None``.

    Raises:
        ValueError: on parts that do not fit each other.
    """

    offsets: np.ndarray
    items: np.ndarray
    shares: np.ndarray
    titles: np.ndarray | None = None
    space: TextSpace | None = None
    picture_space: TextSpace | None = None
    sound_space: TextSpace | None = None
    sound_text_space: TextSpace | None = None

    def __post_init__(self) -> None:
        n_items = len(self.offsets) - 1
        sizes = np.diff(self.offsets)
        if n_items < 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.items) or (sizes < 0).any():
            raise ValueError("neighbour.offsets do not rise from 0 to the number of neighbours.")
        if len(self.items) and (self.items.min() < 0 or self.items.max() >= n_items):
            raise ValueError(f"neighbour.items names an item outside the catalogue of {n_items}.")
        owner = np.repeat(np.arange(n_items), sizes)
        if (self.items == owner).any():
            raise ValueError("neighbour.items names an item as its own neighbour.")
        if not ((np.diff(self.items.astype(np.int64)) > 0) | (np.diff(owner) > 0)).all():
            raise ValueError("neighbour.items are not ascending and unique.")
        if len(self.shares) != len(self.items) or not (self.shares > 0).all():
            raise ValueError("neighbour.shares are not one positive number for each neighbour.")
        if (self.titles is None) != (self.space is None):
            raise ValueError("titles and center belong together.")
        if self.titles is not None and self.space is not None and self.titles.shape != (n_items, self.space.dim):
            raise ValueError(f"titles is {self.titles.shape}, expected {(n_items, self.space.dim)}.")
        sounds, texts = self.sound_space, self.sound_text_space
        if texts is not None and (sounds is None or len(sounds.center) != len(texts.center)):
            raise ValueError("sound_text.center and sound.center do not agree.")

    @property
    def has_neighbours(self) -> np.ndarray:
        """Items with a neighbour, ``[N]`` bool."""
        return np.diff(self.offsets) > 0

    def to_tensors(self) -> dict[str, np.ndarray]:
        """As the file holds them."""
        float32: Any = lambda array: np.ascontiguousarray(array, dtype=np.float32)  # noqa: E731
        tensors: dict[str, np.ndarray] = {
            "neighbour.offsets": np.ascontiguousarray(self.offsets, dtype=np.int64),
            "neighbour.items": np.ascontiguousarray(self.items, dtype=np.int32),
            "neighbour.shares": float32(self.shares),
        }
        if self.titles is not None and self.space is not None:
            tensors |= {"titles": float32(self.titles), "center": float32(self.space.center)}
            if self.space.transform is not None:
                tensors["transform"] = float32(self.space.transform)
        for prefix, space in (("picture", self.picture_space), ("sound", self.sound_space)):
            if space is not None:
                tensors[f"{prefix}.center"] = float32(space.center)
                if space.transform is not None:
                    tensors[f"{prefix}.transform"] = float32(space.transform)
        if self.sound_text_space is not None:  # only the centre is its own
            tensors["sound_text.center"] = float32(self.sound_text_space.center)
        return tensors


def _space(tensors: dict[str, np.ndarray], prefix: str) -> TextSpace | None:
    get: Any = lambda name, *shape: take(tensors, SEARCH, f"{prefix}{name}", np.float32, shape)  # noqa: E731
    center = get("center", None) if f"{prefix}center" in tensors else None
    transform = get("transform", None, None) if f"{prefix}transform" in tensors else None
    if transform is not None and (center is None or len(transform) != len(center)):
        raise ExportError(f"{SEARCH}: {prefix}transform and {prefix}center do not agree.")
    return None if center is None else TextSpace(center, transform)


def read_search(content: memoryview, n_items: int) -> SearchTables:
    """Read ``search.safetensors`` and check it.

    Raises:
        ExportError: if an array is missing, damaged or of another catalogue.
    """
    tensors = parse_tensors(content, SEARCH)
    get: Any = lambda name, dtype, *shape: take(tensors, SEARCH, name, dtype, shape)  # noqa: E731
    offsets = get("neighbour.offsets", np.int64, n_items + 1)
    items = get("neighbour.items", np.int32, None)
    shares = get("neighbour.shares", np.float32, None)
    titles = get("titles", np.float32, n_items, None) if "titles" in tensors else None
    space, pictures, sounds = _space(tensors, ""), _space(tensors, "picture."), _space(tensors, "sound.")
    texts = _space(tensors, "sound_text.")
    if texts is not None and sounds is not None:
        texts = TextSpace(texts.center, sounds.transform)
    if tensors:
        raise ExportError(f"{SEARCH} holds tensors that do not belong there: {', '.join(sorted(tensors))[:200]}.")
    try:
        return SearchTables(offsets, items, shares, titles, space, pictures, sounds, texts)
    except ValueError as error:
        raise ExportError(f"{SEARCH}: {error}") from None
