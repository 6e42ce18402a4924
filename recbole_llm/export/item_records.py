"""Read an item file once: titles, texts and attributes of an export's items."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.content.text import (
    AtomicTable,
    choose_text_fields,
    default_template,
    read_atomic_table,
    texts_of_tokens,
)
from recbole_llm.export.manifest import ItemText
from recbole_llm.export.reader import ItemRecord

# columns whose cells are longer than this on average are prose, not something to filter by
ATTRIBUTE_CHARACTERS = 64

log = getLogger(__name__)


@dataclass(frozen=True)
class ItemRecords:
    """The items of an export.

    Attributes:
        records: one of each item.
        kinds: attribute name to kind.
        item_text: how an item's fields make its text; ``None`` where no text encoder belongs to the model.
        texts: each item's text, ``None`` where it has none; empty without an item file.
        unread: items of the file that are none of these.
    """

    records: list[ItemRecord]
    kinds: dict[str, str] = field(default_factory=dict)
    item_text: ItemText | None = None
    texts: Sequence[str | None] = ()
    unread: int = 0


def item_records(
    options: Any, dataset: Any, item_ids: Sequence[str], attributes: Sequence[str] | None, keep_text: bool
) -> ItemRecords:
    """Read and render the items' file, once.

    Args:
        options: of the model; which columns make an item's text.
        dataset: of RecBole.
        item_ids: external ids in catalogue order.
        attributes: columns to show and filter by; ``None`` for all that are short.
        keep_text: whether the records hold the texts.

    Raises:
        ValueError: if a column is unknown.
    """
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if not path.is_file():
        if attributes:
            raise ValueError(f"attributes names {', '.join(attributes)}, and there is no {path.name}.")
        log.info("There is no %s: items are called by their ids", path.name)
        return ItemRecords([ItemRecord(item_id, None, {}) for item_id in item_ids])
    table = _item_table(path, dataset)
    texts: list[str | None] = [None] * len(item_ids)
    fields: tuple[str, ...] = ()
    item_text = None
    if options.text_encoder:
        fields = choose_text_fields(table, options.item_text_fields, options.item_text_template)
        template = options.item_text_template or default_template(fields)
        item_text = ItemText(fields, template)
        texts, _ = texts_of_tokens(table, item_ids, fields, options.item_text_template)
    title = _title_column(table, fields)
    files = {source.column or name for name, source in (getattr(options, "item_modalities", None) or {}).items()}
    kinds = _attribute_kinds(table, title, attributes, files)
    separator = dataset.config["seq_separator"]
    titles = [] if title is None else table.words(title)
    records = []
    for item_id, text in zip(item_ids, texts, strict=True):
        row = table.row_of.get(item_id)
        name = titles[row] if row is not None and titles else ""
        values = {} if row is None else _attributes(table, row, kinds, separator)
        records.append(ItemRecord(name or item_id, text if keep_text else None, values))
    return ItemRecords(records, kinds, item_text, texts, len(table.row_of.keys() - set(item_ids)))


def _item_table(path: Path, dataset: Any) -> AtomicTable:
    config = dataset.config
    return read_atomic_table(
        path,
        dataset.iid_field,
        separator=config["field_separator"],
        encoding=config["encoding"] or "utf-8",
        seq_separator=config["seq_separator"],
    )


def _title_column(table: AtomicTable, fields: Sequence[str]) -> str | None:
    """The column that items are called by: one named title or name, else the first of the text."""
    for wanted in ("title", "name"):
        for name in table.types:
            if name != table.id_field and name.lower().split(":")[0].endswith(wanted):
                return name
    return fields[0] if fields else None


def _attribute_kinds(
    table: AtomicTable, title: str | None, asked: Sequence[str] | None, files: Collection[str]
) -> dict[str, str]:
    unknown = [name for name in asked or () if name not in table.types]
    if unknown:
        raise ValueError(
            f"attributes names {', '.join(map(repr, unknown))}; {table.path.name} has {table.describe_columns()}."
        )
    kinds = {"token": "token", "token_seq": "tokens", "float": "number"}
    chosen = {}
    for name, kind in table.types.items():
        if name in (table.id_field, title) or (asked is not None and name not in asked):
            continue
        if name in files and asked is None:
            log.info("Column %s of %s is no attribute: it names files", name, table.path.name)
            continue
        cells = table.columns[name]
        long = sum(map(len, cells)) > ATTRIBUTE_CHARACTERS * len(cells)
        if kind not in kinds or (long and asked is None):
            log.info("Column %s of %s is no attribute: it is %s", name, table.path.name, "long" if long else kind)
            continue
        chosen[name] = kinds[kind]
    return chosen


def _attributes(table: AtomicTable, row: int, kinds: Mapping[str, str], separator: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        cell = table.columns[name][row]
        if not cell:
            continue
        if kind == "number":
            try:
                number = float(cell)
            except ValueError:
                continue
            if np.isfinite(number):
                values[name] = number
        else:
            values[name] = [part for part in cell.split(separator) if part] if kind == "tokens" else cell
    return values
