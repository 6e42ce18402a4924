"""Sounds of unknown makers: limits, faults by name, one channel, the sampling rate that is wanted."""

import io
import struct

import numpy as np
import pytest

pytest.importorskip("soundfile")
import soundfile

from recbole_llm.content.sounds import reading
from recbole_llm.content.sounds.reading import SoundError, check_sound_header, open_sound, resampled, windows_of
from tests.made_sounds import tone


def written(samples, rate=8000, form="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def wav(rate=8000, channels=1, data=b"\0\1" * 800, told=None, bits=16):
    """A WAV whose header says what it is told to."""
    told = len(data) if told is None else told
    block = channels * bits // 8
    head = struct.pack(
        "<4sI4s4sIHHIIHH", b"RIFF", 36 + told, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * block, block, bits
    )
    return head + struct.pack("<4sI", b"data", told) + data


@pytest.mark.parametrize(("form", "loss"), [("WAV", 1e-4), ("FLAC", 1e-4), ("AIFF", 1e-4), ("OGG", 0.05), ("MP3", 0.2)])
def test_a_tone_of_every_format_comes_back(form, loss):
    rate = 16000
    sound = tone(440, 1.0, rate)
    found = open_sound(written(sound, rate, form), rate)
    assert found.dtype == np.float32 and abs(len(found) - rate) <= 2400
    pitch = np.abs(np.fft.rfft(found * np.hanning(len(found)))).argmax() * rate / len(found)
    assert pitch == pytest.approx(440, abs=2)
    assert np.abs(found).max() == pytest.approx(np.abs(sound).max(), abs=loss)


def test_channels_are_averaged():
    left, right = tone(200), tone(900)
    both = written(np.stack([left, right, np.zeros_like(left)], 1), subtype="FLOAT")
    np.testing.assert_allclose(open_sound(both, 8000), (left + right) / 3, atol=1e-7)


@pytest.mark.parametrize("own", [4000, 8000, 11025, 44101, 48000, 192000])
def test_resampling_keeps_pitch_loudness_and_length(own):
    found = resampled(tone(300, 1.0, own), own, 16000)
    assert abs(len(found) - 16000) <= 2
    expected = 0.4 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
    middle = slice(1000, 15000)
    assert np.abs(found[: len(expected)][middle] - expected[: len(found)][middle]).max() < 0.06
    assert found.dtype == np.float32


def test_what_lies_above_half_the_new_rate_is_filtered_out():
    high = resampled(0.4 * np.sin(2 * np.pi * 7000 * np.arange(48000) / 48000).astype(np.float32), 48000, 8000)
    assert np.abs(high[500:-500]).max() < 0.01


HOSTILE = {
    "text": (b"not a sound at all", "none of WAV"),
    "page": (b"<html><body>moved</body></html>" * 50, "none of WAV"),
    "cut wav": (written(tone(440))[:9000], "cut off"),
    "cut flac": (written(tone(440), form="FLAC")[:5000], "(cut off|damaged|none of)"),
    "cut aiff": (written(tone(440), form="AIFF")[:9000], "cut off"),
    "header alone": (written(tone(440))[:44], "cut off"),
    "no samples": (wav(data=b""), "no samples"),
    "huge rate": (wav(rate=2_000_000_000), "a sampling rate outside"),
    "rate 0": (wav(rate=0), "(a sampling rate outside|none of)"),
    "many channels": (wav(channels=64, data=b"\0\1" * 6400), "more than 8 channels"),
    "silence": (written(np.zeros(8000)), "silence"),
    "not a number": (written(np.array([0.1, np.nan, 0.2]), subtype="FLOAT"), "NaN or infinity"),
    "another kind": (written(tone(440), form="CAF"), "none of WAV"),
    "zeros": (bytes(4096), "none of WAV"),
    "riff": (b"RIFF" + bytes(60), "none of WAV"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_read_is_named(name):
    data, reason = HOSTILE[name]
    with pytest.raises(SoundError, match=reason):
        open_sound(data, 16000)


def test_a_sound_has_a_longest_length(monkeypatch):
    monkeypatch.setattr(reading, "MAX_SECONDS", 2)
    assert len(open_sound(written(tone(440, 2.0)), 8000)) == 16000
    for check in (check_sound_header, lambda data: open_sound(data, 8000)):
        with pytest.raises(SoundError, match="longer than 2 s"):
            check(written(tone(440, 2.01)))


def test_a_header_that_says_less_than_there_is_stops_at_the_limit(monkeypatch):
    monkeypatch.setattr(reading, "MAX_FRAMES", 100_000)
    with pytest.raises(SoundError, match="longer than"):
        open_sound(written(tone(440, 13.0), form="OGG"), 8000)


def test_a_streamed_wav_without_a_length_is_read():
    data = bytearray(written(tone(440)))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert len(open_sound(bytes(data), 8000)) == 8000


def test_windows_lie_side_by_side_and_a_scrap_is_left_out():
    sound = np.arange(1, 24, dtype=np.float32)
    assert [window.tolist() for window in windows_of(sound, 10, 3)] == [
        list(range(1, 11)),
        list(range(11, 21)),
        [21, 22, 23],
    ]
    assert [len(window) for window in windows_of(sound, 10, 4)] == [10, 10]
    assert windows_of(sound[:2], 10, 4)[0].tolist() == [1, 2, 0, 0]
    assert [len(window) for window in windows_of(sound[:10], 10, 4)] == [10]
