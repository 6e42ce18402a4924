"""What RecBole's evaluation does in addition, put there when its modules are loaded."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import override


def evaluation(module: ModuleType) -> None:
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


def collector(module: ModuleType) -> None:
    """Collector.data_collect (evaluator/collector.py:79) keeps which items are trained, for the report on cold ones."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def data_collect(self: Any, *args: Any, **kwargs: Any) -> Any:
            from recbole_llm.bridge.evaluation.cold_items import remember_training

            return remember_training(stock)(self, *args, **kwargs)

        return data_collect

    override(module.Collector, "data_collect", make)
