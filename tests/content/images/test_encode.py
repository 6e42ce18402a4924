"""Pictures through the store: each once by its bytes, faults and placeholders counted, a killed run begun again bit for bit."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_llm.content.images.encode import encode_pictures
from recbole_llm.content.images.sample import PictureSample
from recbole_llm.content.media import encode as module
from recbole_llm.content.store.store import FeatureStore


class Colours:
    """Mean colour of a picture, a little changed by the size of the batch, as products of matrices are."""

    modality, dim, fingerprint, batch_cost, side, batch_size = "image", 3, "c0" * 32, None, 8, 4

    def __init__(self, fail_after=None):
        self.seen, self.fail_after = [], fail_after

    def prepare(self, raw):
        return [PictureSample(np.asarray(picture, np.float32).mean((0, 1))) for picture in raw]

    def encode(self, batch):
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen.append(len(batch))
        return torch.from_numpy(np.stack([sample.pixels for sample in batch])) + 1e-6 * len(batch)

    def describe(self):
        return {"name": "colours"}


def picture(path, seed, size=(9, 7)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    path.write_bytes(file.getvalue())
    return values.reshape(-1, 3).mean(0)


@pytest.fixture
def many(tmp_path):
    """30 pictures, one for each item, and their mean colours."""
    means = [picture(tmp_path / f"{at}.png", at) for at in range(30)]
    return [()] + [(tmp_path / f"{at}.png",) for at in range(30)], np.stack(means)


def test_items_get_the_vectors_of_their_pictures(many, tmp_path):
    paths, means = many
    encoder = Colours()
    table, counts = encode_pictures(paths, encoder, FeatureStore(tmp_path / "store"))
    assert table.modality == "image" and table.present.tolist() == [False] + [True] * 30
    np.testing.assert_allclose(table.vectors[1:], means, rtol=1e-4)
    assert not table.vectors[0].any()
    assert (counts.items, counts.files, counts.encoded, counts.with_vector) == (30, 30, 30, 30)
    again = Colours()
    second, counts = encode_pictures(paths, again, FeatureStore(tmp_path / "store"))
    assert not again.seen and counts.encoded == 0 and torch.equal(second.vectors, table.vectors)
    assert "All 30 distinct pictures that can be read came from the store" in counts.lines()[0]


def test_the_same_bytes_are_encoded_once_and_several_pictures_are_averaged(many, tmp_path):
    paths, means = many
    twin = tmp_path / "twin.png"
    twin.write_bytes((tmp_path / "0.png").read_bytes())
    rows = [paths[1], (twin,), (*paths[1], *paths[2]), (*paths[1], twin)]
    table, counts = encode_pictures(rows, Colours())
    assert counts.files == counts.encoded == 2
    np.testing.assert_allclose(table.vectors, [means[0], means[0], means[:2].mean(0), means[0]], rtol=1e-4)


def test_what_cannot_be_read_is_missing_and_named_and_stops_nothing(many, tmp_path):
    paths, means = many
    (tmp_path / "3.png").write_bytes(b"<html>")
    (tmp_path / "4.png").write_bytes((tmp_path / "5.png").read_bytes()[:90])
    (tmp_path / "6.png").unlink()
    (tmp_path / "7.png").write_bytes(b"")
    store = FeatureStore(tmp_path / "store")
    for run in range(2):
        encoder = Colours()
        table, counts = encode_pictures(paths, encoder, store)
        missing = [False] + [at in (3, 4, 6, 7) for at in range(30)]
        assert (~table.present).tolist() == [True, *missing[1:]]
        assert not table.vectors[~table.present].any()
        assert counts.with_vector == 26 and counts.encoded == (26 if run == 0 else 0)
        found = {name: reason for reason, names in counts.unreadable.items() for name in names}
        assert found.keys() == {"3.png", "4.png", "6.png", "7.png"} and found["6.png"] == "no such file"
        assert found["3.png"].startswith("none of JPEG") and found["7.png"] == "empty file"
        said = "\n".join(counts.lines())
        assert "1 pictures count as missing, no such file: '6.png'" in said and "26 of 30 items" in said
    np.testing.assert_allclose(
        table.vectors[table.present], means[[at not in (3, 4, 6, 7) for at in range(30)]], rtol=1e-4
    )
    # a picture among several that cannot be read does not take the others with it
    table, _ = encode_pictures([(*paths[4], *paths[1])], Colours())
    np.testing.assert_allclose(table.vectors[0], means[0], rtol=1e-4)


def test_a_placeholder_counts_as_missing_and_is_named(many, tmp_path):
    paths, _ = many
    grey = tmp_path / "no-image.png"
    picture(grey, 99)
    rows = [*paths[1:20], *[(grey,)] * 11]
    table, counts = encode_pictures(rows, Colours())
    assert table.present.tolist() == [True] * 19 + [False] * 11
    assert counts.placeholders == {"no-image.png": 11}
    assert any("'no-image.png' stands for 11 items" in line for line in counts.lines())
    table, counts = encode_pictures([*paths[1:20], *[(grey,)] * 10], Colours())
    assert bool(table.present.all()) and not counts.placeholders


@pytest.mark.parametrize("fail_after", [0, 1, 3, 5])
def test_a_run_that_was_killed_and_begun_again_is_the_same_bit_for_bit(many, tmp_path, monkeypatch, fail_after):
    monkeypatch.setattr(module, "GROUP", 8)
    paths, _ = many
    whole, _ = encode_pictures(paths, Colours(), FeatureStore(tmp_path / "whole"))
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        encode_pictures(paths, Colours(fail_after), store)
    table, counts = encode_pictures(paths, Colours(), store)
    assert torch.equal(table.vectors, whole.vectors)
    assert counts.encoded == 30 - 8 * (fail_after // 2)
    shards = [sorted(p.name for p in (tmp_path / name).rglob("*.safetensors")) for name in ("whole", "store")]
    assert shards[0] == shards[1] and len(shards[0]) == 4


def test_processes_share_the_groups(many, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP", 8)
    paths, _ = many
    whole, _ = encode_pictures(paths, Colours())
    monkeypatch.setattr(module, "number_of_processes", lambda: (1, 2))
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        encode_pictures(paths, Colours(3), store)  # stops in its second group
    monkeypatch.setattr(module, "number_of_processes", lambda: (0, 2))
    table, counts = encode_pictures(paths, Colours(), store)
    assert counts.encoded == 30 - 8 and torch.equal(table.vectors, whole.vectors)


def test_too_little_memory_halves_the_batch_and_nan_is_an_error(many, caplog):
    paths, means = many

    failed = []

    class Small(Colours):
        def encode(self, batch):
            if len(batch) > 1:
                failed.append(len(batch))
                raise MemoryError
            return super().encode(batch)

    with caplog.at_level(logging.WARNING):
        table, _ = encode_pictures(paths, Small())
    np.testing.assert_allclose(table.vectors[1:], means, rtol=1e-4)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"Out of memory: the batch of pictures is lowered to {size}" for size in (2, 1)]
    assert failed == [4, 2], "what did not fit is not tried again"

    class Tiny(Colours):
        def encode(self, batch):
            raise MemoryError

    with pytest.raises(MemoryError, match="A single picture does not fit into memory. Take a smaller encoder"):
        encode_pictures(paths, Tiny())

    class Broken(Colours):
        def encode(self, batch):
            return super().encode(batch) * float("nan")

    with pytest.raises(ValueError, match=r"NaN or infinity for the picture '\d+.png'"):
        encode_pictures(paths, Broken())


def test_nothing_is_logged_as_a_warning_for_a_clean_catalogue(many, caplog):
    with caplog.at_level(logging.WARNING):
        encode_pictures(many[0], Colours())
    assert not caplog.records
