"""recbole_llm.load: what it answers, its vectors beside the formula in float64, and the files of the command vectors."""

import csv
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from made_export import make_contents

import recbole_llm
from recbole_llm import cli
from recbole_llm.export.writer import write_artifact
from recbole_llm.recommend import recommend_items, recommend_users, similar_items
from recbole_llm.retrieval.rules import Rules

pytest.importorskip("pandas")

VARIANTS = {
    "dot": {},
    "cosine": {"scoring": "cosine"},
    "a user's own part": {"user_part": True},
}


@pytest.fixture(params=VARIANTS)
def model(request, tmp_path):
    folder = tmp_path / "export"
    write_artifact(folder, make_contents(**VARIANTS[request.param]))
    return recbole_llm.load(folder)


def expected_query(export, row):
    """q_u by the formula of export/reader.py, in float64."""
    span = slice(*export.history_offsets[row : row + 2])
    items, t = export.history_items[span], export.history_weight[span].astype(np.float64)
    source, at, parts = export.source.astype(np.float64), 0, []
    for block in export.manifest.blocks:
        columns = slice(at, at + block.dim)
        total = t.sum() or 1.0  # somebody without a history
        x = (t[:, None] * source[items, columns]).sum(0) / total**block.exponent + export.offset[columns]
        if export.user_part is not None:
            x = x + export.user_part[row, columns]
        parts.append(block.scale * (x / np.linalg.norm(x) if block.scoring == "cosine" else x))
        at += block.dim
    return np.concatenate(parts)


def test_vectors_are_those_of_the_formula(model):
    export = model.export
    ids, items = model.item_vectors()
    assert ids == export.item_ids and items.dtype == np.float32
    np.testing.assert_array_equal(items, export.vector)
    np.testing.assert_array_equal(model.item_vectors(side="source").vectors, export.source)
    ids, users = model.user_vectors()
    assert ids == export.user_ids and users.dtype == np.float32 and users.shape == (len(ids), export.manifest.dim)
    expected = np.stack([expected_query(export, row) for row in range(len(ids))])
    np.testing.assert_allclose(users, expected, rtol=2e-5, atol=2e-6)


def test_users_come_in_the_order_asked_for_repeats_included(model):
    names = [model.export.user_ids[n] for n in (5, 0, 5, 3)]
    ids, some = model.user_vectors(names)
    assert ids == names
    np.testing.assert_array_equal(some, model.user_vectors().vectors[[5, 0, 5, 3]])
    np.testing.assert_array_equal(model.user_vectors(names[0]).vectors, some[:1])


def test_the_product_of_vectors_with_bias_is_the_score(model):
    _, items = model.item_vectors(bias=True)
    users, queries = model.user_vectors(bias=True)
    scores = queries @ items.T
    n = len(model.export.item_ids)
    table = model.recommend(k=n, include_seen=True)
    assert list(dict.fromkeys(table.user)) == users
    listed = int(model.export.listed.sum())
    assert len(table) == len(users) * listed
    row, column = ({name: at for at, name in enumerate(names)} for names in (users, model.export.item_ids))
    found = [scores[row[u], column[i]] for u, i in zip(table.user, table.item, strict=True)]
    np.testing.assert_allclose(table.score, found, rtol=1e-4, atol=1e-4)
    assert (scores == -np.inf).sum() == len(users) * (n - listed)


def test_an_explanation_adds_up_to_the_score(model):
    user = model.export.user_ids[2]
    table = model.recommend(user, k=4)
    for item, score in zip(table.item, table.score, strict=True):
        parts = model.explain(item, user=user)
        assert parts.contribution.sum() == pytest.approx(score, abs=1e-4)
        assert parts.contribution[:-2].is_monotonic_decreasing
        assert list(parts.item[-2:]) == ["", ""]
        span = slice(*model.export.history_offsets[2:4])
        assert set(parts.item[:-2]) == {model.export.item_ids[row] for row in model.export.history_items[span]}
    liked = [model.export.item_ids[n] for n in (7, 3, 7)]
    table = model.recommend(items=liked, k=3)
    parts = model.explain(table.item[0], items=liked)
    assert parts.contribution.sum() == pytest.approx(table.score[0], abs=1e-4)
    assert sorted(parts.item[:-2]) == sorted(set(liked))


def test_an_explanation_reads_repeats_as_the_answer_does(tmp_path):
    """Where recency counts, the last mention of an item is its place."""
    write_artifact(tmp_path / "export", make_contents(history_decay=1.5))
    fading = recbole_llm.load(tmp_path / "export")
    liked = ["i7", "i3", "i5", "i7"]
    table = fading.recommend(items=liked, k=3)
    for item, score in zip(table.item, table.score, strict=True):
        assert fading.explain(item, items=liked).contribution.sum() == pytest.approx(score, abs=1e-4)


def test_answers_are_those_of_the_functions(model):
    export = model.export
    table = model.recommend(export.user_ids[:3], k=3)
    rows = list(recommend_users(export, export.user_ids[:3], k=3))
    assert list(table.columns) == ["user", "rank", "item", "title", "score", "probability", "cold", "rules"]
    assert [tuple(row) for row in table.itertuples(index=False)] == [tuple(vars(row).values()) for row in rows]
    liked = export.item_ids[3:5]
    assert list(model.recommend(items=liked, k=4).item) == [i.id for i in recommend_items(export, liked, k=4).items]
    alike = similar_items(export, export.item_ids[3], k=4).items
    found = model.similar(export.item_ids[3], k=4)
    assert list(found.item) == [i.id for i in alike] and list(found.score) == [i.score for i in alike]
    assert found.probability.isna().all() and set(found.user) == {export.item_ids[3]}


def test_integers_are_the_ids_of_their_digits(tmp_path):
    contents = make_contents()
    users = [str(n) for n in range(len(contents.user_ids))]
    items = [str(100 + n) for n in range(len(contents.item_ids))]
    write_artifact(tmp_path / "export", replace(contents, user_ids=users, item_ids=items))
    model = recbole_llm.load(tmp_path / "export")
    assert model.recommend(3, k=2).equals(model.recommend(["3"], k=2))
    assert model.recommend(3, k=2, rules=Rules(only=[105, 107])).equals(
        model.recommend(3, k=2, rules=Rules(only=["105", "107"]))
    )
    assert model.recommend(np.array([3, 4]), k=2).equals(model.recommend(["3", "4"], k=2))
    assert model.similar(105, k=2).equals(model.similar("105", k=2))
    assert set(model.explain(105, user=3).item) == set(model.explain("105", user="3").item)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.recommend("x", items=["i"]), "users and items are given"),
        (lambda m: m.recommend(["nobody"]), r"users: no user .* 'nobody'\. skip_unknown=True leaves them out\. For a new user"),
        (lambda m: m.recommend(items=["nothing"]), "items: no item .* 'nothing'"),
        (lambda m: m.recommend([]), "users is empty"),
        (lambda m: m.recommend([1.5]), r"users holds 1\.5"),
        (lambda m: m.recommend(k=0), "k is 0"),
        (lambda m: m.recommend("u1", rules=Rules(only=["nix"])), "rules: only: no item .* 'nix'. skip_unknown"),
        (lambda m: m.recommend(items=["i1"], rules=Rules(exclude=["I2"])), "rules: exclude: .* mean 'i2'"),
        (lambda m: m.similar("i1", rules=Rules(only=["i2", "nix"])), "rules: only: no item .* 'nix'"),
        (lambda m: m.similar("nothing"), "item: no item .* 'nothing'|item: no item .* nothing"),
        (lambda m: m.similar("nothing", k=0), "k is 0"),
        (lambda m: m.explain(m.export.item_ids[0]), "either user or items"),
        (lambda m: m.explain("nothing", user=m.export.user_ids[0]), "item: no item .* 'nothing'"),
        (lambda m: m.explain(m.export.item_ids[0], user="nobody"), "users: no user .* 'nobody'"),
        (lambda m: m.user_vectors(["nobody"]), "users: no user .* 'nobody'"),
        (lambda m: m.item_vectors(side="left"), "expected one of target, source"),
        (lambda m: m.item_vectors(side="source", bias=True), "bias belongs to targets"),
    ],
)  # fmt: skip
def test_mistakes_name_the_argument(shared_folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(recbole_llm.load(shared_folder))


def test_unknown_ids_may_be_left_out(shared_folder):
    model = recbole_llm.load(shared_folder)
    known = model.export.user_ids[0]
    assert model.recommend([known, "nobody"], k=2, skip_unknown=True).equals(model.recommend(known, k=2))
    some = model.recommend(known, k=2, rules=Rules(exclude=["i1", "nothing"]), skip_unknown=True)
    assert some.equals(model.recommend(known, k=2, rules=Rules(exclude=["i1"])))


def test_there_must_be_a_model(tmp_path):
    with pytest.raises(ValueError, match="holds neither a checkpoint"):
        recbole_llm.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        recbole_llm.load(tmp_path / "absent")


def test_an_export_needs_neither_torch_nor_recbole(shared_folder):
    code = (
        "import sys, recbole_llm\n"
        f"model = recbole_llm.load({str(shared_folder)!r})\n"
        "model.recommend(k=2), model.item_vectors(), model.user_vectors(), model.similar(model.export.item_ids[0])\n"
        "print([name for name in ('torch', 'recbole') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------ files


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["ids"].tolist(), file["vectors"]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["id", *(f"v{d}" for d in range(len(head) - 1))]
        return [row[0] for row in rows], np.array([[np.float32(value) for value in row[1:]] for row in rows])
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    return table["id"].to_pylist(), np.array(table["vector"].to_pylist(), np.float32)


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
def test_files_hold_every_bit(tmp_path, shared_folder, suffix, capsys):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    model = recbole_llm.load(shared_folder)
    for more, expected in (
        ([], model.item_vectors()),
        (["--side", "source"], model.item_vectors(side="source")),
        (["--of", "users"], model.user_vectors()),
        (["--bias"], model.item_vectors(bias=True)),
    ):
        path = tmp_path / f"found{suffix}"
        assert cli.main(["vectors", str(shared_folder), "--output", str(path), *more]) == 0
        ids, vectors = read(path)
        assert ids == expected.ids and vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, expected.vectors)
        count, D = expected.vectors.shape
        assert f"{count} {'users' if more[:1] == ['--of'] else 'items'}, {D} dimensions" in capsys.readouterr().out


def test_ids_of_any_form_stay_as_they_are(tmp_path):
    ids = ["a,b", 'quo"te', "ü" * 300, " space ", "0042"]
    found = recbole_llm.loaded.Vectors(ids, np.arange(10, dtype=np.float32).reshape(5, 2) / 3)
    for suffix in (".npz", ".csv", ".parquet"):
        if suffix == ".parquet":
            pytest.importorskip("pyarrow")
        recbole_llm.loaded.write_vectors(found, tmp_path / f"v{suffix}")
        back = read(tmp_path / f"v{suffix}")
        assert back[0] == ids
        np.testing.assert_array_equal(back[1], found.vectors)


def test_an_output_of_another_form_is_refused_before_anything_is_read(tmp_path, capsys):
    assert cli.main(["vectors", "absent", "--output", str(tmp_path / "v.json")]) == 2
    assert "must end in .npz, .parquet, .csv" in capsys.readouterr().err
    assert (
        cli.main(["vectors", "absent", "--output", str(tmp_path / "v.csv"), "--of", "users", "--side", "source"]) == 2
    )
    assert "--side belongs to items" in capsys.readouterr().err
