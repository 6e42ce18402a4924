"""The sequence block in NumPy: equal states, and scores, reasons, users and vectors of an export equal to the model's."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_score import HISTORIES, N, U, made_blocks, made_history, made_score, normal
from test_numpy_twin import exported, padded

from recbole_llm.export import manifest as manifest_module
from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import Block
from recbole_llm.export.onnx_graphs import write_graphs
from recbole_llm.export.pooling import Pooling
from recbole_llm.export.reader import load_export
from recbole_llm.export.sequence import LARGEST, SEQUENCE_FILE, SequenceWeights
from recbole_llm.loaded import LoadedModel
from recbole_llm.retrieval.audience import known_items, top_users
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.sequence import LENGTH, SequenceBlock, SequenceLayer

DIM = 6


def layer(seed=0, dim=DIM, heads=2):
    """With no weight at a value that hides a mistake."""
    torch.manual_seed(seed)
    made = SequenceLayer(dim, heads)
    for parameter in made.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return made.eval()


def weights(made):
    return SequenceWeights({name: array.numpy() for name, array in made.state_dict().items()})


def walks(sizes, n_items=80):
    generator = torch.Generator().manual_seed(4)
    items = [torch.randperm(n_items, generator=generator)[:size].sort().values for size in sizes]
    ranks = torch.cat([torch.randperm(size, generator=generator) for size in sizes]).float()
    return Rows(torch.tensor([0, *sizes]).cumsum(0), torch.cat(items), None, ranks)


@pytest.mark.parametrize(("dim", "heads"), [(6, 2), (8, 1), (8, 4)])
def test_the_states_are_those_of_torch(dim, heads):
    made, table = layer(dim=dim, heads=heads), normal(80, dim, seed=3)
    history = walks([3, 0, 1, LENGTH, LENGTH + 1, 60, 2, 3, 0])
    expected = made.queries(table, history).numpy()
    twin, source = weights(made), np.concatenate([np.ones((80, 2), np.float32), table.numpy()], 1)
    found = np.zeros_like(expected)
    for rows, states in twin.of_histories(
        source, slice(2, None), history.offsets.numpy(), history.ids.numpy(), history.ranks.numpy()
    ):
        assert not found[rows].any()
        found[rows] = states
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert twin.length == LENGTH and twin.dim == dim
    for row in range(len(expected)):
        span = slice(*history.offsets[row : row + 2].tolist())
        vectors, ranks = table[history.ids[span]].numpy(), history.ranks[span].numpy()
        np.testing.assert_allclose(twin.state(vectors, ranks), expected[row], atol=1e-5)
        oldest_first = vectors[np.argsort(-ranks)]
        np.testing.assert_array_equal(twin.state(oldest_first, None), twin.state(vectors, ranks))


def sequence_block(scale=0.9):
    return SequenceBlock(
        "sequence",
        source=normal(N, DIM, seed=41),
        target=normal(N, DIM, seed=42),
        scale=scale,
        temperature=3.0,
        bias=normal(N, seed=43),
        layer=layer(),
    )


@pytest.fixture(params=["alone", "identity", "vectors"])
def case(request, tmp_path):
    blocks = () if request.param == "alone" else made_blocks(request.param == "identity")
    score, history = made_score(blocks=(*blocks, sequence_block())), padded(made_history("ranks"))
    part = score.user_parts(torch.arange(U))
    part = {name: rows.index_fill(0, torch.tensor([0]), 0.0) for name, rows in part.items()}
    return score, history, part, exported(score, history, tmp_path / "export")


def test_an_export_answers_as_the_score_and_says_what_the_order_adds(case):
    score, history, part, export = case
    manifest = export.manifest
    assert manifest.min_reader == manifest_module.SEQUENCE_SCHEMA == manifest.schema
    assert manifest.sequence == Block("sequence", DIM, 0.0, pytest.approx(0.8 * 0.9 * 3.0), "sequence")
    scores, recommender, loaded = score.scores(history, part), Recommender(export), LoadedModel(export)
    vectors = loaded.user_vectors(bias=True).vectors @ loaded.item_vectors(bias=True).vectors.T
    listed = score.listed[1:].numpy()
    np.testing.assert_allclose(vectors[:, listed], scores[1:, 1:].numpy()[:, listed], rtol=1e-4, atol=1e-4)
    for user in range(1, U):
        answer = recommender.recommend(Request(user=f"u{user}", k=N, exclude_seen=False, explain=99))
        got = {int(item.id[1:]): item for item in answer.items}
        assert set(got) == {item for item in range(1, N) if score.listed[item]}
        own = {name: table[[user]] for name, table in part.items()}
        parts = score.parts(history.select(torch.tensor([user])), torch.arange(N), own)
        for item, found in got.items():
            assert found.score == pytest.approx(float(scores[user, item]), rel=1e-4, abs=1e-4)
            assert found.order == pytest.approx(float(parts.rest["sequence"][item]), rel=1e-4, abs=1e-4)
            total = sum(reason.contribution for reason in found.reasons) + found.order + found.rest + found.bias
            assert total == pytest.approx(found.score, abs=1e-9)
            told = loaded.explain(f"i{item}", user=f"u{user}")
            assert told.title.tolist()[-3:] == ["order of the history", "beside the history", "bias of the item"]
            assert told.contribution.tolist()[-3] == pytest.approx(found.order, abs=1e-6)
            assert told.contribution.sum() == pytest.approx(found.score, rel=1e-4, abs=1e-4)
    plain = recommender.recommend(Request(user="u1", k=1, exclude_seen=False)).items[0]
    assert plain.order is None


def test_users_for_an_item_are_those_with_the_highest_scores(case):
    score, history, part, export = case
    scores = score.scores(history, part)
    for item, reached in zip(
        (3, 7), top_users(export, known_items(export, ["i3", "i7"]), U, exclude_seen=False), strict=True
    ):
        assert {one.user: pytest.approx(one.score, rel=1e-4, abs=1e-4) for one in reached} == {
            f"u{user}": float(scores[user, item]) for user in range(1, U)
        }


def test_the_order_of_listed_items_counts(case):
    score, _, _, export = case
    recommender, asked = Recommender(export), [4, 9, 2, 12]
    answers = []
    for newest_last in (asked, asked[::-1]):
        order = torch.tensor(newest_last).argsort()
        ranks = torch.arange(3.0, -1.0, -1.0)[order]
        expected = score.scores(Rows(torch.tensor([0, 4]), torch.tensor(newest_last)[order], None, ranks))[0]
        request = Request(items=[f"i{item}" for item in newest_last], k=N, exclude_seen=False)
        answers.append({int(item.id[1:]): item.score for item in recommender.recommend(request).items})
        assert answers[-1] == {i: pytest.approx(float(expected[i]), rel=1e-4, abs=1e-4) for i in answers[-1]}
    assert any(abs(answers[0][i] - answers[1][i]) > 0.01 for i in answers[0])


def test_weights_of_a_history_have_no_place_in_the_block(tmp_path):
    score = made_score(blocks=(sequence_block(),))
    plain, weighted = (padded(made_history(kind)) for kind in ("ranks", "both"))
    assert torch.equal(score.scores(plain), score.scores(replace(plain, weights=weighted.weights)))
    export = exported(score, replace(plain, weights=weighted.weights), tmp_path / "export")
    vectors = LoadedModel(export).user_vectors().vectors @ export.vector.T + export.bias
    listed = score.listed[1:].numpy()
    expected = score.scores(plain)[1:, 1:].numpy()[:, listed]
    np.testing.assert_allclose(vectors[:, listed], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HISTORIES)
def test_an_export_without_the_block_is_as_before(tmp_path, kind):
    blocks = tuple(replace(block, decay=None) for block in made_blocks())
    export = exported(made_score(blocks=blocks), padded(made_history(kind)), tmp_path / "export")
    assert export.manifest.min_reader < manifest_module.SEQUENCE_SCHEMA and export.sequence is None
    assert SEQUENCE_FILE not in export.manifest.files and export.manifest.sequence is None


def test_onnx_refuses_the_block_by_name(tmp_path):
    blocks = (Block("closed_form", 2, 0.0, 1.0), Block("sequence", 2, 0.0, 1.0, "sequence"))
    with pytest.raises(ValueError, match="onnx: the sequence block reads the order of a history"):
        write_graphs(tmp_path, blocks, None)
    with pytest.raises(ValueError, match="scoring 'sequence', and sequence is None"):
        Pooling(blocks, np.zeros(4, np.float32))


# ---------------------------------------------------------------- what is wrong in a file

CHANGES = {
    "lacks the tensor 'out.weight'": lambda t: t.pop("out.weight"),
    "'qkv.weight' is float32 .* expected": lambda t: t.update({"qkv.weight": t["qkv.weight"][:-1]}),
    "'last.bias' is float64": lambda t: t.update({"last.bias": t["last.bias"].astype(np.float64)}),
    "holds NaN or infinity": lambda t: t["mlp.0.bias"].__setitem__(0, np.nan),
    "a weight is beyond 1e\\+06": lambda t: t["out.weight"].__setitem__((0, 0), -2 * LARGEST),
    "do not belong there: more": lambda t: t.update(more=np.zeros(1, np.float32)),
    "a number of heads that divides 6": lambda t: t.update(distance=np.zeros((4, 20), np.float32)),
    "at most 1024 places": lambda t: t.update(distance=np.zeros((2, 1025), np.float32)),
    "expected a number of heads": lambda t: t.update(distance=np.zeros((2, 0), np.float32)),
    "the shapes of the weights": lambda t: t.update({"mlp.0.bias": np.zeros(5, np.float32)}),
}


def resign(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    from tests.fuzz import exports

    exports.sign(folder, manifest)


@pytest.mark.parametrize("words", CHANGES)
def test_a_damaged_file_is_refused(case, words):
    from safetensors.numpy import load_file, save_file

    path = case[3].folder / SEQUENCE_FILE
    tensors = {name: np.array(array) for name, array in load_file(path).items()}
    CHANGES[words](tensors)
    save_file(tensors, path)
    resign(path.parent, lambda manifest: None)
    with pytest.raises(ExportError, match=words):
        load_export(path.parent)


MANIFESTS = {
    "at most one may": lambda m: m["blocks"].append(dict(m["blocks"][-1])),
    "do not agree": lambda m: m["blocks"][-1].update(scoring="dot"),
    "has an exponent, a decay or dislikes": lambda m: m["blocks"][-1].update(decay=2.0),
    "has an exponent": lambda m: m["blocks"][-1].update(exponent=0.5),
    "a decay or dislikes": lambda m: m["blocks"][-1].update(dislikes=0.5),
}


@pytest.mark.parametrize("words", MANIFESTS)
def test_a_manifest_that_does_not_fit_is_refused(case, words):
    resign(case[3].folder, MANIFESTS[words])
    with pytest.raises(ExportError, match=words):
        load_export(case[3].folder)


def test_histories_without_ranks_and_a_missing_file_are_refused(case):
    from safetensors.numpy import load_file, save_file

    folder = case[3].folder
    tensors = dict(load_file(folder / "history.safetensors"))
    rank = tensors.pop("rank")
    save_file(tensors, folder / "history.safetensors")
    resign(folder, lambda manifest: None)
    with pytest.raises(ExportError, match="ranks are there where a block fades or reads the order"):
        load_export(folder)
    save_file(tensors | {"rank": rank}, folder / "history.safetensors")
    resign(folder, lambda manifest: None)
    (folder / SEQUENCE_FILE).unlink()
    with pytest.raises(ExportError, match=f"{SEQUENCE_FILE} is missing"):
        load_export(folder)
    resign(folder, lambda manifest: manifest["files"].pop(SEQUENCE_FILE))
    with pytest.raises(ExportError, match=f"'sequence' and {SEQUENCE_FILE} do not agree"):
        load_export(folder)


def test_an_older_reader_refuses_the_export(case, monkeypatch):
    monkeypatch.setattr(manifest_module, "SCHEMA", manifest_module.SEQUENCE_SCHEMA - 1)
    with pytest.raises(ExportError, match="needs a reader of schema 6"):
        load_export(case[3].folder)


def test_weights_within_the_bounds_give_finite_states():
    made = layer()
    arrays = {name: np.full(array.shape, LARGEST, np.float32) for name, array in weights(made).arrays.items()}
    for seed in range(3):
        draw = np.random.default_rng(seed)
        signed = {
            name: (array * draw.choice([-1, 1], array.shape)).astype(np.float32) for name, array in arrays.items()
        }
        vectors = (draw.choice([-1, 0, 1], (2, LENGTH, DIM)) * 3e38).astype(np.float32)
        assert np.isfinite(SequenceWeights(signed).states(vectors)).all()


def test_mutated_exports_load_or_are_refused(case, tmp_path):
    from tests.fuzz import exports

    seen = set()
    for seed in range(25):
        exports.mutate(case[3].folder, tmp_path / "mutated", random.Random(seed))
        seen.add(exports.outcome(tmp_path / "mutated"))
    assert seen <= {"refused", "loaded"} and "refused" in seen
