"""``recbole-llm recommend --top-users``: who should get an item, for known items, texts and files of new items."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from recbole_llm.commands.rule_arguments import RULE_OPTIONS
from recbole_llm.content.text import Template
from recbole_llm.export.reader import Export
from recbole_llm.recommend import Row, names, write_rows
from recbole_llm.retrieval.audience import AskedItem, Reached, described_items, known_items, top_users
from recbole_llm.retrieval.near_ids import unknown_ids
from recbole_llm.terminal import columns_of, filled, printable
from recbole_llm.text_files import lines_of, separated

TOP_USERS = 50
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".pq", ".gz")
IDS = ("item_id", "id", "sku", "asin", "product_id")  # columns that name a new item, the likeliest first


def add_audience_arguments(parser: argparse.ArgumentParser, who: argparse._MutuallyExclusiveGroup) -> None:
    """The options of ``--top-users``.

    Args:
        parser: of ``recbole-llm recommend``.
        who: its group of what is asked about.
    """
    who.add_argument(
        "--for-item",
        nargs="+",
        action="extend",
        metavar="ID",
        help="who should get this item? several are written as for --users",
    )
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
    of_items = [name for name in ("k", "within", *RULE_OPTIONS) if getattr(options, name) is not None]
    of_items += ["by"] if options.by != "both" else []
    if of_items:
        told = ", ".join("--in" if name == "within" else f"--{name.replace('_', '-')}" for name in of_items)
        raise ValueError(
            f"{told}: this is of lists of items, and users are asked for. Leave it out; --top-users N says how many users."
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
    found = top_users(model, items, options.top_users or TOP_USERS, exclude_seen=not options.include_seen)
    nobody: list[str] = []
    answers = _noting(zip(items, found, strict=True), nobody)
    if options.output:
        write_rows((row for item, users in answers for row in _rows(item, users)), options.output)
        print(f"users for {len(items)} items written to {options.output}")
    else:
        for item, users in answers:
            name = printable(item.id)
            print(f"item {name}: {printable(item.title)}" if item.title != item.id else f"item {name}")
            width = max((columns_of(user.user) for user in users), default=0)
            for rank, user in enumerate(users, 1):
                print(f"{rank:>5}  {filled(printable(user.user), width)}  {user.probability:.2%}")
    if nobody:
        print(f"items that nobody is left for: {len(nobody)} ({names(nobody)})", file=sys.stderr)
    return 0


def _noting(
    answers: Iterable[tuple[AskedItem, list[Reached]]], nobody: list[str]
) -> Iterator[tuple[AskedItem, list[Reached]]]:
    """Pass answers on; the ids of items without a user go to ``nobody``."""
    for item, users in answers:
        if not users:
            nobody.append(item.id)
        yield item, users


def _rows(item: AskedItem, users: Sequence[Reached]) -> Iterator[Row]:
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
        ids = lines_of(options.items_file, "--items-file")
    else:
        ids = separated(options.for_item, set(model.item_ids))
    ids = list(dict.fromkeys(ids))
    if not ids:
        raise ValueError("--for-item or --items-file names no id.")
    return known_items(model, _known(options, model, ids))


def _known(options: argparse.Namespace, model: Export, ids: Sequence[str]) -> list[str]:
    """The ids that items have; others are an error, or with ``--skip-unknown`` named."""
    known = set(model.item_ids)
    strangers = [item_id for item_id in ids if item_id not in known]
    if strangers and (not options.skip_unknown or len(strangers) == len(ids)):
        raise ValueError(
            f"no item of the data has the id {unknown_ids(strangers, model.item_ids)}. Describe a new one with --text, or in a "
            "table with --items-file; --skip-unknown leaves unknown ones out."
        )
    if strangers:
        print(f"unknown items skipped: {len(strangers)} ({names(strangers)})", file=sys.stderr)
    never = {item_id for item_id, listed in zip(model.item_ids, model.listed.tolist(), strict=True) if not listed}
    unplaced = [item_id for item_id in ids if item_id in never]
    if unplaced and (not options.skip_unknown or len(unplaced) + len(strangers) == len(ids)):
        raise ValueError(
            f"the model does not rank the items {names(unplaced)}, which have no interactions and nothing to place them by: nobody "
            "can be told who should get them. --skip-unknown leaves them out."
        )
    if unplaced:
        print(f"items that the model does not rank skipped: {len(unplaced)} ({names(unplaced)})", file=sys.stderr)
    return [item_id for item_id in ids if item_id in known and item_id not in never]


def _described(model: Export, ids: Sequence[str], titles: Sequence[str], texts: Sequence[str]) -> list[AskedItem]:
    from recbole_llm.export.search_tables import plain
    from recbole_llm.serving.text import TransformerEncoder

    if model.manifest.encoder is None or model.text_map is None:
        raise ValueError(
            "this model has no encoder or places no items by their texts (cold_map none): give --for-item ID."
        )
    vectors, _ = TransformerEncoder(model.folder, model.manifest, model.encoders).encode(
        [plain(text) for text in texts]
    )
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
