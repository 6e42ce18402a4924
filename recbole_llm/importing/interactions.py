"""Interactions to an ``.inter`` file: streamed, with a few numbers per row kept to find duplicates and sort."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.importing.columns import Notation, interaction_columns
from recbole_llm.importing.ids import ID_PROBLEMS, REFUSED, IdColumn, look_alikes
from recbole_llm.importing.numbers import LabelReader, NumberReader, number_strings, numbers
from recbole_llm.importing.report import EXAMPLES, TableReport, share
from recbole_llm.importing.rows import RowFile
from recbole_llm.importing.table import Batch, OneKind, Source
from recbole_llm.importing.times import TimeReader
from recbole_llm.importing.values import trimmed
from recbole_llm.importing.weights import FIELD as WEIGHT
from recbole_llm.importing.weights import WeightReader, WeightRules, as_cells, final_weights


@dataclass(frozen=True)
class InteractionRules:
    """What to do with rows.

    Attributes:
        threshold: ratings below it are no interactions.
        keep_negatives: write those, and label 0, as rows with ``label`` 0 instead of dropping them.
        duplicates: of one user and item keep the ``last`` row (by time, then place), the ``first``, or ``keep`` all; ``sum``
            keeps the last with the sum of their weights.
        bad_rows: ``error`` or ``drop`` rows that cannot be read.
        order: of the ``file``, of ``time``, or ``auto``: of time where RecBole's float32 cannot tell times apart.
        notation: how numbers and times are written, where it was told.
        weights: how much each interaction counts.
    """

    threshold: float | None = None
    keep_negatives: bool = False
    duplicates: str = "last"
    bad_rows: str = "error"
    order: str = "auto"
    notation: Notation = field(default_factory=Notation)
    weights: WeightRules = field(default_factory=WeightRules)


@dataclass
class Interactions:
    """What was written.

    Attributes:
        users: the ids written, a ``string`` array in order of appearance.
        items: likewise.
        fields: the fields of the file, in order.
        notes: for the report.
    """

    report: TableReport
    users: pa.Array
    items: pa.Array
    fields: list[str]
    notes: list[str] = field(default_factory=list)


def import_interactions(
    source: Source, target: Path, flags: Mapping[str, str | None], rules: InteractionRules, progress: bool = False
) -> Interactions:
    """Write ``target``, a RecBole ``.inter`` file.

    Args:
        source: the interactions.
        target: the file to write; ``target`` with ``.rows`` added is used on the way.
        flags: see :func:`recbole_llm.importing.columns.interaction_columns`.
        rules: what to do with rows.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: on columns that are missing, rows that cannot be read (unless dropped), or when no row is left.
    """
    return _Importer(source, flags, rules).run(target, progress)


class _Check:
    """The rows of a batch that are still kept."""

    def __init__(self, batch: Batch, report: TableReport, bad_rows: str) -> None:
        self.batch, self.report, self.bad_rows = batch, report, bad_rows
        self.alive = np.ones(len(batch.lines), dtype=bool)
        report.rows_read += len(batch.lines) + len(batch.rejected)
        for line, reason in batch.rejected:
            report.refuse(reason, [line], bad_rows)

    def reject(self, mask: np.ndarray, reason: str, refused: str = "", hint: str = "") -> None:
        """Drop rows, or, where ``refused`` names the column with a value that cannot be read, refuse them.

        Args:
            mask: bool ``[rows]``.
            reason: what is wrong with them.
            refused: the column.
            hint: what else than correcting the file helps.
        """
        hit = np.flatnonzero(mask & self.alive)
        if not len(hit):
            return
        self.alive[hit] = False
        places = [self.batch.lines[int(at)] for at in hit[:EXAMPLES]]
        if refused:
            value = self.batch.columns[refused][int(hit[0])].as_py()
            self.report.refuse(reason, places, self.bad_rows, len(hit), value, hint)
        else:
            self.report.drop(reason, len(hit), places)


def _is_null(values: pa.Array) -> np.ndarray:
    return values.is_null().to_numpy(zero_copy_only=False)


class _Importer:
    def __init__(self, source: Source, flags: Mapping[str, str | None], rules: InteractionRules) -> None:
        first = next(source.batches(), Batch({}, range(0)))
        if not first.columns or not len(first.lines):
            first = Batch({name: pa.array([], pa.string()) for name in source.names}, range(0))
        self.source, self.rules = source, rules
        self.columns = columns = interaction_columns(source, first, flags, rules.notation)
        if rules.threshold is not None and not columns.rating:
            raise source.error("a threshold needs ratings, and no column holds them. Give --rating-column.")
        self.ratings = NumberReader(rules.notation.decimal)
        self.label = LabelReader()
        self.time: TimeReader | None = None
        self.told_by = ""
        if columns.time:
            self.time = self._time_reader(first, columns.time)
        if rules.weights.half_life is not None and not columns.time:
            raise source.error("--half-life needs times, and no column holds them. Give --time-column.")
        self.weights = WeightReader(rules.weights, columns, rules.notation.decimal)
        self.labelled = bool(columns.label) or rules.threshold is not None
        self.report = TableReport(source.path.name, source.unit)
        self.ids = {kind: IdColumn(kind) for kind in ("user", "item")}
        self.id_kinds = [OneKind(source, column) for column in (columns.user, columns.item)]
        self.without_rating = 0

    def _time_reader(self, first: Batch, name: str) -> TimeReader:
        """The reader for the times that begin with ``first``; the whole column is read where only it tells day from month."""
        source, notation = self.source, self.rules.notation
        reader = TimeReader.detect(trimmed(first.columns[name]), notation.time_unit, notation.time_format)
        if reader is None and len(first.lines):
            raise source.error(
                f"--time-column {name!r}: most of its first values are neither numbers nor dates such as "
                f"2024-05-31T12:00:00 (the first is {first.columns[name][0].as_py()!r}). Another form is given as "
                "--time-format '%d.%m.%Y %H:%M'."
            )
        reader = reader or TimeReader("s")
        for batch in source.batches([name]) if reader.is_undecided else ():
            place = reader.settle(trimmed(batch.columns[name]))
            if place is not None:
                shown = batch.columns[name][place].as_py()
                self.told_by = f"{source.unit} {batch.lines[place]} ({shown!r}) tells the day from the month"
                return reader
        if reader.is_undecided:
            raise source.error(
                f"the times of {name!r}, such as {first.columns[name][0].as_py()!r}, may begin with the day or with the month, "
                "and no row tells which. Give --time-format, such as '%d/%m/%Y' or '%m/%d/%Y'."
            )
        return reader

    def run(self, target: Path, progress: bool) -> Interactions:
        """Read all, then settle duplicates, threshold and order."""
        columns, keep_label = self.columns, self.labelled and self.rules.keep_negatives
        fields = {columns.user: "user_id:token", columns.item: "item_id:token"}
        if columns.rating:
            fields[columns.rating] = "rating:float"
        header = list(fields.values())
        if keep_label:
            header.append("label:float")
        if columns.label:
            fields[columns.label] = "label:float" if keep_label else "(label 1 only)"
        if self.time:
            fields[columns.time] = "timestamp:float"
            header.append("timestamp:float")
        weighs = self._weight_fields(fields, header)
        self.report.columns = fields
        remembered: dict[str, type] = {"low": np.bool_, "time": np.float64}
        if weighs:
            remembered |= {"weight": np.float64, "label": np.int8}
        with RowFile(target, header, remembered, open_ended=weighs) as rows:
            for batch in self.source.batches(columns.used(), progress):
                self._take(batch, rows, keep_label)
            keep = np.ones(len(rows), dtype=bool)
            user, item = (column.finish() for column in self.ids.values())
            low, time = rows.column("low"), rows.column("time")
            if self.rules.duplicates != "keep":
                told = "last" if self.rules.duplicates == "sum" else self.rules.duplicates
                keep &= ~_repeats(user, item, time if self.time else None, self.rules.duplicates == "first")
                repeats = len(rows) - int(keep.sum())
                self.report.drop(f"duplicate user and item ({told} one kept)", repeats)
                self._note_repeats(repeats, len(rows))
            below = keep & low
            self.report.drop(
                f"rating below {self.rules.threshold:g}" if self.rules.threshold is not None else "", int(below.sum())
            )
            keep &= ~low
            if not keep.any():
                raise self.source.error(
                    f"no row is left of {self.report.rows_read}: {self.report.dropped or 'it has only a header'}."
                )
            order = self._order(time, keep)
            rows.finish(keep, order, last=self._weight_cells(rows, user, item, keep) if weighs else None)
            self.report.rows_kept = int(keep.sum())
            users, items = (_met(self.ids[role].ids, codes[keep]) for role, codes in (("user", user), ("item", item)))
        self._finish_report()
        if self.time:
            self.report.notes.append(f"times lie between {_day(time[keep].min())} and {_day(time[keep].max())}.")
        names = [name.split(":")[0] for name in header]
        notes = [*self._notes(order is not None, time, keep), *_look_alike_notes({"user": users, "item": items})]
        return Interactions(self.report, users, items, names, notes)

    def _weight_fields(self, fields: dict[str, str], header: list[str]) -> bool:
        """Name the column of weights, if there is one."""
        rules, columns = self.rules.weights, self.columns
        if not rules.any:
            return False
        header.append(WEIGHT)
        for name in (columns.weight, columns.event):
            if name:
                fields[name] = f"{fields[name]}, {WEIGHT}" if name in fields else WEIGHT
        return True

    def _weight_cells(self, rows: RowFile, user: np.ndarray, item: np.ndarray, keep: np.ndarray) -> pa.Array:
        """The weights as they are written, told in the report."""
        rules, groups = self.rules.weights, None
        low, label = rows.column("low"), rows.column("label")
        if rules.adds_up:  # what a threshold leaves out, and what is disliked, adds nothing to what is liked
            kinds = 2 * low + label.astype(np.int64)
            groups = ((user.astype(np.int64) << 32) | item) * 4 + kinds
        weights = final_weights(rows.column("weight"), rules, groups, rows.column("time"), keep)
        kept = weights[keep]
        self.report.notes.append(
            f"weights are {rules.describe(self.columns)}: between {kept.min():.3g} and {kept.max():.3g}, {kept.mean():.3g} on "
            "average."
        )
        return as_cells(weights)

    def _take(self, batch: Batch, rows: RowFile, keep_label: bool) -> None:
        """Check the rows of a batch and write those that can be kept."""
        columns, rules, n = self.columns, self.rules, len(batch.lines)
        check = _Check(batch, self.report, rules.bad_rows)
        for kind in self.id_kinds:
            kind.check(batch)
        ids = {}
        for role, column in (("user", columns.user), ("item", columns.item)):
            problems, ids[role] = self.ids[role].problems(batch.columns[column])
            for problem, reason in ID_PROBLEMS.items():
                check.reject(problems == problem, f"{role} {reason}", column if problem in REFUSED else "")
        cells = [batch.columns[columns.user], batch.columns[columns.item]]
        label, low, seconds = np.ones(n, dtype=np.int8), np.zeros(n, dtype=bool), np.zeros(n)
        if columns.rating:
            ratings, label = self._ratings(check)
            cells.append(ratings)
            low = (label == 0) & (not rules.keep_negatives)
        if columns.label:
            label = self._labels(check)
        if keep_label:
            cells.append(pc.cast(pa.array(label), pa.string()))
        if self.time:
            text = trimmed(batch.columns[columns.time])
            seconds = self.time.seconds(text)
            check.reject(_is_null(text), "time missing")
            check.reject(np.isnan(seconds), f"time is no {self.time.describe()}", columns.time, _TIME_HINT)
            cells.append(text if self.time.unit == "s" else number_strings(seconds))
        remembered = {"low": low, "time": seconds}
        if rules.weights.any:
            remembered["weight"] = self.weights.read(batch.columns, n, check.reject)
            remembered["label"] = label
        for role, id_column in self.ids.items():
            id_column.append(ids[role], check.alive)
        rows.write(cells, check.alive, remembered)

    def _ratings(self, check: "_Check") -> tuple[pa.Array, np.ndarray]:
        """Ratings as they are written, and 1 for those not below the threshold."""
        text = trimmed(check.batch.columns[self.columns.rating])
        written, absent = text, _is_null(text)
        if self.source.is_typed(check.batch, self.columns.rating):
            value = numbers(text)
        else:
            value, written = self.ratings.strings(text)
        check.reject(np.isnan(value) & ~absent, "rating is not a number", self.columns.rating, _RATING_HINT)
        if self.rules.threshold is None:
            self.without_rating += int((absent & check.alive).sum())
            return written, np.ones(len(text), dtype=np.int8)
        check.reject(absent, "rating missing")
        return written, (value >= self.rules.threshold).astype(np.int8)

    def _labels(self, check: "_Check") -> np.ndarray:
        text = trimmed(check.batch.columns[self.columns.label])
        label = self.label.read(text)
        check.reject(_is_null(text), "label missing")
        check.reject(label < 0, "label is neither 0 nor 1", self.columns.label, _LABEL_HINT)
        if not self.rules.keep_negatives:
            check.reject(label == 0, "label 0")
        return label

    def _order(self, time: np.ndarray, keep: np.ndarray) -> np.ndarray | None:
        """The order to write rows in; ``None`` for that of the file."""
        if not self.time or self.rules.order == "file":
            return None
        if self.rules.order == "auto" and (time.astype(np.float32) == time)[keep].all():
            return None
        return None if (np.diff(time[keep]) >= 0).all() else np.argsort(time, kind="stable")

    def _finish_report(self) -> None:
        source, report = self.source, self.report
        report.blank_lines, report.multiline_cells = source.blank_lines, source.multiline_cells
        others = [name for name in source.names if name not in self.columns.used()] + sorted(source.late_names)
        report.unused_columns = {
            **dict.fromkeys(others, "not an interaction's field"),
            **self.columns.others,
            **source.unused,
        }
        report.read_as = dict(source.read_as)
        if self.ratings.rewrites:
            report.read_as["decimal sign"] = self.ratings.decimal or "."
        if self.time and self.time.unit == "format":
            report.read_as["times"] = self.time.describe()

    def _notes(self, sorted_by_time: bool, time: np.ndarray, keep: np.ndarray) -> list[str]:
        notes = self._notes_of_reading()
        if self.time and not (time.astype(np.float32) == time)[keep].all():
            step = float(np.spacing(np.float32(np.abs(time[keep]).max())))
            notes.append(
                f"RecBole holds times as float32, here in steps of up to {step:g} s, and sorts them stably: rows are "
                + (
                    "written in order of time, so that a split by time is exact."
                    if sorted_by_time or self.rules.order != "file"
                    else "in the file's order: a split by time may swap rows within a step. --order time prevents it."
                )
            )
        if self.time and self.time.without_zone:
            notes.append(f"{self.time.without_zone:,} times name no zone and are read as UTC.")
        if self.columns.rating and not self.labelled:
            notes.append("every rating counts as a positive interaction; --threshold 4 would take ratings from 4 on.")
        if self.without_rating:
            notes.append(f"{self.without_rating:,} ratings are missing; RecBole fills in the mean if it loads them.")
        return notes

    def _note_repeats(self, repeats: int, rows: int) -> None:
        if repeats and self.rules.weights.adds_up:
            self.report.notes.append(
                f"{repeats:,} of {rows:,} rows ({share(repeats, rows)}) name a user and an item that another row names too. Of "
                "such rows the last one is kept, with the sum of their weights."
            )
        elif repeats:
            kept = self.rules.duplicates + (" in time" if self.time else " in the file")
            self.report.notes.append(
                f"{repeats:,} of {rows:,} rows ({share(repeats, rows)}) name a user and an item that another row names too. Of "
                f"such rows one is kept, the {kept}; how often an item was taken counts for nothing. --duplicates sum adds "
                "their weights up; --duplicates keep writes every row."
            )

    def _notes_of_reading(self) -> list[str]:
        notes = []
        if self.told_by:
            notes.append(f"times are read as {self.time.describe() if self.time else ''}: {self.told_by}.")
        if self.columns.label and self.label.describe():
            notes.append(f"labels of {self.columns.label!r}: {self.label.describe()}.")
        return notes


def _day(seconds: float) -> str:
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))


_RATING_HINT = "--decimal , reads 4,5 as four and a half; --rating-column '' leaves ratings out."
_LABEL_HINT = (
    "Labels are 1 and 0, 1 and -1, true and false, or yes and no; if these are ratings give --rating-column, and "
    "--label-column '' leaves labels out."
)
_TIME_HINT = "--time-format gives another form, such as '%d.%m.%Y %H:%M'; --time-column '' leaves times out."


def _look_alike_notes(ids: Mapping[str, pa.Array]) -> list[str]:
    notes = []
    for name, values in ids.items():
        pairs = look_alikes(values)
        if pairs:
            notes.append(
                f"{len(pairs):,} {name} ids differ from another only in white space around them or in Unicode form and "
                f"stay different ids, such as {pairs[0][0]!a} and {pairs[0][1]!a}."
            )
    return notes


def _met(ids: pa.Array, codes: np.ndarray) -> pa.Array:
    """The ids that have one of ``codes``."""
    met = np.zeros(len(ids), dtype=bool)
    met[codes] = True
    return ids.filter(pa.array(met))


def _repeats(user: np.ndarray, item: np.ndarray, time: np.ndarray | None, first: bool) -> np.ndarray:
    """Bool ``[rows]``: true where another row of the same user and item is kept instead."""
    key = user.astype(np.int64) << 32
    key |= item
    order = np.argsort(key)
    key = key[order]
    same = key[1:] == key[:-1]
    repeats = np.zeros(len(user), dtype=bool)
    if not same.any():
        return repeats
    member = np.zeros(len(key), dtype=bool)
    member[1:] = same
    member[:-1] |= same
    rows, keys = order[member], key[member]  # few, as a rule: only these are sorted by time and place
    by_time = np.lexsort((rows, keys) if time is None else (rows, time[rows], keys))
    rows, keys = rows[by_time], keys[by_time]
    repeats[rows] = True
    edge = keys[1:] != keys[:-1]
    kept = np.concatenate([[True], edge]) if first else np.concatenate([edge, [True]])
    repeats[rows[kept]] = False
    return repeats
