"""A solved closed form as a value, whichever way it was found."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.factors import FactorForm
from recbole_llm.fitting.hyperparameters import TriedSetting
from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.rows import Rows


@dataclass(frozen=True)
class ClosedForm:
    """Source and target vectors: score(u, i) = <sum_j a_uj source_j, target_i>, and what direct rows add.

    Attributes:
        source: ``[n_items, d]`` float32; zero for items without a training interaction.
        target: ``[n_items, d]`` float32, zero likewise; ``None`` for the full form, whose targets are the identity
            (d = n_items), so that the pooled source vectors are the scores.
        warm: ``[n_items]`` bool, items with a training interaction.
        setting: the constants chosen.
        form: how the vectors were found, in words.
        value: validation value of these vectors; ``None`` without validation data.
        trials: every setting tried.
        factors: which factors they are; ``None`` where they are none.
        direct: what items add to each other beside the vectors, n_items rows; ``None`` for nothing.
        constants: further numbers that the form was solved with.
    """

    source: Tensor
    target: Tensor | None
    warm: Tensor
    setting: Setting
    form: str
    value: float | None
    trials: tuple[TriedSetting, ...] = field(default=(), repr=False)
    factors: FactorForm | None = None
    direct: Rows | None = field(default=None, repr=False)
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Length d of the vectors."""
        return self.source.shape[1]

    def block(self) -> LinearBlock:
        """Return the vectors as a block of a score."""
        constants = dict(self.constants) if self.factors is None else self.factors.constants()
        return LinearBlock("closed_form", self.source, self.target, direct=self.direct, constants=constants)
