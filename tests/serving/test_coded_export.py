"""An export in eight bits: what it holds, how near its scores are, exact again where the float table goes along; the service."""

import json
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from made_export import make_contents
from safetensors.numpy import load_file, save_file

from recbole_llm.export import manifest as manifest_module
from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import EXACT, VECTORS
from recbole_llm.export.pooling import Pooling
from recbole_llm.export.quantise import CodedTable, encoded, random_signs, squared_lengths, stretches
from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.exact import ExactRetriever, Segment
from recbole_llm.retrieval.recommender import Recommender, Request

DIMS = [(64,), (6, 4), (1,), (100, 28, 3)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotation(dims, signs):
    """The rotation as a matrix, from its definition: Hadamard matrices by Kronecker products."""
    D = sum(dims)
    matrix = np.zeros((D, D))
    for part in stretches(dims):
        H = np.ones((1, 1))
        while len(H) < part.stop - part.start:
            H = np.kron(np.array([[1, 1], [1, -1]]), H)
        matrix[part, part] = H / np.sqrt(len(H))
    return matrix * signs


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_codes_are_the_rounded_rotated_rows(dims):
    """Per block a scale of its own; the largest entry of a block is 127 or -127; a row of zeros stays one."""
    table = normal(50, sum(dims)) * np.geomspace(0.01, 100, 50, dtype=np.float32)[:, None]
    table[7] = 0
    coded = encoded(table, dims)
    R = rotation(dims, random_signs(sum(dims)))
    np.testing.assert_allclose(R @ R.T, np.eye(len(R)), atol=1e-12)
    edges = np.cumsum([0, *dims])
    for number, (begin, end) in enumerate(pairwise(edges)):
        y = (table.astype(np.float64) @ R.T)[:, begin:end]
        scale = np.abs(y).max(1) / 127
        np.testing.assert_allclose(coded.scale[:, number], scale, rtol=1e-5)
        some = scale > 0
        rounded = y[some] / scale[some, None]
        assert np.abs(coded.codes[some, begin:end] - rounded).max() < 0.5 + 1e-3
        assert (np.abs(coded.codes[some, begin:end]).max(1) == 127).all()
    assert not coded.codes[7].any() and not coded[7].any()


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_it_is_read_like_an_array(dims, monkeypatch):
    monkeypatch.setattr("recbole_llm.export.quantise.ROWS_AT_ONCE", 16)  # several pieces, the last one ragged
    table = normal(50, sum(dims))
    coded = encoded(table, dims)
    plain = np.asarray(coded)
    R = rotation(dims, coded.signs)
    scales = np.repeat(coded.scale, dims, axis=1)
    np.testing.assert_allclose(plain, (coded.codes * scales) @ R, atol=1e-5)
    assert plain.dtype == np.float32 and coded.shape == plain.shape and len(coded) == 50 and coded.dtype == np.float32
    rows, mask = np.array([3, 3, 49, 0]), np.arange(50) % 7 == 0
    for key in (
        5,
        np.int64(5),
        slice(3, 9),
        slice(40, None),
        rows,
        mask,
        rows[:0],
        (rows, slice(0, 1)),
        (slice(None), slice(0, 1)),
    ):
        got, want = coded[key], plain[key]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    query = normal(3, sum(dims), seed=1)
    np.testing.assert_allclose(coded.dots(query), query @ plain.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coded.dots(query, 5, 37), (query @ plain.T)[:, 5:37], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coded @ query[0], plain @ query[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coded @ query.T, plain @ query.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(squared_lengths(coded), squared_lengths(plain), rtol=1e-4)


def test_scores_are_near_and_a_large_column_does_not_make_all_others_coarse():
    table, query = normal(400, 64), normal(20, 64, seed=1)
    table[:, 3] *= 30
    coded = encoded(table, [64])
    errors = np.abs(coded.dots(query) - query @ table.T)
    assert np.median(errors) < 0.015 * np.linalg.norm(query) / 20**0.5 * np.median(np.linalg.norm(table, axis=1)) / 8
    plain = np.rint(table / np.abs(table).max(1, keepdims=True) * 127) * np.abs(table).max(1, keepdims=True) / 127
    others = np.delete(np.arange(64), 3)
    lost = np.abs(plain - table)[:, others].mean()
    assert np.abs(np.asarray(coded) - table)[:, others].mean() < 0.6 * lost


def rounded_in_turn(y, scale, squares):
    """What is lost of a column goes to those after it as the regression on them says, solved anew for every column."""
    D, left, codes = y.shape[1], y.copy(), np.zeros(y.shape)
    for d in range(D):
        codes[:, d] = np.clip(np.rint(left[:, d] / scale[:, d]), -127, 127)
        error = left[:, d] - codes[:, d] * scale[:, d]
        if d + 1 < D:
            left[:, d + 1 :] += error[:, None] * np.linalg.solve(squares[d + 1 :, d + 1 :], squares[d + 1 :, d])
    return codes


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_codes_keep_the_products_with_known_vectors(dims, monkeypatch):
    """Beside the same in float64, written out; what rounding cuts off one column is made up for in the later ones."""
    monkeypatch.setattr("recbole_llm.export.quantise.ROWS_AT_ONCE", 16)
    D = sum(dims)
    table, beside = normal(50, D), normal(300, D, seed=1) * np.geomspace(1, 0.03, D, dtype=np.float32)
    table[7] = 0
    coded, R = encoded(table, dims, beside), rotation(dims, random_signs(D))
    rotated = beside @ R.T
    squares = rotated.T @ rotated / len(rotated)
    squares += 0.01 * np.trace(squares) / D * np.eye(D)
    scale = np.repeat(coded.scale, dims, axis=1)
    want = rounded_in_turn(table @ R.T, np.maximum(scale, 1e-30), squares)
    assert np.mean(coded.codes == want) > 0.999 and np.abs(coded.codes - want).max() <= 1  # float32 may round otherwise
    assert not coded.codes[7].any()
    if dims == (64,):  # one rotation of columns that matter unequally; other vectors of the same kind
        others = normal(300, D, seed=2) * np.geomspace(1, 0.03, D, dtype=np.float32)
        errors = [np.square(x.dots(others) - others @ table.T).mean() for x in (encoded(table, dims), coded)]
        assert errors[1] < errors[0] / 2, errors


def test_without_a_known_vector_codes_are_the_nearest():
    table = normal(20, 10)
    for beside in (np.zeros((0, 10), np.float32), np.zeros((5, 10), np.float32)):
        assert np.array_equal(encoded(table, [6, 4], beside).codes, encoded(table, [6, 4]).codes)


@pytest.mark.parametrize("B", [1, 2, 7])
@pytest.mark.parametrize("has_exact", [False, True])
def test_a_search_finds_the_best_of_the_coded_rows(B, has_exact, monkeypatch):
    """Over several tiles, with rows hidden; with the float rows, exactly the best of those."""
    monkeypatch.setattr("recbole_llm.retrieval.exact.TILE", 64)
    table, bias, query = normal(500, 24), normal(500, seed=2), normal(B, 24, seed=3)
    coded = encoded(table, [16, 8])
    coded.exact = table if has_exact else None
    hidden = [np.arange(b, 500, 9) for b in range(B)]
    masks = [None, np.arange(500) % 2 == 0, np.arange(500) < 15, *[None] * 9][:B]  # the last: gathered and not masked
    hits = ExactRetriever([Segment(0, coded, bias)]).search(query, [10] * B, hidden, masks)
    for b, hit in enumerate(hits):
        scores = (table if has_exact else np.asarray(coded)).astype(np.float64) @ query[b] + bias
        scores[hidden[b]] = -np.inf
        if masks[b] is not None:
            scores[~masks[b]] = -np.inf
        want = np.lexsort((np.arange(500), -scores))[:10]
        want = want[scores[want] > -np.inf]
        assert hit.rows.tolist() == want.tolist()
        np.testing.assert_allclose(hit.scores, scores[want], rtol=1e-5, atol=1e-5)


def queries_of(export):
    """Of every user with a history."""
    pooling, found = Pooling.of(export), []
    for user in np.flatnonzero(np.diff(export.history_offsets)):
        own = slice(*export.history_offsets[user : user + 2])
        part = None if export.user_part is None else np.asarray(export.user_part[user])
        source = np.asarray(export.source)[export.history_items[own]]
        found.append(pooling.query(source, export.history_weight[own], part).vector)
    return np.array(found)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("user_part", [False, True])
def test_what_is_written_is_read(tmp_path, user_part, mapped):
    contents = make_contents(n_items=300, dims=(64, 36), user_part=user_part)
    write_artifact(tmp_path / "plain", contents)
    floats = load_export(tmp_path / "plain")
    for rescore in (False, True):
        folder = tmp_path / f"coded-{rescore}"
        manifest = write_artifact(folder, replace(contents, dtype="int8", rescore=rescore))
        assert manifest.min_reader == manifest_module.CODED_SCHEMA and (EXACT in manifest.files) == rescore
        export = load_export(folder, mapped=mapped)
        assert isinstance(export.vector, CodedTable) and isinstance(export.source, CodedTable)
        assert (export.user_part is None) == (not user_part)
        want = encoded(floats.vector, [64, 36], queries_of(floats))
        assert np.array_equal(export.vector.codes, want.codes) and np.array_equal(export.vector.scale, want.scale)
        rows = np.array([5, 0, 299])
        for name in ("vector", "source", "user_part") if user_part else ("vector", "source"):
            few = rows % len(getattr(floats, name))
            assert np.array_equal(getattr(export, name)[few], getattr(floats, name)[few]) == rescore
        size = (folder / VECTORS).stat().st_size / (tmp_path / "plain" / VECTORS).stat().st_size
        assert size < 0.28, size


def test_answers_are_those_of_the_float_export(tmp_path):
    """Recommendations, reasons and similar items; with the float table, the same lists and nearly the same scores."""
    contents = make_contents(n_items=300, n_users=40, dims=(64, 36))
    shared = []
    for name, changes in (("plain", {}), ("coded", {"dtype": "int8"}), ("exact", {"dtype": "int8", "rescore": True})):
        write_artifact(tmp_path / name, replace(contents, **changes))
        recommender = Recommender(load_export(tmp_path / name))
        answers = [recommender.recommend(Request(user=f"u{u}", k=10, explain=3)) for u in range(40)]
        similar = recommender.similar("i3", 10)
        shared.append(
            ([[item.id for item in answer.items] for answer in answers], answers, [x.id for x in similar.items])
        )
    (plain, plain_answers, alike), (coded, _, coded_alike), (exact, exact_answers, _) = shared
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(plain, coded, strict=True)])
    again = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(plain, exact, strict=True)])
    assert overlap >= 0.95 and again == 1 and len(set(alike) & set(coded_alike)) >= 9
    for one, two in zip(plain_answers, exact_answers, strict=True):
        scores = {item.id: item.score for item in two.items}
        assert all(item.score == pytest.approx(scores[item.id], abs=1e-4) for item in one.items if item.id in scores)


FAULTS = {
    "a negative scale": lambda tensors: tensors["item.vector.scale"].__setitem__((0, 0), -1),
    "a sign of 2": lambda tensors: tensors["rotation.signs"].__setitem__(0, 2),
    "no scale": lambda tensors: tensors.pop("item.source.scale"),
    "a float table beside": lambda tensors: tensors.update({"item.vector": np.zeros((300, 100), np.float32)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_one_is_refused(tmp_path, fault):
    folder = tmp_path / "export"
    write_artifact(folder, replace(make_contents(n_items=300, dims=(64, 36)), dtype="int8"))
    tensors = load_file(folder / VECTORS)
    FAULTS[fault](tensors)
    save_file(tensors, folder / VECTORS)
    raw = json.loads((folder / "manifest.json").read_text())
    content = (folder / VECTORS).read_bytes()
    raw["files"][VECTORS] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(raw))
    raw["export_id"] = manifest_module._manifest_of(raw).identity()
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ExportError, match=VECTORS):
        load_export(folder)
