"""A catalogue beyond the dense limit from RecBole's evaluation to answers of an export, by neighbourhoods."""

import json
import logging

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from test_order import BY_TIME, COLUMNS, train, write_walks

from recbole_llm.bridge.evaluation.rows import ranked_rows
from recbole_llm.bridge.evaluation.streaming import rank_all
from recbole_llm.checkpoints import load_trained
from recbole_llm.export.export_model import export_model
from recbole_llm.export.reader import load_export
from recbole_llm.fitting import large_catalogue, next_item, pipeline
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.refit import chosen_of, refit
from recbole_llm.retrieval.recommender import Recommender, Request


@pytest.fixture(scope="module")
def beyond(toy_path, tiny_encoder, tmp_path_factory):
    """A trained model of a circle of 48 items with a limit of 10, both blocks by neighbourhoods; vectors tell the place."""
    folder = tmp_path_factory.mktemp("beyond")
    angle = 2 * np.pi * np.arange(48) / 48
    vectors = np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], 1).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    (folder / "vectors.ids.txt").write_text("".join(f"i{i}\n" for i in range(48)))
    write_walks(folder / "data", toy_path)
    # i47 is in the test part alone: a cold item
    inter = folder / "data" / "toy" / "toy.inter"
    lines = inter.read_text().splitlines()
    inter.write_text("\n".join([*(line for line in lines if "\ti47\t" not in line), "u0\ti47\t10\n"]))
    config = {
        "data_path": str(folder / "data"),
        "encoder": str(tiny_encoder),
        "feature_cache_dir": str(folder / "features"),
        "checkpoint_dir": str(folder / "saved"),
        "item_features_file": str(folder / "vectors.npy"),
        "gpu_id": "",
        "epochs": 1,
        "embedding_size": 16,
        "show_progress": False,
        "state": "WARNING",
        "metrics": ["Recall", "NDCG"],
        "topk": [5, 10],
        "valid_metric": "NDCG@10",
        "eval_args": BY_TIME,
        "load_col": COLUMNS,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(fit_closed_form.__kwdefaults__, "max_dense_items", 10)
        patch.setattr(next_item, "MAX_ITEMS", 10)
        patch.setattr(large_catalogue, "SPECTRAL_DIMS", (1,))
        patch.setattr(large_catalogue, "SEARCH_DIM_OF_MANY", 1)
        patch.setattr(large_catalogue, "KEPT", 20)
        patch.setattr(next_item, "NEXT_WEIGHTS", (0.3,))
        patch.setattr(pipeline, "choose_decays", lambda score, *args: score)
        yield config, *train(config | {"cold_boost": 1.0})


def test_a_large_catalogue_is_the_same_in_evaluation_checkpoints_and_exports(beyond, tmp_path, caplog):
    config, trainer, loaders = beyond
    model = trainer.model.eval()
    score = model.score
    names = {block.name: block for block in score.counting}
    assert names["closed_form"].direct is not None and names["next_item"].direct is not None
    assert int(names["closed_form"].direct.sizes.max()) == 20
    users = torch.arange(1, 60)
    before = model.scores(users)
    # validation saw what RecBole's evaluation sees, streamed and stock
    value = trainer.validation(loaders[1]).value(model.scores, model.n_items)
    assert trainer.best_valid_result["ndcg@10"] == pytest.approx(value, abs=6e-5)
    assert not model.has_item_vectors
    rows = ranked_rows(loaders[2])
    ids = rank_all(model, rows, 5, model.n_items, torch.device("cpu"))
    for at in range(4):
        own = model.scores(rows.users[at : at + 1])[0].clone()
        own[rows.seen.ids[rows.seen.offsets[at] : rows.seen.offsets[at + 1]]] = -torch.inf
        assert ids[at].tolist() == own.topk(5).indices.tolist()
    # one score taken apart
    user, items = torch.tensor([7]), torch.arange(1, 40)
    parts = score.parts(model.ranking_history.select(user), items, score.user_parts(user))
    torch.testing.assert_close(parts.total().float(), model.scores(user)[0, items], rtol=1e-3, atol=1e-4)

    paths = {key: config[key] for key in ("data_path", "encoder", "feature_cache_dir", "item_features_file")}
    again, dataset = load_trained(trainer.saved_model_file, **paths)
    torch.testing.assert_close(again.scores(users), before)

    manifest = export_model(again, dataset, tmp_path / "export", index="exact", history="train")
    assert manifest.min_reader == 6 and "direct.safetensors" in manifest.files
    export = load_export(tmp_path / "export")
    recommender = Recommender(export)
    logits = again.full_sort_predict({again.USER_ID: users}).view(len(users), -1)[:, 1:].numpy()
    for row, user in enumerate(export.user_ids[:5]):
        answer = recommender.recommend(Request(user=user, k=48, exclude_seen=False, explain=10))
        got = {item.id: item.score for item in answer.items}
        found = [got[item] for item in export.item_ids]
        np.testing.assert_allclose(found, logits[row], rtol=2e-4, atol=5e-5)
        for item in answer.items:
            total = item.rest + item.bias + sum(reason.contribution for reason in item.reasons)
            assert total == pytest.approx(item.score, abs=1e-4)
    # the cold item is placed by the vectors, and is in no direct row
    cold = int(torch.nonzero(again.cold)[0])
    assert again.score.cold is not None and again.score.cold.ids.tolist() == [cold] and "i47" in got
    assert not (names["closed_form"].direct.ids == cold).any()
    coded = export_model(again, dataset, tmp_path / "coded", history="train", dtype="int8", rescore=True)
    assert coded.min_reader == 6
    in_bytes, request = Recommender(load_export(tmp_path / "coded")), Request(user=export.user_ids[3], k=5)
    found, wanted = in_bytes.recommend(request), recommender.recommend(request)
    assert [item.id for item in found.items] == [item.id for item in wanted.items]
    assert [item.score for item in found.items] == pytest.approx([item.score for item in wanted.items], abs=1e-4)
    with pytest.raises(ValueError, match="onnx"):
        export_model(again, dataset, tmp_path / "graphs", history="train", onnx=True)
    assert not (tmp_path / "graphs").exists()
    assert json.loads((tmp_path / "export" / "manifest.json").read_text())["blocks"][0]["name"] == "closed_form"


def test_an_index_of_the_vectors_answers_as_exact_scoring(beyond, tmp_path):
    pytest.importorskip("faiss")
    from recbole_llm.commands.export import build_index

    _, trainer, loaders = beyond
    model, dataset = trainer.model.eval(), loaders[0]._dataset
    export_model(model, dataset, tmp_path / "ivf", index="ivf", history="train", build_index=build_index)
    export_model(model, dataset, tmp_path / "exact", index="exact", history="train")
    through, plain = (Recommender(load_export(tmp_path / name)) for name in ("ivf", "exact"))
    assert through._retriever is not None and plain._retriever is None
    for user in through.export.user_ids[:12]:
        request = Request(user=user, k=5)
        found, wanted = through.recommend(request), plain.recommend(request)
        assert [item.id for item in found.items] == [item.id for item in wanted.items]
        assert [item.score for item in found.items] == pytest.approx([item.score for item in wanted.items], abs=1e-5)


def test_a_final_fit_repeats_the_form(beyond, caplog):
    _, trainer, _ = beyond
    model, data = trainer.model.eval(), trainer.model.training_data()
    chosen = chosen_of(model.fitted, data, 1)
    again = type(chosen).from_state(json.loads(json.dumps(chosen.to_state())))
    learned = model.score.block("learned")
    with caplog.at_level(logging.INFO):
        found = refit(data, again, model.options, lambda: learned)
    for name in ("closed_form", "next_item"):
        block, wanted = found.score.block(name), model.score.block(name)
        assert block.direct is not None and torch.equal(block.direct.ids, wanted.direct.ids)
        torch.testing.assert_close(block.direct.weights, wanted.direct.weights)
        rest = data.trained
        torch.testing.assert_close(block.source[rest], wanted.source[rest], rtol=1e-3, atol=1e-5)
        assert block.scale == pytest.approx(wanted.scale, rel=1e-3)


def test_hidden_items_are_judged_by_the_same_form(beyond):
    _, trainer, _ = beyond
    model, data = trainer.model, trainer.model.training_data()
    hidden = int(data.history.ids[0])
    left = data.history.keep(data.history.ids != hidden)
    anew = pipeline._without_items(model.score, data, left, model.options, model.fitted.setting)
    closed = anew.block("closed_form")
    assert closed.direct is not None and not (closed.direct.ids == hidden).any()
    assert not closed.source[hidden].any() and closed.scale == model.score.block("closed_form").scale
