"""Which sound belongs to which item, and its vector: the mechanisms of :mod:`recbole_llm.content.media` with sounds."""

from typing import Any

from recbole_llm.content.media.kinds import FileKind
from recbole_llm.content.sounds.reading import MAX_BYTES, SUFFIXES, check_sound_header, open_sound


def _decode(data: bytes, encoder: Any) -> Any:
    return open_sound(data, encoder.rate)


SOUNDS = FileKind("audio", "audio", SUFFIXES, "sound", MAX_BYTES, check_sound_header, _decode)
