"""Items and users to ``.item`` and ``.user`` files: one row per id, texts in one line each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.content.text import AtomicTable, choose_text_fields
from recbole_llm.importing.columns import field_names, is_amount, require
from recbole_llm.importing.ids import ID_PROBLEMS, REFUSED, IdColumn
from recbole_llm.importing.keys import check_key, find_key
from recbole_llm.importing.numbers import NumberReader, numbers
from recbole_llm.importing.report import EXAMPLES, EntityReport, share
from recbole_llm.importing.rows import RowFile
from recbole_llm.importing.table import Batch, OneKind, Source, is_nameless
from recbole_llm.importing.values import (
    clean_text,
    protected,
    quantiles,
    trimmed,
)

# values per column from which its type and whether it is text are told
SAMPLE = 1000
# characters of each that are looked at
SAMPLE_CHARACTERS = 2000


@dataclass(frozen=True)
class EntityRules:
    """How to read items or users.

    Attributes:
        kind: ``item`` or ``user``.
        id_column: the column of the ids; found if ``None``.
        interaction_column: the interactions' column of these ids.
        text_columns: columns that make the text; found if ``None``.
        taken: fields of the other atomic files: RecBole knows a field by its name alone.
        duplicates: which row of an id to keep, ``last`` or ``first``.
        bad_rows: ``error`` or ``drop`` rows that cannot be read.
        keep_html: leave HTML in texts.
        decimal: the sign before decimals, ``.`` or ``,``; found if ``None``.
    """

    kind: str
    id_column: str | None
    interaction_column: str
    text_columns: Sequence[str] | None
    taken: Sequence[str]
    duplicates: str = "last"
    bad_rows: str = "error"
    keep_html: bool = False
    decimal: str | None = None


@dataclass
class _Column:
    """What a first pass learns about a column."""

    numbers: NumberReader
    numeric: bool = True
    leading_zero: bool = False
    sample: list[str] = field(default_factory=list)
    filled: int = 0


def import_entities(
    source: Source, target: Path, known: pa.Array, rules: EntityRules, progress: bool = False
) -> EntityReport:
    """Write ``target``, a RecBole ``.item`` or ``.user`` file: a row for each id of the source and of the interactions.

    The file is read twice: columns' types must be known before a line is written.

    Args:
        source: the items or users.
        target: the file to write.
        known: the ids that have an interaction, a ``string`` array.
        rules: how to read.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: on columns that are missing and rows that cannot be read (unless dropped).
    """
    first = next(source.batches(), None)
    if first is None:
        first = Batch({name: pa.array([], pa.string()) for name in source.names}, range(0))
    report = EntityReport(source.path.name, source.unit)
    flag = f"--{rules.kind}s-id-column"
    if rules.id_column is not None:
        id_name = require(source, flag, rules.id_column)
    else:
        key = find_key(source, first, known, rules.interaction_column, rules.kind)
        id_name = key.name
        report.notes.append(key.note)
    profile = _profile(source, id_name, rules)
    unused = {**source.unused, **{name: "no name" for name in source.names if is_nameless(name)}}
    unused |= {name: "empty" for name, column in profile.items() if not column.filled and name not in unused}
    asked = list(dict.fromkeys(rules.text_columns or ()))
    for name in asked:
        if name not in profile:
            option = "--text-columns" if rules.kind == "item" else "--user-text-columns"
            if require(source, option, name) == id_name:
                raise source.error(f"{option} names {name!r}, which holds the ids. Copy it to a column of its own.")
            profile |= _profile(source, id_name, rules, [name])
        unused.pop(name, None)
    columns = [name for name in profile if name not in unused]
    fields = field_names(columns, [f"{rules.kind}_id", *rules.taken], f"{rules.kind}_", source)
    types = {fields[name]: _type_of(name, profile[name]) for name in columns}
    text_fields = [fields[name] for name in asked] or _looks_like_text(target, fields, types, profile)
    for name in columns:
        if fields[name] in text_fields and not _is_category(profile[name].sample):
            types[fields[name]] = "token_seq"
    report.columns = {id_name: f"{rules.kind}_id:token", **{n: f"{fields[n]}:{types[fields[n]]}" for n in columns}}
    report.unused_columns = unused
    report.text_fields = text_fields
    kinds = ["text" if fields[name] in text_fields else types[fields[name]] for name in columns]
    writer = _Writer(source, id_name, {name: profile[name].numbers for name in columns}, kinds, rules, report)
    writer.run(target, known, progress)
    signs = {profile[name].numbers.decimal for name, kind in zip(columns, kinds, strict=True) if kind == "float"}
    report.read_as = {**source.read_as, **({"decimal sign": ","} if "," in signs else {})}
    report.blank_lines, report.multiline_cells = source.blank_lines, source.multiline_cells
    return report


def _profile(
    source: Source, id_name: str, rules: EntityRules, names: Sequence[str] | None = None
) -> dict[str, _Column]:
    """Read all rows once for the types of the columns; of ``names`` alone, if given."""
    profile: dict[str, _Column] = {}
    decimal = rules.decimal or (None if source.foreign_decimals else ".")
    for batch in source.batches(names):
        for name, cells in batch.columns.items():
            if name != id_name:
                column = profile.setdefault(name, _Column(NumberReader(decimal)))
                _learn(column, trimmed(cells), source.is_typed(batch, name), rules.keep_html)
    if names is None and source.late_names:  # keys that JSON shows late: once more, for them alone
        profile |= _profile(source, id_name, rules, sorted(source.late_names))
    return profile


def _learn(column: _Column, cells: pa.Array, is_typed: bool, keep_html: bool) -> None:
    filled = cells.drop_null()
    column.filled += len(filled)
    if not len(filled):
        return
    if column.numeric:
        read = numbers(filled) if is_typed else column.numbers.read(filled)
        column.numeric = bool(np.isfinite(read).all())
        column.leading_zero |= bool(pc.any(pc.match_substring_regex(filled, r"^0\d")).as_py())
    if len(column.sample) < SAMPLE:
        cut = pc.utf8_slice_codeunits(filled.slice(0, SAMPLE), 0, SAMPLE_CHARACTERS)
        column.sample += [clean_text(cell, keep_html) for cell in cut.to_pylist()]


def _is_category(sample: list[str]) -> bool:
    """Whether a text is a value from a list (a brand, a language), which RecBole's other models read as one token."""
    words = sum(len(text.split()) for text in sample)
    return words <= 3 * len(sample) and len(set(sample)) < 0.8 * len(sample)


def _type_of(name: str, column: _Column) -> str:
    amount = column.numeric and column.filled and not column.leading_zero and is_amount(name, column.sample)
    return "float" if amount else "token"


def _looks_like_text(
    target: Path, fields: dict[str, str], types: dict[str, str], profile: dict[str, _Column]
) -> list[str]:
    cells = {field: profile[name].sample for name, field in fields.items()}
    try:
        return list(choose_text_fields(AtomicTable(target, "", types, {}, cells, 0)))
    except ValueError:  # no column looks like text: the report says so
        return []


class _Writer:
    def __init__(
        self,
        source: Source,
        id_name: str,
        columns: dict[str, NumberReader],
        kinds: list[str],
        rules: EntityRules,
        report: EntityReport,
    ) -> None:
        self.source, self.id_name, self.columns, self.kinds = source, id_name, columns, kinds
        self.rules, self.report = rules, report
        self.id_kind = OneKind(source, id_name)
        self.ids = IdColumn(rules.kind)
        # column to the field of the text that it makes
        self.texts = {
            name: report.columns[name].split(":")[0]
            for name, kind in zip(columns, kinds, strict=True)
            if kind == "text"
        }

    def run(self, target: Path, known: pa.Array, progress: bool) -> None:
        """Write all rows, then leave out repeated ids and add ids that have no row."""
        report = self.report
        header = list(report.columns.values())
        remembered: dict[str, type] = {"length": np.int64, **{f"empty {name}": np.bool_ for name in self.texts}}
        with RowFile(target, header, remembered) as rows:
            for batch in self.source.batches([self.id_name, *self.columns], progress):
                self._take(batch, rows)
            code, length = self.ids.finish(), rows.column("length")
            keep = self._kept(code)
            absent = known.filter(pc.invert(pc.is_in(known, value_set=self.ids.ids)))
            empty = "\t" * len(self.columns) + "\n"
            rows.finish(keep, extra="".join(value + empty for value in absent.to_pylist()).encode())
        report.rows_kept, report.added, report.known = int(keep.sum()), len(absent), len(known)
        report.unseen = report.rows_kept - (len(known) - len(absent))
        if report.text_fields:
            report.without_text = int((length[keep] == 0).sum()) + len(absent)
            report.text_length = quantiles(length[keep][length[keep] > 0])
            report.empty_texts = {
                field: int(rows.column(f"empty {name}")[keep].sum()) for name, field in self.texts.items()
            }

    def _kept(self, code: np.ndarray) -> np.ndarray:
        """Bool ``[rows]``: one row of each id."""
        keep = np.zeros(len(code), dtype=bool)
        # np.unique gives the first of equal values
        at = (
            np.unique(code, return_index=True)[1]
            if self.rules.duplicates == "first"
            else len(code) - 1 - np.unique(code[::-1], return_index=True)[1]
        )
        keep[at] = True
        if self.rules.id_column is None:
            check_key(self.source, self.id_name, len(code), len(at), self.rules.kind)
        repeats = len(code) - len(at)
        self.report.drop(f"duplicate id ({self.rules.duplicates} one kept)", repeats)
        if repeats:
            self.report.notes.append(
                f"{repeats:,} of {len(code):,} rows ({share(repeats, len(code))}) repeat the id of another row. Of "
                f"each {self.rules.kind} the {self.rules.duplicates} row is kept; --duplicates chooses."
            )
        return keep

    def _take(self, batch: Batch, rows: RowFile) -> None:
        report, rules = self.report, self.rules
        report.rows_read += len(batch.lines) + len(batch.rejected)
        for line, reason in batch.rejected:
            report.refuse(reason, [line], rules.bad_rows)
        self.id_kind.check(batch)
        problems, ids = self.ids.problems(batch.columns[self.id_name])
        for problem, reason in ID_PROBLEMS.items():
            hit = np.flatnonzero(problems == problem)
            if len(hit):
                places = [batch.lines[int(i)] for i in hit[:EXAMPLES]]
                if problem in REFUSED:
                    value = batch.columns[self.id_name][int(hit[0])].as_py()
                    report.refuse(f"{rules.kind} {reason}", places, rules.bad_rows, len(hit), value)
                else:
                    report.drop(f"{rules.kind} {reason}", len(hit), places)
        length = np.zeros(len(batch.lines), dtype=np.int64)
        remembered = {"length": length}
        cells = [batch.columns[self.id_name]]
        for (name, reader), kind in zip(self.columns.items(), self.kinds, strict=True):
            if kind == "float":
                text = trimmed(batch.columns[name])
                cells.append(text if self.source.is_typed(batch, name) else reader.strings(text)[1])
                continue
            clean = [
                None if cell is None else clean_text(cell, rules.keep_html) for cell in batch.columns[name].to_pylist()
            ]
            if kind == "text":
                of_cell = np.fromiter((len(cell or "") for cell in clean), dtype=np.int64, count=len(clean))
                length += of_cell
                remembered[f"empty {name}"] = of_cell == 0
            cells.append(pa.array([None if cell is None else protected(cell) for cell in clean], pa.string()))
        self.ids.append(ids, problems == 0)
        rows.write(cells, problems == 0, remembered)
