"""The trainer of LLMTwoTower: the closed form first, then RecBole's epochs for the learned block, then their blend."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from logging import getLogger
from typing import Any, ClassVar

import torch
from recbole.trainer import Trainer
from recbole.trainer.trainer import AbstractTrainer
from recbole.utils import dict2str, get_gpu_usage, set_color
from torch import Tensor

from recbole_llm.atomic import remove_leftovers
from recbole_llm.bridge import distributed
from recbole_llm.bridge.checkpoint import (
    WRONG_CONTENTS,
    best_file,
    data_fingerprint,
    last_file,
    plain,
    random_state,
    set_random_state,
    write_checkpoint,
)
from recbole_llm.bridge.checkpoint_settings import command_to_resume
from recbole_llm.bridge.training import optimizers
from recbole_llm.bridge.training.advice import advice_of
from recbole_llm.bridge.training.best_state import BestState
from recbole_llm.bridge.training.choices import settled_choices
from recbole_llm.bridge.training.finetune import refuse_without_means, remove_state, towers_of_tuned_encoder
from recbole_llm.bridge.training.interruption import Interruption
from recbole_llm.bridge.training.item_tables import tables_of
from recbole_llm.bridge.training.tower_choice import choose, patience
from recbole_llm.bridge.training.validation_data import validation_of
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.pipeline import fit
from recbole_llm.fitting.refit import chosen_of, refit
from recbole_llm.fitting.validation import Validation
from recbole_llm.progress import progress_bar
from recbole_llm.scoring.never_shown import never_shown
from recbole_llm.scoring.score import LinearBlock

SECONDS_BETWEEN_CHECKPOINTS = 5.0
STEPS_PER_CHECK = 100  # a NaN stays in the sum of losses, so the sum is looked at now and then and not every loss


class _Unwrapped(AbstractTrainer):
    """Takes the place of ``AbstractTrainer``, whose DistributedDataParallel broadcasts and copies what we need not."""

    def __init__(self, config: Any, model: Any) -> None:
        self.config, self.model = config, model


class LLMTwoTowerTrainer(Trainer, _Unwrapped):
    """RecBole's ``Trainer`` around :func:`recbole_llm.fitting.pipeline.fit`, whose towers train in RecBole's loop.

    Validation scores that the loop prints, early stopping and its checkpoints are those of the learned block alone. Stopping by the
    blend would stop it before it has something to add. The checkpoint and the result of ``fit`` are of the whole model.

    The whole state of the towers' training is in ``<name>-last.pth`` beside the best one's ``<name>.pth``. It is written after an
    epoch that ends ``SECONDS_BETWEEN_CHECKPOINTS`` or more after the last writing. A run that is killed at any moment and resumed
    from it ends, on a CPU with the same number of threads, with the same numbers as one that was left alone: the solved blocks
    are solved for again, the towers go on, the rest follows. A kill loses those seconds and the epoch that runs. SIGTERM and
    Ctrl-C lose that epoch where the state before it has been written, and elsewhere wait for its end and write.
    """

    last_saved: ClassVar[str | None] = None  # the file of the whole model that this process wrote last
    saved_model_file: str
    best_valid_score: float
    stopping_step: int

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.enable_scaler)
        self._tables = tables_of(model, self.device)
        self._tables.reject(self)
        self._tables.begin()
        self._parameters = list(model.parameters())
        self._epochs_done, self._chooses = 0, True
        self._train_data: Any = None
        self._saves = False
        self._random_state: dict[str, Any] | None = None  # to be taken over before the next epoch
        self._interruption = Interruption()
        self._last_written: float | None = None
        self._best_epochs = 0

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        """Build RecBole's optimizer, fused if possible, or the one that visits touched rows."""
        if optimizers.is_rowwise(self.config):
            return optimizers.rowwise_adagrad(self.config, self.model)
        return optimizers.fused(super()._build_optimizer(**kwargs))

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, dict[str, float] | None]:
        """Train on ``train_data``; arguments and result as those of RecBole's ``Trainer.fit``.

        SIGTERM and Ctrl-C end it where a resume can begin: they wait for a checkpoint that is being written.
        """
        self._train_data, self._saves = train_data, saved
        if "learned" in self.model.options.blocks and valid_data:
            self.stopping_step = patience(self, len(train_data) * int(self.config["eval_step"]), verbose)
        try:
            with self._interruption:
                if self.config["resume_from"] and not self._epochs_done:
                    self.resume_checkpoint(self.config["resume_from"])
                return self._fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        except (KeyboardInterrupt, SystemExit):
            last = last_file(self.saved_model_file)
            if saved and os.path.isfile(last):
                self.logger.warning("Stopped. To go on: %s", command_to_resume(last, self.config))
            raise

    def _fit(
        self, train_data: Any, valid_data: Any, verbose: bool, saved: bool, show_progress: bool, callback_fn: Any
    ) -> tuple[float, dict[str, float] | None]:
        model = self.model
        validation = self.validation(valid_data, train_data._dataset)
        refuse_without_means(model, validation)
        if model.history.ranks is not None and valid_data:
            model.remember_later(train_data._dataset.training_ranks(valid_data._dataset))
            if verbose:
                getLogger().info(
                    "order TO: at test a user's history is the training and validation items, as for sequential models"
                )

        if "learned" not in model.options.blocks:
            self.eval_collector.data_collect(train_data)
            model.eval()
        with quietly(not verbose):
            given, validation = settled_choices(self.config, model, validation, self._tables.agree)
            self._chooses = given is None
            towers: Callable[[], LinearBlock] = partial(
                self.train_towers, train_data, valid_data, verbose, show_progress, callback_fn
            )
            if model.options.finetune is not None and validation is not None:
                towers = towers_of_tuned_encoder(self, train_data, valid_data, validation, towers)
            data = model.training_data()
            always: dict[str, Any] = {"rank_all_cold": model.gives_probabilities, "agree": self._tables.agree}
            if given is None:
                model.fitted = fit(data, validation, model.options, towers, start=model.fitted, **always)
                model.chosen = chosen_of(model.fitted, data, self._best_epochs, model.tower_choice, model.signals)
            else:
                self.epochs = given.epochs if given.block("learned") else 0
                if given.towers not in (None, model.tower_choice):  # a resumed run has them
                    model.take_towers(given.towers)
                    self._take_parameters()
                model.chosen, model.fitted = given, refit(data, given, model.options, towers, **always)
        score, result = self.best_valid_score, None
        if valid_data:
            score, result = self._valid_epoch(valid_data, show_progress=show_progress)
            if verbose:
                getLogger().info(set_color("whole model: valid result", "blue") + ": \n" + dict2str(result))
            self.best_valid_result = result
        if saved:
            self._save_whole_model(verbose)
        if verbose:
            left_out, unplaced = model.never_shown()
            for line in never_shown(left_out, unplaced, train_data._dataset.unread_items()):
                getLogger().info(line)
        return score, result

    def train_towers(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> LinearBlock:
        """Train the learned block in RecBole's loop, each epoch validated by it alone, and give its best state."""
        model, saved = self.model, self._saves
        if verbose and (advice := self._tables.describe() or advice_of(self.config, model, self.device)):
            getLogger().info(advice)
        model.fitted = None
        chooses = self._chooses and not self._epochs_done and model.tower_choice is None
        if chooses and choose(self, self.validation(valid_data, train_data._dataset)):
            self._take_parameters()
        kept = None if saved else BestState(self, callback_fn)
        super().fit(train_data, valid_data, verbose, saved, show_progress, kept or callback_fn)
        self._restore_random_state()
        self._save_last()
        self._interruption.allow()
        self._best_epochs = self._epochs_done if kept is None else kept.restore(self._epochs_done)
        if saved and os.path.isfile(self.saved_model_file):
            best = self._tables.read(self.saved_model_file)
            model.load_state_dict(best["state_dict"])
            self._best_epochs = best["epoch"] + 1
        model.eval()
        return model.towers.block()

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Evaluate as ``Trainer.evaluate`` does; split by time, the test's histories hold validation's items."""
        if not eval_data:
            return None
        self._tables.reject_evaluation(self, eval_data)
        if load_best_model:
            file = model_file or self.saved_model_file
            state = self._tables.read(file)
            self.model.load_state_dict(state["state_dict"])
            self.model.load_other_parameter(state["other_parameter"])
            self.logger.info(f"Loading model structure and parameters from {file}")
        self.model.at_test = getattr(getattr(eval_data, "_sampler", None), "phase", None) == "test"
        try:
            return super().evaluate(eval_data, False, None, show_progress)
        finally:
            self.model.at_test = False

    def _take_parameters(self) -> None:
        """Train the parameters that the model has now."""
        self.optimizer = self._build_optimizer()
        self._parameters = list(self.model.parameters())
        self._tables.begin()

    def validation(self, valid_data: Any, train_split: Any = None) -> Validation | None:
        """Return the data that choices are made by, if there are some; ``train_split`` says what users have seen."""
        return validation_of(self.config, self.model, valid_data, train_split)

    # ------------------------------------------------------------------ an epoch

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float:
        """Pass once over ``train_data`` and return the sum of its batches' losses, added up on the device."""
        self._restore_random_state()
        if epoch_idx > self.start_epoch or not epoch_idx:
            self._save_last_now_and_then()
        self.model.train()
        loss_func = loss_func or self.model.calculate_loss
        description = set_color(f"Train {epoch_idx:>5}", "pink")
        batches = train_data
        if show_progress:
            batches = progress_bar(train_data, total=len(train_data), ncols=100, desc=description)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for step, interaction in enumerate(batches, 1):
            if self.device.type != "cpu":
                interaction = interaction.to(self.device)
            total += self._step(interaction, loss_func)
            if step % STEPS_PER_CHECK == 0:
                self._check_nan(total)
            if self.gpu_available and show_progress:
                batches.set_postfix_str(set_color("GPU RAM: " + get_gpu_usage(self.device), "yellow"))
        total = distributed.sum_over_ranks(total)
        self._check_nan(total)
        self._epochs_done = epoch_idx + 1
        return float(total)

    def _step(self, interaction: Any, loss_func: Any) -> Tensor:
        """Update once and return this process's share of the batch's loss, detached."""
        for parameter in self._parameters:  # as the optimizer's zero_grad, whose bookkeeping takes ten times as long
            parameter.grad = None
        share = self._share_of_batch(interaction)
        if len(interaction[self.model.USER_ID]):
            with self._precision():
                loss = loss_func(interaction)
            loss = loss if share is None else loss * share
            self.scaler.scale(loss).backward()
        else:
            loss = torch.zeros((), device=self.device)
        if share is not None:
            distributed.sum_gradients(self.model.parameters())
        if self.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)  # the limit is meant for the gradients, not for their scaled copies
            self._tables.clip_gradients(**self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self._tables.of_epoch(loss.detach())

    def _share_of_batch(self, interaction: Any) -> Tensor | None:
        """Return the part of the batch's terms that this process has; ``None`` for one process.

        The loss is a mean over the targets of a batch of users, or over a batch of interactions.
        """
        if not distributed.active():
            return None
        users = interaction[self.model.USER_ID]  # shared negatives make an Interaction longer than its rows
        terms = torch.tensor(float(len(users)), device=self.device)
        if self.model.options.trains_on_users and len(users):
            terms = self.model.history.sizes[users].sum().float()
        return self._tables.share_of_batch(users, terms)

    @property
    def _amp_dtype(self) -> torch.dtype:
        """Choose float16 if losses are scaled (``enable_scaler``), otherwise bfloat16, which needs no scaling."""
        return torch.float16 if self.enable_scaler else torch.bfloat16

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.enable_amp:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._amp_dtype)

    def _check_nan(self, loss: Tensor) -> None:
        if torch.isnan(loss):
            raise ValueError(
                f"Training loss is nan, in epoch {self._epochs_done}. Lower learning_rate or set clip_grad_norm; "
                "the checkpoints hold the epochs before it."
            )

    # ------------------------------------------------------------------ checkpoints

    def _state(self, epoch: int) -> dict[str, Any]:
        history = self.model.history
        return {
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": plain(self.best_valid_result),
            "train_loss_dict": plain(self.train_loss_dict),
            "state_dict": dict(self.model.state_dict()),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_states": distributed.gather_objects(
                random_state(None if self._train_data is None else self._train_data.generator)
            ),
            "data": data_fingerprint(history.offsets, history.ids),
        }

    def _write(self, file: str, state: dict[str, Any]) -> None:
        """Write on one process of each machine; the others wait until the file is there."""
        writes = self.config["local_rank"] in (None, 0)
        with self._interruption.held():
            state = self._tables.whole(state, file, writes)
            if writes:
                write_checkpoint(file, state, self.config)
        distributed.barrier()

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """Write the best state. Epoch -1, for which RecBole has trained nothing, is written only if there is no checkpoint."""
        file = kwargs.pop("saved_model_file", self.saved_model_file)
        if epoch < 0 and os.path.isfile(file):
            return
        self._write(file, self._state(epoch))
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {file}")

    def _save_last(self) -> None:
        """Write the state after ``_epochs_done`` epochs."""
        if self._saves:
            self._write(last_file(self.saved_model_file), self._state(self._epochs_done - 1))
            self._last_written = time.monotonic()

    def _save_last_now_and_then(self) -> None:
        """Write the state if the last write is long ago or a signal waits; otherwise hold signals until the next call."""
        if not self._saves:
            return
        waited = self._last_written is None or time.monotonic() - self._last_written >= SECONDS_BETWEEN_CHECKPOINTS
        if any(distributed.gather_objects(waited or self._interruption.waiting)):
            self._save_last()
            self._interruption.allow()
        else:
            self._interruption.postpone()

    def _save_whole_model(self, verbose: bool) -> None:
        """Write the fitted score into the best checkpoint, or into one of its own if no epoch made one."""
        LLMTwoTowerTrainer.last_saved = self.saved_model_file
        if not os.path.isfile(self.saved_model_file):
            self._save_checkpoint(-1, verbose=verbose)
            return
        state = self._tables.read(self.saved_model_file, "cpu")
        distributed.barrier()  # every process has read it
        fitted: dict[str, Any] = {"other_parameter": self.model.other_parameter()}
        if self.model.tuned is not None:  # its towers were trained beyond their best epoch
            fitted["state_dict"] = dict(self.model.state_dict())
        self._write(self.saved_model_file, {key: state[key] for key in self._state(-1)} | fitted)
        remove_state(self.saved_model_file)

    def resume_checkpoint(self, resume_file: str | os.PathLike[str]) -> None:
        """Take over a checkpoint: ``*-last.pth`` to go on as if never stopped, or the best epoch's ``*.pth``.

        Args:
            resume_file: the file. New checkpoints take its name.

        Raises:
            ValueError: if the file is damaged, not ours, or of other data or another shape of model.
        """
        file = str(resume_file)
        state = self._tables.read(file)
        history = self.model.history
        if state["data"] != data_fingerprint(history.offsets, history.ids):
            raise ValueError(
                f"resume_from: {file!r} was trained on other interactions than this run's training split. Give it the data, "
                "the split and the seed it was written under; recbole-llm run --resume takes them from the checkpoint."
            )
        try:
            self.model.load_state_dict(state["state_dict"])
            if self._parameters[0] is not next(self.model.parameters()):  # of other towers than the options'
                self._take_parameters()
            self.optimizer.load_state_dict(state["optimizer"])
            self.model.load_other_parameter(state["other_parameter"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except WRONG_CONTENTS as error:
            raise ValueError(
                f"resume_from: {file!r} holds a model of another shape ({error}). Keep the options that it was written under; "
                "recbole-llm run --resume takes them from the checkpoint."
            ) from error
        self.start_epoch = self._epochs_done = state["epoch"] + 1
        self.cur_step, self.best_valid_score = state["cur_step"], state["best_valid_score"]
        self.best_valid_result, self.train_loss_dict = state["best_valid_result"], state["train_loss_dict"]
        self._take_file(file)
        states = state["random_states"]
        if len(states) == distributed.world_size():
            self._random_state = states[distributed.rank()]
        else:
            self.logger.warning("The checkpoint is of %d processes: random numbers start afresh.", len(states))
        self.logger.info("Checkpoint loaded. Resume training from epoch %d", self.start_epoch)
        if self.cur_step > self.stopping_step:
            self.logger.info("Its training had stopped early.")
            self.start_epoch = max(self.epochs, self.start_epoch)

    def _take_file(self, file: str) -> None:
        self.saved_model_file = best_file(file)
        if self.best_valid_result is not None and not os.path.isfile(self.saved_model_file):
            raise ValueError(
                f"resume_from: the file of the best epoch, {self.saved_model_file!r}, is not beside {file!r}. Put it there."
            )
        if distributed.rank() == 0:
            for name in (self.saved_model_file, last_file(self.saved_model_file)):
                remove_leftovers(name)

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state, self._train_data.generator)
            self._random_state = None
