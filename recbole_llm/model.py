"""LLMTwoTower inside RecBole: P(i|u) = sigmoid(<x_u, w_i> + b_i), items described by their content, users by their history.

The score is :class:`recbole_llm.scoring.score.Score`, the fit :func:`recbole_llm.fitting.pipeline.fit`. This file gives them
RecBole's interface.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from logging import getLogger
from typing import Any

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import EvaluatorType, InputType
from torch import Tensor

from recbole_llm.bridge import distributed
from recbole_llm.bridge.checkpoint_settings import HISTORIES
from recbole_llm.bridge.item_media import in_words
from recbole_llm.bridge.options import NEG_VALID_FIELD, Options
from recbole_llm.bridge.training.tower_choice import may_choose
from recbole_llm.bridge.tuned_content import TunedContent
from recbole_llm.fitting.data import Known, TrainingData
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.refit import Chosen
from recbole_llm.fitting.signals import Signals
from recbole_llm.fitting.stage_values import FittedScore
from recbole_llm.fitting.tower_choice import TowerChoice
from recbole_llm.scoring.item_rows import AllRows, ShardedRows
from recbole_llm.scoring.losses import LossOptions, TowerLoss
from recbole_llm.scoring.rows import Rows, log_length
from recbole_llm.scoring.score import Score
from recbole_llm.scoring.state import score_from_state, score_to_state, state_of_version_1
from recbole_llm.scoring.tables import FrozenRows, FrozenTensor
from recbole_llm.scoring.towers import TowerOptions, TwoTowers


class LLMTwoTower(GeneralRecommender):
    """A hybrid recommender over content and interactions, trained inside RecBole.

    A closed form is fitted at once over interactions and content. Two towers are trained by gradient descent. Where interactions
    are split by time, a next-item block joins. Their blocks lie side by side, so that a score stays one dot product.

    Shapes: B users or interactions of a batch, N items with padding row 0 (n of them in this process), D columns of all blocks.

    Args:
        config: RecBole's ``Config``. Our keys are described in ``properties/LLMTwoTower.yaml``.
        dataset: the training split, an ``LLMTwoTowerDataset``. A user's history is its interactions in this split and
            nothing else, in validation and test too; split by time, the test's histories hold validation's items as well.

    Raises:
        ValueError: on an invalid key of ours, or if neither features nor IDs describe the items.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.options = options = Options.from_config(config)
        self.LABEL = config["LABEL_FIELD"]
        self.gives_probabilities = config["eval_type"] == EvaluatorType.VALUE
        self.item_rows = rows = item_rows_of(config, options, self.n_items)
        self._given = FrozenRows(_history_of(dataset, options))
        disliked = dataset.negative_rows()
        self._disliked = None if disliked is None else FrozenRows(disliked)
        self._later: FrozenRows | None = None  # histories at test where interactions are split by time
        self._later_given: FrozenRows | None = None  # the same before it is known how confidence counts
        self._read_off: tuple[Any, Score] | None = None
        self.take_signals(Signals())
        self.at_test = False  # whether users are ranked for the test
        self._features = {
            name: (FrozenTensor(rows.of(table.vectors)), FrozenTensor(rows.of(table.present)))
            for name, table in dataset.item_features.items()
        }
        if rows.sharded:
            dataset.__dict__.pop("_item_features", None)  # the whole tables, of which the model has taken its rows
        user_text = dataset.user_features.get("text") if "text" in options.user_tower else None
        self._user_text = (
            None if user_text is None else (FrozenTensor(user_text.vectors), FrozenTensor(user_text.present))
        )
        self.tower_choice: TowerChoice | None = None  # None: the towers are trained as the options say
        self._hold(*self.make_towers(None))
        self.fitted: FittedScore | None = None  # None: the learned block alone
        self.chosen: Chosen | None = None  # what validation decided, for a fit that repeats it
        self.tuned: TunedContent | None = None  # a fine-tuned encoder, whose vectors the towers read
        self.finetuning: Mapping[str, Any] | None = None  # what the gate said of it

    def make_towers(self, choice: TowerChoice | None) -> tuple[TwoTowers, TowerLoss]:
        """Make new towers and their loss, on a CPU where the model has just been made, else on its device.

        Args:
            choice: how; ``None`` for what the options say.
        """
        options, history = self.options, self.history
        shape = TowerOptions(**{each.name: getattr(options, each.name) for each in fields(TowerOptions)})
        terms = LossOptions(**{each.name: getattr(options, each.name) for each in fields(LossOptions)})
        reads = options.tower_features if choice is None else choice.tower_features
        if choice is not None:
            shape = replace(shape, scoring=choice.scoring, scale_init=choice.scale_init)
            terms = replace(terms, scoring=choice.scoring, loss_type=choice.loss_type)
        towers = TwoTowers(
            shape,
            self.n_users,
            torch.bincount(history.ids.cpu(), minlength=self.n_items),
            int((history.sizes > 0).sum()),
            self._features if reads else {},
            self._user_text,
            self.item_rows,
        ).to(history.ids.device)
        if choice is not None and choice.principal_start:
            towers.start_at_principal_axes()
        return towers, TowerLoss(towers, terms)

    def take_towers(self, choice: TowerChoice | None) -> None:
        """Replace the towers by new ones of a choice."""
        self.tower_choice = choice
        self._hold(*self.make_towers(choice))

    def _hold(self, towers: TwoTowers, loss: TowerLoss) -> None:
        self.towers, self.loss, self._read_off = towers, loss, None
        self.trained = towers.trained
        # the names of parameters in checkpoints
        self.target_tower, self.source_tower, self.user_tower = towers.target, towers.source, towers.user
        self.log_scale, self.item_bias = towers.log_scale, towers.bias
        if self.item_rows.sharded:
            for tower in {towers.target, towers.source}:
                for parameter in tower.adapters.parameters():
                    parameter.register_hook(distributed.sum_over_ranks)

    def take_tuned(self, tuned: TunedContent) -> None:
        """Let the vectors of a modality be those of a fine-tuned encoder."""
        table = self._features[tuned.modality][0]
        if table.value.shape != tuned.vectors.shape:
            raise ValueError(
                f"The tuned vectors are {tuple(tuned.vectors.shape)}, the model's {tuple(table.value.shape)}."
            )
        table.value = tuned.vectors.to(table.value)
        self.tuned, self._read_off = tuned, None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters; the towers become those of the state where a fit may have chosen others than the options say."""
        reads = any(name.startswith("target_tower.adapters.") for name in state_dict)
        if reads != bool(self.towers.target.adapters) and self._features and may_choose(self):
            given = TowerChoice.of(self.options)
            self.take_towers(None if reads == given.tower_features else replace(given, tower_features=reads))
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Any, recurse: bool = True) -> "LLMTwoTower":
        for tensors in self._features.values():  # those that no tower holds
            for tensor in tensors:
                tensor._apply(fn)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------ what the fit reads and gives

    @property
    def history(self) -> Rows:
        """Training items of every user, ``n_users`` rows on the model's device; with ranks where recency counts."""
        return self._history.rows

    @property
    def ranking_history(self) -> Rows:
        """Items by which users are ranked: the training items; at test, where time splits, those of validation too."""
        return self._later.rows if self.at_test and self._later is not None else self.history

    def remember_later(self, later: Rows) -> None:
        """Set the histories of the test where interactions are split by time: training and validation items.

        RecBole gives sequential models the same: every interaction before the one to predict.
        """
        self._later_given = FrozenRows(later.to(self.item_bias.device))
        self._later = FrozenRows(self.signals.applied(self._later_given.rows))

    def take_signals(self, signals: Signals) -> None:
        """Let the confidence of interactions count so, in the histories and where the model is fitted."""
        self.signals = signals
        self._history = FrozenRows(signals.applied(self._given.rows))
        if self._later_given is not None:
            self._later = FrozenRows(signals.applied(self._later_given.rows))
        self._read_off = None

    def known(self, dataset: Any, history: str = "all") -> Known:
        """What recommendations are made from.

        Args:
            dataset: the training split, as :meth:`LLMTwoTowerDataset.build` gave it.
            history: ``all`` interactions of the data set, validation's and test's included, or those of ``train``.

        Raises:
            ValueError: if ``history`` is neither.
        """
        if history not in HISTORIES:
            raise ValueError(f"history is {history!r}; expected one of {', '.join(HISTORIES)}.")
        later = dataset.later_splits if history == "all" else ()
        if later is None:
            getLogger().warning(
                "The interactions of validation and test are not at hand: histories are those of the training split."
            )
        rows = self.signals.applied(_history_of(dataset, self.options, *(later or ())))
        disliked = dataset.negative_rows(*(later or ()))
        return Known(rows.to(self.item_bias.device), len(self.history.ids), disliked)

    def training_data(self, given: bool = False) -> TrainingData:
        """Return what the score is fitted on.

        Args:
            given: with the confidence of interactions as the data has it, before it is known how it counts.
        """
        content = {name: (vectors.value, present.value) for name, (vectors, present) in self._features.items()}
        history = self._given.rows if given else self.history
        return TrainingData(history, self.item_rows, content, None if self._disliked is None else self._disliked.rows)

    @property
    def score(self) -> Score:
        """The score as it is now; its learned block is read off the towers once per state of their parameters."""
        state = (self.training, id(self.fitted), *((id(p), p._version) for p in self.parameters()))
        if self._read_off is None or self._read_off[0] != state:
            block = self.towers.block()
            if self.fitted is None:
                score = Score((block,), self.item_rows.listed().to(self.item_bias.device), rows=self.item_rows)
            elif self.fitted.score.block(block.name) is None:
                score = self.fitted.score
            else:
                score = self.fitted.score.refreshed(block)
            self._read_off = (state, score)
        return self._read_off[1]

    def train(self, mode: bool = True) -> "LLMTwoTower":
        """Switch between training and evaluation; drops the score that was read off the towers."""
        self._read_off = None
        return super().train(mode)

    # ------------------------------------------------------------------ training

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Compute the training loss of a batch in nats, a float32 scalar.

        Under a catalogue loss the batch is users, each with all its training items as targets, and the loss is per target.
        Under ``sampled_bce`` and ``pair_bce`` it is interactions, and the loss is the mean over them.
        """
        users = interaction[self.USER_ID]
        if self.options.trains_on_users:
            return self.loss.of_users(users, self.history)
        items = interaction[self.ITEM_ID]
        if self.options.loss_type == "pair_bce":
            return self.loss.of_pairs(users, items, interaction[self.LABEL], self.history)
        valid = interaction[NEG_VALID_FIELD] if NEG_VALID_FIELD in interaction.interaction else None
        drawn = getattr(interaction, "entries", None)  # of a batch as it was drawn, whose entries all count
        entries = None if drawn is None or valid is not None else drawn()
        return self.loss.of_negatives(users, items, interaction[self.NEG_ITEM_ID], self.history, valid, entries)

    # ------------------------------------------------------------------ ranking and prediction

    @torch.no_grad()
    def user_vectors(self, users: Tensor) -> Tensor:
        """Compute queries x_u of known users, ``[B]`` int64 -> ``[B, D]``; every factor of the score is in them.

        Where a block has direct rows (:mod:`recbole_llm.scoring.block`), they are no part of these products.
        """
        score = self.score
        return score.queries(self.ranking_history.select(users), score.user_parts(users))

    @torch.no_grad()
    def item_vectors(self) -> tuple[Tensor, Tensor]:
        """Return target vectors w_i ``[n, D]`` and biases b_i ``[n]``; the padding item's bias is -inf."""
        table = self.score.item_table()
        return table.dense(), table.bias

    @property
    def has_item_vectors(self) -> bool:
        """Whether a score is a product of stored vectors, without the full closed form's identity and without direct rows."""
        return self.score.has_vectors

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """Compute scores of every item, ``[B, N]`` in a fresh tensor; -inf for padding."""
        return self.score.of_users(users, self.ranking_history)

    def _log_length(self, users: Tensor) -> Tensor:
        return log_length(self.ranking_history.select(users))

    @torch.no_grad()
    def probabilities(self, users: Tensor) -> Tensor:
        """Compute P(i|u) of every item for each user, ``[B, N]``, in the order of the scores; 0 for padding.

        The event is that of :func:`recbole_llm.fitting.pipeline.calibrate`.
        """
        return self.score.probabilities(self.scores(users), self._log_length(users)[:, None])

    @torch.no_grad()
    def predict(self, interaction: Any) -> Tensor:
        """Compute scores of (user, item) pairs, ``[P]``: probabilities for a value-based metric, logits for a ranking one.

        A sigmoid is exactly 1 from a logit of 17 on in float32, so ranking by probabilities would tie.

        Raises:
            ValueError: if the items are spread over processes.
        """
        if self.item_rows.sharded:
            raise ValueError(
                "With shard_items, items are ranked and not scored pair by pair. Read the checkpoint in one process, with "
                "load_data_and_model, and call its predict."
            )
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        user, row = torch.unique(users, return_inverse=True)
        score, history = self.score, self.ranking_history.select(user)
        logit = score.pairs(history, row, items, score.user_parts(user), self.options.kernel_backend)
        return score.probabilities(logit, log_length(history)[row]) if self.gives_probabilities else logit

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Compute logits of every item for each user, flattened, ``[B * N]``; the padding item scores -inf."""
        return self.scores(interaction[self.USER_ID]).view(-1)

    # ------------------------------------------------------------------ cold-start items

    @property
    def cold(self) -> Tensor:
        """Items without a training interaction, ``[N]`` bool; padding is none."""
        cold = ~self.trained.value
        cold[0] = False
        return cold

    def never_shown(self) -> tuple[int, int]:
        """How many items no answer holds: those left out of the ranking, and those that nothing places."""
        placed = self.score.cold
        n_cold = int(self.cold.sum())
        if placed is None:
            return 0, n_cold
        return (0 if placed.joint else len(placed.ids)), n_cold - len(placed.ids)

    def cold_remark(self) -> str:
        """Say in a sentence what the model does about items without a training interaction."""
        if self.item_rows.sharded:
            return "cold items are ranked by the map of their content with the lowest bias: shard_items leaves cold_map out."
        placed = self.score.cold
        if placed is None:
            return "cold items are ranked last: they have no text, or cold_map is none."
        if not placed.joint:
            return "cold items are left out of the ranking of all items: they would gain nothing on validation."
        without = int(self.cold.sum()) - len(placed.ids)
        kinds = " and ".join(map(in_words, self._features))
        return f"cold items are placed by their {kinds}, {without} without one ranked last."

    # ------------------------------------------------------------------ checkpoints

    def other_parameter(self) -> dict[str, Any]:
        """Return what was fitted and is no parameter, as plain tensors and numbers for the checkpoint.

        While the towers train there is nothing: the solved blocks would be written again with every improvement, and a run
        that resumes solves for them again.
        """
        fitted, later = self.fitted, None if self._later is None else vars(self._later.rows)
        chosen = None if self.chosen is None else self.chosen.to_state()
        towers = None if self.tower_choice is None else self.tower_choice.to_state()
        always: dict[str, Any] = {
            "later": later,
            "chosen": chosen,
            "towers": towers,
            "signals": self.signals.to_state(),
        }
        if self.options.finetune is not None:
            tuned = None if self.tuned is None else self.tuned.to_state()
            always |= {"encoder": tuned, "finetuning": self.finetuning}
        if fitted is None:
            return {"score": None, "setting": None, **always}
        setting = None if fitted.setting is None else fitted.setting.to_state()
        return {"score": score_to_state(self.score), "setting": setting, **always}

    def _trained_by(self, state: Mapping[str, Any] | None) -> None:
        """Read the parameters that are there as towers of a choice, ``None`` for what the options say."""
        self.tower_choice = None if state is None else TowerChoice.from_state(state)
        choice = self.tower_choice or TowerChoice.of(self.options)
        self.towers.options = replace(self.towers.options, scoring=choice.scoring, scale_init=choice.scale_init)
        self.loss.options = replace(self.loss.options, scoring=choice.scoring, loss_type=choice.loss_type)

    def load_other_parameter(self, para: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`other_parameter` gave, or that of a checkpoint of version 1."""
        if not para:
            return
        first = "score" not in para
        state = state_of_version_1(para, self.item_rows) if first else para["score"]
        later, setting, chosen = para.get("later"), para.get("setting"), para.get("chosen")
        self.take_signals(Signals.from_state(para.get("signals")))
        self.chosen = None if chosen is None else Chosen.from_state(chosen)
        self._trained_by(para.get("towers"))
        self.finetuning = para.get("finetuning")
        if para.get("encoder") is not None:
            self.take_tuned(TunedContent.from_state(para["encoder"]))
        if later is not None:
            names = {"ranks": "weights"} if first else {"ranks": "ranks", "weights": "weights"}
            rows = Rows(later["offsets"], later["ids"], **{name: later[of] for name, of in names.items()})
            self._later = FrozenRows(rows.to(self.item_bias.device))
        self.fitted = None
        if state is not None:
            score = score_from_state(state, self.towers.block(), self.item_rows)
            if self._disliked is not None:
                disliked = self._disliked.rows
                score = score.with_blocks(*(replace(b, disliked=disliked) for b in score.blocks if b.dislikes))
            self.fitted = FittedScore(score, None if setting is None else Setting.from_state(setting))
        self._read_off = None


def _history_of(dataset: Any, options: Options, *later: Any) -> Rows:
    """The items of every user in a split and in later ones, with ranks where recency is to count."""
    if options.use_order and options.history_decay is None:
        ranked: Rows | None = dataset.training_ranks(*later)
        if ranked is not None:
            return ranked
    return replace(dataset.training_rows(options.history_decay, *later), ranks=None)  # one decay for all blocks


def item_rows_of(config: Any, options: Options, n_items: int) -> AllRows:
    """Choose all items, or a part of them if ``shard_items`` meets several processes.

    Raises:
        ValueError: if there are fewer items than processes.
    """
    if not options.shard_items or not distributed.active():
        return AllRows(n_items)
    if n_items < distributed.world_size():
        raise ValueError(
            f"shard_items: {n_items} items (padding included) cannot be spread over {distributed.world_size()} processes. "
            "Start fewer processes, or set shard_items to false."
        )
    distributed.agree_on_random_numbers(config["device"])
    return ShardedRows(n_items, distributed.own_part(n_items))
