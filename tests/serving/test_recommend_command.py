"""The commands recommend and similar: the service's answers, in every output, with unknown ids named."""

import csv
import json
import sys
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from recbole_llm import cli, recommend
from recbole_llm.export.errors import UnknownUserError
from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.recommend import Counts, recommend_items, recommend_users, write_rows
from recbole_llm.retrieval.recommender import Recommender, Request


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
    assert cli.main(["recommend", str(export_folder), "--users", f"{known},nobody", "no one"]) == 2
    error = capsys.readouterr().err
    assert "'nobody', 'no one'" in error and "--skip-unknown" in error
    assert cli.main(["recommend", str(export_folder), "--users", known, "nobody", "no one", "--skip-unknown"]) == 0
    captured = capsys.readouterr()
    assert f"user {known}\n" in captured.out
    assert "unknown users skipped: 2" in captured.err
    many = [f"x{n}" for n in range(25)]
    assert cli.main(["recommend", str(export_folder), "--users", *many]) == 2
    assert "'x9' and 15 more" in capsys.readouterr().err


def test_an_id_that_lost_its_zeros_or_its_case_is_asked_back(export, export_folder, capsys):
    user, item = export.user_ids[0], export.item_ids[0]
    for command, known in (
        (["recommend", "--users"], user),
        (["recommend", "--items"], item),
        (["similar", "--item"], item),
    ):
        assert cli.main([command[0], str(export_folder), command[1], f"0{known.upper()}"]) == 2
        assert f"did you mean {known!r}?" in capsys.readouterr().err


def test_unknown_users_are_named_before_anything_is_scored(export):
    with pytest.raises(UnknownUserError, match="'x', 'y'"):
        next(recommend_users(export, [*export.user_ids * 40, "x", *export.user_ids, "y"]))
    rows = recommend_users(export, iter([*export.user_ids * 40, "x"]))
    assert next(rows).user == export.user_ids[0]
    with pytest.raises(UnknownUserError, match="'x'"):
        list(rows)
    with pytest.raises(ValueError, match="give a list of ids"):
        next(recommend_users(export, export.user_ids[0]))


def test_titles_do_not_command_the_terminal(tmp_path, contents, capsys):
    records = [replace(record, title=f"a\x1b[2Jb\n{record.title}") for record in contents.records]
    write_artifact(tmp_path / "rude", replace(contents, records=records))
    assert cli.main(["recommend", str(tmp_path / "rude"), "--users", contents.user_ids[0], "--k", "2"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 5 and "a [2Jb Title" in lines[2]


def test_a_user_with_fewer_items_than_asked_for_is_counted(export, export_folder, capsys):
    counts = Counts()
    rows = list(recommend_users(export, k=len(export.item_ids), counts=counts))
    assert counts.short == sum(
        len([r for r in rows if r.user == user]) < len(export.item_ids) for user in export.user_ids
    )
    assert cli.main(["recommend", str(export_folder), "--users", *export.user_ids, "--k", "40"]) == 0
    assert (
        f"users with fewer than 40 items, since no more may be recommended to them: {counts.short}"
        in capsys.readouterr().err
    )


def test_the_kernel_gives_the_same_rows(export, monkeypatch):
    """What large catalogues are scored with, on a small one."""
    expected = list(recommend_users(export, k=7)) + list(recommend_users(export, k=50, exclude_seen=False))
    used = []
    monkeypatch.setattr(recommend, "KERNEL_FROM", 1)
    search = recommend._KernelRetriever.search
    monkeypatch.setattr(recommend._KernelRetriever, "search", lambda *a: used.append(1) or search(*a))
    assert list(recommend_users(export, k=7)) + list(recommend_users(export, k=50, exclude_seen=False)) == expected
    assert len(used) == 2


def test_vectors_in_eight_bits_are_none_of_the_kernels(tmp_path, contents, monkeypatch):
    write_artifact(tmp_path / "coded", replace(contents, dtype="int8"))
    export = load_export(tmp_path / "coded")
    expected = list(recommend_users(export, k=7))
    monkeypatch.setattr(recommend, "KERNEL_FROM", 1)
    assert list(recommend_users(export, k=7)) == expected


def test_options_that_are_given_again_add_up(export_folder, tmp_path):
    def items(*arguments):
        file = tmp_path / "out.jsonl"
        command = ["recommend", str(export_folder), "--users", "u1", "--k", "6", "--output", str(file), *arguments]
        assert cli.main(command) == 0
        return [json.loads(line)["item"] for line in file.read_text().splitlines()]

    first, second, third, *_ = items()
    assert not {first, second, third}.intersection(items("--exclude", first, "--exclude", second, third))
    assert items("--only", third, "--only", first) == [first, third]


def test_ids_from_a_file(export, export_folder, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("\n".join(export.user_ids[:2]) + "\n\n")
    assert cli.main(["recommend", str(export_folder), "--users-file", str(tmp_path / "ids.txt"), "--k", "3"]) == 0
    from_file = capsys.readouterr().out
    assert cli.main(["recommend", str(export_folder), "--users", *export.user_ids[:2], "--k", "3"]) == 0
    assert capsys.readouterr().out == from_file
    (tmp_path / "items.txt").write_text("\n".join(export.item_ids[:3]))
    assert cli.main(["recommend", str(export_folder), "--items-file", str(tmp_path / "items.txt")]) == 0
    from_file = capsys.readouterr().out
    assert cli.main(["recommend", str(export_folder), "--items", ",".join(export.item_ids[:3])]) == 0
    assert capsys.readouterr().out == from_file


def test_ids_that_hold_commas(tmp_path, contents, capsys):
    """An id is never split; a list of ids is, and a part in double quotes is one id whatever is in it."""
    users = ["u1,x", "u1", "x", *contents.user_ids[3:]]
    items = ["a, b", *contents.item_ids[1:]]
    write_artifact(tmp_path / "odd", replace(contents, user_ids=users, item_ids=items))

    def asked(*arguments):
        assert cli.main(["recommend", str(tmp_path / "odd"), "--k", "2", *arguments]) == 0, capsys.readouterr().err
        return [line[5:] for line in capsys.readouterr().out.splitlines() if line.startswith("user ")]

    assert asked("--users", "u1,x") == ["u1,x"]
    assert asked("--users", "x,u1") == ["x", "u1"]
    assert asked("--users", '"u1,x",x', "u1") == ["u1,x", "x", "u1"]
    assert asked("--users", "u1,x", "--users", "u1") == ["u1,x", "u1"]
    (tmp_path / "ids.txt").write_bytes("\ufeffu1,x\r\nx\r\n".encode())
    assert asked("--users-file", str(tmp_path / "ids.txt")) == ["u1,x", "x"]
    assert asked("--items", "a, b") == []
    assert cli.main(["recommend", str(tmp_path / "odd"), "--users", '"u1,x']) == 2
    assert "Put a part that holds a comma in double quotes" in capsys.readouterr().err
    for nothing in (["--users", ","], ["--users", '""'], ["--items", ""]):
        assert cli.main(["recommend", str(tmp_path / "odd"), *nothing]) == 2
        assert "names no id" in capsys.readouterr().err


def test_the_table_fits_a_terminal(export, export_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    user = export.user_ids[0]
    assert cli.main(["recommend", str(export_folder), "--users", user, "--k", "40"]) == 0
    assert "Title" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["recommend", str(export_folder), "--users", user, "--k", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 30 and any("…" in line for line in lines)


def rows_of_workbook(path):
    """The rows of a worksheet as dictionaries of texts."""
    with zipfile.ZipFile(path) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    lines = [["".join(cell.itertext()) for cell in row] for row in next(iter(sheet))]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".xlsx"])
def test_all_users_in_every_format(export, export_folder, tmp_path, ending):
    target = tmp_path / "out" / f"recs{ending}"
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'import'")
    assert cli.main(["recommend", str(export_folder), "--k", "2", "--output", str(target)]) == 0
    if ending == ".jsonl":
        rows = [json.loads(line) for line in target.read_text().splitlines()]
    elif ending == ".csv":
        rows = list(csv.DictReader(target.open(newline="")))
    elif ending == ".xlsx":
        rows = rows_of_workbook(target)
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
    assert cli.main(["recommend", str(export_folder), "--items", f"{item},nothing", "nix"]) == 2
    assert "'nothing', 'nix'" in capsys.readouterr().err
    assert cli.main(["recommend", str(export_folder), "--items", item, "nothing", "--skip-unknown"]) == 0
    assert "unknown items skipped: 1 ('nothing')" in capsys.readouterr().err
    assert cli.main(["recommend", str(export_folder), "--items", "nothing", "--skip-unknown"]) == 2
    assert "'nothing'" in capsys.readouterr().err
    assert recommend_items(export, [item, "nothing"], skip_unknown=True).unknown == ("nothing",)
    assert item not in [found.id for found in recommend_items(export, [item], k=40).items]
    assert item in [found.id for found in recommend_items(export, [item], k=40, exclude_seen=False).items]


def test_similar_lists_neighbours_and_names_an_unknown_item(export, export_folder, capsys):
    assert cli.main(["similar", str(export_folder), "--item", export.item_ids[1], "--k", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["similar", str(export_folder), "--item", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --output FILE"),
        (["--output", "recs.xls"], "must end in"),
        (["--k", "0", "--users", "u1"], "--k is 0"),
        (["--users", ","], "--users names no id"),
        (["--text", " "], "text is empty"),
        (["--data_path", "x", "--users", "u1"], "belongs to a checkpoint"),
        (["--no-such-option"], "is not an option"),
    ],
)
def test_mistakes_are_named(export_folder, arguments, message, capsys):
    assert cli.main(["recommend", str(export_folder), *arguments]) == 2
    assert message in capsys.readouterr().err
