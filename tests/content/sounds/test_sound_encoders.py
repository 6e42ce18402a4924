"""Audio models against transformers' own, with tiny weights; ONNX files; functions; tones of near pitch are near."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("soundfile")

from recbole_llm.content.encoders.resolve import EncoderNotFoundError
from recbole_llm.content.encoders.sounds import load_sound_encoder
from recbole_llm.content.encoders.windows import SoundSample, windows_mean
from recbole_llm.content.media.encode import encode_files
from recbole_llm.content.sounds.files import SOUNDS
from recbole_llm.content.store.store import FeatureStore
from tests.made_sounds import tone, write_onnx_ear, write_tone

KINDS = ("clap", "ast", "wav2vec2", "whisper")


def encoded(encoder, sounds):
    with torch.inference_mode():
        return encoder.encode(encoder.prepare(sounds))


def oracle(kind, model, extractor, window):
    """A window's vector by transformers alone, one window at a time."""
    with torch.no_grad():
        if kind == "whisper":
            given = extractor(window, sampling_rate=8000, return_tensors="pt", return_attention_mask=True)
            frames = model.get_encoder()(given["input_features"])[0][0]
            heard = given["attention_mask"][0].reshape(-1, 2)[:, 0].bool()
            return frames[heard].mean(0)
        given = extractor(window, sampling_rate=8000, return_tensors="pt")
        if kind == "clap":
            found = model.get_audio_features(given["input_features"], is_longer=torch.zeros(1, 1, dtype=torch.bool))
            return getattr(found, "pooler_output", found)[0]
        if kind == "ast":
            return model(given["input_values"]).pooler_output[0]
        return model(given["input_values"])[0][0].mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_is_the_mean_of_its_windows_by_their_length(kind, hearing):
    folder, model, extractor, dim = hearing(kind)
    encoder = load_sound_encoder(str(folder), seconds=0.6)
    assert (encoder.dim, encoder.rate, encoder.seconds, encoder.modality) == (dim, 8000, 0.6, "audio")
    sounds = [tone(300, 1.5, seed=1), tone(800, 0.25, seed=2), tone(500, 1.2, seed=3), tone(700, 0.05, seed=4)]
    found = encoded(encoder, sounds)
    assert found.dtype == torch.float32 and found.shape == (4, dim)
    pieces = [
        [sounds[0][:4800], sounds[0][4800:9600], sounds[0][9600:]],
        [sounds[1]],
        [sounds[2][:4800], sounds[2][4800:]],
        [np.pad(sounds[3], (0, 400))],
    ]
    for vector, windows in zip(found, pieces, strict=True):
        each = torch.stack([oracle(kind, model, extractor, window) for window in windows])
        weights = torch.tensor([float(len(window)) for window in windows])
        expected = (each * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(vector, expected, atol=2e-5, rtol=2e-4)
    again = encoded(encoder, [sounds[2]])[0]
    torch.testing.assert_close(again, found[2], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wav2vec2"])  # whose random filters fold pitches
def test_tones_of_near_pitch_are_near(kind, hearing):
    encoder = load_sound_encoder(str(hearing(kind)[0]))
    pitches = (300, 310, 2000, 2050)
    found = encoded(encoder, [tone(hz, 1.0, seed=at) for at, hz in enumerate(pitches)])
    found = torch.nn.functional.normalize(found - found.mean(0), dim=1)
    cosines = found @ found.T
    cosines.fill_diagonal_(-2)
    assert cosines.argmax(1).tolist() == [1, 0, 3, 2]


def test_windows_are_no_longer_than_the_model_reads(hearing):
    assert load_sound_encoder(str(hearing("clap")[0]), seconds=30).seconds == 2
    assert load_sound_encoder(str(hearing("whisper")[0])).seconds == 2
    assert load_sound_encoder(str(hearing("wav2vec2")[0]), seconds=30).seconds == 30
    assert load_sound_encoder(str(hearing("wav2vec2")[0])).seconds == 10
    assert load_sound_encoder(str(hearing("ast")[0])).seconds == pytest.approx(0.655)


def test_the_fingerprint_is_of_weights_and_settings(hearing, tmp_path):
    folder = hearing("wav2vec2")[0]
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(folder, same)
    shutil.copytree(folder, other)
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_normalize": False}))
    first = load_sound_encoder(str(folder)).fingerprint
    assert load_sound_encoder(str(same)).fingerprint == first
    assert load_sound_encoder(str(other)).fingerprint != first
    assert load_sound_encoder(str(folder), seconds=5).fingerprint != first


def test_models_that_hear_nothing_are_refused_by_name(hearing, tmp_path, tiny_bert):
    with pytest.raises(ValueError, match="its kind 'bert' is no audio model"):
        load_sound_encoder(str(tiny_bert))
    folder = tmp_path / "bare"
    shutil.copytree(hearing("ast")[0], folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no preprocessor_config\.json"):
        load_sound_encoder(str(folder))
    with pytest.raises(EncoderNotFoundError):
        load_sound_encoder("laion/clap-that-is-nowhere")
    with pytest.raises(ValueError, match="seconds is 601"):
        load_sound_encoder(str(hearing("clap")[0]), seconds=601)


def test_an_onnx_file_hears_whole_windows(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    name = write_onnx_ear(tmp_path / "ear.onnx")
    encoder = load_sound_encoder(name)
    assert (encoder.dim, encoder.rate, encoder.seconds) == (24, 4000, 0.5)
    from tests.made_sounds import bands

    sound = tone(440, 0.7, 4000)
    windows = np.stack([sound[:2000], np.pad(sound[2000:], (0, 1200))]).astype(np.float64)
    parts = windows @ bands().astype(np.float64)
    each = np.sqrt(parts[:, :24] ** 2 + parts[:, 24:] ** 2)
    expected = (each[0] * 2000 + each[1] * 800) / 2800
    np.testing.assert_allclose(encoded(encoder, [sound])[0].numpy(), expected, rtol=1e-4, atol=1e-3)
    settings = tmp_path / "ear.json"
    first = encoder.fingerprint
    settings.write_text('{"sampling_rate": 5000, "seconds": 0.4}')
    assert load_sound_encoder(name).fingerprint != first
    for wrong, message in (
        ('{"seconds": 1}', "sampling_rate None"),
        ("[]", "sampling_rate None"),
        ("{", "is not JSON"),
        ('{"sampling_rate": 4000, "seconds": "long"}', "seconds 'long'"),
    ):
        settings.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load_sound_encoder(name)
    settings.unlink()
    with pytest.raises(ValueError, match="needs a JSON beside it"):
        load_sound_encoder(name)


def test_a_function_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "own_sounds.py").write_text(
        "import numpy as np\n"
        "def loudness(sounds):\n    return np.array([[np.abs(s).mean(), len(s)] for s in sounds])\n"
        "def flat(sounds):\n    return np.zeros(len(sounds))\n"
    )
    monkeypatch.chdir(tmp_path)
    encoder = load_sound_encoder("own_sounds:loudness", seconds=0.5)
    sound = np.concatenate([np.full(8000, 0.5), np.full(4000, 0.25)]).astype(np.float32)
    expected = [(0.5 * 8000 + 0.25 * 4000) / 12000, (8000**2 + 4000**2) / 12000]
    np.testing.assert_allclose(encoded(encoder, [sound])[0].numpy(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="for 1 sounds"):
        load_sound_encoder("own_sounds:flat")


def test_windows_of_one_length_go_together():
    seen = []

    def vectors(windows):
        seen.append(windows.shape)
        return torch.from_numpy(windows.sum(1, keepdims=True))

    batch = [
        SoundSample((np.ones(4, np.float32), np.ones(2, np.float32)), 2),
        SoundSample((np.ones(4, np.float32),), 1),
    ]
    assert windows_mean(batch, vectors)[:, 0].tolist() == [pytest.approx((4 * 4 + 2 * 2) / 6), 4.0]
    assert seen == [(1, 2), (2, 4)]


def test_sounds_go_through_the_store_once_by_their_bytes_and_faults_are_counted(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    encoder = load_sound_encoder(write_onnx_ear(tmp_path / "ear.onnx"))
    paths = [tmp_path / f"{at}.wav" for at in range(6)]
    for at, path in enumerate(paths[:4]):
        write_tone(path, at)
    shutil.copy(paths[0], paths[4])
    paths[5].write_text("no sound")
    rows = [(path,) for path in paths] + [(), (paths[1], paths[2])]
    store = FeatureStore(tmp_path / "store")
    table, counts = encode_files(SOUNDS, rows, encoder, store)
    assert (counts.items, counts.files, counts.encoded, counts.with_vector) == (7, 5, 4, 6)
    assert table.present.tolist() == [True] * 5 + [False, False, True] and table.modality == "audio"
    assert list(counts.unreadable.values()) == [["5.wav"]] and not table.vectors[5].any()
    assert torch.equal(table.vectors[0], table.vectors[4])
    torch.testing.assert_close(table.vectors[7], (table.vectors[1] + table.vectors[2]) / 2)
    assert any("1 sounds count as missing, none of WAV" in line for line in counts.lines())
    again, counts = encode_files(SOUNDS, rows, encoder, store)
    assert counts.encoded == 0 and torch.equal(again.vectors, table.vectors)
