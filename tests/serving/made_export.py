"""A small made model as an export: two blocks, known texts, attributes; and an encoder of hashed words."""

import hashlib

import numpy as np
from waiting import LIMIT

from recbole_llm.export.manifest import Block, EncoderSpec, ItemText
from recbole_llm.export.reader import ItemRecord
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.writer import ExportContents
from recbole_llm.serving.settings import Limits

F = 16
WORDS = ("space", "farm", "sea", "crime", "love", "war", "music", "snow")
# of a service on a machine that is busy with much else
PATIENCE = {f"{what}_seconds": LIMIT for what in ("request", "batch", "body", "write", "head", "answer")}
PATIENT = Limits(**PATIENCE)


class WordEncoder:
    """Texts as sums of fixed random vectors of their words: what a transformer is to the service."""

    dim = F
    fingerprint = "words-1"

    def encode(self, texts):
        rows = np.zeros((len(texts), F), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
                row += np.random.default_rng(seed).standard_normal(F).astype(np.float32)
        return rows, np.zeros(len(texts), np.int64)


def make_contents(n_items=40, n_users=12, seed=0, dims=(6, 4), scoring="dot", user_part=False, **changes):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    D = sum(dims)
    blocks = (Block("closed_form", dims[0], 0.0, 0.7), Block("learned", dims[1], 0.5, 1.3, scoring))
    sizes = rng.integers(0, 8, n_users)
    histories = [np.sort(rng.choice(n_items - 3, size, replace=False)) for size in sizes]
    trained = np.arange(n_items) < n_items - 3
    texts = [f"{WORDS[i % 8]} {WORDS[(3 * i + 1) % 8]} story" for i in range(n_items)]
    support = normal(9, F)
    contents = dict(
        item_ids=[f"i{i}" for i in range(n_items)],
        user_ids=[f"u{u}" for u in range(n_users)],
        records=[
            ItemRecord(
                f"Title {i}",
                text,
                {"genre": [WORDS[i % 3], WORDS[3 + i % 2]], "year": 1980.0 + i, "kind": WORDS[i % 4]},
            )
            for i, text in enumerate(texts)
        ],
        vector=normal(n_items, D),
        source=normal(n_items, D),
        bias=normal(n_items),
        trained=trained,
        blocks=blocks,
        history_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        history_items=np.concatenate([*histories, np.zeros(0, np.int64)]),
        history_weight=rng.uniform(0.2, 1, sizes.sum()).astype(np.float32),
        offset=normal(D),
        user_part=normal(n_users, D) if user_part else None,
        text_map=TextMap(
            kind="rbf",
            center=normal(F) * np.float32(0.1),
            normalize=True,
            support=support / np.linalg.norm(support, axis=1, keepdims=True),
            gamma=1.25,
            vector=normal(9, D),
            source=normal(9, D),
            bias=normal(9),
            vector_offset=normal(D),
            source_offset=normal(D),
            bias_offset=0.25,
        ),
        encoder=EncoderSpec("words", None, {}, F, WordEncoder.fingerprint),
        item_text=ItemText(("title", "genre"), "{title}. Genre: {genre}"),
        attributes={"genre": "tokens", "year": "number", "kind": "token"},
        metrics={"NDCG@10": 0.25},
        card="# Made model\n",
    )
    return ExportContents(**{**contents, **changes})
