"""Read a sound whose maker nobody knows: limits before and while it is decoded, one channel, the encoder's sampling rate.

A sound is never a reason to stop. What cannot be read raises :class:`SoundError` with the reason in words; whoever reads many
counts the reasons.
"""

import math
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

from recbole_llm.content.media.kinds import UnreadableError

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF")  # libsndfile would try some thirty
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aif", ".aiff")
MAX_BYTES = 128 << 20
MAX_SECONDS = 600
MAX_RATE, MIN_RATE = 192_000, 4_000
MAX_CHANNELS = 8
MAX_FRAMES = MAX_SECONDS * 48_000  # 115 MB in float32; at 96 kHz 300 s
BLOCK = 1 << 16  # frames that are decoded at once
MAX_TERM = 2_000  # of the ratio of two rates: 44,101 to 16,000 Hz would need a filter of a million taps


class SoundError(UnreadableError):
    """A sound that counts as missing; the message is the reason, in words that are the same for the same fault."""


def require_soundfile() -> Any:
    """Import soundfile.

    Raises:
        ValueError: if it is not installed; says how.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile is not there
        raise ValueError(
            f"Sounds need soundfile with libsndfile ({error}): pip install -e '.[audio]' in the checkout."
        ) from error
    return soundfile


def check_sound_header(data: bytes) -> None:
    """Check what a sound's header says; nothing is decoded.

    Raises:
        SoundError: if it is none of ``FORMATS``, cut off, too long, or of a rate or number of channels beyond the limits.
    """
    with _open(data):
        pass


def open_sound(data: bytes, rate: int) -> np.ndarray:
    """Decode a sound to one channel, the mean of all.

    Args:
        data: the file.
        rate: samples of a second that are wanted.

    Returns:
        ``[n]`` float32, n at least 1.

    Raises:
        SoundError: if it is none of ``FORMATS``, beyond a limit, cut off or damaged, or holds no sound at all.
    """
    soundfile = require_soundfile()
    with _open(data) as file:
        parts: list[np.ndarray] = []
        frames = 0
        try:
            while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                frames += len(block)
                if frames > min(MAX_FRAMES, MAX_SECONDS * file.samplerate):
                    raise SoundError(_too_long())
                parts.append(block.mean(1, dtype=np.float32))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise SoundError(f"damaged ({type(error).__name__})") from None
        told, own = file.frames, file.samplerate
    if not frames:
        raise SoundError("no samples")
    if frames < told and file.format in ("WAV", "WAVEX", "FLAC", "AIFF"):
        raise SoundError("cut off: fewer samples than its header says")
    sound = np.concatenate(parts)
    if not np.isfinite(sound).all():
        raise SoundError("holds NaN or infinity")
    if not sound.any():
        raise SoundError("silence from end to end")
    return resampled(sound, own, rate)


def resampled(sound: np.ndarray, own: int, rate: int) -> np.ndarray:
    """Change the sampling rate by a polyphase filter, ``[n]`` float32 to ``[ceil(n rate / own)]``, about.

    Args:
        sound: at the rate ``own``.
        own: samples of a second.
        rate: the same, wanted.
    """
    if own == rate:
        return sound
    from scipy.signal import resample_poly

    ratio = Fraction(rate, own).limit_denominator(MAX_TERM)
    if not ratio.numerator:
        ratio = Fraction(1, MAX_TERM)
    return np.asarray(resample_poly(sound, ratio.numerator, ratio.denominator), np.float32)


def _too_long() -> str:
    return f"longer than {MAX_SECONDS} s"


def _open(data: bytes) -> Any:
    """The file as soundfile opens it, within the limits of what its header says."""
    soundfile = require_soundfile()
    try:
        file = soundfile.SoundFile(BytesIO(data))
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError):
        raise SoundError(f"none of {', '.join(FORMATS)}") from None
    try:
        _check(file, data)
    except SoundError:
        file.close()
        raise
    return file


def _check(file: Any, data: bytes) -> None:
    if file.format not in FORMATS:
        raise SoundError(f"none of {', '.join(FORMATS)}")
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise SoundError(f"a sampling rate outside {MIN_RATE} to {MAX_RATE} Hz")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise SoundError(f"more than {MAX_CHANNELS} channels")
    if file.frames > min(MAX_FRAMES, MAX_SECONDS * file.samplerate):
        raise SoundError(_too_long())
    if _is_cut(data):
        raise SoundError("cut off: shorter than its header says")
    if not file.frames:
        raise SoundError("no samples")


def _is_cut(data: bytes) -> bool:
    """Whether a RIFF or AIFF file is shorter than it says; libsndfile would mend the header in silence."""
    orders = {b"RIFF": "little", b"FORM": "big"}
    order = orders.get(data[:4])
    if order is None or len(data) < 12:
        return False
    told = int.from_bytes(data[4:8], order)  # type: ignore[arg-type]
    streamed = told in (0, 0xFFFFFFFF, 0x7FFFFFFF)  # its writer could not go back to the header
    return not streamed and told + 8 > len(data) + 1  # some writers leave the last pad byte out


def windows_of(sound: np.ndarray, length: int, least: int) -> list[np.ndarray]:
    """Cut a sound into windows that lie side by side.

    The last one is shorter. It is left out where it has fewer than ``least`` samples and is not the only one.

    Args:
        sound: ``[n]``, n at least 1.
        length: samples of a window.
        least: samples that an encoder needs.

    Returns:
        Windows ``[at most length]``; a sound shorter than ``least`` is padded with zeros to it.

    Example:
        >>> [len(window) for window in windows_of(np.ones(25, np.float32), 10, 3)]
        [10, 10, 5]
    """
    if len(sound) < least:
        return [np.pad(sound, (0, least - len(sound)))]
    count = math.ceil(len(sound) / length)
    windows = [sound[at * length : (at + 1) * length] for at in range(count)]
    return windows[:-1] if count > 1 and len(windows[-1]) < least else windows
