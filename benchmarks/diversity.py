"""What rules cost and bring: NDCG against diversity on a dataset, and the latency of a request with rules.

    python benchmarks/diversity.py --dataset ml-100k
    python benchmarks/diversity.py --only latency

1. Curves. LLMTwoTower is trained with its defaults on RecBole's split and exported. Every user's ten items are asked for with the
   training items as history, by each rule at each strength. NDCG@10 is of the split named, without the items of the splits before
   it. Beside it stand the mean distance of two items of a list by content (1 - cosine of the centred text vectors) and by category
   (1 - Jaccard), the divergence of the list's categories from the history's (Steck 2018, alpha = .01), and the share of the
   catalogue that is in anybody's list. Baselines: the plain list, and the same candidates in a partly random order. Nothing is
   chosen by these figures: every point is written.
2. Latency. The same request with and without rules, each by itself and together (k = 10), in turn, at two sizes of a made
   catalogue: the recommender alone, and over HTTP from one client.

The export and the splits are kept in ``--work``; a later run goes on from there.
"""

import argparse
import http.client
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
from timing import machine

from recbole_llm.export.reader import ItemRecord, load_export
from recbole_llm.retrieval.diversity import ALPHA
from recbole_llm.retrieval.mixes import mix_of
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import NO_RULES, Boost, Diversity, Exploration, Rules

K = 10
CANDIDATES = 50
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES = (0.1, 0.2, 0.3)
SPLITS = ("train", "valid", "test")

Result = dict[str, Any]


# ------------------------------------------------------------------ training


def train(dataset: str, data_path: str | None, folder: Path) -> None:
    """Train with the defaults; write the export, and the items of every user in each split."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    import recbole_llm  # noqa: F401  # before RecBole: its repairs
    from recbole_llm.export.export_model import contents_of
    from recbole_llm.export.writer import write_artifact

    values = {"show_progress": False, "state": "ERROR", "checkpoint_dir": str(folder / "saved")}
    config = Config("LLMTwoTower", dataset, config_dict=values | ({"data_path": data_path} if data_path else {}))
    init_seed(config["seed"], True)
    parts = data_preparation(config, create_dataset(config))
    model = get_model("LLMTwoTower")(config, parts[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(parts[0], parts[1], saved=False, show_progress=False)
    model.eval()
    lists: dict[str, dict[str, list[str]]] = {}
    for name, part in zip(SPLITS, parts, strict=True):
        data = part._dataset
        tokens = [
            data.id2token(field, data.inter_feat[field].numpy()).tolist() for field in (data.uid_field, data.iid_field)
        ]
        of_user: dict[str, list[str]] = {}
        for user, item in zip(*tokens, strict=True):
            of_user.setdefault(user, []).append(item)
        lists[name] = of_user
    (folder / "splits.json").write_text(json.dumps(lists))
    write_artifact(folder / "export", replace(contents_of(model, parts[0]._dataset, map_texts=False), card="\n"))


# ------------------------------------------------------------------ curves


def discounted_gain(ranked: Sequence[str], targets: set[str]) -> float:
    """NDCG@10 of one user."""
    gain = sum(1 / math.log2(at + 2) for at, item in enumerate(ranked) if item in targets)
    return gain / sum(1 / math.log2(at + 2) for at in range(min(len(targets), K)))


class Lists:
    """Asks for every user's list and measures it.

    Args:
        recommender: of the export.
        splits: items of every user by split.
        attribute: the items' categories.
        split: whose items are the targets.
    """

    def __init__(
        self, recommender: Recommender, splits: dict[str, dict[str, list[str]]], attribute: str, split: str
    ) -> None:
        self.recommender, self.attribute = recommender, attribute
        catalog = recommender.catalog
        self.targets = {user: set(items) for user, items in splits[split].items() if user in splits["train"]}
        self.history = splits["train"]
        before = splits["valid"] if split == "test" else {}
        self.exclude = {user: before.get(user, []) for user in self.targets}
        n = len(catalog)
        self.values = [catalog.values(row, attribute) for row in range(n)]
        vectors = catalog.content(np.arange(n)).astype(np.float64)
        self.content_distance = 1 - vectors @ vectors.T
        names = sorted({value for own in self.values for value in own})
        has = np.array([[value in own for value in names] for own in self.values], np.float64)
        common = has @ has.T
        union = has.sum(1)[:, None] + has.sum(1)[None] - common
        self.category_distance = 1 - common / np.maximum(union, 1)

    def ask(self, user: str, rules: Rules, k: int = K) -> list[Any]:
        """A user's list."""
        request = Request(items=self.history[user], exclude=self.exclude[user], k=k, rules=rules)
        return list(self.recommender.recommend(request).items)

    def divergence(self, user: str, rows: list[int]) -> float:
        """KL(p || q~) of categories, p of the history and q of the list."""
        history = [self.recommender.catalog.row_of[item] for item in self.history[user]]
        p = mix_of([self.values[row] for row in history], np.ones(len(history)))
        q: dict[str, float] = {}
        for row in rows:
            for value in self.values[row]:
                q[value] = q.get(value, 0.0) + 1 / len(self.values[row]) / len(rows)
        return sum(share * math.log(share / ((1 - ALPHA) * q.get(v, 0.0) + ALPHA * share)) for v, share in p.items())

    def measure(self, list_of: Callable[[str], list[str]]) -> tuple[Result, np.ndarray]:
        """Means over users, and each user's NDCG."""
        catalog = self.recommender.catalog
        gains, content, category, divergence = [], [], [], []
        shown: set[int] = set()
        above = np.triu_indices(K, 1)
        for user, targets in self.targets.items():
            ranked = list_of(user)
            rows = [catalog.row_of[item] for item in ranked]
            shown.update(rows)
            gains.append(discounted_gain(ranked, targets))
            content.append(self.content_distance[np.ix_(rows, rows)][above].mean())
            category.append(self.category_distance[np.ix_(rows, rows)][above].mean())
            divergence.append(self.divergence(user, rows))
        found = {
            "ndcg@10": round(float(np.mean(gains)), 4),
            "content_distance": round(float(np.mean(content)), 4),
            "category_distance": round(float(np.mean(category)), 4),
            "category_divergence": round(float(np.mean(divergence)), 4),
            "coverage": round(len(shown) / catalog.live_count, 4),
        }
        return found, np.array(gains)

    def by_rules(self, rules: Rules) -> Callable[[str], list[str]]:
        """Lists by rules."""
        return lambda user: [item.id for item in self.ask(user, rules)]

    def partly_random(self, weight: float) -> Callable[[str], list[str]]:
        """Lists of the best candidates in the order of (1 - weight) r_i + weight times a uniform draw."""
        draw = np.random.default_rng(0)

        def ranked(user: str) -> list[str]:
            items = self.ask(user, NO_RULES, CANDIDATES)
            chance = np.array([item.probability for item in items])
            key = (1 - weight) * chance / chance[0] + weight * draw.random(len(items))
            return [items[at].id for at in np.argsort(-key)[:K]]

        return ranked


def curves(lists: Lists) -> list[Result]:
    """Every rule at every strength."""
    settings: list[tuple[str, float, Callable[[str], list[str]]]] = [("plain", 0.0, lists.by_rules(NO_RULES))]
    for weight in LAMBDAS:
        diversity = Diversity(weight, candidates=CANDIDATES)
        settings.append(("marginal relevance", weight, lists.by_rules(Rules(diversity=diversity))))
        calibrated = replace(diversity, attribute=lists.attribute)
        settings.append(("calibration", weight, lists.by_rules(Rules(diversity=calibrated))))
        settings.append(("partly random", weight, lists.partly_random(weight)))
    settings += [("exploration", share, lists.by_rules(Rules(explore=Exploration(share)))) for share in SHARES]
    settings += [(f"cap {n}", float(n), lists.by_rules(Rules(caps={lists.attribute: n}))) for n in (2, 3, 5)]
    found: list[Result] = []
    plain: np.ndarray | None = None
    for rule, strength, list_of in sorted(settings, key=lambda setting: setting[0] != "plain"):
        values, gains = lists.measure(list_of)
        plain = gains if plain is None else plain
        change = gains - plain
        error = float(change.std(ddof=1) / len(change) ** 0.5)
        row = {"rule": rule, "strength": strength, **values}
        row |= {"ndcg_change": round(float(change.mean()), 4), "standard_error": round(error, 4)}
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


# ------------------------------------------------------------------ latency


def made_export(folder: Path, n_items: int, dim: int, content_dim: int) -> Path:
    """A made catalogue with content vectors, a brand of 500 and a price."""
    from recbole_llm.export.manifest import Block
    from recbole_llm.export.writer import ExportContents, write_artifact

    path = folder / f"made-{n_items}-{dim}"
    if path.is_dir():
        return path
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, dim), dtype=np.float32)
    vector = centres[rng.integers(0, 100, n_items)] + 0.5 * rng.standard_normal((n_items, dim), dtype=np.float32)
    content = rng.standard_normal((n_items, content_dim), dtype=np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    brand, price = rng.zipf(1.5, n_items) % 500, rng.gamma(2.0, 20.0, n_items)
    histories = np.stack([np.sort(rng.choice(n_items, 50, replace=False)) for _ in range(1000)])
    write_artifact(
        path,
        ExportContents(
            item_ids=[str(i) for i in range(n_items)],
            user_ids=[str(u) for u in range(1000)],
            records=[
                ItemRecord(f"Item {i}", None, {"brand": f"b{b}", "price": round(float(p), 2)})
                for i, (b, p) in enumerate(zip(brand, price, strict=True))
            ],
            vector=vector / np.float32(dim**0.5),
            source=vector / np.float32(dim**0.5),
            bias=np.zeros(n_items, np.float32),
            trained=np.ones(n_items, bool),
            blocks=(Block("learned", dim, 0.5, 1.0, "dot"),),
            history_offsets=np.arange(1001) * 50,
            history_items=histories.ravel(),
            history_weight=None,
            offset=np.zeros(dim, np.float32),
            attributes={"brand": "token", "price": "number"},
            content={"text": content},
            card="# Made\n",
        ),
    )
    return path


FILTER, CAPS, VARIETY = {"price": {"lt": 60}}, {"brand": 2}, {"weight": 0.3}
BODIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "filter": {"filter": FILTER},
    "cap": {"caps": CAPS},
    "marginal relevance": {"diversity": VARIETY},
    "calibration": {"diversity": VARIETY | {"attribute": "brand"}},
    "boost": {"boosts": [{"filter": {"brand": "b1"}, "add": 0.5}]},
    "boost by odds": {"boosts": [{"filter": {"brand": "b1"}, "odds": 2.0}]},
    "exploration": {"explore": {"share": 0.2}},
    "filter, cap": {"filter": FILTER, "caps": CAPS},
    "filter, cap, marginal relevance": {"filter": FILTER, "caps": CAPS, "diversity": VARIETY},
    "all together": {
        "filter": FILTER,
        "boosts": [{"filter": {"price": {"lt": 20}}, "add": 0.5}],
        "caps": CAPS,
        "diversity": VARIETY,
        "explore": {"share": 0.2},
    },
}


def rules_of(body: dict[str, Any]) -> Rules:
    """The rules of a request's body."""
    return Rules(
        filter=body.get("filter", {}),
        boosts=[Boost(**boost) for boost in body.get("boosts", ())],
        caps=body.get("caps", {}),
        diversity=Diversity(**body["diversity"]) if "diversity" in body else None,
        explore=Exploration(**body["explore"]) if "explore" in body else None,
    )


def in_turn(variants: dict[str, Callable[[int], Any]], rounds: int) -> Result:
    """Milliseconds of each, one call after the other for the same user; the ratio is the median of the ratios of a round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 20):
        names = list(variants) if number % 2 else list(variants)[::-1]
        for name in names:
            began = time.perf_counter()
            variants[name](number % 1000)
            if number >= 20:
                times[name].append(1e3 * (time.perf_counter() - began))
    plain = times["plain"]
    found: Result = {name: round(statistics.median(values), 4) for name, values in times.items()}
    for name in variants:
        if name != "plain":
            ratios = [t / p for t, p in zip(times[name], plain, strict=True)]
            found[f"{name}: times as long"] = round(statistics.median(ratios), 3)
    return found


def of_recommender(path: Path, rounds: int) -> Result:
    """The recommender alone."""
    recommender = Recommender(load_export(path, verify=False), lambda export, catalog: None)
    rules = {name: rules_of(body) for name, body in BODIES.items()}
    return in_turn(
        {n: lambda user, r=r: recommender.recommend(Request(user=str(user), k=K, rules=r)) for n, r in rules.items()},  # type: ignore[misc]
        rounds,
    )


def over_http(path: Path, rounds: int) -> Result:
    """One client of the service, on one connection."""
    from serving_servers import Server

    server = Server("ours", path)
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def ask(body: dict[str, Any]) -> None:
        client.request("POST", "/v1/recommend", json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        content = json.loads(answer.read())
        assert answer.status == 200 and len(content["items"]) == K, content

    try:
        return in_turn(
            {name: lambda user, body=body: ask({"user": str(user), **body}) for name, body in BODIES.items()},  # type: ignore[misc]
            rounds,
        )
    finally:
        client.close()
        server.stop()


def latency(folder: Path, options: argparse.Namespace) -> list[Result]:
    """Both ways at both sizes."""
    found = []
    for n_items in (10_000, 100_000):
        path = made_export(folder, n_items, options.dim, 384)
        rounds = options.rounds if n_items < 100_000 else max(options.rounds // 5, 1)
        row = {"items": n_items, "dim": options.dim, "k": K, "unit": "ms", "rounds": rounds}
        row["recommender"] = of_recommender(path, rounds)
        row["http"] = over_http(path, rounds)
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--attribute", default="class", help="categories of the items (default: class, of ml-100k)")
    parser.add_argument("--only", choices=("train", "curves", "latency"), default=None)
    parser.add_argument("--dim", type=int, default=128, help="of the made catalogue")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--work", default="diversity")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "diversity.json"))
    options = parser.parse_args()
    work, output = Path(options.work), Path(options.output)
    work.mkdir(parents=True, exist_ok=True)
    result: Result = json.loads(output.read_text()) if output.is_file() else {"benchmark": "diversity"}
    if options.only in (None, "train", "curves") and not (work / "export").is_dir():
        train(options.dataset, options.data_path, work)
    if options.only in (None, "curves"):
        splits = json.loads((work / "splits.json").read_text())
        recommender = Recommender(load_export(work / "export"))
        result["dataset"], result["candidates"], result["k"] = options.dataset, CANDIDATES, K
        for split in ("valid", "test"):
            print(split, flush=True)
            result[split] = curves(Lists(recommender, splits, options.attribute, split))
    if options.only in (None, "latency"):
        result["latency"] = latency(work, options)
    result["machine"] = machine("cpu")
    if options.only != "train":
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
