"""The exported model on disk: what it holds, and a reader that trusts nothing.

    EXPORT/                  immutable once written
      manifest.json          schema, sizes and sha256 of every other file, the model's constants
      vectors.safetensors    item.vector f32[N,D]  item.source f32[N,D]  item.bias f32[N]  item.trained u8[N]
                             item.listed u8[N]  user.offset f32[D]  [user.part f32[U,D]]; row 0 is the first item: no padding
      history.safetensors    offsets i64[U+1]  items i32[nnz]  weight f32[nnz]  [rank f32[nnz]]   training histories
      text_map.safetensors   only where texts can be mapped: see text_map.py
      item_ids.txt  user_ids.txt   one JSON string a line; line number = row
      items.jsonl            {"title", "text", "attributes"} a line; line number = row
      encoder/               only where the encoder travels along
      recommend.onnx  text_map.onnx   only with --onnx: see onnx_graphs.py
      README.md              model card

A score is <q, w_i> + b_i. The columns are blocks, one after the other; the part of q in block b of a user with history
weights t_j is

    x_b = sum_j t_j v_jb / (sum_j t_j)^exponent_b + offset_b + part_ub,    q_b = scale_b x_b    [scale_b x_b / |x_b|]

where the bracket is scoring "cosine". A block with a decay has weights t_j = exp(-rank_j / decay) of its own; rank 0 is the
newest item of the history.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.probability import ProbabilityMap
from recbole_llm.serving.errors import ExportError
from recbole_llm.serving.tensor_file import open_file, parse_json, parse_tensors, take
from recbole_llm.serving.text_map import TextMap

SCHEMA = 1
MANIFEST = "manifest.json"
VECTORS, HISTORY, TEXT_MAP = "vectors.safetensors", "history.safetensors", "text_map.safetensors"
ITEM_IDS, USER_IDS, ITEMS, CARD = "item_ids.txt", "user_ids.txt", "items.jsonl", "README.md"
INDEX = "index.faiss"
ONNX_RECOMMEND, ONNX_TEXT_MAP = "recommend.onnx", "text_map.onnx"
ENCODER_FOLDER = "encoder"
REQUIRED = (VECTORS, HISTORY, ITEM_IDS, USER_IDS, ITEMS)
ATTRIBUTE_KINDS = ("token", "tokens", "number")
MAX_MANIFEST_BYTES = 1 << 20
JSON_BYTES_AT_ONCE = 1 << 17  # about a millisecond

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
# one folder of encoder files may hold one more level (1_Pooling/config.json); nothing executable, nothing pickled
_ENCODER_FILE = re.compile(rf"{ENCODER_FOLDER}/(?:{_PART}/)?{_PART}\.(?:safetensors|json|txt|model)")
_PLAIN_FILES = frozenset({*REQUIRED, TEXT_MAP, CARD, INDEX, ONNX_RECOMMEND, ONNX_TEXT_MAP})


@dataclass(frozen=True)
class Block:
    """A range of columns with its own pooling.

    Attributes:
        name: for people.
        dim: its number of columns.
        exponent: of the sum of the history weights that a pooled history is divided by.
        scale: factor of the query.
        scoring: ``dot`` or ``cosine``.
        decay: by which histories fade in this block; ``None`` for the history's own weights.
    """

    name: str
    dim: int
    exponent: float
    scale: float
    scoring: str = "dot"
    decay: float | None = None


@dataclass(frozen=True)
class FileSum:
    """Size and hexadecimal sha256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class EncoderSpec:
    """How texts become vectors: arguments of ``load_encoder``, and what they must give.

    Attributes:
        name: folder or hub name.
        revision: on the hub.
        settings: pooling, prompt, max_tokens, overflow, dim, dtype.
        feature_dim: length of a vector.
        fingerprint: the encoder's; another one's vectors do not fit.
        bundled: whether ``encoder/`` holds it.
    """

    name: str
    revision: str | None
    settings: Mapping[str, Any]
    feature_dim: int
    fingerprint: str
    bundled: bool = False


@dataclass(frozen=True)
class ItemText:
    """How an item's fields make its text: ``fields`` and ``template`` of :mod:`recbole_llm.content.text`."""

    fields: tuple[str, ...]
    template: str


@dataclass(frozen=True)
class Manifest:
    """The entry point of an export.

    Attributes:
        schema: of the files.
        min_reader: smallest schema a reader must know.
        export_id: hash of the files and of the model's constants: two exports with one id answer alike.
        created_at: ISO 8601, UTC.
        producer: versions that wrote it.
        blocks: columns of the vectors.
        history_decay: tau of t = exp(-rank / tau) where histories are weighted by recency, else ``None``.
        probability: the map from scores to probabilities; ``None``, and no field of the file, for the plain sigmoid.
        similar_by: ``vector`` or ``source``: which item vectors similarity compares.
        counts: items, users, interactions, trained_items.
        encoder: ``None`` where no encoder belongs to the model.
        item_text: ``None`` where items have no text.
        attributes: attribute name to one of ``ATTRIBUTE_KINDS``.
        text_map: ``{"kind", "normalize"}``; ``None`` without a map.
        overlay_seq: last change of the service's log that the training data held already.
        index: ``{"kind": "exact"}`` or ``{"kind": "ivf", "nlist", "nprobe", "recall_at_10"}``.
        metrics: what the model card shows.
        files: by name.
    """

    schema: int
    min_reader: int
    export_id: str
    created_at: str
    producer: Mapping[str, str]
    blocks: tuple[Block, ...]
    history_decay: float | None
    similar_by: str
    counts: Mapping[str, int]
    encoder: EncoderSpec | None
    item_text: ItemText | None
    attributes: Mapping[str, str]
    text_map: Mapping[str, Any] | None
    overlay_seq: int
    index: Mapping[str, Any]
    metrics: Mapping[str, Any]
    files: Mapping[str, FileSum] = field(repr=False)
    probability: ProbabilityMap | None = None

    @property
    def dim(self) -> int:
        """Columns D of the vectors."""
        return sum(block.dim for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        values = asdict(self)
        if self.probability is None:  # as exports were before there was a map, with the export_id that they have
            del values["probability"]
        return values

    def identity(self) -> str:
        """The ``export_id`` that these contents must have."""
        part = self.to_json()
        for name in ("export_id", "created_at", "producer", "metrics", "index"):
            del part[name]
        # the card, the index and the graphs describe the model; they do not change an answer
        beside = (CARD, INDEX, ONNX_RECOMMEND, ONNX_TEXT_MAP)
        part["files"] = {name: sums for name, sums in part["files"].items() if name not in beside}
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ItemRecord:
    """What is shown of an item, and filtered by."""

    title: str
    text: str | None
    attributes: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Export:
    """A verified export in memory; arrays are read-only views of the mapped files.

    Attributes:
        folder: where it lies.
        manifest: its manifest.
        item_ids: ``N`` external ids.
        user_ids: ``U`` external ids.
        records: ``N`` records.
        vector: ``[N, D]`` float32 targets w_i.
        source: ``[N, D]`` float32 sources v_j.
        bias: ``[N]`` float32.
        trained: ``[N]`` bool; the others are cold, known by their text alone.
        listed: ``[N]`` bool; the others have no place in answers.
        offset: ``[D]`` float32 of every user.
        user_part: ``[U, D]`` float32 of each user, or ``None``.
        history_offsets: ``[U + 1]`` int64.
        history_items: ``[nnz]`` int32 rows, ascending within a user.
        history_weight: ``[nnz]`` float32, t_j.
        text_map: or ``None``.
        index: bytes of the index file, or ``None``.
        history_rank: ``[nnz]`` float32, 0 for a user's newest item; ``None`` where no block fades.
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, checked for form.

    Raises:
        ExportError: if there is none, it is damaged, or another version is needed to read it.
    """
    if not folder.is_dir():
        raise ExportError(f"{str(folder)!r} is not a folder. Give the folder that 'recbole-llm export' wrote.")
    content = open_file(folder / MANIFEST)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ExportError(f"{MANIFEST} has {len(content)} bytes; at most {MAX_MANIFEST_BYTES} are read.")
    raw = parse_json(content, MANIFEST)
    if not isinstance(raw, dict):
        raise ExportError(f"{MANIFEST} does not hold a JSON object.")
    needed = raw.get("min_reader")
    if type(raw.get("schema")) is not int or type(needed) is not int:
        raise ExportError(f"{MANIFEST} names no schema: this is not an export of recbole-llm.")
    if needed > SCHEMA or raw["schema"] < 1:
        raise ExportError(
            f"The export has schema {raw['schema']} and needs a reader of schema {needed}; this version of recbole-llm "
            f"reads schemas 1 to {SCHEMA}. Upgrade recbole-llm, or export again with this version."
        )
    manifest = _manifest_of(raw)
    if manifest.identity() != manifest.export_id:
        raise ExportError(f"{MANIFEST} does not have the contents of its export_id: it is damaged or was edited.")
    return manifest


def _manifest_of(raw: dict[str, Any]) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    missing = sorted(known - raw.keys() - {"probability"})
    if missing:
        raise ExportError(f"{MANIFEST} lacks {', '.join(missing)}.")
    # of a later schema that this reader may read: what it does not know, it does not need
    raw = {name: raw[name] for name in known & raw.keys()}
    try:
        raw["blocks"] = tuple(Block(**block) for block in raw["blocks"])
        raw["files"] = {name: FileSum(**sums) for name, sums in raw["files"].items()}
        if raw["encoder"] is not None:
            raw["encoder"] = EncoderSpec(**raw["encoder"])
        if raw.get("probability") is not None:
            raw["probability"] = ProbabilityMap.from_json(raw["probability"])
        if raw["item_text"] is not None:
            raw["item_text"] = ItemText(tuple(raw["item_text"]["fields"]), raw["item_text"]["template"])
        manifest = Manifest(**raw)
        _check_manifest(manifest)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{MANIFEST} has a field of the wrong form ({error}).") from None
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    def claim(holds: bool, what: str) -> None:
        if not holds:
            raise ExportError(f"{MANIFEST}: {what}.")

    is_count = lambda value: type(value) is int and value >= 0  # noqa: E731
    is_number = lambda value: type(value) in (int, float)  # noqa: E731
    claim(isinstance(manifest.export_id, str), "export_id is no string")
    claim(bool(manifest.blocks), "there is no block")
    for block in manifest.blocks:
        claim(is_count(block.dim) and block.dim > 0, "a block has no columns")
        claim(is_number(block.exponent) and is_number(block.scale), "a block's exponent or scale is no number")
        claim(block.scoring in ("dot", "cosine"), f"scoring {block.scoring!r} is unknown")
        claim(block.decay is None or (is_number(block.decay) and block.decay > 0), "a block's decay is not positive")
    for name in ("items", "users", "interactions", "trained_items"):
        claim(is_count(manifest.counts.get(name)), f"counts lack {name}")
    claim(is_count(manifest.overlay_seq), "overlay_seq is no count")
    claim(manifest.similar_by in ("vector", "source"), f"similar_by {manifest.similar_by!r} is unknown")
    decay = manifest.history_decay
    claim(decay is None or (is_number(decay) and decay > 0), "history_decay is not positive")
    for name, kind in manifest.attributes.items():
        claim(isinstance(name, str) and kind in ATTRIBUTE_KINDS, f"attribute kind {kind!r} is unknown")
    claim(manifest.index.get("kind") in ("exact", "ivf"), "index is neither exact nor ivf")
    for name, sums in manifest.files.items():
        claim(
            name in _PLAIN_FILES or _ENCODER_FILE.fullmatch(name) is not None, f"the file name {name!r} is not allowed"
        )
        claim(is_count(sums.bytes) and isinstance(sums.sha256, str), f"size or sum of {name} is wrong")
        claim(re.fullmatch(r"[0-9a-f]{64}", sums.sha256) is not None, f"sum of {name} is wrong")
    absent = [name for name in REQUIRED if name not in manifest.files]
    claim(not absent, f"it does not list {', '.join(absent)}")
    claim((manifest.text_map is None) == (TEXT_MAP not in manifest.files), f"text_map and {TEXT_MAP} do not agree")
    claim((manifest.index["kind"] == "ivf") == (INDEX in manifest.files), f"index and {INDEX} do not agree")


def load_export(folder: str | Path, *, verify: bool = True) -> Export:
    """Read an export and check everything that can be checked.

    Args:
        folder: what ``recbole-llm export`` wrote.
        verify: compare every file's sha256 with the manifest's. Sizes, shapes, dtypes, finiteness, bounds and ids are
            checked in any case.

    Raises:
        ExportError: with one sentence that says what is wrong and what to do.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_folder(folder, manifest)
    opened = {
        name: open_file(folder / name, sums.bytes, sums.sha256 if verify else None)
        for name, sums in manifest.files.items()
    }
    N, U, D = manifest.counts["items"], manifest.counts["users"], manifest.dim

    tensors = parse_tensors(opened[VECTORS], VECTORS)
    vector = take(tensors, VECTORS, "item.vector", np.float32, (N, D))
    source = take(tensors, VECTORS, "item.source", np.float32, (N, D))
    bias = take(tensors, VECTORS, "item.bias", np.float32, (N,))
    trained = take(tensors, VECTORS, "item.trained", np.uint8, (N,)).astype(bool)
    listed = take(tensors, VECTORS, "item.listed", np.uint8, (N,)).astype(bool)
    offset = take(tensors, VECTORS, "user.offset", np.float32, (D,))
    part = take(tensors, VECTORS, "user.part", np.float32, (U, D)) if "user.part" in tensors else None
    _nothing_left(tensors, VECTORS)
    if int(trained.sum()) != manifest.counts["trained_items"]:
        raise ExportError(f"{VECTORS}: {int(trained.sum())} items are trained, the manifest says another number.")

    tensors = parse_tensors(opened[HISTORY], HISTORY)
    nnz = manifest.counts["interactions"]
    offsets = take(tensors, HISTORY, "offsets", np.int64, (U + 1,))
    items = take(tensors, HISTORY, "items", np.int32, (nnz,))
    weight = take(tensors, HISTORY, "weight", np.float32, (nnz,))
    rank = take(tensors, HISTORY, "rank", np.float32, (nnz,)) if "rank" in tensors else None
    _nothing_left(tensors, HISTORY)
    _check_history(offsets, items, weight, N)
    if (rank is None) != all(block.decay is None for block in manifest.blocks):
        raise ExportError(f"{HISTORY} and the blocks' decays do not agree.")
    if rank is not None and (rank < 0).any():
        raise ExportError(f"{HISTORY}: a rank is negative.")

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
        text_map=_read_text_map(opened[TEXT_MAP], manifest) if TEXT_MAP in opened else None,
        index=opened.get(INDEX),
        history_rank=rank,
    )


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


def _check_history(offsets: np.ndarray, items: np.ndarray, weight: np.ndarray, n_items: int) -> None:
    sizes = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(items) or (sizes < 0).any():
        raise ExportError(f"{HISTORY}: offsets do not rise from 0 to the number of interactions.")
    if len(items) and (items.min() < 0 or items.max() >= n_items):
        raise ExportError(f"{HISTORY}: an item is outside the catalogue of {n_items}.")
    if (weight < 0).any():
        raise ExportError(f"{HISTORY}: a weight is negative.")
    rises = np.diff(items.astype(np.int64)) > 0
    rises[offsets[1:-1][(offsets[1:-1] > 0) & (offsets[1:-1] < len(items))] - 1] = True  # from one user to the next
    if not rises.all():
        raise ExportError(f"{HISTORY}: the items of a user are not ascending and unique.")


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
    """Whether an attribute's value has its declared kind."""
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


def _read_text_map(content: memoryview, manifest: Manifest) -> TextMap:
    tensors = parse_tensors(content, TEXT_MAP)
    described = manifest.text_map or {}
    D = manifest.dim
    get = lambda key, *shape: take(tensors, TEXT_MAP, key, np.float32, shape)  # noqa: E731
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
    _nothing_left(tensors, TEXT_MAP)
    if manifest.encoder is not None and manifest.encoder.feature_dim != len(center):
        raise ExportError(f"{TEXT_MAP} maps vectors of {len(center)} dimensions, the encoder gives another number.")
    try:
        return TextMap(
            kind=described.get("kind", ""), center=center, normalize=bool(described.get("normalize")), **arguments
        )
    except ValueError as error:
        raise ExportError(f"{TEXT_MAP}: {error}") from None
