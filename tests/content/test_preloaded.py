"""Item vectors that come with RecBole's own additional_feat_suffix and preload_weight take the place of an encoder's."""

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm.bridge.options import Options
from recbole_llm.content.text import read_atomic_table
from recbole_llm.recommend import open_model, recommend_users


@pytest.mark.filterwarnings("ignore")
def test_vectors_of_preload_weight(toy_path, run_config, paths, tmp_path):
    target = tmp_path / "data" / "toy"
    target.mkdir(parents=True)
    for kind in ("inter", "item"):
        (target / f"toy.{kind}").write_text((toy_path / "toy" / f"toy.{kind}").read_text())
    vectors = np.random.default_rng(0).standard_normal((48, 12))
    lines = ["eid:token\tvec:float_seq"]
    # backwards, and without one of item i5
    lines += [f"i{i}\t{' '.join(map(str, vectors[i]))}" for i in range(47, -1, -1) if i != 5]
    (target / "toy.emb").write_text("\n".join(lines) + "\n")
    settings = run_config | {
        "data_path": str(tmp_path / "data"),
        "additional_feat_suffix": ["emb"],
        "load_col": {"inter": ["user_id", "item_id"], "emb": ["eid", "vec"]},
        "alias_of_item_id": ["eid"],
        "preload_weight": {"eid": "vec"},
        "feature_transform": "none",
        "encoder": "no-such-encoder",
        "epochs": 1,
    }
    assert run_recbole("LLMTwoTower", "toy", config_dict=settings)["test_result"]["recall@10"] > 0
    (checkpoint,) = [path for path in (tmp_path / "saved").glob("*.pth") if "-last" not in path.name]
    from recbole_llm.checkpoints import load_trained

    paths |= {"data_path": settings["data_path"], "encoder": None}
    model, dataset = load_trained(checkpoint, **paths)
    table = dataset.item_features["text"]
    tokens = dataset.field2id_token["item_id"]
    assert not table.present[0] and not table.present[tokens.tolist().index("i5")]
    for row in torch.nonzero(table.present).flatten().tolist():
        np.testing.assert_allclose(table.vectors[row], vectors[int(tokens[row][1:])].astype(np.float32), rtol=1e-6)
    # RecBole's matrix holds the same, with zeros where there is none
    np.testing.assert_allclose(dataset.get_preload_weight("eid"), table.vectors, rtol=1e-6)
    assert len(list(recommend_users(open_model(checkpoint, **paths), k=2))) == 120


@pytest.mark.parametrize(("field", "seq"), [(",", "|"), ("\t", ",")])
@pytest.mark.filterwarnings("ignore")
def test_both_separators_are_those_of_recbole(tmp_path, field, seq):
    """As RecBole reads the same files; of two columns of vectors the one that preload_weight names."""
    from recbole.config import Config
    from recbole.data import create_dataset

    target = tmp_path / "s"
    target.mkdir()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, 6)).round(4)

    def write(suffix, rows):
        (target / f"s.{suffix}").write_text(
            "\ufeff" + "".join(field.join(row) + "\n" for row in rows), encoding="utf-8"
        )

    write("inter", [["user_id:token", "item_id:token"], *([f"u{n % 13}", f"i{n * 7 % 20}"] for n in range(90))])
    cells = [[seq.join(map(str, row)) for row in table] for table in (vectors, vectors + 1)]
    write(
        "emb",
        [["iid:token", "other:float_seq", "vec:float_seq"], *([f"i{n}", cells[1][n], cells[0][n]] for n in range(20))],
    )
    write(
        "item",
        [["item_id:token", "name:token_seq"], *([f"i{n}", seq.join(["fine", "lamp", f"n{n}"])] for n in range(20))],
    )
    given = {
        "data_path": str(tmp_path),
        "field_separator": field,
        "seq_separator": seq,
        "gpu_id": "",
        "show_progress": False,
    }
    given |= {"load_col": {"inter": ["user_id", "item_id"], "emb": ["iid", "vec"]}, "additional_feat_suffix": ["emb"]}
    given |= {"alias_of_item_id": ["iid"], "preload_weight": {"iid": "vec"}, "feature_transform": "none"}
    dataset = create_dataset(Config("LLMTwoTower", "s", config_dict=given))
    table = dataset.item_features["text"]
    tokens = dataset.field2id_token["item_id"][1:]
    expected = np.array([vectors[int(token[1:])] for token in tokens], dtype=np.float32)
    np.testing.assert_array_equal(table.vectors[1:], expected)
    np.testing.assert_allclose(dataset.get_preload_weight("iid")[1:], expected)
    # the texts of the same files
    from recbole_llm.content.text import choose_text_fields, texts_of_tokens

    read = read_atomic_table(target / "s.item", "item_id", separator=field, seq_separator=seq)
    texts, _ = texts_of_tokens(read, ["i3"], choose_text_fields(read))
    assert texts == ["Name: fine lamp n3"]


def test_a_file_that_is_named_goes_before(tmp_path):
    from recbole.config import Config

    given = {"preload_weight": {"eid": "vec"}, "alias_of_item_id": ["eid"], "data_path": str(tmp_path)}
    given["load_col"] = {"inter": ["user_id", "item_id"], "emb": ["eid", "vec"]}
    file = str(tmp_path / "toy" / "toy.emb")
    assert Options.from_config(Config("LLMTwoTower", "toy", config_dict=given)).item_features_file == file
    named = given | {"item_features_file": "mine.npy"}
    assert Options.from_config(Config("LLMTwoTower", "toy", config_dict=named)).item_features_file == "mine.npy"
    of_users = given | {"alias_of_item_id": None, "preload_weight": {"uid": "vec"}}
    assert Options.from_config(Config("LLMTwoTower", "toy", config_dict=of_users)).item_features_file is None
