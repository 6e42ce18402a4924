"""``recbole-llm recommend`` and ``similar``: the best items for users, for a list of items or for a text, from an export.

The same :class:`~recbole_llm.serving.recommend.Recommender` answers here and in the service, so that both give the same items.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recbole_llm.serving.artifact import Export, load_export
from recbole_llm.serving.errors import UnknownItemError, UnknownUserError
from recbole_llm.serving.recommend import Recommendation, Recommender, Request

BATCH = 256  # users scored in one pass over the catalogue
FORMATS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One recommended item of one user.

    Attributes:
        user: external id.
        rank: 1 for the best.
        item: external id.
        title: of the item.
        score: logit of P(i|u).
        cold: whether the item is known by its text alone.
    """

    user: str
    rank: int
    item: str
    title: str
    score: float
    cold: bool


@dataclass
class Counts:
    """What a pass over users came to.

    Attributes:
        users: users answered.
        rows: items written.
        unknown: ids that no user has, skipped.
    """

    users: int = 0
    rows: int = 0
    unknown: int = 0


def recommend_users(
    export: Export,
    users: Iterable[str] | None = None,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    skip_unknown: bool = False,
    counts: Counts | None = None,
) -> Iterator[Row]:
    """The best items of many users, in bounded memory.

    Args:
        export: the model.
        users: external ids; ``None`` for every user of the training data.
        k: items per user; fewer where fewer are allowed.
        exclude_seen: whether the items of a user's history have no place.
        skip_unknown: count unknown users instead of raising.
        counts: where to count.

    Yields:
        Rows, user after user in the order given, best item first.

    Raises:
        UnknownUserError: on the first unknown user, unless ``skip_unknown``.
    """
    recommender, counts = Recommender(export), counts or Counts()
    for batch in _batches(export.user_ids if users is None else users):
        answers = recommender.recommend_many([Request(user=u, k=k, exclude_seen=exclude_seen) for u in batch])
        for user, answer in zip(batch, answers, strict=True):
            if isinstance(answer, UnknownUserError) and skip_unknown:
                counts.unknown += 1
                continue
            if isinstance(answer, Exception):
                raise answer
            counts.users += 1
            for rank, item in enumerate(answer.items, 1):
                counts.rows += 1
                yield Row(user, rank, item.id, item.title, item.score, item.cold)


def _batches(users: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for user in users:
        batch.append(user)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class _Sink(Protocol):
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """JSON Lines or CSV."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, Row.__annotations__) if path.suffix == ".csv" else None
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
        types = {str: pyarrow.string(), int: pyarrow.int32(), float: pyarrow.float32(), bool: pyarrow.bool_()}
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


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows as they come; the file appears whole or not at all.

    Args:
        rows: what to write.
        path: its ending tells the format: .jsonl, .csv or .parquet.

    Raises:
        ValueError: on another ending.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"output: {str(path)!r} must end in {', '.join(FORMATS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        sink: _Sink = _Parquet(temporary) if path.suffix == ".parquet" else _Lines(temporary)
        try:
            for row in rows:
                sink.write(row)
        finally:
            sink.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def recommend_text(export: Export, folder: Path, text: str, *, k: int = 10) -> Recommendation:
    """The best items for a free text, as if it described an item that the user likes.

    Args:
        export: the model.
        folder: where it lies; it may hold the encoder.
        text: what the user asks for.
        k: how many.

    Raises:
        ValueError: if the export has no text map, or its encoder is not to be had.
    """
    from recbole_llm.serving.text import TransformerEncoder

    if export.manifest.encoder is None:
        raise ValueError("text: this export names no encoder; give --items or --users, or export a model that has one.")
    vectors, _ = TransformerEncoder(folder, export.manifest).encode([text])
    return Recommender(export).recommend(Request(text_vector=vectors[0], k=k))


def _show(answer: Recommendation, export: Export) -> None:
    width = max([len(item.title) for item in answer.items] or [5])
    print(f"{'':>3}  {'title':{width}}  {'score':>8}  id")  # noqa: T201
    for rank, item in enumerate(answer.items, 1):
        cold = "  (new)" if item.cold else ""
        print(f"{rank:>3}  {item.title:{width}}  {item.score:>8.3f}  {item.id}{cold}")  # noqa: T201
    if answer.unknown:
        print(f"unknown: {', '.join(answer.unknown)}", file=sys.stderr)  # noqa: T201


def _ids(text: str | None, file: str | None) -> list[str] | None:
    if file is not None:
        return [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    return None if text is None else [part for part in text.split(",") if part]


def add_recommend_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``recbole-llm recommend``."""
    parser.add_argument("export", metavar="DIR", help="what 'recbole-llm export' wrote")
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--users", metavar="A,B", help="users of the training data; without any of these four: all of them"
    )
    who.add_argument("--users-file", metavar="FILE", help="the same, a line each")
    who.add_argument("--items", metavar="A,B", help="items that a new user likes")
    who.add_argument("--text", help="what a new user asks for")
    parser.add_argument("--k", type=int, default=10, help="items per user")
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--skip-unknown", action="store_true", help="count unknown ids instead of stopping")
    parser.add_argument("--output", metavar="FILE", help=".jsonl, .csv or .parquet; without it a table on the terminal")


def run_recommend(options: argparse.Namespace) -> int:
    """The command."""
    export = load_export(options.export)
    if options.text is not None or options.items is not None:
        if options.text is not None:
            answer = recommend_text(export, Path(options.export), options.text, k=options.k)
        else:
            items = _ids(options.items, None) or []
            request = Request(items=items, k=options.k, exclude_seen=not options.include_seen)
            answer = _known(lambda: Recommender(export).recommend(request))
            if answer.unknown and not options.skip_unknown:
                raise ValueError(
                    f"--items: no item has the id {', '.join(answer.unknown)}. --skip-unknown leaves them out."
                )
        if options.output:
            user = options.text or options.items
            write_rows(
                (Row(user, n, i.id, i.title, i.score, i.cold) for n, i in enumerate(answer.items, 1)), options.output
            )
        else:
            _show(answer, export)
        return 0
    users, counts = _ids(options.users, options.users_file), Counts()
    if users is None and not options.output:
        raise ValueError(f"all {len(export.user_ids)} users need --output FILE; --users A,B prints a table.")
    rows = recommend_users(
        export,
        users,
        k=options.k,
        exclude_seen=not options.include_seen,
        skip_unknown=options.skip_unknown,
        counts=counts,
    )
    if options.output:
        _known(lambda: write_rows(rows, options.output))
        print(f"{counts.rows} items for {counts.users} users written: {options.output}")  # noqa: T201
    else:
        for row in _known(lambda: list(rows)):
            print(f"{row.user}  {row.rank:>3}  {row.score:>8.3f}  {row.title}  [{row.item}]")  # noqa: T201
    if counts.unknown:
        print(f"{counts.unknown} unknown users were skipped", file=sys.stderr)  # noqa: T201
    return 0


def _known(answer: Any) -> Any:
    try:
        return answer()
    except (UnknownUserError, UnknownItemError) as error:
        raise ValueError(f"no user or item has the id {error}. --skip-unknown leaves unknown ids out.") from error


def add_similar_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``recbole-llm similar``."""
    parser.add_argument("export", metavar="DIR", help="what 'recbole-llm export' wrote")
    parser.add_argument("--item", required=True, metavar="ID", help="an item")
    parser.add_argument("--k", type=int, default=10, help="how many")


def run_similar(options: argparse.Namespace) -> int:
    """The command."""
    export = load_export(options.export)
    try:
        answer = Recommender(export).similar(options.item, options.k)
    except UnknownItemError as error:
        raise ValueError(f"--item: no item has the id {error}.") from error
    _show(answer, export)
    return 0
