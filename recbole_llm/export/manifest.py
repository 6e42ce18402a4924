"""``manifest.json`` of an export: the files, the model's constants, and a reader that checks the form."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recbole_llm.content.encoder_settings import MAX_COUNT, check_settings
from recbole_llm.export.errors import ExportError
from recbole_llm.export.sequence import SCORING, SEQUENCE_FILE
from recbole_llm.export.tensor_file import open_file, parse_json
from recbole_llm.scoring.never_shown import never_shown
from recbole_llm.scoring.probability import ProbabilityMap

FIRST_SCHEMA, CONTENT_SCHEMA = 1, 2  # content.safetensors
DISLIKED_SCHEMA = SEARCH_SCHEMA = 3  # disliked items in history.safetensors; search.safetensors
CODED_SCHEMA = 4  # vectors in eight bits
PICTURE_SCHEMA = 5  # the space of pictures in search.safetensors, and their encoder here
SOUND_SCHEMA = 6  # likewise of sounds
SEQUENCE_SCHEMA = 6  # sequence.safetensors
PROFILE_SCHEMA = 6  # the map of users' profiles, and how their columns make a text
DIRECT_SCHEMA = 6  # direct.safetensors
THUMBNAIL_SCHEMA = 6  # thumbnails.safetensors, picture_map.safetensors
SCHEMA = 6
MANIFEST = "manifest.json"
VECTORS, HISTORY, TEXT_MAP = "vectors.safetensors", "history.safetensors", "text_map.safetensors"
PROFILE_MAP = "profile_map.safetensors"
CONTENT, SEARCH, EXACT = "content.safetensors", "search.safetensors", "exact.safetensors"
DIRECT = "direct.safetensors"
PICTURE_MAP, THUMBNAILS = "picture_map.safetensors", "thumbnails.safetensors"
ITEM_IDS, USER_IDS, ITEMS, CARD = "item_ids.txt", "user_ids.txt", "items.jsonl", "README.md"
INDEX, SEARCH_INDEX = "index.faiss", "search.faiss"
ONNX_RECOMMEND, ONNX_TEXT_MAP = "recommend.onnx", "text_map.onnx"
ENCODER_FOLDER = "encoder"
REQUIRED = (VECTORS, HISTORY, ITEM_IDS, USER_IDS, ITEMS)
# counts of items that no answer holds, where there are some
NEVER_SHOWN = ("left_out_items", "unplaced_items", "unread_items")
ATTRIBUTE_KINDS = ("token", "tokens", "number")
MAX_MANIFEST_BYTES = 1 << 20
MAX_EXPONENT = 16  # of the length of a history: beyond, scores are zero or infinite
MAX_WHOLE = 1 << 53  # the whole numbers that JSON readers of any language hold

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
# one folder of encoder files may hold one more level (1_Pooling/config.json); nothing executable, nothing pickled
_ENCODER_FILE = re.compile(rf"{ENCODER_FOLDER}/(?:{_PART}/)?{_PART}\.(?:safetensors|json|txt|model)")
_PLAIN_FILES = frozenset(
    {
        *REQUIRED,
        TEXT_MAP,
        PROFILE_MAP,
        PICTURE_MAP,
        THUMBNAILS,
        CONTENT,
        EXACT,
        DIRECT,
        SEARCH,
        SEARCH_INDEX,
        SEQUENCE_FILE,
        CARD,
        INDEX,
        ONNX_RECOMMEND,
        ONNX_TEXT_MAP,
    }
)


_OPTIONAL = frozenset({"probability", "pictures", "picture_map", "profile_text", "sounds"})  # fields of the manifest


@dataclass(frozen=True)
class Block:
    """A range of columns with its own pooling.

    Attributes:
        name: for people.
        dim: its number of columns.
        exponent: of the sum of the history weights that a pooled history is divided by.
        scale: factor of the query.
        scoring: ``dot`` or ``cosine``; ``sequence`` for a query that :mod:`recbole_llm.export.sequence` reads off the order.
        decay: by which histories fade in this block; ``None`` for the history's own weights alone.
        dislikes: how much a disliked item counts against what it would add to a history; 0 for not at all.
    """

    name: str
    dim: int
    exponent: float
    scale: float
    scoring: str = "dot"
    decay: float | None = None
    dislikes: float = 0.0


@dataclass(frozen=True)
class FileSum:
    """Size and hexadecimal sha256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class EncoderSpec:
    """How texts become vectors: arguments of ``load_encoder``, and the dimension and fingerprint that they must give.

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
        producer: versions that wrote it, and the name of the dataset.
        blocks: columns of the vectors.
        history_decay: tau of t = exp(-rank / tau) where histories are weighted by recency, else ``None``.
        probability: the map from scores to probabilities; ``None``, and no field of the file, for the plain sigmoid.
        similar_by: ``vector`` or ``source``: which item vectors similarity compares.
        counts: items, users, interactions (of the histories), trained_items; ``fitted_interactions`` and those of
            ``NEVER_SHOWN`` where they are told.
        encoder: ``None`` where no encoder belongs to the model.
        item_text: ``None`` where items have no text.
        attributes: attribute name to one of ``ATTRIBUTE_KINDS``.
        text_map: ``{"kind", "normalize"}``; ``None`` without a map.
        overlay_seq: last change of the service's log that the training data held already.
        index: ``{"kind": "exact"}`` or ``{"kind": "ivf", "nlist", "nprobe", "recall_at_10"}``.
        metrics: what the model card shows.
        files: by name.
        pictures: encoder of the items' pictures; ``None``, and no field of the file, where there is none.
        profile_text: how the columns of a user's profile make its text; likewise, for models that read none.
        picture_map: as ``text_map``, of pictures; ``None``, and no field of the file, without one.
        sounds: as ``pictures``, of the items' sounds.
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
    pictures: EncoderSpec | None = None
    profile_text: ItemText | None = None
    picture_map: Mapping[str, Any] | None = None
    sounds: EncoderSpec | None = None

    @property
    def rows_known(self) -> str:
        """Which interactions the model was fitted on, and which are histories and what users have seen, in a sentence."""
        known, fitted = self.counts["interactions"], self.counts.get("fitted_interactions")
        if fitted is None:
            return f"{known:,} interactions are known as histories and as seen"
        if fitted == known:
            return f"fitted on {fitted:,} interactions, which are all that is known as histories and as seen"
        return f"fitted on {fitted:,} interactions; {known:,} are known as histories and as seen"

    @property
    def never_shown(self) -> list[str]:
        """Which items no answer holds, and why: sentences."""
        return never_shown(*(self.counts.get(name, 0) for name in NEVER_SHOWN))

    @property
    def sequence(self) -> Block | None:
        """The block whose query is read off the order of a history, if there is one."""
        return next((block for block in self.blocks if block.scoring == SCORING), None)

    @property
    def reads_ranks(self) -> bool:
        """Whether histories need ranks: a block fades or reads their order."""
        return any(block.decay is not None or block.scoring == SCORING for block in self.blocks)

    @property
    def dim(self) -> int:
        """Columns D of the vectors."""
        return sum(block.dim for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Convert to plain JSON."""
        values = asdict(self)
        for name in _OPTIONAL:  # as exports were before there was any, with the export_id that they have
            if values[name] is None:
                del values[name]
        for block in values["blocks"]:  # likewise
            if not block["dislikes"]:
                del block["dislikes"]
        return values

    def identity(self) -> str:
        """Compute the ``export_id`` that these contents must have."""
        part = self.to_json()
        for name in ("export_id", "created_at", "producer", "metrics", "index"):
            del part[name]
        # the card, the index and the graphs describe the model; they do not change an answer
        beside = (CARD, INDEX, SEARCH_INDEX, ONNX_RECOMMEND, ONNX_TEXT_MAP)
        part["files"] = {name: sums for name, sums in part["files"].items() if name not in beside}
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest alone and check its form.

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
    _check_encoder(manifest.encoder, any(name.startswith(f"{ENCODER_FOLDER}/") for name in manifest.files))
    _check_encoder(manifest.pictures, False)
    _check_encoder(manifest.sounds, False)
    return manifest


def _manifest_of(raw: dict[str, Any]) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    missing = sorted(known - raw.keys() - _OPTIONAL)
    if missing:
        raise ExportError(f"{MANIFEST} lacks {', '.join(missing)}.")
    # of a later schema that this reader may read: what it does not know, it does not need
    raw = {name: raw[name] for name in known & raw.keys()}
    try:
        raw["blocks"] = tuple(Block(**block) for block in raw["blocks"])
        raw["files"] = {name: FileSum(**sums) for name, sums in raw["files"].items()}
        for name in ("encoder", "pictures", "sounds"):
            if raw.get(name) is not None:
                raw[name] = EncoderSpec(**raw[name])
        if raw.get("probability") is not None:
            raw["probability"] = ProbabilityMap.from_json(raw["probability"])
        for name in ("item_text", "profile_text"):
            if raw.get(name) is not None:
                raw[name] = ItemText(tuple(raw[name]["fields"]), raw[name]["template"])
        manifest = Manifest(**raw)
        _check_manifest(manifest)
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{MANIFEST} has a field of the wrong form ({error}).") from None
    return manifest


def _check_encoder(spec: EncoderSpec | None, inside: bool) -> None:
    """Check that nothing but typed settings reaches ``load_encoder``.

    The ``export_id`` is a plain hash, which anybody can compute, so it protects nothing.
    """
    if spec is None:
        return
    texts = {"name": (spec.name, 4096), "fingerprint": (spec.fingerprint, 256)}
    texts |= {} if spec.revision is None else {"revision": (spec.revision, 256)}
    for what, (text, most) in texts.items():
        if not isinstance(text, str) or not 0 < len(text) <= most or not text.isprintable():
            raise ExportError(f"{MANIFEST}: the encoder's {what} is no string of 1 to {most} printable characters.")
    if type(spec.feature_dim) is not int or not 1 <= spec.feature_dim <= MAX_COUNT:
        raise ExportError(f"{MANIFEST}: the encoder's feature_dim is no integer from 1 to {MAX_COUNT}.")
    if type(spec.bundled) is not bool or spec.bundled != inside:
        raise ExportError(f"{MANIFEST}: the encoder's bundled and the files of {ENCODER_FOLDER}/ do not agree.")
    try:
        check_settings(spec.settings)
    except ValueError as error:
        raise ExportError(f"{MANIFEST}: {error}.") from None


def _check_sequence(manifest: Manifest, claim: Callable[[bool, str], None]) -> None:
    number = sum(block.scoring == SCORING for block in manifest.blocks)
    claim(number < 2, f"{number} blocks have scoring {SCORING!r}, at most one may")
    claim(bool(number) == (SEQUENCE_FILE in manifest.files), f"scoring {SCORING!r} and {SEQUENCE_FILE} do not agree")
    for block in manifest.blocks:
        own = block.exponent or block.dislikes or block.decay is not None
        claim(
            block.scoring != SCORING or not own, f"a block of scoring {SCORING!r} has an exponent, a decay or dislikes"
        )


def _check_manifest(manifest: Manifest) -> None:
    def claim(holds: bool, what: str) -> None:
        if not holds:
            raise ExportError(f"{MANIFEST}: {what}.")

    is_count = lambda value: type(value) is int and 0 <= value <= MAX_WHOLE  # noqa: E731
    is_number = lambda value: type(value) in (int, float) and math.isfinite(value)  # noqa: E731
    for name in ("export_id", "created_at"):
        claim(isinstance(getattr(manifest, name), str), f"{name} is no string")
    for name in ("producer", "counts", "attributes", "index", "metrics", "files"):
        claim(isinstance(getattr(manifest, name), dict), f"{name} is no object")
    claim(bool(manifest.blocks), "there is no block")
    for block in manifest.blocks:
        claim(isinstance(block.name, str), "a block's name is no string")
        claim(is_count(block.dim) and block.dim > 0, "a block has no columns")
        claim(is_number(block.exponent) and is_number(block.scale), "a block's exponent or scale is no number")
        claim(abs(block.exponent) <= MAX_EXPONENT, f"a block's exponent is beyond {MAX_EXPONENT}")
        claim(block.scoring in ("dot", "cosine", SCORING), f"scoring {block.scoring!r} is unknown")
        claim(is_number(block.dislikes) and block.dislikes >= 0, "a block's dislikes are no number of at least 0")
        claim(block.decay is None or (is_number(block.decay) and block.decay > 0), "a block's decay is not positive")
    _check_sequence(manifest, claim)
    mapped = manifest.probability
    claim(mapped is None or abs(mapped.exponent) <= MAX_EXPONENT, f"probability's exponent is beyond {MAX_EXPONENT}")
    optional = dict.fromkeys(("fitted_interactions", *NEVER_SHOWN), 0)
    for name in ("items", "users", "interactions", "trained_items", *optional):
        claim(is_count(manifest.counts.get(name, optional.get(name))), f"counts lack {name}")
    claim(is_count(manifest.overlay_seq), "overlay_seq is no count")
    claim(manifest.similar_by in ("vector", "source"), f"similar_by {manifest.similar_by!r} is unknown")
    decay = manifest.history_decay
    claim(decay is None or (is_number(decay) and decay > 0), "history_decay is not positive")
    for name, kind in manifest.attributes.items():
        claim(isinstance(name, str) and kind in ATTRIBUTE_KINDS, f"attribute kind {kind!r} is unknown")
    for which, text in (("item_text", manifest.item_text), ("profile_text", manifest.profile_text)):
        parts = () if text is None else (*text.fields, text.template)
        claim(all(isinstance(part, str) for part in parts), f"{which} holds what is no string")
    for what, described in (("text_map", manifest.text_map), ("picture_map", manifest.picture_map)):
        form = None if described is None else {name: type(value) for name, value in described.items()}
        claim(form in (None, {"kind": str, "normalize": bool}), f"{what} holds no kind and normalize")
    claim(manifest.index.get("kind") in ("exact", "ivf"), "index is neither exact nor ivf")
    if manifest.index["kind"] == "ivf":
        nprobe = manifest.index.get("nprobe")
        claim(nprobe is not None and is_count(nprobe) and nprobe > 0, "the index has no nprobe")
    for name, sums in manifest.files.items():
        claim(
            name in _PLAIN_FILES or _ENCODER_FILE.fullmatch(name) is not None, f"the file name {name!r} is not allowed"
        )
        claim(is_count(sums.bytes) and isinstance(sums.sha256, str), f"size or sum of {name} is wrong")
        claim(re.fullmatch(r"[0-9a-f]{64}", sums.sha256) is not None, f"sum of {name} is wrong")
    absent = [name for name in REQUIRED if name not in manifest.files]
    claim(not absent, f"it does not list {', '.join(absent)}")
    claim((manifest.text_map is None) == (TEXT_MAP not in manifest.files), f"text_map and {TEXT_MAP} do not agree")
    has_profiles = PROFILE_MAP in manifest.files
    claim((manifest.profile_text is None) != has_profiles, f"profile_text and {PROFILE_MAP} do not agree")
    has_map = PICTURE_MAP in manifest.files
    claim((manifest.picture_map is not None) == has_map, f"picture_map and {PICTURE_MAP} do not agree")
    claim(not has_map or manifest.pictures is not None, f"there is no encoder of pictures for {PICTURE_MAP}")
    claim(SEARCH_INDEX not in manifest.files or SEARCH in manifest.files, f"there is no {SEARCH} for {SEARCH_INDEX}")
    claim((manifest.index["kind"] == "ivf") == (INDEX in manifest.files), f"index and {INDEX} do not agree")
