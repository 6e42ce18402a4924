"""With interactions split by time: fading histories, a next-item block, and validation items in the test's histories."""

import logging
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.checkpoints import load_trained
from recbole_llm.commands.export import build_index
from recbole_llm.export.export_model import export_model
from recbole_llm.export.reader import load_export
from recbole_llm.fitting import next_item, pipeline
from recbole_llm.fitting.decay_search import Fading
from recbole_llm.fitting.next_item import SPARSE_START
from recbole_llm.fitting.validation import user_metric
from recbole_llm.retrieval.recommender import Recommender, Request

BY_TIME = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}


def write_walks(root, toy_path):
    """Write a dataset whose users walk around a circle of 48 items, with a step aside now and then, into ``root/toy``."""
    rng = random.Random(0)
    folder = root / "toy"
    folder.mkdir(parents=True)
    (folder / "toy.item").write_text((toy_path / "toy" / "toy.item").read_text())
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for u in range(80):
        at, seen = rng.randrange(48), []
        while len(seen) < 10:
            if at not in seen:
                seen.append(at)
            at = (at + rng.choice([1, 1, 1, 2])) % 48
        lines += [f"u{u}\ti{i}\t{1000 * u + t}" for t, i in enumerate(seen)]
    rng.shuffle(lines[1:])
    (folder / "toy.inter").write_text("\n".join(lines) + "\n")


COLUMNS = {"inter": ["user_id", "item_id", "timestamp"]}


@pytest.fixture
def walks(run_config, tmp_path, toy_path):
    """Walks around a circle: what comes next is told by the newest item."""
    write_walks(tmp_path / "data", toy_path)
    return run_config | {"data_path": str(tmp_path / "data"), "eval_args": BY_TIME, "load_col": COLUMNS, "epochs": 2}


def train(config_dict):
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    loaders = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, loaders[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(*loaders[:2], saved=True, show_progress=False)
    return trainer, loaders


def pairs(loader):
    inter = loader._dataset.inter_feat
    return set(zip(inter["user_id"].tolist(), inter["item_id"].tolist(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"blocks": "closed_form", "closed_form_dim": 12}], ids=str)
def test_the_order_is_used_and_the_log_says_how(walks, caplog, changes):
    with caplog.at_level(logging.INFO):
        trainer, (train_data, valid, test) = train(walks | changes)
        result = trainer.evaluate(test)
    model = trainer.model
    told = re.search(r"(?:in deviations of each block.*|stay as chosen block by block): NDCG@10 ([\d.]+)", caplog.text)
    assert told
    assert trainer.best_valid_result["ndcg@10"] == pytest.approx(float(told[1]), abs=1e-3)
    assert "order TO: at test a user's history is the training and validation items" in caplog.text
    assert "histories fading by exp(-rank / " in caplog.text and "next-item block, decay" in caplog.text
    assert model.training_data().is_ordered and model.score.block("next_item") is not None
    validation = trainer.validation(valid)
    value = validation.value(model.scores, model.n_items)
    assert trainer.best_valid_result["ndcg@10"] == pytest.approx(value, abs=6e-5)  # RecBole rounds to four places
    without, _ = train(walks | changes | {"use_order": False})
    assert not without.model.training_data().is_ordered
    assert result["ndcg@10"] > 1.2 * without.evaluate(test)["ndcg@10"]


def test_the_test_reads_validation_items_and_nothing_else_does(walks):
    trainer, (train_data, valid, test) = train(walks | {"closed_form_dim": 12})
    model = trainer.model
    seen_at = {}
    for name, loader in (("valid", valid), ("test", test)):
        stock = type(model).user_vectors

        def user_vectors(self, users, name=name, stock=stock):
            history = self.ranking_history.select(users)
            for row in range(len(users)):  # newest 0, and no rank twice
                assert sorted(history.stretch(row, row + 1).ranks.tolist()) == list(range(history.sizes[row]))
            seen_at.setdefault(name, set()).update(
                zip(users[history.row_of_entry()].tolist(), history.ids.tolist(), strict=True)
            )
            return stock(self, users)

        type(model).user_vectors = user_vectors
        try:
            trainer.evaluate(loader, load_best_model=False)
        finally:
            type(model).user_vectors = stock
    assert seen_at["valid"] <= pairs(train_data)
    assert seen_at["test"] <= pairs(train_data) | pairs(valid) and seen_at["test"] >= pairs(valid)
    assert not seen_at["test"] & pairs(test)
    assert not model.at_test


def test_vectors_scores_and_pairs_agree_and_come_back_from_a_checkpoint(walks):
    trainer, (_, _, test) = train(walks | {"closed_form_dim": 12})
    model = trainer.model.eval()
    users = torch.arange(1, 30)
    for model.at_test in (False, True):
        w, bias = model.item_vectors()
        logits = model.scores(users)
        torch.testing.assert_close(model.user_vectors(users) @ w.T + bias, logits, rtol=1e-4, atol=1e-4)
        items = torch.arange(1, 30)
        torch.testing.assert_close(
            model.predict({"user_id": users, "item_id": items}), logits[torch.arange(29), items], rtol=1e-4, atol=1e-4
        )
    before, other, state = model.scores(users), model.other_parameter(), model.state_dict()
    model.fitted, model._later = None, None
    assert not torch.allclose(model.scores(users), before)
    model.load_state_dict(state)
    model.load_other_parameter(other)
    torch.testing.assert_close(model.scores(users), before)


@pytest.mark.parametrize(
    "changes",
    [{}, {"blocks": "closed_form"}, {"closed_form_dim": 12}, {"closed_form_dim": 12, "cold_boost": 1.0}],
    ids=str,
)
def test_the_export_ranks_as_the_model(walks, tmp_path, changes):
    """Every block fades a history in its own way, for known users and for lists of items, oldest first."""
    trainer, loaders = train(walks | changes)
    model, dataset = trainer.model.eval(), loaders[0]._dataset
    manifest = export_model(model, dataset, tmp_path / "export", index="exact", history="train")
    assert {block.name for block in manifest.blocks} >= {"closed_form", "next_item"}
    assert any(block.decay for block in manifest.blocks)
    export = load_export(tmp_path / "export")
    recommender = Recommender(export)
    users = torch.arange(1, dataset.user_num)
    logits = model.full_sort_predict({model.USER_ID: users}).view(len(users), -1)[:, 1:].numpy()
    for row, user in enumerate(export.user_ids):
        answer = recommender.recommend(Request(user=user, k=dataset.item_num, exclude_seen=False, explain=2))
        got = {item.id: item.score for item in answer.items}
        expected = logits[row]
        assert got.keys() == {i for i, logit in zip(export.item_ids, expected, strict=True) if np.isfinite(logit)}
        wanted = [got.get(item, -np.inf) for item in export.item_ids]
        np.testing.assert_allclose(wanted, expected, rtol=2e-4, atol=5e-5)
        for item in answer.items[:5]:
            total = sum(reason.contribution for reason in item.reasons) + item.rest + item.bias
            assert total == pytest.approx(item.score, abs=1e-5)
    if export.user_part is None:
        span = slice(*export.history_offsets[3:5])
        oldest_first = np.argsort(-export.history_rank[span])
        items = [export.item_ids[i] for i in export.history_items[span][oldest_first]]
        known = recommender.recommend(Request(user=export.user_ids[3]))
        assert recommender.recommend(Request(items=items)).items == known.items
        assert recommender.recommend(Request(items=items[::-1])).items != known.items


@pytest.mark.parametrize("dim", ["full", 12])
def test_cold_items_stand_beside_the_next_item_block(walks, tmp_path, dim):
    path = tmp_path / "data" / "toy" / "toy.inter"
    header, *rows = path.read_text().splitlines()
    rows = [row for row in rows if row.split("\t")[1] not in ("i45", "i46", "i47")]
    for u in range(20):  # a new item, and one after it: the new one is in validation
        rows += [f"u{u}\ti{45 + u % 3}\t{1000 * u + 900}", f"u{u}\ti{u % 40}\t{1000 * u + 950}"]
    path.write_text("\n".join([header, *rows]) + "\n")
    trainer, _ = train(walks | {"closed_form_dim": dim, "cold_boost": 0.8})
    model = trainer.model.eval()
    score, ids = model.score, model.score.cold.ids
    assert len(ids) == 3 and model.cold[ids].all() and score.block("next_item") is not None
    users = torch.arange(1, 30)
    w, bias = model.item_vectors()
    logits = model.scores(users)
    torch.testing.assert_close(model.user_vectors(users) @ w.T + bias, logits, rtol=1e-4, atol=1e-4)
    history = model.history.select(users)
    among = score.scores(history, score.user_parts(users), unlisted=True)
    assert logits[:, ids].isfinite().all()
    torch.testing.assert_close(among[:, ids], logits[:, ids])
    # at test the new items are in the histories, where they count by their own source vectors
    model.at_test = True
    history, warm = model.ranking_history.select(users), ~model.cold
    held = torch.isin(history.ids, ids)
    assert held.any()
    silent = [replace(block, source=block.source.index_fill(0, ids, 0.0)) for block in score.blocks]
    without = score.with_blocks(*silent).of_users(users, model.ranking_history)
    affected = torch.zeros(len(users), dtype=torch.bool)
    affected[history.row_of_entry()[held]] = True
    changed = (model.scores(users) - without)[:, warm][:, 1:].abs().amax(1)
    assert (changed[affected] > 1e-3).all() and (changed[~affected] == 0).all()


def test_repeatable_ranks_the_items_of_the_history_too_in_choices_and_figures(walks):
    trainer, (train_data, valid, test) = train(walks | {"repeatable": True, "blocks": "closed_form"})
    model, validation = trainer.model, trainer.validation(valid)
    assert not len(validation.seen.ids) and len(validation.seen.offsets) == len(validation.targets.offsets)
    unmasked = validation.value(model.scores, model.n_items)
    assert trainer.best_valid_result["ndcg@10"] == pytest.approx(unmasked, abs=6e-5)
    masked = replace(validation, seen=model.history).value(model.scores, model.n_items)
    assert masked > unmasked  # a walk does not return, and some items of the history stand before the target
    found = trainer.evaluate(test)["ndcg@10"]
    model.at_test = True
    targets = test._dataset.training_rows()
    empty = validation.seen
    by_hand = float(user_metric(model.scores, targets, empty, model.n_items, validation.metric).mean())
    assert found == pytest.approx(by_hand, abs=6e-5)


def test_an_order_by_a_column_that_is_not_read_is_refused_by_name(walks):
    config_dict = walks | {"load_col": {"inter": ["user_id", "item_id"]}}
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=config_dict)
    with pytest.raises(
        ValueError, match=r"'timestamp', and of toy.inter user_id, item_id were read: add it to load_col"
    ):
        data_preparation(config, create_dataset(config))


def test_what_was_chosen_block_by_block_stays_where_the_grid_has_nothing_better(walks, monkeypatch):
    trainer, (train_data, valid, _) = train(walks)
    model, validation = trainer.model, trainer.validation(valid)
    score, data = model.score, model.training_data()
    asked = []

    def chooses(found):
        monkeypatch.setattr(pipeline, "choose_fading", lambda *args: (asked.append(args), found)[1])

    chooses(Fading(50.0, None, 0.0, 0.0, (1e-9, 0.0, -1.0), 0.9))  # the learned block upside down
    assert pipeline.choose_decays(score, data, validation) is score
    chooses(Fading(None, None, 0.0, 0.0, (0.0, 0.0, 0.0), 0.0))
    assert pipeline.choose_decays(score, data, validation) is score
    assert len(asked) == 2
    # and what is better is taken
    chooses(Fading(2.0, 5.0, 0.5, 0.2, (3.0, 1.5, 0.25), 0.9))
    weak = score.with_blocks(*(replace(block, scale=-block.scale) for block in score.blocks))  # upside down
    found = pipeline.choose_decays(weak, data, validation)
    assert pipeline.weights_of(found) == [("closed_form", 3.0, 2.0), ("next_item", 1.5, 5.0), ("learned", 0.25, None)]


def test_hidden_items_leave_the_decayed_histories_of_a_refit(walks):
    trainer, _ = train(walks | {"blocks": "closed_form", "closed_form_dim": 12})
    model, data = trainer.model, trainer.model.training_data()
    score, users = model.score, torch.arange(1, 9)
    closed = replace(score.block("closed_form"), decay=2.0)
    score = replace(score, blocks=(closed,))
    hidden = data.history.ids == int(data.history.ids[0])
    left = data.history.keep(~hidden)
    assert float(left.select(users).ranks.sum()) > 0
    anew = pipeline._without_items(score, data, left, model.options, model.fitted.setting)
    assert pipeline.weights_of(anew) == [("closed_form", closed.scale, 2.0)]
    assert not anew.blocks[0].source[data.history.ids[0]].any()
    # entries that are left weigh as they did beside the hidden ones
    found = anew.queries(left.select(users))
    torch.testing.assert_close(found, anew.queries(data.history.select(users)))
    whole = score.with_blocks(replace(closed, source=anew.blocks[0].source)).queries(data.history.select(users))
    torch.testing.assert_close(found, whole)
    assert not torch.allclose(found, score.queries(data.history.select(users)))


def test_a_sequence_block_is_kept_in_checkpoints_and_exports(walks, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_llm.fitting.sequence.EPOCHS", 4)
    monkeypatch.setattr("recbole_llm.fitting.pipeline.BLEND_WEIGHTS", (0.3,))  # it counts, whatever it is worth
    monkeypatch.setattr(pipeline, "choose_decays", lambda score, *args: score)
    trainer, loaders = train(walks | {"blocks": ["closed_form", "sequence"]})
    model, users = trainer.model.eval(), torch.arange(1, 30)
    assert model.score.counting[-1].name == "sequence"
    value = trainer.validation(loaders[1]).value(model.scores, model.n_items)
    assert trainer.best_valid_result["ndcg@10"] == pytest.approx(value, abs=6e-5)
    before = model.scores(users)
    paths = {key: walks[key] for key in ("data_path", "encoder", "feature_cache_dir")}
    again, dataset = load_trained(trainer.saved_model_file, **paths)
    torch.testing.assert_close(again.scores(users), before)
    expected = again.score.of_users(users, again.known(dataset, "all").history)
    for kind in ("exact", "ivf"):
        folder = tmp_path / kind
        export_model(again, dataset, folder, index=kind, build_index=build_index)
        recommender = Recommender(load_export(folder))
        ids = dataset.field2id_token[dataset.iid_field]
        for user in range(1, 20):
            asked = Request(user=dataset.id2token(dataset.uid_field, user), k=len(ids), exclude_seen=False, explain=3)
            got = {item.id: item for item in recommender.recommend(asked).items}
            best = max(got.values(), key=lambda item: item.score)
            assert best.id == ids[int(expected[user - 1].argmax())] and best.order is not None
            for item, score in zip(ids[1:], expected[user - 1, 1:].tolist(), strict=True):
                assert item not in got or got[item].score == pytest.approx(score, rel=1e-3, abs=1e-3)
            assert kind == "ivf" or len(got) == int(torch.isfinite(expected[user - 1]).sum())
    with pytest.raises(ValueError, match="onnx: the sequence block reads the order of a history"):
        export_model(again, dataset, tmp_path / "graphs", index="exact", onnx=True)
    assert not (tmp_path / "graphs").exists()


def test_a_sequence_block_needs_interactions_in_order(walks):
    random_split = {"eval_args": BY_TIME | {"split": {"RS": [8, 1, 1]}, "order": "RO"}}
    with pytest.raises(ValueError, match="blocks names sequence, which reads the order of a history"):
        train(walks | random_split | {"blocks": ["closed_form", "sequence"]})


def test_the_content_of_the_next_item_block_counts_in_checkpoints_and_exports(walks, tmp_path, monkeypatch):
    """Vectors tell the place on the circle; that the block has content is no choice here."""
    angle = 2 * np.pi * np.arange(48) / 48
    vectors = np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], 1).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "vectors.ids.txt").write_text("".join(f"i{i}\n" for i in range(48)))
    monkeypatch.setattr(next_item, "_search_all", lambda search, _: search(SPARSE_START.with_content("text", 0.05)))
    monkeypatch.setattr(next_item, "NEXT_WEIGHTS", (0.3,))
    monkeypatch.setattr(pipeline, "choose_decays", lambda score, *args: score)
    trainer, loaders = train(
        walks | {"item_features_file": str(tmp_path / "vectors.npy"), "blocks": ["closed_form"], "cold_map": "none"}
    )
    model = trainer.model.eval()
    content = model.score.block("next_item_content")
    assert content is not None and content.scale and content.dim == 4
    users = torch.arange(1, 30)
    before, other = model.scores(users), model.other_parameter()
    model.fitted = None
    model.load_other_parameter(other)
    torch.testing.assert_close(model.scores(users), before)
    dataset = loaders[0]._dataset
    manifest = export_model(model, dataset, tmp_path / "export", index="exact", history="train")
    assert "next_item_content" in {block.name for block in manifest.blocks}
    recommender = Recommender(load_export(tmp_path / "export"))
    logits = model.full_sort_predict({model.USER_ID: users}).view(len(users), -1)[:, 1:].numpy()
    for row, user in enumerate(recommender.export.user_ids[:3]):
        answer = recommender.recommend(Request(user=user, k=48, exclude_seen=False, explain=2))
        got = {item.id: item.score for item in answer.items}
        found = [got[item] for item in recommender.export.item_ids]
        np.testing.assert_allclose(found, logits[row], rtol=2e-4, atol=5e-5)
