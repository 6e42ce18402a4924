"""The commands recommend and similar: the service's answers, in every output, with unknown ids named."""

import csv
import json

import pytest

from recbole_llm import cli
from recbole_llm.recommend import Counts, recommend_users, write_rows
from recbole_llm.serving.recommend import Recommender, Request


def test_rows_are_the_recommenders_answers(export):
    counts = Counts()
    rows = list(recommend_users(export, k=3, counts=counts))
    assert counts.users == len(export.user_ids)
    assert counts.rows == len(rows)
    recommender = Recommender(export)
    for user in export.user_ids[:5]:
        answer = recommender.recommend(Request(user=user, k=3))
        assert [(r.rank, r.item, r.score) for r in rows if r.user == user] == [
            (n, i.id, pytest.approx(i.score, abs=1e-5)) for n, i in enumerate(answer.items, 1)
        ]


def test_unknown_users_are_an_error_or_counted(export, export_folder, capsys):
    known = export.user_ids[0]
    assert cli.main(["recommend", str(export_folder), "--users", f"{known},nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
    assert cli.main(["recommend", str(export_folder), "--users", f"{known},nobody", "--skip-unknown"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count(known) >= 1
    assert "1 unknown users were skipped" in captured.err


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_all_users_in_every_format(export, export_folder, tmp_path, ending):
    target = tmp_path / "out" / f"recs{ending}"
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'import'")
    assert cli.main(["recommend", str(export_folder), "--k", "2", "--output", str(target)]) == 0
    if ending == ".jsonl":
        rows = [json.loads(line) for line in target.read_text().splitlines()]
    elif ending == ".csv":
        rows = list(csv.DictReader(target.open(newline="")))
    else:
        rows = parquet.read_table(target).to_pylist()
    expected = list(recommend_users(export, k=2))
    assert [(r["user"], int(r["rank"]), r["item"]) for r in rows] == [(r.user, r.rank, r.item) for r in expected]
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_a_failure_leaves_no_file(export, tmp_path):
    with pytest.raises(LookupError):
        write_rows(recommend_users(export, [export.user_ids[0], "nobody"]), tmp_path / "recs.csv")
    assert list(tmp_path.glob("*recs*")) == []


def test_seen_items_come_back_only_if_asked_for(export, export_folder):
    user = next(
        u for u in export.user_ids if {r.item for r in recommend_users(export, [u], k=10**6)} != set(export.item_ids)
    )
    without = {row.item for row in recommend_users(export, [user], k=10**6)}
    everything = {row.item for row in recommend_users(export, [user], k=10**6, exclude_seen=False)}
    assert without < everything


def test_a_list_of_items_answers_on_the_terminal_and_unknown_ones_are_named(export, export_folder, capsys):
    item = export.item_ids[1]
    assert cli.main(["recommend", str(export_folder), "--items", item, "--k", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert cli.main(["recommend", str(export_folder), "--items", f"{item},nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_similar_lists_neighbours_and_names_an_unknown_item(export, export_folder, capsys):
    assert cli.main(["similar", str(export_folder), "--item", export.item_ids[1], "--k", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["similar", str(export_folder), "--item", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "need --output FILE"),
        (["--output", "recs.xlsx"], "must end in"),
        (["--no-such-option"], "is not an option"),
    ],
)
def test_mistakes_are_named(export_folder, arguments, message, capsys):
    assert cli.main(["recommend", str(export_folder), *arguments]) == 2
    assert message in capsys.readouterr().err
