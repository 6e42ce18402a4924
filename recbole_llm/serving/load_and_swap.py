"""Load an export for service: verify it, replay the log of changes, try it out. The caller then swaps one reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.export.errors import ExportError, UnknownItemError
from recbole_llm.export.manifest import MANIFEST, Manifest
from recbole_llm.export.reader import Export, ItemRecord, fits_kind, load_export
from recbole_llm.export.writer import exports_in
from recbole_llm.identifiers import MAX_ID_CHARACTERS
from recbole_llm.retrieval.exact import Retriever
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.placing import map_item
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.serving.change_rows import Change
from recbole_llm.serving.watch import WatchedFiles

WARM_QUERIES = 8

log = getLogger(__name__)

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True, eq=False)
class Built:
    """A recommender ready to answer.

    Attributes:
        recommender: with the changes applied.
        stale: changes that wait for the encoder: their vectors are of another one.
        watched: the files it was read from.
        faults: ids of rows of the log that cannot be read or applied, and why.
    """

    recommender: Recommender
    stale: int
    watched: WatchedFiles
    faults: dict[str, str]


def find_export(place: str, name: str | None = None) -> Path:
    """Find the export that a path stands for.

    Args:
        place: an export, a link to one, or a folder of exports.
        name: one of the exports of a folder; ``None`` for the newest.

    Raises:
        ExportError: if there is none, or no export has that name.
    """
    folder = Path(place)
    if (folder / MANIFEST).is_file():
        if name is not None:
            raise ExportError("The service was started with one export; start it with a folder of exports to choose.")
        return folder.resolve()
    found = exports_in(folder) if folder.is_dir() else []
    if not found:
        raise ExportError(f"{place!r} holds no export. Give the folder that 'recbole-llm export' wrote.")
    if name is None:
        return found[-1].resolve()
    for path in found:  # compared with what is there, so that no name leads out of the folder
        if path.name == name:
            return path.resolve()
    raise ExportError(f"No export of that name; there are {', '.join(path.name for path in found[-5:])}.")


def build(
    folder: Path,
    changes: Sequence[Change],
    encode: Encode | None,
    *,
    verify: bool = True,
    mapped: bool = False,
    make_retriever: Callable[[Export, Catalog], Retriever | None] | None = None,
) -> Built:
    """Load an export and bring it up to date.

    Args:
        folder: the export.
        changes: the whole log, ascending.
        encode: texts to vectors of this export's encoder; ``None`` while it is not loaded.
        verify: compare checksums.
        mapped: of :func:`load_export`.
        make_retriever: of :class:`Recommender`.

    Raises:
        ExportError: if the export cannot be read, or does not answer.
        SearchError: if vectors cannot be copied to where they are searched.
    """
    watched = WatchedFiles(folder)  # noted before they are read: what changes from here on is noticed
    recommender = Recommender(load_export(folder, verify=verify, mapped=mapped), make_retriever)
    try:
        _check_ids(recommender.export)
        faults = {change.id: change.fault for change in changes if change.fault is not None}
        stale = replay(recommender, changes, encode, faults)
        _try_out(recommender)
    except BaseException:
        recommender.close()
        raise
    return Built(recommender, stale, watched, faults)


def _check_ids(export: Export) -> None:
    """Log a warning if the export holds ids that no request can name."""
    for what, ids in (("items", export.item_ids), ("users", export.user_ids)):
        long = [one for one in ids if len(one) > MAX_ID_CHARACTERS]
        if long:
            log.warning(
                "%d %s have ids of more than %d characters, such as %.64r: they are in answers, and requests cannot name them.",
                len(long), what, MAX_ID_CHARACTERS, long[0],
            )  # fmt: skip


def replay(
    recommender: Recommender, changes: Sequence[Change], encode: Encode | None, faults: dict[str, str] | None = None
) -> int:
    """Apply the log to a fresh export; returns how many changes wait for the encoder.

    What the training data held already (``overlay_seq`` of the manifest) is not applied again; a deletion always is.

    Args:
        recommender: of the export.
        changes: the whole log, ascending.
        encode: of :func:`build`.
        faults: receives the ids of changes that cannot be applied, and why.
    """
    manifest = recommender.export.manifest
    known = recommender.catalog.row_of
    readable = [c for c in changes if c.fault is None]
    wanted = [c for c in readable if c.deleted or c.seq > manifest.overlay_seq or c.id not in known]
    foreign = foreign_of(wanted, manifest)
    vectors: dict[str, np.ndarray] = {}
    texts = [c.text for c in foreign if c.text]
    if texts and encode is not None:
        vectors = dict(zip(texts, encode(texts), strict=True))
    stale = 0
    for change in encoded_anew(wanted, manifest, vectors):
        feature = change.feature
        if foreign_of([change], manifest):
            feature = None
            stale += 1
            if change.id not in known and picture_of(recommender.export, change) is None:
                continue
        _apply_safely(recommender, change, feature, faults)
    foreign = [c for c in wanted if c.picture is not None and picture_of(recommender.export, c) is None]
    if foreign:
        log.warning(
            "The log's pictures of %d items, such as %.64r, are of another encoder than this export's, and the pictures themselves "
            "are not kept: put them again to have them count.",
            len(foreign), foreign[0].id,
        )  # fmt: skip
    recommender.overlay_seq = max((c.seq for c in changes), default=0)
    return stale


def foreign_of(changes: Sequence[Change], manifest: Manifest) -> list[Change]:
    """The changes with a vector of a text that another encoder made than the export's of ``manifest``."""
    fingerprint = None if manifest.encoder is None else manifest.encoder.fingerprint
    return [c for c in changes if not (c.fault or c.deleted or c.feature is None) and c.fingerprint != fingerprint]


def encoded_anew(changes: Sequence[Change], manifest: Manifest, vectors: Mapping[str, np.ndarray]) -> list[Change]:
    """The changes with vectors of the export's own encoder, where there are some.

    Args:
        changes: ascending.
        manifest: of the export.
        vectors: by the text of :func:`foreign_of`, ``[F]`` float32.
    """
    fingerprint = None if manifest.encoder is None else manifest.encoder.fingerprint
    foreign = {c.seq for c in foreign_of(changes, manifest) if c.text in vectors}
    return [
        replace(c, feature=vectors[c.text or ""], fingerprint=fingerprint) if c.seq in foreign else c for c in changes
    ]


def picture_of(export: Export, change: Change) -> np.ndarray | None:
    """The vector of a change's picture, ``None`` where it is of another encoder than the export's."""
    spec, picture = export.manifest.pictures, change.picture
    if spec is None or picture is None or change.picture_fingerprint != spec.fingerprint:
        return None
    return picture if len(picture) == spec.feature_dim else None


def _apply_safely(
    recommender: Recommender, change: Change, feature: np.ndarray | None, faults: dict[str, str] | None
) -> None:
    """Apply a change; one that cannot be applied is noted and does not stop the others."""
    try:
        apply(recommender, change, feature)
    except (LookupError, ValueError, TypeError) as error:
        log.warning("Change %d of item %.64r cannot be applied: %s", change.seq, change.id, error)
        if faults is not None:
            faults[change.id] = f"it cannot be applied: {error}"[:200]


def apply(recommender: Recommender, change: Change, feature: np.ndarray | None) -> None:
    """Apply one change to the catalogue.

    Args:
        recommender: whose catalogue changes.
        change: the item's latest state.
        feature: the vector of its text by this export's encoder; ``None`` to leave the item's vectors as they are.
    """
    catalog, export = recommender.catalog, recommender.export
    if change.deleted:
        if change.id in catalog.row_of:
            catalog.delete(change.id)
        return
    row = catalog.row_of.get(change.id)
    old = None if row is None else catalog.records[row]
    attributes = change.attributes if change.attributes is not None else {} if old is None else old.attributes
    kinds = export.manifest.attributes
    fitting = {name: value for name, value in attributes.items() if name in kinds and fits_kind(value, kinds[name])}
    if len(fitting) < len(attributes):
        log.warning(
            "Item %.64r: %d attributes are not declared by this export", change.id, len(attributes) - len(fitting)
        )
    record = ItemRecord(
        title=change.title if change.title is not None else change.id if old is None else old.title,
        text=change.text if change.text is not None else None if old is None else old.text,
        attributes=fitting,
    )
    if feature is not None and (export.text_map is None or len(feature) != export.text_map.feature_dim):
        feature = None
    picture, without = picture_of(export, change), change.without_picture
    mapped = map_item(export, catalog, change.id, feature, picture, without)
    small = change.thumbnail
    try:
        catalog.put(
            change.id,
            record,
            mapped,
            refit=change.refit,
            time=change.updated_at,
            picture=picture,
            thumbnail=small,
            without_picture=without,
        )
    except UnknownItemError:
        log.warning("Item %.64r is in the log of changes, and this export cannot place it", change.id)


def apply_all(recommender: Recommender, changes: Sequence[Change], faults: dict[str, str] | None = None) -> None:
    """Apply the changes that come after what the recommender knows; vectors of another encoder are left out.

    Args:
        recommender: whose catalogue changes.
        changes: ascending.
        faults: ids of changes that cannot be read or applied, and why; kept up to date.
    """
    encoder = recommender.export.manifest.encoder
    fingerprint = None if encoder is None else encoder.fingerprint
    for change in changes:
        if change.seq <= recommender.overlay_seq and change.fault is None:
            continue
        if faults is not None:
            faults.pop(change.id, None)
            if change.fault is not None:
                faults[change.id] = change.fault
        if change.fault is None:
            feature = change.feature if change.fingerprint == fingerprint else None
            _apply_safely(recommender, change, feature, faults)
        recommender.overlay_seq = max(recommender.overlay_seq, change.seq)


def _try_out(recommender: Recommender) -> None:
    """Answer a few requests before anyone asks.

    Pages are read in, and an export that cannot answer is found out.
    """
    export = recommender.export
    if recommender.searches is not None:
        recommender.searches.warm_up()
    step = max(len(export.user_ids) // WARM_QUERIES, 1)
    requests: list[Any] = [Request(user=user, explain=1) for user in export.user_ids[::step][:WARM_QUERIES]]
    requests += [Request(items=[item_id], k=3) for item_id in export.item_ids[:1]]
    for answer in recommender.recommend_many(requests):
        if isinstance(answer, Exception):
            raise ExportError(f"The export does not answer: {answer}")
