"""What LLMTwoTower fits at once and not by gradient descent: the closed form, its weight, cold items' places, the calibration."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm.calibration import fit_platt, fit_probability
from recbole_llm.closed_form import ClosedForm, fit_closed_form
from recbole_llm.cold_map import MU, ColdBoost
from recbole_llm.ease import Setting
from recbole_llm.fading import CLOSED_DECAYS, FOLLOWING_DECAYS, choose_fading
from recbole_llm.placement import ColdItems, Evidence, ItemTables, choose_place, place
from recbole_llm.probability import ProbabilityMap
from recbole_llm.recency import NextItemBlock, choose_decay, decayed, fit_next_item
from recbole_llm.selection import (
    BLEND_WEIGHTS,
    DEFAULT_METRIC,
    LinearScorer,
    Scorer,
    Selection,
    choose_blend,
    evenly,
    user_metric,
)
from recbole_llm.setting_search import DIM, EXACT_ITEMS
from recbole_llm.towers import FrozenTensor, Rows, pool

MAX_BLEND_USERS = 20_000  # users by whom the weight between the blocks is chosen
MAX_FADING_USERS = 5_000  # the same of decays, which takes 16 rankings, and 455 of candidates
MIN_FADING_USERS, MAX_FADING_PAIRS = 500, 200_000_000  # pairs of users and items: fewer users above 40,000 items
MAX_CALIBRATION_USERS = 5_000  # two numbers are fitted to millions of pairs
MAX_CALIBRATION_PAIRS = 200_000_000  # of users and items; a pass over so many takes seconds, and there are ten
DEFAULT_LEARNED_SHARE = 0.35  # without validation data; the median of what validation chose on three datasets


class FittedBlocks:
    """The part of ``LLMTwoTower`` that is fitted on training and validation data at once.

    Attributes:
        block_scales: factors of the closed form and of the learned block in the score.
        calibration: slope > 0 and offset of the score.
        probability_map: from the score to the logit of P(i|u).
        closed_decay: tau by which the closed form's histories fade; ``None`` for not at all.
        at_test: whether users are ranked for the test, so that histories hold validation's items where time splits.
    """

    options: Any
    n_items: int
    item_bias: Any
    _features: dict[str, tuple[FrozenTensor, FrozenTensor]]
    _trained: FrozenTensor
    _history_ids: FrozenTensor
    _gives_probabilities: bool
    _ranking_cache: tuple[Any, Tensor, Tensor, Tensor] | None

    if TYPE_CHECKING:  # what the model itself provides

        @property
        def history(self) -> Rows:
            """Training items of every user."""
            ...

        @property
        def uses_order(self) -> bool:
            """Whether interactions are split by time."""
            ...

        @property
        def _ranked(self) -> Rows: ...
        @property
        def _closed_counts(self) -> bool: ...
        def _logits(self, users: Tensor) -> Tensor: ...
        def _learned_logits(self, users: Tensor) -> Tensor: ...
        def _closed_query(self, users: Tensor) -> Tensor: ...
        def _log_length(self, users: Tensor) -> Tensor: ...
        def _closed_scores(self, query: Tensor) -> Tensor: ...
        def _logits(self, users: Tensor) -> Tensor: ...
        def _queries_of_users(self, users: Tensor, history: Rows, source: Tensor) -> Tensor: ...
        def _ranking_tables(self) -> tuple[Tensor, Tensor, Tensor]: ...

    def _nothing_fitted(self) -> None:
        """The state before anything is fitted."""
        self._closed_source: FrozenTensor | None = None
        self._closed_target: FrozenTensor | None = None  # None beside a source: the identity
        self._setting: Setting | None = None  # of the closed form
        self.closed_decay: float | None = None
        self._next: NextItemBlock | None = None
        self._later: Rows | None = None  # histories at test where interactions are split by time; weights are ranks
        self.at_test = False
        self.block_scales = (0.0, 1.0)  # of the closed form and the learned block
        self._forget_calibration()
        self._cold: ColdItems | None = None
        self._ranking_cache = None

    def _forget_calibration(self) -> None:
        self.calibration = (1.0, 0.0)  # slope > 0 and offset of the score
        self.probability_map = ProbabilityMap()

    @torch.no_grad()
    def fit_closed_form(self, selection: Selection | None, log: Callable[[str], None]) -> None:
        """Fit the closed-form block on the training interactions and take over its vectors.

        Args:
            selection: validation data by which its constants and rank are chosen; ``None`` for the documented constants.
            log: called with one sentence per step.
        """
        if not self.uses_order or selection is None:
            block = self._fit_block(self.history, selection, log)
        else:
            block = self._fit_with_order(selection, log)
        self._setting = block.setting
        self._set_closed_form(block.source, block.target)
        self.block_scales = (1.0, 1.0)

    def _fit_block(
        self, history: Rows, selection: Selection | None, log: Callable[[str], None], **fixed: Any
    ) -> ClosedForm:
        features, present = next(iter(self._features.values()), (None, None))
        return fit_closed_form(
            history,
            self.n_items,
            None if features is None else features.value,
            None if present is None else present.value,
            selection,
            log=log,
            **({"dim": self.options.closed_form_dim} | fixed),
        )

    def _fit_with_order(self, selection: Selection, log: Callable[[str], None]) -> ClosedForm:
        """The closed form whose histories fade, and the next-item block beside it."""
        users = torch.nonzero(selection.targets.sizes).squeeze(1)
        targets, seen, ranked = (rows.select(users) for rows in (selection.targets, selection.seen, self._ranked))
        untrained = ~self._trained.value

        def value(scorer: Scorer) -> float:
            return float(user_metric(scorer, targets, seen, self.n_items, selection.metric, excluded=untrained).mean())

        first = self._fit_block(self.history, None, lambda text: None)
        decay, _ = choose_decay(ranked, first.source, first.target, value)
        block = self._fit_block(self.history, replace(selection, history=decayed(self._ranked, decay)), log)
        self.closed_decay, best = choose_decay(ranked, block.source, block.target, value)
        log(f"histories of the closed form fade by exp(-rank / {self.closed_decay}): {selection.metric} {best:.4f}")
        self._next = fit_next_item(
            self._ranked,
            ranked,
            self.n_items,
            LinearScorer(decayed(ranked, self.closed_decay), block.source, block.target),
            value,
            None if block.target is None else block.dim,
            self._trained.value,
            log,
        )
        return block

    def _set_closed_form(self, source: Tensor | None, target: Tensor | None) -> None:
        self._closed_source = None if source is None else FrozenTensor(source.to(self.item_bias.device))
        self._closed_target = None if target is None else FrozenTensor(target.to(self.item_bias.device))
        self._ranking_cache = None

    def rank_by_learned_block(self) -> None:
        """Leave the closed form out of the score until :meth:`choose_blend` weighs it in."""
        self.block_scales = (0.0, 1.0)
        self._forget_calibration()
        self._set_cold(None)

    @torch.no_grad()
    def choose_blend(self, selection: Selection | None) -> float:
        """Weigh the closed form and the learned block, each scaled by the deviation of its scores.

        Args:
            selection: validation data; without it the learned block's share is ``DEFAULT_LEARNED_SHARE``.

        Returns:
            The learned block's share of the score, in [0, 1]; a model of one block has nothing to weigh.
        """
        if self._closed_source is None or "learned" not in self.options.blocks:
            self.block_scales = (1.0, 0.0) if self.has_closed_form else (0.0, 1.0)
            return self.block_scales[1]
        rated = self.history if selection is None else selection.targets
        users = evenly(torch.nonzero(rated.sizes).squeeze(1), MAX_BLEND_USERS)
        closed: Scorer = lambda rows: self._closed_scores(self._closed_query(users[rows])).clone()  # noqa: E731
        learned: Callable[[Tensor], Tensor] = lambda rows: self._learned_logits(users[rows])  # noqa: E731
        trained = self._trained.value

        def value(scorer: Scorer) -> float:
            assert selection is not None
            targets, seen = selection.targets.select(users), selection.seen.select(users)
            return float(user_metric(scorer, targets, seen, self.n_items, selection.metric, excluded=~trained).mean())

        blend = choose_blend(
            closed,
            learned,
            torch.arange(len(users), device=users.device),
            self.n_items,
            value if selection is not None and len(users) else lambda scorer: 0.0,
            weights=BLEND_WEIGHTS if selection is not None and len(users) else (DEFAULT_LEARNED_SHARE,),
            columns=trained,
        )
        self.block_scales = blend.scales
        return blend.weight

    @torch.no_grad()
    def choose_fading(self, selection: Selection | None, log: Callable[[str], None]) -> None:
        """Where interactions are split by time: decays and factors once more, now that every block is there.

        What was chosen block by block stays where the best of the grid is no better, both by whole rankings.

        Args:
            selection: validation data; without it everything stays.
            log: called with one sentence.
        """
        if not self.uses_order or selection is None or self._closed_source is None or not self.block_scales[0]:
            return
        most = min(MAX_FADING_USERS, max(MIN_FADING_USERS, MAX_FADING_PAIRS // self.n_items))
        users = evenly(torch.nonzero(selection.targets.sizes).squeeze(1), most)
        if not len(users):
            return
        self._set_cold(None)  # a finished run that goes on has them placed by other decays
        targets, seen, ranked = (rows.select(users) for rows in (selection.targets, selection.seen, self._ranked))
        untrained, block = ~self._trained.value, self._next
        source, target = self._closed_source.value, self._closed_value()
        learned: Scorer = lambda rows: self._learned_logits(users[rows])  # noqa: E731
        choice = choose_fading(
            {tau: LinearScorer(decayed(ranked, tau), source, target) for tau in CLOSED_DECAYS},
            {}
            if block is None
            else {tau: LinearScorer(decayed(ranked, tau), block.source, block.target) for tau in FOLLOWING_DECAYS},
            learned if "learned" in self.options.blocks else None,
            targets,
            seen,
            selection.metric,
            untrained,
        )

        def values() -> list[float]:
            scorer: Scorer = lambda rows: self._logits(users[rows])  # noqa: E731
            metrics = selection.metric, replace(selection.metric, k=2 * selection.metric.k)
            return [float(user_metric(scorer, targets, seen, self.n_items, m, untrained).mean()) for m in metrics]

        closed, follows, share = choice.factors
        if not closed:  # no history to tell by
            return
        before, kept = values(), (self.closed_decay, self.block_scales, block)
        self.closed_decay, self.block_scales = choice.closed, (closed, share)
        if block is not None:
            decay = choice.following
            self._next = None if decay is None else replace(block, decay=decay, scale=follows / closed)
        found = values()
        if sum(found) > sum(before):
            log(
                f"score, in deviations of each block: {choice}: {selection.metric} {found[0]:.4f}, {before[0]:.4f} before"
            )
            return
        self.closed_decay, self.block_scales, self._next = kept
        log(
            f"decays and weights stay as chosen block by block: {selection.metric} {before[0]:.4f}; {found[0]:.4f} for {choice}"
        )

    def _set_cold(self, cold: ColdItems | None) -> None:
        """Take over the cold items' vectors, or none; their sources stand in the closed form's tables."""
        self._cold, self._ranking_cache = cold, None
        at = 0
        for table in self._closed_sources():
            table[~self._trained.value] = 0.0
            if cold is not None:
                table[cold.ids] = cold.closed_source[:, at : at + table.shape[1]]
                at += table.shape[1]

    def _closed_sources(self) -> list[Tensor]:
        found = [] if self._closed_source is None else [self._closed_source.value]
        return found if self._next is None else [*found, self._next.source]

    def _closed_targets(self) -> Tensor | None:
        """Targets of the closed form and of the next-item block side by side; ``None``: the identity."""
        target = self._closed_value()
        if target is not None and self._next is not None and self._next.target is not None:
            target = torch.cat([target, self._next.target], 1)
        return target

    @torch.no_grad()
    def cold_scores(self, users: Tensor) -> Tensor:
        """Scores of the items of ``cold_items`` among themselves, ``[B, C]``, whether or not the ranking holds them."""
        assert self._cold is not None
        x = self._queries_by(self.history, None)(users)
        targets = torch.cat([self._cold.closed, self._cold.learned], 1)
        return torch.addmm(self._cold.bias * self.block_scales[1], x, targets.T)

    @property
    def cold(self) -> Tensor:
        """Items without a training interaction, ``[N]`` bool; padding is none."""
        cold = ~self._trained.value
        cold[0] = False
        return cold

    @torch.no_grad()
    def place_cold_items(self, selection: Selection | None, log: Callable[[str], None]) -> None:
        """Give the items without a training interaction vectors from their texts, and a place beside the trained ones.

        Their targets and bias come from a kernel ridge map of text to trained items; ``cold_boost: auto`` chooses ridge,
        factor and offset (:func:`recbole_llm.placement.choose_place`), under a floor for the trained items' quality.

        Args:
            selection: validation data; without it, or without a cold item among its targets, cold items are left out of
                the joint ranking.
            log: called with one sentence per finding.
        """
        self._set_cold(None)
        self._forget_calibration()  # deviations are measured in the score's own units; calibrate anew afterwards
        cold = self.cold
        if not bool(cold.any()):
            return
        features, present = next(iter(self._features.values()), (None, None))
        n_cold = int(cold.sum())
        if features is None or present is None or self.options.cold_map == "none":
            log(
                f"{n_cold} items have no training interaction, and nothing to place them by (cold_map {self.options.cold_map})"
            )
            return
        placed = torch.nonzero(cold & present.value).squeeze(1)
        log(f"{n_cold} items have no training interaction; {len(placed)} of them have a text and are placed by it")
        trained = self._trained.value
        if not len(placed) or not bool((trained & present.value).any()):
            return
        evidence = Evidence(
            self.history,
            self.history if selection is None else selection.targets,
            DEFAULT_METRIC if selection is None else selection.metric,
            features.value,
            present.value,
            trained,
            torch.bincount(self._history_ids.value, minlength=self.n_items),
        )
        tables, queries = self._item_tables(), self._queries_by(self.history, None)
        mu, boost = MU, ColdBoost(joint=False)
        if self.options.cold_boost != "auto":
            boost = ColdBoost(joint=True, kappa=float(self.options.cold_boost))
        elif selection is not None:
            mu, boost = choose_place(evidence, placed, tables, queries, self._refit, log)
        log(str(boost))
        # a value-based metric asks for the score of a pair, wherever a ranking would place it
        boost = replace(boost, joint=boost.joint or self._gives_probabilities)
        D = self.options.embedding_size
        columns = tables.target.shape[1] + self.n_items * tables.identity
        widths = columns - D, sum(table.shape[1] for table in tables.sources) - D
        self._set_cold(place(evidence, placed, tables, queries, boost, mu, widths, self.block_scales[1]))

    def _item_tables(self, block: ClosedForm | None = None) -> ItemTables:
        """Vectors of every block side by side, of the model's own closed form or another; the bias in units of the score."""
        source, w, bias = self._ranking_tables()
        bias = bias.nan_to_num(neginf=0.0) * self.block_scales[1]
        if not self.has_closed_form:
            return ItemTables(w, bias, (source,))
        target = self._closed_targets() if block is None else block.target
        sources = self._closed_sources() if block is None else [block.source]
        table = w if target is None else torch.cat([target, w], 1)
        return ItemTables(table, bias, (*sources, source), identity=target is None)

    def _queries_by(self, history: Rows, closed: tuple[Tensor, Tensor | None] | None) -> Callable[[Tensor], Tensor]:
        """User vectors in units of the score by given histories, with the model's own closed form or another's sources."""
        source = self._ranking_tables()[0]
        faded = history
        if self.uses_order and closed is not None:  # the given histories lack whole items; ranks stay those of all
            known = torch.zeros(self.n_items, dtype=torch.bool, device=source.device)
            known[history.ids] = True
            faded = decayed(self._ranked.keep(known[self._ranked.ids]), self.closed_decay)

        def queries(users: Tensor) -> Tensor:
            found = [self._queries_of_users(users, history.select(users), source) * self.block_scales[1]]
            if self.has_closed_form:
                x = self._closed_query(users) if closed is None else pool(closed[0], faded.select(users))
                found.insert(0, x * self.block_scales[0])
            return torch.cat(found, 1)

        return queries

    def _refit(self, left: Rows) -> tuple[ItemTables, Callable[[Tensor], Tensor]]:
        """Tables without some items' interactions: the closed form fitted anew; the learned vectors stay.

        They only tell where cold items should stand, so that beyond ``EXACT_ITEMS`` items the SVD form of rank ``DIM`` does,
        where the text kernel has one.
        """
        if not self.has_closed_form:
            return self._item_tables(), self._queries_by(left, None)
        target, setting = self._closed_value(), self._setting
        fixed: dict[str, Any] = {"dim": "full" if target is None else target.shape[1]}
        linear = setting is None or setting.text_power == 1  # the other kernel has no such form
        if linear and int(self._trained.value.sum()) > EXACT_ITEMS:
            fixed = {"dim": DIM if target is None else min(DIM, target.shape[1]), "max_dense_items": 0}
        block = self._fit_block(left, None, lambda text: None, setting=setting, **fixed)
        return self._item_tables(block), self._queries_by(left, (block.source, block.target))

    @property
    def cold_items(self) -> ColdItems | None:
        """The items placed by their texts, with kappa, shift and the source vectors; ``None`` where there are none."""
        return self._cold

    def cold_remark(self) -> str:
        """What the model does about items without a training interaction, in a sentence."""
        if self._cold is None:
            return "cold items are ranked last: they have no text, or cold_map is none."
        if not self._cold.joint:
            return "cold items are left out of the ranking of all items: they would gain nothing on validation."
        return f"cold items are placed by their texts, {int(self.cold.sum()) - len(self._cold.ids)} without a text ranked last."

    @torch.no_grad()
    def calibrate(self, selection: Selection) -> tuple[float, float]:
        """Fit slope and offset of the score, and the map from it to a probability.

        P(i|u) is the probability that item i turns up among the user's next interactions, as many as validation holds of the
        user, given that it is in none of those that training and validation hold (:mod:`recbole_llm.calibration`). Only
        items with a training interaction count.

        Args:
            selection: validation data.

        Returns:
            Slope and offset; (1, 0) where validation has no target. The map is ``probability_map``.
        """
        self._forget_calibration()
        most = min(MAX_CALIBRATION_USERS, max(MAX_CALIBRATION_PAIRS // self.n_items, 1))
        users = evenly(torch.nonzero(selection.targets.sizes).squeeze(1), most)
        trained = self._trained.value

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for few in users.split(max(1, 2**22 // self.n_items)):
                targets, seen = selection.targets.select(few), selection.seen.select(few)
                label = torch.zeros(len(few), self.n_items, dtype=torch.bool, device=few.device)
                label[targets.row_of_entry(), targets.ids] = True
                counts = trained.expand(len(few), -1).clone()
                counts[seen.row_of_entry(), seen.ids] = False
                length = self._log_length(few)[:, None].expand_as(counts)
                yield self._logits(few)[counts], length[counts], label[counts]

        self.calibration = fit_platt(lambda: ((score, label) for score, _, label in batches()))
        self.probability_map = fit_probability(batches, self.calibration[1])
        return self.calibration

    @property
    def has_closed_form(self) -> bool:
        """Whether the closed form has been fitted or loaded."""
        return self._closed_source is not None

    def _closed_value(self) -> Tensor | None:
        return None if self._closed_target is None else self._closed_target.value

    def other_parameter(self) -> dict[str, Any]:
        """What was fitted and is no parameter, as plain tensors and numbers for the checkpoint.

        While the learned block trains, the closed form is left out: it would be written again with every improvement, and
        a run that resumes fits it again.
        """
        source = self._closed_source if self._closed_counts else None
        return {
            "closed_form_source": None if source is None else source.value,
            "closed_form_target": None if source is None else self._closed_value(),
            "block_scales": self.block_scales,
            "calibration": self.calibration,
            "probability_map": vars(self.probability_map),
            "cold": None if self._cold is None else vars(self._cold),
            "setting": None if self._setting is None else vars(self._setting),
            "closed_decay": self.closed_decay,
            "next_item": None if source is None or self._next is None else vars(self._next),
            "later": None if self._later is None else vars(self._later),
        }

    def load_other_parameter(self, para: dict[str, Any] | None) -> None:
        """Take over what :meth:`other_parameter` gave."""
        if para:
            device = self.item_bias.device
            self._set_closed_form(para["closed_form_source"], para["closed_form_target"])
            self._setting = Setting(**para["setting"]) if para.get("setting") else None
            self.closed_decay = para.get("closed_decay")
            self._next = NextItemBlock(**para["next_item"]).to(device) if para.get("next_item") else None
            self._later = Rows(**para["later"]).to(device) if para.get("later") else None
            self.block_scales = tuple(para["block_scales"])
            self.calibration = tuple(para["calibration"])
            self.probability_map = ProbabilityMap.from_json(para.get("probability_map") or {})
            cold = None if para["cold"] is None else ColdItems(**para["cold"])
            self._set_cold(None if cold is None else cold.to(device))
