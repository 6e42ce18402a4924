"""The log of changes: both kinds keep the same promises."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from waiting import join

from recbole_llm.serving.change_log import ChangeLogError, Delete, MemoryChangeLog, Put, SqliteChangeLog
from recbole_llm.serving.open_log import open_change_log

FEATURE = np.arange(4, dtype=np.float32)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def log(request, tmp_path):
    if request.param == "memory":
        log = MemoryChangeLog()
    elif request.param == "sqlite":
        log = SqliteChangeLog(tmp_path / "state")
    else:
        log = open_change_log(request.getfixturevalue("postgres"))
    yield log
    log.close()


def test_writes_come_back_in_order(log):
    assert log.write([Put("a", "A", "text", {"year": 1.0}, FEATURE, "f1", True), Put("b", "B")]) == [1, 2]
    assert log.write([Delete("b")]) == [3]
    a, b = log.since(0)
    assert (a.id, a.seq, a.deleted, a.title, a.text, a.attributes, a.fingerprint, a.refit) == (
        "a", 1, False, "A", "text", {"year": 1.0}, "f1", True,
    )  # fmt: skip
    np.testing.assert_array_equal(a.feature, FEATURE)
    assert a.feature.dtype == np.float32
    assert (b.id, b.seq, b.deleted, b.title) == ("b", 3, True, "B")
    assert [c.id for c in log.since(1)] == ["b"] and log.since(3) == []
    assert log.last_seq() == 3 and log.knows(["a", "b", "c"]) == {"a", "b"}


def test_what_a_put_leaves_out_stays(log):
    log.write([Put("a", "A", "text", {"kind": "x"}, FEATURE, "f1", True)])
    log.write([Delete("a")])
    log.write([Put("a", title="New")])
    (a,) = log.since(0)
    assert (a.seq, a.deleted, a.title, a.text, a.attributes, a.fingerprint, a.refit) == (
        3, False, "New", "text", {"kind": "x"}, "f1", True,
    )  # fmt: skip
    np.testing.assert_array_equal(a.feature, FEATURE)
    log.write([Put("a", attributes={})])
    assert log.since(0)[0].attributes == {}


def test_odd_ids(log):
    ids = ["", "a/b", "a'b", '"', "\n", "🎬", "x" * 256, "%s", "a\\b"]
    log.write([Put(i, i) for i in ids])
    assert [c.id for c in log.since(0)] == ids


def test_reload_requests(log):
    assert log.reload_asked() == (0, None)
    assert log.ask_reload("e2") == 1 and log.reload_asked() == (1, "e2")
    assert log.ask_reload(None) == 2 and log.reload_asked() == (2, None)


def test_a_transaction_is_all_or_nothing(tmp_path):
    log = SqliteChangeLog(tmp_path)
    log.write([Put("a", "A")])
    with pytest.raises(ChangeLogError):
        log.write([Put("b", "B"), Put("c", title=object())])
    assert [c.id for c in log.since(0)] == ["a"] and log.last_seq() == 1
    assert log.write([Put("d", "D")]) == [2]


def test_it_outlives_its_process_and_another_reads_it(tmp_path):
    first, second = SqliteChangeLog(tmp_path), SqliteChangeLog(tmp_path)
    first.write([Put("a", "A")])
    assert [c.id for c in second.since(0)] == ["a"]
    assert second.write([Put("b", "B")]) == [2] and first.last_seq() == 2
    first.close()
    second.close()
    assert [c.id for c in SqliteChangeLog(tmp_path).since(0)] == ["a", "b"]


def test_writers_at_once_never_share_a_seq(tmp_path):
    SqliteChangeLog(tmp_path).close()
    seqs = []

    def write(name):
        log = SqliteChangeLog(tmp_path)
        for n in range(30):
            seqs.extend(log.write([Put(f"{name}{n}", "x"), Put(f"{name}{n}b", "x")]))
        log.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    join(*threads)
    assert sorted(seqs) == list(range(1, 241))


def test_commits_reach_the_disk(tmp_path):
    log = SqliteChangeLog(tmp_path)
    assert log._run("PRAGMA journal_mode") == [("wal",)]
    assert log._run("PRAGMA synchronous") == [(2,)]  # FULL


def test_another_version_is_refused(tmp_path):
    log = SqliteChangeLog(tmp_path)
    log._run("UPDATE counter SET value = 99 WHERE name = 'schema'")
    log.close()
    with pytest.raises(ChangeLogError, match="schema 99"):
        SqliteChangeLog(tmp_path)
    assert not opened_in(tmp_path)


def opened_in(folder):
    """Files of a folder that this process holds open."""
    here = Path("/proc/self/fd")
    if not here.is_dir():
        pytest.skip("this system does not tell which files are open")
    return [link for link in here.iterdir() if str(folder) in os.path.realpath(link)]


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "overlay.sqlite3").write_bytes(b"not a database at all, but long enough to be read as one" * 50)
    with pytest.raises(ChangeLogError):
        SqliteChangeLog(tmp_path)
    assert not opened_in(tmp_path)


def test_the_next_change_comes_after_what_an_export_holds(log):
    log.write([Put("a", "A")])
    log.reach(7)
    log.reach(3)
    assert log.last_seq() == 7 and log.write([Put("b", "B"), Delete("a")], after=7) == [8, 9]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ChangeLogError):
        open_change_log(str(tmp_path / "file" / "state"))


WRITER = """
import sys
from recbole_llm.serving.change_log import Put, SqliteChangeLog
log = SqliteChangeLog(sys.argv[1])
n = log.last_seq()
while True:
    log.write([Put(f"i{n}", "t" * 500), Put(f"j{n}", "t" * 500)])
    print(n, flush=True)
    n += 1
"""


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    acknowledged = set()
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(40):
            acknowledged.add(int(writer.stdout.readline()))
        writer.kill()
        acknowledged.update(int(line) for line in writer.stdout.read().splitlines(True) if line.endswith("\n"))
        writer.wait()
        log = SqliteChangeLog(tmp_path)
        assert log._run("PRAGMA integrity_check") == [("ok",)]
        present = {c.id for c in log.since(0)}
        assert {f"{kind}{n}" for n in acknowledged for kind in "ij"} <= present
        assert len([p for p in present if p[0] == "i"]) == len(
            [p for p in present if p[0] == "j"]
        )  # whole transactions
        log.close()
    assert len(acknowledged) >= 240


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_an_error_and_reading_goes_on(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        log = SqliteChangeLog(folder)
        written = 0
        with pytest.raises(ChangeLogError):
            for n in range(1000):
                log.write([Put(f"i{n}", "t" * 2000)])
                written += 1
        assert 0 < written < 1000
        assert len(log.since(0)) == written == log.last_seq()
        log.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
