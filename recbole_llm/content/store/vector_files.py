"""Read vectors made elsewhere (``item_features_file``)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.content.encoders.resolve import file_digest
from recbole_llm.content.encoders.sentence_modules import content_digest
from recbole_llm.content.store.feature_table import FeatureTable
from recbole_llm.text_files import read_text

log = getLogger(__name__)

# pandas writes the index of a table into such a column
_INDEX_NAME = re.compile(r"__index_level_\d+__|Unnamed: \d+")


@dataclass(frozen=True)
class AtomicForm:
    """How to read vectors from one of RecBole's atomic files.

    Attributes:
        separator: RecBole's ``field_separator``.
        seq_separator: RecBole's ``seq_separator``, between the numbers of a vector.
        encoding: RecBole's ``encoding``.
        id_field: the column of the ids; the first if ``None``.
        vector_field: the column of the vectors; the only ``float_seq`` column if ``None``.
    """

    separator: str = "\t"
    seq_separator: str = " "
    encoding: str = "utf-8"
    id_field: str | None = None
    vector_field: str | None = None


def load_features(
    path: str | Path, tokens: Sequence[str | None], modality: str = "text", form: AtomicForm | None = None
) -> FeatureTable:
    """Read a file of vectors and align it to a list of ids.

    Forms, by suffix:

    - ``.npy``: ``[n, dim]``, with the ids in ``NAME.ids.txt`` (or ``NAME.txt``) beside it, one per line.
    - ``.safetensors``: a tensor ``vectors`` ``[n, dim]`` (or the only two-dimensional one), with the ids as an integer
      tensor ``ids``, as a JSON list in the metadata entry ``ids``, or in a text file as for ``.npy``.
    - ``.parquet``: a column of ids, and either one column of lists or one column per dimension. The ids are the first
      column of strings or integers; where pandas wrote the table's index, a named index goes before the others, and one
      without a name is left out. Needs pyarrow.
    - any other: a RecBole atomic file with a ``float_seq`` column, such as those of ``additional_feat_suffix``.

    Args:
        path: the file.
        tokens: ids in the order wanted; ``None`` is padding. Ids without a vector are absent, and counted in the log.
        modality: of the vectors.
        form: of an atomic file; RecBole's default if ``None``.

    Raises:
        ValueError: if the file or its ids are missing or not understood, lengths differ, values are NaN or infinite, or
            no id of ``tokens`` is in the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"item_features_file {str(path)!r}: no such file.")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix in readers:
        ids, vectors = readers[path.suffix](path)
    else:
        ids, vectors = _read_atomic(path, form or AtomicForm())
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or not vectors.size:
        raise ValueError(
            f"item_features_file {path.name}: expected numbers [n, dim], got {vectors.dtype} {vectors.shape}."
        )
    if len(ids) != len(vectors):
        raise ValueError(
            f"item_features_file {path.name}: {len(vectors)} vectors and {len(ids)} ids; they must be as many."
        )
    row_of: dict[str, int] = {}
    for row, token in enumerate(ids):
        row_of.setdefault(token, row)
    rows = np.array([row_of.get(token, -1) if token is not None else -1 for token in tokens], dtype=np.int64)
    present = rows >= 0
    asked = [token for token in tokens if token is not None]
    if asked and not present.any():
        raise ValueError(
            f"item_features_file {path.name}: none of its {len(row_of)} ids ({_some(ids)}) is one of the {len(asked)} "
            f"wanted ({_some(asked)})."
        )
    aligned = np.zeros((len(tokens), vectors.shape[1]), dtype=np.float32)
    aligned[present] = vectors[rows[present]]
    bad = np.flatnonzero(~np.isfinite(aligned).all(1))
    if len(bad):
        names = _some([str(tokens[int(row)]) for row in bad])
        raise ValueError(
            f"item_features_file {path.name}: {len(bad)} vectors have NaN or infinite values, of ids {names}."
        )
    log.info(
        "Vectors of %s: dimension %d; %d of %d ids have one; %d of its ids are not in the data, %d repeat an "
        "earlier one",
        path.name,
        vectors.shape[1],
        int(present.sum()),
        len(asked),
        len(row_of.keys() - set(asked)),
        len(ids) - len(row_of),
        extra={"content": True},
    )
    fingerprint = content_digest("\n".join([file_digest(path), *ids]))
    return FeatureTable(torch.from_numpy(aligned), torch.from_numpy(present), modality, fingerprint)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")


def _ids_beside(path: Path) -> list[str]:
    candidates = [path.with_suffix(".ids.txt"), path.with_suffix(".txt")]
    for file in candidates:
        if file.is_file():
            # not splitlines, which cuts at U+2028 too
            text = read_text(file, "item_features_file: the ids' file").removesuffix("\n").removesuffix("\r")
            return [line.removesuffix("\r") for line in text.split("\n")]
    names = " or ".join(file.name for file in candidates)
    raise ValueError(f"item_features_file {path.name} needs its ids, one per line, in {names} beside it.")


def _read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"item_features_file {path.name} is not a .npy array of numbers: {error}") from error
    return _ids_beside(path), vectors


def _read_safetensors(path: Path) -> tuple[list[str], np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    except SafetensorError as error:
        raise ValueError(f"item_features_file {path.name} is not a safetensors file: {error}") from error
    tables = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    name = "vectors" if "vectors" in tables else tables[0] if len(tables) == 1 else None
    if name is None:
        raise ValueError(
            f"item_features_file {path.name}: no tensor 'vectors' [n, dim]; it has {', '.join(tensors) or 'none'}."
        )
    if "ids" in metadata:
        ids = [str(token) for token in json.loads(metadata["ids"])]
    elif "ids" in tensors:
        ids = [str(token) for token in tensors["ids"].tolist()]
    else:
        ids = _ids_beside(path)
    return ids, tensors[name].float().numpy()


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"item_features_file {path.name}: reading Parquet needs pyarrow. pip install pyarrow"
        ) from error
    import pyarrow

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"item_features_file {path.name} is not a readable Parquet file: {error}") from error
    table = table.drop_columns([name for name in table.column_names if _INDEX_NAME.fullmatch(name)])
    ids, others = _ids_and_others(table, path)
    lists = [name for name in others.column_names if pyarrow.types.is_nested(others.schema.field(name).type)]
    if len(lists) == 1 and others.num_columns == 1:
        return ids, _stack(others.column(0).to_numpy(), ids, path)
    kinds = {name: others.schema.field(name).type for name in others.column_names}
    wrong = {name: kind for name, kind in kinds.items() if not _is_number(kind)}
    if not wrong and any(map(pyarrow.types.is_floating, kinds.values())):
        # beside floats an integer is a count or an index
        wrong = {name: kind for name, kind in kinds.items() if not pyarrow.types.is_floating(kind)}
    if wrong or not kinds:
        shown = ", ".join(f"{name} ({kind})" for name, kind in (wrong or {"the ids": "alone"}).items())
        raise ValueError(
            f"item_features_file {path.name}: expected a column of ids and one column of lists, or a column of numbers of one "
            f"kind per dimension; not so: {shown}. Leave out what is no dimension."
        )
    nulls = [name for name in kinds if others.column(name).null_count]
    if nulls:
        raise ValueError(f"item_features_file {path.name}: values are missing in the columns {_some(nulls)}.")
    return ids, np.column_stack([column.to_numpy() for column in others.columns])


def _is_number(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)


def _ids_and_others(table: Any, path: Path) -> tuple[list[str], Any]:
    """The ids, which are the index with a name or the first column of strings or integers, and the table without them."""
    import pyarrow

    if len(set(table.column_names)) < table.num_columns:
        raise ValueError(f"item_features_file {path.name}: two columns have the same name. Rename one.")
    index = (table.schema.pandas_metadata or {}).get("index_columns", [])
    for entry in index:
        # consecutive integers: pandas keeps where they begin and end, and no column
        if isinstance(entry, dict) and entry.get("kind") == "range" and entry.get("name"):
            numbers = range(entry["start"], entry["stop"], entry["step"])
            if len(numbers) == table.num_rows:
                return list(map(str, numbers)), table
    for name in [
        *(name for name in index if isinstance(name, str) and name in table.column_names),
        *table.column_names,
    ]:
        kind = table.schema.field(name).type
        if not (pyarrow.types.is_floating(kind) or pyarrow.types.is_nested(kind)):
            ids = ["" if token is None else str(token) for token in table.column(name).to_pylist()]
            return ids, table.drop_columns([name])
    raise ValueError(
        f"item_features_file {path.name}: no column holds ids as strings or integers; it has "
        f"{', '.join(f'{field.name} ({field.type})' for field in list(table.schema)[:20]) or 'none'}."
    )


def _read_atomic(path: Path, form: AtomicForm) -> tuple[list[str], np.ndarray]:
    from recbole_llm.content.text import atomic_header, read_atomic_table

    try:
        types = atomic_header(path, separator=form.separator, encoding=form.encoding)
        table = read_atomic_table(
            path, form.id_field or next(iter(types)), separator=form.separator, encoding=form.encoding
        )
    except ValueError as error:
        raise ValueError(
            f"item_features_file {path.name}: known are .npy, .safetensors, .parquet and RecBole's atomic files. "
            f"{error}"
        ) from error
    fields = [name for name, kind in table.types.items() if kind == "float_seq"]
    if form.vector_field is not None:
        fields = [name for name in fields if name == form.vector_field]
    if len(fields) != 1:
        wanted = form.vector_field or "one"
        raise ValueError(
            f"item_features_file {path.name}: expected {wanted} float_seq column, got {table.describe_columns()}."
        )
    ids = list(table.row_of)
    rows = [_vector(cell, token, path, form) for token, cell in zip(ids, table.columns[fields[0]], strict=True)]
    return ids, _stack(rows, ids, path)


def _vector(cell: str, token: str, path: Path, form: AtomicForm) -> np.ndarray:
    # RecBole leaves empty parts out
    parts = cell.split() if form.seq_separator == " " else [part for part in cell.split(form.seq_separator) if part]
    try:
        return np.array(parts, dtype=np.float64)
    except ValueError:
        raise ValueError(
            f"item_features_file {path.name}: the vector of {token!r} is {cell[:60]!r}, and numbers with {form.seq_separator!r} "
            "between them are expected (seq_separator)."
        ) from None


def _stack(rows: Sequence[Any], ids: list[str], path: Path) -> np.ndarray:
    widths = [0 if row is None else len(row) for row in rows]
    wrong = [token for token, width in zip(ids, widths, strict=True) if width != widths[0]]
    if wrong:
        raise ValueError(
            f"item_features_file {path.name}: vectors of different lengths ({widths[0]} at first, another for "
            f"{_some(wrong)})."
        )
    return np.stack(list(rows)) if widths and widths[0] else np.empty((len(rows), 0))
