"""Read an export and trust nothing in it.

    EXPORT/                  immutable once written
      manifest.json          schema, sizes and sha256 of every other file, the model's constants
      vectors.safetensors    item.vector f32[N,D]  item.source f32[N,D]  item.bias f32[N]  item.trained u8[N]
                             item.listed u8[N]  user.offset f32[D]  [user.part f32[U,D]]; row 0 is the first item: no padding
                             with --dtype int8, for item.vector, item.source and user.part each NAME.codes i8 and NAME.scale
                             f32[.,blocks], and rotation.signs i8[D]: see quantise.py
      exact.safetensors      item.vector, item.source and user.part in f32, only with --dtype int8 --rescore
      history.safetensors    offsets i64[U+1]  items i32[nnz]  weight f32[nnz]  [rank f32[nnz]]   histories
                             [disliked_offsets i64[U+1]  disliked_items i32[m]]   seen, not liked and never recommended
      direct.safetensors     only where a block has direct rows: see direct.py
      text_map.safetensors   only where texts can be mapped: see text_map.py; likewise picture_map.safetensors
      profile_map.safetensors   only where users have texts: what a profile adds to a query, see profile_map.py
      thumbnails.safetensors  only with --images thumbs: see thumbnails.py
      content.safetensors    only where items have content: by modality f32[N,f], unit vectors, zero where an item has none
      search.safetensors     titles as vectors, and each item's neighbours: see search_tables.py
      search.faiss           only where there are so many items that searches need an index: see retrieval/search_index.py
      sequence.safetensors   only where a block reads the order of a history: see sequence.py
      item_ids.txt  user_ids.txt   one JSON string a line; line number = row
      items.jsonl            {"title", "text", "attributes"} a line; line number = row
      encoder/               only where the encoder travels along
      recommend.onnx  text_map.onnx   only with --onnx: see onnx_graphs.py
      README.md              model card

A score is <q, w_i> + b_i, and what direct rows add. The columns are blocks, one after the other; the part of q in block b of a
user with history weights t_j is

    x_b = sum_j t_j v_jb / (sum_j t_j)^exponent_b + offset_b + part_ub,    q_b = scale_b x_b    [scale_b x_b / |x_b|]

where the bracket is scoring "cosine". A block with a decay has weights t_j exp(-rank_j / decay); rank 0 is the
newest item of the history. A block with dislikes d has part_ub less d sum_j v_jb over the items that u dislikes. The query of
a block of scoring "sequence" is its scale times the state of sequence.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from recbole_llm.export.content_maps import read_map, read_picture_map
from recbole_llm.export.direct import DirectRows, read_direct
from recbole_llm.export.errors import NO_PROFILES, ExportError
from recbole_llm.export.manifest import (
    CONTENT,
    DIRECT,
    EXACT,
    HISTORY,
    INDEX,
    ITEM_IDS,
    ITEMS,
    MANIFEST,
    PICTURE_MAP,
    PROFILE_MAP,
    SEARCH,
    SEARCH_INDEX,
    TEXT_MAP,
    THUMBNAILS,
    USER_IDS,
    VECTORS,
    Manifest,
    read_manifest,
)
from recbole_llm.export.profile_map import ProfileMap, read_profile_map
from recbole_llm.export.quantise import CodedTable
from recbole_llm.export.search_tables import SearchTables, read_search
from recbole_llm.export.sequence import SEQUENCE_FILE, SequenceWeights, read_sequence
from recbole_llm.export.tensor_file import check_file, open_file, parse_json, parse_tensors, take
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.thumbnails import Thumbnails, read_thumbnails

READ_FILES = frozenset(
    {
        VECTORS,
        HISTORY,
        TEXT_MAP,
        PROFILE_MAP,
        PICTURE_MAP,
        THUMBNAILS,
        CONTENT,
        DIRECT,
        SEARCH,
        SEARCH_INDEX,
        SEQUENCE_FILE,
        ITEM_IDS,
        USER_IDS,
        ITEMS,
        INDEX,
    }
)  # others are only checked
JSON_BYTES_AT_ONCE = 1 << 17  # about a millisecond


@dataclass(frozen=True)
class ItemRecord:
    """What is shown of an item, and filtered by."""

    title: str
    text: str | None
    attributes: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Export:
    """A verified export in memory; arrays are read-only views of what was read, or of the mapped files.

    Attributes:
        folder: where it lies.
        manifest: its manifest.
        item_ids: ``N`` external ids.
        user_ids: ``U`` external ids.
        records: ``N`` records.
        vector: ``[N, D]`` float32 targets w_i; a :class:`recbole_llm.export.quantise.CodedTable`, read alike, of eight bits.
        source: ``[N, D]`` float32 sources v_j; likewise.
        bias: ``[N]`` float32.
        trained: ``[N]`` bool; the others are cold, known by their text alone.
        listed: ``[N]`` bool; the others have no place in answers.
        offset: ``[D]`` float32 of every user.
        user_part: ``[U, D]`` float32 of each user, likewise, or ``None``.
        history_offsets: ``[U + 1]`` int64.
        history_items: ``[nnz]`` int32 rows, ascending within a user.
        history_weight: ``[nnz]`` float32, t_j.
        text_map: or ``None``.
        index: bytes of the index file, or ``None``.
        history_rank: ``[nnz]`` float32, 0 for a user's newest item; ``None`` where no block fades or reads the order.
        disliked_offsets: ``[U + 1]`` int64; ``None`` where no user dislikes an item.
        disliked_items: ``[m]`` int32 rows, ascending within a user: seen, not liked, and in no answer to the user.
        encoders: folders or names on the hub that may be loaded as the encoder of its texts, named by who opened it and never
            by its files.
        picture_encoders: the same of its pictures.
        profile_map: what somebody's profile adds to a query; ``None`` where the model reads no texts of users.
        content: by modality ``[N, f]`` float32 unit vectors of the items' content, zero rows for items without.
        search: what searches need beside the content; ``None`` in exports that were written before there were any.
        search_index: bytes of their index, or ``None``.
        sequence: of the block that reads the order of a history, or ``None``.
        direct: direct rows by the place of their block.
        picture_map: as ``text_map``, of pictures.
        thumbnails: small pictures of the items, or ``None``.
    """

    folder: Path
    manifest: Manifest
    item_ids: list[str]
    user_ids: list[str]
    records: list[ItemRecord]
    vector: np.ndarray
    source: np.ndarray
    bias: np.ndarray
    trained: np.ndarray
    listed: np.ndarray
    offset: np.ndarray
    user_part: np.ndarray | None
    history_offsets: np.ndarray
    history_items: np.ndarray
    history_weight: np.ndarray
    text_map: TextMap | None
    index: memoryview | None = None
    history_rank: np.ndarray | None = None
    content: Mapping[str, np.ndarray] = field(default_factory=dict)
    disliked_offsets: np.ndarray | None = None
    disliked_items: np.ndarray | None = None
    encoders: tuple[str, ...] = ()
    search: SearchTables | None = None
    search_index: memoryview | None = None
    picture_encoders: tuple[str, ...] = ()
    sequence: SequenceWeights | None = None
    profile_map: ProfileMap | None = None
    direct: Mapping[int, DirectRows] = field(default_factory=dict)
    picture_map: TextMap | None = None
    thumbnails: Thumbnails | None = None

    def disliked_of(self, user: int) -> np.ndarray:
        """Return the rows that a user has seen and not liked, ``[m]`` int64 by the user's row."""
        if self.disliked_offsets is None or self.disliked_items is None:
            return np.zeros(0, np.int64)
        return self.disliked_items[slice(*self.disliked_offsets[user : user + 2])].astype(np.int64)

    def part_of(self, user: int) -> np.ndarray | None:
        """Return the summand of one user's query, ``[D]`` float32 by the user's row; ``None`` without any."""
        parts = self.user_parts(user, user + 1)
        return None if parts is None else parts[0]

    def part_of_profile(self, vector: np.ndarray) -> np.ndarray:
        """Return the summand of the query of somebody who has a profile alone, ``[D]`` float32, by its vector ``[F]``.

        Raises:
            ValueError: if the model reads no texts of users, or the vector has another length.
        """
        if self.profile_map is None:
            raise ValueError(NO_PROFILES)
        return self.profile_map.apply(vector, len(self.offset))

    def user_parts(self, first: int, last: int) -> np.ndarray | None:
        """Return the summands of the queries of users ``first`` to ``last``, ``[last - first, D]`` float32.

        They are the users' own parts less what their disliked items count; ``None`` without either.
        """
        parts = None if self.user_part is None else self.user_part[first:last]
        bounds, items = self.disliked_offsets, self.disliked_items
        if bounds is None or items is None or not any(block.dislikes for block in self.manifest.blocks):
            return parts
        factor = np.concatenate([np.full(b.dim, b.dislikes, np.float32) for b in self.manifest.blocks])
        found = np.zeros((last - first, len(self.offset)), np.float32) if parts is None else parts.copy()
        for at, user in enumerate(range(first, last)):
            disliked = items[bounds[user] : bounds[user + 1]]
            if len(disliked):
                found[at] -= factor * self.source[disliked].sum(0)
        return found


def load_export(
    folder: str | Path, *, verify: bool = True, mapped: bool = False, encoders: Sequence[str] = ()
) -> Export:
    """Read an export and check everything that can be checked.

    Args:
        folder: what ``recbole-llm export`` wrote.
        verify: compare every file's sha256 with the manifest's. Sizes, shapes, dtypes, finiteness, bounds and ids are
            checked in any case.
        mapped: map the files instead of reading them: processes share their pages, and a file that is written over or cut
            off changes answers or ends the process.
        encoders: folders or names on the hub that may be loaded as the encoder of its texts, where it holds none itself.

    Raises:
        ExportError: with one sentence that says what is wrong and what to do.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_folder(folder, manifest)
    opened = {}
    for name, sums in manifest.files.items():
        sha256 = sums.sha256 if verify else None
        if name == EXACT:  # a few rows of it are read for an answer
            opened[name] = open_file(folder / name, sums.bytes, sha256, mapped=True)
        elif name in READ_FILES:
            opened[name] = open_file(folder / name, sums.bytes, sha256, mapped=mapped)
        else:
            check_file(folder / name, sums.bytes, sha256)
    N, U, D = manifest.counts["items"], manifest.counts["users"], manifest.dim

    tensors = parse_tensors(opened[VECTORS], VECTORS)
    dims = [block.dim for block in manifest.blocks]
    is_coded = "rotation.signs" in tensors
    signs = take(tensors, VECTORS, "rotation.signs", np.int8, (D,)) if is_coded else None
    exact = parse_tensors(opened[EXACT], EXACT) if EXACT in opened else None
    if exact is not None and not is_coded:
        raise ExportError(f"{EXACT} belongs to vectors in eight bits, and those of {VECTORS} are float32.")
    vector = _read_table(tensors, "item.vector", N, dims, signs, exact)
    source = _read_table(tensors, "item.source", N, dims, signs, exact)
    bias = take(tensors, VECTORS, "item.bias", np.float32, (N,))
    trained = take(tensors, VECTORS, "item.trained", np.uint8, (N,)).astype(bool)
    listed = take(tensors, VECTORS, "item.listed", np.uint8, (N,)).astype(bool)
    offset = take(tensors, VECTORS, "user.offset", np.float32, (D,))
    has_part = "user.part" in tensors or "user.part.codes" in tensors
    part = _read_table(tensors, "user.part", U, dims, signs, exact) if has_part else None
    _nothing_left(exact or {}, EXACT)
    _nothing_left(tensors, VECTORS)
    if int(trained.sum()) != manifest.counts["trained_items"]:
        raise ExportError(f"{VECTORS}: {int(trained.sum())} items are trained, the manifest says another number.")

    tensors = parse_tensors(opened[HISTORY], HISTORY)
    nnz = manifest.counts["interactions"]
    offsets = take(tensors, HISTORY, "offsets", np.int64, (U + 1,))
    items = take(tensors, HISTORY, "items", np.int32, (nnz,))
    weight = take(tensors, HISTORY, "weight", np.float32, (nnz,))
    rank = take(tensors, HISTORY, "rank", np.float32, (nnz,)) if "rank" in tensors else None
    disliked: tuple[np.ndarray | None, np.ndarray | None] = None, None
    if "disliked_offsets" in tensors:
        bounds = take(tensors, HISTORY, "disliked_offsets", np.int64, (U + 1,))
        disliked = bounds, take(tensors, HISTORY, "disliked_items", np.int32, (None,))
        _check_rows(bounds, disliked[1], N, "disliked items")
    _nothing_left(tensors, HISTORY)
    _check_rows(offsets, items, N, "items")
    if (weight < 0).any():
        raise ExportError(f"{HISTORY}: a weight is negative.")
    if (rank is not None) != manifest.reads_ranks:
        raise ExportError(
            f"{HISTORY} and the blocks do not agree: ranks are there where a block fades or reads the order."
        )
    if rank is not None and (rank < 0).any():
        raise ExportError(f"{HISTORY}: a rank is negative.")

    content = _read_content(opened[CONTENT], N) if CONTENT in opened else {}
    return Export(
        folder=folder,
        manifest=manifest,
        item_ids=_read_ids(opened[ITEM_IDS], ITEM_IDS, N),
        user_ids=_read_ids(opened[USER_IDS], USER_IDS, U),
        records=_read_records(opened[ITEMS], N, manifest.attributes),
        vector=vector,
        source=source,
        bias=bias,
        trained=trained,
        listed=listed,
        offset=offset,
        user_part=part,
        history_offsets=offsets,
        history_items=items,
        history_weight=weight,
        text_map=read_map(opened, TEXT_MAP, manifest),
        index=opened.get(INDEX),
        history_rank=rank,
        content=content,
        disliked_offsets=disliked[0],
        disliked_items=disliked[1],
        encoders=tuple(encoders),
        search=_read_search(opened[SEARCH], content, N) if SEARCH in opened else None,
        search_index=opened.get(SEARCH_INDEX),
        sequence=_read_sequence(opened, manifest),
        profile_map=read_profile_map(opened[PROFILE_MAP], manifest) if PROFILE_MAP in opened else None,
        direct=read_direct(opened[DIRECT], N, manifest.blocks) if DIRECT in opened else {},
        picture_map=read_picture_map(opened, manifest, content),
        thumbnails=read_thumbnails(opened[THUMBNAILS], N) if THUMBNAILS in opened else None,
    )


def _read_table(
    tensors: dict[str, np.ndarray],
    name: str,
    rows: int,
    dims: Sequence[int],
    signs: np.ndarray | None,
    exact: dict[str, np.ndarray] | None,
) -> np.ndarray:
    """Read a table of vectors, ``[rows, D]``: float32, or, with the ``signs`` of a rotation, eight bits.

    Rows of such a table are taken from ``exact``, where that is there.
    """
    D = sum(dims)
    if signs is None:
        return take(tensors, VECTORS, name, np.float32, (rows, D))
    codes = take(tensors, VECTORS, f"{name}.codes", np.int8, (rows, D))
    scale = take(tensors, VECTORS, f"{name}.scale", np.float32, (rows, len(dims)))
    if (scale < 0).any() or (np.abs(signs) != 1).any():
        raise ExportError(f"{VECTORS}: a scale of {name!r} is negative, or a sign of the rotation is neither 1 nor -1.")
    floats = None if exact is None else take(exact, EXACT, name, np.float32, (rows, D))
    return cast(np.ndarray, CodedTable(codes, scale, signs, dims, floats))


def _read_content(content: memoryview, n_items: int) -> dict[str, np.ndarray]:
    tensors = parse_tensors(content, CONTENT)
    return {name: take(tensors, CONTENT, name, np.float32, (n_items, None)) for name in sorted(tensors)}


def _read_search(tensors: memoryview, content: Mapping[str, np.ndarray], n_items: int) -> SearchTables:
    search = read_search(tensors, n_items)
    texts = content.get("text")
    if search.titles is not None and (texts is None or texts.shape != search.titles.shape):
        raise ExportError(f"{SEARCH}: titles are not vectors of the kind of 'text' in {CONTENT}.")
    space, pictures = search.picture_space, content.get("image")
    if space is not None and (pictures is None or pictures.shape[1] != space.dim):
        raise ExportError(f"{SEARCH}: the pictures' space is none of the vectors of 'image' in {CONTENT}.")
    space, sounds = search.sound_space, content.get("audio")
    if space is not None and (sounds is None or sounds.shape[1] != space.dim):
        raise ExportError(f"{SEARCH}: the sounds' space is none of the vectors of 'audio' in {CONTENT}.")
    return search


def _read_sequence(opened: Mapping[str, memoryview], manifest: Manifest) -> SequenceWeights | None:
    block = manifest.sequence
    return None if block is None else read_sequence(opened[SEQUENCE_FILE], block.dim)


def _check_folder(folder: Path, manifest: Manifest) -> None:
    listed = {MANIFEST, *manifest.files}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ExportError(f"{name} is a symbolic link; an export holds plain files only.")
        if not path.is_dir() and name not in listed:
            raise ExportError(
                f"{name} is not listed in {MANIFEST}; an export is immutable. Remove it, or export again."
            )


def _nothing_left(tensors: dict[str, np.ndarray], file: str) -> None:
    if tensors:
        raise ExportError(f"{file} holds tensors that do not belong there: {', '.join(sorted(tensors))[:200]}.")


def _check_rows(offsets: np.ndarray, items: np.ndarray, n_items: int, what: str) -> None:
    sizes = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(items) or (sizes < 0).any():
        raise ExportError(f"{HISTORY}: offsets do not rise from 0 to the number of {what}.")
    if len(items) and (items.min() < 0 or items.max() >= n_items):
        raise ExportError(f"{HISTORY}: an item is outside the catalogue of {n_items}.")
    rises = np.diff(items.astype(np.int64)) > 0
    rises[offsets[1:-1][(offsets[1:-1] > 0) & (offsets[1:-1] < len(items))] - 1] = True  # from one user to the next
    if not rises.all():
        raise ExportError(f"{HISTORY}: the {what} of a user are not ascending and unique.")


def _json_lines(content: memoryview, name: str, count: int) -> list[Any]:
    text = bytes(content)
    if text and not text.endswith(b"\n"):
        raise ExportError(f"{name} does not end with a line break: it is cut off.")
    lines = text.count(b"\n")
    values: list[Any] = []
    start = 0
    while start < len(text):  # in pieces: the parser lets no other thread run, and a service loads while it answers
        stop = text.find(b"\n", start + JSON_BYTES_AT_ONCE)
        stop = len(text) - 1 if stop < 0 else stop
        values += parse_json(b"[" + text[start:stop].replace(b"\n", b",") + b"]", name)
        start = stop + 1
    if len(values) != count or lines != count:
        raise ExportError(f"{name} has {lines} lines, the manifest says {count}.")
    return values


def _read_ids(content: memoryview, name: str, count: int) -> list[str]:
    ids = _json_lines(content, name, count)
    if not all(isinstance(value, str) for value in ids):
        raise ExportError(f"{name}: every line must be a JSON string.")
    if len(set(ids)) != len(ids):
        raise ExportError(f"{name}: an id is repeated.")
    return ids


def fits_kind(value: Any, kind: str) -> bool:
    """Return whether an attribute's value has its declared kind.

    Example:
        >>> fits_kind(["Drama"], "tokens"), fits_kind("1994", "number")
        (True, False)
    """
    if kind == "token":
        return isinstance(value, str)
    if kind == "tokens":
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return type(value) in (int, float) and np.isfinite(value)


def _read_records(content: memoryview, count: int, attributes: Mapping[str, str]) -> list[ItemRecord]:
    records = []
    for number, raw in enumerate(_json_lines(content, ITEMS, count), start=1):
        if not (
            isinstance(raw, dict)
            and raw.keys() <= {"title", "text", "attributes"}
            and isinstance(raw.get("title"), str)
            and isinstance(raw.get("text"), str | None)
            and isinstance(raw.get("attributes"), dict)
        ):
            raise ExportError(f"{ITEMS}, line {number}: expected title, text and attributes.")
        for name, value in raw["attributes"].items():
            if name not in attributes or not fits_kind(value, attributes[name]):
                raise ExportError(f"{ITEMS}, line {number}: attribute {name[:64]!r} is not as declared.")
        records.append(ItemRecord(raw["title"], raw.get("text"), raw["attributes"]))
    return records
