"""``recbole-llm split``: benchmark files in which some items have no training interaction, as a new item has none."""

import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from recbole_llm.atomic import atomic_folder
from recbole_llm.text_files import read_text

SHARES = (0.8, 0.1, 0.1)  # of a user's interactions with the other items: RecBole's default split


@dataclass(frozen=True)
class SplitReport:
    """What was written.

    Attributes:
        folder: holds ``NAME.{train,valid,test}.inter``, ``NAME.yaml`` and the other atomic files.
        items: items with an interaction.
        cold_items: of them, those without a training interaction.
        rows: interactions by part.
        cold_rows: of them, those with a cold item.
    """

    folder: Path
    items: int
    cold_items: int
    rows: dict[str, int]
    cold_rows: dict[str, int]

    def lines(self) -> list[str]:
        """Format the report as lines."""
        parts = ", ".join(f"{part} {self.rows[part]} ({self.cold_rows[part]} cold)" for part in self.rows)
        return [
            f"{self.cold_items} of {self.items} items have no training interaction",
            f"interactions: {parts}",
            f"written: {self.folder}",
        ]


def split_dataset(
    dataset: str,
    output: str,
    *,
    cold_items: float = 0.15,
    seed: int = 0,
    data_path: str | Path = "dataset",
    item_field: str = "item_id",
    user_field: str = "user_id",
    separator: str = "\t",
) -> SplitReport:
    """Hide a share of the items from training.

    Every interaction with a hidden item goes to validation or test, by a coin for each; each user's other interactions are
    split at random, 8:1:1. A user may be left without training interactions.

    Args:
        dataset: its name; ``ml-100k`` is the one that RecBole ships.
        output: name of the new dataset.
        cold_items: share of the items with an interaction, in (0, 1).
        seed: of the choice and of the split.
        data_path: folder that holds ``dataset/`` and gets ``output/``.
        item_field: column of item ids.
        user_field: column of user ids.
        separator: between columns.

    Raises:
        ValueError: if the dataset is missing, a column is, the share leaves no item on one side, or the output exists.
    """
    if not 0 < cold_items < 1:
        raise ValueError(f"cold_items must be a share in (0, 1), got {cold_items}.")
    source, target = _source(dataset, Path(data_path)), Path(data_path) / output
    if target.exists():
        raise ValueError(f"output: {target} exists. Choose another name, or remove that folder.")
    header, rows = _read(source / f"{dataset}.inter")
    columns = [column.split(":")[0] for column in header.split(separator)]
    missing = [field for field in (user_field, item_field) if field not in columns]
    if missing:
        raise ValueError(f"{source / (dataset + '.inter')} has no column {missing[0]!r}; it has {', '.join(columns)}.")
    u, i = columns.index(user_field), columns.index(item_field)
    pairs = [(cells[u], cells[i]) for cells in (row.split(separator) for row in rows)]

    rng = random.Random(seed)
    items = sorted({item for _, item in pairs})
    cold = set(rng.sample(items, round(cold_items * len(items))))
    if not cold or len(cold) == len(items):
        raise ValueError(
            f"cold_items: {cold_items} of {len(items)} items leaves none on one side. Choose another share."
        )
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    warm_of_user: dict[str, list[int]] = defaultdict(list)
    for number, (user, item) in enumerate(pairs):
        if item in cold:
            parts[rng.choice(("valid", "test"))].append(number)
        else:
            warm_of_user[user].append(number)
    for numbers in warm_of_user.values():
        rng.shuffle(numbers)
        ends = round(SHARES[0] * len(numbers)), round((SHARES[0] + SHARES[1]) * len(numbers))
        parts["train"] += numbers[: max(ends[0], 1)]
        parts["valid"] += numbers[max(ends[0], 1) : ends[1]]
        parts["test"] += numbers[max(ends[1], 1) :]

    Path(data_path).mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as temporary:
        for part, numbers in parts.items():
            text = "\n".join([header, *(rows[n] for n in sorted(numbers))]) + "\n"
            (temporary / f"{output}.{part}.inter").write_text(text, encoding="utf-8", newline="")
        for suffix in ("item", "user"):
            if (source / f"{dataset}.{suffix}").is_file():
                shutil.copyfile(source / f"{dataset}.{suffix}", temporary / f"{output}.{suffix}")
        (temporary / f"{output}.yaml").write_text("benchmark_filename: [train, valid, test]\n", encoding="utf-8")
    counts = {part: len(numbers) for part, numbers in parts.items()}
    cold_counts = {part: sum(pairs[n][1] in cold for n in numbers) for part, numbers in parts.items()}
    return SplitReport(target, len(items), len(cold), counts, cold_counts)


def _source(dataset: str, data_path: Path) -> Path:
    folder = data_path / dataset
    if not (folder / f"{dataset}.inter").is_file() and dataset == "ml-100k":
        from importlib.util import find_spec

        spec = find_spec("recbole")
        shipped = Path(next(iter(spec.submodule_search_locations or []), "")) if spec is not None else Path()
        folder = shipped / "dataset_example" / dataset
    if not (folder / f"{dataset}.inter").is_file():
        raise ValueError(
            f"dataset: no {dataset}.inter in {data_path / dataset}. Name the folder that holds {dataset}/ with --data-path."
        )
    return folder


def _read(path: Path) -> tuple[str, list[str]]:
    lines = read_text(path, "dataset:").split("\n")
    header, *rows = (line.rstrip("\r") for line in lines)
    return header, [row for row in rows if row]
