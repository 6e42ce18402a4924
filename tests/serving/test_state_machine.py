"""The service against a dictionary: puts, deletions, swaps and restarts in any order lose and invent nothing."""

import asyncio
import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from made_export import PATIENT, WordEncoder, make_contents
from waiting import LIMIT

pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("fastapi", reason="extra 'serve'")

from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Request
from recbole_llm.serving.item_writes import Writer
from recbole_llm.serving.schemas import ItemBody
from recbole_llm.serving.service import Service
from recbole_llm.serving.settings import Settings

# a trained item, an untrained one, two new ones: few, so that changes meet each other
IDS = st.sampled_from(["i0", "i39", "new", "a/b"])
TEXTS = st.sampled_from(["space story", "sea war", "love"])
N = 40


class Items(RuleBasedStateMachine):
    """``self.titles`` is what must be live; every deleted export item is in ``self.gone``."""

    folder: Path  # of exports, made once
    address: str | None = None  # of PostgreSQL, which then holds the log and answers searches

    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        self.state = tempfile.mkdtemp()
        search = "postgres" if self.address else "memory"
        self.place = {"state": self.address or self.state, "search": search, "limits": PATIENT}
        if self.address:
            import psycopg

            with psycopg.connect(self.address) as connection:
                connection.execute("DROP TABLE IF EXISTS item, counter")
        self.titles = {f"i{n}": f"Title {n}" for n in range(N)}
        self.count = itertools.count()
        self.export = "one"
        self.start()

    def run(self, work):
        return self.loop.run_until_complete(asyncio.wait_for(work, LIMIT))

    def start(self):
        place = self.folder / self.export
        self.service = Service(Settings(export=str(place), verify=False, **self.place), lambda f, m: WordEncoder())
        self.run(self.service.start())
        assert self.service.text.wait(LIMIT)
        self.writer = Writer(self.service)

    @rule(item_id=IDS, text=TEXTS, refit=st.booleans())
    def put(self, item_id, text, refit):
        title = f"Title of change {next(self.count)}"
        (written,) = self.run(self.writer.write([(item_id, ItemBody(title=title, text=text, refit=refit))]))
        assert written.created == (item_id not in self.titles)
        self.titles[item_id] = title

    @rule(item_id=IDS)
    def rename(self, item_id):
        title = f"Name of change {next(self.count)}"
        if item_id in self.titles:
            self.run(self.writer.write([(item_id, ItemBody(title=title))]))
            self.titles[item_id] = title

    @rule(item_id=IDS)
    def delete(self, item_id):
        try:
            self.run(self.writer.write([(item_id, None)]))
        except UnknownItemError:
            assert item_id not in self.titles
        self.titles.pop(item_id, None)

    @rule(name=st.sampled_from(["one", "two"]))
    def swap(self, name):
        self.service.settings = Settings(export=str(self.folder / name), verify=False, **self.place)
        swap = self.run(self.service.reload())
        self.export = name
        assert swap.after == self.service.export_id

    @rule()
    def restart(self):
        self.run(self.service.stop())
        self.start()

    @invariant()
    def answers_hold_what_is_live_and_nothing_else(self):
        if not hasattr(self, "service"):
            return
        answer = self.run(self.service.reader.recommend(Request(user="u1", k=1000, exclude_seen=False)))
        assert {item.id: item.title for item in answer.value.items} == self.titles
        assert answer.model == self.service.export_id
        counts = self.service.recommender.catalog.counts()
        assert counts["warm"] + counts["cold"] == len(self.titles)

    def teardown(self):
        if hasattr(self, "service"):
            self.run(self.service.stop())
            self.loop.close()
            shutil.rmtree(self.state)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    write_artifact(folder / "one", make_contents())
    write_artifact(folder / "two", make_contents(seed=5))
    return folder


@pytest.mark.parametrize(
    ("state", "examples"),
    [
        ("SQLite", 10),
        ("PostgreSQL", 4),
        pytest.param("SQLite", 100, marks=pytest.mark.slow),
        pytest.param("PostgreSQL", 30, marks=pytest.mark.slow),
    ],
)
def test_items(exports, monkeypatch, request, state, examples):
    # a full collection at every start: beside other tests' torch it takes most of the time, and changes no answer
    monkeypatch.setattr("recbole_llm.serving.service._freeze", lambda: None)
    monkeypatch.setattr("recbole_llm.serving.service._freeze_young", lambda: None)
    Items.folder = exports
    Items.address = request.getfixturevalue("postgres") if state == "PostgreSQL" else None
    run = settings(
        max_examples=examples,
        stateful_step_count=12,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Items, settings=run)
