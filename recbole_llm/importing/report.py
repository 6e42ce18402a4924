"""What became of every row of an import."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_llm.importing.pictures import MediaImport

# places in the file that the report gives for a reason
EXAMPLES = 5


@dataclass
class TableReport:
    """One file that was read; ``rows_read == rows_kept + sum(dropped.values())`` always.

    Attributes:
        file: its name.
        unit: what ``examples`` counts: ``line`` or ``row`` of the file.
        rows_read: rows, the header and blank lines not counted.
        rows_kept: rows that were written.
        dropped: reason to number of rows.
        examples: reason to the first few places in the file.
        blank_lines: lines without anything.
        multiline_cells: cells with a line break inside; many of them are a sign of an unclosed quote.
        columns: column of the file to field of the atomic file, ``name:type``.
        unused_columns: column of the file to why it was not written.
        read_as: how the file was read: format, encoding, separator, decimal sign, form of times.
        notes: what was found and decided, a sentence each.
    """

    file: str
    unit: str
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    blank_lines: int = 0
    multiline_cells: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    unused_columns: dict[str, str] = field(default_factory=dict)
    read_as: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, count: int, places: Sequence[int] = ()) -> None:
        """Count ``count`` dropped rows; remember the first places."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            first = self.examples.setdefault(reason, [])
            first.extend(int(place) for place in places[: EXAMPLES - len(first)])

    def refuse(
        self,
        reason: str,
        places: Sequence[int],
        bad_rows: str,
        count: int = 1,
        value: str | None = None,
        hint: str = "",
    ) -> None:
        """Raise on rows that cannot be read, or count them as dropped.

        Args:
            reason: what is wrong with them.
            places: the first of them.
            bad_rows: ``error`` or ``drop``.
            count: how many they are.
            value: the cell of the first one.
            hint: what else than correcting the file helps, as a sentence.

        Raises:
            ValueError: with ``bad_rows="error"``; names the places.
        """
        if bad_rows == "error":
            where = ", ".join(map(str, places)) + (", ..." if count > len(places) else "")
            shown = "" if value is None else f" ({value[:60]!r})"
            raise ValueError(
                f"{self.file}, {self.unit} {where}: {reason}{shown}. {hint + ' ' if hint else ''}Correct the file, or give "
                "--bad-rows drop to leave such rows out and count them."
            )
        self.drop(reason, count, places)

    def lines(self) -> list[str]:
        """Format the report as text."""
        lines = [
            f"{self.file}: {self.rows_read:,} rows read, {self.rows_kept:,} kept, "
            f"{sum(self.dropped.values()):,} dropped"
        ]
        if self.read_as:
            lines.append("  read as: " + ", ".join(f"{what} {shown}" for what, shown in self.read_as.items()))
        for reason, count in self.dropped.items():
            places = ", ".join(map(str, self.examples.get(reason, ())))
            lines.append(
                f"  dropped {count:,}: {reason}"
                + (f" ({self.unit} {places}{', ...' if count > EXAMPLES else ''})" if places else "")
            )
        if self.blank_lines:
            lines.append(f"  {self.blank_lines:,} blank lines")
        if self.multiline_cells:
            lines.append(f"  {self.multiline_cells:,} cells contain line breaks")
        lines.append("  columns: " + ", ".join(f"{name} -> {target}" for name, target in self.columns.items()))
        if self.unused_columns:
            lines.append("  not imported: " + ", ".join(f"{name} ({why})" for name, why in self.unused_columns.items()))
        return [_printable(line) for line in lines + [f"  {note}" for note in self.notes]]


@dataclass
class EntityReport(TableReport):
    """The file of items or users.

    Attributes:
        known: ids of the interactions.
        added: those of them without a row in the file; written with empty cells.
        unseen: ids of the file without an interaction; written, and in RecBole's catalogue only if ``load_col`` names them.
        without_text: ids (with those added) whose text columns are all empty; ``None`` where there is no text column.
        empty_texts: field that makes the text to the number of rows in which it is empty.
        text_fields: fields that make the text.
        text_length: characters of text per id that has one: min, mean, median, p95, max.
    """

    known: int = 0
    added: int = 0
    unseen: int = 0
    without_text: int | None = None
    empty_texts: dict[str, int] = field(default_factory=dict)
    text_fields: list[str] = field(default_factory=list)
    text_length: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Format the report as text."""
        lines = super().lines()
        if self.added:
            lines.append(
                f"  added {self.added:,}: of the {self.known:,} ids of the interactions {share(self.added, self.known)} have no "
                "row here; they get empty cells, and nothing else is known of them"
            )
        if self.unseen:
            lines.append(f"  without an interaction: {self.unseen:,} ids")
        if self.text_fields:
            without, ids = self.without_text or 0, self.rows_kept + self.added
            of_all = f" ({share(without, ids)})" if without else ""
            lines.append(f"  text: {', '.join(self.text_fields)}; {without:,} ids without text{of_all}")
            missing = [
                f"{name} in {count:,} of {self.rows_kept:,} rows ({share(count, self.rows_kept)})"
                for name, count in self.empty_texts.items()
                if count
            ]
            if missing:
                lines.append(f"  empty: {', '.join(missing)}")
        if self.text_length:
            lines.append(
                "  characters of text: " + ", ".join(f"{name} {value:,.0f}" for name, value in self.text_length.items())
            )
        return lines


def share(part: int, whole: int) -> str:
    """Format a share for people; what is neither none nor all is not rounded to 0% or 100%."""
    percent = 100 * part / max(whole, 1)
    if part and percent < 1:
        return "less than 1%"
    return "more than 99%" if part < whole and percent > 99 else f"{percent:.0f}%"


def _printable(line: str) -> str:
    """A line without what a terminal would obey, should a column's name hold it."""
    return "".join(c if c.isprintable() else "?" for c in line)


@dataclass
class ImportReport:
    """What :func:`recbole_llm.importer.import_dataset` read, kept, dropped and wrote.

    Attributes:
        dataset: RecBole's name of the dataset.
        folder: where its files are.
        config_file: the YAML to give as ``--config-files``.
        interactions: rows of the interactions.
        items: rows of the items, if a file was given.
        users: rows of the users, if a file was given.
        pictures: of the items, if a folder was given.
        sounds: of the items, likewise.
        n_users: different users with an interaction.
        n_items: different items with an interaction.
        notes: what a reader should know or decide.
        seconds: wall-clock time.
    """

    dataset: str
    folder: Path
    config_file: Path
    interactions: TableReport
    items: EntityReport | None = None
    users: EntityReport | None = None
    pictures: "MediaImport | None" = None
    sounds: "MediaImport | None" = None
    n_users: int = 0
    n_items: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Format the report as text."""
        lines = self.interactions.lines()
        lines.append(f"  {self.n_users:,} users, {self.n_items:,} items")
        for table in (self.items, self.users):
            if table is not None:
                lines += table.lines()
        for media in (self.pictures, self.sounds):
            if media is not None:
                lines += [_printable(line) for line in media.lines()]
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"written to {self.folder} in {self.seconds:.1f} s")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Convert the report for JSON."""
        return {**asdict(self), "folder": str(self.folder), "config_file": str(self.config_file)}
