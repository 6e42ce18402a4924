"""How well content alone ranks items: some of them lose their interactions and are ranked among themselves by it.

What decides is the content: the score that the trained items' vectors come from is a closed form over interactions alone, the same
for every content that is compared.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.cold_start.kernel_ridge import MU, Shares
from recbole_llm.fitting.cold_start.placement import Evidence, Hidden, hidden_trials
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Score

SHARE = 0.2  # of the items that are hidden


class HiddenDraw:
    """One draw of hidden items, with the score of the others.

    Args:
        history: interactions, one row per user.
        n_items: size of the catalogue.
        among: ``[n_items]`` bool, items that may be hidden; those without an interaction never are.
        seed: of the draw.
        dim: rank of the score, or ``full``.
    """

    def __init__(self, history: Rows, n_items: int, among: Tensor, seed: int, dim: int | str = 512) -> None:
        self.history = history
        self.popularity = torch.bincount(history.ids, minlength=n_items)
        self.trained = self.popularity > 0
        known = torch.nonzero(self.trained & among).squeeze(1)
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        self.ids = known[order[: max(int(SHARE * len(known)), 1)]].sort().values
        hidden = torch.zeros_like(self.trained)
        hidden[self.ids] = True
        left, lost = history.keep(~hidden[history.ids]), history.keep(hidden[history.ids])
        if not len(left.ids):
            raise ValueError("No interaction is left beside those of the hidden items: the data set is too small.")
        self.hidden = Hidden(self.ids, left, lost, len(lost.ids))
        with quietly():
            form = fit_closed_form(left, n_items, None, None, dim=dim, setting=Setting(kernels=()))
        self.score = Score((form.block(),), self.trained.clone())

    def values(
        self, content: ContentTables, metric: TopKMetric, mu: float = MU, shares: Shares | None = None
    ) -> Tensor:
        """Compute each user's metric of the hidden items among themselves.

        Args:
            content: of the items; a hidden item without any is ranked as one unlike all others.
            metric: of the ranking.
            mu: ridge of the map.
            shares: of the modalities; ``None`` for equal ones.

        Returns:
            One value for each user who has a hidden item and another one, the same users for any content.
        """
        evidence = Evidence(self.history, self.hidden.targets, metric, content, self.trained, self.popularity)
        trial = hidden_trials(evidence, self.hidden, lambda left: (self.score, left), (mu,), shares)[mu]
        cold = torch.zeros_like(self.trained)
        cold[self.ids] = True
        own = trial.targets.keep(cold[trial.targets.ids])
        return user_metric(trial.scores, own, trial.seen, len(cold), metric, excluded=~cold)


def mean_and_error(values: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over all users of all draws, and its standard error."""
    every = torch.cat(list(values)).double()
    return float(every.mean()), float(every.std() / len(every) ** 0.5) if len(every) > 1 else 0.0
