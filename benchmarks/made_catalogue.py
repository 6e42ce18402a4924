"""Catalogues made from real ones, which are larger than the sets at hand and keep their local structure.

A catalogue has the items and users of a data set N times over. Every interaction goes to the same item of another copy with a
chance of ``MOVED``. Each copy's text vectors have noise of ``NOISE`` of their standard deviation.
"""

import csv
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from recbole_llm.fitting.validation import TopKMetric, evenly, user_metric
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

MOVED, NOISE = 0.15, 0.3
USERS = 2_000  # asked for a ranking
NDCG = TopKMetric("ndcg", 10)
SETS = ("amazon-beauty", "amazon-office")  # of which data sets are made that RecBole reads
SIZE = 17_000, 50_000  # items and users of these


class Copies:
    """A made catalogue; padding item 0 is in none of its rows. The newest interaction but one of a user is its target.

    Args:
        dataset: what it is made of.
        data_path: where that is.
        copies: how many times.
        kept: where the data set is read from, or written to.

    Attributes:
        history: training interactions, with ranks.
        targets: one item of every user.
        content: vectors of the items by modality, and which have one.
        n_items: size of the catalogue, padding included.
        trained: ``[n_items]`` bool.
        rows: histories of the users asked for.
        asked: their targets.
    """

    def __init__(self, dataset: str, data_path: str | None, copies: int, kept: Path) -> None:
        if not kept.is_file():
            _keep(dataset, data_path, kept)
        one = torch.load(kept)
        n = one["n"] - 1
        generator = torch.Generator().manual_seed(0)
        self.n_items = 1 + n * copies
        self.history, self.targets = (
            stacked(Rows(**one[name]), n, copies, generator) for name in ("history", "targets")
        )
        vectors, present = one["text"]
        deviation = vectors[present].std(0)
        texts = torch.zeros(self.n_items, vectors.shape[1])
        for copy in range(copies):
            of = texts[1 + n * copy : 1 + n * (copy + 1)]
            if copies > 1:
                torch.randn(of.shape, generator=generator, out=of)
                of *= NOISE * deviation
            of += vectors[1:]
        has = torch.cat([present[:1], present[1:].repeat(copies)])
        texts[~has] = 0.0
        self.content = {"text": (texts, has)}
        self.trained = torch.bincount(self.history.ids, minlength=self.n_items) > 0
        users = evenly(torch.nonzero((self.targets.sizes > 0) & (self.history.sizes > 0)).squeeze(1), USERS)
        self.rows, self.asked = self.history.select(users), self.targets.select(users)

    def value(self, scorer: Scorer) -> float:
        """NDCG@10 of the users asked for among the trained items."""
        seen = Rows(self.rows.offsets, self.rows.ids)
        return float(user_metric(scorer, self.asked, seen, self.n_items, NDCG, excluded=~self.trained).mean())


def _keep(dataset: str, data_path: str | None, kept: Path) -> None:
    """Write the rows and vectors of a data set, its last item but one of each user left out."""
    from recbole_llm.bridge.experiments.leave_one_out import load, prepare

    values = {"data_path": data_path, "show_progress": False, "state": "WARNING"}
    rows, _, _ = prepare(load(dataset, config_dict=values))
    torch.save({"n": rows.data.n_items, "text": rows.data.content["text"], "history": vars(rows.data.history),
                "targets": vars(rows.validation.targets)}, kept)  # fmt: skip


def stacked(rows: Rows, n: int, copies: int, generator: torch.Generator) -> Rows:
    """Rows of every copy one after the other; ids ascend within a row.

    Args:
        rows: of ids 1 to n.
        n: items.
        copies: how many.
        generator: of the choice of what moves.
    """
    sizes, parts, ranks = [], [], []
    for copy in range(copies):
        moved = torch.rand(len(rows.ids), generator=generator) < (MOVED if copies > 1 else 0.0)
        other = torch.randint(copies, (len(rows.ids),), generator=generator)
        ids = rows.ids + n * torch.where(moved, other, copy)
        order = torch.argsort(rows.row_of_entry() * (n * copies + 1) + ids)
        parts.append(ids[order])
        sizes.append(rows.sizes)
        ranks.append(rows.ranks[order] if rows.ranks is not None else torch.zeros(len(ids)))
    offsets = torch.nn.functional.pad(torch.cat(sizes).cumsum(0), (1, 0))
    return Rows(offsets, torch.cat(parts), ranks=torch.cat(ranks))


def write_made_dataset(folder: Path, name: str, data_path: Path, copies: int = 2) -> dict[str, Any]:
    """Write a data set of ``SIZE`` items and users that RecBole reads, of ``SETS`` side by side, each ``copies`` times over.

    The most popular items stay, and users evenly among those with two interactions with them or more. The copies of an item have
    the same text, as two offers of a shop may.

    Args:
        folder: to make it in.
        name: of the data set.
        data_path: where ``SETS`` are.
        copies: of each.

    Returns:
        How much there is of what.
    """
    generator = random.Random(0)
    pairs: list[tuple[str, str, str]] = []
    titles: dict[str, str] = {}
    for of in SETS:
        items = _rows(data_path / of / f"{of}.item")
        interactions = _rows(data_path / of / f"{of}.inter")
        for copy in range(copies):
            titles |= {f"{of}-{copy}-{row['item_id']}": row["title"] for row in items}
            for row in interactions:
                at = generator.randrange(copies) if generator.random() < MOVED else copy
                pairs.append((f"{of}-{copy}-{row['user_id']}", f"{of}-{at}-{row['item_id']}", row["timestamp"]))
    popular = {item for item, _ in Counter(item for _, item, _ in pairs).most_common(SIZE[0])}
    pairs = [pair for pair in pairs if pair[1] in popular]
    counts = Counter(user for user, _, _ in pairs)
    users = [user for user, count in counts.items() if count > 1]
    kept = {users[i * len(users) // SIZE[1]] for i in range(SIZE[1])}
    pairs = [pair for pair in pairs if pair[0] in kept]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.inter", "w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        file.writelines("\t".join(pair) + "\n" for pair in pairs)
    with open(folder / f"{name}.item", "w", encoding="utf-8") as file:
        file.write("item_id:token\ttitle:token_seq\n")
        file.writelines(f"{item}\t{titles.get(item, '')}\n" for item in sorted(popular))
    return {"items": len({item for _, item, _ in pairs}), "users": len(kept), "interactions": len(pairs)}


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of an atomic file by column, types left out."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [column.split(":")[0] for column in next(lines)]
        return [dict(zip(names, line, strict=True)) for line in lines]
