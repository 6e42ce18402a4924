"""Repairs of how RecBole reads the files that a user gives it: configurations and atomic files."""

import codecs
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import always, override, repair
from recbole_llm.content.text import atomic_header
from recbole_llm.text_files import read_text

_BLOCK = 1 << 24
# what pandas takes for a missing value, as far as float() does not
_NO_VALUE = frozenset(
    [
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "None",
        "n/a",
        "null",
    ]
)


# ---------------------------------------------------------------- configurations


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:149-157 (an empty file, or one of another encoding, ends in TypeError or in an error"
    " that does not name it)",
    issues="none found",
    until="RecBole checks what it reads from a configuration file",
    condition=always("a configuration file with a fault ends in an error that does not name the file"),
)
def _config_files(module: ModuleType) -> None:
    """An empty configuration file sets nothing; what cannot be read is a ValueError that names the file."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _load_config_files(self: Any, file_list: Any) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for file in file_list or ():
                found |= _configuration(file, lambda text: module.yaml.load(text, Loader=self.yaml_loader))
            return found

        return _load_config_files

    override(module.Config, "_load_config_files", make)


def _configuration(file: str | Path, load: Callable[[str], Any]) -> dict[str, Any]:
    from yaml import YAMLError

    text = read_text(file, "config_files:")
    try:
        content = load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"config_files: {str(file)!r}: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"config_files: {str(file)!r} holds no keys. A line of it reads: epochs: 10")
    return content


# ---------------------------------------------------------------- atomic files


@dataclass(frozen=True)
class Lines:
    """The lines of an atomic file after its header, by their cells.

    Attributes:
        count: lines that are not blank.
        short: with fewer cells than the header.
        first_short: the number of the first of them in the file, from 1.
        first_long: the number of the first line with more cells than the header, 0 if there is none.
        long_cells: how many it has.
        quoted: a double quote begins a cell of some line.
    """

    count: int = 0
    short: int = 0
    first_short: int = 0
    first_long: int = 0
    long_cells: int = 0
    quoted: bool = False


def count_cells(path: str | Path, separator: str, width: int) -> Lines:
    r"""Count the cells of each line of an atomic file, without a look at what they hold.

    Args:
        path: the file, in an encoding that writes ``separator`` and ``\n`` as in ASCII.
        separator: one character of ASCII.
        width: cells of the header.
    """
    found = Lines()
    mark, at = separator.encode(), 2
    with Path(path).open("rb") as file:
        file.readline()
        while block := file.read(_BLOCK):
            block += file.readline()
            found = _add(found, block, mark, at, width)
            at += block.count(b"\n")
    return found


def _add(found: Lines, block: bytes, mark: bytes, at: int, width: int) -> Lines:
    import numpy as np  # not above: this module is imported with recbole_llm

    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == 10)
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    separators = np.append(0, np.cumsum(data == mark[0]))
    cells = separators[ends] - separators[starts] + 1
    blank = (ends == starts) | ((ends == starts + 1) & (data[np.minimum(starts, len(data) - 1)] == 13))
    short, long = np.flatnonzero(~blank & (cells < width)), np.flatnonzero(~blank & (cells > width))
    quoted = b'"' in block and (b'\n"' in block or mark + b'"' in block or block.startswith(b'"'))
    return Lines(
        found.count + int((~blank).sum()),
        found.short + len(short),
        found.first_short or (at + int(short[0]) if len(short) else 0),
        found.first_long or (at + int(long[0]) if len(long) else 0),
        found.long_cells or (int(cells[long[0]]) if len(long) else 0),
        found.quoted or quoted,
    )


def check_cells(path: Path, lines: Lines, width: int) -> None:
    """Refuse lines with too many cells, of which RecBole would drop some, or take the first for row labels.

    Raises:
        ValueError: names the first such line.
    """
    if lines.first_long and not lines.quoted:
        raise ValueError(
            f"{path.name}, line {lines.first_long}: {lines.long_cells} cells where the header has {width}. A cell holds the "
            "separator: replace it, or set field_separator."
        )
    if lines.short and not lines.quoted:
        getLogger().warning(
            "%s: %d lines have fewer cells than the header (the first is line %d); the others count as missing.",
            path.name, lines.short, lines.first_short,
        )  # fmt: skip


@contextmanager
def _encoding(config: Any, path: Path) -> Iterator[None]:
    """Let RecBole's reader drop a byte-order mark, which would become part of the first column's name."""
    before = config["encoding"]
    with path.open("rb") as file:
        marked = file.read(3) == codecs.BOM_UTF8
    if marked and codecs.lookup(before or "utf-8").name == "utf-8":
        config["encoding"] = "utf-8-sig"
    try:
        yield
    finally:
        config["encoding"] = before


@repair(
    "recbole.data.dataset.dataset",
    upstream="data/dataset/dataset.py:459-493 (KeyError on a byte-order mark, 'not enough values to unpack' on a header"
    " without types; cells over the header's width are dropped, infinite numbers kept)",
    issues="none found",
    until="RecBole checks the header and the cells of atomic files",
    condition=always("faults of atomic files end in tracebacks, or in other numbers without a word"),
)
def _atomic_files(module: ModuleType) -> None:
    """Atomic files may begin with a byte-order mark; what is wrong with one is said with its name."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _load_feat(self: Any, filepath: Any, source: Any) -> Any:
            path, config = Path(filepath), self.config
            if self._get_load_and_unload_col(source)[0] == set():
                return stock(self, filepath, source)
            separator, encoding = config["field_separator"], config["encoding"] or "utf-8"
            types = atomic_header(path, separator=separator, encoding=encoding)
            lines = None
            if len(separator) == 1 and separator.isascii() and not encoding.lower().startswith(("utf-16", "utf-32")):
                lines = count_cells(path, separator, len(types))
                check_cells(path, lines, len(types))
            try:
                with _encoding(config, path):
                    frame = stock(self, filepath, source)
            except ValueError as error:
                where = _first_word(path, separator, encoding, types) or f"{path.name} cannot be read: {error}."
                raise ValueError(f"{where}{_hint(lines)}") from error
            if frame is not None:
                _check_frame(path, frame, lines, source)
            return frame

        return _load_feat

    override(module.Dataset, "_load_feat", make)


def _first_word(path: Path, separator: str, encoding: str, types: Mapping[str, str]) -> str:
    """Name the first cell of a column of numbers that is none; empty if there is no such cell."""
    numbers = [(at, name) for at, (name, kind) in enumerate(types.items()) if kind == "float"]
    with path.open(encoding=encoding, errors="replace") as file:
        next(file, None)
        for number, line in enumerate(file, start=2):
            cells = line.rstrip("\n").split(separator)
            for at, name in numbers:
                cell = cells[at].strip().strip('"') if at < len(cells) else ""
                try:
                    float(cell or "nan")
                except ValueError:
                    if cell not in _NO_VALUE:
                        return f"{path.name}, line {number}: {cell[:60]!r} in the column {name!r} is no number. Correct the file."
    return ""


def _hint(lines: Lines | None) -> str:
    quoted = lines is not None and lines.quoted
    return " RecBole takes a double quote at the start of a cell for quoting: remove it." if quoted else ""


def _check_frame(path: Path, frame: Any, lines: Lines | None, source: Any) -> None:
    import numpy as np

    if lines is not None and len(frame) < lines.count:
        getLogger().warning(
            "%s: %d lines became %d rows: RecBole takes a double quote at the start of a cell for quoting, up to the next one.",
            path.name, lines.count, len(frame),
        )  # fmt: skip
    for name in frame.columns:
        values = frame[name]
        if values.dtype.kind != "f":
            continue
        infinite = np.flatnonzero(np.isinf(values.to_numpy()))
        if len(infinite):
            raise ValueError(
                f"{path.name}, row {infinite[0] + 1}: the column {name!r} holds an infinite number. Correct the file."
            )
        missing = np.flatnonzero(np.isnan(values.to_numpy()))
        if len(missing) and getattr(source, "value", source) == "inter":
            getLogger().warning(
                "%s: %d values of %r are missing (the first in row %d); RecBole puts the mean of the others in their place.",
                path.name, len(missing), name, missing[0] + 1,
            )  # fmt: skip
