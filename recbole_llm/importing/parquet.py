"""Parquet files as tables of strings."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recbole_llm.importing.table import Batch, Source, joined
from recbole_llm.progress import progress_bar

# rows of a batch; of all columns, among which may be long texts, fewer
ROWS = 1 << 16


class ParquetSource(Source):
    """A Parquet file; numbers, times and lists become strings."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._errors():
            self._file = pq.ParquetFile(path)
            schema = self._file.schema_arrow
        repeated = [name for name, count in Counter(schema.names).items() if count > 1]
        if repeated:
            raise self.error(f"the columns {', '.join(map(repr, repeated))} exist more than once. Rename one.")
        self.unused = {f.name: f"holds {f.type}" for f in schema if _is_nested(f.type)}
        self.names = [name for name in schema.names if name not in self.unused]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self.error(f"not a readable Parquet file: {error}") from error

    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """See :meth:`Source.batches`."""
        wanted = self.names if names is None else list(names)
        size = ROWS if names is not None else ROWS // 16
        start, total = 1, self._file.metadata.num_rows
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
                yield Batch(columns, places)
                start += batch.num_rows
                bar.update(batch.num_rows)


def as_strings(array: pa.Array) -> pa.Array:
    """Any flat Arrow array as strings: whole floats without a decimal point, NaN as null, lists joined."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return as_strings(array.cast(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.array([None if cells is None else joined(cells) for cells in array.to_pylist()], pa.string())
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_nan(array), None, array)
        # 1.0 is how pandas stores the id 1 when another row has none
        whole = pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**53))
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
