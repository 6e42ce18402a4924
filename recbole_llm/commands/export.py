"""``recbole-llm export``: a trained model as a folder of safe files."""

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.bridge.checkpoint_settings import add_history_argument, add_path_arguments, given_paths
from recbole_llm.checkpoints import load_run, newest_checkpoint
from recbole_llm.commands.model_argument import add_checkpoint_argument
from recbole_llm.export.export_model import DTYPES, IMAGES, INDEX_KINDS, export_model
from recbole_llm.export.model_tables import ModelTables
from recbole_llm.export.pooling import Pooling
from recbole_llm.reporting.words import quality_of
from recbole_llm.retrieval.search_index import build_search_index


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recbole-llm export``."""
    add_checkpoint_argument(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    add_path_arguments(parser)
    add_history_argument(parser)
    parser.add_argument("--index", choices=INDEX_KINDS, default="auto", help="auto: ivf above 300,000 items")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the vectors; int8: a quarter of the bytes"
    )
    parser.add_argument(
        "--rescore", action="store_true", help="with int8: keep the float32 vectors too, and score the best by them"
    )
    parser.add_argument("--attributes", default=None, metavar="A,B", help="item columns to show and filter by")
    parser.add_argument("--no-text", action="store_true", help="leave the items' texts out")
    parser.add_argument(
        "--images",
        choices=IMAGES,
        default="none",
        help="thumbs: small copies of the items' pictures go along, for the service and its page",
    )
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
    checkpoint = newest_checkpoint(options.checkpoint) or Path(options.checkpoint)
    if not checkpoint.is_file():
        raise ValueError(
            f"checkpoint {options.checkpoint!r} does not exist or holds none. Give a file that 'recbole-llm run' saved "
            "(saved/LLMTwoTower-....pth), or its folder."
        )
    metrics = _metrics(options.metrics)
    loaded = load_run(checkpoint, **given_paths(options))
    manifest = export_model(
        loaded.model,
        loaded.splits[0],
        options.output,
        index=options.index,
        attributes=None if options.attributes is None else [part.strip() for part in options.attributes.split(",")],
        keep_text=not options.no_text,
        bundle_encoder=options.bundle_encoder,
        onnx=options.onnx,
        metrics=metrics,
        overlay_seq=options.overlay_seq,
        build_index=build_index,
        quality=quality_of(loaded.state),
        history=options.history or "all",
        build_search_index=build_search_index,
        dtype=options.dtype,
        rescore=options.rescore,
        images=options.images,
    )
    size = sum(sums.bytes for sums in manifest.files.values())
    spec = manifest.encoder
    told = "\n".join([manifest.rows_known, *manifest.never_shown])
    texts = "" if spec is None or spec.bundled else f" --encoder {shlex.quote(spec.name)}"
    if manifest.pictures is not None:
        texts += f" --image-encoder {shlex.quote(manifest.pictures.name)}"
    print(
        f"export {manifest.export_id}: {manifest.counts['items']} items, {manifest.counts['users']} users, "
        f"{manifest.dim} dimensions, {size / 1e6:.1f} MB in {options.output}\n{told}\n"
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


def build_index(tables: ModelTables, history: Any) -> tuple[Mapping[str, Any], bytes]:
    """Build an IVF index of the items, its probes chosen by queries of the training users.

    Args:
        tables: of the model.
        history: training items of every user, :class:`recbole_llm.scoring.rows.Rows` on the CPU.
    """
    from recbole_llm.retrieval.candidates import sample_queries
    from recbole_llm.retrieval.ivf import build_index as build

    items = history.ids.numpy() - 1
    weight = np.ones(len(items), np.float32) if history.weights is None else history.weights.numpy()
    pooling = Pooling(tables.blocks, tables.offset, tables.sequence)
    queries = sample_queries(pooling, tables.source, history.offsets.numpy()[1:], items, weight, tables.history_rank)
    return build(tables.vector, tables.bias, queries)
