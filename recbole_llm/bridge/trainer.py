"""The trainer of LLMTwoTower."""

from recbole.trainer import Trainer


class LLMTwoTowerTrainer(Trainer):
    """RecBole's trainer under the name that RecBole looks up for our model."""
