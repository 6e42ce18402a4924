"""Vectors of titles of items that changed since the export: the log of changes keeps those of texts alone."""

from collections.abc import Callable
from logging import getLogger
from typing import Any

from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.serving.batching import DeadlineExceeded, QueueFull
from recbole_llm.serving.encoding import EncoderUnavailable
from recbole_llm.serving.reading import Reader
from recbole_llm.serving.text import TextEncoding

AT_ONCE = 32  # titles that a request waits for; more of them are only there after a start or a reload
SECONDS = 60.0

log = getLogger(__name__)


class TitleVectors:
    """Makes the vectors that searches for texts need, in the encoder's thread.

    Args:
        recommender: the current one.
        text: the current encoding.
        reader: on whose thread the catalogue is read and changed.
    """

    def __init__(
        self, recommender: Callable[[], Recommender], text: Callable[[], TextEncoding], reader: Reader
    ) -> None:
        self._recommender, self._text, self._reader = recommender, text, reader

    async def learn(self, seconds: float) -> bool:
        """Encode titles of changed items, at most ``AT_ONCE``; returns whether there were any.

        Args:
            seconds: until the deadline.

        Raises:
            EncoderUnavailable, QueueFull, DeadlineExceeded: as :meth:`TextEncoding.encode`.
        """
        searches = self._recommender().searches
        if searches is None or not searches.is_behind:
            return False
        titles: list[str] = await self._reader.batcher.call(lambda: searches.untitled[:AT_ONCE])
        text, spec = self._text(), searches.search.export.manifest.encoder
        if not titles or (spec is not None and text.fingerprint not in (None, spec.fingerprint)):
            return False  # the second: an export with another encoder has just come or gone
        encoded = await text.encode(titles, seconds)
        vectors: dict[str, Any] = {title: found.vector for title, found in zip(titles, encoded, strict=True)}
        await self._reader.batcher.call(lambda: searches.put_titles(vectors))
        return True

    async def learn_all(self) -> None:
        """Encode every title that waits, a few at a time."""
        try:
            while await self.learn(SECONDS):
                pass
        except (EncoderUnavailable, QueueFull, DeadlineExceeded) as error:
            log.info("Titles of changed items are encoded with the next search: %r", error)
