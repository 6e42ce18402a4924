"""What a run is asked to measure and to learn, checked before a file of the dataset is read."""

import difflib
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from logging import getLogger
from typing import Any

from recbole_llm.bridge.register import is_ours

_MODE = re.compile(r"full|labeled|(uni|pop)[1-9][0-9]*")
# RecBole's names of losses that LLMTwoTower has under another name
LOSSES_OF_RECBOLE = {"CE": "catalog_ce", "BCE": "pair_bce"}
PARTS = ("train", "valid", "test")


def settle_evaluation(values: MutableMapping[str, Any], given: Collection[str]) -> None:
    """Check ``metrics``, ``topk``, ``valid_metric`` and ``eval_args.mode``, and let a default ``valid_metric`` follow the others.

    Args:
        values: the configuration in the making; ``metrics`` and ``topk`` become lists.
        given: the keys that the user has set.

    Raises:
        ValueError: on a value that RecBole cannot use, or on values that do not go together.
    """
    metrics, topk = _metrics(values["metrics"]), _topk(values["topk"])
    _check_modes(metrics, values["eval_args"])
    valid_metric = values["valid_metric"]
    if "valid_metric" not in given:
        valid_metric = _following(valid_metric, metrics, topk)
    _check_valid_metric(valid_metric, metrics, topk)
    values.update(metrics=metrics, topk=topk, valid_metric=valid_metric)


def tell_of_settings(config: Any) -> None:
    """Say in the log which values are not as they were given, or as the defaults are."""
    stock = config.internal_config_dict.get("valid_metric")
    if "valid_metric" not in config.external_config_dict and stock != config["valid_metric"]:
        getLogger().info(
            "valid_metric is %s: metrics and topk do not hold its default, %s.", config["valid_metric"], stock
        )
    loss = config.external_config_dict.get("loss_type")
    if is_ours(config["model"]) and loss is not None and loss != config["loss_type"]:
        getLogger().info("loss_type: %s is RecBole's name of LLMTwoTower's %s.", loss, config["loss_type"])


def settle_loss(values: MutableMapping[str, Any]) -> None:
    """Give a loss under RecBole's name the name that LLMTwoTower has for it, and check what losses with negatives need.

    Raises:
        ValueError: on ``BPR``, which LLMTwoTower does not have, and where a loss with negatives has none.
    """
    loss = values.get("loss_type")
    name = loss.upper() if isinstance(loss, str) else ""
    if name == "BPR":
        raise ValueError(
            f"loss_type is {loss!r}, and LLMTwoTower has no loss of pairs of items. Give sampled_bce (each positive against "
            "the negatives of train_neg_sample_args), or leave loss_type out for catalog_bce (against every item)."
        )
    if name in LOSSES_OF_RECBOLE:
        values["loss_type"] = LOSSES_OF_RECBOLE[name]
    if values.get("loss_type") in ("sampled_bce", "pair_bce"):
        _check_negatives(values["loss_type"], values.get("train_neg_sample_args"))


def _check_negatives(loss: str, args: Any) -> None:
    found = args if isinstance(args, Mapping) else {}
    number = found.get("sample_num", 1)
    if str(found.get("distribution")) == "None" or not _is_count(number):
        raise ValueError(
            f"loss_type {loss} needs negatives, and train_neg_sample_args is {args!r}. Give "
            "{distribution: uniform, sample_num: 1}, or loss_type catalog_bce or catalog_ce, which need none."
        )


def require_three_parts(parts: Any) -> None:
    """Raise where ``benchmark_filename`` does not name a training, a validation and a test part.

    Raises:
        ValueError: says what three parts are.
    """
    if not parts:
        return
    shown = repr(list(parts)) if isinstance(parts, (list, tuple)) else repr(parts)
    if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts) and len(parts) == len(PARTS):
        return
    raise ValueError(
        f"benchmark_filename is {shown}; expected the names of three files, in the order {', '.join(PARTS)}: the second "
        "chooses the epoch and the settings, and the third measures. With two files, cut a validation part from the first "
        "and name it second, or put both into one .inter file, leave benchmark_filename out, and let eval_args.split divide it."
    )


# ---------------------------------------------------------------- metrics


def _metrics(value: Any) -> list[str]:
    from recbole.evaluator.register import metric_types

    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"metrics must be a list of names such as ['Recall', 'NDCG'], got {value!r}.")
    for name in names:
        if name.lower() not in metric_types:
            near = difflib.get_close_matches(name.lower(), metric_types, n=1, cutoff=0.5)
            hint = f" Is {_proper(near[0])} meant?" if near else ""
            hint = " Write several as a list: ['Recall', 'NDCG']." if "," in name or " " in name.strip() else hint
            raise ValueError(f"metrics: {name!r} is none of {', '.join(map(_proper, sorted(metric_types)))}.{hint}")
    by_value = [name for name in names if _is_of_values(name)]
    if by_value and len(by_value) < len(names):
        ranking = [name for name in names if name not in by_value]
        raise ValueError(
            f"metrics: {', '.join(ranking)} rank items, and {', '.join(by_value)} compare scores with labels; one run "
            "measures one kind. Leave out the others."
        )
    return list(names)


def _topk(value: Any) -> list[int]:
    numbers = [value] if _is_count(value) else value
    if not isinstance(numbers, (list, tuple)) or not numbers or not all(map(_is_count, numbers)):
        raise ValueError(f"topk must be a number of items, or a list such as [5, 10], each at least 1, got {value!r}.")
    return list(numbers)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _proper(name: str) -> str:
    """The name of a metric as RecBole's class is called."""
    from recbole.evaluator.register import metrics_dict

    return getattr(metrics_dict.get(name.lower()), "__name__", name)


def _is_of_values(name: str) -> bool:
    from recbole.evaluator.register import metric_types
    from recbole.utils import EvaluatorType

    return metric_types[name.lower()] == EvaluatorType.VALUE


def _needs(name: str) -> Sequence[str]:
    """What a metric reads; ``rec.topk`` are hits and ``rec.items`` lists, and both have a result for every K."""
    from recbole.evaluator.register import metric_information

    return metric_information.get(name.lower()) or ()


def _results(metric: str, topk: Sequence[int]) -> list[str]:
    """What a metric's results are called, in the order of ``topk``."""
    per_list = {"rec.topk", "rec.items"} & set(_needs(metric))
    return [f"{metric}@{k}" for k in topk] if per_list else [metric]


def _following(default: str, metrics: Sequence[str], topk: Sequence[int]) -> str:
    """The result that takes the default's place: the same metric where it is measured, at the same K, else the first."""
    name, _, k = default.partition("@")
    # what a list holds, such as its coverage, says nothing about how good it is
    judging = [metric for metric in metrics if "rec.items" not in _needs(metric)]
    chosen = next((metric for metric in judging if metric.lower() == name.lower()), next(iter(judging), None))
    if chosen is None:
        raise ValueError(
            f"valid_metric is not given, and its default, {default}, is not among metrics: {', '.join(metrics)}. None of "
            f"these says how good a ranking is. Add NDCG to metrics, or give valid_metric: {_results(metrics[0], topk)[0]}."
        )
    results = _results(chosen, topk)
    return next((result for result in results if result.partition("@")[2] == k), results[0])


def _check_valid_metric(value: Any, metrics: Sequence[str], topk: Sequence[int]) -> None:
    known = [result for metric in metrics for result in _results(metric, topk)]
    if isinstance(value, str) and value.lower() in map(str.lower, known):
        return
    name = str(value).partition("@")[0].lower()
    near = next((result for result in known if result.partition("@")[0].lower() == name), None)
    hint = f"Is {near} meant?" if near else "Give one of these, or add it to metrics and topk."
    raise ValueError(f"valid_metric is {value!r}, and metrics and topk give {', '.join(known)}. {hint}")


def _check_modes(metrics: Sequence[str], eval_args: Any) -> None:
    mode = eval_args.get("mode", "full") if isinstance(eval_args, Mapping) else "full"
    for one in mode.values() if isinstance(mode, Mapping) else [mode]:
        if not isinstance(one, str) or not _MODE.fullmatch(one):
            raise ValueError(f"eval_args.mode must be full, labeled, or such as uni100 or pop100, got {one!r}.")
        if one == "labeled" and not _is_of_values(metrics[0]):
            raise ValueError(
                f"eval_args.mode is labeled, which compares each row's score with its label, and metrics ({', '.join(metrics)}) "
                "rank items. Give metrics: [AUC, LogLoss], or mode: full or uni100."
            )
        if one == "full" and _is_of_values(metrics[0]):
            raise ValueError(
                f"eval_args.mode is full, which ranks all items, and metrics ({', '.join(metrics)}) compare scores with labels. "
                "Give mode: labeled, or uni100, or metrics that rank, such as NDCG."
            )
