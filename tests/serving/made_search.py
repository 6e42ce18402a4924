"""A small shop whose items have titles, texts and buyers, as an export; and the rule of searches in float64, without haste."""

import re
from collections import Counter
from dataclasses import replace
from html import unescape

import numpy as np
from made_export import F, WordEncoder, make_contents

from recbole_llm.export.neighbours import neighbours
from recbole_llm.export.reader import ItemRecord
from recbole_llm.export.search_tables import SearchTables, TextSpace

THINGS = ("pan", "knife", "lamp", "rug", "mat", "pen", "kite", "spade")
KINDS = ("red", "blue", "iron", "oak", "wool", "steel", "cork")
T, WORDS, LEAD, K1, B = 0.2, 0.65, 0.025, 1.2, 0.75


def make_shop(n_items=60, n_users=40, seed=0, **changes):
    """Contents of an export; the last five items have no buyer, two items share all their text, one has none."""
    rng = np.random.default_rng(seed)
    titles = [f"{KINDS[i % 7].capitalize()} {THINGS[i % 8]} {i // 8}" for i in range(n_items)]
    texts = [f"{titles[i]}. For {THINGS[i % 8]} lovers &amp; {KINDS[(3 * i) % 7]} fans" for i in range(n_items)]
    if n_items > 20:
        titles[11], texts[11] = titles[3], texts[3]
        texts[17] = None
    buyers = max(n_items - 5, 1)
    sizes = rng.integers(0, min(9, buyers), n_users)
    histories = [np.sort(rng.choice(buyers, size, replace=False)) for size in sizes]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    items = np.concatenate([*histories, np.zeros(0, np.int64)])
    encoder = WordEncoder()
    center = rng.standard_normal(F).astype(np.float32)
    space = TextSpace(center)
    content = space.directions(encoder.encode([text or "" for text in texts])[0])
    content[[text is None for text in texts]] = 0
    tables = SearchTables(
        *neighbours(offsets, items, n_items), titles=space.directions(encoder.encode(titles)[0]), space=space
    )
    records = [
        ItemRecord(title, text, {"kind": KINDS[i % 7]})
        for i, (title, text) in enumerate(zip(titles, texts, strict=True))
    ]
    made = make_contents(max(n_items, 12), max(n_users, 1))
    given = dict(
        **{name: getattr(made, name)[:n_items] for name in ("item_ids", "vector", "source", "bias")},
        user_ids=made.user_ids[:n_users],
        records=records,
        trained=np.bincount(items, minlength=n_items) > 0,
        history_offsets=offsets,
        history_items=items,
        history_weight=None,
        content={"text": content},
        search=tables,
        attributes={"kind": "token"},
    )
    return replace(made, **{**given, **changes})


def words(text):
    return re.findall(r"\w+", unescape(text).casefold())


def bm25(query, texts):
    """As a share of the idf of the query's words, ``[N]``."""
    documents = [words(text) for text in texts]
    N, mean = len(texts), sum(map(len, documents)) / len(documents)
    held = Counter(word for document in documents for word in set(document))
    idf = lambda word: np.log(1 + (N - held[word] + 0.5) / (held[word] + 0.5))  # noqa: E731
    unknown = max((idf(word) for word in held), default=1.0)
    asked = words(query)
    worth = sum(idf(word) if word in held else unknown for word in asked)
    found = np.zeros(N)
    for row, document in enumerate(documents):
        for word in asked:
            times = document.count(word)
            if times:
                found[row] += idf(word) * (K1 + 1) * times / (times + K1 * (1 - B + B * len(document) / mean))
    return found / worth if worth else found


def shares(offsets, items, n_items):
    """c of the rule for every pair, ``[N, N]``: row j, column i."""
    X = np.zeros((len(offsets) - 1, n_items))
    for user in range(len(X)):
        X[user, items[offsets[user] : offsets[user + 1]]] = 1
    sizes = X.sum(1)
    w = np.where(sizes > 0, (np.maximum(sizes, 1) / sizes[sizes > 0].mean()) ** -0.5, 0) if sizes.any() else sizes
    G = X.T @ (w[:, None] * X)
    d = np.diag(G).copy()
    g = d[d > 0].mean() if (d > 0).any() else 1.0
    c = np.zeros_like(G)
    for j in range(n_items):
        for i in range(n_items):
            if i != j and d[i] > 0 and d[j] > 0:
                c[j, i] = G[j, i] / ((d[j] + 0.05 * g) * (d[i] / g) ** 0.25)
    return c


def rule(L, c, alpha):
    """(y, t) of the rule from L ``[N]`` and c ``[N, N]``; the score is y + alpha t."""
    warm = np.flatnonzero(c.any(1))
    near = warm[np.lexsort((warm, -L[warm]))[:50]]
    y = np.exp((L - L.max()) / T)
    t = np.zeros(len(L))
    for j in near:
        t += np.exp((L[j] - L.max()) / T) * c[j]
    t = np.maximum(t, 0)
    return y, t / t.max() if t.max() > 0 else t


def likeness_of_text(export, vector, text):
    """L of every item of an export for a text, without changed items."""
    z = vector.astype(np.float64) - export.search.space.center
    z /= np.linalg.norm(z)
    L = np.maximum(export.content["text"].astype(np.float64) @ z, export.search.titles.astype(np.float64) @ z - 0.1)
    if text is not None:
        same = lambda value: " ".join(unescape(value).casefold().split())  # noqa: E731
        documents = []
        for record in export.records:
            inside = record.text and same(record.title) in same(record.text)
            documents.append(record.text if inside else f"{record.title} {record.text or ''}")
        L = L + WORDS * bm25(text, documents)
        own = [same(text) in (same(r.title), same(r.text or "")) and bool(same(text)) for r in export.records]
        own = np.array(own)
        if own.any() and not own.all():
            L[own] = np.maximum(L[own], L[~own].max() + LEAD)
    return L
