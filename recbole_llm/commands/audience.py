"""``recbole-llm recommend --top-users``: who should get an item, for known items, texts and files of new items."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from recbole_llm.content.text import Template
from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.reader import Export
from recbole_llm.recommend import Row, write_rows
from recbole_llm.retrieval.audience import AskedItem, described_items, known_items, top_users
from recbole_llm.terminal import columns_of, filled, printable

TOP_USERS = 50
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".pq", ".gz")
IDS = ("item_id", "id", "sku", "asin", "product_id")  # columns that name a new item, the likeliest first


def add_audience_arguments(parser: argparse.ArgumentParser, who: argparse._MutuallyExclusiveGroup) -> None:
    """The options of ``--top-users``.

    Args:
        parser: of ``recbole-llm recommend``.
        who: its group of what is asked about.
    """
    who.add_argument("--for-item", nargs="+", metavar="ID", help="who should get this item? commas separate several")
    parser.add_argument(
        "--top-users",
        type=int,
        default=None,
        metavar="N",
        help=f"the N users to whom each item of --for-item, --text or --items-file is likeliest (default: {TOP_USERS} with "
        "--for-item); --items-file may be a table of new items then (.csv, .jsonl, .parquet), known by the columns of their text",
    )


def asks_for_users(options: argparse.Namespace) -> bool:
    """Whether users are asked for, and not items.

    Raises:
        ValueError: if that does not fit what else is asked.
    """
    if options.top_users is None and options.for_item is None:
        return False
    if options.top_users is not None and options.top_users < 1:
        raise ValueError(f"--top-users is {options.top_users}; expected at least 1.")
    if not (options.for_item or options.text or options.items_file):
        raise ValueError(
            "--top-users: say which item somebody should get: --for-item ID, --text WORDS or --items-file FILE."
        )
    return True


def needs_texts(options: argparse.Namespace) -> bool:
    """Whether an item is described in words, so that the text encoder is needed."""
    return options.text is not None or _is_table(options.items_file)


def run_audience(options: argparse.Namespace, model: Export) -> int:
    """Answer; gives the exit code.

    Raises:
        ValueError: on unknown items, a table without the columns of a text, or a model that places no texts.
    """
    items = _asked(options, model)
    rows = _rows(model, items, options.top_users or TOP_USERS, not options.include_seen)
    if options.output:
        write_rows(rows, options.output)
        print(f"users for {len(items)} items written to {options.output}")
        return 0
    for item, of_item in groupby(rows, lambda row: (row.item, row.title)):
        title = printable(item[1])
        found = list(of_item)
        width = max(columns_of(row.user) for row in found)
        name = printable(item[0])
        print(f"item {name}: {title}" if item[1] != item[0] else f"item {name}")
        for row in found:
            print(f"{row.rank:>5}  {filled(printable(row.user), width)}  {row.probability or 0.0:.2%}")
    return 0


def _rows(model: Export, items: Sequence[AskedItem], k: int, exclude_seen: bool) -> Iterator[Row]:
    for item, users in zip(items, top_users(model, items, k, exclude_seen=exclude_seen), strict=True):
        for rank, user in enumerate(users, 1):
            yield Row(user.user, rank, item.id, item.title, user.score, user.probability, item.cold)


def _is_table(file: str | None) -> bool:
    return file is not None and any(file.lower().endswith(ending) for ending in TABLES)


def _asked(options: argparse.Namespace, model: Export) -> list[AskedItem]:
    if options.text is not None:
        if not options.text.strip():
            raise ValueError("text is empty; describe the item.")
        return _described(model, [options.text], [options.text], [options.text])
    if _is_table(options.items_file):
        return _described(model, *_new_items(model, options.items_file))
    if options.items_file is not None:
        ids = [line for line in Path(options.items_file).read_text(encoding="utf-8-sig").splitlines() if line]
    else:
        ids = [part for value in options.for_item for part in value.split(",") if part]
    if not ids:
        raise ValueError("--for-item or --items-file names no id.")
    try:
        return known_items(model, ids)
    except UnknownItemError as error:
        raise ValueError(
            f"no item of the data has the id {error}. Describe a new one with --text, or in a table with --items-file."
        ) from error


def _described(model: Export, ids: Sequence[str], titles: Sequence[str], texts: Sequence[str]) -> list[AskedItem]:
    from recbole_llm.serving.text import TransformerEncoder

    if model.manifest.encoder is None or model.text_map is None:
        raise ValueError(
            "this model has no encoder or places no items by their texts (cold_map none): give --for-item ID."
        )
    vectors, _ = TransformerEncoder(model.folder, model.manifest, model.encoders).encode(texts)
    return described_items(model, ids, titles, vectors)


def _new_items(model: Export, file: str) -> tuple[list[str], list[str], list[str]]:
    """Ids, titles and texts of a table's rows, the texts made as those of the model's items."""
    from recbole_llm.importing.columns import simple_name
    from recbole_llm.importing.sources import open_source
    from recbole_llm.importing.values import clean_text

    spec = model.manifest.item_text
    if spec is None:
        raise ValueError("--items-file: the items of this model have no texts; give a file of ids, one a line.")
    source = open_source(file)
    by_name = {simple_name(name): name for name in source.names}
    columns = {name: by_name.get(simple_name(name)) for name in spec.fields}
    if not any(columns.values()):
        raise ValueError(
            f"--items-file: {source.path.name} has the columns {', '.join(source.names)}, and an item's text is made of "
            f"{', '.join(spec.fields)}: name at least one of them so."
        )
    id_column = next((by_name[simple_name(name)] for name in IDS if simple_name(name) in by_name), None)
    template = Template(spec.template)
    ids: list[str] = []
    titles: list[str] = []
    texts: list[str] = []
    for batch in source.batches():
        if batch.rejected:
            raise ValueError(
                f"--items-file: {source.path.name}, {source.unit} {batch.rejected[0][0]}: {batch.rejected[0][1]}."
            )
        cells = {name: batch.columns[name].to_pylist() for name in batch.columns}
        for at, line in enumerate(batch.lines):
            row = {name: clean_text((cells[column][at] if column else None) or "") for name, column in columns.items()}
            text = template.render(row)
            item_id = (cells[id_column][at] if id_column else None) or f"{source.unit} {line}"
            if not text:
                raise ValueError(f"--items-file: {source.path.name}, {source.unit} {line} ({item_id}) has no text.")
            ids.append(item_id)
            titles.append(next((row[name] for name in spec.fields if row[name]), item_id))
            texts.append(text)
    if not ids:
        raise ValueError(f"--items-file: {source.path.name} holds no item.")
    return ids, titles, texts
