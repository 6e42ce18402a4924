"""The items' content vectors in an export: beside the score, read with every check, and told to older readers."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from made_export import make_contents
from safetensors.numpy import save_file

from recbole_llm.export.errors import ExportError
from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.manifest import CONTENT, MANIFEST, _manifest_of
from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact


@pytest.fixture
def contents():
    made = make_contents()
    rng = np.random.default_rng(0)
    return replace(made, content={name: rng.random((len(made.item_ids), 5), np.float32) for name in ("text", "image")})


def test_content_comes_back_beside_the_score(contents, tmp_path):
    manifest = write_artifact(tmp_path / "export", contents)
    export = load_export(tmp_path / "export")
    assert sorted(export.content) == ["image", "text"]
    for name, table in contents.content.items():
        np.testing.assert_array_equal(export.content[name], table)
        np.testing.assert_array_equal(export_in_memory(contents).content[name], table)
    assert export.vector.shape[1] == sum(block.dim for block in contents.blocks)  # no columns of a user's scan
    plain = write_artifact(tmp_path / "plain", replace(contents, content={}))
    assert (manifest.min_reader, plain.min_reader) == (2, 1)
    size = sum(table.nbytes for table in contents.content.values())
    grown = sum(f.bytes for f in manifest.files.values()) - sum(f.bytes for f in plain.files.values())
    assert size <= grown < size + 1024  # the export grows by the content vectors alone


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((3, 5), np.float32), "text"),
        (np.zeros(3, np.float32), "text"),
        (np.full((12, 5), np.nan, np.float32), "text"),
        (np.zeros((12, 5), np.int64), "text"),
    ],
    ids=["rows", "one dimension", "not finite", "dtype"],
)
def test_content_that_does_not_fit_is_refused(contents, tmp_path, table, message):
    write_artifact(tmp_path / "export", contents)
    n_items = len(contents.item_ids)
    if len(table) == 12:
        table = np.resize(table, (n_items, 5)).astype(table.dtype)
    save_file({"text": table}, tmp_path / "export" / CONTENT)
    raw = json.loads((tmp_path / "export" / MANIFEST).read_text())
    written = (tmp_path / "export" / CONTENT).read_bytes()
    raw["files"][CONTENT] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    raw["export_id"] = _manifest_of(dict(raw)).identity()
    (tmp_path / "export" / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ExportError, match=message):
        load_export(tmp_path / "export")
