"""Vectors that another server searches: the answers are those of scoring everything, whatever the server does."""

import argparse
import os
from dataclasses import replace

import numpy as np
import pytest
from made_export import WordEncoder, make_contents

from recbole_llm.commands.serve import add_serve_arguments, settings_of
from recbole_llm.export.reader import ItemRecord, load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.remote import SearchError
from recbole_llm.retrieval.servers import remote_retriever

N = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "export"
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 10)).astype(np.float32)
    vector = (centres[rng.integers(0, 20, N)] + 0.3 * rng.standard_normal((N, 10))).astype(np.float32)
    listed = np.arange(N) % 7 != 3
    write_artifact(folder, make_contents(n_items=N, n_users=40, vector=vector, source=vector.copy(), listed=listed))
    return folder


@pytest.fixture(params=["pgvector", "pgvector index", "qdrant"])
def make(request):
    """What makes a retriever on an empty server."""
    if request.param.startswith("pgvector"):
        from recbole_llm.retrieval.pgvector import PgVectorRetriever

        address = request.getfixturevalue("postgres")
        limit = 100 if request.param.endswith("index") else N
        yield lambda export, catalog: PgVectorRetriever(export, catalog, address, exact_up_to=limit)
        return
    qdrant_client = pytest.importorskip("qdrant_client", reason="extra 'qdrant'")
    from recbole_llm.retrieval.qdrant import QdrantRetriever

    url = os.environ.get("QDRANT_URL")
    client = qdrant_client.QdrantClient(url=url) if url else qdrant_client.QdrantClient(":memory:")
    yield lambda export, catalog: QdrantRetriever(export, catalog, client)
    for collection in client.get_collections().collections:
        if collection.name.startswith("recbole_llm_"):
            client.delete_collection(collection.name)


@pytest.fixture
def pair(folder, make):
    export = load_export(folder)
    remote = Recommender(export, make)
    yield remote, Recommender(export)
    remote._retriever = None


def same(pair, share=1.0, **request):
    shares = []
    for user in range(0, 40, 2):
        got, wanted = (r.recommend(Request(user=f"u{user}", **request)) for r in pair)
        assert len(got.items) == len(wanted.items)
        scores = {item.id: item.score for item in wanted.items}
        assert all(item.score == scores[item.id] for item in got.items if item.id in scores)
        shares.append(len(scores.keys() & {item.id for item in got.items}) / max(len(scores), 1))
    assert np.mean(shares) >= share, np.mean(shares)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"exclude_seen": False, "k": 40},
        {"exclude": [f"i{n}" for n in range(300)]},
        {"filter": {"kind": ["farm", "sea"]}},
        {"filter": {"year": {"lt": 1990}}},
        {"k": 1000},
        {"explain": 3},
    ],
    ids=["plain", "large k", "exclusions", "filter", "narrow filter", "everything", "reasons"],
)
def test_answers_are_those_of_scoring_everything(pair, request_):
    retriever = pair[0]._retriever
    indexed = getattr(retriever, "lists", 0) > 0
    same(pair, 0.95 if indexed else 1.0, **request_)
    if indexed:
        assert retriever.recall >= 0.99 and 1 <= retriever.probes <= retriever.lists


def test_deletions_and_new_items(pair):
    remote, local = pair
    request = Request(items=["i1"], k=20)
    first = [item.id for item in local.recommend(request).items]
    new = remote.map_text(WordEncoder().encode(["space"])[0][0])
    top = replace(new, vector=local.catalog.vector(np.array([int(first[0][1:])]))[0] * 2, bias=50.0)
    for recommender in pair:
        recommender.catalog.delete(first[0])
        recommender.catalog.put("new", ItemRecord("New", None, {}), top)
    assert remote.recommend(request).items[0].id == "new"
    same(pair, 0.95)
    assert first[0] not in {item.id for item in remote.recommend(request).items}


def test_a_second_replica_finds_the_vectors_there(folder, make, caplog):
    import logging

    export = load_export(folder)
    with caplog.at_level(logging.INFO, logger="recbole_llm.retrieval"):
        first = Recommender(export, make)
        assert "Copied 514 vectors" in caplog.text
        caplog.clear()
        second = Recommender(export, make)
        assert "Copied" not in caplog.text
    request = Request(user="u1")
    assert first.recommend(request) == second.recommend(request)


def test_a_server_that_goes_away_costs_time_and_no_answer(pair, monkeypatch, caplog):
    remote, _ = pair
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise SearchError("gone.")

    monkeypatch.setattr(remote._retriever, "ranked", fail)
    same(pair)
    assert len(calls) == 1 and "gone. Every item is scored here" in caplog.text  # not asked again for seconds


def test_old_exports_leave_the_database(folder, tmp_path, postgres):
    import psycopg

    from recbole_llm.retrieval.pgvector import PgVectorRetriever

    for seed in (1, 2, 3):
        write_artifact(tmp_path / str(seed), make_contents(seed=seed))
        retriever = Recommender(
            load_export(tmp_path / str(seed)), lambda export, catalog: PgVectorRetriever(export, catalog, postgres)
        )._retriever
    with psycopg.connect(postgres) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'vectors\\_%'").fetchall()
    assert len(tables) == 3 and (retriever.table,) in tables  # two exports, and the table that describes them


def test_servers_that_are_not_there(folder):
    export = load_export(folder)
    pytest.importorskip("psycopg", reason="extra 'postgres'")
    with pytest.raises(SearchError, match="PostgreSQL"):
        Recommender(export, remote_retriever("postgres", "postgresql://nobody:secret@127.0.0.1:1/x"))
    pytest.importorskip("qdrant_client", reason="extra 'qdrant'")
    with pytest.raises(SearchError, match="Qdrant"):
        Recommender(export, remote_retriever("http://127.0.0.1:1", None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "postgres"], "needs --state postgresql://"),
        (["--search", "elsewhere"], "expected memory, postgres, or the http:// address"),
    ],
)
def test_mistakes_are_named(folder, options, message):
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    with pytest.raises(ValueError, match=message):
        settings_of(parser.parse_args([str(folder), *options]))
    address = ["--search", "postgres", "--state", "postgresql://a@b/c"]
    assert settings_of(parser.parse_args([str(folder), *address])).search == "postgres"
