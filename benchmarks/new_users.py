"""New users by their profile text (``user_tower: text``) against popularity and popularity by segment, on ml-100k.

    python benchmarks/new_users.py

The users are dealt into five folds. In turn a fold is the new users of the test, half of the next one those of validation, and all
others are trained on. Of a new user nothing is known but the columns age, gender and occupation of the ``.user`` file; all items of
the user are targets. So every user is tested once.

- ours: LLMTwoTower with ``user_tower: text`` (the learned block alone), by the columns that validation chooses of two sets.
- popularity: how many training users have the item.
- popularity by segment: the same among the training users of the new user's segment, with kappa users of all added;
  which columns make segments, and kappa, are chosen on validation, for each fold.

NDCG@10 and Recall@10 of each user are paired; the interval is a bootstrap's. A fold of a model is a part of its own in ``--work``,
so that a stopped run goes on; no part is begun after ``--seconds``.
"""

import argparse
import json
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from final_fit import METRICS, train
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.fitting.validation import user_metric
from recbole_llm.scoring.rows import Rows

FOLDS = 5
COLUMNS = ("age", "gender", "occupation")
FIELDS = (("age", "gender", "occupation"), ("age", "gender"))
KAPPAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
AGES = (18, 25, 35, 45, 50, 56)  # MovieLens' own bands
PARTS = ("train", "valid", "test")
MODEL: dict[str, Any] = {"user_tower": "text", "blocks": "learned"}
OURS = "user_tower: text"


def source() -> Path:
    import recbole

    return Path(recbole.__file__).parent / "dataset_example" / "ml-100k"


def profiles() -> dict[str, tuple[str, ...]]:
    """Age band, gender and occupation of every user."""
    header, *lines = (source() / "ml-100k.user").read_text().splitlines()
    names = [name.split(":")[0] for name in header.split("\t")]
    found = {}
    for line in lines:
        cells = dict(zip(names, line.split("\t"), strict=True))
        cells["age"] = str(sum(int(cells["age"]) >= start for start in AGES))
        found[cells["user_id"]] = tuple(cells[name] for name in COLUMNS)
    return found


def deal(users: list[str]) -> list[dict[str, set[str]]]:
    """Users of each part, fold by fold."""
    order = np.random.default_rng(0).permutation(len(users))
    folds = [[users[at] for at in fold] for fold in np.array_split(order, FOLDS)]
    dealt = []
    for number, test in enumerate(folds):
        following = folds[(number + 1) % FOLDS]
        valid = set(following[: len(following) // 2])
        dealt.append({"test": set(test), "valid": valid, "train": set(users) - valid - set(test)})
    return dealt


def write_fold(folder: Path, fold: dict[str, set[str]]) -> Path:
    """The fold as benchmark files of RecBole."""
    target = folder / "newcomers"
    target.mkdir(parents=True, exist_ok=True)
    header, *lines = (source() / "ml-100k.inter").read_text().splitlines()
    for part, users in fold.items():
        rows = [line for line in lines if line.split("\t", 1)[0] in users]
        (target / f"newcomers.{part}.inter").write_text("\n".join([header, *rows]) + "\n")
    for suffix in ("item", "user"):
        (target / f"newcomers.{suffix}").write_text((source() / f"ml-100k.{suffix}").read_text())
    return folder


def of_users(scores: np.ndarray, rows: Rows) -> dict[str, list[float]]:
    """Metrics of the users with targets, whose scores ``[U, N]`` these are."""
    table, nothing = torch.from_numpy(scores), Rows(torch.zeros_like(rows.offsets), rows.ids[:0])
    padding = torch.zeros(table.shape[1], dtype=torch.bool)
    padding[0] = True
    return {
        str(m).lower(): user_metric(lambda at: table[at].clone(), rows, nothing, table.shape[1], m, padding).tolist()
        for m in METRICS
    }


def model_part(number: int, fold: dict[str, set[str]], settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """One model on one fold: metrics of each new user of validation and test."""
    values: dict[str, Any] = {
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(work / f"saved-{number}"),
        "data_path": str(write_fold(work / f"fold-{number}", fold)),
        "benchmark_filename": list(PARTS),
        "metrics": ["NDCG", "Recall"],
        "topk": [10],
    }
    trainer, parts, seconds = train("newcomers", values | settings)
    model, data = trainer.model.eval(), parts[0]._dataset
    found: dict[str, Any] = {"cpu_seconds": round(seconds, 1)}
    with torch.no_grad():
        scores = model.score.of_users(torch.arange(model.n_users), model.history).numpy()
    for part, loader in zip(PARTS[1:], parts[1:], strict=True):
        rows = loader._dataset.training_rows()
        known = torch.nonzero(rows.sizes).squeeze(1)
        assert not bool(model.history.sizes[known].any()), "new users have no history"
        ids = [str(data.id2token(data.uid_field, int(user))) for user in known]
        found[part] = {"users": ids, **of_users(scores, rows)}
    return found


class Counts:
    """Which items users have, for popularity."""

    def __init__(self) -> None:
        _, *lines = (source() / "ml-100k.inter").read_text().splitlines()
        pairs = [line.split("\t")[:2] for line in lines]
        self.profiles = profiles()
        self.users = sorted(self.profiles, key=int)
        items = sorted({item for _, item in pairs}, key=int)
        at, row = {item: n + 1 for n, item in enumerate(items)}, {user: n for n, user in enumerate(self.users)}
        self.has = np.zeros((len(self.users), len(items) + 1))
        self.has[[row[user] for user, _ in pairs], [at[item] for _, item in pairs]] = 1
        self.row = row

    def targets(self, users: list[str]) -> Rows:
        """Items of users as rows."""
        table = torch.from_numpy(self.has[[self.row[user] for user in users]])
        ids = table.nonzero()
        return Rows(torch.nn.functional.pad(table.sum(1).long().cumsum(0), (1, 0)), ids[:, 1])

    def popularity(self, fold: dict[str, set[str]], part: str, columns: tuple[int, ...], kappa: float) -> Any:
        """Metrics of the new users of a part by popularity in the segments that columns make."""
        users = sorted(fold[part], key=int)
        trained = [self.row[user] for user in sorted(fold["train"], key=int)]
        has, share = self.has[trained], self.has[trained].mean(0)
        key = lambda user: tuple(self.profiles[user][c] for c in columns)  # noqa: E731
        keys = [key(self.users[row]) for row in trained]
        scores = np.empty((len(users), has.shape[1]))
        for n, user in enumerate(users):
            own = has[[k == key(user) for k in keys]]
            scores[n] = (own.sum(0) + kappa * share) / (len(own) + kappa)
        return {"users": users, **of_users(scores, self.targets(users))}


def by_segment(counts: Counts, fold: dict[str, set[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Popularity by the segments that are best on validation, with what was chosen."""
    segments = [some for size in (1, 2, 3) for some in combinations(range(len(COLUMNS)), size)]
    values = {
        (some, kappa): float(np.mean(counts.popularity(fold, "valid", some, kappa)["ndcg@10"]))
        for some in segments
        for kappa in KAPPAS
    }
    some, kappa = max(values, key=lambda choice: values[choice])
    told = {"columns": [COLUMNS[c] for c in some], "kappa": kappa, "valid": values[some, kappa]}
    return counts.popularity(fold, "test", some, kappa), told


def together(parts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Metrics of all folds, in the order of the users."""
    users = [user for part in parts for user in part["users"]]
    order = sorted(range(len(users)), key=lambda at: int(users[at]))
    joined = {str(m).lower(): np.concatenate([part[str(m).lower()] for part in parts])[order] for m in METRICS}
    assert len(set(users)) == len(users)
    return joined


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="new-users")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no part is begun later")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "new-users-ml-100k.json"))
    options = parser.parse_args()
    work, began = Path(options.work).absolute(), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    counts = Counts()
    folds = deal(counts.users)
    read: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for fields in FIELDS:
        for number, fold in enumerate(folds):
            kept = work / f"0-{'-'.join(fields)}-{number}.json"
            if not kept.is_file():
                if time.monotonic() - began > options.seconds:
                    print("stopped; the same command goes on")
                    return 3
                given = MODEL | {"user_text_fields": list(fields)}
                kept.write_text(json.dumps(model_part(number, fold, given, work)), encoding="utf-8")
            read.setdefault(fields, []).append(json.loads(kept.read_text(encoding="utf-8")))
    segmented = [by_segment(counts, fold) for fold in folds]
    found = {
        "popularity": together([counts.popularity(fold, "test", (), 1.0) for fold in folds]),
        "popularity by segment": together([test for test, _ in segmented]),
    }
    chosen: dict[str, Any] = {"popularity by segment": [told for _, told in segmented]}
    valid = {
        fields: float(np.mean(np.concatenate([part["valid"]["ndcg@10"] for part in read[fields]]))) for fields in FIELDS
    }
    best = max(FIELDS, key=lambda fields: valid[fields])
    chosen[OURS] = {"valid": {", ".join(fields): value for fields, value in valid.items()}, "columns": list(best)}
    chosen[OURS]["cpu_seconds"] = [part["cpu_seconds"] for part in read[best]]
    found[OURS] = together([part["test"] for part in read[best]])
    rows: dict[str, Any] = {}
    for name, values in found.items():
        rows[name] = {metric: {"mean": float(own.mean())} for metric, own in values.items()}
        for other in ("popularity", "popularity by segment"):
            if name not in ("popularity", other):
                for metric, own in values.items():
                    rows[name][metric][f"difference to {other}"] = vars(paired_bootstrap(own, found[other][metric]))
        print(name, json.dumps(rows[name]["ndcg@10"]))
    result = {
        "benchmark": "new_users",
        "dataset": "ml-100k",
        "users": len(counts.users),
        "folds": FOLDS,
        "figures": rows,
        "chosen on validation": chosen,
        "machine": machine("cpu"),
    }
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
