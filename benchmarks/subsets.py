"""LLMTwoTower's defaults against tuned EASE on datasets of other shapes, cut from those at hand.

    python benchmarks/subsets.py --data_path FOLDER

Nothing of the model was tuned on these: few users, no best-sellers, few clicks each, tags as the only text, cut-off titles,
a season, a small dense catalogue. EASE is tuned by validation NDCG@10 over every ridge of configs/stock/EASE.hyper, LLMTwoTower
is not; both meet the test split once. ``--work`` keeps the datasets and the trainings, so that a stopped run goes on.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import pandas as pd
from model_quality import COMMON, OURS, Pieces, say, tune
from timing import machine

from recbole_llm.bridge.experiments.comparison import as_json, compare

Tables = tuple[pd.DataFrame, pd.DataFrame]
Cut = Callable[[pd.DataFrame, pd.DataFrame], Tables]


def some_users(number: int) -> Cut:
    """All of some users."""

    def cut(inter: pd.DataFrame, item: pd.DataFrame) -> Tables:
        users = pd.Series(inter["user_id:token"].unique()).sample(number, random_state=0)
        return inter[inter["user_id:token"].isin(users)], item

    return cut


def without_best_sellers(number: int) -> Cut:
    """The rest of the catalogue, users with at least five clicks there."""

    def cut(inter: pd.DataFrame, item: pd.DataFrame) -> Tables:
        best = inter["item_id:token"].value_counts().index[:number]
        return at_least(inter[~inter["item_id:token"].isin(best)], 5), item

    return cut


def few_clicks(number: int) -> Cut:
    """At most so many clicks of each user, drawn at random."""

    def cut(inter: pd.DataFrame, item: pd.DataFrame) -> Tables:
        return inter.sample(frac=1.0, random_state=0).groupby("user_id:token").head(number), item

    return cut


def only_fields(*names: str) -> Cut:
    """The named columns as the only text."""

    def cut(inter: pd.DataFrame, item: pd.DataFrame) -> Tables:
        return inter, item[["item_id:token", *names]]

    return cut


def words(number: int) -> Cut:
    """Titles cut off, no other text."""

    def cut(inter: pd.DataFrame, item: pd.DataFrame) -> Tables:
        title = next(name for name in item if "title" in name)
        short = item[title].str.split(" ").str[:number].str.join(" ")
        return inter, item[["item_id:token"]].assign(**{"title:token_seq": short})

    return cut


def last_part(share: float) -> Cut:
    """The latest interactions, users with at least five of them."""

    def cut(inter: pd.DataFrame, item: pd.DataFrame) -> Tables:
        time = inter["timestamp:float"].astype(float)
        return at_least(inter[time >= time.quantile(1 - share)], 5), item

    return cut


def at_least(inter: pd.DataFrame, clicks: int) -> pd.DataFrame:
    """Users with so many interactions."""
    return inter[inter.groupby("user_id:token")["item_id:token"].transform("size") >= clicks]


CUTS: dict[str, tuple[str, Cut]] = {
    "600-users": ("ml-1m-text", some_users(600)),
    "no-best-sellers": ("ml-1m-text", without_best_sellers(700)),
    "five-clicks": ("ml-1m-text", few_clicks(5)),
    "office-last-half": ("amazon-office", last_part(0.5)),
    "genres-only": ("ml-1m-text", only_fields("genres:token_seq")),
    "office-three-clicks": ("amazon-office", few_clicks(3)),
    "office-two-words": ("amazon-office", words(2)),
    "office-no-best-sellers": ("amazon-office", without_best_sellers(300)),
}


def write(name: str, data_path: Path, folder: Path) -> None:
    """Atomic files of one subset, if they are not there."""
    source, cut = CUTS[name]
    target = folder / name
    if (target / f"{name}.inter").is_file():
        return
    tables = [
        pd.read_csv(data_path / source / f"{source}.{kind}", sep="\t", dtype=str, quoting=3, keep_default_na=False)
        for kind in ("inter", "item")
    ]
    inter, item = cut(*tables)
    target.mkdir(parents=True, exist_ok=True)
    for kind, table in (("item", item), ("inter", inter)):
        lines = ["\t".join(table.columns), *("\t".join(row) for row in table.itertuples(index=False))]
        (target / f"{name}.{kind}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder of ml-1m-text and amazon-office")
    parser.add_argument("--only", default="", help="subsets whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("subsets"), help="datasets and trainings")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "subsets.json")
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"subsets": {}}
    search = argparse.Namespace(dataset="", budget=100, model_minutes=float("inf"))
    for name in CUTS:
        if arguments.only not in name:
            continue
        write(name, arguments.data_path, arguments.work / "data")
        pieces = Pieces(arguments.work / "trainings" / name, None)
        common = [*COMMON, f"--data_path={arguments.work / 'data'}", "--seed=2020"]
        search.dataset = name
        setting, report = tune("EASE", search, common, pieces)
        result = compare(
            [OURS, "EASE"],
            name,
            metric="ndcg@10",
            reference=OURS,
            overrides=common,
            settings={"EASE": setting},
            run=pieces,
            progress=say,
        )
        found["subsets"][name] = {"cut_from": CUTS[name][0], "ease": setting, "tuning": report, **as_json(result)}
        found |= {"benchmark": "subsets", "machine": machine("cpu")}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
