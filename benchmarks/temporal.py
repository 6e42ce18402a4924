"""Next-item quality where interactions are split by time: LLMTwoTower against EASE and RecBole's sequential models.

    python benchmarks/temporal.py --dataset ml-100k
    python benchmarks/temporal.py --dataset amazon-office --data_path FOLDER --models LLMTwoTower,EASE,SASRec --minutes 7

Leave-one-out by time (RecBole: order TO, split LS valid_and_test): each user's last item is the test, the one before it the
validation. A sequential model of RecBole is given every item before the one to predict, so LLMTwoTower's and EASE's histories
at test hold the validation item too; EASE's figure without it stands beside. RecBole does not mask a sequential model's history
in its ranking, which costs it 9 to 45% of its NDCG; here every model is ranked without history items, in the validation that
chooses epoch and setting and in the test alike, and RecBole's own figure stands beside.

Every model is tuned by validation NDCG@10 over at most ``--budget`` settings; a setting trains until its validation has not
risen for ``stopping_step`` epochs or for ``--seconds`` of training, whichever is first; which of the two it was is recorded.
A run that was stopped goes on with the trials in ``--work``; ``--minutes`` begins no further trial after so long: the result is
then of the trials that are there, tells how many are not, and the exit code is 3.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import Rows, pool, rows_from_pairs

OURS = "LLMTwoTower"
SEQUENCE = {"train_batch_size": [1024], "learning_rate": [0.002]}
GRIDS: dict[str, dict[str, list[Any]]] = {
    OURS: {},
    "EASE": {"reg_weight": [100, 50, 250, 20, 500, 1000]},
    "SASRec": SEQUENCE | {"hidden_dropout_prob": [0.2, 0.5], "attn_dropout_prob": [0.2]},
    "GRU4Rec": SEQUENCE | {"dropout_prob": [0.3, 0.5]},
    "BERT4Rec": SEQUENCE | {"hidden_dropout_prob": [0.2, 0.5]},
}
SPLIT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
METRICS = (TopKMetric("ndcg", 10), TopKMetric("recall", 10))


class TimeOverError(Exception):
    """A setting's seconds are over; its best epoch is kept."""


def train(model_name: str, arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Train one setting and give its figures and each test user's NDCG@10."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_logger, init_seed

    common: dict[str, Any] = {
        "eval_args": SPLIT,
        "topk": [10],
        "metrics": ["NDCG", "Recall"],
        "valid_metric": "NDCG@10",
        "eval_batch_size": 4_000_000,
        "show_progress": False,
        "state": "WARNING",
        "checkpoint_dir": str(Path(arguments.work) / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    if arguments.data_path:
        common["data_path"] = arguments.data_path
    if "MAX_ITEM_LIST_LENGTH" in setting:
        common |= {"train_neg_sample_args": None, "stopping_step": arguments.stopping_step, "epochs": 200}
    config = Config(model=model_name, dataset=arguments.dataset, config_dict=common | setting)
    init_seed(config["seed"], True)
    init_logger(config)
    train_data, valid, test = data_preparation(config, create_dataset(config))
    model = get_model(model_name)(config, train_data._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    started, epochs, stopped = time.perf_counter(), 0, "validation"

    def watch(epoch: int, score: float) -> None:
        nonlocal epochs
        epochs = epoch + 1
        print(f"{model_name} epoch {epoch}: valid {score:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
        if time.perf_counter() - started > arguments.seconds:
            raise TimeOverError

    sequential = "MAX_ITEM_LIST_LENGTH" in setting
    if sequential:
        hide_histories(model, histories(train_data))
    try:
        trainer.fit(train_data, valid, saved=True, show_progress=False, callback_fn=watch)
    except TimeOverError:
        stopped = "time"
    seconds = time.perf_counter() - started
    if sequential:
        del model.full_sort_predict  # the class's own again
    stock = trainer.evaluate(test, load_best_model=True, show_progress=False)
    where = machine("cpu")
    report = {
        "model": model_name,
        "setting": setting,
        "valid": float(trainer.best_valid_score if model_name != OURS else trainer.best_valid_result["ndcg@10"]),
        "seconds": round(seconds, 1),
        "epochs": epochs,
        "stopped_by": stopped,
        "stopping_step": trainer.stopping_step,
        "cpu": where["cpu"],
        "commit": where["commit"],
        "recbole_table": {name: float(value) for name, value in stock.items()},
    }
    return report | masked_figures(trainer, model_name, train_data, valid, test)


def histories(*loaders: Any) -> Rows:
    """The items of each user in the given loaders, a row per user id."""
    dataset = loaders[0]._dataset
    users, items = [], []
    for inter in (loader._dataset.inter_feat for loader in loaders):
        users.append(inter[dataset.uid_field].long())
        items.append(inter[dataset.iid_field].long())
        listed = f"{dataset.iid_field}_list"
        if listed in inter:  # a sequential model's: the prefixes hold what no row has as its target
            prefix = inter[listed].long()
            users.append(users[-1][:, None].expand_as(prefix)[prefix > 0])
            items.append(prefix[prefix > 0])
    return rows_from_pairs(torch.cat(users), torch.cat(items), dataset.user_num)


def hide_histories(model: Any, seen: Rows) -> None:
    """Let a sequential model's rankings leave out each user's ``seen`` items, as RecBole's of other models do."""
    predict = type(model).full_sort_predict

    def hidden(interaction: Any) -> torch.Tensor:
        scores = predict(model, interaction).view(-1, model.n_items)
        target = interaction[model.ITEM_ID].long()[:, None]
        own, kept = seen.select(interaction[model.USER_ID].long()), scores.gather(1, target)
        scores[own.row_of_entry(), own.ids] = -torch.inf
        return scores.scatter_(1, target, kept)

    model.full_sort_predict = hidden


@torch.no_grad()
def masked_figures(trainer: Any, name: str, train_data: Any, valid: Any, test: Any) -> dict[str, Any]:
    """Figures of rankings without history items, from scores of the test rows."""
    from recbole_llm.bridge.evaluation.streaming import ranked_rows

    model, rows, n_items = trainer.model.eval(), ranked_rows(test), test._dataset.item_num
    order = torch.argsort(rows.users, stable=True)
    history = histories(train_data, valid).select(rows.users[order])
    targets = rows.positives.select(order)
    padding = torch.zeros(n_items, dtype=torch.bool)
    padding[0] = True

    def scores(index: torch.Tensor) -> torch.Tensor:
        return model.full_sort_predict(rows.batch(order[index])).view(-1, n_items).clone()

    def ease_with_validation(index: torch.Tensor) -> torch.Tensor:
        own = history.select(index)
        similarity = torch.as_tensor(model.item_similarity, dtype=torch.float32)
        return pool(similarity, own, torch.ones(len(own.ids)))

    def figures(scorer: Any, seen: Rows) -> dict[str, Any]:
        found = {str(m).lower(): user_metric(scorer, targets, seen, n_items, m, padding) for m in METRICS}
        return {key: float(value.mean()) for key, value in found.items()} | {"users": found["ndcg@10"].tolist()}

    if name == OURS:
        model.at_test = True
    result = {"masked": figures(scores, history)}
    if name == OURS:
        model.at_test = False
        result["training_history_only"] = figures(scores, history)
        names = "closed_form", "next_item", "learned"
        closed, following, learned = (model.score.block(block) for block in names)
        result["choices"] = {
            "closed_decay": closed.decay,
            "next_item_decay": None if following is None else following.decay,
            "block_scales": [0.0 if block is None else block.scale for block in (closed, learned)],
        }
    if name == "EASE":
        result["training_history_only"] = result["masked"]
        result["masked"] = figures(ease_with_validation, history)
    return result


def settings_of(model: str, lengths: list[int]) -> list[dict[str, Any]]:
    """The model's grid; of a sequential one the length of its histories varies fastest, so that few trials see each."""
    values = dict(GRIDS[model])
    if "train_batch_size" in values:
        values["MAX_ITEM_LIST_LENGTH"] = lengths
    return [dict(zip(values, setting, strict=True)) for setting in itertools.product(*values.values())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--models", "-m", default=",".join(GRIDS))
    parser.add_argument("--budget", type=int, default=6, help="settings tried per model")
    parser.add_argument("--lengths", default="20,50", help="MAX_ITEM_LIST_LENGTH of the sequential models' settings")
    parser.add_argument("--stopping_step", type=int, default=10, help="of sequential models; RecBole's default")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of training per setting")
    parser.add_argument("--minutes", type=float, default=None, help="begin no further trial after so long")
    parser.add_argument("--work", default="temporal", help="trials, so that a stopped run goes on")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/temporal-<dataset>.json")
    arguments = parser.parse_args()
    began, work = time.monotonic(), Path(arguments.work) / arguments.dataset
    work.mkdir(parents=True, exist_ok=True)
    best: dict[str, dict[str, Any]] = {}
    trials: dict[str, list[dict[str, Any]]] = {}
    not_tried: dict[str, int] = {}  # settings, for lack of time
    for name in arguments.models.split(","):
        for setting in settings_of(name, [int(length) for length in arguments.lengths.split(",")])[: arguments.budget]:
            limits = f"{arguments.seconds:g}-{arguments.stopping_step}"
            file = work / f"{name}-{'-'.join(map(str, setting.values()))}-{limits}.json"
            if not file.is_file():
                if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
                    not_tried[name] = not_tried.get(name, 0) + 1
                    continue
                file.write_text(json.dumps(train(name, arguments, setting)), encoding="utf-8")
            trial = json.loads(file.read_text(encoding="utf-8"))
            print(
                name, setting, f"valid {trial['valid']:.4f}, {trial['epochs']} epochs, {trial['seconds']} s", flush=True
            )
            trials.setdefault(name, []).append({k: v for k, v in trial.items() if k not in ("masked", "recbole_table")})
            if name not in best or trial["valid"] > best[name]["valid"]:
                best[name] = trial
    ours = best.get(OURS)
    models = {}
    for name, trial in best.items():
        users = trial["masked"].pop("users")
        if ours is not None and name != OURS:
            first = torch.tensor(ours["masked"]["users"]).numpy()
            trial["difference_of_ours"] = vars(paired_bootstrap(first, torch.tensor(users).numpy()))
        elif name == OURS:
            trial["masked"]["users"] = users
        models[name] = trial
    for name, trial in models.items():
        for figures in (trial["masked"], trial.get("training_history_only", {})):
            figures.pop("users", None)
        d = trial.get("difference_of_ours")
        told = "" if d is None else f"; ours {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
        print(
            f"{name}: test NDCG@10 {trial['masked']['ndcg@10']:.4f}, Recall@10 {trial['masked']['recall@10']:.4f}{told}"
        )
    result = {
        "benchmark": "temporal",
        "dataset": arguments.dataset,
        "protocol": "order TO, leave one out; for every model a test history is the training and validation items, without a place",
        "seconds_per_setting": arguments.seconds,
        "models": models,
        "settings_not_tried": not_tried,
        "trials": {
            name: [{k: v for k, v in trial.items() if k != "training_history_only"} for trial in found]
            for name, found in trials.items()
        },
        "machine": machine("cpu"),
    }
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"temporal-{arguments.dataset}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    if not_tried:
        print(f"out of time, settings not tried: {not_tried}; run the same command again to go on")
    return 3 if not_tried else 0


if __name__ == "__main__":
    sys.exit(main())
