"""The artifact: what is written comes back, and nothing that is damaged, foreign or unsafe is read."""

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_export import F, make_contents
from safetensors.numpy import load_file, save_file

import recbole_llm.serving
from recbole_llm.export import manifest
from recbole_llm.export.errors import ExportError
from recbole_llm.export.reader import load_export
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.writer import exports_in, write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.scoring.probability import ProbabilityMap


def rewrite_manifest(folder, change):
    """Change the manifest and keep sums and id right, as an attacker would."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    for name in raw["files"]:
        content = (folder / name).read_bytes()
        raw["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(raw))
    try:
        raw["export_id"] = manifest._manifest_of(raw).identity()
    except ExportError:
        return
    path.write_text(json.dumps(raw))


def rewrite_tensors(folder, file, change):
    tensors = dict(load_file(folder / file))
    change(tensors)
    save_file(tensors, folder / file)
    rewrite_manifest(folder, lambda raw: None)


def test_what_is_written_comes_back(contents, export):
    for name in ("vector", "source", "bias", "offset", "history_offsets", "history_weight"):
        np.testing.assert_array_equal(getattr(export, name), getattr(contents, name))
    np.testing.assert_array_equal(export.history_items, contents.history_items)
    np.testing.assert_array_equal(export.trained, contents.trained)
    assert export.item_ids == contents.item_ids and export.user_ids == contents.user_ids
    assert export.records == list(contents.records)
    assert export.manifest.blocks == contents.blocks and export.manifest.item_text == contents.item_text
    features = np.random.default_rng(1).standard_normal((5, F)).astype(np.float32)
    for ours, theirs in zip(export.text_map.apply(features), contents.text_map.apply(features), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert not export.vector.flags.writeable


def test_a_probability_map_travels_along_and_exports_without_one_are_as_before(tmp_path, export_folder):
    assert "probability" not in json.loads((export_folder / "manifest.json").read_text())
    probability = ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5), (0.5,))
    write_artifact(tmp_path / "with", make_contents(probability=probability))
    export = load_export(tmp_path / "with")
    assert export.manifest.probability == probability
    assert export.manifest.export_id != load_export(export_folder).manifest.export_id
    (plain,), (mapped,) = (
        Recommender(read).recommend(Request(user="u1", k=1)).items for read in (load_export(export_folder), export)
    )
    assert plain.score == mapped.score
    assert plain.probability == pytest.approx(1 / (1 + math.exp(-plain.score)), rel=1e-6)
    length = int(np.diff(export.history_offsets)[1])
    logit = probability.logit(np.array(mapped.score), math.log(length))
    assert mapped.probability == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)


def test_ids_may_hold_anything(tmp_path):
    ids = ["", "a\nb", "a/b", '"', "\\", "\u2028", "🎬", "x" * 300, " "]
    contents = make_contents(n_items=len(ids), n_users=0, item_ids=ids)
    write_artifact(tmp_path / "e", contents)
    assert load_export(tmp_path / "e").item_ids == ids


def test_the_same_contents_have_the_same_id_and_others_another(tmp_path):
    first = write_artifact(tmp_path / "a", make_contents())
    again = write_artifact(tmp_path / "b", make_contents(metrics={"NDCG@10": 0.3}, card="# Other\n"))
    other = write_artifact(tmp_path / "c", make_contents(overlay_seq=3))
    assert first.export_id == again.export_id != other.export_id
    assert [path.name for path in exports_in(tmp_path)] == ["a", "b", "c"]


def test_an_existing_folder_is_not_touched(export_folder, contents):
    before = (export_folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        write_artifact(export_folder, contents)
    assert (export_folder / "manifest.json").read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ExportError, match="repeated"):
        write_artifact(tmp_path / "e", make_contents(n_items=5, n_users=0, item_ids=["a"] * 5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["vectors.safetensors", "item_ids.txt", "items.jsonl", "text_map.safetensors", "README.md"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "grown", "missing", "swapped", "linked"])
def test_a_damaged_file_is_named(export_folder, name, damage):
    path = export_folder / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    elif damage == "grown":
        path.write_bytes(content + b"\n")
    elif damage == "missing":
        path.unlink()
    elif damage == "swapped":
        shutil.copyfile(export_folder / "user_ids.txt", path)
    else:
        moved = export_folder.parent / name
        path.rename(moved)
        path.symlink_to(moved)
    with pytest.raises(ExportError, match=re.escape(name)):
        load_export(export_folder)


def test_an_unlisted_file_is_refused(export_folder):
    (export_folder / "extra.py").write_text("print('hello')")
    with pytest.raises(ExportError, match=r"extra\.py is not listed"):
        load_export(export_folder)


def test_without_verification_sizes_are_still_checked(export_folder):
    path = export_folder / "README.md"
    path.write_bytes(path.read_bytes().swapcase())
    load_export(export_folder, verify=False)
    path.write_bytes(b"short")
    with pytest.raises(ExportError, match="bytes"):
        load_export(export_folder, verify=False)


MANIFEST_DAMAGE = {
    "newer": (
        lambda m: m.update(schema=manifest.SCHEMA + 1, min_reader=manifest.SCHEMA + 1),
        rf"schema {manifest.SCHEMA + 1}.*schemas 1 to {manifest.SCHEMA}\..*Upgrade",
    ),
    "no schema": (lambda m: m.pop("schema"), "names no schema"),
    "schema text": (lambda m: m.update(schema="1"), "names no schema"),
    "lacks counts": (lambda m: m.pop("counts"), "lacks counts"),
    "negative count": (lambda m: m["counts"].update(items=-1), "counts lack items"),
    "bool count": (lambda m: m["counts"].update(items=True), "counts lack items"),
    "no block": (lambda m: m.update(blocks=[]), "no block"),
    "block without columns": (lambda m: m["blocks"][0].update(dim=0), "no columns"),
    "unknown scoring": (lambda m: m["blocks"][0].update(scoring="l2"), "scoring 'l2'"),
    "block field": (lambda m: m["blocks"][0].update(code="x"), "wrong form"),
    "blocks number": (lambda m: m.update(blocks=3), "wrong form"),
    "attribute kind": (lambda m: m["attributes"].update(genre="code"), "attribute kind"),
    "traversal": (lambda m: m["files"].update({"../x": m["files"]["README.md"]}), "not allowed"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": m["files"]["README.md"]}), "not allowed"),
    "code": (lambda m: m["files"].update({"encoder/model.py": m["files"]["README.md"]}), "not allowed"),
    "pickle": (lambda m: m["files"].update({"encoder/pytorch_model.bin": m["files"]["README.md"]}), "not allowed"),
    "dotted": (lambda m: m["files"].update({"encoder/../x.json": m["files"]["README.md"]}), "not allowed"),
    "unlisted ids": (lambda m: m["files"].pop("item_ids.txt"), "does not list item_ids"),
    "text map gone": (lambda m: m.update(text_map=None), "do not agree"),
    "more items": (lambda m: m["counts"].update(items=41), r"expected float32 \[41"),
    "more trained": (lambda m: m["counts"].update(trained_items=1), "trained"),
    "index": (lambda m: m.update(index={"kind": "hnsw"}), "neither exact nor ivf"),
    "decay": (lambda m: m.update(history_decay=-1.0), "history_decay"),
    "block's decay": (lambda m: m["blocks"][0].update(decay=0), "a block's decay"),
    "block's decay without ranks": (lambda m: m["blocks"][0].update(decay=2.0), "ranks are there where a block fades"),
    "similar": (lambda m: m.update(similar_by="code"), "similar_by"),
    "probability that falls": (lambda m: m.update(probability={"slopes": [-1.0]}), "wrong form.*slopes are"),
    "probability field": (lambda m: m.update(probability={"code": "x"}), "wrong form"),
    "block's exponent": (lambda m: m["blocks"][0].update(exponent=17), "exponent is beyond 16"),
    "block's exponent, no float": (lambda m: m["blocks"][0].update(exponent=10**400), "not valid JSON|wrong form"),
    "block's name": (lambda m: m["blocks"][0].update(name=["x"]), "name is no string"),
    "probability's exponent": (lambda m: m.update(probability={"exponent": -17.0}), "exponent is beyond 16"),
    "item text": (lambda m: m["item_text"].update(template=3), "item_text holds what is no string"),
    "text map": (lambda m: m.update(text_map=[]), "wrong form"),
    "text map's kind": (lambda m: m["text_map"].update(kind=1), "text_map holds no kind"),
    "overlay_seq": (lambda m: m.update(overlay_seq=2**53 + 1), "overlay_seq is no count"),
    "metrics": (lambda m: m.update(metrics=[]), "metrics is no object"),
    "created_at": (lambda m: m.update(created_at=0), "created_at is no string"),
    "index without nprobe": (lambda m: m.update(index={"kind": "ivf"}), "no nprobe"),
    "sum": (lambda m: m["files"]["README.md"].update(sha256="0"), None),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_a_wrong_manifest_is_refused(export_folder, case):
    change, message = MANIFEST_DAMAGE[case]
    path = export_folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(ExportError):  # as edited
        load_export(export_folder)
    if message is None:
        return
    with contextlib.suppress(ExportError, KeyError):  # and with an export_id that fits the edit
        raw["export_id"] = manifest._manifest_of(raw).identity()
    path.write_text(json.dumps(raw))
    with pytest.raises(ExportError, match=message):
        load_export(export_folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"schema": NaN}',
        b'{"schema": 1e999}',
        b'{"schema": -%d}' % 10**400,
        b'{"schema": 1, "schema": 1}',
        b"[" * 10**5,
    ],
)
def test_a_manifest_that_is_no_json_object_is_refused(export_folder, content):
    (export_folder / "manifest.json").write_bytes(content)
    with pytest.raises(ExportError, match=r"manifest\.json"):
        load_export(export_folder)


def test_a_manifest_that_was_edited_is_refused(export_folder):
    path = export_folder / "manifest.json"
    path.write_text(path.read_text().replace('"scale": 0.7', '"scale": 0.8'))
    with pytest.raises(ExportError, match="export_id"):
        load_export(export_folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ExportError, match="not a folder"):
        load_export(tmp_path / "nothing")
    with pytest.raises(ExportError, match=r"manifest\.json is missing"):
        load_export(tmp_path)


def poke(name, at, value):
    def change(tensors):
        array = tensors[name].copy()
        array.reshape(-1)[at] = value
        tensors[name] = array

    return change


TENSOR_DAMAGE = {
    "nan": ("vectors.safetensors", poke("item.vector", 3, np.nan), r"item\.vector.*NaN"),
    "infinite": ("vectors.safetensors", poke("item.bias", 0, -np.inf), r"item\.bias.*NaN or infinity"),
    "dtype": ("vectors.safetensors", lambda t: t.update({"item.bias": t["item.bias"].astype(np.float64)}), "float64"),
    "shape": ("vectors.safetensors", lambda t: t.update({"item.source": t["item.source"][:-1]}), r"item\.source"),
    "absent": ("vectors.safetensors", lambda t: t.pop("user.offset"), r"lacks the tensor 'user\.offset'"),
    "extra": ("vectors.safetensors", lambda t: t.update(code=t["item.bias"]), "do not belong there: code"),
    "item beyond": ("history.safetensors", poke("items", 0, 40), "outside the catalogue"),
    "item below": ("history.safetensors", poke("items", 0, -1), "outside the catalogue"),
    "offsets fall": ("history.safetensors", poke("offsets", 1, 10**6), "offsets do not rise"),
    "offsets start": ("history.safetensors", poke("offsets", 0, 1), "offsets do not rise"),
    "weight": ("history.safetensors", poke("weight", 0, -1.0), "negative"),
    "support": ("text_map.safetensors", lambda t: t.pop("support"), "support and gamma"),
    "map width": ("text_map.safetensors", lambda t: t.update(center=t["center"][:-1]), "15"),
    "gamma": ("text_map.safetensors", lambda t: t.update(gamma=np.array(-1, np.float32)), "gamma"),
}


@pytest.mark.parametrize("case", TENSOR_DAMAGE)
def test_wrong_tensors_are_refused_though_the_sums_fit(export_folder, case):
    file, change, message = TENSOR_DAMAGE[case]
    rewrite_tensors(export_folder, file, change)
    with pytest.raises(ExportError, match=message):
        load_export(export_folder)


def test_a_history_must_ascend(export_folder, export):
    sizes = np.diff(export.history_offsets)
    first = int(export.history_offsets[np.flatnonzero(sizes >= 2)[0]])
    rewrite_tensors(export_folder, "history.safetensors", poke("items", first, int(export.history_items[first + 1])))
    with pytest.raises(ExportError, match="ascending and unique"):
        load_export(export_folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("item_ids.txt", lambda text: text.replace('"i1"', '"i0"', 1), "repeated"),
        ("item_ids.txt", lambda text: text.replace('"i1"', "1", 1), "JSON string"),
        ("item_ids.txt", lambda text: text.replace('"i1"\n', '"i1","x"\n', 1), "41|lines"),
        ("item_ids.txt", lambda text: text[:-1], "cut off"),
        ("items.jsonl", lambda text: text.replace('"title"', '"name"', 1), "line 1"),
        ("items.jsonl", lambda text: text.replace("1980.0", '"1980"', 1), "attribute 'year'"),
        ("items.jsonl", lambda text: text.replace("1980.0", "NaN", 1), "not valid JSON"),
        ("items.jsonl", lambda text: text.replace('"year"', '"code"', 1), "attribute 'code'"),
    ],
)
def test_wrong_lists_are_refused_though_the_sums_fit(export_folder, file, content, message):
    path = export_folder / file
    path.write_text(content(path.read_text()))
    rewrite_manifest(export_folder, lambda raw: None)
    with pytest.raises(ExportError, match=message):
        load_export(export_folder)


def test_a_pickle_in_disguise_is_not_executed(export_folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for protocol in (0, pickle.HIGHEST_PROTOCOL):
        (export_folder / "vectors.safetensors").write_bytes(pickle.dumps(Trap(), protocol))
        rewrite_manifest(export_folder, lambda raw: None)
        with pytest.raises(ExportError, match="not a safetensors file"):
            load_export(export_folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [40, 10], "data_offsets": [0, 10**12]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "O", "shape": [1], "data_offsets": [0, 8]},
        {"shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        [],
    ],
)
def test_a_forged_header_is_refused(export_folder, entry):
    header = json.dumps({"item.vector": entry}).encode()
    (export_folder / "vectors.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    rewrite_manifest(export_folder, lambda raw: None)
    with pytest.raises(ExportError, match="not a safetensors file"):
        load_export(export_folder)


def test_bytes_after_the_last_tensor_are_refused(export_folder):
    path = export_folder / "vectors.safetensors"
    path.write_bytes(path.read_bytes() + b"payload!")
    rewrite_manifest(export_folder, lambda raw: None)
    with pytest.raises(ExportError, match="not a safetensors file"):
        load_export(export_folder)


@pytest.mark.parametrize("size", [2**63, 2**21, 9])
def test_a_forged_header_length_is_refused(export_folder, size):
    (export_folder / "vectors.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
    rewrite_manifest(export_folder, lambda raw: None)
    with pytest.raises(ExportError):
        load_export(export_folder)


def test_a_device_or_pipe_is_not_opened(export_folder):
    path = export_folder / "README.md"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ExportError, match="not a plain file"):
        load_export(export_folder)


def test_linear_map():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    T, C = normal(5, 3), normal(3, 4)
    linear = TextMap("linear", normal(5), C, normal(3, 4), normal(3), normal(4), normal(4), 0.5, transform=T)
    f = normal(2, 5)
    vector, _, bias = linear.apply(f)
    np.testing.assert_allclose(vector, (f - linear.center) @ T @ C + linear.vector_offset, rtol=1e-5)
    np.testing.assert_allclose(bias, (f - linear.center) @ T @ linear.bias + 0.5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"expected \[n, 5\]"):
        linear.apply(normal(2, 6))


def test_rbf_map(contents):
    m = contents.text_map
    f = np.random.default_rng(0).standard_normal((3, F)).astype(np.float32)
    z = (f - m.center).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    K = np.exp(-m.gamma * ((z[:, None] - m.support[None]) ** 2).sum(-1))
    np.testing.assert_allclose(m.apply(f)[1], K @ m.source + m.source_offset, rtol=1e-4, atol=1e-5)


def test_nothing_in_serving_can_run_code_from_a_file():
    folder = Path(recbole_llm.serving.__file__).parent
    unsafe = re.compile(r"\bpickle\b|torch\.load|(?<!\.)\beval\(|\bexec\(|np\.load\(|trust_remote_code=True")
    for path in folder.rglob("*.py"):
        assert not unsafe.search(path.read_text()), path.name
