"""Tables of interactions, items and users to RecBole's atomic files: ``recbole-llm import``.

Rows are streamed; of each a few numbers stay in memory to find duplicates and to sort. Nothing is dropped in silence:
the report counts every row that was read as kept or as dropped, with the reason. The dataset's folder appears complete
or not at all.
"""

import glob
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recbole_llm.importing.report import ImportReport

# RecBole reads its own files for the first, and its own settings for the others
RESERVED_NAMES = ("ml-100k", "sample", "url", "kg_url")
_TEMPORARY, _OLD = ".{name}.importing-", "-old"


def import_dataset(
    interactions: str | Path,
    dataset: str,
    *,
    items: str | Path | None = None,
    users: str | Path | None = None,
    data_path: str | Path = "dataset",
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    label_column: str | None = None,
    time_column: str | None = None,
    items_id_column: str | None = None,
    users_id_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    user_text_columns: Sequence[str] | None = None,
    threshold: float | None = None,
    keep_negatives: bool = False,
    duplicates: str = "last",
    order: str = "auto",
    time_unit: str | None = None,
    bad_rows: str = "error",
    keep_html: bool = False,
    separator: str | None = None,
    quoting: str = "auto",
    encoding: str = "utf-8",
    overwrite: bool = False,
    progress: bool = False,
) -> ImportReport:
    """Write ``data_path/dataset`` with RecBole's atomic files, a YAML with the columns to load, and the report as JSON.

    Columns that are not named are found by their names and contents; ``""`` says that there is none.

    Args:
        interactions: a file of CSV, TSV, JSON Lines (each also gzip) or Parquet, a row per interaction.
        dataset: RecBole's name for the result.
        items: a file of the same kinds, a row per item.
        users: a file of the same kinds, a row per user.
        data_path: the folder that gets the dataset's folder.
        user_column: the interactions' column of users; the ids are kept as written.
        item_column: the interactions' column of items; the ids are kept as written.
        rating_column: the interactions' column of ratings.
        label_column: the interactions' column of 0 and 1.
        time_column: the interactions' column of times: seconds, milli-, micro- or nanoseconds since 1970, or ISO dates.
        items_id_column: the id column of ``items``.
        users_id_column: the id column of ``users``.
        text_columns: the columns of ``items`` that make an item's text.
        user_text_columns: the columns of ``users`` that make a user's text.
        threshold: ratings below it are no interactions.
        keep_negatives: write them, and rows of label 0, with ``label`` 0 instead of dropping them.
        duplicates: of rows with the same user and item keep the ``last`` (in time), the ``first``, or ``keep`` all. The
            last or first is chosen before the threshold is applied, and after rows of label 0 are dropped.
        order: of the rows written: ``file``, ``time``, or ``auto``, which is time where float32 merges times.
        time_unit: ``s``, ``ms``, ``us``, ``ns`` or ``iso``.
        bad_rows: ``error`` or ``drop`` (and count) rows that cannot be read.
        keep_html: leave HTML in texts.
        separator: between the cells of CSV.
        quoting: ``csv``, ``none`` or ``auto``.
        encoding: of text files.
        overwrite: replace the dataset's folder.
        progress: show a progress bar on a terminal.

    Returns:
        What became of every row.

    Raises:
        ValueError: on a wrong argument or a file that cannot be read; names the file and the lines.
    """
    started = time.perf_counter()
    _check_arguments(dataset, threshold, duplicates, order, time_unit, bad_rows, label_column)
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("import needs pyarrow: pip install 'recbole-llm[import]'.")
    from recbole_llm.importing.entities import EntityRules, import_entities
    from recbole_llm.importing.interactions import InteractionRules, import_interactions
    from recbole_llm.importing.sources import open_source

    files = {"interactions": interactions, "items": items, "users": users}
    sources = {
        kind: open_source(path, separator=separator, quoting=quoting, encoding=encoding)
        for kind, path in files.items()
        if path is not None
    }
    for name, kind, given in (
        ("text_columns", "items", text_columns),
        ("user_text_columns", "users", user_text_columns),
    ):
        if given and kind not in sources:
            raise ValueError(f"{name} needs {kind}, and no such file was given.")
    folder = Path(data_path) / dataset
    with _new_folder(folder, overwrite) as temporary:
        rules = InteractionRules(threshold, keep_negatives, duplicates, bad_rows, order, time_unit)
        flags = {
            "user": user_column,
            "item": item_column,
            "rating": rating_column,
            "label": "" if label_column is None and threshold is not None else label_column,
            "time": time_column,
        }
        found = import_interactions(sources["interactions"], temporary / f"{dataset}.inter", flags, rules, progress)
        report = ImportReport(dataset, folder, folder / f"{dataset}.yaml", found.report, notes=found.notes)
        report.n_users, report.n_items = len(found.users), len(found.items)
        columns = {target.split(":")[0]: name for name, target in found.report.columns.items()}
        taken = ["user_id", "item_id", "rating", "label", "timestamp"]
        first_or_last = "first" if duplicates == "first" else "last"
        if items is not None:
            rule = EntityRules(
                "item", items_id_column, columns["item_id"], text_columns, taken, first_or_last, bad_rows, keep_html
            )
            report.items = import_entities(sources["items"], temporary / f"{dataset}.item", found.items, rule, progress)
            taken += [target.split(":")[0] for target in report.items.columns.values()]
        if users is not None:
            rule = EntityRules(
                "user",
                users_id_column,
                columns["user_id"],
                user_text_columns,
                taken,
                first_or_last,
                bad_rows,
                keep_html,
            )
            report.users = import_entities(sources["users"], temporary / f"{dataset}.user", found.users, rule, progress)
        report.notes += _notes(report)
        (temporary / f"{dataset}.yaml").write_text(_settings(report, data_path, found.fields), encoding="utf-8")
        report.seconds = time.perf_counter() - started
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (temporary / "import_report.json").write_text(text + "\n", encoding="utf-8")
    return report


def _check_arguments(
    dataset: str,
    threshold: float | None,
    duplicates: str,
    order: str,
    time_unit: str | None,
    bad_rows: str,
    label_column: str | None,
) -> None:
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise ValueError(f"dataset must be a name of letters, digits, '_', '-' and '.', and {dataset!r} was given.")
    if dataset in RESERVED_NAMES:
        raise ValueError(
            f"dataset: RecBole reads files of its own for the name {dataset!r}. Choose another, such as my-{dataset}."
        )
    choices: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "duplicates": (duplicates, ("last", "first", "keep")),
        "order": (order, ("auto", "file", "time")),
        "time_unit": (time_unit, (None, "s", "ms", "us", "ns", "iso")),
        "bad_rows": (bad_rows, ("error", "drop")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(k for k in known if k)}, and {value!r} was given.")
    if threshold is not None and label_column:
        raise ValueError("threshold makes 0/1 labels of ratings, and label_column names labels: give one of them.")
    if threshold is not None and threshold != threshold:
        raise ValueError("threshold must be a number, and NaN was given.")


@contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that takes its name when the block ends well, and is removed when it does not.

    A process that is killed leaves the hidden folder; the next import of this dataset removes it, told by its lock that
    nobody works in it any more.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = _TEMPORARY.format(name=folder.name)
        for stale in folder.parent.glob(f"{glob.escape(prefix)}*"):
            _clear_up(stale, folder)
    except OSError as error:
        raise ValueError(f"data_path: cannot write in {folder.parent}: {error}.") from error
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another dataset name or data_path.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} exists. Give --overwrite to replace it, or another --dataset or --data_path.")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    except OSError as error:
        raise ValueError(f"data_path: cannot write in {folder.parent}: {error}.") from error
    try:
        with _locked(temporary):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Give ``temporary`` the name ``folder``; what stood there is removed after that."""
    aside = temporary.with_name(temporary.name + _OLD)
    try:
        if not folder.exists():
            os.replace(temporary, folder)
            return
        with _locked(folder):  # the lock stays with the folder under its new name
            os.replace(folder, aside)
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(aside, folder)
                raise
            shutil.rmtree(aside)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written, or another import wrote it meanwhile: {error}.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; on Windows, which has none for folders, nothing is held.

    Raises:
        BlockingIOError: if another process holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _clear_up(stale: Path, folder: Path) -> None:
    """Remove what a killed import left, unless an import is at work in it; put a dataset that it set aside back."""
    with suppress(OSError), _locked(stale):
        if stale.name.endswith(_OLD) and not folder.exists():
            os.replace(stale, folder)
        else:
            shutil.rmtree(stale)


def _notes(report: ImportReport) -> list[str]:
    notes = []
    for table, what in ((report.items, "items"), (report.users, "users")):
        if table is None:
            continue
        interacting = report.n_items if what == "items" else report.n_users
        if table.added == interacting and table.rows_kept:
            notes.append(
                f"no id of the interactions is in {table.file}: check that both files write ids alike (1 and 1.0 are "
                f"different), or give --{what}-id-column."
            )
        if not table.text_fields:
            notes.append(
                f"no column of {table.file} looks like text; name some with "
                f"--{'' if what == 'items' else 'user-'}text-columns."
            )
    if report.items is not None and report.items.unseen:
        notes.append(
            f"{report.items.unseen:,} items have no interaction: RecBole leaves them out. To place them by their texts, take "
            f"the # from the line 'item: [item_id]' of {report.config_file}."
        )
    if report.users is not None and report.users.text_fields:
        notes.append(
            "users are described by their histories alone; for their texts too, take the # from the line 'user_tower' of "
            f"{report.config_file}."
        )
    if report.items is None:
        notes.append(
            "no items were given: without texts LLMTwoTower learns from ids alone (encoder is empty in the YAML)."
        )
    return notes


def _settings(report: ImportReport, data_path: str | Path, fields: Sequence[str]) -> str:
    """The YAML to run RecBole with, in the form of recbole_llm/properties/LLMTwoTower.yaml."""
    import yaml

    def show(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        return text.removesuffix("...\n").strip()

    lines = [
        "# Written by recbole-llm import.",
        f"# recbole-llm run --dataset {report.dataset} --config_files {report.config_file}",
        f"data_path: {show(str(data_path))}",
        'field_separator: "\\t"',
        'seq_separator: " "',
        "USER_ID_FIELD: user_id",
        "ITEM_ID_FIELD: item_id",
        "load_col:",
        f"  inter: {show(list(fields))}",
    ]
    if report.items is not None and report.items.unseen:
        lines.append(
            f"  # item: [item_id]                # also the {report.items.unseen} items without an interaction"
        )
    if "rating" in fields:
        lines.append("RATING_FIELD: rating")
    if "timestamp" in fields:
        lines.append("TIME_FIELD: timestamp")
    if "label" in fields:
        lines.append("LABEL_FIELD: label")
    if report.items is not None and report.items.text_fields:
        lines.append(f"item_text_fields: {show(report.items.text_fields)}")
    else:
        lines.append("encoder: ~                      # no item texts")
    if report.users is not None and report.users.text_fields:
        lines.append(f"user_text_fields: {show(report.users.text_fields)}")
        lines.append("# user_tower: history+text         # users' texts take part in the model")
    return "\n".join(lines) + "\n"
