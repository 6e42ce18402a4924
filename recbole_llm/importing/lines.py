"""Lines of a text file, read in blocks: at no time more is held than a block and one line."""

import codecs
import io
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import BinaryIO, TypeVar

from recbole_llm.importing import limits

Row = TypeVar("Row")


class Lines:
    r"""The lines of a stream with their ends, which are ``\n``, ``\r\n`` or ``\r``.

    Args:
        stream: bytes; read from where it stands.
        encoding: of the text. Bytes that are not UTF-8 come as surrogates, which no array of strings accepts; those of
            another encoding raise ``UnicodeError``.
        block: bytes to read at once.
        refuse: makes the error for a message.

    """

    def __init__(self, stream: BinaryIO, encoding: str, block: int, refuse: Callable[[str], ValueError]) -> None:
        is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogateescape" if is_utf8 else "strict")
        self._stream, self._block, self._refuse = stream, block, refuse
        self._unfinished = 0
        self._blocks = 0

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._texts())

    def settle(self) -> None:
        """Say that no row is unfinished, except for what the last block holds of the next."""
        self._unfinished = 0

    def some(self, rows: Iterator[Row], count: int) -> list[Row]:
        """Take up to ``count`` rows, and not many more than a block holds, from an iterator that reads these lines."""
        found: list[Row] = []
        last = self._blocks + 1
        seen = self._blocks
        for row in islice(rows, count):
            found.append(row)
            if self._blocks != seen:
                seen = self._blocks
                self.settle()
                if seen > last:
                    break
        return found

    def _texts(self) -> Iterator[io.StringIO]:
        rest = ""
        while True:
            data = self._stream.read(self._block)
            text = rest + self._decoder.decode(data, not data)
            # a \r at the end may be half of \r\n
            end = max(text.rfind("\n"), text.rfind("\r", 0, max(len(text) - 1, 0))) + 1 if data else len(text)
            if len(text) - end > limits.MAX_RECORD:
                raise self._refuse(f"is longer than {limits.MAX_RECORD:,} characters")
            self._unfinished += end
            if self._unfinished > limits.MAX_UNFINISHED:
                raise self._refuse(f"begins a row of more than {limits.MAX_UNFINISHED:,} characters")
            if end:
                self._blocks += 1
                yield io.StringIO(text[:end], newline="")
            if not data:
                return
            rest = text[end:]
