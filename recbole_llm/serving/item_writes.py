"""Write changes to items: check them, encode texts, commit, make them live."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import Response

from recbole_llm.content.text import Template
from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.reader import fits_kind
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.serving.change_rows import Delete, Put
from recbole_llm.serving.problem import Problem, echo
from recbole_llm.serving.responses import json_answer, state_content
from recbole_llm.serving.service import Service


class Written(NamedTuple):
    """A change that is live: whether the item is new, its seq, and the tokens of its text that were not read."""

    created: bool
    seq: int
    cut: int


class Writer:
    """Writes items for one service.

    Args:
        service: whose items.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    async def put(self, item_id: str, body: Any, picture: bytes | None = None) -> Response:
        """Add or change one item, and answer as ``PutOut``; arguments and errors as :meth:`write`."""
        (written,) = await self.write([(item_id, body)], picture)
        answer = await self.service.reader.after_write(lambda recommender: _cold(recommender, item_id))
        return json_answer(
            {
                "id": item_id,
                "created": written.created,
                "seq": written.seq,
                "cold": answer.value,
                "truncated": int(written.cut > 0),
                **state_content(answer),
            }
        )

    async def write(self, entries: Sequence[tuple[str, Any]], picture: bytes | None = None) -> list[Written]:
        """Commit changes in one transaction and apply them.

        Args:
            entries: id, and an ``ItemBody``, or ``None`` to delete.
            picture: the file of the only entry's picture; ``None`` for those of the bodies.

        Raises:
            Problem: 404 for the deletion of an item that never was, 422 for what does not fit the export.
        """
        known = await self.service.changes.knows([item_id for item_id, _ in entries])
        live = self._live([item_id for item_id, _ in entries])
        given = [picture if picture is not None else None if body is None else body.image for _, body in entries]
        checked = [
            self._check(item_id, body, item_id in known, image is not None)
            for (item_id, body), image in zip(entries, given, strict=True)
        ]
        texts = [text for text in checked if text is not None]
        # those of one moment: a reload may put others into their places while they work
        of_texts, of_pictures = self.service.text, self.service.pictures
        seconds = self.service.settings.limits.write_seconds
        encoded = iter(await of_texts.encode(texts, seconds) if texts else ())
        # one after the other: each picture is decoded when it is its turn
        pictures = [None if image is None else await of_pictures.encode(image, seconds) for image in given]
        changes: list[Put | Delete] = []
        cut = []
        for (item_id, body), text, seen in zip(entries, checked, pictures, strict=True):
            found = None if text is None else next(encoded)
            cut.append(0 if found is None else found.cut)
            if body is None:
                changes.append(Delete(item_id))
                continue
            # over a row that cannot be read everything is written anew
            broken = item_id in self.service.changes.faults
            changes.append(
                Put(
                    item_id,
                    item_id if broken and body.title is None else body.title,
                    text,
                    {} if broken and body.attributes is None else body.attributes,
                    None if found is None else found.vector,
                    None if found is None else of_texts.fingerprint,
                    body.refit,
                    None if seen is None else seen.vector,
                    None if seen is None else of_pictures.fingerprint,
                    None if seen is None else seen.thumbnail,
                )
            )
        seqs = await self.service.changes.write(changes)
        results = []
        for (item_id, body), seq, n in zip(entries, seqs, cut, strict=True):
            results.append(Written(body is not None and item_id not in live, seq, n))
            (live.discard if body is None else live.add)(item_id)
        return results

    async def take_picture(self, item_id: str) -> int:
        """Take an item's picture away; returns the change's seq.

        Raises:
            UnknownItemError: if there is no such item.
            Problem: 404 if it has no picture, 422 if it is known by its picture alone.
        """
        recommender = self.service.recommender
        catalog, export = recommender.catalog, recommender.export
        row = catalog.shown(item_id)
        if not catalog.has_picture(row):
            raise Problem(404, "There is no picture of this item.")
        base, known = catalog.base_of(row), export.content.get("text")
        has_text = row in catalog.text_vectors or (base is not None and known is not None and bool(known[base].any()))
        if catalog.is_cold(row) and not (has_text and export.text_map is not None):
            raise Problem(
                422, "image: this item is known by its picture alone; give it a text first, or delete the item."
            )
        (seq,) = await self.service.changes.write([Put(item_id, without_picture=True)])
        return seq

    def _live(self, ids: Sequence[str]) -> set[str]:
        catalog = self.service.recommender.catalog
        return {item_id for item_id in ids if item_id in catalog.row_of and catalog.is_live(catalog.row_of[item_id])}

    def _check(self, item_id: str, body: Any, known: bool, has_picture: bool) -> str | None:
        """Check an entry and return the text to encode, if there is one."""
        if body is None:
            if not known:
                raise UnknownItemError(item_id)
            return None
        export = self.service.recommender.export
        kinds = export.manifest.attributes
        for name, value in (body.attributes or {}).items():
            if name not in kinds:
                declared = ", ".join(f"{n} ({kind})" for n, kind in kinds.items()) or "none"
                raise Problem(422, f"attributes: unknown {echo(name)}; the export declares: {declared}.")
            if not fits_kind(value, kinds[name]):
                raise Problem(422, f"attributes: {name} is of kind {kinds[name]}.")
        text = self._text(body)
        if text is None and item_id in self.service.changes.faults:
            raise Problem(422, "text: the log's row of this item cannot be used; write all of it anew, or delete it.")
        catalog = self.service.recommender.catalog
        is_placed = text is not None or (has_picture and export.picture_map is not None)
        if not is_placed and (catalog.needs_text(item_id) if item_id in catalog.row_of else not known):
            raise Problem(422, "text: a new item needs a text (or fields), from which its vectors are made.")
        if text is not None and export.text_map is None:
            raise Problem(422, "text: this export maps no texts.")
        if body.refit and not is_placed and not self._has_own_content(item_id):
            way_out = "text (or fields)" if export.picture_map is None else "text (or fields) or the picture"
            raise Problem(422, f"refit: give the {way_out} too, from which the vectors are made.")
        return text

    def _has_own_content(self, item_id: str) -> bool:
        """Whether a text or a picture of the item was written since the export."""
        catalog = self.service.recommender.catalog
        row = catalog.row_of.get(item_id)
        return row is not None and (row in catalog.text_vectors or row in catalog.picture_vectors)

    def _text(self, body: Any) -> str | None:
        if body.fields is None:
            if body.text is not None and not body.text.strip():
                raise Problem(422, "text is empty; describe the item, or leave text out.")
            return body.text or None
        if body.text is not None:
            raise Problem(422, "Give text or fields, not both.")
        item_text = self.service.recommender.export.manifest.item_text
        if item_text is None:
            raise Problem(422, "fields: the items of this export have no text template; give text.")
        unknown = [name for name in body.fields if name not in item_text.fields]
        if unknown:
            raise Problem(
                422, f"fields: unknown {echo(unknown[0])}; the text is made of {', '.join(item_text.fields)}."
            )
        text = Template(item_text.template).render({name: body.fields.get(name, "") for name in item_text.fields})
        if not text:
            raise Problem(422, "fields: all of them are empty.")
        return text


def _cold(recommender: Recommender, item_id: str) -> bool:
    row = recommender.catalog.row_of.get(item_id)
    return row is None or recommender.catalog.is_cold(row)
