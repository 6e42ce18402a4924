"""What an export says of its encoder is data: typed settings, and a name that nobody follows unless the caller gives one."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from made_export import make_contents
from waiting import wait_until

import recbole_llm  # noqa: F401
from recbole_llm import cli
from recbole_llm.content.encoder_settings import DTYPES, OVERFLOWS, POOLINGS, SETTINGS, check_settings
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.export import manifest
from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import EncoderSpec
from recbole_llm.export.reader import load_export
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.writer import write_artifact
from recbole_llm.recommend import open_model, recommend_text

GOOD = {"pooling": "cls", "prompt": "query: ", "max_tokens": 12, "overflow": "head_tail", "dim": 8, "dtype": "bfloat16"}


def signed(folder, change):
    """Edit the manifest's encoder and give the manifest the export_id of its new contents, as anybody can."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw["encoder"])
    raw["export_id"] = manifest._manifest_of(json.loads(json.dumps(raw))).identity()
    path.write_text(json.dumps(raw))
    return folder


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "settings",
    [
        {"trust_remote_code": True},
        {"trust_remote_code": False},
        {"device": "cuda"},
        {"revision": "main"},
        {"": None},
        {"pooling": "sum"},
        {"pooling": None},
        {"pooling": ["cls"]},
        {"prompt": 3},
        {"prompt": "x" * 10_001},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 12.0},
        {"max_tokens": "12"},
        {"max_tokens": 10**7},
        {"overflow": "drop"},
        {"dim": -1},
        {"dim": [8]},
        {"dtype": "float64"},
        {"dtype": {}},
        [],
        None,
        "pooling",
    ],
    ids=str,
)
def test_a_setting_that_is_not_ours_is_refused(export_folder, settings):
    signed(export_folder, lambda encoder: encoder.update(settings=settings))
    with pytest.raises(ExportError, match=r"manifest\.json: (an encoder|the encoder's|the settings)"):
        load_export(export_folder)


@pytest.mark.parametrize("settings", [{}, GOOD, dict.fromkeys(("prompt", "max_tokens", "dim"))], ids=str)
def test_settings_of_ours_are_read(export_folder, settings):
    signed(export_folder, lambda encoder: encoder.update(settings=settings))
    assert load_export(export_folder).manifest.encoder.settings == settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("name", ""),
        ("name", "a\x1b[2J"),
        ("name", "x" * 5000),
        ("revision", 1),
        ("fingerprint", None),
        ("feature_dim", True),
        ("feature_dim", 0),
        ("feature_dim", "16"),
        ("bundled", True),
        ("bundled", "yes"),
    ],
)
def test_a_field_of_another_form_is_refused(export_folder, field, value):
    signed(export_folder, lambda encoder: encoder.update({field: value}))
    with pytest.raises(ExportError, match=r"manifest\.json: the encoder's"):
        load_export(export_folder)


def test_the_list_is_what_load_encoder_takes():
    import inspect

    import torch

    from recbole_llm.content.encoders import sentence_modules
    from recbole_llm.content.encoders import transformer as encoders

    taken = set(inspect.signature(load_encoder).parameters)
    assert taken - set(SETTINGS) == {"name", "revision", "device", "trust_remote_code"} and set(SETTINGS) <= taken
    assert {name: getattr(torch, name) for name in DTYPES} == encoders.DTYPES
    assert sentence_modules.POOLINGS is POOLINGS and encoders.OVERFLOWS is OVERFLOWS
    check_settings(GOOD)


# ------------------------------------------------------------------ an encoder outside the export


@pytest.fixture
def encoder_files(tiny_encoder, tmp_path):
    """A folder of the tiny encoder that a test may write into."""
    return shutil.copytree(tiny_encoder, tmp_path / "encoder files")


@pytest.fixture
def loaded(monkeypatch):
    """The names that load_encoder was asked for."""
    names, load = [], load_encoder
    monkeypatch.setattr(
        "recbole_llm.content.encoders.transformer.load_encoder",
        lambda name, **more: names.append(name) or load(name, **more),
    )
    return names


def with_encoder(name, fingerprint, **changes):
    """Contents whose texts are encoded by the tiny encoder: 32 dimensions, mapped to the made model's columns."""
    contents = make_contents()
    draw = np.random.default_rng(3).standard_normal
    table = lambda n: draw((n, len(contents.offset))).astype(np.float32)  # noqa: E731
    text_map = TextMap(
        kind="linear",
        center=draw(32).astype(np.float32),
        normalize=False,
        vector=table(32),
        source=table(32),
        bias=draw(32).astype(np.float32),
        vector_offset=table(1)[0],
        source_offset=table(1)[0],
        bias_offset=0.0,
    )
    spec = EncoderSpec(name, None, {"max_tokens": 9}, 32, fingerprint)
    return dataclasses.replace(contents, encoder=spec, text_map=text_map, **changes)


@pytest.fixture
def elsewhere(encoder_files, tmp_path):
    """An export whose manifest names a folder of somebody's as its encoder."""
    fingerprint = load_encoder(str(encoder_files), max_tokens=9).fingerprint
    write_artifact(tmp_path / "elsewhere", with_encoder(str(encoder_files), fingerprint))
    return tmp_path / "elsewhere"


def test_it_is_not_opened_unless_it_is_named(elsewhere, encoder_files, loaded, tmp_path, capsys):
    export = load_export(elsewhere)
    with pytest.raises(ValueError, match=r"nothing is loaded because a file names it.*--encoder"):
        recommend_text(export, "a rocket")
    assert cli.main(["recommend", str(elsewhere), "--text", "a rocket", "--k", "2"]) == 2
    error = capsys.readouterr().err
    assert f"--encoder '{encoder_files}'" in error and "Traceback" not in error
    assert cli.main(["recommend", str(elsewhere), "--users", "u1", "--k", "2"]) == 0  # the rest works
    assert loaded == []
    capsys.readouterr()

    copy = str(shutil.copytree(encoder_files, tmp_path / "a copy"))
    for name in (str(encoder_files), copy):  # the same files under another name are the same encoder
        assert cli.main(["recommend", str(elsewhere), "--text", "a rocket", "--k", "2", "--encoder", name]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3
    assert loaded == [str(encoder_files), copy]
    named = recommend_text(open_model(elsewhere, encoder=copy), "a rocket")
    assert named == recommend_text(load_export(elsewhere, encoders=[copy]), "a rocket")


def test_another_encoder_than_the_one_of_the_training_is_refused(elsewhere, encoder_files):
    config = json.loads((encoder_files / "config.json").read_text())
    (encoder_files / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="is another one than the model was trained with"):
        recommend_text(open_model(elsewhere, encoder=str(encoder_files)), "a rocket")
    with pytest.raises(ValueError, match="no such folder"):
        recommend_text(open_model(elsewhere, encoder="./nowhere"), "a rocket")


def test_code_beside_an_encoder_never_runs(elsewhere, encoder_files, tmp_path):
    """The attack: settings that trust, and a folder with a module in it; then the same with honest settings."""
    config = json.loads((encoder_files / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (encoder_files / "config.json").write_text(json.dumps(config))
    (encoder_files / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")

    def mine(encoder, **settings):
        """The manifest's encoder with the fingerprint of the folder as it is now, code included."""
        encoder["settings"] |= settings
        trusted = load_encoder(str(encoder_files), **(encoder["settings"] | {"trust_remote_code": True}))
        encoder["fingerprint"] = trusted.fingerprint

    trusting = shutil.copytree(elsewhere, tmp_path / "trusting")
    signed(trusting, lambda encoder: mine(encoder, trust_remote_code=True))
    signed(elsewhere, mine)
    for folder in (trusting, elsewhere):
        for arguments in ([], ["--encoder", str(encoder_files)]):
            assert cli.main(["recommend", str(folder), "--text", "a rocket", *arguments]) == 2
            assert not (tmp_path / "ran").exists()


def test_a_bundled_encoder_needs_no_name(encoder_files, loaded, tmp_path):
    fingerprint = load_encoder(str(encoder_files), max_tokens=9).fingerprint
    files = {path.name: path for path in encoder_files.iterdir() if path.suffix in (".json", ".safetensors")}
    contents = with_encoder("somebody/else", fingerprint, encoder_files=files)
    spec = dataclasses.replace(contents.encoder, bundled=True)
    write_artifact(tmp_path / "bundled", dataclasses.replace(contents, encoder=spec))
    assert recommend_text(open_model(tmp_path / "bundled"), "a rocket").items
    assert recommend_text(open_model(tmp_path / "bundled", encoder="another/one"), "a rocket").items
    assert set(loaded) == {str(tmp_path / "bundled" / "encoder")}


# ------------------------------------------------------------------ the service


@pytest.fixture
def begin(tmp_path):
    """Starts the service as the command does, with the export's own encoder; stops all at the end."""
    made = pytest.importorskip("made_service")
    from recbole_llm.serving.app import create_app
    from recbole_llm.serving.settings import Settings

    clients = []

    def start(export, **changes):
        settings = Settings(str(export), state=str(tmp_path / "state"), allowed_hosts=("testserver",), **changes)
        client = made.Client(create_app(Settings.from_json(settings.to_json())))
        client.__enter__()
        clients.append(client)
        return client.wait_for_encoder() if client.service.text.state == "loading" else client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def test_the_service_answers_without_it_and_says_why(elsewhere, encoder_files, begin, loaded, caplog):
    client = begin(elsewhere)
    assert client.ask(user="u1")["items"]
    detail = client.ask(422, text="a rocket")["detail"]
    assert "--encoder NAME" in detail and str(encoder_files) not in detail and str(encoder_files) in caplog.text
    assert client.put("/v1/items/new", json={"text": "a rocket"}).status_code == 422
    assert client.get("/health/ready").json()["encoder"] == "none"
    assert loaded == []


def test_the_service_loads_the_one_that_it_was_given(elsewhere, encoder_files, begin, loaded):
    client = begin(elsewhere, encoders=("./nowhere", str(encoder_files)))
    expected = recommend_text(open_model(elsewhere, encoder=str(encoder_files)), "a rocket")
    assert [item["id"] for item in client.ask(text="a rocket")["items"]] == [item.id for item in expected.items]
    assert loaded[0] == str(encoder_files)  # the one that the export means goes first


@pytest.mark.parametrize("how", ["admin", "watch"])
def test_an_export_that_appears_loads_nothing_either(encoder_files, begin, loaded, tmp_path, how):
    folder = tmp_path / "exports"
    write_artifact(folder / "one", make_contents(encoder=None, text_map=None))
    client = begin(folder, watch=how == "watch", poll_seconds=0.02)
    before = client.service.export_id
    write_artifact(folder / "two", with_encoder(str(encoder_files), "any"))
    if how == "admin":
        assert client.post("/v1/admin/reload", json={"export": "two"}).status_code == 200
    wait_until(lambda: client.service.export_id != before, "the other export is served")
    assert client.ask(user="u1")["items"]
    assert "--encoder NAME" in client.ask(422, text="a rocket")["detail"]
    assert loaded == []


def test_a_swap_does_not_take_the_texts_away(encoder_files, begin, loaded, tmp_path):
    """An export that would load an encoder of its own choosing does not replace one whose texts are answered."""
    fingerprint = load_encoder(str(encoder_files), max_tokens=9).fingerprint
    files = {path.name: path for path in encoder_files.iterdir() if path.suffix in (".json", ".safetensors")}
    contents = with_encoder("somebody/else", fingerprint, encoder_files=files)
    bundled = dataclasses.replace(contents, encoder=dataclasses.replace(contents.encoder, bundled=True))
    write_artifact(tmp_path / "exports" / "one", bundled)
    client = begin(tmp_path / "exports")
    expected, before = client.ask(text="a rocket")["items"], list(loaded)
    write_artifact(tmp_path / "exports" / "two", with_encoder(str(encoder_files), "other weights"))
    answer = client.post("/v1/admin/reload", json={"export": "two"})
    assert answer.status_code == 422 and "nothing is loaded because a file names it" in answer.json()["detail"]
    assert client.ask(text="a rocket")["items"] == expected
    assert loaded == before


def test_the_options_of_serve(elsewhere, capsys):
    import argparse

    from recbole_llm.commands.serve import add_serve_arguments, settings_of

    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    parsed = parser.parse_args([str(elsewhere), "--encoder", "a/b", "--encoder", "c", "--encoder", "a/b"])
    assert settings_of(parsed).encoders == ("a/b", "c")
    assert settings_of(parser.parse_args([str(elsewhere)])).encoders == ()
    with pytest.raises(SystemExit):
        parser.parse_args([str(elsewhere), "--encoder", "a/b", "--no-encoder"])


def test_serve_refuses_a_wrong_setting_in_one_line(elsewhere, capsys):
    pytest.importorskip("uvicorn")
    signed(elsewhere, lambda encoder: encoder["settings"].update(trust_remote_code=True))
    assert cli.main(["serve", str(elsewhere), "--read-only"]) == 2
    error = capsys.readouterr().err
    assert "'trust_remote_code' that a file may give" in error and "Traceback" not in error
