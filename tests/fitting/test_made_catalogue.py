"""Catalogues that benchmarks make of real ones: every interaction stays one, of the same item, in some copy."""

import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import made_catalogue
from made_catalogue import stacked, write_made_dataset

from recbole_llm.scoring.rows import Rows


def test_copies_keep_each_interaction_with_its_item_and_move_a_few():
    n, generator = 50, torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 9, (400,), generator=generator)
    ids = torch.cat([torch.randperm(n, generator=generator)[:size].sort().values + 1 for size in sizes])
    ranks = torch.arange(len(ids)).float()
    rows = Rows(torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), ids, ranks=ranks)
    found = stacked(rows, n, 3, generator)
    assert found.sizes.tolist() == sizes.tolist() * 3
    of, copy = (found.ids - 1) % n + 1, (found.ids - 1) // n
    for start in (0, len(ids), 2 * len(ids)):  # the same items at the same ranks, whatever their order in the row is
        part = slice(start, start + len(ids))
        assert torch.equal(of[part][found.ranks[part].argsort()], ids)
    own = torch.arange(3).repeat_interleave(len(ids))
    moved = float((copy != own).float().mean())
    assert abs(moved - made_catalogue.MOVED * 2 / 3) < 0.02  # a third of what moves comes back
    row = found.row_of_entry()
    assert bool((found.ids.diff() > 0)[row.diff() == 0].all()), "ids ascend within a row"
    assert torch.equal(stacked(rows, n, 1, generator).ids, ids)


def test_a_made_data_set_has_the_size_asked_for_and_titles_of_its_items(tmp_path, monkeypatch):
    monkeypatch.setattr(made_catalogue, "SETS", ("one", "two"))
    monkeypatch.setattr(made_catalogue, "SIZE", (11, 30))
    for name, users, items in (("one", 20, 6), ("two", 12, 5)):
        folder = tmp_path / "real" / name
        folder.mkdir(parents=True)
        pairs = [(user, item) for user in range(users) for item in range(items) if (user + item) % 2 or item < 2]
        lines = [f"{user}\t{item}\t{user}" for user, item in pairs]
        (folder / f"{name}.inter").write_text(
            "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines) + "\n"
        )
        texts = [f'{item}\tthe {name} "number {item}' for item in range(items)]
        (folder / f"{name}.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(texts) + "\n")
    told = write_made_dataset(tmp_path / "made", "made", tmp_path / "real")
    inter = [line.split("\t") for line in (tmp_path / "made" / "made.inter").read_text().splitlines()[1:]]
    titles = dict(line.split("\t") for line in (tmp_path / "made" / "made.item").read_text().splitlines()[1:])
    assert told == {"items": len({item for _, item, _ in inter}), "users": 30, "interactions": len(inter)}
    assert len(titles) == 11 and {item for _, item, _ in inter} <= set(titles)
    assert titles["one-1-0"] == 'the one "number 0'
    assert len({user for user, _, _ in inter}) == 30 and min(Counter(user for user, _, _ in inter).values()) > 1
