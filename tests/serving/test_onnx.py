"""The ONNX graphs of an export against the Python that serves it."""

import shutil

import numpy as np
import pytest
from made_export import F, make_contents

pytest.importorskip("onnx", reason="extra 'onnx'")
pytest.importorskip("onnxruntime", reason="extra 'onnx'")
import onnxruntime

from recbole_llm.export.manifest import ONNX_RECOMMEND, ONNX_TEXT_MAP, Block
from recbole_llm.export.onnx_graphs import check_graphs
from recbole_llm.export.reader import load_export
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request

VARIANTS = {
    "plain": {},
    "cosine, user parts": {"scoring": "cosine", "user_part": True},
    "unlisted items": {"listed": np.arange(40) % 5 != 2},
    "no texts": {"text_map": None},
    "a block that fades": {
        "blocks": (Block("closed_form", 6, 0.0, 0.7, decay=2.0), Block("learned", 4, 0.5, 1.3)),
        "history_rank": np.arange(len(make_contents().history_items)) % 5,
    },
    "linear, transform": {
        "text_map": TextMap(
            kind="linear", center=np.ones(F, np.float32), transform=np.eye(F, 7, dtype=np.float32),
            vector=np.ones((7, 10), np.float32), source=np.ones((7, 10), np.float32), bias=np.ones(7, np.float32),
            vector_offset=np.ones(10, np.float32), source_offset=np.zeros(10, np.float32), bias_offset=0.5,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graphs_answer_as_the_export(tmp_path, variant):
    contents = make_contents(onnx=True, **VARIANTS[variant])
    manifest = write_artifact(tmp_path / "e", contents)
    assert manifest.export_id == write_artifact(tmp_path / "f", make_contents(**VARIANTS[variant])).export_id
    export = load_export(tmp_path / "e")
    assert (ONNX_TEXT_MAP in manifest.files) == (export.text_map is not None)
    # the tables are not in it
    assert manifest.files[ONNX_RECOMMEND].bytes < 8_000 < export.vector.nbytes * 1000
    session = onnxruntime.InferenceSession(str(tmp_path / "e" / ONNX_RECOMMEND))
    recommender = Recommender(export)
    for user, user_id in enumerate(export.user_ids):
        span = slice(*export.history_offsets[user : user + 2])
        history = export.history_items[span].astype(np.int64)
        wanted = recommender.recommend(Request(user=user_id, k=7)).items
        rows, scores = session.run(
            ["rows", "scores"],
            {
                "history": history,
                "weight": export.history_weight[span],
                "part": np.zeros(10, np.float32) if export.user_part is None else export.user_part[user],
                "exclude": history,
                "k": np.array([7], np.int64),
                **({} if export.history_rank is None else {"rank": export.history_rank[span]}),
            },
        )
        assert [export.item_ids[row] for row in rows] == [item.id for item in wanted]
        np.testing.assert_allclose(scores, [item.score for item in wanted], rtol=1e-4, atol=1e-5)
    if export.text_map is not None:
        texts = np.random.default_rng(1).standard_normal((5, F), dtype=np.float32)
        outputs = ["item_vector", "item_source", "item_bias"]
        found = onnxruntime.InferenceSession(str(tmp_path / "e" / ONNX_TEXT_MAP)).run(outputs, {"text_vector": texts})
        for got, expected in zip(found, export.text_map.apply(texts), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_graphs_of_another_model_are_found_out(tmp_path):
    write_artifact(tmp_path / "one", make_contents(onnx=True))
    write_artifact(tmp_path / "two", make_contents(onnx=True, dims=(4, 6)))
    shutil.copy(tmp_path / "two" / ONNX_RECOMMEND, tmp_path / "one" / ONNX_RECOMMEND)
    with pytest.raises(ValueError, match=ONNX_RECOMMEND):
        check_graphs(load_export_unchecked(tmp_path / "one"))


def load_export_unchecked(folder):
    """With a changed graph, which the manifest's size and sum would refuse."""
    import json

    from recbole_llm.export.writer import _sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / ONNX_RECOMMEND
    manifest["files"][ONNX_RECOMMEND] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return load_export(folder)


def test_without_onnx_the_option_is_an_error(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install .*\[onnx\]"):
        write_artifact(tmp_path / "e", make_contents(onnx=True))
    assert list(tmp_path.iterdir()) == []
