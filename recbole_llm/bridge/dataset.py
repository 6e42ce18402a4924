"""RecBole's dataset with the content of its items and users: raw text read from the atomic files, vectors from the store."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.data.interaction import cat_interactions

from recbole_llm.bridge.item_media import (
    centre_of_questions,
    column_tables,
    files_of_items,
    media_table,
    question_encoder,
)
from recbole_llm.bridge.option_values import ModalitySource
from recbole_llm.bridge.options import Options
from recbole_llm.bridge.preloaded import preloaded_vectors
from recbole_llm.bridge.repairs.labels import NEGATIVES
from recbole_llm.bridge.tuned_content import TUNED, TunedContent, options_of, take_tuned
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, FeatureTable, apply_transform, encode_texts, load_features
from recbole_llm.content.media.files import ItemFiles
from recbole_llm.content.store.vector_files import AtomicForm
from recbole_llm.content.text import AtomicTable, choose_text_fields, read_atomic_table, texts_of_tokens
from recbole_llm.scoring.rows import Rows, rows_from_pairs

_CONTENT = ("_item_features", "_user_features", TUNED)
_LATER = "_later_splits"


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave every random stream as found: a run that encodes and a run that reads the cache must train alike."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _positives(split: Dataset) -> Any:
    """The interactions of a split but those of label 0, which labelled evaluation leaves in it."""
    inter, label = split.inter_feat, split.label_field
    return inter[inter[label] > 0] if label in inter else inter


def _negatives(split: Dataset) -> Iterator[Any]:
    """The interactions of label 0 of a split, in it or taken out of it."""
    taken = getattr(split, NEGATIVES, None)
    if taken is not None:
        yield taken
    inter, label = split.inter_feat, split.label_field
    if label in inter and bool((inter[label] <= 0).any()):
        yield inter[inter[label] <= 0]


def _joined(splits: list["LLMTwoTowerDataset"], count: int) -> list["LLMTwoTowerDataset"]:
    """Splits of which the first holds the interactions of the first ``count``, which are empty."""
    parts = splits[:count]
    whole = splits[0].copy(cat_interactions([_positives(part) for part in parts]))
    negatives = [part for split in parts for part in _negatives(split)]
    if negatives:
        setattr(whole, NEGATIVES, cat_interactions(negatives))
    empty = [part.copy(part.inter_feat[:0]) for part in parts[1:]]
    for part in empty:
        part.__dict__.pop(NEGATIVES, None)
    return [whole, *empty, *splits[count:]]


def _given(table: FeatureTable) -> FeatureTable:
    return table


class LLMTwoTowerDataset(Dataset):
    """``Dataset`` with ``item_features`` and ``user_features``: one :class:`FeatureTable` per modality.

    The tables are aligned to internal ids (row 0 is padding), made when first asked for and never pickled: a saved dataset
    stays small, and reading it back finds the vectors in the feature store.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in (*_CONTENT, _LATER)}

    def copy(self, new_inter_feat: Any) -> "LLMTwoTowerDataset":
        """Return a dataset with other interactions and the same content, which is shared."""
        content = {key: self.__dict__[key] for key in _CONTENT if key in self.__dict__}
        twin = super().copy(new_inter_feat)
        twin.__dict__.update(content)
        return twin

    def build(self) -> list["LLMTwoTowerDataset"]:
        """Split the dataset, as RecBole's ``Dataset.build`` does.

        Raises:
            ValueError: if they are to be ordered by a time column that was not read.
        """
        sorts = self.benchmark_filename_list is None and self.config["eval_args"]["order"] == "TO"
        if sorts and self.time_field not in self.inter_feat:
            read = ", ".join(map(str, self.inter_feat.columns))
            raise ValueError(
                f"eval_args.order TO sorts interactions by the column {self.time_field!r}, and of {self.dataset_name}.inter "
                f"{read} were read: add it to load_col.inter, or give the time column's name as TIME_FIELD."
            )
        splits = super().build()
        rows = options_of(self).refit_rows
        if rows is not None:
            splits = _joined(splits, {"valid": 2, "all": len(splits)}[rows])
        splits[0].__dict__[_LATER] = tuple(splits[1:])
        return splits

    def _normalize(self) -> None:
        """Scale columns to 0 .. 1 where RecBole is asked to, but for the weights: the least of them would be 0."""
        name = self.config["weight_field"]
        kept = self.inter_feat[name].copy() if name and name in self.inter_feat else None
        super()._normalize()
        if kept is not None:
            self.inter_feat[name] = kept

    @property
    def options(self) -> Options:
        """Our options; they name the fine-tuned encoder where there is one."""
        return options_of(self)

    def take_tuned(self, tuned: TunedContent | None) -> None:
        """Let the vectors be those of a fine-tuned encoder; ``None`` changes nothing."""
        take_tuned(self, tuned)

    def unread_items(self) -> int:
        """Items of the .item file that are none of this dataset's; 0 where there is no such file."""
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        if not path.is_file() or self.item_feat is not None:
            return 0
        separator, encoding = self.config["field_separator"], self.config["encoding"] or "utf-8"
        table = read_atomic_table(path, self.iid_field, separator=separator, encoding=encoding)
        return len(table.row_of.keys() - set(self._tokens(self.iid_field)))

    @property
    def later_splits(self) -> tuple["LLMTwoTowerDataset", ...] | None:
        """The splits of validation and test beside this training split; ``None`` where they are not at hand."""
        return self.__dict__.get(_LATER)

    @property
    def item_features(self) -> dict[str, FeatureTable]:
        """Vectors of the items by modality, text first; empty where ``encoder`` and ``item_features_file`` are empty."""
        if "_item_features" not in self.__dict__:
            self._item_features = self.item_vectors()
        return self._item_features

    def item_vectors(self, wanted: Sequence[str] | None = None) -> dict[str, FeatureTable]:
        """Make the vectors of the items by modality.

        Args:
            wanted: the modalities; ``None`` for all that are configured.

        Raises:
            ValueError: if a modality is configured twice, or its texts, files or encoder are not there.
        """
        options = options_of(self)
        makers: dict[str, Callable[[], FeatureTable]] = {}
        if options.text_encoder:
            fields, template = options.item_text_fields, options.item_text_template
            makers["text"] = lambda: self._encoded("item", self.iid_field, fields, template, options)
        tokens, form = self._tokens(self.iid_field), self._atomic_form()
        # text is the first kernel
        for name, path in sorted(options.feature_files.items(), key=lambda pair: pair[0] != "text"):
            makers[name] = partial(load_features, path, tokens, form=form)
        for name, source in (options.item_modalities or {}).items():
            if name in makers:
                raise ValueError(
                    f"item_modalities names an encoder of {name}, and item_features_file its vectors: give one of them."
                )
            makers[name] = partial(self._of_files, name, source, options)
        if options.item_columns:
            for name, table in column_tables(self, options.item_columns, tokens, options.item_modalities or {}).items():
                if name in makers:
                    raise ValueError(
                        f"item_features_file holds vectors of {name!r}, and item_columns makes them: give one of them."
                    )
                makers[name] = partial(_given, table)
        return {
            name: apply_transform(replace(make(), modality=name), options.feature_transform)
            for name, make in makers.items()
            if wanted is None or name in wanted
        }

    @property
    def user_features(self) -> dict[str, FeatureTable]:
        """Vectors of the users' own texts (``.user`` columns) by modality; no interaction enters them."""
        if "_user_features" not in self.__dict__:
            options = options_of(self)
            table = None if "text" not in options.user_tower else self.profile_vectors()
            self._user_features = {} if table is None else {"text": apply_transform(table, options.feature_transform)}
        return self._user_features

    def profile_vectors(self) -> FeatureTable | None:
        """Encode the users' own texts, as they come from the encoder; ``None`` without one."""
        options = options_of(self)
        if not options.encoder:
            return None
        return self._encoded("user", self.uid_field, options.user_text_fields, None, options)

    def profile_fields(self) -> tuple[str, ...]:
        """Return the columns of the ``.user`` file that make a user's text."""
        options = options_of(self)
        return choose_text_fields(self._text_table("user", self.uid_field, options), options.user_text_fields, None)

    def training_rows(self, decay: float | None = None, *later: Dataset) -> Rows:
        """Return the items of every user in this split, ``user_num`` rows in CSR form.

        Args:
            decay: tau of :func:`recbole_llm.scoring.rows.rows_from_pairs`, in positions; needs interactions ordered by time.
            later: later splits, whose interactions join the histories.

        Raises:
            ValueError: if ``decay`` is given and the split is not ordered by time, or has no time column.
        """
        time = None
        if decay is not None:
            if self.config["eval_args"]["order"] != "TO":
                raise ValueError(
                    "history_decay needs a split that is ordered by time, or later interactions would explain earlier ones: "
                    f"set eval_args.order to TO (it is {self.config['eval_args']['order']}), or leave history_decay empty."
                )
            if self.time_field not in self.inter_feat:
                raise ValueError(
                    f"history_decay needs the time column {self.time_field!r}: add it to load_col.inter, "
                    "or leave history_decay empty."
                )
            (time,) = self._columns(later, self.time_field)
        users, items = self._columns(later, self.uid_field, self.iid_field)
        return rows_from_pairs(users.long(), items.long(), self.user_num, time, decay, self._confidence(later))

    def training_ranks(self, *later: Dataset) -> Rows | None:
        """Return the items of every user in this split with their ranks; 0 is the newest.

        Args:
            later: later splits, whose interactions join the histories.

        Returns:
            ``user_num`` rows; ``None`` where the split is not ordered by time or has no time column.
        """
        if self.config["eval_args"]["order"] != "TO" or self.time_field not in self.inter_feat:
            return None
        users, items, time = self._columns(later, self.uid_field, self.iid_field, self.time_field)
        return rows_from_pairs(users.long(), items.long(), self.user_num, time, confidence=self._confidence(later))

    def training_times(self, history: Rows) -> torch.Tensor:
        """Look up when each entry of a history of this split was made, ``[nnz]`` float64, in the unit of the column.

        Args:
            history: from :meth:`training_ranks`. A repeated pair has its latest time.
        """
        users, items, time = self._columns((), self.uid_field, self.iid_field, self.time_field)
        key = users.long() * self.item_num + items.long()
        own = (history.row_of_entry() * self.item_num + history.ids).cpu()
        found = torch.full((len(own),), -torch.inf, dtype=torch.float64)
        return found.scatter_reduce(0, torch.searchsorted(own, key), time.double(), "amax")

    def _confidence(self, later: Sequence[Dataset]) -> torch.Tensor | None:
        """How much each interaction of this split and of later ones counts, 1 on average over this one's.

        Raises:
            ValueError: if the column that ``weight_field`` names was not read, or a weight is not above 0, of this split or of
                any later one: what cannot be a history need not be trained for.
        """
        name = self.config["weight_field"]
        if not name:
            return None
        if name not in self.inter_feat:
            read = ", ".join(map(str, self.inter_feat.columns))
            raise ValueError(
                f"weight_field is {name!r}, and of {self.dataset_name}.inter {read} were read: add it to load_col.inter, or leave "
                "weight_field empty."
            )
        (every,) = self._columns(self.later_splits or later, name)
        wrong = every[~((every > 0) & torch.isfinite(every))]
        if len(wrong):
            raise ValueError(
                f"weight_field {name!r}: a weight is above 0 and finite, and {self.dataset_name}.inter holds "
                f"{float(wrong[0]):g}. Leave such rows out, or give them label 0."
            )
        (weights,) = self._columns(later, name)
        (own,) = self._columns((), name)
        return (weights.double() / own.double().mean()).float()

    def negative_rows(self, *later: Dataset) -> Rows | None:
        """Items that users have seen and not liked: those of label 0, and of no positive of the same user.

        Args:
            later: later splits, whose interactions join.

        Returns:
            ``user_num`` rows; ``None`` where there is no such item.
        """
        found = [part for split in (self, *later) for part in _negatives(split)]
        if not found:
            return None
        users, items = (torch.cat([part[name] for part in found]).long() for name in (self.uid_field, self.iid_field))
        liked = [column.long() for column in self._columns(later, self.uid_field, self.iid_field)]
        fresh = ~torch.isin(users * self.item_num + items, liked[0] * self.item_num + liked[1])
        return rows_from_pairs(users[fresh], items[fresh], self.user_num) if bool(fresh.any()) else None

    def _columns(self, later: Sequence[Dataset], *names: str) -> tuple[torch.Tensor, ...]:
        """Columns of the positives of this split and of later ones."""
        parts = [_positives(split) for split in (self, *later)]
        return tuple(torch.cat([part[name] for part in parts]) for name in names)

    def picture_files(self) -> ItemFiles:
        """Find the pictures of the items, in internal order with padding.

        Raises:
            ValueError: if ``item_modalities`` names a column that the item file does not have.
        """
        source = (options_of(self).item_modalities or {}).get("image")
        return files_of_items(self, "image", source, self._tokens(self.iid_field))

    def picture_vectors(self) -> FeatureTable:
        """Vectors of the items' pictures; as :meth:`media_vectors`."""
        return self.media_vectors("image")

    def media_vectors(self, modality: str) -> FeatureTable:
        """Vectors of the items' files as their encoder gives them, without ``feature_transform``.

        Args:
            modality: ``image`` or ``audio``.

        Raises:
            ValueError: if no encoder of it is configured, or no file can be read.
        """
        options = options_of(self)
        source = (options.item_modalities or {}).get(modality)
        if source is None:
            raise ValueError(
                f"item_modalities names no encoder of {modality}, such as {{image: google/siglip2-base-patch16-224}}."
            )
        return self._of_files(modality, source, options)

    def raw_vectors(self, modality: str) -> FeatureTable:
        """Vectors of the items' texts, pictures or sounds, without ``feature_transform``; raises as :meth:`media_vectors`."""
        options = options_of(self)
        if modality != "text":
            return self.media_vectors(modality)
        if options.text_encoder is None:
            raise ValueError("The vectors of the items' texts were made elsewhere, and no encoder of them is known.")
        return self._encoded("item", self.iid_field, options.item_text_fields, options.item_text_template, options)

    def encoder_of(self, asked: str, compared: str) -> Any:
        """Load the encoder of questions; see :func:`recbole_llm.bridge.item_media.question_encoder`."""
        return question_encoder(self, options_of(self), asked, compared)

    def centre_of(self, asked: str, encoder: Any, most: int) -> torch.Tensor | None:
        """Centre of questions; see :func:`recbole_llm.bridge.item_media.centre_of_questions`."""
        return centre_of_questions(self, options_of(self), asked, encoder, most)

    def _of_files(self, modality: str, source: ModalitySource, options: Options) -> FeatureTable:
        """Vectors of the items' pictures or sounds; items without one are absent."""
        with _random_state_kept():
            return media_table(self, modality, source, self._tokens(self.iid_field), options.feature_cache_dir)

    def _atomic_form(self) -> AtomicForm:
        """How vectors stand in an atomic file: with RecBole's separators, in the columns that ``preload_weight`` names."""
        config = self.config
        named = None if config["item_features_file"] else preloaded_vectors(config)
        return AtomicForm(
            config["field_separator"],
            config["seq_separator"],
            config["encoding"] or "utf-8",
            None if named is None else named.id_field,
            None if named is None else named.vector_field,
        )

    def _tokens(self, field: str) -> list[str | None]:
        """External ids in internal order; ``None`` for padding."""
        return [None, *map(str, self.field2id_token[field][1:])]

    def _text_table(self, suffix: str, id_field: str, options: Options) -> AtomicTable:
        """Read the file of items or users whose columns make texts."""
        path = Path(self.dataset_path) / f"{self.dataset_name}.{suffix}"
        if not path.is_file():
            raise ValueError(
                f"{options.encoder!r} needs texts, and there is no {path.name} in {path.parent}. Add that file with a text column, "
                f"give {suffix}_features_file, or set encoder to empty for a model of IDs alone."
                if suffix == "item"
                else f"user_tower contains text, and there is no {path.name} in {path.parent}. Add it, or leave text out."
            )
        return read_atomic_table(
            path,
            id_field,
            separator=self.config["field_separator"],
            encoding=self.config["encoding"] or "utf-8",
            seq_separator=self.config["seq_separator"],
        )

    def _texts(
        self, suffix: str, id_field: str, fields: Sequence[str] | None, template: str | None, options: Options
    ) -> list[str | None]:
        log = getLogger()
        table = self._text_table(suffix, id_field, options)
        texts, report = texts_of_tokens(
            table, self._tokens(id_field), choose_text_fields(table, fields, template), template
        )
        for line in report.lines():
            log.info(line, extra={"content": True})
        return texts

    def item_texts(self) -> list[str | None]:
        """Read the items' texts in internal order; ``None`` for padding and where there is none."""
        options = options_of(self)
        return self._texts("item", self.iid_field, options.item_text_fields, options.item_text_template, options)

    def text_encoder(self) -> Any:
        """Load the encoder of texts that is configured."""
        options = options_of(self)
        return load_encoder(
            str(options.encoder),
            revision=options.encoder_revision,
            pooling=options.encoder_pooling,
            prompt=options.encoder_prompt,
            max_tokens=options.encoder_max_tokens,
            overflow=options.encoder_overflow,
            dim=options.encoder_dim,
            dtype=options.encoder_dtype,
            device=self.config["device"],
        )

    def _encoded(
        self, suffix: str, id_field: str, fields: Sequence[str] | None, template: str | None, options: Options
    ) -> FeatureTable:
        texts = self._texts(suffix, id_field, fields, template, options)
        with _random_state_kept():
            return encode_texts(
                texts,
                self.text_encoder(),
                FeatureStore(options.feature_cache_dir),
                batch_size=options.encoder_batch_size,
                show_progress=self.config["show_progress"],
            )
