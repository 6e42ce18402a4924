"""Read vectors made elsewhere (``item_features_file``)."""

import json
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.content.encoders.resolve import file_digest
from recbole_llm.content.encoders.sentence_modules import content_digest
from recbole_llm.content.store.feature_table import FeatureTable

log = getLogger(__name__)


def load_features(path: str | Path, tokens: Sequence[str | None], modality: str = "text") -> FeatureTable:
    """Read a file of vectors and align it to a list of ids.

    Forms, by suffix:

    - ``.npy``: ``[n, dim]``, with the ids in ``NAME.ids.txt`` (or ``NAME.txt``) beside it, one per line.
    - ``.safetensors``: a tensor ``vectors`` ``[n, dim]`` (or the only two-dimensional one), with the ids as an integer
      tensor ``ids``, as a JSON list in the metadata entry ``ids``, or in a text file as for ``.npy``.
    - ``.parquet``: a column of ids, the first, and either one column of lists or one column per dimension.
      Needs pyarrow.
    - any other: a RecBole atomic file with a ``float_seq`` column, such as those of ``additional_feat_suffix``.

    Args:
        path: the file.
        tokens: ids in the order wanted; ``None`` is padding. Ids without a vector are absent, and counted in the log.
        modality: of the vectors.

    Raises:
        ValueError: if the file or its ids are missing or not understood, lengths differ, values are NaN or infinite, or
            no id of ``tokens`` is in the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"item_features_file {str(path)!r}: no such file.")
    reader = {".npy": _read_npy, ".safetensors": _read_safetensors, ".parquet": _read_parquet}.get(
        path.suffix, _read_atomic
    )
    ids, vectors = reader(path)
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
    )
    fingerprint = content_digest("\n".join([file_digest(path), *ids]))
    return FeatureTable(torch.from_numpy(aligned), torch.from_numpy(present), modality, fingerprint)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")


def _ids_beside(path: Path) -> list[str]:
    candidates = [path.with_suffix(".ids.txt"), path.with_suffix(".txt")]
    for file in candidates:
        if file.is_file():
            return file.read_text(encoding="utf-8").removeprefix("\ufeff").splitlines()
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
    table = parquet.read_table(path)
    if table.num_columns < 2:
        raise ValueError(
            f"item_features_file {path.name}: expected a column of ids and columns of numbers, got {table.schema}."
        )
    ids = [str(token) for token in table.column(0).to_pylist()]
    columns: list[Any] = [column.to_numpy() for column in table.columns[1:]]
    if len(columns) > 1:
        return ids, np.column_stack(columns)
    if columns[0].dtype != object:
        return ids, columns[0][:, None]
    return ids, _stack(columns[0], ids, path)


def _read_atomic(path: Path) -> tuple[list[str], np.ndarray]:
    from recbole_llm.content.text import read_atomic_table

    with path.open(encoding="utf-8", errors="replace") as file:
        id_field = file.readline().partition("\t")[0].rpartition(":")[0]
    try:
        table = read_atomic_table(path, id_field)
    except ValueError as error:
        raise ValueError(
            f"item_features_file {path.name}: known are .npy, .safetensors, .parquet and RecBole's atomic files. "
            f"{error}"
        ) from error
    fields = [name for name, kind in table.types.items() if kind == "float_seq"]
    if len(fields) != 1:
        raise ValueError(
            f"item_features_file {path.name}: expected one float_seq column, got {table.describe_columns()}."
        )
    ids = list(table.row_of)
    rows = [np.array(cell.split(), dtype=np.float64) for cell in table.columns[fields[0]]]
    return ids, _stack(rows, ids, path)


def _stack(rows: Sequence[np.ndarray], ids: list[str], path: Path) -> np.ndarray:
    widths = [0 if row is None else len(row) for row in rows]
    wrong = [token for token, width in zip(ids, widths, strict=True) if width != widths[0]]
    if wrong:
        raise ValueError(
            f"item_features_file {path.name}: vectors of different lengths ({widths[0]} at first, another for "
            f"{_some(wrong)})."
        )
    return np.stack(list(rows))
