"""How a service is set up: keys, the database's password, proxies, limits."""

import argparse
import re
import resource
from pathlib import Path

import pytest
from made_export import make_contents
from made_service import key

from recbole_llm.commands import serve as command
from recbole_llm.export.writer import write_artifact
from recbole_llm.serving.settings import (
    KEYS_VARIABLE,
    PUBLIC_KEYS,
    STATE_VARIABLE,
    Settings,
    proxies_of,
    read_keys,
    state_of,
)

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "serving.md")


@pytest.fixture
def export(tmp_path):
    write_artifact(tmp_path / "export", make_contents())
    return tmp_path / "export"


def options_of(folder, *options):
    parser = argparse.ArgumentParser()
    command.add_serve_arguments(parser)
    return command.settings_of(parser.parse_args([str(folder), *options]))


# ------------------------------------------------------------------ keys


@pytest.mark.parametrize("example", sorted(PUBLIC_KEYS))
def test_a_key_that_a_readme_ever_showed_is_refused_by_name(example, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(f"read:{'r' * 20}\nwrite:{example}\n")
    with pytest.raises(ValueError, match=f"line 2: '{example}' is the example of the README"):
        read_keys(str(tmp_path / "keys"))
    monkeypatch.setenv(KEYS_VARIABLE, f"write:{example}")
    with pytest.raises(ValueError, match="openssl rand -hex 24"):
        read_keys(None)


def test_the_documentation_shows_no_key_that_would_be_taken(tmp_path):
    text = "".join(page.read_text() for page in PAGES)
    for number, line in enumerate(re.findall(r"\b(?:read|write):[^\s\"'`$(|]+", text)):
        (tmp_path / f"keys{number}").write_text(line)
        with pytest.raises(ValueError):
            read_keys(str(tmp_path / f"keys{number}"))
    assert "openssl rand -hex" in text and "change-me" not in text


@pytest.mark.parametrize("text", ["schlüssel-mit-umlaut", "ключ-из-шестнадцати", "🔑" * 16, "plain-ascii-key-of-20"])
def test_keys_in_any_script_are_taken_as_utf_8(text):
    settings = Settings(export="x", keys=(key("write", text),))
    assert settings.scope_of(text.encode()) == "write"
    assert settings.scope_of(text.encode()[:-1]) is None and settings.scope_of(b"") is None
    if max(map(ord, text)) < 256:  # what a browser's header can hold
        assert settings.scope_of(text.encode("latin-1")) == "write"


def test_keys_with_other_characters_over_http(start):
    text = "schlüssel-mit-umlaut"
    client = start(keys=(key("read", text),))
    for raw in (text.encode(), text.encode("latin-1")):
        for headers in ({"x-api-key": raw}, {"authorization": b"Bearer " + raw}):
            assert client.get("/v1/items/i1", headers=headers).status_code == 200
    assert client.get("/v1/items/i1", headers={"x-api-key": b"\xff\xfe" * 10}).status_code == 401


# ------------------------------------------------------------------ the database's password


def test_the_state_may_come_from_the_environment(export, monkeypatch, tmp_path):
    monkeypatch.setenv(STATE_VARIABLE, "postgresql://u:secret@h/db")
    assert options_of(export).state == "postgresql://u:secret@h/db"
    assert options_of(export, "--state", str(tmp_path)).state == str(tmp_path.resolve())
    monkeypatch.setenv(STATE_VARIABLE, "")
    assert options_of(export).state == f"{export}.state"


@pytest.mark.parametrize(
    ("given", "password", "whole"),
    [
        ("postgresql://postgres@db/postgres", "secret\n", "postgresql://postgres:secret@db/postgres"),
        ("postgres://u@h:5433/d?sslmode=require", "p", "postgres://u:p@h:5433/d?sslmode=require"),
        ("postgresql://u@h/d", "a/b@c:d %ü\r\n", "postgresql://u:a%2Fb%40c%3Ad%20%25%C3%BC@h/d"),
        ("postgresql://h/d", "p", "postgresql://:p@h/d"),
    ],
)
def test_the_password_may_come_from_a_file(tmp_path, given, password, whole):
    file = tmp_path / "password"
    file.write_bytes(password.encode())
    assert state_of(given, str(file)) == whole
    psycopg = pytest.importorskip("psycopg", reason="extra 'postgres'")
    parsed = psycopg.conninfo.conninfo_to_dict(whole)
    assert parsed["password"] == password.rstrip("\r\n") and parsed["dbname"] in ("postgres", "d")


@pytest.mark.parametrize("given", [None, "folder", "postgresql://u:p@h/d"])
def test_a_password_file_without_its_place_is_a_mistake(tmp_path, given, monkeypatch):
    monkeypatch.delenv(STATE_VARIABLE, raising=False)
    (tmp_path / "password").write_text("p")
    with pytest.raises(ValueError, match="postgresql://USER@HOST/DATABASE without a password"):
        state_of(given, str(tmp_path / "password"))


def test_an_empty_or_absent_password_file(tmp_path):
    (tmp_path / "password").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        state_of("postgresql://u@h/d", str(tmp_path / "password"))
    with pytest.raises(OSError):
        state_of("postgresql://u@h/d", str(tmp_path / "nowhere"))


def test_a_password_is_in_no_log_line():
    assert "secret" not in command._without_password("postgresql://u:secret@h/d")


# ------------------------------------------------------------------ proxies and limits


def test_trusted_proxies_are_addresses_and_networks(export):
    assert options_of(export).trusted_proxies == ()
    given = ["--trusted-proxy", "10.0.0.2", "--trusted-proxy", "fd00::/8", "--trusted-proxy", "10.0.0.2"]
    assert options_of(export, *given).trusted_proxies == ("10.0.0.2", "fd00::/8")
    for wrong in ("proxy.example", "*", "10.0.0.1/8", "", "10.0.0"):
        with pytest.raises(ValueError, match="--trusted-proxy"):
            proxies_of([wrong])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit-per-address", "-1"], "--limit-per-address is -1"),
        (["--rate", "-1"], "--rate is -1"),
        (["--rate", "nan"], "--rate is nan"),
        (["--limit-concurrency", "0"], "--limit-concurrency is 0"),
        (["--trusted-proxy", "x"], "--trusted-proxy is 'x'"),
    ],
)
def test_wrong_limits(export, options, message):
    with pytest.raises(ValueError, match=message):
        options_of(export, *options)


def test_settings_pass_to_workers_whole(export):
    settings = options_of(
        export,
        "--trusted-proxy",
        "10.0.0.2",
        "--limit-per-address",
        "7",
        "--map",
        "--limit-concurrency",
        "9",
        "--rate",
        "2",
    )
    assert Settings.from_json(settings.to_json()) == settings
    assert settings.mapped and settings.limits.connections == 9 and settings.limits.connections_per_address == 7


def test_connections_fit_into_the_files_that_may_be_opened(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    assert command._open_files_for(1000) == 1000 and asked == [(1264, 4096)]
    asked.clear()
    assert command._open_files_for(500) == 500 and asked == []
    assert command._open_files_for(10_000) == 4096 - 264 and asked == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, 100))
    with pytest.raises(ValueError, match="may open 100 files"):
        command._open_files_for(10)
