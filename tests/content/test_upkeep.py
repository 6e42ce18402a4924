"""What the store says of itself, and what pruning removes: never a file that is not the store's."""

import os
import time

import pytest
import torch

from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.store.upkeep import prune, store_info

TEXTS = ["pen", "an office chair", "toy story"]


@pytest.fixture
def store(tiny_bert, tmp_path):
    """Two encoders; the one with cls pooling was last used ten days ago."""
    store = FeatureStore(tmp_path / "store")
    for pooling in ("cls", "mean"):
        encode_texts(TEXTS, load_encoder(str(tiny_bert), pooling=pooling), store)
    old = store.folder / f"text-{load_encoder(str(tiny_bert), pooling='cls').fingerprint[:32]}" / "manifest.json"
    ten_days_ago = time.time() - 10 * 86400
    os.utime(old, (ten_days_ago, ten_days_ago))
    return store


def test_info(store, tiny_bert):
    new, old = store_info(store.folder)
    assert (new.name, new.modality, new.dim, new.shards) == (str(tiny_bert), "text", 32, 1)
    assert new.fingerprint == load_encoder(str(tiny_bert), pooling="mean").fingerprint
    assert old.encoder["pooling"] == "cls"
    assert new.bytes == sum(path.stat().st_size for path in new.folder.glob("*.safetensors"))
    assert "dim 32: 1 shards, 0.0 MiB, used 10.0 days ago" in old.line()
    assert store_info(store.folder / "nowhere") == []


def test_use_is_noted(store, tiny_bert):
    encode_texts(TEXTS, load_encoder(str(tiny_bert), pooling="cls"), store)
    assert store_info(store.folder)[0].encoder["pooling"] == "cls"


def test_prune_by_last_use(store):
    report = prune(store.folder, unused_days=5)
    assert [entry.encoder["pooling"] for entry in report.encoders] == ["cls"]
    (left,) = store_info(store.folder)
    assert left.encoder["pooling"] == "mean"
    assert not report.encoders[0].folder.exists()
    assert report.bytes > report.encoders[0].bytes
    assert report.lines()[0].startswith("Removed text")


def test_prune_by_name_or_fingerprint(store, tiny_bert):
    fingerprint = load_encoder(str(tiny_bert), pooling="mean").fingerprint
    assert len(prune(store.folder, encoder=fingerprint[:8]).encoders) == 1
    assert len(prune(store.folder, encoder=str(tiny_bert)).encoders) == 1
    assert store_info(store.folder) == []


def test_both_conditions_must_hold(store, tiny_bert):
    assert len(prune(store.folder, encoder=str(tiny_bert), unused_days=5, dry_run=True).encoders) == 1


def test_dry_run_touches_nothing(store):
    before = sorted(store.folder.rglob("*"))
    report = prune(store.folder, unused_days=0, dry_run=True)
    assert len(report.encoders) == 2
    assert report.bytes > 0
    assert report.lines()[-1].startswith("Would remove")
    assert sorted(store.folder.rglob("*")) == before


def test_nothing_asked_removes_damage_alone(store, tiny_bert):
    encoder = load_encoder(str(tiny_bert), pooling="mean")
    good, bad = (store_info(store.folder)[i].folder for i in (0, 1))
    (shard,) = bad.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0\0")
    stale, fresh = good / "0123.abc.tmp", good / "4567.def.tmp"
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (time.time() - 7200,) * 2)
    report = prune(store.folder)
    assert (report.damaged, report.abandoned, report.encoders) == ((shard,), (stale,), ())
    assert not shard.exists()
    assert fresh.exists()  # a process may be writing it now
    assert len(list(good.glob("*.safetensors"))) == 1
    assert torch.equal(encode_texts(TEXTS, encoder, store).vectors, encode_texts(TEXTS, encoder).vectors)


def test_files_of_others_stay(store, caplog):
    """feature_cache_dir may be a folder with other things in it."""
    inside = store_info(store.folder)[0].folder / "note.txt"
    inside.write_text("mine")
    (store.folder / "photo.jpg").write_bytes(b"x")
    (store.folder / "text-album").mkdir()
    prune(store.folder, unused_days=0)
    assert {path.name for path in store.folder.iterdir()} == {"photo.jpg", "text-album", inside.parent.name}
    assert list(inside.parent.iterdir()) == [inside]
    assert "holds files that are not the store's, and stays" in caplog.text


def test_damaged_manifest_is_still_listed(store):
    folder = store_info(store.folder)[0].folder
    (folder / "manifest.json").write_text("[")
    entry = next(entry for entry in store_info(store.folder) if entry.folder == folder)
    assert (entry.name, entry.dim, entry.shards) == ("unknown", 0, 1)


def test_mistakes(store):
    with pytest.raises(ValueError, match="unused_days must be at least 0, got -1"):
        prune(store.folder, unused_days=-1)
    with pytest.raises(ValueError, match="unused_days must be at least 0, got nan"):
        prune(store.folder, unused_days=float("nan"))
    with pytest.raises(ValueError, match=r"No encoder 'other' in .*; there are: .*tiny-bert"):
        prune(store.folder, encoder="other")
