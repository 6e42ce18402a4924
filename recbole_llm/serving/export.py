"""From a trained model to an export: the one module of serving that loads torch.

A model is anything with the methods and attributes of ``LLMTwoTower`` that are read here; RecBole is not imported.
"""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.bridge.checkpoint_settings import add_path_arguments, given_paths
from recbole_llm.content.encoders import load_encoder
from recbole_llm.content.feature_table import fit_transform
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.text import (
    AtomicTable,
    choose_text_fields,
    default_template,
    read_atomic_table,
    texts_of_tokens,
)
from recbole_llm.serving.artifact import ItemRecord
from recbole_llm.serving.artifact_writer import ExportContents, write_artifact
from recbole_llm.serving.manifest import EncoderSpec, ItemText, Manifest
from recbole_llm.serving.model_card import model_card
from recbole_llm.serving.model_tables import ModelTables, tables_of
from recbole_llm.serving.text_map import TextMap

INDEX_KINDS = ("auto", "exact", "ivf")
# above this exact scoring takes tens of milliseconds a request on one core
EXACT_UP_TO = 300_000
# columns whose cells are longer than this on average are prose, not something to filter by
ATTRIBUTE_CHARACTERS = 64

log = getLogger(__name__)


def export_model(
    model: Any,
    dataset: Any,
    output: str | Path,
    *,
    index: str = "auto",
    attributes: Sequence[str] | None = None,
    keep_text: bool = True,
    bundle_encoder: bool = False,
    onnx: bool = False,
    metrics: Mapping[str, Any] | None = None,
    overlay_seq: int = 0,
) -> Manifest:
    """Write the export of a trained model.

    Args:
        model: a trained ``LLMTwoTower``, in evaluation mode.
        dataset: the dataset it was made from: ids, and the item file with titles, texts and attributes.
        output: folder that does not exist yet.
        index: ``exact``, ``ivf`` (needs faiss), or ``auto``: ivf above ``EXACT_UP_TO`` items.
        attributes: columns of the item file to show and filter by; ``None`` for all that are short.
        keep_text: whether the items' texts go along.
        bundle_encoder: copy the encoder's files into the export, so that the service needs no hub.
        onnx: write the arithmetic as ONNX graphs too (needs onnx); compared with the model where onnxruntime is installed.
        metrics: for the model card, such as the test result.
        overlay_seq: last change of the service's log that the training data held already.

    Returns:
        The manifest.

    Raises:
        ValueError: if the output exists, the model cannot be expressed, or a column is unknown.
    """
    if index not in INDEX_KINDS:
        raise ValueError(f"index is {index!r}; expected one of {', '.join(INDEX_KINDS)}.")
    if Path(output).exists():  # said before anything long is done
        raise ValueError(
            f"output {str(output)!r} exists, and an export is immutable: name another folder, or remove it."
        )
    contents = contents_of(
        model,
        dataset,
        index=index,
        attributes=attributes,
        keep_text=keep_text,
        bundle_encoder=bundle_encoder,
        metrics=metrics,
        overlay_seq=overlay_seq,
    )
    card = model_card(contents, getattr(dataset, "dataset_name", ""))
    manifest = write_artifact(output, replace(contents, card=card, onnx=onnx))
    counts = manifest.counts
    log.info("Exported %d items and %d users as %s to %s", counts["items"], counts["users"], manifest.export_id, output)
    return manifest


def contents_of(
    model: Any,
    dataset: Any,
    *,
    index: str = "exact",
    attributes: Sequence[str] | None = None,
    keep_text: bool = False,
    bundle_encoder: bool = False,
    map_texts: bool = True,
    metrics: Mapping[str, Any] | None = None,
    overlay_seq: int = 0,
) -> ExportContents:
    """What an export of a trained model holds, without its card.

    Args:
        model: as for :func:`export_model`, like the rest.
        dataset: the dataset it was made from.
        index: kind of the index.
        attributes: columns of the item file to show and filter by.
        keep_text: whether the items' texts go along.
        bundle_encoder: whether the encoder's files go along.
        map_texts: whether new texts can be placed; needs the encoder's files and the vectors of all texts.
        metrics: for the model card.
        overlay_seq: last change of the service's log that the training data held already.

    Raises:
        ValueError: if the model cannot be expressed, or a column is unknown.
    """
    tables = tables_of(model)
    item_ids, user_ids = _tokens(dataset, dataset.iid_field), _tokens(dataset, dataset.uid_field)
    content = _content(model, dataset, item_ids, attributes, keep_text)
    encoder = _encoder(model.options) if map_texts else None
    spec = None if encoder is None else _encoder_spec(encoder, model.options, bundle_encoder)
    text_map = _text_map(tables, dataset, model.options, encoder) if map_texts else None
    history = model.history.to("cpu")
    offsets = history.offsets.numpy()
    if int(offsets[1]) != 0:
        raise ValueError("The padding user has a history; the model's history is not in the dataset's order.")
    return ExportContents(
        item_ids=item_ids,
        user_ids=user_ids,
        records=content.records,
        vector=tables.vector,
        source=tables.source,
        bias=tables.bias,
        trained=tables.trained,
        listed=tables.listed,
        blocks=tables.blocks,
        offset=tables.offset,
        user_part=tables.user_part,
        similar_by=tables.similar_by,
        history_offsets=offsets[1:],
        history_items=history.ids.numpy() - 1,
        history_weight=None if history.weights is None else history.weights.numpy(),
        history_rank=tables.history_rank,
        probability=tables.probability,
        text_map=text_map,
        encoder=spec,
        encoder_files=_encoder_files(encoder) if bundle_encoder and encoder is not None else {},
        item_text=content.item_text,
        attributes=content.kinds,
        history_decay=model.options.history_decay,
        overlay_seq=overlay_seq,
        index=_index(index, tables, history),
        metrics=dict(metrics or {}),
        producer={"torch": torch.__version__},
    )


def _tokens(dataset: Any, field: str) -> list[str]:
    return [str(token) for token in dataset.field2id_token[field][1:]]


# ------------------------------------------------------------------ what items are called and described by


class _Content:
    def __init__(self, records: list[ItemRecord], kinds: dict[str, str], item_text: ItemText | None) -> None:
        self.records, self.kinds, self.item_text = records, kinds, item_text


def _content(
    model: Any, dataset: Any, item_ids: Sequence[str], attributes: Sequence[str] | None, keep_text: bool
) -> _Content:
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if not path.is_file():
        if attributes:
            raise ValueError(f"attributes names {', '.join(attributes)}, and there is no {path.name}.")
        log.info("There is no %s: items are called by their ids", path.name)
        return _Content([ItemRecord(item_id, None, {}) for item_id in item_ids], {}, None)
    table = _item_table(path, dataset)
    texts: list[str | None] = [None] * len(item_ids)
    fields: tuple[str, ...] = ()
    item_text = None
    if model.options.encoder and not model.options.item_features_file:
        fields = choose_text_fields(table, model.options.item_text_fields, model.options.item_text_template)
        template = model.options.item_text_template or default_template(fields)
        item_text = ItemText(fields, template)
        texts, _ = texts_of_tokens(table, item_ids, fields, model.options.item_text_template)
    title = _title_column(table, fields)
    kinds = _attribute_kinds(table, title, attributes)
    separator = dataset.config["seq_separator"]
    titles = [] if title is None else table.words(title)
    records = []
    for item_id, text in zip(item_ids, texts, strict=True):
        row = table.row_of.get(item_id)
        name = titles[row] if row is not None and titles else ""
        values = {} if row is None else _attributes(table, row, kinds, separator)
        records.append(ItemRecord(name or item_id, text if keep_text else None, values))
    return _Content(records, kinds, item_text)


def _item_table(path: Path, dataset: Any) -> AtomicTable:
    config = dataset.config
    return read_atomic_table(
        path,
        dataset.iid_field,
        separator=config["field_separator"],
        encoding=config["encoding"] or "utf-8",
        seq_separator=config["seq_separator"],
    )


def _title_column(table: AtomicTable, fields: Sequence[str]) -> str | None:
    """The column that items are called by: one named title or name, else the first of the text."""
    for wanted in ("title", "name"):
        for name in table.types:
            if name != table.id_field and name.lower().split(":")[0].endswith(wanted):
                return name
    return fields[0] if fields else None


def _attribute_kinds(table: AtomicTable, title: str | None, asked: Sequence[str] | None) -> dict[str, str]:
    unknown = [name for name in asked or () if name not in table.types]
    if unknown:
        raise ValueError(
            f"attributes names {', '.join(map(repr, unknown))}; {table.path.name} has {table.describe_columns()}."
        )
    kinds = {"token": "token", "token_seq": "tokens", "float": "number"}
    chosen = {}
    for name, kind in table.types.items():
        if name in (table.id_field, title) or (asked is not None and name not in asked):
            continue
        cells = table.columns[name]
        long = sum(map(len, cells)) > ATTRIBUTE_CHARACTERS * len(cells)
        if kind not in kinds or (long and asked is None):
            log.info("Column %s of %s is no attribute: it is %s", name, table.path.name, "long" if long else kind)
            continue
        chosen[name] = kinds[kind]
    return chosen


def _attributes(table: AtomicTable, row: int, kinds: Mapping[str, str], separator: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        cell = table.columns[name][row]
        if not cell:
            continue
        if kind == "number":
            try:
                number = float(cell)
            except ValueError:
                continue
            if np.isfinite(number):
                values[name] = number
        else:
            values[name] = [part for part in cell.split(separator) if part] if kind == "tokens" else cell
    return values


# ------------------------------------------------------------------ texts to vectors


def _encoder(options: Any) -> Any | None:
    if not options.encoder or options.item_features_file:
        return None
    return load_encoder(options.encoder, revision=options.encoder_revision, **_encoder_settings(options))


def _encoder_settings(options: Any) -> dict[str, Any]:
    return {
        "pooling": options.encoder_pooling,
        "prompt": options.encoder_prompt,
        "max_tokens": options.encoder_max_tokens,
        "overflow": options.encoder_overflow,
        "dim": options.encoder_dim,
        "dtype": options.encoder_dtype,
    }


def _encoder_spec(encoder: Any, options: Any, bundled: bool) -> EncoderSpec:
    return EncoderSpec(
        name=options.encoder,
        revision=options.encoder_revision,
        settings=_encoder_settings(options),
        feature_dim=encoder.dim,
        fingerprint=encoder.fingerprint,
        bundled=bundled,
    )


def _encoder_files(encoder: Any) -> dict[str, Path]:
    folder = Path(encoder.files.folder)
    kept = {".safetensors", ".json", ".txt", ".model"}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in kept and len(path.relative_to(folder).parts) <= 2
    }


def _text_map(tables: ModelTables, dataset: Any, options: Any, encoder: Any | None) -> TextMap | None:
    """The map from raw text vectors, ``None`` where new texts cannot be placed."""
    if tables.cold_map is None or encoder is None:
        reason = "vectors of its items come from a file" if options.item_features_file else "it has no cold map"
        log.warning("Items cannot be added by their text, and texts cannot be searched: %s.", reason)
        return None
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    table = _item_table(path, dataset)
    fields = choose_text_fields(table, options.item_text_fields, options.item_text_template)
    tokens = [None, *_tokens(dataset, dataset.iid_field)]
    texts, _ = texts_of_tokens(table, tokens, fields, options.item_text_template)
    raw = encode_texts(texts, encoder, FeatureStore(options.feature_cache_dir), batch_size=options.encoder_batch_size)
    return tables.text_map(*fit_transform(raw, options.feature_transform))


def _index(kind: str, tables: ModelTables, history: Any) -> tuple[Mapping[str, Any], bytes] | None:
    if kind == "exact" or (kind == "auto" and len(tables.vector) <= EXACT_UP_TO):
        return None
    from recbole_llm.serving.candidates import sample_queries
    from recbole_llm.serving.ivf import build_index
    from recbole_llm.serving.query import Pooling

    items = history.ids.numpy() - 1
    weight = np.ones(len(items), np.float32) if history.weights is None else history.weights.numpy()
    pooling = Pooling(tables.blocks, tables.offset)
    queries = sample_queries(pooling, tables.source, history.offsets.numpy()[1:], items, weight, tables.history_rank)
    return build_index(tables.vector, tables.bias, queries)


# ------------------------------------------------------------------ command


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``recbole-llm export``."""
    parser.add_argument(
        "checkpoint", help="what 'recbole-llm run' saved (saved/LLMTwoTower-....pth), or its folder for the newest one"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    add_path_arguments(parser)
    parser.add_argument("--index", choices=INDEX_KINDS, default="auto", help="auto: ivf above 300,000 items")
    parser.add_argument("--attributes", default=None, metavar="A,B", help="item columns to show and filter by")
    parser.add_argument("--no-text", action="store_true", help="leave the items' texts out")
    parser.add_argument("--bundle-encoder", action="store_true", help="copy the encoder into the export")
    parser.add_argument(
        "--metrics", default=None, metavar="FILE", help="from 'recbole-llm run --output FILE', for the card"
    )
    parser.add_argument("--onnx", action="store_true", help="write the arithmetic as ONNX graphs too")
    parser.add_argument("--overlay-seq", type=int, default=0, help="last change that the training data held already")


def run_export(options: argparse.Namespace) -> int:
    """Run ``recbole-llm export``; prints what was written.

    Raises:
        ValueError: as :func:`export_model`, or if the checkpoint does not exist or is of another model.
    """
    from recbole_llm.bridge.trained import load_trained
    from recbole_llm.recommend import newest_checkpoint

    checkpoint = newest_checkpoint(options.checkpoint) or Path(options.checkpoint)
    if not checkpoint.is_file():
        raise ValueError(
            f"checkpoint {options.checkpoint!r} does not exist or holds none. Give a file that 'recbole-llm run' saved "
            "(saved/LLMTwoTower-....pth), or its folder."
        )
    metrics = _metrics(options.metrics)
    model, dataset = load_trained(checkpoint, **given_paths(options))
    manifest = export_model(
        model,
        dataset,
        options.output,
        index=options.index,
        attributes=None if options.attributes is None else [part.strip() for part in options.attributes.split(",")],
        keep_text=not options.no_text,
        bundle_encoder=options.bundle_encoder,
        onnx=options.onnx,
        metrics=metrics,
        overlay_seq=options.overlay_seq,
    )
    size = sum(sums.bytes for sums in manifest.files.values())
    spec = manifest.encoder
    texts = "" if spec is None or spec.bundled else f" --encoder {shlex.quote(spec.name)}"
    print(  # noqa: T201
        f"export {manifest.export_id}: {manifest.counts['items']} items, {manifest.counts['users']} users, "
        f"{manifest.dim} dimensions, {size / 1e6:.1f} MB in {options.output}\n"
        f"next: recbole-llm serve {shlex.quote(str(options.output))}{texts}"
    )
    return 0


def _metrics(file: str | None) -> dict[str, Any]:
    """Test metrics of a file that ``recbole-llm run --output`` wrote."""
    if file is None:
        return {}
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    result = content.get("test_result") if isinstance(content, dict) else None
    if not isinstance(result, dict):
        raise ValueError(
            f"metrics {file!r} holds no test_result. Give a file that 'recbole-llm run --output FILE' wrote."
        )
    return {"dataset": content.get("dataset", ""), **result}
