"""Ids of users and items: kept as written, checked against what an atomic file and RecBole's reader keep."""

import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.identifiers import ITEM_ROUTE_ENDINGS, MAX_ID_CHARACTERS
from recbole_llm.importing.values import NA_STRINGS

# RecBole's name for row 0
PADDING = "[PAD]"

MISSING, MISSING_WORD, UNUSABLE, TOO_LONG, ROUTE = 1, 2, 3, 4, 5
ID_PROBLEMS = {
    MISSING: "id missing",
    MISSING_WORD: "id is a word that RecBole reads as missing (NA, null, None, ...)",
    UNUSABLE: "id with a tab, line break or control character, a quote in front, or [PAD]: not for atomic files",
    TOO_LONG: f"id of more than {MAX_ID_CHARACTERS} characters, which the service does not take",
    ROUTE: f"id that ends in {' or '.join(ITEM_ROUTE_ENDINGS)}, which the service reads as a route",
}
# of these a row is refused; without an id it is no row
REFUSED = (UNUSABLE, TOO_LONG, ROUTE)
# control characters, and what some readers take for the end of a line; a quote in front is read as quoting
_NOT_IN_IDS = '^"|[\\x{00}-\\x{1f}\\x{7f}-\\x{9f}\\x{2028}\\x{2029}]'
# bytes of ASCII that need no closer look
_PLAIN_BYTES = np.zeros(256, dtype=bool)
_PLAIN_BYTES[0x21:0x7F] = True
_PLAIN_BYTES[ord('"')] = False
# of the ids that are words with another meaning, in bytes
_LONGEST_WORD = max(len(word.encode()) for word in (*NA_STRINGS, PADDING))


class IdColumn:
    """The ids of rows in memory: the distinct ones once per batch, and a number per row.

    Args:
        kind: ``item`` or ``user``.

    Attributes:
        ids: ``string`` array of the distinct ids after :meth:`finish`; also some that no row kept has.
    """

    def __init__(self, kind: str = "user") -> None:
        self.kind = kind
        self.ids = pa.array([], pa.string())
        self._chunks: list[pa.DictionaryArray] = []

    def problems(self, values: pa.Array) -> tuple[np.ndarray, pa.DictionaryArray]:
        """Say what is wrong with ids.

        Args:
            values: ``string`` array ``[rows]``.

        Returns:
            int8 ``[rows]``, 0 or a key of ``ID_PROBLEMS``, and the ids to give to :meth:`append`.
        """
        encoded = values.dictionary_encode()
        table = np.append(_problems(encoded.dictionary, self.kind), np.int8(MISSING))
        absent = len(encoded.dictionary)
        return table[encoded.indices.fill_null(absent).to_numpy(zero_copy_only=False)], encoded

    def append(self, encoded: pa.DictionaryArray, alive: np.ndarray) -> None:
        """Keep the ids of the rows where ``alive``, bool ``[rows]``."""
        self._chunks.append(encoded if alive.all() else encoded.filter(pa.array(alive)))

    def finish(self) -> np.ndarray:
        """Set ``ids``, and return a code per row, int32: the place of its id there.

        Raises:
            ValueError: if the distinct ids are longer than 2 GiB together.
        """
        if not self._chunks:
            return np.empty(0, dtype=np.int32)
        try:
            chunks = pa.chunked_array(self._chunks).unify_dictionaries().chunks
        except (pa.ArrowInvalid, pa.ArrowCapacityError) as error:
            raise ValueError(f"the {self.kind} ids are too long together: {error}. Shorten them.") from error
        self._chunks = []
        self.ids = chunks[-1].dictionary
        return np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks])


def _problems(ids: pa.Array, kind: str) -> np.ndarray:
    found = np.zeros(len(ids), dtype=np.int8)
    offsets = np.frombuffer(ids.buffers()[1], dtype=np.int32)[ids.offset : ids.offset + len(ids) + 1]
    data = ids.buffers()[2]
    used = np.frombuffer(data, dtype=np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, dtype=np.uint8)
    if not _PLAIN_BYTES[used].all():
        found[_true(pc.match_substring_regex(ids, _NOT_IN_IDS))] = UNUSABLE
        found[_true(pc.equal(pc.utf8_trim_whitespace(ids), ""))] = MISSING
    lengths = offsets[1:] - offsets[:-1]
    if len(lengths) and lengths.max() > MAX_ID_CHARACTERS:  # in bytes: some of them may have fewer characters
        found[_true(pc.greater(pc.utf8_length(ids), MAX_ID_CHARACTERS))] = TOO_LONG
    if kind == "item":
        for ending in ITEM_ROUTE_ENDINGS:
            found[_true(pc.ends_with(ids, ending))] = ROUTE
    found[lengths == 0] = MISSING
    if len(lengths) and lengths.min() <= _LONGEST_WORD:
        found[_true(pc.is_in(ids, value_set=pa.array(sorted(NA_STRINGS))))] = MISSING_WORD
        found[_true(pc.equal(ids, PADDING))] = UNUSABLE
    return found


def _true(mask: pa.Array) -> np.ndarray:
    return mask.to_numpy(zero_copy_only=False)


def look_alikes(ids: pa.Array) -> list[tuple[str, str]]:
    """Find pairs of different ids that are equal without the white space around them and in Unicode's form NFC."""
    usual = pc.and_(pc.string_is_ascii(ids), pc.equal(pc.utf8_trim_whitespace(ids), ids))
    unusual = {value: _plain(value) for value in ids.filter(pc.invert(usual)).to_pylist()}
    unusual = {value: plain for value, plain in unusual.items() if value != plain}
    taken = set(ids.filter(pc.is_in(ids, value_set=pa.array(list(unusual.values()), pa.string()))).to_pylist())
    first: dict[str, str] = {}
    pairs = []
    for value, plain in unusual.items():
        other = plain if plain in taken else first.get(plain)
        if other is not None:
            pairs.append((other, value))
        first.setdefault(plain, value)
    return pairs


def _plain(value: str) -> str:
    # not Arrow's utf8_normalize: that of pyarrow 16 gives NFD whatever it is asked for
    return unicodedata.normalize("NFC", value.strip())
