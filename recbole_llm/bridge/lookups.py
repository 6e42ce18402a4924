"""The places where RecBole looks a model up by its name, each made to find registered models.

A hook changes one module of RecBole right after it was loaded.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_llm.bridge.register import (
    MODEL_PACKAGE,
    Registration,
    Target,
    put_entry_points,
    registered,
    registered_models,
    resolve,
    take_over,
)
from recbole_llm.bridge.repairs.registry import override


def _serve(module: ModuleType, suffix: str, target_of: Callable[[Registration], Target | None]) -> None:
    """Make ``module.<name><suffix>`` available for every registered model that brings one."""
    stock = vars(module).get("__getattr__")
    if getattr(stock, "__module__", None) == __name__:
        return

    def __getattr__(attribute: str) -> Any:  # noqa: N807
        found = registered(attribute.removesuffix(suffix)) if attribute.endswith(suffix) else None
        target = None if found is None else target_of(found)
        if target is not None:
            return resolve(target)
        if stock is not None:
            return stock(attribute)
        raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")

    module.__dict__["__getattr__"] = __getattr__


def _trainers(module: ModuleType) -> None:
    """get_trainer (utils/utils.py:88) asks ``recbole.trainer`` for <name>Trainer."""
    _serve(module, "Trainer", lambda registration: registration.trainer)


def _datasets(module: ModuleType) -> None:
    """create_dataset (data/utils.py:41) asks ``recbole.data.dataset`` for <name>Dataset."""
    _serve(module, "Dataset", lambda registration: registration.dataset)


def _models(module: ModuleType) -> None:
    """``from recbole.model.general_recommender import <name>``, as for stock models."""
    _serve(module, "", lambda registration: registration.model)


def _defaults(module: ModuleType) -> None:
    """Config (configurator.py:238) reads overall.yaml, then the model's YAML, then the dataset's: ours comes second."""

    def make(stock: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def _update_internal_config_dict(self: Any, file: str) -> Any:
            result = stock(self, file)
            registration = registered(self.model)
            if registration is not None and registration.yaml is not None and Path(file).name == "overall.yaml":
                own = stock(self, str(registration.yaml)) or {}
                _reject_overwritten(registration, own, Path(file).parent / "dataset" / "sample.yaml", self.yaml_loader)
            return result

        return _update_internal_config_dict

    override(module.Config, "_update_internal_config_dict", make)


def _classes(module: ModuleType) -> None:
    """Config (configurator.py:202) takes a class, and run_recbole (quick_start.py:137) looks it up by its name."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _get_model_and_dataset(self: Any, model: Any, dataset: Any) -> Any:
            found = stock(self, model, dataset)
            name, kind, _ = found
            if not kind.__module__.startswith("recbole."):
                take_over(name, kind)
            return found

        return _get_model_and_dataset

    override(module.Config, "_get_model_and_dataset", make)


def _configuration(module: ModuleType) -> None:
    _defaults(module)
    _classes(module)


def _reject_overwritten(registration: Registration, own: dict[str, Any], sample: Path, loader: Any) -> None:
    import yaml

    lost = sorted(set(own) & set(yaml.load(sample.read_text(encoding="utf-8"), Loader=loader)))
    if lost:
        raise ValueError(
            f"{registration.yaml} sets {', '.join(lost)}, which RecBole's properties/dataset/sample.yaml overwrites. "
            "Set it in a configuration file, or let the model's dataset class see to it."
        )


def _dataset_keys(module: ModuleType) -> None:
    """A saved dataset is used again if no key of this list changed (data/utils.py:63): ours belong to it."""
    from recbole_llm.bridge.options import DATASET_KEYS

    module.dataset_arguments.extend(key for key in DATASET_KEYS if key not in module.dataset_arguments)


def _dataloaders(module: ModuleType) -> None:
    """get_dataloader (data/utils.py:241) has a table inside the function; a registered model's choice comes first."""

    def make(stock: Callable[[Any, str], type]) -> Callable[[Any, str], type]:
        def get_dataloader(config: Any, phase: str) -> type:
            registration = registered(config["model"])
            if phase == "train" and registration is not None and registration.train_dataloader is not None:
                choose = registration.train_dataloader
                if isinstance(choose, str):
                    choose = resolve(choose)
                own = choose(config)
                if own is not None:
                    return own
            return stock(config, phase)

        return get_dataloader

    override(module, "get_dataloader", make)


def _flops(module: ModuleType) -> None:
    """get_flops (utils/utils.py:250) deep-copies the model, feature tables included."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def get_flops(model: Any, *args: Any, **kwargs: Any) -> Any:
            known = (registered(kind.__name__) for kind in type(model).__mro__ if kind.__name__ in registered_models())
            registration = next(known, None)
            if registration is not None and registration.count_flops is False:
                return float("nan")
            return stock(model, *args, **kwargs)

        return get_flops

    override(module, "get_flops", make)


def _evaluation(module: ModuleType) -> None:
    """Trainer.evaluate (trainer/trainer.py:559) streams where the configuration key ``eval_backend`` says so.

    The log tells warm, cold and joint figures where a test split holds items without a training interaction.
    """

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
            from recbole_llm.bridge.evaluation import cold_items, streaming  # here: they load the kernels

            result = streaming.streaming(stock)(self, *args, **kwargs)
            eval_data = args[0] if args else kwargs.get("eval_data")
            if eval_data:
                cold_items.report(self, eval_data)
            return result

        return evaluate

    override(module.Trainer, "evaluate", make)


def _collector(module: ModuleType) -> None:
    """Collector.data_collect (evaluator/collector.py:79) keeps which items are trained, for the report on cold ones."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def data_collect(self: Any, *args: Any, **kwargs: Any) -> Any:
            from recbole_llm.bridge.evaluation.cold_items import remember_training

            return remember_training(stock)(self, *args, **kwargs)

        return data_collect

    override(module.Collector, "data_collect", make)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "recbole.trainer": _trainers,
    "recbole.trainer.trainer": _evaluation,
    "recbole.evaluator.collector": _collector,
    "recbole.data.dataset": _datasets,
    MODEL_PACKAGE: _models,
    "recbole.config.configurator": _configuration,
    "recbole.utils.argument_list": _dataset_keys,
    "recbole.data.utils": _dataloaders,
    "recbole.utils.utils": _flops,
    "recbole.quick_start.quick_start": put_entry_points,
}
