"""The best items for users, for a list of items, for a text or beside an item, from a checkpoint or an export.

For example:

    model = open_model("saved/LLMTwoTower-....pth")  # or the folder of an export
    recommend_items(model, ["50", "181"]).items[0].title
"""

import csv
import json
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recbole_llm.atomic import atomic_path
from recbole_llm.checkpoints import newest_checkpoint, picture_encoders
from recbole_llm.export.errors import UnknownItemError, UnknownUserError
from recbole_llm.export.manifest import MANIFEST
from recbole_llm.export.reader import Export, load_export
from recbole_llm.retrieval.exact import MARGIN, ExactRetriever, Hits
from recbole_llm.retrieval.near_ids import unknown_ids
from recbole_llm.retrieval.new_items import with_new
from recbole_llm.retrieval.recommender import Recommendation, Recommender, Request
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.spreadsheet import Workbook

BATCH = 256  # users scored in one pass over the catalogue
# from so many scores on the kernel makes up for the 2.4 s of its first call, which imports torch._dynamo; of 200,000 items of
# 64 dimensions NumPy makes 98 million scores a second on one thread of an AMD EPYC, the kernel 170 million, and on all threads
KERNEL_FROM = 10**9
FORMATS = (".jsonl", ".csv", ".parquet", ".xlsx")
NAMED = 10  # unknown ids that a message names


@dataclass(frozen=True)
class Row:
    """One recommended item.

    Attributes:
        user: external id; for a list of items or a text, that list or text.
        rank: 1 for the best.
        item: external id.
        title: of the item.
        score: by which items are ranked.
        probability: P(i|u).
        cold: whether the item is known by its text alone.
        rules: what lifted, moved or admitted the item beside its score, separated by semicolons.
    """

    user: str
    rank: int
    item: str
    title: str
    score: float
    probability: float | None
    cold: bool
    rules: str = ""


@dataclass
class Counts:
    """What a pass over users came to.

    Attributes:
        users: users answered.
        rows: items written.
        unknown: ids that no user has, skipped.
        short: users with fewer items than asked for, since no more may be recommended to them.
        notes: what was said of answers, with the number of users.
    """

    users: int = 0
    rows: int = 0
    unknown: int = 0
    short: int = 0
    notes: Tally[str] = field(default_factory=Tally)


# ------------------------------------------------------------------ answers


def open_model(
    path: str | Path,
    *,
    data_path: str | Path | None = None,
    texts: bool = True,
    pictures: bool = False,
    encoder: str | None = None,
    item_features_file: str | Path | None = None,
    item_modalities: str | Mapping[str, Any] | None = None,
    feature_cache_dir: str | Path | None = None,
    history: str | None = None,
) -> Export:
    """Open a trained model, ready to recommend.

    Args:
        path: the folder of an export, or a checkpoint (``.pth``) of LLMTwoTower, or a folder of checkpoints, of which the
            newest counts. A checkpoint's dataset is read again; no code in the file is run, and nothing is written.
        data_path: for a checkpoint, the folder that holds the dataset's folder; ``None`` where the training was given none.
        texts: for a checkpoint, whether :func:`recommend_text` is to be used.
        pictures: for a checkpoint, whether :func:`recbole_llm.pictures.recommend_picture` is to be used.
        encoder: folder or name on the hub of the text encoder; needed for an export that does not hold its own, and for a
            checkpoint that was trained with a folder.
        item_features_file: for a checkpoint that was trained with one.
        item_modalities: the encoder of pictures; for a checkpoint where it was a folder, a file or a function.
        feature_cache_dir: for a checkpoint, where vectors of texts are kept.
        history: for a checkpoint, the interactions that are histories and seen: ``all`` (also ``None``), or ``train``.

    Raises:
        ValueError: if there is nothing at ``path``, or it cannot be read.
    """
    path = newest_checkpoint(path) or Path(path)
    paths = {
        "data_path": data_path,
        "item_features_file": item_features_file,
        "item_modalities": item_modalities,
        "feature_cache_dir": feature_cache_dir,
    }
    if path.is_dir():
        del paths["item_modalities"]
        for name in (name for name, value in (paths | {"history": history}).items() if value is not None):
            raise ValueError(f"{name} belongs to a checkpoint; an export holds all it needs.")
        if not (path / MANIFEST).is_file():
            raise ValueError(
                f"{str(path)!r} holds neither a checkpoint (LLMTwoTower-....pth) nor an export ({MANIFEST})."
            )
        found = load_export(path, encoders=() if encoder is None else (encoder,))
        return replace(found, picture_encoders=picture_encoders(item_modalities))
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} does not exist. Give a checkpoint that 'recbole-llm run' saved (saved/LLMTwoTower-....pth), its "
            "folder (saved), or the folder that 'recbole-llm export' wrote."
        )
    from recbole_llm.checkpoints import load_trained
    from recbole_llm.export.export_model import contents_of
    from recbole_llm.export.in_memory import export_in_memory

    model, dataset = load_trained(path, encoder=encoder, **paths)  # type: ignore[arg-type]
    maps: dict[str, Any] = {
        "map_texts": texts,
        "map_pictures": pictures,
        "map_sounds": False,
    }  # sounds are asked of open_media
    return export_in_memory(contents_of(model, dataset, **maps, keep_text=texts, history=history or "all"))


def recommend_users(
    export: Export,
    users: Iterable[str] | None = None,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    skip_unknown: bool = False,
    counts: Counts | None = None,
    include_new: int = 0,
    rules: Rules = NO_RULES,
) -> Iterator[Row]:
    """Find the best items of many users, in bounded memory.

    Args:
        export: of :func:`open_model`.
        users: external ids; ``None`` for every user of the data set.
        k: items per user; fewer where fewer are allowed.
        exclude_seen: whether the items of a user's history have no place.
        skip_unknown: count unknown users instead of raising.
        counts: where to count.
        include_new: at least so many of a user's items are new ones, that nobody has had yet, in the last places if need be.
        rules: what decides about the lists beside the scores.

    Yields:
        Rows, user after user in the order given, best item first.

    Raises:
        UnknownUserError: naming the unknown users, unless ``skip_unknown``: all of a sequence, those of the first batch
            that holds some of any other iterable.
        ValueError: if ``users`` is a string, or a rule does not fit the items' attributes.
    """
    if isinstance(users, str):
        raise ValueError(f"users is the string {users!r}; give a list of ids.")
    counts = counts or Counts()
    n_users = len(export.user_ids) if users is None else len(users) if isinstance(users, Sequence) else 0
    if isinstance(users, Sequence) and not skip_unknown:
        known = set(export.user_ids)
        if strangers := [user for user in users if user not in known]:
            raise UnknownUserError(unknown_ids(strangers, export.user_ids))
    large = n_users * len(export.item_ids) >= KERNEL_FROM and export.index is None
    recommender = Recommender(export, _kernel_retriever if large else None)
    for batch in _batches(export.user_ids if users is None else users):
        requests = [Request(user=u, k=k, exclude_seen=exclude_seen, rules=rules) for u in batch]
        answers = with_new(recommender, requests, recommender.recommend_many(requests), include_new)
        unknown = [u for u, a in zip(batch, answers, strict=True) if isinstance(a, UnknownUserError)]
        if unknown and not skip_unknown:
            raise UnknownUserError(unknown_ids(unknown, export.user_ids))
        counts.unknown += len(unknown)
        for user, answer in zip(batch, answers, strict=True):
            if isinstance(answer, UnknownUserError):
                continue
            if isinstance(answer, Exception):
                raise answer
            counts.users += 1
            counts.rows += len(answer.items)
            counts.short += len(answer.items) < k
            counts.notes.update(filter(None, [answer.note]))
            yield from rows_of(answer, user)


def recommend_items(
    export: Export,
    items: Sequence[str],
    *,
    k: int = 10,
    exclude_seen: bool = True,
    skip_unknown: bool = False,
    rules: Rules = NO_RULES,
) -> Recommendation:
    """Find the best items for somebody who likes ``items``: a user that the model has never seen.

    Args:
        export: of :func:`open_model`.
        items: external ids; oldest first where the model weighs histories by recency.
        k: how many.
        exclude_seen: whether ``items`` have no place.
        skip_unknown: leave ids that no item has out; they are the answer's ``unknown``.
        rules: as for :func:`recommend_users`.

    Raises:
        UnknownItemError: naming the unknown ids, unless ``skip_unknown``; in any case where none is known.
    """
    recommender = Recommender(export)
    unknown = [item for item in items if item not in recommender.catalog.row_of]
    if unknown and (not skip_unknown or len(unknown) == len(items)):
        raise UnknownItemError(unknown_ids(unknown, recommender.catalog.row_of))
    return recommender.recommend(Request(items=items, k=k, exclude_seen=exclude_seen, rules=rules))


def recommend_text(
    export: Export, text: str, *, k: int = 10, by: str = "both", rules: Rules = NO_RULES
) -> Recommendation:
    """Find the items that a free text describes, then what buyers of those items bought.

    Args:
        export: of :func:`open_model`.
        text: what is asked for.
        k: how many.
        by: ``both``, ``likeness`` alone, or ``chance``: what buyers of the likest items bought, alone.
        rules: as for :func:`recommend_users`.

    Raises:
        ValueError: if the model takes no texts, its encoder is not to be had or was not named, or the text is empty.
    """
    from recbole_llm.serving.text import vector_of_question

    request = Request(text_vector=vector_of_question(export, text), text=text, by=by, k=k, rules=rules)
    return Recommender(export).recommend(request)


def similar_items(
    export: Export, item: str, *, k: int = 10, by: str = "both", rules: Rules = NO_RULES
) -> Recommendation:
    """Find the items whose content is like one's, then what its buyers and those of its like bought.

    Args:
        export: of :func:`open_model`.
        item: external id.
        k: how many.
        by: as for :func:`recommend_text`.
        rules: as for :func:`recommend_users`; what they read of a history they read of the item.

    Raises:
        UnknownItemError: if no item has the id.
        ValueError: if ``by`` is unknown or needs content that the model lacks; on a boost by odds.
    """
    return Recommender(export).similar(item, k, by=by, rules=rules)


def rows_of(answer: Recommendation, user: str) -> Iterator[Row]:
    """Turn an answer into rows for :func:`write_rows`.

    Args:
        answer: to a user, a list of items or a text.
        user: what to call them.
    """
    for rank, item in enumerate(answer.items, 1):
        yield Row(
            user, rank, item.id, item.title, item.score, item.probability, item.cold, "; ".join(map(str, item.rules))
        )


class _KernelRetriever(ExactRetriever):
    """Scores everything with :func:`recbole_llm_kernels.score_topk`, for many users at once: the same hits."""

    def search(self, query: np.ndarray, k: Sequence[int], exclude: Any, allow: Any, lifts: Any = None) -> list[Hits]:
        """As :meth:`ExactRetriever.search`; for one segment."""
        if lifts is not None or any(mask is not None for mask in allow):
            return super().search(query, k, exclude, allow, lifts)
        import torch

        from recbole_llm_kernels import score_topk

        (segment,) = self.segments
        hidden = [np.unique(rows) for rows in exclude]
        offsets = np.cumsum([0, *map(len, hidden)])
        scores, ids = score_topk(
            torch.from_numpy(query),
            _tensor(segment.vector),
            max(k) + MARGIN,
            item_bias=_tensor(segment.bias),
            seen_offsets=torch.from_numpy(offsets),
            seen_ids=torch.from_numpy(np.concatenate(hidden)),
        )
        found = zip(query, k, ids.numpy(), scores.numpy(), strict=True)
        return [self._finish(q, n, [(rows[rows >= 0], s[rows >= 0])]) for q, n, rows, s in found]


def _kernel_retriever(export: Export, catalog: Any) -> _KernelRetriever | None:
    # vectors in eight bits are no array that the kernel reads
    return _KernelRetriever(catalog.segments()) if isinstance(export.vector, np.ndarray) else None


def _tensor(array: np.ndarray) -> Any:
    """A tensor on the array's memory; ours is only read, mapped files cannot be written to."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)


def _batches(users: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(users)
    while batch := list(islice(rest, BATCH)):
        yield batch


def names(ids: Sequence[str]) -> str:
    """List ids for a message: the first few, and how many more there are."""
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(map(repr, ids[:NAMED])) + more


# ------------------------------------------------------------------ files


class _Sink(Protocol):
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """JSON Lines or CSV."""

    def __init__(self, path: Path, as_csv: bool) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, Row.__annotations__) if as_csv else None
        if self._csv is not None:
            self._csv.writeheader()

    def write(self, row: Row) -> None:
        if self._csv is not None:
            self._csv.writerow(vars(row))
        else:
            self._file.write(json.dumps(vars(row), ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """Parquet, a row group for every 2^16 rows."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._arrow = pyarrow
        number = pyarrow.float32()
        types = {
            str: pyarrow.string(),
            int: pyarrow.int32(),
            float: number,
            float | None: number,
            bool: pyarrow.bool_(),
        }
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in Row.__annotations__.items()])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Row) -> None:
        self._rows.append(vars(row))
        if len(self._rows) == 2**16:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


def check_output(path: str | Path, formats: Sequence[str] = FORMATS) -> Path:
    """Return the path, if its ending is one of ``formats``, by default those that :func:`write_rows` knows.

    Raises:
        ValueError: on another ending.
        ModuleNotFoundError: for Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix not in formats:
        raise ValueError(f"output: {str(path)!r} must end in {', '.join(formats)}.")
    if path.suffix == ".parquet":
        import pyarrow  # noqa: F401
    return path


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows as they come; the file appears whole or not at all.

    Args:
        rows: what to write.
        path: its ending tells the format: .jsonl, .csv, .parquet or .xlsx.

    Raises:
        ValueError: on another ending.
    """
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        sink: _Sink
        if path.suffix == ".xlsx":
            sink = Workbook(temporary, list(Row.__annotations__))
        else:
            sink = _Parquet(temporary) if path.suffix == ".parquet" else _Lines(temporary, path.suffix == ".csv")
        try:
            for row in rows:
                sink.write(row)
        finally:
            sink.close()
