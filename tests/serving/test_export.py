"""A trained model against its export: the same scores, the same top-k, texts that land where the model puts them."""

import argparse
import glob

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm.content.feature_table import FeatureTable, apply_transform
from recbole_llm.serving.artifact import load_export
from recbole_llm.serving.export import add_export_arguments, export_model, feature_map, load_trained, run_export
from recbole_llm.serving.recommend import Recommender, Request

VARIANTS = {
    "default": {},
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


def ridge(features, target):
    z = np.c_[features, np.ones(len(features))].astype(np.float64)
    gram = z.T @ z
    return np.linalg.solve(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)), z.T @ target).astype(np.float32)


class LinearColdMap:
    """Stands for the model's cold map: linear ridge from transformed text vectors to the model's own vectors."""

    def __init__(self, model, features):
        from recbole_llm.serving.export import _tables

        self.tables, self.features = _tables(model), features[1:]

    def text_map(self, center, transform):
        from recbole_llm.serving.text_map import TextMap

        vector, source, bias = (ridge(self.features, self.tables[name]) for name in ("vector", "source", "bias"))
        return TextMap(
            "linear", center, vector[:-1], source[:-1], bias[:-1], vector[-1], source[-1], float(bias[-1]), transform
        )


def train(run_config, **changes):
    run_recbole("LLMTwoTower", "toy", config_dict={**run_config, "epochs": 2, **changes})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*.pth")
    return checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_the_export_ranks_as_the_model(run_config, tmp_path, variant):
    model, dataset, _ = load_trained(train(run_config, **VARIANTS[variant]))
    check_ranking(model, dataset, tmp_path / "export")
    if variant == "default":
        for scales in ((0.0, 1.0), (0.7, 0.0), (0.3, 2.0)):
            model.block_scales = scales
            check_ranking(model, dataset, tmp_path / f"export-{scales}")
            columns = load_export(tmp_path / f"export-{scales}").manifest.dim
            assert columns == model.user_vectors(torch.tensor([1])).shape[1] or 0.0 in scales


def check_ranking(model, dataset, folder):
    export_model(model, dataset, folder)
    export = load_export(folder)
    recommender = Recommender(export)
    users = torch.arange(1, dataset.user_num)
    logits = model.full_sort_predict({model.USER_ID: users}).view(len(users), -1)[:, 1:].numpy()
    items = dataset.field2id_token[dataset.iid_field][1:]
    assert export.item_ids == list(items) and len(export.user_ids) == len(users)
    for user, expected in zip(export.user_ids, logits, strict=True):
        answer = recommender.recommend(Request(user=user, k=len(items), exclude_seen=False))
        got = {item.id: item.score for item in answer.items}
        np.testing.assert_allclose([got[item] for item in items], expected, rtol=2e-4, atol=2e-5)
    model_history = model.history
    hidden = recommender.recommend(Request(user=export.user_ids[0], k=len(items)))
    assert len(hidden.items) == len(items) - int(model_history.sizes[1])
    assert [not cold for cold in model._trained.value[1:]] == [
        recommender.catalog.is_cold(row) for row in range(len(items))
    ]


def test_titles_texts_and_attributes(run_config, tmp_path):
    model, dataset, _ = load_trained(train(run_config))
    manifest = export_model(model, dataset, tmp_path / "export")
    assert manifest.attributes == {"year": "number"} and manifest.text_map is None
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


def test_a_text_lands_where_the_model_puts_it(run_config, tmp_path):
    from recbole_llm.content.encoders import load_encoder

    model, dataset, _ = load_trained(train(run_config, feature_transform="whiten"))
    model.cold_map = LinearColdMap(model, dataset.item_features["text"].vectors.numpy())
    manifest = export_model(model, dataset, tmp_path / "export", bundle_encoder=True)
    assert manifest.encoder.bundled
    export = load_export(tmp_path / "export")
    encoder = load_encoder(str(tmp_path / "export" / "encoder"), **manifest.encoder.settings)
    assert encoder.fingerprint == manifest.encoder.fingerprint
    rows = [row for row, record in enumerate(export.records) if record.text]
    raw = encoder.encode(encoder.prepare([export.records[row].text for row in rows])).detach().numpy()
    vector, _, bias = export.text_map.apply(raw)
    z = np.c_[dataset.item_features["text"].vectors.numpy()[1:], np.ones(len(export.item_ids))]
    for got, target in ((vector, export.vector), (bias, export.bias)):
        np.testing.assert_allclose(got, (z @ ridge(z[:, :-1], target))[rows], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "center", "standardize", "whiten"])
def test_feature_map_is_the_transform(kind):
    torch.manual_seed(0)
    present = torch.arange(30) != 4
    table = FeatureTable(torch.randn(30, 7) @ torch.randn(7, 7) + 1, present, "text", "x")
    center, transform = feature_map(table, kind)
    z = table.vectors.numpy() - center
    z = z if transform is None else z @ transform
    np.testing.assert_allclose(z[present], apply_transform(table, kind).vectors[present], rtol=1e-4, atol=1e-5)


def test_the_command(run_config, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    checkpoint = train(run_config)
    output = str(tmp_path / "export")
    assert run_export(parser.parse_args([checkpoint, "--output", output, "--attributes", "year"])) == 0
    assert f"recbole-llm serve {output}" in capsys.readouterr().out
    assert load_export(output).manifest.metrics["best_valid_score"] > 0
    with pytest.raises(ValueError, match="does not exist"):
        run_export(parser.parse_args(["nowhere.pth", "--output", str(tmp_path / "x")]))


def test_a_model_without_vectors_is_refused(run_config, tmp_path):
    run_recbole("Pop", "toy", config_dict={**run_config, "train_neg_sample_args": None})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*.pth")
    options = argparse.Namespace(checkpoint=checkpoint, output=str(tmp_path / "x"), index="auto", attributes=None)
    with pytest.raises(ValueError, match="Pop has no item vectors"):
        run_export(options)
