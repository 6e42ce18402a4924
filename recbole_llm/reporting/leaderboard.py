"""The canonical table: rows measured here beside published ones, resumable, as Markdown and JSON."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.atomic import atomic_file
from recbole_llm.bridge.environment import versions
from recbole_llm.bridge.experiments.leave_one_out import OURS, RULES, Loaded, Measured, measure
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.reporting.published import CANONICAL, Published, published

SHOWN = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")

Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A row to be measured.

    Attributes:
        name: ``LLMTwoTower`` or a baseline.
        seed: of its training.
        unmasked: whether its validation follows the rule ``unmasked``.
    """

    name: str
    seed: int
    unmasked: bool

    @property
    def file(self) -> str:
        """Its file's name without an ending."""
        return f"{self.name}-{RULES[self.unmasked]}-{self.seed}"


def asked_rows(names: Sequence[str], seeds: int, unmasked: bool) -> list[Asked]:
    """List the rows of a table; those that are solved for ignore the seed."""
    rules = (False, True) if unmasked else (False,)
    return [Asked(name, seed, rule) for rule in rules for name in names for seed in range(seeds if name == OURS else 1)]


def check_size(name: str, loaded: Loaded) -> None:
    """Refuse a data set that bears a canonical name and is another.

    Raises:
        ValueError: if users or items are not as many.
    """
    expected = CANONICAL.get(name)
    if expected is not None and (loaded.n_users, loaded.n_items) != (expected.users, expected.items):
        raise ValueError(
            f"{expected.dataset} has {loaded.n_users} users and {loaded.n_items} items; the canonical {expected.title} has "
            f"{expected.users} and {expected.items}. Use its five-core file, unfiltered, or give the data set another name."
        )


def fingerprint(loaded: Loaded, overrides: Sequence[str]) -> str:
    """Hash the interactions, the overrides and the version: what a measured row is valid for."""
    digest = hashlib.sha256(json.dumps([*overrides, versions()["recbole-llm"]]).encode())
    for loader in loaded.loaders:
        rows = loader._dataset.training_rows()
        digest.update(rows.offsets.numpy().tobytes())
        digest.update(rows.ids.numpy().tobytes())
    return digest.hexdigest()


def measure_rows(
    asked: Sequence[Asked],
    folder: Path,
    load: Callable[[bool], Loaded],
    name: str,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> list[Json]:
    """Measure rows, those that are in ``folder`` already apart.

    Args:
        asked: the rows.
        folder: where a row is written as soon as it is measured.
        load: reads the data set under the rule ``unmasked`` or not.
        name: of the data set, whose size is checked where it is canonical.
        overrides: ``--key=value`` arguments of the run.
        progress: told of each row.

    Returns:
        The rows as plain values, NDCG@10 of each user by rule among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[bool, Loaded] = {}
    rows = []
    for number, row in enumerate(asked, 1):
        if row.unmasked not in kept:
            kept.clear()  # one copy of the data at a time
            kept[row.unmasked] = load(row.unmasked)
            check_size(name, kept[row.unmasked])
        loaded, file = kept[row.unmasked], folder / f"{row.file}.json"
        key = fingerprint(loaded, overrides)
        found = _read(file, key)
        if found is None:
            progress(f"[{number}/{len(asked)}] {row.file}")
            found = _plain(measure(loaded, row.name, row.seed)) | {"key": key}
            with atomic_file(file) as stream:
                stream.write(json.dumps(found).encode())
        figure = found["figures"][found["chosen_by"]]["ndcg@10"]
        progress(f"[{number}/{len(asked)}] {row.file}: NDCG@10 {figure:.4f}, {found['cpu_seconds']:.0f} CPU-seconds")
        rows.append(found)
    return rows


def _read(file: Path, key: str) -> Json | None:
    try:
        found: Json = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found.get("key") == key else None


def _plain(row: Measured) -> Json:
    return asdict(row) | {"users": {rule: values.tolist() for rule, values in row.users.items()}}


# ---------------------------------------------------------------- the table


def summary(rows: Sequence[Json]) -> list[Json]:
    """Average each row over its seeds and test it against LLMTwoTower on the same users, best first.

    Args:
        rows: from :func:`measure_rows`.

    Returns:
        For each name and rule of choice: ``figures`` by rule and metric, ``seeds``, ``spread`` of NDCG@10 over seeds, its
        ``standard_error`` over users, and by rule ``difference`` of LLMTwoTower minus it with its 95% interval.
    """
    groups: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["chosen_by"]), []).append(row)
    users = {
        key: {rule: np.mean([row["users"][rule] for row in group], axis=0) for rule in RULES}
        for key, group in groups.items()
    }
    found = []
    for (name, chosen_by), group in groups.items():
        own, ours = users[name, chosen_by], users.get((OURS, chosen_by))
        first = group[0]
        figures = {
            rule: {m: float(np.mean([row["figures"][rule][m] for row in group])) for m in first["figures"][rule]}
            for rule in RULES
        }
        spread = {rule: float(np.std([row["figures"][rule]["ndcg@10"] for row in group])) for rule in RULES}
        entry: Json = {
            "name": name,
            "chosen_by": chosen_by,
            "setting": first["setting"],
            "seeds": len(group),
            "valid_ndcg@10": float(np.mean([row["valid"] for row in group])),
            "figures": figures,
            "spread": spread,
            "standard_error": {rule: float(own[rule].std() / len(own[rule]) ** 0.5) for rule in RULES},
            "cpu_seconds": float(np.mean([row["cpu_seconds"] for row in group])),
            "seconds": float(np.mean([row["seconds"] for row in group])),
            "peak_bytes": max(row["peak_bytes"] for row in group),
        }
        if ours is not None and name != OURS:
            entry["difference"] = {rule: asdict(paired_bootstrap(ours[rule], own[rule])) for rule in RULES}
        found.append(entry)
    return sorted(found, key=lambda entry: -entry["figures"][entry["chosen_by"]]["ndcg@10"])


def as_json(name: str, dataset: str, rows: Sequence[Json]) -> Json:
    """Make the table a JSON value: the rows measured here, the published ones, versions."""
    cited = [asdict(row) for row in published(name)]
    return {"table": name, "dataset": dataset, "measured": summary(rows), "published": cited, "versions": versions()}


MEASURED = (
    "measured here",
    "choices by",
    "R@5",
    "N@5",
    "R@10",
    "N@10",
    "N@10 unmasked",
    "ours minus it",
    "CPU-seconds",
)
PUBLISHED = ("published", "N@10", "R@10", "history items", "source")
ABOUT = "± is the standard error over users. Intervals are 95%, of a paired bootstrap over the same users."


def title_of(name: str, table: Mapping[str, Any]) -> str:
    """What the table is of, with the dataset's full name where it is canonical."""
    return (
        f"{CANONICAL[name].title if name in CANONICAL else table['dataset']}: leave one out by time, every item ranked"
    )


def measured_cells(row: Json) -> list[str]:
    """A row that was measured here, under :data:`MEASURED`."""
    masked, unmasked = row["figures"]["masked"], row["figures"]["unmasked"]["ndcg@10"]
    difference = row.get("difference", {}).get(row["chosen_by"])
    told = (
        "" if difference is None else f"{difference['mean']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    )
    error = row["standard_error"][row["chosen_by"]]
    return [
        row["name"] + (f", {row['seeds']} seeds" if row["seeds"] > 1 else ""),
        row["chosen_by"],
        *(f"{masked[metric]:.4f}" for metric in SHOWN[:3]),
        f"{masked['ndcg@10']:.4f} ± {error:.4f}",
        f"{unmasked:.4f}",
        told,
        f"{row['cpu_seconds']:.0f}",
    ]


def published_cells(cited: Published, name: str) -> list[str]:
    """A published row, under :data:`PUBLISHED`."""
    rule = {True: "no place", False: "ranked too", None: "not told"}
    recall = f"{cited.recall[name]:.4f}" if name in cited.recall else ""
    return [cited.method, f"{cited.ndcg[name]:.4f}", recall, rule[cited.masked], cited.source]


def as_markdown(name: str, table: Mapping[str, Any]) -> str:
    """Format the table: rows measured here, then the published ones with their sources."""
    lines = [f"## {title_of(name, table)}", "", _line(MEASURED), "|---" * len(MEASURED) + "|"]
    lines += [_line(measured_cells(row)) for row in table["measured"]]
    rows = [Published(**row) for row in table["published"]]
    if rows:
        lines += ["", _line(PUBLISHED), "|---" * len(PUBLISHED) + "|"]
    lines += [_line(published_cells(cited, name)) for cited in rows]
    return "\n".join([*lines, "", ABOUT]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
