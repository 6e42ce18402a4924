"""Tables of interactions, items and users to RecBole's atomic files: ``recbole-llm import``.

Rows are streamed; of each a few numbers stay in memory to find duplicates and to sort. Nothing is dropped in silence:
the report counts every row that was read as kept or as dropped, with the reason. The dataset's folder appears complete
or not at all.
"""

import importlib.util
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from recbole_llm.importing.dataset_folder import new_folder, refuse_existing
from recbole_llm.importing.report import ImportReport
from recbole_llm.importing.settings_file import settings

# RecBole reads its own files for the first, and its own settings for the others
RESERVED_NAMES = ("ml-100k", "sample", "url", "kg_url")


def import_dataset(
    interactions: str | Path,
    dataset: str,
    *,
    items: str | Path | None = None,
    users: str | Path | None = None,
    images: str | Path | None = None,
    image_column: str | None = None,
    image_encoder: str | None = None,
    audio: str | Path | None = None,
    audio_column: str | None = None,
    audio_encoder: str | None = None,
    data_path: str | Path = "dataset",
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    label_column: str | None = None,
    time_column: str | None = None,
    weight_column: str | None = None,
    event_column: str | None = None,
    event_weights: Mapping[str, float] | None = None,
    half_life: float | None = None,
    items_id_column: str | None = None,
    users_id_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    user_text_columns: Sequence[str] | None = None,
    threshold: float | None = None,
    keep_negatives: bool = False,
    duplicates: str = "last",
    order: str = "auto",
    time_unit: str | None = None,
    time_format: str | None = None,
    decimal: str | None = None,
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
        images: a folder of pictures, which are copied into the dataset's folder.
        image_column: the column of ``items`` with paths inside ``images``, several with ``|`` between them; ``None``: the pictures
            are named after the items, ITEM_ID.jpg.
        image_encoder: encoder of the pictures, for the YAML; ``None``: the YAML has a line that waits for one.
        audio: a folder of sounds, likewise; named after the items, ITEM_ID.wav.
        audio_column: as ``image_column``.
        audio_encoder: as ``image_encoder``.
        data_path: the folder that gets the dataset's folder.
        user_column: the interactions' column of users; the ids are kept as written.
        item_column: the interactions' column of items; the ids are kept as written.
        rating_column: the interactions' column of ratings.
        label_column: the interactions' column of labels: 1 and 0, 1 and -1, true and false, or yes and no.
        time_column: the interactions' column of times: seconds, milli-, micro- or nanoseconds since 1970, ISO dates, or
            dates such as 31/05/2024 12:00, if some row tells the day from the month.
        weight_column: the interactions' column with how much each of them counts, above 0; that of the ratings may be it.
        event_column: the interactions' column of kinds of events.
        event_weights: how much each kind counts, such as ``{"view": 1, "cart": 3, "buy": 5}``; 0 leaves a kind out.
        half_life: days after which an interaction counts half, from the newest one back.
        items_id_column: the id column of ``items``.
        users_id_column: the id column of ``users``.
        text_columns: the columns of ``items`` that make an item's text.
        user_text_columns: the columns of ``users`` that make a user's text.
        threshold: ratings below it are no interactions.
        keep_negatives: write them, and rows of label 0, with ``label`` 0 instead of dropping them.
        duplicates: of rows with the same user and item keep the ``last`` (in time), the ``first``, or ``keep`` all. The
            last or first is chosen before the threshold is applied, and after rows of label 0 are dropped. ``sum`` keeps
            the last with the sum of their weights, each 1 where no weight was given.
        order: of the rows written: ``file``, ``time``, or ``auto``, which is time where float32 merges times.
        time_unit: ``s``, ``ms``, ``us``, ``ns`` or ``iso``.
        time_format: the form of the times, as for ``strptime``: ``%d/%m/%Y %H:%M``.
        decimal: the sign before decimals of text files, ``.`` or ``,``; found if ``None``.
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

    Example:
        >>> report = import_dataset(orders, "shop", items=products, data_path=folder)
        >>> report.n_users, report.n_items, report.config_file.name
        (2, 3, 'shop.yaml')
    """
    started = time.perf_counter()
    _check_arguments(dataset, threshold, label_column)
    _check_weights(event_column, event_weights, half_life)
    _check_choices(
        duplicates=duplicates, order=order, time_unit=time_unit, bad_rows=bad_rows, decimal=decimal, quoting=quoting
    )
    if time_unit is not None and time_format is not None:
        raise ValueError("time_unit and time_format both say what times are: give one of them.")
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("import needs pyarrow: pip install -e '.[import]' in the checkout.")
    from recbole_llm.importing.columns import Notation
    from recbole_llm.importing.dates import DateFormat
    from recbole_llm.importing.entities import EntityRules, import_entities
    from recbole_llm.importing.interactions import InteractionRules, import_interactions
    from recbole_llm.importing.pictures import check_media, import_media
    from recbole_llm.importing.sources import open_source
    from recbole_llm.importing.weights import WeightRules

    if time_format is not None:
        DateFormat.of(time_format)
    folder = Path(data_path) / dataset
    media = {
        "image": check_media("images", images, image_column, image_encoder, items is not None),
        "audio": check_media("audio", audio, audio_column, audio_encoder, items is not None),
    }
    refuse_existing(folder, overwrite)
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
    with new_folder(folder, overwrite) as temporary:
        notation = Notation(decimal, time_unit, time_format)
        weights = WeightRules(bool(weight_column), event_weights, half_life, duplicates == "sum")
        rules = InteractionRules(threshold, keep_negatives, duplicates, bad_rows, order, notation, weights)
        flags = {
            "user": user_column,
            "item": item_column,
            "rating": rating_column,
            "label": "" if label_column is None and threshold is not None else label_column,
            "time": time_column,
            "weight": weight_column or "",
            "event": "" if event_weights is None else event_column,
        }
        found = import_interactions(sources["interactions"], temporary / f"{dataset}.inter", flags, rules, progress)
        report = ImportReport(dataset, folder, folder / f"{dataset}.yaml", found.report, notes=found.notes)
        report.n_users, report.n_items = len(found.users), len(found.items)
        columns = {target.split(":")[0]: name for name, target in found.report.columns.items()}
        taken = ["user_id", "item_id", "rating", "label", "timestamp", "weight"]
        first_or_last = "first" if duplicates == "first" else "last"
        if items is not None:
            rule = EntityRules(
                "item",
                items_id_column,
                columns["item_id"],
                text_columns,
                taken,
                first_or_last,
                bad_rows,
                keep_html,
                decimal,
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
                decimal,
            )
            report.users = import_entities(sources["users"], temporary / f"{dataset}.user", found.users, rule, progress)
        item_file = None if items is None else temporary / f"{dataset}.item"
        for modality, source in media.items():
            if source is not None:
                named = None if source.column is None else _media_field(report, modality, source.column)
                done = import_media(source, temporary, item_file, found.items.to_pylist(), named)
                setattr(report, "pictures" if modality == "image" else "sounds", done)
        report.notes += _notes(report)
        (temporary / f"{dataset}.yaml").write_text(settings(report, data_path, found.fields), encoding="utf-8")
        report.seconds = time.perf_counter() - started
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (temporary / "import_report.json").write_text(text + "\n", encoding="utf-8")
    return report


def _media_field(report: ImportReport, modality: str, column: str) -> str:
    """The field of the item file that holds a column of the source.

    Raises:
        ValueError: if it was not written.
    """
    assert report.items is not None
    written = report.items.columns.get(column)
    if written is None:
        why = report.items.unused_columns.get(column)
        raise ValueError(
            f"{modality}_column names {column!r}, which {f'was not imported ({why})' if why else 'is no column'} of "
            f"{report.items.file}; it has {', '.join(report.items.columns)}."
        )
    return written.split(":")[0]


def _check_arguments(dataset: str, threshold: float | None, label_column: str | None) -> None:
    if not re.fullmatch(r"\w[\w.-]*", dataset):
        raise ValueError(f"dataset must be a name of letters, digits, '_', '-' and '.', and {dataset!r} was given.")
    if dataset in RESERVED_NAMES:
        raise ValueError(
            f"dataset: RecBole reads files of its own for the name {dataset!r}. Choose another, such as my-{dataset}."
        )
    if threshold is not None and label_column:
        raise ValueError("threshold makes 0/1 labels of ratings, and label_column names labels: give one of them.")
    if threshold is not None and threshold != threshold:
        raise ValueError("threshold must be a number, and NaN was given.")


def _check_weights(
    event_column: str | None, event_weights: Mapping[str, float] | None, half_life: float | None
) -> None:
    if event_column and event_weights is None:
        raise ValueError(f"event_column {event_column!r} needs event_weights, such as view=1,cart=3,buy=5.")
    for kind, weight in (event_weights or {}).items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"event_weights: {kind} weighs {weight}; expected a finite number of at least 0.")
    if event_weights is not None and not any(event_weights.values()):
        raise ValueError("event_weights leaves every kind of event out; give one of them a weight above 0.")
    if half_life is not None and not 0 < half_life < float("inf"):
        raise ValueError(f"half_life is {half_life}; expected a number of days above 0.")


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "duplicates": ("last", "first", "keep", "sum"),
    "order": ("auto", "file", "time"),
    "time_unit": (None, "s", "ms", "us", "ns", "iso"),
    "bad_rows": ("error", "drop"),
    "decimal": (None, ".", ","),
    "quoting": ("auto", "csv", "none"),
}


def _check_choices(**given: str | None) -> None:
    for name, value in given.items():
        if value not in _CHOICES[name]:
            known = [repr(choice) if choice == "," else choice for choice in _CHOICES[name] if choice]
            raise ValueError(f"{name} must be one of {', '.join(known)}, and {value!r} was given.")


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
        if report.items.text_fields:
            notes.append(
                f"{report.items.unseen:,} items have no interaction and are placed by their texts; to leave them out, put a # "
                f"before the line 'item: [item_id]' of {report.config_file}."
            )
        else:
            notes.append(
                f"{report.items.unseen:,} items have no interaction, and no text to place them by: they are left out. The line "
                f"'item: [item_id]' of {report.config_file} takes them in, without its #."
            )
    if report.users is not None and report.users.text_fields:
        notes.append(
            "users are described by their histories alone; for their texts too, take the # from the line 'user_tower' of "
            f"{report.config_file}."
        )
    for what, option, done in (("pictures", "image", report.pictures), ("sounds", "audio", report.sounds)):
        if done is not None and done.encoder is None:
            notes.append(
                f"{what} take part once an encoder is named: take the # from the line 'item_modalities' of {report.config_file}, "
                f"or import with --{option}-encoder."
            )
    if report.items is None:
        notes.append(
            "no items were given: without texts LLMTwoTower learns from ids alone (encoder is empty in the YAML)."
        )
    return notes
