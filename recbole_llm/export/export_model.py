"""Make an export from a trained model.

This module and ``model_tables`` load torch; the reader and the arithmetic do not.

A model is anything with the methods and attributes of ``LLMTwoTower`` that are read here; RecBole is not imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recbole_llm.content.encoders.function import FunctionEncoder
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.store.feature_table import fit_transform
from recbole_llm.content.text import default_template
from recbole_llm.export.item_pictures import small_pictures
from recbole_llm.export.item_records import item_records
from recbole_llm.export.item_sounds import sounds_of
from recbole_llm.export.manifest import Block, EncoderSpec, ItemText, Manifest
from recbole_llm.export.model_card import model_card
from recbole_llm.export.model_tables import ModelTables, content_blocks, search_tables, tables_of, text_space
from recbole_llm.export.profile_map import ProfileMap
from recbole_llm.export.reader import ItemRecord
from recbole_llm.export.search_tables import SearchTables, TextSpace, plain
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.writer import ExportContents, write_artifact
from recbole_llm.fitting.data import TrainingData
from recbole_llm.scoring.rows import Rows

DTYPES = ("float32", "int8")
IMAGES = ("none", "thumbs")
INDEX_KINDS = ("auto", "exact", "ivf")
# above this exact scoring takes tens of milliseconds a request on one core
EXACT_UP_TO = 300_000

log = getLogger(__name__)

IndexBuilder = Callable[[ModelTables, Rows], tuple[Mapping[str, Any], bytes]]
"""Tables and training histories -> an index's description for the manifest, and its bytes."""
SearchIndexBuilder = Callable[[np.ndarray, np.ndarray | None], bytes]
"""Directions of the texts and of the titles -> an index's bytes."""


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
    build_index: IndexBuilder | None = None,
    build_search_index: SearchIndexBuilder | None = None,
    history: str = "all",
    quality: Sequence[str] = (),
    dtype: str = "float32",
    rescore: bool = False,
    images: str = "none",
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
        build_index: makes the index where there is to be one (``recbole_llm.commands.export.build_index``).
        build_search_index: makes that of searches in the same case
            (``recbole_llm.retrieval.search_index.build_search_index``); ``None``: they compare every item.
        history: ``all`` interactions of the data set are the users' histories, and what they have seen; or ``train``.
        quality: lines of the model card's section on quality (``recbole_llm.reporting.words.card``).
        dtype: of the vectors of items and users, ``float32`` or ``int8``, a quarter of the bytes.
        rescore: with ``int8``, keep the float32 vectors in a file of their own, by which the best are scored again.
        images: ``thumbs``: small copies of the items' pictures go along; ``none``: no picture.

    Returns:
        The manifest.

    Raises:
        ValueError: if the output exists, the model cannot be expressed, or a column is unknown.
    """
    if index not in INDEX_KINDS:
        raise ValueError(f"index is {index!r}; expected one of {', '.join(INDEX_KINDS)}.")
    _check_dtype(dtype, rescore, onnx)
    if images not in IMAGES:
        raise ValueError(f"images is {images!r}; expected one of {', '.join(IMAGES)}.")
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
        bundle_encoder=bundle_encoder or holds_tuned_text(model),
        metrics=metrics,
        overlay_seq=overlay_seq,
        build_index=build_index,
        build_search_index=build_search_index,
        history=history,
    )
    _refuse_direct_graphs(contents.direct, onnx)
    contents = under_names_of_bases(contents, model)
    thumbnails = small_pictures(dataset) if images == "thumbs" else None
    contents = replace(contents, thumbnails=thumbnails)
    card = model_card(contents, getattr(dataset, "dataset_name", ""), quality)
    manifest = write_artifact(output, replace(contents, card=card, onnx=onnx, dtype=dtype, rescore=rescore))
    counts = manifest.counts
    log.info("Exported %d items and %d users as %s to %s", counts["items"], counts["users"], manifest.export_id, output)
    return manifest


def holds_tuned_text(model: Any) -> bool:
    """Whether the encoder of a model's texts was fine-tuned: no other place has it, so that it goes along."""
    tuned = getattr(model, "tuned", None)
    return tuned is not None and tuned.modality == "text"


def under_names_of_bases(contents: ExportContents, model: Any) -> ExportContents:
    """Name fine-tuned encoders by their bases, and no folder of this machine; their fingerprints stay the tuned ones'."""
    tuned = getattr(model, "tuned", None)
    if tuned is None:
        return contents
    if tuned.modality == "text":
        log.info("The fine-tuned encoder of the texts goes along, merged with its base")
        spec = contents.encoder
        named = None if spec is None else replace(spec, name=model.options.encoder)
        return replace(contents, encoder=named)
    pictures = contents.pictures
    if pictures is None:
        return contents
    log.warning(
        "The encoder of the pictures was fine-tuned, and an export holds none of pictures: serve with --image-encoder %s",
        pictures.name,
    )
    return replace(contents, pictures=replace(pictures, name=model.options.item_modalities["image"].encoder))


def _check_dtype(dtype: str, rescore: bool, onnx: bool) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    if rescore and dtype == "float32":
        raise ValueError(
            "rescore belongs to dtype int8: vectors that are float32 already are what scores. Leave it out."
        )
    if onnx and dtype != "float32":
        raise ValueError(
            f"onnx needs dtype float32, and dtype is {dtype!r}: the graphs read float32 vectors. Leave one out."
        )


def _refuse_direct_graphs(direct: Mapping[int, Any], onnx: bool) -> None:
    if direct and onnx:
        raise ValueError(
            "onnx: the graphs hold products of vectors, and direct rows between items add to this model's scores. Leave onnx "
            "out, or set closed_form_dim to a rank, which has vectors alone."
        )


def contents_of(
    model: Any,
    dataset: Any,
    *,
    index: str = "exact",
    attributes: Sequence[str] | None = None,
    keep_text: bool = False,
    bundle_encoder: bool = False,
    map_texts: bool = True,
    map_pictures: bool = True,
    map_sounds: bool = True,
    metrics: Mapping[str, Any] | None = None,
    overlay_seq: int = 0,
    build_index: IndexBuilder | None = None,
    build_search_index: SearchIndexBuilder | None = None,
    history: str = "all",
) -> ExportContents:
    """Collect what an export of a trained model holds, without its card.

    Args:
        model: as for :func:`export_model`, like the rest.
        dataset: the dataset it was made from.
        index: kind of the index.
        attributes: columns of the item file to show and filter by.
        keep_text: whether the items' texts go along.
        bundle_encoder: whether the encoder's files go along.
        map_texts: whether new texts can be placed; needs the encoder's files and the vectors of all texts.
        map_pictures: whether pictures can be asked for, of a model that has some; needs their encoder's files and the vectors.
        map_sounds: whether sounds can be asked for; likewise.
        metrics: for the model card.
        overlay_seq: last change of the service's log that the training data held already.
        build_index: as there.
        build_search_index: as there.
        history: as there.

    Raises:
        ValueError: if the model cannot be expressed, or a column is unknown.
    """
    tuned = getattr(model, "tuned", None)
    if tuned is not None:
        dataset.take_tuned(tuned)
    options = model.options if tuned is None else dataset.options  # these name the fine-tuned encoder
    data = model.training_data()
    score = replace(model.score, content=content_blocks(data))
    known = model.known(dataset, history)
    tables = tables_of(score, data, model.n_users, options.cold_map != "none", known.history)
    item_ids, user_ids = _tokens(dataset, dataset.iid_field), _tokens(dataset, dataset.uid_field)
    items = item_records(options, dataset, item_ids, attributes, keep_text)
    encoder = _encoder(options) if map_texts else None
    spec = None if encoder is None else _encoder_spec(encoder, options, bundle_encoder)
    transform = None if encoder is None else _text_transform(items.texts, options, encoder)
    text_map = _text_map(tables, options, transform) if map_texts else None
    pictures = _pictures(tables, data, dataset, options) if map_pictures else None
    sounds = sounds_of(data, dataset, options) if map_sounds else None
    profiles = _profiles(model, dataset, tables.blocks) if map_texts else None
    if spec is None and profiles is not None:  # of the users alone
        encoder = dataset.text_encoder()
        spec = _encoder_spec(encoder, options, bundle_encoder)
    search = _search_tables(data, item_ids, items.records, options, encoder, transform)
    search = replace(
        search,
        picture_space=None if pictures is None else pictures.space,
        sound_space=None if sounds is None else sounds.space,
        sound_text_space=None if sounds is None else sounds.of_texts,
    )
    if search.titles is not None and not keep_text:
        log.warning("Without the items' texts, a search looks for words in their titles alone.")
    rows = known.history.to("cpu")
    offsets = rows.offsets.numpy()
    if int(offsets[1]) != 0:
        raise ValueError("The padding user has a history; the model's history is not in the dataset's order.")
    disliked = None if known.disliked is None else known.disliked.to("cpu")
    return ExportContents(
        item_ids=item_ids,
        user_ids=user_ids,
        records=items.records,
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
        history_items=rows.ids.numpy() - 1,
        history_weight=None if rows.weights is None else rows.weights.numpy(),
        history_rank=tables.history_rank,
        disliked_offsets=None if disliked is None else disliked.offsets.numpy()[1:],
        disliked_items=None if disliked is None else disliked.ids.numpy() - 1,
        content=tables.content,
        sequence=tables.sequence,
        direct=tables.direct,
        search=search,
        search_index=_search_index(index, tables, search, build_search_index),
        probability=tables.probability,
        text_map=text_map,
        encoder=spec,
        pictures=None if pictures is None else pictures.encoder,
        picture_map=None if pictures is None else pictures.map,
        sounds=None if sounds is None else sounds.encoder,
        encoder_files=_encoder_files(encoder) if bundle_encoder and encoder is not None else {},
        item_text=items.item_text,
        profile_map=None if profiles is None else profiles[0],
        profile_text=None if profiles is None else profiles[1],
        attributes=items.kinds,
        history_decay=options.history_decay,
        overlay_seq=overlay_seq,
        fitted_interactions=known.fitted,
        never_shown=(*model.never_shown(), items.unread),
        index=_index(index, tables, rows, build_index),
        metrics=dict(metrics or {}),
        producer={"torch": torch.__version__, "dataset": str(getattr(dataset, "dataset_name", "")) or "unnamed"},
    )


def _tokens(dataset: Any, field: str) -> list[str]:
    return [str(token) for token in dataset.field2id_token[field][1:]]


# ------------------------------------------------------------------ texts to vectors


def _encoder(options: Any) -> Any | None:
    if not options.text_encoder:
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
    if isinstance(encoder, FunctionEncoder):
        raise ValueError(
            f"bundle_encoder: the encoder {encoder.name!r} is a function, and an export holds no code. Leave bundle_encoder out, "
            f"and name the function where the export is read: --encoder {encoder.name}."
        )
    folder = Path(encoder.files.folder)
    kept = {".safetensors", ".json", ".txt", ".model"}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in kept and len(path.relative_to(folder).parts) <= 2
    }


_Transform = tuple[torch.Tensor, torch.Tensor | None]


def _text_transform(texts: Sequence[str | None], options: Any, encoder: Any) -> _Transform:
    """What the model's text vectors went through, as :func:`fit_transform` says it."""
    store = FeatureStore(options.feature_cache_dir)
    raw = encode_texts([None, *texts], encoder, store, batch_size=options.encoder_batch_size)
    return fit_transform(raw, options.feature_transform)


def _text_map(tables: ModelTables, options: Any, transform: _Transform | None) -> TextMap | None:
    """The map from raw text vectors, ``None`` where new texts cannot be placed."""
    if tables.cold_map is None or transform is None:
        reason = "vectors of its items come from a file" if "text" in options.feature_files else "it has no cold map"
        log.warning("Items cannot be added by their text: %s.", reason)
        return None
    return tables.map_of("text", *transform)


def _search_tables(
    data: TrainingData,
    item_ids: Sequence[str],
    records: Sequence[ItemRecord],
    options: Any,
    encoder: Any | None,
    transform: _Transform | None,
) -> SearchTables:
    """What searches need beside the content; titles only where there is an encoder for them and for what is asked."""
    if encoder is None or transform is None or "text" not in data.content:
        return search_tables(data, None, None, None)
    titles = [plain(record.title) for record in records]
    named = np.array([record.title != item_id for record, item_id in zip(records, item_ids, strict=True)])
    store = FeatureStore(options.feature_cache_dir)
    vectors = encode_texts(titles, encoder, store, batch_size=options.encoder_batch_size).vectors.numpy()
    return search_tables(data, text_space(data, *transform), vectors, named)


class _Pictures(NamedTuple):
    """The encoder of the items' pictures, the way of its vectors into the space of the content, and their map to items."""

    encoder: EncoderSpec
    space: TextSpace
    map: TextMap | None


def _pictures(tables: ModelTables, data: TrainingData, dataset: Any, options: Any) -> _Pictures | None:
    source = (options.item_modalities or {}).get("image")
    if source is None or "image" not in data.content:
        return None
    raw = dataset.picture_vectors()
    spec = EncoderSpec(source.encoder, None, {}, raw.dim, raw.fingerprint)
    transform = fit_transform(raw, options.feature_transform)
    return _Pictures(spec, text_space(data, *transform, "image"), tables.map_of("image", *transform))


def _profiles(model: Any, dataset: Any, blocks: Sequence[Block]) -> tuple[ProfileMap, ItemText] | None:
    """What a user's own text adds to a query, and the columns that make it; ``None`` where the model reads none."""
    adapter = model.user_tower.adapter
    if adapter is None:
        return None
    at = next((at for at, block in enumerate(blocks) if block.name == "learned"), None)
    if at is None:
        log.warning("Nobody can be asked for by a profile: the block that reads texts of users has no weight.")
        return None
    center, transform = fit_transform(dataset.profile_vectors(), model.options.feature_transform)
    *hidden, last = [adapter] if isinstance(adapter, torch.nn.Linear) else [adapter[0], adapter[-1]]
    plain_array = lambda values: np.ascontiguousarray(values.detach().float().cpu().numpy())  # noqa: E731
    profile_map = ProfileMap(
        first=sum(block.dim for block in blocks[:at]),
        center=plain_array(center),
        transform=None if transform is None else plain_array(transform),
        hidden=plain_array(hidden[0].weight.T) if hidden else None,
        hidden_bias=plain_array(hidden[0].bias) if hidden else None,
        weight=plain_array(last.weight.T),
    )
    fields = dataset.profile_fields()
    return profile_map, ItemText(fields, default_template(fields))


def _search_index(
    kind: str, tables: ModelTables, search: SearchTables, build: SearchIndexBuilder | None
) -> bytes | None:
    if build is None or "text" not in tables.content or not _needs_index(kind, len(tables.vector)):
        return None
    return build(tables.content["text"], search.titles)


def _needs_index(kind: str, n_items: int) -> bool:
    return kind == "ivf" or (kind == "auto" and n_items > EXACT_UP_TO)


def _index(
    kind: str, tables: ModelTables, history: Rows, build: IndexBuilder | None
) -> tuple[Mapping[str, Any], bytes] | None:
    if not _needs_index(kind, len(tables.vector)):
        return None
    if build is None:
        raise ValueError(
            f"index is {kind!r} and {len(tables.vector)} items need one, but build_index is None. Give "
            "recbole_llm.commands.export.build_index, or index='exact'."
        )
    return build(tables, history)
