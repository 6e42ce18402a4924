"""A model of your own from LLMTwoTower: python examples/subclass.py [--epochs=5]."""

import recbole_llm  # before RecBole, which it repairs
import torch
from recbole.quick_start import run_recbole


class HuberTower(recbole_llm.LLMTwoTower):
    """LLMTwoTower whose item biases stay small."""

    def calculate_loss(self, interaction):
        """Add a Huber penalty on the biases to the loss."""
        small = torch.zeros_like(self.item_bias)
        return super().calculate_loss(interaction) + torch.nn.functional.huber_loss(self.item_bias, small)


if __name__ == "__main__":
    run_recbole(model=HuberTower, dataset="ml-100k")
