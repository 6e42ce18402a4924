"""From a trained model to an export: the one module of serving that loads torch.

A model is anything with the methods and attributes of ``LLMTwoTower`` that are read here; RecBole is not imported.
"""

import argparse
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.content.encoders import TextEncoder, load_encoder
from recbole_llm.content.feature_table import VARIANCE_FLOOR, FeatureTable
from recbole_llm.content.features import FeatureStore, encode_texts, load_features
from recbole_llm.content.text import (
    AtomicTable,
    choose_text_fields,
    default_template,
    read_atomic_table,
    texts_of_tokens,
)
from recbole_llm.serving.artifact import Block, EncoderSpec, ItemRecord, ItemText, Manifest
from recbole_llm.serving.artifact_writer import ExportContents, write_artifact
from recbole_llm.serving.model_card import model_card
from recbole_llm.serving.text_map import TextMap

INDEX_KINDS = ("auto", "exact", "ivf")
# above this exact scoring takes tens of milliseconds a request on one core
EXACT_UP_TO = 300_000
# columns whose cells are longer than this on average are prose, not something to filter by
ATTRIBUTE_CHARACTERS = 64
MAX_TABLE_BYTES = 4 << 30

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
    tables = _tables(model)
    item_ids, user_ids = _tokens(dataset, dataset.iid_field), _tokens(dataset, dataset.uid_field)
    content = _content(model, dataset, item_ids, attributes, keep_text)
    encoder = _encoder(model.options)
    spec = None if encoder is None else _encoder_spec(encoder, model.options, bundle_encoder)
    text_map = _text_map(model, dataset, encoder)
    history = model.history.to("cpu")
    offsets = history.offsets.numpy()
    if int(offsets[1]) != 0:
        raise ValueError("The padding user has a history; the model's history is not in the dataset's order.")
    built = _index(index, tables["vector"], tables["bias"])
    contents = ExportContents(
        item_ids=item_ids,
        user_ids=user_ids,
        records=content.records,
        trained=_numpy(model._trained.value)[1:].astype(bool),
        history_offsets=offsets[1:],
        history_items=history.ids.numpy() - 1,
        history_weight=None if history.weights is None else history.weights.numpy(),
        text_map=text_map,
        encoder=spec,
        encoder_files=_encoder_files(encoder) if bundle_encoder and encoder is not None else {},
        item_text=content.item_text,
        attributes=content.kinds,
        history_decay=model.options.history_decay,
        overlay_seq=overlay_seq,
        index=built,
        metrics=dict(metrics or {}),
        producer={"torch": torch.__version__},
        **tables,
    )
    manifest = write_artifact(
        output, ExportContents(**{**vars(contents), "card": model_card(contents, getattr(dataset, "dataset_name", ""))})
    )
    log.info("Exported %d items and %d users as %s to %s", len(item_ids), len(user_ids), manifest.export_id, output)
    return manifest


def _tokens(dataset: Any, field: str) -> list[str]:
    return [str(token) for token in dataset.field2id_token[field][1:]]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


@torch.no_grad()
def _tables(model: Any) -> dict[str, Any]:
    """Source, target, bias and the columns' pooling, without the padding row."""
    vector, bias = model.item_vectors()
    learned_source, _, _ = model._ranking_tables()
    options, tower = model.options, model.user_tower
    closed_scale, learned_scale = (float(scale) for scale in model.block_scales)
    closed = None if model._closed_source is None else model._closed_source.value
    if closed is not None and closed_scale == 0:
        vector, closed = vector[:, closed.shape[1] :], None
    if vector.numel() * 8 > MAX_TABLE_BYTES:
        raise ValueError(
            f"The item tables would take {vector.numel() * 8 / 2**30:.1f} GiB ({vector.shape[0]} items, {vector.shape[1]} "
            "columns): train with a smaller closed_form_dim, such as 2048."
        )
    learned_dim = learned_source.shape[1]
    users = torch.arange(1, model.n_users, device=vector.device)
    part = None
    if tower.id is not None or tower.adapter is not None:
        nothing = torch.zeros(len(users), learned_dim, device=vector.device)
        part = tower(users, nothing) - tower.offset
    if not tower.uses_history:
        learned_source = torch.zeros_like(learned_source)
    blocks: tuple[Block, ...]
    learned = Block(
        "learned",
        learned_dim,
        float(options.history_exponent),
        learned_scale * float(model.log_scale.exp()),
        options.scoring,
    )
    if closed is None:
        blocks, source, offset = (learned,), learned_source, tower.offset
    elif "learned" not in options.blocks or learned_scale == 0:
        blocks = (Block("closed_form", closed.shape[1], 0.0, closed_scale),)
        source, vector, part = closed, vector[:, : closed.shape[1]], None
        offset = torch.zeros(closed.shape[1])
    else:
        blocks = (Block("closed_form", closed.shape[1], 0.0, closed_scale), learned)
        source = torch.cat([closed, learned_source], 1)
        offset = torch.cat([torch.zeros(closed.shape[1], device=tower.offset.device), tower.offset])
        if part is not None:
            part = torch.nn.functional.pad(part, (closed.shape[1], 0))
    is_full = closed is not None and model._closed_target is None
    return {
        "blocks": blocks,
        "vector": _numpy(vector)[1:],
        "source": _numpy(source)[1:],
        "bias": _numpy(bias)[1:],
        "offset": _numpy(offset),
        "user_part": None if part is None else _numpy(part),
        # the full form's targets are the identity: no two of them are similar
        "similar_by": "source" if is_full else "vector",
    }


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
    table = read_atomic_table(path, dataset.iid_field, separator=dataset.config["field_separator"])
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
    records = []
    for item_id, text in zip(item_ids, texts, strict=True):
        row = table.row_of.get(item_id)
        name = table.columns[title][row] if row is not None and title is not None else ""
        values = {} if row is None else _attributes(table, row, kinds, separator)
        records.append(ItemRecord(name or item_id, text if keep_text else None, values))
    return _Content(records, kinds, item_text)


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


def _encoder(options: Any) -> TextEncoder | None:
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


def _encoder_spec(encoder: TextEncoder, options: Any, bundled: bool) -> EncoderSpec:
    return EncoderSpec(
        name=options.encoder,
        revision=options.encoder_revision,
        settings=_encoder_settings(options),
        feature_dim=encoder.dim,
        fingerprint=encoder.fingerprint,
        bundled=bundled,
    )


def _encoder_files(encoder: TextEncoder) -> dict[str, Path]:
    folder = Path(encoder.files.folder)
    kept = {".safetensors", ".json", ".txt", ".model"}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in kept and len(path.relative_to(folder).parts) <= 2
    }


def feature_map(table: FeatureTable, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The affine map of :func:`recbole_llm.content.feature_table.apply_transform`, for vectors that come later.

    Args:
        table: raw vectors of the items.
        kind: ``center``, ``none``, ``standardize`` or ``whiten``.

    Returns:
        ``center`` ``[F]`` and ``transform`` ``[F, F]`` (``None`` for the identity), float32: z = (f - center) T.
    """
    F = table.dim
    rows = table.vectors[table.present].double()
    if kind == "none" or not len(rows):
        return np.zeros(F, np.float32), None
    center = rows.mean(0)
    if kind == "center":
        return _numpy(center.float()), None
    centred = rows - center
    if kind == "standardize":
        variance = centred.square().mean(0)
        transform = torch.diag((variance + VARIANCE_FLOOR * variance.mean()).clamp_min(1e-30).rsqrt())
    else:
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
        scale = (variance.clamp_min(0) + VARIANCE_FLOOR * variance.mean()).clamp_min(1e-30).rsqrt()
        transform = (basis * scale) @ basis.T
    size = (centred @ transform).square().sum().sqrt()
    if size > 0:
        transform = transform * (centred.square().sum().sqrt() / size)
    return _numpy(center.float()), _numpy(transform.float())


def raw_features(dataset: Any, options: Any, encoder: TextEncoder | None) -> FeatureTable | None:
    """The items' text vectors before ``feature_transform``, in the dataset's order, from the store."""
    tokens = [None, *_tokens(dataset, dataset.iid_field)]
    if options.item_features_file:
        return load_features(options.item_features_file, tokens)
    if encoder is None:
        return None
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    table = read_atomic_table(path, dataset.iid_field, separator=dataset.config["field_separator"])
    fields = choose_text_fields(table, options.item_text_fields, options.item_text_template)
    texts, _ = texts_of_tokens(table, tokens, fields, options.item_text_template)
    return encode_texts(texts, encoder, FeatureStore(options.feature_cache_dir), batch_size=options.encoder_batch_size)


def _text_map(model: Any, dataset: Any, encoder: TextEncoder | None) -> TextMap | None:
    """The model's cold map on raw text vectors; ``None`` where it has none."""
    fitted = getattr(model, "cold_map", None)
    if fitted is None:
        log.warning("The model has no cold map: items cannot be added by their text, and texts cannot be searched.")
        return None
    raw = raw_features(dataset, model.options, encoder)
    assert raw is not None
    center, transform = feature_map(raw, model.options.feature_transform)
    return fitted.text_map(center, transform)


def _index(kind: str, vector: np.ndarray, bias: np.ndarray) -> tuple[Mapping[str, Any], bytes] | None:
    if kind == "exact" or (kind == "auto" and len(vector) <= EXACT_UP_TO):
        return None
    from recbole_llm.serving.ivf import build_index

    return build_index(vector, bias)


# ------------------------------------------------------------------ command


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``recbole-llm export``."""
    parser.add_argument("checkpoint", help="what 'recbole-llm run' saved (saved/*.pth); read as code, so your own only")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--index", choices=INDEX_KINDS, default="auto", help="auto: ivf above 300,000 items")
    parser.add_argument("--attributes", default=None, metavar="A,B", help="item columns to show and filter by")
    parser.add_argument("--no-text", action="store_true", help="leave the items' texts out")
    parser.add_argument("--bundle-encoder", action="store_true", help="copy the encoder into the export")
    parser.add_argument("--overlay-seq", type=int, default=0, help="last change that the training data held already")


def run_export(options: argparse.Namespace) -> int:
    """Run ``recbole-llm export``; prints what was written.

    Raises:
        ValueError: as :func:`export_model`, or if the checkpoint does not exist or is of another model.
    """
    if not Path(options.checkpoint).is_file():
        raise ValueError(f"checkpoint {options.checkpoint!r} does not exist. Give a file that 'recbole-llm run' saved.")
    model, dataset, metrics = load_trained(options.checkpoint)
    if not hasattr(model, "item_vectors"):
        raise ValueError(f"checkpoint: {type(model).__name__} has no item vectors to export; LLMTwoTower has.")
    manifest = export_model(
        model,
        dataset,
        options.output,
        index=options.index,
        attributes=None if options.attributes is None else [part.strip() for part in options.attributes.split(",")],
        keep_text=not options.no_text,
        bundle_encoder=options.bundle_encoder,
        metrics=metrics,
        overlay_seq=options.overlay_seq,
    )
    size = sum(sums.bytes for sums in manifest.files.values())
    print(  # noqa: T201
        f"export {manifest.export_id}: {manifest.counts['items']} items, {manifest.counts['users']} users, "
        f"{manifest.dim} dimensions, {size / 1e6:.1f} MB in {options.output}\n"
        f"next: recbole-llm serve {options.output}"
    )
    return 0


def load_trained(checkpoint: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model in evaluation mode, dataset, and validation metrics of a RecBole checkpoint.

    The file is unpickled: it can run code, so it must be one's own.
    """
    from recbole.quick_start import load_data_and_model

    import recbole_llm  # noqa: F401  (registers the model)

    _, model, dataset, *_ = load_data_and_model(checkpoint)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    metrics = {"best_valid_score": float(saved["best_valid_score"])} if "best_valid_score" in saved else {}
    return model.eval(), dataset, metrics
