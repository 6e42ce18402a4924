"""Datasets and queries for ``benchmarks/search.py``: RecBole's split, texts and titles, and what is asked."""

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.text import read_atomic_table

ROOT = Path(__file__).resolve().parents[1]
MOST_QUERIES = 700
MOST_OF_A_USER = 3
MOST_QUESTIONS = 3000
FEWEST_OF_A_CATEGORY = 15


@dataclass(frozen=True)
class Kind:
    """Where a dataset keeps what is asked for.

    Attributes:
        title: column of the titles.
        category: column of the categories.
        parts: splits a cell of it.
        whole: whether the first part is so wide that it is no category.
        fewest: items of a category that is asked for.
        unsold: whether items without an interaction belong to the catalogue (RecBole cannot read every item file for them).
    """

    title: str
    category: str
    parts: Any
    whole: bool
    fewest: int
    unsold: bool = True


KINDS = {
    "ml-1m-text": Kind("movie_title", "genres", re.compile(r" ").split, True, 1),
    "amazon-office": Kind("title", "categories", re.compile(r", ").split, False, FEWEST_OF_A_CATEGORY, unsold=False),
    "shop": Kind("Product_Name", "Categories", re.compile(r" > |\|").split, False, 1),
}

Pairs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class SearchSet:
    """A dataset, split, with what the product makes of it.

    Attributes:
        name: of the dataset.
        dataset: of RecBole, the training part.
        titles: of the items, entities unescaped.
        tags: categories of each item.
        parts: users and items of train, valid and test, both from 0.
        n_users: known users.
    """

    name: str
    dataset: Any
    titles: list[str]
    tags: list[frozenset[str]]
    parts: dict[str, Pairs]
    n_users: int

    @property
    def n_items(self) -> int:
        """Items of the catalogue, those without an interaction included."""
        return len(self.titles)

    def of_users(self, *names: str) -> list[list[int]]:
        """Items of each user in some parts."""
        rows: list[list[int]] = [[] for _ in range(self.n_users)]
        for name in names:
            for user, item in zip(*self.parts[name], strict=True):
                rows[user].append(int(item))
        return rows


def load(name: str, data_path: str | None, config_files: Sequence[str]) -> SearchSet:
    """Read a dataset with RecBole's default split, 8:1:1 by user at random."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset
    from recbole.utils import init_seed

    values: dict[str, Any] = {"show_progress": False, "state": "ERROR", "encoder_max_tokens": 256}
    columns = {"inter": ["user_id", "item_id"]} | ({"item": ["item_id"]} if KINDS[name].unsold else {})
    values |= {"load_col": columns}
    values |= {"data_path": data_path} if data_path else {}
    config = Config("LLMTwoTower", name, config_file_list=list(config_files), config_dict=values)
    init_seed(config["seed"], config["reproducibility"])
    whole = create_dataset(config)
    parts = dict(zip(("train", "valid", "test"), whole.build(), strict=True))
    dataset = parts["train"]
    table = read_atomic_table(Path(dataset.dataset_path) / f"{name}.item", dataset.iid_field)
    ids = [str(token) for token in dataset.field2id_token[dataset.iid_field][1:]]
    kind = KINDS[name]
    cell = lambda column, item: unescape(table.columns[column][table.row_of[item]]).strip()  # noqa: E731
    known = [item in table.row_of for item in ids]
    titles = [cell(kind.title, item) if here else "" for item, here in zip(ids, known, strict=True)]
    tags = []
    for item, here in zip(ids, known, strict=True):
        found = [part for part in kind.parts(cell(kind.category, item)) if part] if here else []
        tags.append(frozenset(found if kind.whole else found[1:]))
    pairs = {
        part: (data.inter_feat[data.uid_field].numpy() - 1, data.inter_feat[data.iid_field].numpy() - 1)
        for part, data in parts.items()
    }
    return SearchSet(name, dataset, titles, tags, pairs, dataset.user_num - 1)


def encoder_of(encoder: Any) -> Any:
    """Texts to raw vectors ``[n, F]`` float32, stored ones read."""
    return partial(_encoded, encoder, FeatureStore())


def _encoded(encoder: Any, store: FeatureStore, texts: Sequence[str]) -> np.ndarray:
    vectors: np.ndarray = encode_texts(list(texts), encoder, store, batch_size=32).vectors.numpy()
    return vectors


# ------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Known:
    """Queries for one item each.

    Attributes:
        texts: what is asked.
        items: the item meant, of each.
    """

    texts: list[str]
    items: list[int]


def known_items(data: SearchSet, seed: int = 0) -> dict[str, Known]:
    """Titles of sampled items as they are, without a word (of at least three), and without a letter."""
    chance = random.Random(seed)
    rows = [row for row, title in enumerate(data.titles) if title]
    chance.shuffle(rows)
    rows = sorted(rows[: min(MOST_QUERIES, len(rows) // 2)])
    titles = [data.titles[row] for row in rows]
    long = [row for row in rows if len(data.titles[row].split()) >= 3]
    return {
        "title": Known(titles, rows),
        "word dropped": Known([_without_word(data.titles[row], chance) for row in long], long),
        "letter dropped": Known([_without_letter(title, chance) for title in titles], rows),
    }


def _without_word(text: str, chance: random.Random) -> str:
    words = text.split()
    words.pop(chance.randrange(len(words)))
    return " ".join(words)


def _without_letter(text: str, chance: random.Random) -> str:
    at = [place for place, letter in enumerate(text) if letter.isalnum()]
    if len(at) < 4:
        return text
    place = chance.choice(at)
    return text[:place] + text[place + 1 :]


def categories(data: SearchSet) -> list[str]:
    """Names of categories that are asked for."""
    counts: dict[str, int] = {}
    for tags in data.tags:
        for tag in tags:
            counts[tag] = counts.get(tag, 0) + 1
    return sorted(tag for tag, count in counts.items() if count >= KINDS[data.name].fewest)


@dataclass(frozen=True)
class Bought:
    """A question about one user's held-out items: one is the query, the others should be found.

    Attributes:
        user: whose.
        query: the item that is asked for.
        relevant: the items that should be found.
        masked: items without a place.
    """

    user: int
    query: int
    relevant: list[int]
    masked: list[int]


def bought_together(data: SearchSet, across: bool, seed: int = 0) -> list[Bought]:
    """Questions from the test split; up to three of a user, ``MOST_QUESTIONS`` of all, drawn at random.

    Args:
        data: the dataset.
        across: ask by a validation item for the test items; otherwise by one test item for the others.
        seed: of the choice.
    """
    chance = np.random.default_rng(seed)
    test, valid, seen = data.of_users("test"), data.of_users("valid"), data.of_users("train", "valid")
    found = []
    for user in range(data.n_users):
        asked = valid[user] if across else test[user] if len(test[user]) > 1 else []
        for query in chance.permutation(asked)[:MOST_OF_A_USER].tolist():
            relevant = [item for item in test[user] if item != query]
            if relevant:
                found.append(Bought(user, query, relevant, [*seen[user], query]))
    kept = np.sort(chance.permutation(len(found))[:MOST_QUESTIONS])
    return [found[at] for at in kept.tolist()]
