"""Sounds from import to answers: copied, in the model, in its checkpoints, encoded ahead, asked for by a tone."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy_data import config_of_media

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("soundfile")
import soundfile
from recbole.config import Config
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.bridge.dataset import LLMTwoTowerDataset
from recbole_llm.bridge.option_values import ModalitySource, modalities
from recbole_llm.checkpoints import load_trained
from recbole_llm.export.export_model import contents_of, export_model
from recbole_llm.export.manifest import SOUND_SCHEMA
from recbole_llm.export.reader import load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.importer import import_dataset
from recbole_llm.media import open_media, recommend_media
from tests.made_sounds import BANDS, RATE, bands, pitch_of, tone, write_clap, write_onnx_ear, write_tone

pytestmark = pytest.mark.filterwarnings("ignore")
WITHOUT = (3, 9)


@pytest.fixture(scope="module")
def shop(toy_path, tmp_path_factory):
    """A trained model of the toy data with sounds, what reads it, and its data."""
    folder = tmp_path_factory.mktemp("shop")
    data = folder / "data" / "toy"
    shutil.copytree(toy_path / "toy", data)
    (data / "audio").mkdir()
    for at in range(44):
        if at not in WITHOUT:
            write_tone(data / "audio" / f"i{at}.wav", at)
    encoder = write_onnx_ear(folder / "ear.onnx")
    config = config_of_media(folder, "audio", encoder)
    run_recbole("LLMTwoTower", "toy", config_dict=dict(config))
    (file,) = [path for path in (folder / "saved").glob("*.pth") if "-last" not in path.name]
    given = {key: config[key] for key in ("data_path", "feature_cache_dir", "item_modalities")}
    return file, given, config, data


def heard(samples):
    """The loudness of pitches as the ONNX file hears it, in float64."""
    from scipy.signal import resample_poly

    sound = resample_poly(samples.astype(np.float64), 1, 2)
    windows = [sound[at : at + 2000] for at in range(0, len(sound), 2000)]
    parts = np.stack([np.pad(window, (0, 2000 - len(window))) for window in windows]) @ bands().astype(np.float64)
    each = np.sqrt(parts[:, :BANDS] ** 2 + parts[:, BANDS:] ** 2)
    return np.average(each, axis=0, weights=[len(window) for window in windows])


def dataset_of(config):
    return LLMTwoTowerDataset(Config("LLMTwoTower", "toy", config_dict=dict(config)))


def test_sounds_are_a_modality_and_what_lacks_one_is_masked(shop, caplog, tmp_path):
    _, _, config, data = shop
    copy = tmp_path / "data" / "toy"
    shutil.copytree(data, copy)
    (copy / "audio" / "i5.wav").write_text("a text named .wav")
    (copy / "audio" / "i6.wav").write_bytes((data / "audio" / "i6.wav").read_bytes()[:5000])
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(config | {"data_path": str(tmp_path / "data")})
        content = dataset.item_features
    assert list(content) == ["audio"]
    audio, tokens = content["audio"], dataset.field2id_token["item_id"]
    absent = {token for token, has in zip(tokens[1:], audio.present[1:].tolist(), strict=True) if not has}
    assert absent == {"i3", "i5", "i6", "i9", "i44", "i45", "i46", "i47"}
    assert not audio.vectors[~audio.present].any() and audio.dim == BANDS
    assert "Sounds: 42 of 48 items name one (42 by a file audio/ITEM_ID.*)" in caplog.text
    assert "1 sounds count as missing, none of WAV" in caplog.text and "cut off" in caplog.text
    at = tokens.tolist().index("i8")
    raw = audio.vectors[at] - audio.vectors[tokens.tolist().index("i12")]
    sounds = [soundfile.read(data / "audio" / f"{item}.wav", dtype="float32")[0] for item in ("i8", "i12")]
    np.testing.assert_allclose(raw.numpy(), heard(sounds[0]) - heard(sounds[1]), atol=0.3, rtol=1e-2)


def test_items_are_ranked_by_the_likeness_of_their_sounds(shop):
    file, given, _, data = shop
    model = open_media(file, asked="audio", **given)
    ids = [f"i{at}" for at in range(44) if at not in WITHOUT]
    vectors = np.stack([heard(soundfile.read(data / "audio" / f"{item}.wav", dtype="float32")[0]) for item in ids])
    asked = tone(pitch_of(8) * 1.004, 1.3, seed=1000)
    question = data.parent.parent / "asked.wav"
    soundfile.write(question, asked, 8000, subtype="FLOAT")
    unit = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)  # noqa: E731
    cosines = unit(vectors - vectors.mean(0)) @ unit(heard(asked) - vectors.mean(0))
    expected = [ids[at] for at in np.argsort(-cosines, kind="stable")[:5]]
    answer = recommend_media(model, question, k=5, by="likeness")
    assert [item.id for item in answer.items] == expected and answer.source == "sound"
    assert {int(item.id[1:]) % 4 for item in answer.items} == {8 % 4}, "those of the pitch's octave come first"


def test_the_commands_answer_alike_and_say_what_is_wrong(shop, capsys, tmp_path):
    file, given, config, data = shop
    options = [f"--{key.replace('_', '-')}={given[key]}" for key in ("data_path", "feature_cache_dir")]
    options.append(f"--item-modalities={{audio: '{config['item_modalities']['audio']['encoder']}'}}")
    question = str(data / "audio" / "i8.wav")
    seen = []
    for command in ("recommend", "similar"):
        assert cli.main([command, str(file), "--audio", question, "--k", "3", "--by", "likeness", *options]) == 0
        seen.append([line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]])
    assert seen[0] == seen[1] and seen[0][0] == "i8"
    (tmp_path / "page.wav").write_text("<html>")
    for wrong, message in (
        (["--audio", str(tmp_path / "page.wav")], "cannot be read as a sound: none of WAV"),
        (["--audio", str(tmp_path / "none.wav")], "no such file"),
        (["--audio", question, "--in", "text"], "have no text to compare with: they have audio"),
        (["--text", "words", "--in", "audio"], "has no text tower"),
        (["--items", "i1", "--in", "audio"], "--in belongs to --text, --image and --audio"),
    ):
        assert cli.main(["recommend", str(file), *wrong, *options]) == 2
        assert message in capsys.readouterr().err


def test_an_export_is_asked_by_a_sound_as_its_checkpoint_is(shop, capsys, tmp_path):
    file, given, config, data = shop
    encoder = config["item_modalities"]["audio"]["encoder"]
    named = [f"--item-modalities={{audio: '{encoder}'}}"]
    options = [f"--{key.replace('_', '-')}={given[key]}" for key in ("data_path", "feature_cache_dir")] + named
    output, question = tmp_path / "export", data / "audio" / "i8.wav"
    assert cli.main(["export", str(file), "--output", str(output), *options]) == 0
    export = load_export(output)
    assert export.manifest.sounds.name == encoder and export.manifest.min_reader == SOUND_SCHEMA
    assert export.search.sound_space.dim == export.content["audio"].shape[1] and export.search.sound_text_space is None
    ours = recommend_media(open_media(output, asked="audio", item_modalities=given["item_modalities"]), question, k=7)
    theirs = recommend_media(open_media(file, asked="audio", **given), question, k=7)
    assert [item.id for item in ours.items] == [item.id for item in theirs.items] and ours.source == "sound"
    assert [item.score for item in ours.items] == pytest.approx([item.score for item in theirs.items], abs=1e-6)
    capsys.readouterr()
    for command in ("recommend", "similar"):
        assert cli.main([command, str(output), "--audio", str(question), "--k", "3", "--by", "likeness", *named]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[-1] == "i8"
    other = write_onnx_ear(tmp_path / "other.onnx", gain=2.0)
    for wrong, message in (
        (["--audio", str(question)], "nothing is loaded because a file names it. Name it yourself: --item-modalities '{audio:"),
        (["--audio", str(question), f"--item-modalities={{audio: '{other}'}}"], "is another encoder than"),
        (["--audio", str(data / "nothing.wav"), *named], "cannot be read as a sound"),
        (["--audio", str(question), "--in", "text", *named], "no way to ask by sound in text"),
        (["--audio", str(question), "--data-path", str(data), *named], "data_path belongs to a checkpoint"),
        (["--text", "words", "--in", "audio", *named], "has no text tower: texts find sounds with CLAP"),
    ):  # fmt: skip
        assert cli.main(["recommend", str(output), *wrong]) == 2
        assert message in capsys.readouterr().err, wrong
    bare = tmp_path / "bare"
    contents = contents_of(*load_trained(file, **given), map_sounds=False)
    assert write_artifact(bare, replace(contents, card="\n")).sounds is None
    assert cli.main(["recommend", str(bare), "--audio", str(question), *named]) == 2
    assert "this export holds no way to ask by a sound: its model has no sounds" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds neither a checkpoint .* nor an export"):
        open_media(tmp_path, asked="audio", item_modalities=given["item_modalities"])


@pytest.mark.slow
def test_an_export_of_a_joint_encoder_finds_sounds_by_words(toy_path, tmp_path):
    """A tiny CLAP: the answers of export and checkpoint are the same, and the way of the words is its own."""
    model = write_clap(tmp_path / "clap")
    data = tmp_path / "data" / "toy"
    shutil.copytree(toy_path / "toy", data)
    (data / "audio").mkdir()
    for at in range(44):
        write_tone(data / "audio" / f"i{at}.wav", at)
    config = config_of_media(tmp_path, "audio", str(model))
    run_recbole("LLMTwoTower", "toy", config_dict=dict(config))
    (file,) = [path for path in (tmp_path / "saved").glob("*.pth") if "-last" not in path.name]
    given = {key: config[key] for key in ("data_path", "feature_cache_dir", "item_modalities")}
    export_model(*load_trained(file, **given), tmp_path / "export")
    tables = load_export(tmp_path / "export").search
    assert not np.array_equal(tables.sound_space.center, tables.sound_text_space.center)
    for words in ("whale island", "robot"):
        ours, theirs = (
            recommend_media(open_media(path, asked="text", compared="audio", **keys), words, k=5, by="likeness")
            for path, keys in (
                (tmp_path / "export", {"item_modalities": given["item_modalities"]}),
                (file, given),
            )
        )
        assert [item.id for item in ours.items] == [item.id for item in theirs.items] and ours.source == "text"
        assert [i.score for i in ours.items] == pytest.approx([i.score for i in theirs.items], abs=1e-6)
    sound = recommend_media(
        open_media(tmp_path / "export", asked="audio", item_modalities=given["item_modalities"]),
        data / "audio" / "i8.wav",
        k=1,
        by="likeness",
    )
    assert [item.id for item in sound.items] == ["i8"]


def test_the_command_encodes_sounds_alone(shop, capsys, monkeypatch):
    _, given, config, _ = shop
    encoder = config["item_modalities"]["audio"]["encoder"]
    arguments = ["encode", "--dataset", "toy", "--modality", "audio", f"--data_path={given['data_path']}"]
    arguments += [f"--item_modalities={{audio: '{encoder}'}}", f"--feature_cache_dir={given['feature_cache_dir']}"]
    assert cli.main([*arguments, "--load_col={'inter': ['user_id', 'item_id']}", "--show_progress=False"]) == 0
    assert f"have an audio vector of {BANDS} dimensions" in capsys.readouterr().out


def test_import_copies_the_sounds_of_items(tmp_path):
    items = ("a", "b/c", "d", "e")
    rows = [f"u{user},{item},5" for user in range(4) for item in items]
    (tmp_path / "events.csv").write_text("user,item,rating\n" + "\n".join(rows) + "\n")
    folder = tmp_path / "songs"
    folder.mkdir()
    for at, name in enumerate(("a.wav", "b%2Fc.FLAC", "stranger.ogg")):
        soundfile.write(folder / name, tone(440, 0.2, seed=at), 8000, format=name.rsplit(".", 1)[1].upper())
    (folder / "d.mp3").write_text("<html>")
    (folder / "e.wav").write_bytes((folder / "a.wav").read_bytes()[:1000])
    report = import_dataset(tmp_path / "events.csv", "shop", data_path=tmp_path / "out", audio=folder)
    sounds = report.sounds
    assert (sounds.items, sounds.matched, sounds.files, sounds.copied) == (4, 2, 5, 2) and report.pictures is None
    assert list(sounds.refused.values()) == [["d.mp3"], ["e.wav"]]
    assert sorted(path.name for path in (tmp_path / "out/shop/audio").iterdir()) == ["a.wav", "b%2Fc.flac"]
    written = Path(report.config_file).read_text()
    assert "# item_modalities: {audio: {encoder: laion/clap-htsat-unfused}}" in written
    assert any("sounds take part once an encoder is named" in note for note in report.notes)
    encoder = write_onnx_ear(tmp_path / "ear.onnx")
    again = import_dataset(
        tmp_path / "events.csv", "other", data_path=tmp_path / "out", audio=folder, audio_encoder=encoder
    )
    assert yaml.safe_load(Path(again.config_file).read_text())["item_modalities"] == {"audio": {"encoder": encoder}}
    with pytest.raises(ValueError, match="audio_column and audio_encoder belong to audio"):
        import_dataset(tmp_path / "events.csv", "third", data_path=tmp_path / "out", audio_encoder=encoder)


def test_the_key_takes_a_window_for_sounds_alone():
    found = modalities("item_modalities", {"audio": {"encoder": "laion/clap-htsat-unfused", "seconds": 5}})
    assert found == {"audio": ModalitySource("laion/clap-htsat-unfused", None, 5.0)}
    with pytest.raises(ValueError, match=r"item_modalities.audio.seconds must be a finite number above 0"):
        modalities("item_modalities", {"audio": {"encoder": "a", "seconds": 0}})
    with pytest.raises(ValueError, match="an encoder, or {encoder, column}"):
        modalities("item_modalities", {"image": {"encoder": "a", "seconds": 5}})


def test_a_folder_of_hostile_sounds_stops_nothing(shop, tmp_path, caplog):
    """Each is counted and named, and the good ones have their vectors."""
    _, _, config, data = shop
    copy = tmp_path / "data" / "toy"
    shutil.copytree(data, copy)
    good = (data / "audio" / "i0.wav").read_bytes()
    huge = bytearray(good)
    huge[24:28] = (2_000_000_000).to_bytes(4, "little")
    bad = {"i10": b"text", "i11": good[:3000], "i12": bytes(huge), "i13": good[:44], "i14": b"", "i15": bytes(5000)}
    for item, content in bad.items():
        (copy / "audio" / f"{item}.wav").write_bytes(content)
    soundfile.write(copy / "audio" / "i16.wav", np.zeros(8000), 8000)
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(config | {"data_path": str(tmp_path / "data")})
        audio = dataset.item_features["audio"]
    present = dict(zip(dataset.field2id_token["item_id"].tolist(), audio.present.tolist(), strict=True))
    assert not any(present[item] for item in (*bad, "i16")) and present["i0"] and int(audio.present.sum()) == 35
    for item in (*bad, "i16"):
        assert f"'{item}.wav'" in caplog.text
    assert bool(torch.isfinite(audio.vectors).all()) and RATE == 4000


def test_a_file_names_no_function_as_encoder(shop, tmp_path):
    _, given, _, _ = shop
    (tmp_path / "run.yaml").write_text("item_modalities: {audio: 'own_sounds:encode'}\n")
    files, values = [str(tmp_path / "run.yaml")], {"data_path": given["data_path"]}
    with pytest.raises(ValueError, match=r"'own_sounds:encode' is a function.*{audio: own_sounds:encode}"):
        _ = LLMTwoTowerDataset(Config("LLMTwoTower", "toy", config_file_list=files, config_dict=values)).item_features
