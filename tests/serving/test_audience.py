"""Who should get an item: the same scores as users' own answers, the likeliest users of all, each item in one pass."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from made_export import WordEncoder, make_contents

from recbole_llm import cli
from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.manifest import Block
from recbole_llm.export.writer import write_artifact
from recbole_llm.recommend import recommend_users
from recbole_llm.retrieval import audience
from recbole_llm.retrieval.audience import AskedItem, described_items, known_items, top_users
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import Boost, Diversity, Exploration, Rules
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.serving import text as serving_text

MAP = ProbabilityMap(-1.0, 0.25, 0.4, -0.5, (2.0, 0.5), (0.5,))
FADING = (Block("closed_form", 6, 0.0, 0.7, decay=3.0), Block("learned", 4, 0.5, 1.3, "cosine"))


def made(case):
    contents = make_contents(n_users=40, probability=MAP, user_part=case == "user part")
    if case == "cosine":
        contents = make_contents(n_users=40, scoring="cosine", probability=MAP)
    if case == "fading":
        contents = replace(contents, blocks=FADING, history_rank=np.arange(len(contents.history_items)) % 5)
    if case == "disliked":
        bounds = np.concatenate([[0], np.cumsum(np.arange(40) % 3)])
        items = np.concatenate([np.arange(n % 3) * 7 for n in range(40)]).astype(np.int32)
        contents = replace(contents, disliked_offsets=bounds, disliked_items=items)
    return export_in_memory(contents)


def of_answers(export, item_id, exclude_seen):
    """The same by each user's whole ranking."""
    recommender, found = Recommender(export), []
    for number, user in enumerate(export.user_ids):
        answer = recommender.recommend(Request(user=user, k=len(export.item_ids), exclude_seen=exclude_seen))
        found += [(-item.probability, number, user, item.score) for item in answer.items if item.id == item_id]
    return [(user, score, -chance) for chance, _, user, score in sorted(found)]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("case", ["plain", "user part", "cosine", "fading", "disliked"])
def test_users_are_those_whose_own_answers_say_so(case, exclude_seen, monkeypatch):
    monkeypatch.setattr(audience, "ENTRIES", 11)  # many passes of few users
    monkeypatch.setattr(audience, "CELLS", 50)
    monkeypatch.setattr(audience, "ITEMS", 2)
    export, wanted = made(case), ["i3", "i39", "i0", "i7", "i3"]
    found = list(top_users(export, known_items(export, wanted), 15, exclude_seen=exclude_seen))
    for item_id, users in zip(wanted, found, strict=True):
        expected = of_answers(export, item_id, exclude_seen)
        assert [user.user for user in users] == [user for user, _, _ in expected[:15]]
        got = [value for user in users for value in (user.score, user.probability)]
        assert got == pytest.approx([value for row in expected[:15] for value in row[1:]], rel=1e-4, abs=1e-5)
    everybody = next(top_users(export, known_items(export, ["i3"]), 1000, exclude_seen=exclude_seen))
    assert len(everybody) == len(of_answers(export, "i3", exclude_seen))
    if case == "disliked":
        haters = {export.user_ids[n] for n in range(40) if n % 3 == 2}  # whose second dislike is i7
        assert not haters & {user.user for user in found[3]}


def test_an_item_known_by_its_text_alone():
    export = made("plain")
    vectors, _ = WordEncoder().encode(["space farm", "sea"])
    asked = described_items(export, ["new", "other"], ["New", "Other"], vectors)
    mapped = Recommender(export).map_text(vectors[0])
    np.testing.assert_allclose(asked[0].vector, mapped.vector, rtol=1e-6)
    assert asked[0].bias == pytest.approx(mapped.bias) and asked[0].cold and asked[0].row is None
    users = list(top_users(export, asked, 40))
    recommender = Recommender(export)
    from recbole_llm.export.reader import ItemRecord

    recommender.catalog.put("new", ItemRecord("New", None, {}), mapped)
    for user in users[0][:10]:
        answer = recommender.recommend(Request(user=user.user, k=41, exclude_seen=False))
        assert [item.score for item in answer.items if item.id == "new"] == pytest.approx([user.score], rel=1e-4)
    assert [len(of) for of in users] == [40, 40]


def test_mistakes_in_python():
    export = made("plain")
    with pytest.raises(UnknownItemError, match="'x', 'y'"):
        known_items(export, ["i1", "x", "y"])
    with pytest.raises(ValueError, match="k is 0"):
        list(top_users(export, known_items(export, ["i1"]), 0))
    with pytest.raises(ValueError, match="places no items by their texts"):
        described_items(replace(export, text_map=None), ["a"], ["a"], np.zeros((1, 16), np.float32))
    assert list(top_users(export, [], 5)) == []
    nobody = replace(export, user_ids=[], history_offsets=np.zeros(1, np.int64), history_items=np.zeros(0, np.int32))
    assert list(top_users(nobody, [AskedItem("a", "a", export.vector[0], 0.0)], 5)) == [[]]


@pytest.fixture
def words(monkeypatch):
    monkeypatch.setattr(serving_text, "TransformerEncoder", lambda *arguments: WordEncoder())


def test_the_command(export, export_folder, tmp_path, capsys, words):
    expected = list(top_users(export, known_items(export, ["i3", "i9"]), 4))
    assert cli.main(["recommend", str(export_folder), "--for-item", "i3,i9", "--top-users", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "item i3: Title 3" and lines[5] == "item i9: Title 9"
    assert [line.split()[1] for line in lines[1:5]] == [user.user for user in expected[0]]

    target = tmp_path / "who.jsonl"
    (tmp_path / "ids.txt").write_text("i3\ni9\n")
    arguments = ["--items-file", str(tmp_path / "ids.txt"), "--top-users", "4", "--output", str(target)]
    assert cli.main(["recommend", str(export_folder), *arguments]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["item"], row["rank"], row["user"]) for row in rows] == [
        (item, rank, user.user)
        for item, users in zip(("i3", "i9"), expected, strict=True)
        for rank, user in enumerate(users, 1)
    ]
    assert [row["probability"] for row in rows] == pytest.approx([u.probability for of in expected for u in of])

    assert cli.main(["recommend", str(export_folder), "--text", "space farm", "--top-users", "3"]) == 0
    of_text = list(top_users(export, described_items(export, ["t"], ["t"], WordEncoder().encode(["space farm"])[0]), 3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-3:]] == [user.user for user in of_text[0]]


def test_the_items_that_are_asked_for_are_each_told_once(tmp_path, capsys):
    contents = make_contents(n_users=3)
    everybody = replace(
        contents, item_ids=["a,b", *contents.item_ids[1:]], history_offsets=np.array([0, 1, 2, 3]),
        history_items=np.array([7, 7, 7]), history_weight=None, listed=np.arange(40) != 20,
    )  # fmt: skip
    write_artifact(tmp_path / "export", everybody)

    def asked(*arguments):
        assert cli.main(["recommend", str(tmp_path / "export"), "--top-users", "1", *arguments]) == 0
        said = capsys.readouterr()
        return [line.split(":")[0] for line in said.out.splitlines() if line.startswith("item ")], said.err

    assert asked("--for-item", "i3", "--for-item", "i9", "i3")[0] == ["item i3", "item i9"]
    assert asked("--for-item", "a,b")[0] == ["item a,b"]
    assert asked("--for-item", "i3,i4")[0] == ["item i3", "item i4"]
    items, said = asked("--for-item", "i3", "nothing", "--skip-unknown")
    assert items == ["item i3"] and "unknown items skipped: 1 ('nothing')" in said
    items, said = asked("--for-item", "i3", "i20", "--skip-unknown")
    assert items == ["item i3"] and "does not rank skipped: 1 ('i20')" in said
    assert cli.main(["recommend", str(tmp_path / "export"), "--for-item", "i3", "i20"]) == 2
    assert "the model does not rank the items 'i20'" in capsys.readouterr().err
    items, said = asked("--for-item", "i7", "i8")
    assert items == ["item i7", "item i8"] and "items that nobody is left for: 1 ('i7')" in said


def test_a_table_of_new_items_is_scored_at_once(export, export_folder, tmp_path, capsys, words):
    pytest.importorskip("pyarrow", reason="needs the extra 'import'")
    file = tmp_path / "new.csv"
    file.write_text("\ufeffItem_ID;Title;Genre\nn1;space <b>farm</b>;sea\nn2;love;\n", encoding="utf-8")
    target = tmp_path / "who.csv"
    arguments = ["--items-file", str(file), "--top-users", "2", "--output", str(target)]
    assert cli.main(["recommend", str(export_folder), *arguments]) == 0
    texts = ["space farm. Genre: sea", "love"]
    asked = described_items(export, ["n1", "n2"], texts, WordEncoder().encode(texts)[0])
    expected = list(top_users(export, asked, 2))
    rows = list(csv.DictReader(target.open(newline="")))
    assert [(row["item"], row["title"], row["user"]) for row in rows] == [
        (item, title, user.user)
        for item, title, users in zip(("n1", "n2"), ("space farm", "love"), expected, strict=True)
        for user in users
    ]
    file.write_text("sku,colour\nn1,red\n")
    assert cli.main(["recommend", str(export_folder), *arguments]) == 2
    assert "has the columns sku, colour, and an item's text is made of title, genre" in capsys.readouterr().err
    file.write_text("sku,title\nn1,\n")
    assert cli.main(["recommend", str(export_folder), *arguments]) == 2
    assert "line 2 (n1) has no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-users", "5"], "say which item somebody should get"),
        (["--top-users", "0", "--for-item", "i1"], "--top-users is 0"),
        (["--for-item", "nothing"], "no item of the data has the id 'nothing'"),
        (["--for-item", ","], "names no id"),
        (["--text", " ", "--top-users", "5"], "text is empty"),
        (["--users", "u1", "--top-users", "5"], "say which item somebody should get"),
        (["--users", "u1", "--include-new", "11"], "--include-new is 11; expected 0 to 10"),
        (["--items", "i1", "--include-new", "1"], "--include-new belongs to --users"),
        (["--for-item", "i1", "--filter", "kind=sea", "--cap", "kind=1"], "--filter, --cap: this is of lists of items"),
        (["--for-item", "i1", "--k", "3"], "--k: this is of lists of items"),
        (["--text", "sea", "--top-users", "2", "--by", "chance"], "--by: this is of lists of items"),
        (["--for-item", "i1", "--in", "text"], "--in: this is of lists of items"),
        (["--for-item", "I1"], "has the id 'I1' (did you mean 'i1'?)"),
    ],
)
def test_mistakes_are_named(export_folder, arguments, message, capsys):
    assert cli.main(["recommend", str(export_folder), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("least", [-1, 6])
def test_no_more_new_items_are_asked_for_than_items(export, least):
    with pytest.raises(ValueError, match=f"include_new is {least}"):
        list(recommend_users(export, ["u1"], k=5, include_new=least))


@pytest.mark.parametrize("least", [1, 2, 3])
def test_new_items_are_among_a_users_items(export, least):
    new = set(np.array(export.item_ids)[~export.trained])
    plain, found = ({} for _ in range(2))
    for into, include in ((plain, 0), (found, least)):
        for row in recommend_users(export, k=5, include_new=include):
            into.setdefault(row.user, []).append(row)
    lacking = 0
    for user, rows in plain.items():
        got, cold = found[user], sum(row.item in new for row in rows)
        assert sum(row.item in new for row in got) >= least and len(got) == 5 and len({row.item for row in got}) == 5
        assert [row.rank for row in got] == [1, 2, 3, 4, 5]
        assert [row.score for row in got] == sorted((row.score for row in got), reverse=True)
        if cold >= least:
            assert got == rows
        else:
            lacking += 1
            kept = [row.item for row in rows if row.item not in new][: 5 - least]
            assert [row.item for row in got if row.item not in new] == kept
    assert lacking


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize(
    "rules",
    [
        Rules(caps={"kind": 1}),
        Rules(caps={"genre": 2}),
        Rules(diversity=Diversity(0.9)),
        Rules(explore=Exploration(0.5, 3)),
        Rules(boosts=[Boost({"kind": "sea"}, add=50)]),
        Rules(exclude=["i37"]),
    ],
)
def test_new_items_come_last_and_obey_the_rules(export, rules, least):
    catalog = Recommender(export).catalog
    new = set(np.array(export.item_ids)[~export.trained]).difference(rules.exclude)
    plain, found = ({} for _ in range(2))
    for into, include in ((plain, 0), (found, least)):
        for row in recommend_users(export, k=4, include_new=include, rules=rules):
            into.setdefault(row.user, []).append(row)
    for user, rows in plain.items():
        got = found[user]
        ids = [row.item for row in got]
        assert len(ids) == len(set(ids)) <= 4 and not set(ids).intersection(rules.exclude)
        for name, most in rules.caps.items():
            values = [value for item in ids for value in catalog.values(catalog.row_of[item], name)]
            assert all(values.count(value) <= most for value in values)
        before = [row for row in rows if row.item in ids]
        assert [row.item for row in before] == ids[: len(before)] and set(ids[len(before) :]) <= new
        assert [row.rules for row in before] == [row.rules for row in got[: len(before)]]
        if not rules.caps:
            assert sum(item in new for item in ids) >= min(least, len(new)) and len(ids) == 4
