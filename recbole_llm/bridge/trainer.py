"""The trainer of LLMTwoTower: the closed form first, then RecBole's epochs for the learned block, then their blend."""

import os
from collections.abc import Callable
from logging import getLogger
from typing import Any

import torch
from recbole.trainer import Trainer
from recbole.utils import dict2str, set_color

from recbole_llm.closed_form import Selection
from recbole_llm.selection import TopKMetric
from recbole_llm.towers import rows_from_pairs


class LLMTwoTowerTrainer(Trainer):
    """RecBole's ``Trainer`` in three stages, each of whose choices is made on the validation split by ``valid_metric``.

    1. The closed form is fitted: its constants and its rank.
    2. The learned block trains in RecBole's ordinary loop. The validation scores it prints, early stopping and the checkpoints
       are those of the learned block alone: stopping by the blend would stop it before it has something to add.
    3. The best state is weighed against the closed form, and the score is calibrated to a probability; the checkpoint and the
       result of ``fit`` are of the whole model.

    Without validation data the documented constants apply.
    """

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, dict[str, float] | None]:
        """Train on ``train_data``; arguments and result as those of RecBole's ``Trainer.fit``."""
        blocks = self.model.options.blocks
        selection = self._make_selection(valid_data)
        log: Callable[[str], None] = getLogger().info if verbose else (lambda text: None)
        if "closed_form" in blocks and not self.model.has_closed_form:
            self.model.fit_closed_form(selection, log)
        if "learned" in blocks:
            self.model.rank_by_learned_block()
            super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        else:
            self.eval_collector.data_collect(train_data)
        if saved and os.path.isfile(self.saved_model_file):
            checkpoint = torch.load(self.saved_model_file, map_location=self.device, weights_only=False)
            self.model.load_state_dict(checkpoint["state_dict"])
        self.model.eval()
        share = self.model.choose_blend(selection)
        log(f"share of the learned block in the score: {share:g}")
        if selection is not None:
            slope, offset = self.model.calibrate(selection)
            log(f"P(i|u) = sigmoid({slope:.4g} score {offset:+.4g}), fitted on validation")
        score, result = self.best_valid_score, None
        if valid_data:
            score, result = self._valid_epoch(valid_data, show_progress=show_progress)
            log(set_color("whole model: valid result", "blue") + ": \n" + dict2str(result))
            self.best_valid_result = result
        if saved:
            self._save_whole_model(verbose)
        return score, result

    def _save_whole_model(self, verbose: bool) -> None:
        """Write the blend into the best checkpoint, or a checkpoint of its own where no epoch made one."""
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return
        if not os.path.isfile(self.saved_model_file):
            self._save_checkpoint(-1, verbose=verbose)
            return
        checkpoint = torch.load(self.saved_model_file, map_location="cpu", weights_only=False)
        checkpoint["other_parameter"] = self.model.other_parameter()
        temporary = f"{self.saved_model_file}.tmp-{os.getpid()}"
        torch.save(checkpoint, temporary, pickle_protocol=4)
        os.replace(temporary, self.saved_model_file)

    def _make_selection(self, valid_data: Any) -> Selection | None:
        if not valid_data:
            return None
        log = getLogger().info
        try:
            metric = TopKMetric.parse(self.config["valid_metric"])
        except ValueError:
            metric = TopKMetric("ndcg", 10)
            log("valid_metric %s is no top-k metric: the blocks are chosen by %s", self.config["valid_metric"], metric)
        split = valid_data._dataset
        users, items = (split.inter_feat[field].long().to(self.device) for field in (split.uid_field, split.iid_field))
        history = self.model.history
        targets = rows_from_pairs(users, items, len(history.offsets) - 1)
        return Selection(history=history, targets=targets, seen=history, metric=metric)
