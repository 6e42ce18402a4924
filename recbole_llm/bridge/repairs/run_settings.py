"""Repairs of how RecBole takes the settings of a run: what does not fit is said before anything is read."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import always, override, repair


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:388-432 (a valid_metric that metrics and topk do not give ends in KeyError after an"
    " epoch, labeled mode with ranking metrics in TypeError, an unknown metric in NotImplementedError)",
    issues="none found",
    until="RecBole checks valid_metric against metrics and topk, and metrics against eval_args.mode",
    condition=always("a typing error in metrics, topk or valid_metric costs an epoch and ends in a traceback"),
)
def _evaluation_settings(module: ModuleType) -> None:
    """Metrics, topk, valid_metric and mode are checked; a valid_metric that nobody has set follows the others.

    All keys of LLMTwoTower are checked at the same time, and RecBole's names of its losses are taken.
    """

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _set_default_parameters(self: Any) -> None:
            from recbole_llm.bridge.options import Options
            from recbole_llm.bridge.register import is_ours
            from recbole_llm.bridge.run_settings import settle_evaluation, settle_loss

            ours = is_ours(self.model)
            if ours:
                settle_loss(self.final_config_dict)
            settle_evaluation(self.final_config_dict, self.external_config_dict)
            stock(self)
            if ours:
                Options.from_config(self)

        return _set_default_parameters

    override(module.Config, "_set_default_parameters", make)


@repair(
    "recbole.data.utils",
    upstream="data/utils.py:168 (two parts in benchmark_filename: not enough values to unpack)",
    issues="none found",
    until="RecBole says that it needs three parts",
    condition=always("two benchmark parts end in a message about values to unpack"),
)
def _benchmark_parts(module: ModuleType) -> None:
    """Other than three parts in benchmark_filename are an error that says what three parts are."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def data_preparation(config: Any, dataset: Any) -> Any:
            from recbole_llm.bridge.run_settings import require_three_parts

            require_three_parts(config["benchmark_filename"])
            return stock(config, dataset)

        return data_preparation

    override(module, "data_preparation", make)


@repair(
    "recbole.utils.logger",
    upstream="config/configurator.py:326-330 (every key is taken, whether or not something reads it)",
    issues="none found",
    until="RecBole names the keys that nothing reads",
    condition=always("--epoch=2 trains 300 epochs, and n_layers changes a model that has no layers by nothing"),
)
def _unread_keys(module: ModuleType) -> None:
    """A run's log begins with one warning that names the given keys which its model does not read."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def init_logger(config: Any) -> None:
            from recbole_llm.bridge.model_keys import warn_of_unread_keys
            from recbole_llm.bridge.run_settings import tell_of_settings

            stock(config)
            tell_of_settings(config)
            warn_of_unread_keys(config)

        return init_logger

    override(module, "init_logger", make)
