"""The canonical table: rows measured here beside published ones, resumable, as Markdown, LaTeX and JSON."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.atomic import atomic_file
from recbole_llm.bridge.environment import versions
from recbole_llm.bridge.experiments.baselines import RefusedRowError
from recbole_llm.bridge.experiments.latex import booktabs, escaped
from recbole_llm.bridge.experiments.leave_one_out import OURS, RULES, Loaded, inputs_digest
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.bridge.experiments.table_rows import SEEDED, WITH_BUDGET, Measured
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
        minutes: its budget of processor minutes; ``None`` for a row that has none.
    """

    name: str
    seed: int
    unmasked: bool
    minutes: float | None = None

    @property
    def file(self) -> str:
        """Its file's name without an ending."""
        return f"{self.name}-{RULES[self.unmasked]}-{self.seed}"


def asked_rows(names: Sequence[str], seeds: int, unmasked: bool, minutes: float | None = None) -> list[Asked]:
    """List the rows of a table; those that are solved for ignore the seed, and the budget is of those that have one."""
    return [
        Asked(name, seed, rule, minutes if name in WITH_BUDGET else None)
        for rule in ((False, True) if unmasked else (False,))
        for name in names
        for seed in range(seeds if name in SEEDED else 1)
    ]


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


ABOUT_OUTPUT = ("state", "show_progress", "log_wandb", "checkpoint_dir")  # keys of RecBole that change no figure


def fingerprint(loaded: Loaded, overrides: Sequence[str]) -> str:
    """Hash the interactions, the settings that change figures, and the version: what a measured row is valid for.

    Settings are those of configuration files and the overrides.
    """
    counting = [
        value for value in overrides if value.partition("=")[0].lstrip("-").replace("-", "_") not in ABOUT_OUTPUT
    ]
    of_files = sorted(loaded.config.file_config_dict.items())
    counting += [f"{key}={value!r}" for key, value in of_files if key not in ABOUT_OUTPUT]
    digest = hashlib.sha256(json.dumps([*counting, versions()["recbole-llm"]]).encode())
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
    measure: Callable[[Loaded, Asked], Measured],
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
    left_out: dict[str, str] | None = None,
) -> list[Json]:
    """Measure rows, those that are in ``folder`` already apart.

    Args:
        asked: the rows.
        folder: where a row is written as soon as it is measured.
        load: reads the data set under the rule ``unmasked`` or not.
        name: of the data set, whose size is checked where it is canonical.
        measure: measures a row of a data set.
        overrides: ``--key=value`` arguments of the run.
        progress: told of each row.
        left_out: takes the name of a row that the data set cannot have, and why; ``None`` to raise instead.

    Returns:
        The rows as plain values, NDCG@10 of each user by rule among them, and ``groups``: by rule and group of
        :attr:`~recbole_llm.bridge.experiments.leave_one_out.Loaded.groups` their mean NDCG@10, and ``group_users``.

    Raises:
        RefusedRowError: if the data set cannot have a row, and ``left_out`` is ``None``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[bool, tuple[Loaded, dict[str, np.ndarray], str]] = {}
    rows = []
    for number, row in enumerate(asked, 1):
        if row.unmasked not in kept:
            kept.clear()  # one copy of the data at a time
            read = load(row.unmasked)
            check_size(name, read)
            of_groups = {group: users.numpy() for group, users in read.groups.items() if users.any()}
            kept[row.unmasked] = read, of_groups, inputs_digest(read)
        (loaded, groups, inputs), file = kept[row.unmasked], folder / f"{row.file}.json"
        key = fingerprint(loaded, overrides if row.minutes is None else [*overrides, f"budget {row.minutes:g}"])
        found = _read(file, key, inputs)
        if found is None:
            progress(f"[{number}/{len(asked)}] {row.file}")
            try:
                found = _plain(measure(loaded, row)) | {"key": key, "inputs": inputs}
            except RefusedRowError as error:
                if left_out is None:
                    raise
                left_out[row.name] = str(error)
                progress(f"[{number}/{len(asked)}] {row.file}: left out. {error}")
                continue
            with atomic_file(file) as stream:
                stream.write(json.dumps(found).encode())
        figure = found["figures"][found["chosen_by"]]["ndcg@10"]
        progress(f"[{number}/{len(asked)}] {row.file}: NDCG@10 {figure:.4f}, {found['cpu_seconds']:.0f} CPU-seconds")
        rows.append(found | by_group(found["users"], groups))
    return rows


def by_group(users: Mapping[str, Sequence[float]], groups: Mapping[str, np.ndarray]) -> Json:
    """Average the metric of each user over groups of users.

    Args:
        users: ``[U]`` by rule.
        groups: ``[U]`` bool by name, none of them empty.
    """
    means = {
        rule: {name: float(np.asarray(values)[of].mean()) for name, of in groups.items()}
        for rule, values in users.items()
    }
    return {"groups": means, "group_users": {name: int(of.sum()) for name, of in groups.items()}}


def _read(file: Path, key: str, inputs: str) -> Json | None:
    """The row in a file, if it is of this key and these inputs; rows of before there was a digest of inputs hold none."""
    try:
        found: Json = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found.get("key") == key and found.get("inputs", inputs) == inputs else None


def _plain(row: Measured) -> Json:
    return asdict(row) | {"users": {rule: values.tolist() for rule, values in row.users.items()}}


# ---------------------------------------------------------------- the table


def summary(rows: Sequence[Json]) -> list[Json]:
    """Average each row over its seeds and test it against the others on the same users, best first.

    Args:
        rows: from :func:`measure_rows`.

    Returns:
        For each name and rule of choice: ``figures`` by rule and metric, ``groups`` by rule and group, ``seeds``, ``spread`` of
        NDCG@10 over seeds, its ``standard_error`` over users, and by rule ``difference`` of LLMTwoTower minus it and ``ahead``,
        it minus the best other row, each with its 95% interval.
    """
    collected: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        collected.setdefault((row["name"], row["chosen_by"]), []).append(row)
    users = {
        key: {rule: np.mean([row["users"][rule] for row in group], axis=0) for rule in RULES}
        for key, group in collected.items()
    }
    found = []
    for (name, chosen_by), group in collected.items():
        own, ours = users[name, chosen_by], users.get((OURS, chosen_by))
        first = group[0]
        entry: Json = {
            "name": name,
            "chosen_by": chosen_by,
            "setting": first["setting"],
            "seeds": len(group),
            "valid_ndcg@10": float(np.mean([row["valid"] for row in group])),
            "figures": _mean_over_seeds(group, "figures"),
            "groups": _mean_over_seeds(group, "groups"),
            "group_users": first["group_users"],
            "spread": {rule: float(np.std([row["figures"][rule]["ndcg@10"] for row in group])) for rule in RULES},
            "standard_error": {rule: float(own[rule].std() / len(own[rule]) ** 0.5) for rule in RULES},
            "cpu_seconds": float(np.mean([row["cpu_seconds"] for row in group])),
            "seconds": float(np.mean([row["seconds"] for row in group])),
            "peak_bytes": max(row["peak_bytes"] for row in group),
        }
        if ours is not None and name != OURS:
            entry["difference"] = {rule: asdict(paired_bootstrap(ours[rule], own[rule])) for rule in RULES}
        others = [key for key in users if key[1] == chosen_by and key[0] != name]
        if others:
            entry["ahead"] = {rule: _ahead(own[rule], {key[0]: users[key][rule] for key in others}) for rule in RULES}
        found.append(entry)
    return sorted(found, key=lambda entry: -entry["figures"][entry["chosen_by"]]["ndcg@10"])


def _mean_over_seeds(group: Sequence[Json], key: str) -> dict[str, dict[str, float]]:
    return {
        rule: {name: float(np.mean([row[key][rule][name] for row in group])) for name in group[0][key][rule]}
        for rule in RULES
    }


def _ahead(own: np.ndarray, others: Mapping[str, np.ndarray]) -> Json:
    """Test a row against the best of the others on the same users."""
    best = max(others, key=lambda name: float(others[name].mean()))
    return asdict(paired_bootstrap(own, others[best])) | {"of": best}


def as_json(name: str, dataset: str, rows: Sequence[Json], left_out: Mapping[str, str] | None = None) -> Json:
    """Make the table a JSON value: the rows measured here, those left out, the published ones, versions."""
    return {
        "table": name,
        "dataset": dataset,
        "measured": summary(rows),
        "left_out": dict(left_out or {}),
        "published": [asdict(row) for row in published(name)],
        "versions": versions(),
    }


MEASURED = (
    "measured here",
    "choices by",
    "R@5",
    "N@5",
    "R@10",
    "N@10",
    "R@10 unmasked",
    "N@10 unmasked",
    "N@10 minus the best other row's",
)
GROUPS = ("popular", "rare", "untrained", "short", "long")
DETAILS = ("N@10 of", *GROUPS, "CPU-seconds", "peak GiB", "chosen by validation")
PUBLISHED = ("published", "N@10", "R@10", "history items", "source")
ABOUT = (
    "± is the standard error over users. Intervals are 95%, of a paired bootstrap over the same users; the best other row is the "
    "first one, and for that the second."
)
ABOUT_GROUPS = (
    "Popular targets are among the most popular items that make up half of the training interactions, rare ones are the other "
    "trained items, untrained ones have no training interaction. Short histories have at most the median length. Processor "
    "seconds go from making the model to the end of its training, its choices included. Each row is measured in a process of its "
    "own, whose largest resident memory is the peak."
)


def title_of(name: str, table: Mapping[str, Any]) -> str:
    """What the table is of, with the dataset's full name where it is canonical."""
    return (
        f"{CANONICAL[name].title if name in CANONICAL else table['dataset']}: leave one out by time, every item ranked"
    )


def shown_row(row: Json) -> str:
    """Name a row, with the number of its trainings where there are several."""
    return str(row["name"]) + (f", {row['seeds']} seeds" if row["seeds"] > 1 else "")


def measured_cells(row: Json) -> list[str]:
    """A row that was measured here, under :data:`MEASURED`."""
    masked, unmasked = row["figures"]["masked"], row["figures"]["unmasked"]
    ahead = row.get("ahead", {}).get(row["chosen_by"])
    told = "" if ahead is None else f"{ahead['mean']:+.4f} [{ahead['low']:+.4f}, {ahead['high']:+.4f}]"
    error = row["standard_error"][row["chosen_by"]]
    return [
        shown_row(row),
        row["chosen_by"],
        *(f"{masked[metric]:.4f}" for metric in SHOWN[:3]),
        f"{masked['ndcg@10']:.4f} ± {error:.4f}",
        f"{unmasked['recall@10']:.4f}",
        f"{unmasked['ndcg@10']:.4f}",
        told,
    ]


def details_header(rows: Sequence[Json]) -> tuple[str, ...]:
    """:data:`DETAILS` with the number of users of each group."""
    count = rows[0]["group_users"] if rows else {}
    return tuple(f"{name} ({count[name]})" if name in count else name for name in DETAILS)


def detail_cells(row: Json) -> list[str]:
    """The same row under :data:`DETAILS`, by the rule that its choices followed."""
    groups = row["groups"][row["chosen_by"]]
    size = f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else ""
    return [
        f"{shown_row(row)} ({row['chosen_by']})",
        *(f"{groups[name]:.4f}" if name in groups else "" for name in GROUPS),
        f"{row['cpu_seconds']:.0f}",
        size,
        row["setting"],
    ]


def published_cells(cited: Published, name: str) -> list[str]:
    """A published row, under :data:`PUBLISHED`."""
    rule = {True: "no place", False: "ranked too", None: "not told"}
    recall = f"{cited.recall[name]:.4f}" if name in cited.recall else ""
    return [cited.method, f"{cited.ndcg[name]:.4f}", recall, rule[cited.masked], cited.source]


def as_markdown(name: str, table: Mapping[str, Any]) -> str:
    """Format the table: rows measured here, where they are good and what they cost, then the published ones."""
    measured = table["measured"]
    lines = [f"## {title_of(name, table)}", "", *_lines(MEASURED, map(measured_cells, measured)), "", ABOUT, ""]
    lines += [*_lines(details_header(measured), map(detail_cells, measured)), "", ABOUT_GROUPS]
    lines += [f"\nLeft out: {name}. {why}" for name, why in table["left_out"].items()]
    rows = [Published(**row) for row in table["published"]]
    if rows:
        lines += ["", *_lines(PUBLISHED, (published_cells(cited, name) for cited in rows))]
    return "\n".join(lines) + "\n"


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(header), "|---" * len(header) + "|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_latex(name: str, table: Mapping[str, Any]) -> str:
    r"""Format the table for a paper that loads ``\usepackage{booktabs}``: published rows, then those measured here, best first.

    The best figure of each column among the rows measured here is bold, the second underlined. A dagger marks a row that is
    better than the best other one.
    """
    rows = table["measured"]
    columns = [(metric, rule) for rule in RULES for metric in ("recall@10", "ndcg@10")]
    ranked = {
        (metric, rule): sorted({round(row["figures"][rule][metric], 4) for row in rows}, reverse=True)[:2]
        for metric, rule in columns
    }
    cited = [Published(**row) for row in table["published"]]
    groups = [
        [_cited_line(each, name) for each in cited],
        [_measured_line(row, columns, ranked) for row in rows],
    ]
    caption = (
        f"{escaped(title_of(name, table))}. Masked: items of the history have no place in the ranking; unmasked: they have one. "
        "Best of the rows measured here in bold, second underlined. $\\dagger$: better than the best other row in NDCG@10, "
        "95\\% interval of a paired bootstrap over users. Published rows stand under the rule that their source tells, else under "
        "both in italics."
    )
    header = ["Row", "R@10 masked", "N@10 masked", "R@10 unmasked", "N@10 unmasked"]
    return booktabs(header, groups, caption, f"leaderboard-{name}") + "\n"


def _measured_line(
    row: Json, columns: Sequence[tuple[str, str]], ranked: Mapping[tuple[str, str], list[float]]
) -> list[str]:
    chosen = "" if row["chosen_by"] == RULES[0] else f", choices {row['chosen_by']}"
    cells = [escaped(shown_row(row) + chosen)]
    for metric, rule in columns:
        value = round(row["figures"][rule][metric], 4)
        first, second = (*ranked[metric, rule], None)[:2]
        text = f"{value:.4f}"
        text = rf"\textbf{{{text}}}" if value == first else rf"\underline{{{text}}}" if value == second else text
        ahead = row.get("ahead", {}).get(rule)
        if metric == "ndcg@10" and ahead is not None and ahead["low"] > 0:
            text += r"$^{\dagger}$"
        cells.append(text)
    return cells


def _cited_line(cited: Published, name: str) -> list[str]:
    recall = f"{cited.recall[name]:.4f}" if name in cited.recall else "--"
    figures = [recall, f"{cited.ndcg[name]:.4f}"]
    if cited.masked is None:
        unknown = [figure if figure == "--" else rf"\textit{{{figure}}}" for figure in figures]
        return [escaped(cited.method), *unknown, *unknown]
    return [escaped(cited.method), *(figures + ["--"] * 2 if cited.masked else ["--"] * 2 + figures)]
