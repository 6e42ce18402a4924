"""Parquet files as tables of strings."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recbole_llm.importing import limits
from recbole_llm.importing.table import INDEX, INDEX_NAME, Batch, Source, joined
from recbole_llm.progress import progress_bar

# rows of a batch; of all columns, among which may be long texts, fewer
ROWS = 1 << 16
RANGE = "index of pandas that is a range and no column; reset_index() before saving makes it one"
# values in the lists of a batch: each becomes an object of Python
LIST_VALUES = 1 << 20
# bytes of a text of that encoding, for which the batches are made
DELTA_BYTES = 1 << 12
# bytes of text that a batch may grow to where a dictionary holds each text once
DICTIONARY_BYTES = 1 << 24


class ParquetSource(Source):
    """A Parquet file; numbers, times and lists become strings."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._errors():
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
        self.check_columns(schema.names)
        repeated = [name for name, count in Counter(schema.names).items() if count > 1]
        if repeated:
            raise self.error(f"the columns {', '.join(map(repr, repeated))} exist more than once. Rename one.")
        self._check_size(path.stat().st_size)
        self.unused = {name: INDEX for name in schema.names if INDEX_NAME.fullmatch(name)}
        self.unused |= dict.fromkeys(_ranges(schema), RANGE)
        self.unused |= {f.name: f"holds {f.type}" for f in schema if _is_nested(f.type)}
        self.names = [name for name in schema.names if name not in self.unused]
        self.numeric = {f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)}
        self.read_as = {"format": "Parquet"}
        self._limits = self._row_limits()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self.error(f"not a readable Parquet file: {error}") from error

    def _check_size(self, size: int) -> None:
        """Refuse a file that says it holds more than it can, or that unpacks to more than any table does."""
        metadata = self._file.metadata
        values, plain, packed = metadata.num_rows, 0, 0
        with self._errors():
            per_column = [0] * metadata.num_columns
            for group in range(metadata.num_row_groups):
                part = metadata.row_group(group)
                for at in range(metadata.num_columns):
                    chunk = part.column(at)
                    per_column[at] += chunk.num_values
                    plain += chunk.total_uncompressed_size
                    packed += chunk.total_compressed_size
            values = max([values, *per_column])
        if values > max(limits.FREE_ROWS, limits.MAX_ROWS_PER_BYTE * size):
            raise self.error(
                f"{size:,} bytes that are said to hold {values:,} rows: no table of interactions or texts."
            )
        self._most = max(limits.FREE_EXPANSION, limits.MAX_EXPANSION * size)
        if plain > self._most or min(plain, packed, metadata.num_rows) < 0:
            raise self._expands()

    def _expands(self) -> ValueError:
        return self.error(
            f"the file holds more than {limits.MAX_EXPANSION} times its size, which is no table of interactions or texts. If it "
            "is one, write it as CSV."
        )

    def _row_limits(self) -> dict[str, int]:
        """Column to how many rows of it may be read at once; absent where all may be.

        A batch is as long as the lists in it, and as the longest text that a dictionary may repeat in every row.
        """
        metadata = self._file.metadata
        all_rows = max(metadata.num_rows, 1)
        longest = self._longest_texts()
        found: dict[str, int] = {}
        for at in range(metadata.num_columns):
            leaf = metadata.schema.column(at)
            name = self._column_of(leaf.path)
            if name is None:
                continue
            chunks = [metadata.row_group(group).column(at) for group in range(metadata.num_row_groups)]
            per_row = sum(chunk.num_values for chunk in chunks) / all_rows
            size = sum(chunk.total_uncompressed_size for chunk in chunks) / all_rows
            rows = limits.BLOCK_BYTES * 4 / max(size, 1)
            rows = min(rows, DICTIONARY_BYTES / max(longest.get(leaf.path, 0) * max(per_row, 1), 1))
            if name != leaf.path:
                rows = min(rows, LIST_VALUES / max(per_row, 1))
            found[name] = max(int(min(rows, found.get(name, ROWS))), 1)
        return found

    def _column_of(self, path: str) -> str | None:
        """The usable column that a leaf of the file's schema belongs to."""
        names = [*self.names, *(name for name, why in self.unused.items() if why == INDEX)]
        return path if path in names else next((name for name in names if path.startswith(f"{name}.")), None)

    def _longest_texts(self) -> dict[str, int]:
        """Leaf of the file's schema to the bytes of the longest text in its dictionaries.

        Raises:
            ValueError: if one is too long.
        """
        metadata = self._file.metadata
        leaves = [metadata.schema.column(at) for at in range(metadata.num_columns)]
        paths = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and self._column_of(leaf.path)]
        if not paths:
            return {}
        with self._errors():
            probe = pq.ParquetFile(self.path, read_dictionary=paths, pre_buffer=False)
        found = dict.fromkeys(paths, 0)
        for group in range(metadata.num_row_groups):
            try:
                lengths = _longest_of(probe, group, paths)
            except (pa.ArrowException, OSError):  # one of them may be of an encoding that dictionaries cannot read
                lengths = {path: self._longest_alone(probe, group, path) for path in paths}
            for path, length in lengths.items():
                if length > limits.MAX_RECORD:
                    raise self._too_long(path, length)
                found[path] = max(found[path], length)
        return found

    def _longest_alone(self, probe: pq.ParquetFile, group: int, path: str) -> int:
        try:
            return _longest_of(probe, group, [path])[path]
        except (pa.ArrowException, OSError) as error:
            if "Not yet implemented" not in str(error):
                raise self.error(f"not a readable Parquet file: {error}") from error
            # in DELTA_BYTE_ARRAY a text may repeat the one before it, and nothing tells how long it is
            return 0 if "DeltaLengthByteArray" in str(error) else DELTA_BYTES

    def _too_long(self, name: str, length: int) -> ValueError:
        return self.error(f"column {name!r} holds a text of {length:,} bytes; at most {limits.MAX_RECORD:,} are read.")

    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """Read as :meth:`Source.batches` says."""
        wanted = self.names if names is None else list(names)
        most = ROWS if names is not None else ROWS // 16
        size = min([most, *(self._limits.get(name, most) for name in wanted)])
        start, total, unpacked = 1, self._file.metadata.num_rows, 0
        bar = progress_bar(
            total=total,
            unit="row",
            unit_scale=True,
            desc=self.path.name,
            disable=None if progress else True,
            leave=False,
        )
        with bar:
            batches = self._file.iter_batches(batch_size=size, columns=wanted)
            while True:
                with self._errors():
                    batch = next(batches, None)
                if batch is None:
                    return
                places = range(start, start + batch.num_rows)
                columns = {}
                for name in wanted:
                    try:
                        columns[name] = as_strings(batch.column(name))
                    except (pa.ArrowException, UnicodeDecodeError) as error:
                        raise self.error(f"column {name!r}, rows {places[0]} to {places[-1]}: {error}") from error
                    if columns[name].nbytes > limits.MAX_RECORD:
                        longest = pc.max(pc.binary_length(columns[name])).as_py() or 0
                        if longest > limits.MAX_RECORD:
                            raise self._too_long(name, longest)
                unpacked += sum(column.nbytes for column in columns.values())
                if unpacked > self._most:
                    raise self._expands()
                yield Batch(columns, places)
                start += batch.num_rows
                bar.update(batch.num_rows)


def _ranges(schema: pa.Schema) -> list[str]:
    """Names of an index of consecutive integers, of which pandas keeps where they begin and end, and no column."""
    try:
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        ranges = [entry for entry in index if isinstance(entry, dict) and entry.get("kind") == "range"]
    except (ValueError, TypeError, AttributeError, RecursionError):  # whoever wrote that was not pandas
        return []
    return [str(entry["name"]) for entry in ranges if entry.get("name") and str(entry["name"]) not in schema.names]


def _longest_of(probe: pq.ParquetFile, group: int, paths: Sequence[str]) -> dict[str, int]:
    # the dictionaries come whole with the first row
    first = next(probe.iter_batches(batch_size=1, row_groups=[group], columns=paths, use_threads=False), None)
    found = dict.fromkeys(paths, 0)
    if first is None:
        return found
    for name in first.schema.names:
        column = first.column(name)
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = column.values
        if pa.types.is_dictionary(column.type) and not pa.types.is_primitive(column.type.value_type):
            longest = pc.max(pc.binary_length(column.dictionary)).as_py() or 0
            for path in paths:
                if path == name or path.startswith(f"{name}."):
                    found[path] = max(found[path], longest)
    return found


def as_strings(array: pa.Array) -> pa.Array:
    """Convert any flat Arrow array to strings: whole floats without a decimal point, NaN as null, lists joined."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return as_strings(array.cast(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.array([None if cells is None else joined(cells) for cells in array.to_pylist()], pa.string())
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_nan(array), None, array)
        # 1.0 is how pandas stores the id 1 when another row has none
        whole = pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**53))
        if pc.all(whole).as_py():  # nulls aside: writing floats takes longer than all the rest
            return pc.cast(pc.cast(array, pa.int64()), pa.string())
        integers = pc.cast(pc.cast(pc.if_else(whole, array, None), pa.int64()), pa.string())
        return pc.coalesce(integers, pc.cast(array, pa.string()))
    if pa.types.is_timestamp(kind):
        instants = pc.cast(pc.cast(array, pa.timestamp("us", kind.tz), safe=False), pa.int64())
        # by way of numbers: strings of another zone would need its name in a database of zones
        strings = pc.cast(pc.cast(instants, pa.timestamp("us")), pa.string())
        return strings if kind.tz is None else pc.binary_join_element_wise(strings, "Z", "")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        array = pc.cast(array, pa.binary())
    strings = pc.cast(array, pa.string())
    strings.validate(full=True)
    return strings


def _is_nested(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.types.is_nested(kind.value_type)
    return pa.types.is_nested(kind) or pa.types.is_null(kind) or pa.types.is_duration(kind)
