"""What serving computes from an export is the score: equal scores, contributions by block, probabilities and items left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_score import HISTORIES, N, U, close, expected_scores, made_blocks, made_history, made_score, normal

from recbole_llm.export.model_tables import tables_of
from recbole_llm.export.pooling import Pooling
from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import ExportContents, write_artifact
from recbole_llm.fitting.data import TrainingData
from recbole_llm.retrieval.audience import AskedItem, top_users
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows

SHOWN = ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5, 1.5), (0.5, 1.5))


def exported(score, history, folder, disliked=None):
    """The export of a score; row 0 of items and of users is padding, and stays behind."""
    tables = tables_of(score, TrainingData(history, AllRows(N)), U, cold_map=False)
    names = "vector source bias trained listed blocks offset user_part similar_by history_rank probability content sequence direct"
    contents = ExportContents(
        item_ids=[f"i{item}" for item in range(1, N)],
        user_ids=[f"u{user}" for user in range(1, U)],
        history_offsets=history.offsets.numpy()[1:],
        history_items=history.ids.numpy() - 1,
        history_weight=None if history.weights is None else history.weights.numpy(),
        disliked_offsets=None if disliked is None else disliked.offsets.numpy()[1:],
        disliked_items=None if disliked is None else disliked.ids.numpy() - 1,
        **{name: getattr(tables, name) for name in names.split()},
    )
    write_artifact(folder, contents)
    return load_export(folder)


def padded(history):
    """The same histories behind one of nobody, with the first and the last exchanged so that a known user's is empty."""
    sizes = history.sizes.tolist()
    assert sizes[0] == 3 and sizes[1] == 0
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    return history.select(order)


@pytest.mark.parametrize("kind", HISTORIES)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "vectors"])
def test_every_block_scores_and_explains_as_in_the_score(tmp_path, identity, kind):
    score, history = replace(made_score(identity), probability=SHOWN), padded(made_history(kind))
    if kind not in ("ranks", "both"):  # an export's blocks fade where its histories have ranks
        score = replace(score, blocks=tuple(replace(block, decay=None) for block in score.blocks))
    users = torch.arange(U)
    part = score.user_parts(users)
    part = {name: rows.index_fill(0, torch.tensor([0]), 0.0) for name, rows in part.items()}  # nobody has no part
    export = exported(score, history, tmp_path / "export")
    blocks = export.manifest.blocks
    assert [block.name for block in blocks] == [block.name for block in score.counting]
    assert all(block.decay == score.block(block.name).decay for block in blocks)

    # the arithmetic
    pooling, items = Pooling(blocks, export.offset), np.arange(N - 1)
    expected = expected_scores(replace(score, listed=torch.ones(N, dtype=torch.bool)), history, part)
    for user in range(1, U):
        span = slice(*export.history_offsets[user - 1 : user + 1])
        rows = export.history_items[span]
        ranks = None if export.history_rank is None else export.history_rank[span]
        query = pooling.query(export.source[rows], export.history_weight[span], export.user_part[user - 1], ranks)
        found = export.vector[items] @ query.vector + export.bias[items]
        listed = score.listed[1:].numpy()
        np.testing.assert_allclose(found[listed], expected[user, 1:][score.listed[1:]], rtol=3e-4, atol=3e-4)
        own = {name: table[[user]] for name, table in part.items()}
        parts = score.parts(history.select(torch.tensor([user])), torch.arange(1, N), own)
        by_block = pooling.parts(query, export.vector[items])
        assert by_block.keys() == {block.name for block in score.counting}
        for name, added in by_block.items():
            wanted = parts.of_history[name].numpy() if name in parts.of_history else np.zeros_like(added)
            np.testing.assert_allclose(added, wanted, rtol=3e-4, atol=3e-4)
        total = sum(by_block.values())
        np.testing.assert_allclose(pooling.contributions(query, export.vector[items]), total)

    # answers
    recommender = Recommender(export)
    scores = score.scores(history, part)
    chances = score.probabilities(scores, history.sizes.clamp(min=1).log()[:, None])
    for user in range(1, U):
        h = int(history.sizes[user])
        answer = recommender.recommend(Request(user=f"u{user}", k=N, exclude_seen=False, explain=max(h, 1)))
        got = {int(item.id[1:]): item for item in answer.items}
        assert set(got) == {item for item in range(1, N) if score.listed[item]}
        assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
        ids = sorted(got)
        close(torch.tensor([got[i].score for i in ids]), scores[user, ids])
        close(torch.tensor([got[i].probability for i in ids]), chances[user, ids], atol=1e-5)
        own = {name: table[[user]] for name, table in part.items()}
        parts = score.parts(history.select(torch.tensor([user])), torch.tensor(ids), own)
        added = sum(parts.of_history.values())
        entries = history.select(torch.tensor([user])).ids.tolist()
        for row, item in enumerate(ids):
            wanted = {entry: float(added[row, at]) for at, entry in enumerate(entries) if added[row, at] > 1e-3}
            reasons = {int(reason.id[1:]): reason.contribution for reason in got[item].reasons}
            assert wanted.keys() <= reasons.keys()
            assert {entry: reasons[entry] for entry in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-3)
            close(torch.tensor(got[item].bias), score.item_bias[item])
            assert got[item].rest + got[item].bias + sum(reasons.values()) == pytest.approx(got[item].score, abs=1e-4)


@pytest.mark.parametrize("kind", ["plain", "both"])
def test_what_users_dislike_counts_against_it_everywhere(tmp_path, kind):
    """Score, export, recommender and the search for users: minus d times the sources of the disliked items, in float64 too."""
    history = padded(made_history(kind))
    disliked = Rows(torch.tensor([0, 0, 2, 2, 3, 3, 6]), torch.tensor([2, 7, 9, 1, 3, 12]))
    closed, learned = (made_blocks(identity=False)[at] for at in (0, 2))
    closed = replace(closed, dislikes=0.4, disliked=disliked, decay=closed.decay if kind == "both" else None)
    score = made_score(blocks=(closed, learned))
    users = torch.arange(U)
    part = score.user_parts(users)
    for user in range(U):
        own = disliked.ids[disliked.offsets[user] : disliked.offsets[user + 1]]
        close(part["closed_form"][user], -0.4 * closed.source[own].double().sum(0))
    part["learned"][0] = 0  # nobody has no part
    scores = score.scores(history, part)
    plain = made_score(blocks=(replace(closed, dislikes=0.0), learned)).scores(history, {"learned": part["learned"]})
    assert not torch.allclose(scores[1], plain[1]) and torch.equal(scores[2], plain[2])

    export = exported(score, history, tmp_path / "export", disliked)
    assert export.manifest.min_reader == 3 and export.manifest.blocks[0].dislikes == 0.4
    recommender = Recommender(export)
    for user in range(1, U):
        answer = recommender.recommend(Request(user=f"u{user}", k=N, exclude_seen=False))
        got = {int(item.id[1:]): item.score for item in answer.items}
        own = disliked.ids[disliked.offsets[user] : disliked.offsets[user + 1]].tolist()
        assert set(got) == {item for item in range(1, N) if score.listed[item] and item not in own}
        close(torch.tensor(list(got.values())), scores[user, list(got)])
    wanted = AskedItem("new", "new", export.vector[4], float(export.bias[4]))
    (reached,) = top_users(export, [wanted], k=U, exclude_seen=False)
    assert {int(one.user[1:]): pytest.approx(one.score, rel=1e-3, abs=1e-3) for one in reached} == {
        user: float(scores[user, 5]) for user in range(1, U)
    }


def test_an_export_without_weights_and_dislikes_reads_as_before(tmp_path):
    blocks = (replace(made_blocks(identity=False)[0], decay=None),)
    export = exported(made_score(blocks=blocks), padded(made_history("plain")), tmp_path / "export")
    assert export.manifest.min_reader == 1
    assert "dislikes" not in (tmp_path / "export" / "manifest.json").read_text()


def test_items_that_somebody_lists_are_a_new_user_of_the_score(tmp_path):
    score, history = made_score(), padded(made_history("ranks"))
    recommender = Recommender(exported(score, history, tmp_path / "export"))
    newest_last = [4, 9, 2, 12]
    order = torch.tensor(newest_last).argsort()
    listed = Rows(torch.tensor([0, 4]), torch.tensor(newest_last)[order], ranks=torch.arange(3.0, -1.0, -1.0)[order])
    expected = score.scores(listed)[0]
    for excluded in (True, False):
        request = Request(items=[f"i{item}" for item in newest_last], k=N, exclude_seen=excluded)
        got = {int(item.id[1:]): item.score for item in recommender.recommend(request).items}
        assert set(got) == {i for i in range(1, N) if score.listed[i] and not (excluded and i in newest_last)}
        close(torch.tensor(list(got.values())), expected[list(got)])
    # given weights are meant for every block, which then does not fade
    weights = [0.5, 2.0, 1.0, 0.25]
    weighted = Rows(listed.offsets, listed.ids, torch.tensor(weights)[order])
    request = Request(items=[f"i{item}" for item in newest_last], weights=weights, k=N, exclude_seen=False)
    got = {int(item.id[1:]): item.score for item in recommender.recommend(request).items}
    close(torch.tensor(list(got.values())), score.scores(weighted)[0][list(got)])


def test_a_block_of_biases_alone_and_a_score_of_nothing(tmp_path):
    history = padded(made_history("ranks"))
    newest = LinearBlock("newest", None, bias=normal(N, seed=1), scale=0.5)
    silent = [replace(block, scale=0.0) for block in made_blocks()]
    for at, blocks in enumerate(((newest,), (*made_blocks(), newest), tuple(silent))):
        score = made_score(blocks=blocks)
        part = score.user_parts(torch.arange(U))
        recommender = Recommender(exported(score, history, tmp_path / f"export{at}"))
        scores = score.scores(history, part)
        for user in range(1, U):
            answer = recommender.recommend(Request(user=f"u{user}", k=N, exclude_seen=False))
            got = {int(item.id[1:]): item.score for item in answer.items}
            assert len(got) == int(score.listed[1:].sum())
            close(torch.tensor(list(got.values())), scores[user, list(got)])
