"""A trained model against its export: the same scores, the same top-k, texts that land where the model puts them."""

import argparse
import glob
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm.checkpoints import load_trained
from recbole_llm.commands.export import add_export_arguments, run_export
from recbole_llm.export.export_model import export_model
from recbole_llm.export.reader import load_export
from recbole_llm.fitting.stage_values import FittedScore
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.scoring.probability import ProbabilityMap

VARIANTS = {
    "default": {},
    "cold items ranked": {"cold_boost": 1.0},
    "no cold map": {"cold_map": "none"},
    "cosine, no closed form": {"blocks": ["learned"], "scoring": "cosine", "history_exponent": 0.3},
    "every user part": {"user_tower": ["history", "id", "text"], "closed_form_dim": 8},
    "users by id alone": {"user_tower": ["id"], "blocks": ["learned"]},
    "closed form alone": {"blocks": ["closed_form"], "closed_form_dim": "full"},
    "recency": {
        "history_decay": 3.0,
        "eval_args": {"order": "TO", "split": {"RS": [0.8, 0.1, 0.1]}},
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    },
}


def train(run_config, **changes):
    run_recbole("LLMTwoTower", "toy", config_dict={**run_config, "epochs": 2, **changes})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*-[0-9][0-9].pth")
    return checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_the_export_ranks_as_the_model(run_config, paths, tmp_path, variant):
    model, dataset = load_trained(train(run_config, **VARIANTS[variant]), **paths)
    check_ranking(model, dataset, tmp_path / "export")
    if variant == "default":
        score = model.score
        assert min(score.probability.slopes) > 0 and score.probability != ProbabilityMap()
        shown = ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5, 1.5), (0.5, 1.5))
        assert [block.name for block in score.blocks] == ["closed_form", "learned"]
        for scales in ((0.0, 1.0), (0.7, 0.0), (0.3, 2.0)):
            blocks = tuple(replace(block, scale=scale) for block, scale in zip(score.blocks, scales, strict=True))
            model.fitted = FittedScore(replace(score, blocks=blocks, probability=shown))
            check_ranking(model, dataset, tmp_path / f"export-{scales}")
            manifest = load_export(tmp_path / f"export-{scales}").manifest
            assert manifest.dim == model.user_vectors(torch.tensor([1])).shape[1]
            assert [block.name for block in manifest.blocks] == [block.name for block in blocks if block.scale]


def check_ranking(model, dataset, folder):
    export_model(model, dataset, folder, history="train")  # by which the model ranks
    export = load_export(folder)
    recommender = Recommender(export)
    users = torch.arange(1, dataset.user_num)
    logits = model.full_sort_predict({model.USER_ID: users}).view(len(users), -1)[:, 1:].numpy()
    probabilities = model.probabilities(users)[:, 1:].numpy()
    items = dataset.field2id_token[dataset.iid_field][1:]
    assert export.item_ids == list(items) and len(export.user_ids) == len(users)
    for user, expected in zip(export.user_ids, logits, strict=True):
        answer = recommender.recommend(Request(user=user, k=len(items), exclude_seen=False))
        got = {item.id: item.score for item in answer.items}
        # what the model leaves out of its ranking, the export leaves out of its answers
        assert got.keys() == {item for item, logit in zip(items, expected, strict=True) if np.isfinite(logit)}
        np.testing.assert_allclose([got.get(item, -np.inf) for item in items], expected, rtol=2e-4, atol=2e-5)
        chances = {item.id: item.probability for item in answer.items}
        p = probabilities[export.user_ids.index(user)]
        np.testing.assert_allclose([chances.get(item, 0.0) for item in items], p, rtol=2e-4, atol=2e-6)
    model_history = model.history
    hidden = recommender.recommend(Request(user=export.user_ids[0], k=len(items)))
    assert len(hidden.items) == int(export.listed.sum()) - int(model_history.sizes[1])
    assert [not cold for cold in model.trained.value[1:]] == [
        recommender.catalog.is_cold(row) for row in range(len(items))
    ]


def test_titles_texts_and_attributes(run_config, paths, tmp_path):
    model, dataset = load_trained(train(run_config), **paths)
    manifest = export_model(model, dataset, tmp_path / "export")
    assert manifest.attributes == {"year": "number"}
    export = load_export(tmp_path / "export")
    row = export.item_ids.index("i3")
    assert export.records[row].attributes == {"year": 1983.0}
    assert export.records[row].title.startswith("A crime story")
    assert export.records[row].text == f"Title: {export.records[row].title}"
    assert export.records[export.item_ids.index("i7")].title == "i7"  # has no text
    assert manifest.encoder.feature_dim == 32 and manifest.item_text.fields == ("title",)
    assert "60 users" in (tmp_path / "export" / "README.md").read_text()
    export_model(model, dataset, tmp_path / "bare", keep_text=False, attributes=[])
    bare = load_export(tmp_path / "bare")
    assert bare.records[row].text is None and bare.records[row].attributes == {}
    with pytest.raises(ValueError, match=r"'colour'.*title:token_seq"):
        export_model(model, dataset, tmp_path / "other", attributes=["colour"])
    with pytest.raises(ValueError, match="exists"):
        export_model(model, dataset, tmp_path / "export")


@pytest.mark.parametrize(
    "changes", [{"feature_transform": "whiten"}, {"cold_boost": 0.75, "closed_form_dim": 8}], ids=str
)
def test_a_text_lands_where_the_model_puts_its_cold_items(run_config, paths, tmp_path, changes):
    """The model's own cold items, added by their texts as if they were new, score as the model scores them."""
    from recbole_llm.content.encoders.transformer import load_encoder

    sparse = {"split": {"RS": [0.1, 0.2, 0.7]}, "group_by": "none", "order": "RO", "mode": "full"}
    model, dataset = load_trained(train(run_config, eval_args=sparse, **changes), **paths)
    manifest = export_model(model, dataset, tmp_path / "export", bundle_encoder=True)
    export = load_export(tmp_path / "export")
    assert manifest.encoder.bundled and manifest.text_map["kind"] == "rbf"
    encoder = load_encoder(str(tmp_path / "export" / "encoder"), **manifest.encoder.settings)
    assert encoder.fingerprint == manifest.encoder.fingerprint
    cold = np.array([row for row in np.flatnonzero(~export.trained) if export.records[row].text])
    assert len(cold) >= 3 and (~export.listed[cold]).all() == (not model.score.cold.joint)
    with torch.no_grad():
        raw = encoder.encode(encoder.prepare([export.records[row].text for row in cold])).numpy()
    vector, source, bias = export.text_map.apply(raw)
    np.testing.assert_allclose(vector, export.vector[cold], rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(source, export.source[cold], rtol=1e-2, atol=2e-3)
    if model.score.cold.joint:
        np.testing.assert_allclose(bias, export.bias[cold], rtol=1e-2, atol=2e-3)


def test_the_command(run_config, paths, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    checkpoint = train(run_config)
    output = str(tmp_path / "export")
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"dataset": "toy", "test_result": {"ndcg@10": 0.25}}))
    given = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    arguments = [checkpoint, *given, "--output", output, "--attributes", "year", "--metrics", str(result)]
    assert run_export(parser.parse_args(arguments)) == 0
    assert f"next: recbole-llm serve {output} --encoder {paths['encoder']}\n" in capsys.readouterr().out
    assert load_export(output).manifest.metrics == {"dataset": "toy", "ndcg@10": 0.25}
    assert "| ndcg@10 | 0.25 |" in (tmp_path / "export" / "README.md").read_text()
    assert (
        run_export(
            parser.parse_args([run_config["checkpoint_dir"], *given, "--output", output + "2", "--bundle-encoder"])
        )
        == 0
    )
    assert f"next: recbole-llm serve {output}2\n" in capsys.readouterr().out  # of the newest in the folder
    assert load_export(output + "2").manifest.counts == load_export(output).manifest.counts
    result.write_text("{}")
    with pytest.raises(ValueError, match="holds no test_result"):
        run_export(parser.parse_args(arguments))
    with pytest.raises(ValueError, match="does not exist"):
        run_export(parser.parse_args(["nowhere.pth", "--output", str(tmp_path / "x")]))


def test_a_checkpoint_of_another_model_is_refused(run_config, tmp_path):
    run_recbole("Pop", "toy", config_dict={**run_config, "train_neg_sample_args": None})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*-[0-9][0-9].pth")
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    with pytest.raises(ValueError, match="was not written by recbole-llm for LLMTwoTower"):
        run_export(parser.parse_args([checkpoint, "--output", str(tmp_path / "x")]))
