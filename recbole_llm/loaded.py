"""A trained model in a program: recommendations as DataFrames, vectors as NumPy arrays, the reasons of a score.

    model = recbole_llm.load("saved")
    model.recommend(users=["196", "22"], k=5)
    ids, vectors = model.item_vectors()

Neither torch nor RecBole is imported here; a checkpoint loads both when it is opened, an export neither.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recbole_llm.atomic import atomic_path
from recbole_llm.export.errors import UnknownItemError, UnknownUserError
from recbole_llm.export.pooling import Pooling, Query
from recbole_llm.export.reader import Export
from recbole_llm.identifiers import ids_of
from recbole_llm.profiles import Profile, recommend_profiles
from recbole_llm.recommend import (
    Row,
    check_output,
    names,
    open_model,
    recommend_items,
    recommend_text,
    recommend_users,
    rows_of,
    similar_items,
)
from recbole_llm.retrieval.alike import alike
from recbole_llm.retrieval.near_ids import unknown_ids
from recbole_llm.retrieval.rules import NO_RULES, Rules

if TYPE_CHECKING:
    import pandas

FORMATS = (".npz", ".parquet", ".csv")
SIDES = ("target", "source")
EXPLAINED = ("item", "title", "contribution")
ROWS_AT_ONCE = 1 << 14  # of a Parquet file


class Vectors(NamedTuple):
    """Vectors with the ids of their rows.

    Attributes:
        ids: ``n`` external ids.
        vectors: ``[n, D]`` float32.
    """

    ids: list[str]
    vectors: np.ndarray


class LoadedModel:
    """A trained model, ready to answer; :func:`load` makes one.

    Attributes:
        export: its tables, as ``recbole-llm export`` would write them.

    Example:
        >>> model = load(folder)  # of checkpoints, or an export
        >>> best = model.recommend(users=["u1"], k=3)
        >>> [(row.user, row.rank) for row in best.itertuples()]
        [('u1', 1), ('u1', 2), ('u1', 3)]
        >>> len(model.recommend(items=["i3", "i7"], k=5)), len(model.similar("i3", k=2))
        (5, 2)
        >>> list(model.explain("i5", user="u1").columns)
        ['item', 'title', 'contribution']
        >>> ids, items = model.item_vectors(bias=True)
        >>> scores = model.user_vectors(["u1", "u2"], bias=True).vectors @ items.T
        >>> scores.shape == (2, len(ids)), scores.dtype
        (True, dtype('float32'))
    """

    def __init__(self, export: Export) -> None:
        self.export = export

    def __repr__(self) -> str:
        items, users = len(self.export.item_ids), len(self.export.user_ids)
        return f"<LoadedModel: {items} items, {users} users, {self.export.manifest.dim} dimensions>"

    # ------------------------------------------------------------------ answers

    def recommend(
        self,
        users: str | int | Iterable[str | int] | None = None,
        *,
        items: Iterable[str | int] | None = None,
        text: str | None = None,
        profiles: Sequence[Profile] | None = None,
        k: int = 10,
        by: str = "both",
        include_seen: bool = False,
        skip_unknown: bool = False,
        rules: Rules = NO_RULES,
    ) -> "pandas.DataFrame":
        """Recommend items to users of the training data, to somebody who likes ``items``, by profiles, or for a text.

        Args:
            users: ids, or one id. Without ``users``, ``items``, ``profiles`` and ``text``: every user.
            items: ids of items that a new user likes; oldest first where the model weighs histories by recency.
            text: what a new user asks for, in words.
            profiles: of new users, of a model with ``text`` in ``user_tower``: texts, or mappings of columns of the ``.user`` file
                to values. Their rows are called ``profile 1``, ``profile 2`` and so on.
            k: items per user; fewer come where fewer are allowed.
            by: how a text is answered: by ``likeness``, by ``chance`` (what buyers of the likest items bought), or by ``both``.
            include_seen: whether items of the history may be recommended again.
            skip_unknown: leave unknown ids out instead of raising, those of ``rules`` too.
            rules: which items may appear, and what moves them.

        Returns:
            A row for each recommended item, best first, with the columns of :class:`recbole_llm.recommend.Row`; a probability
            is NaN where there is none. Printed on a terminal, it has all columns, and titles that do not fit end in an ellipsis.

        Raises:
            ValueError: if more than one of ``users``, ``items``, ``profiles`` and ``text`` is given, an id is unknown, ``k`` is
                below 1, the model reads no profiles, or ``by`` is unknown, given without a text, or cannot be had of a model
                without content.
        """
        asked = {"users": users, "items": items, "profiles": profiles, "text": text}
        given = [name for name, value in asked.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given; give one of users, items, profiles and text, or none for all users."
            )
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1.")
        rules = self._named(rules, None if skip_unknown else " skip_unknown=True leaves them out.")
        if text is not None:
            return _frame(rows_of(recommend_text(self.export, text, k=k, by=by, rules=rules), text))
        if by != "both":
            raise ValueError(f"by is {by!r}, which says how a text is answered; give text, or leave by out.")
        if profiles is not None:
            answers = recommend_profiles(self.export, profiles, k=k, rules=rules)
            return _frame(row for n, answer in enumerate(answers, 1) for row in rows_of(answer, f"profile {n}"))
        if items is not None:
            liked = ids_of("items", items)
            try:
                answer = recommend_items(
                    self.export, liked, k=k, exclude_seen=not include_seen, skip_unknown=skip_unknown, rules=rules
                )
            except UnknownItemError as error:
                raise _unknown("items", error) from error
            return _frame(rows_of(answer, ",".join(liked)))
        wanted = None if users is None else ids_of("users", users)
        try:
            rows = recommend_users(
                self.export, wanted, k=k, exclude_seen=not include_seen, skip_unknown=skip_unknown, rules=rules
            )
            return _frame(rows)
        except UnknownUserError as error:
            raise _unknown("users", error, "For a new user give items.") from error

    def similar(self, item: str | int, *, k: int = 10, by: str = "both", rules: Rules = NO_RULES) -> "pandas.DataFrame":
        """Find the items most like one.

        Args:
            item: its id.
            k: how many.
            by: ``likeness`` of content, ``chance`` (what buyers of the item bought), or ``both``.
            rules: which items may appear, and what moves them.

        Returns:
            A row for each item, likest first, as :meth:`recommend`; ``user`` holds the item's id, ``score`` the likeness.

        Raises:
            ValueError: if no item has the id, ``k`` is below 1, ``by`` is unknown or cannot be had of a model without content, or
                a rule does not fit the items.
        """
        (item_id,) = ids_of("item", item)
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1.")
        rules = self._named(rules)
        try:
            return _frame(rows_of(similar_items(self.export, item_id, k=k, by=by, rules=rules), item_id))
        except UnknownItemError as error:
            raise _unknown("item", error) from error

    def explain(
        self, item: str | int, *, user: str | int | None = None, items: Iterable[str | int] | None = None
    ) -> "pandas.DataFrame":
        """Take the score of one item apart into what each item of the history adds to it.

        Args:
            item: the item whose score is explained.
            user: id of a user of the training data.
            items: instead of ``user``, ids of the items that a new user likes; oldest first where the model weighs histories
                by recency.

        Returns:
            item, title and contribution, largest contribution first. The last rows have no item: what the order of the history
            adds, where a block reads it, what the user brings beside the history, and the item's bias. The contributions add
            up to the score, to float32 rounding. Where several modalities describe the items, a column of each, such as
            alike_text and alike_image, holds the cosine of the two items' content, NaN where one of them has none.

        Raises:
            ValueError: if not exactly one of ``user`` and ``items`` is given, or an id is unknown.
        """
        from recbole_llm.answer_frame import AnswerFrame

        if (user is None) == (items is None):
            raise ValueError("give either user or items: whose score is to be explained.")
        (target,) = self._rows("item", item)
        if user is not None:
            (row,) = self._user_rows(user)
            history, query = self._of_user(row)
        else:
            liked = self._rows("items", items)[::-1]  # of repeats the last counts, as in an answer
            history = np.array(list(dict.fromkeys(liked))[::-1], np.int64)
            query = self._of_items(history)
        export, vector = self.export, self.export.vector[[target]]
        added = self._pooling.contributions(query, vector, np.array([target]))[0]
        order = np.argsort(-added, kind="stable")
        direct = float(query.adds[query.touched == target].sum())
        own = float((vector[0].astype(np.float64) @ query.vector) + direct - added.sum())
        of_order = self._pooling.of_order(query, vector)
        rows = [(export.item_ids[at], export.records[at].title, value) for at, value in
                zip(history[order].tolist(), added[order].tolist(), strict=True)]  # fmt: skip
        if of_order is not None:
            rows.append(("", "order of the history", float(of_order[0])))
            own -= float(of_order[0])
        rows += [("", "beside the history", own), ("", "bias of the item", float(export.bias[target]))]
        frame = AnswerFrame(rows, columns=list(EXPLAINED))
        if len(export.content) > 1:
            shared = [*alike(export.content, target, history[order].tolist()), *[{}] * (len(rows) - len(history))]
            for name in export.content:
                frame[f"alike_{name}"] = [cosines.get(name, float("nan")) for cosines in shared]
        return frame

    # ------------------------------------------------------------------ vectors

    def item_vectors(self, *, side: str = "target", bias: bool = False) -> Vectors:
        """Return the vectors of all items.

        Args:
            side: ``target`` for w_i, what a score multiplies by a user's vector; ``source`` for v_j, what an item of a history
                contributes to it.
            bias: append b_i as a last column. With ``user_vectors(bias=True)``, ``users @ items.T`` is then the score. An item
                that has no place in answers has bias minus infinity.

        Returns:
            Ids and ``[N, D]`` float32, or ``[N, D + 1]``.

        Raises:
            ValueError: on another side, a bias for sources, or a bias where vectors alone give no score.
        """
        if side not in SIDES:
            raise ValueError(f"side is {side!r}; expected one of {', '.join(SIDES)}.")
        if bias and side == "source":
            raise ValueError("bias belongs to targets; leave it out for side='source'.")
        if bias:
            self._refuse_direct()
        export = self.export
        vectors = np.array(export.vector if side == "target" else export.source, np.float32)
        if bias:
            column = np.where(export.listed, export.bias, np.float32(-np.inf)).astype(np.float32)
            vectors = np.concatenate([vectors, column[:, None]], axis=1)
        return Vectors(list(export.item_ids), vectors)

    def user_vectors(self, ids: str | int | Iterable[str | int] | None = None, *, bias: bool = False) -> Vectors:
        """Return the vectors q_u of users, made from their histories.

        Args:
            ids: ids, or one id; ``None`` for every user.
            bias: append a column of ones, as :meth:`item_vectors` says.

        Returns:
            Ids in the order given and ``[n, D]`` float32, or ``[n, D + 1]``.

        Raises:
            ValueError: if an id is unknown, or a column of ones is asked for where vectors alone give no score.
        """
        if bias:
            self._refuse_direct()
        rows = np.arange(len(self.export.user_ids)) if ids is None else np.array(self._user_rows(ids), np.int64)
        vectors = np.ones((len(rows), self.export.manifest.dim + bias), np.float32)
        for at, row in enumerate(rows.tolist()):
            vectors[at, : self.export.manifest.dim] = self._of_user(row)[1].vector
        return Vectors([self.export.user_ids[row] for row in rows.tolist()], vectors)

    # ------------------------------------------------------------------ rows

    def _named(self, rules: Rules, way_out: str | None = "") -> Rules:
        """Rules with ids as text; with a ``way_out``, one that no item has raises ``ValueError``: an answer would not tell."""
        given: dict[str, Any] = {n: ids_of(n, ids) for n in ("exclude", "only") if (ids := getattr(rules, n))}
        for name, ids in given.items():
            if way_out is not None and (unknown := [item_id for item_id in ids if item_id not in self._item_row]):
                asked = unknown_ids(unknown, self._item_row)
                raise ValueError(f"rules: {name}: no item of the training data has the id {asked}.{way_out}")
        return replace(rules, **given)

    def _refuse_direct(self) -> None:
        """Raise ``ValueError`` where a score is more than a product of vectors."""
        if self.export.direct:
            raise ValueError(
                "bias: a score of this model is no product of vectors alone, as direct rows between items add to it. Leave bias "
                "out for the vectors, and call recommend for scores."
            )

    @cached_property
    def _pooling(self) -> Pooling:
        return Pooling.of(self.export)

    @cached_property
    def _item_row(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.export.item_ids)}

    @cached_property
    def _user_row(self) -> dict[str, int]:
        return {user_id: row for row, user_id in enumerate(self.export.user_ids)}

    def _rows(self, argument: str, ids: Any) -> list[int]:
        return _found(argument, ids_of(argument, ids), self._item_row, "item")

    def _user_rows(self, ids: Any) -> list[int]:
        return _found("users", ids_of("users", ids), self._user_row, "user")

    def _of_user(self, row: int) -> tuple[np.ndarray, Query]:
        """The rows of a user's history and the query it makes."""
        export = self.export
        span = slice(*export.history_offsets[row : row + 2])
        history = export.history_items[span].astype(np.int64)
        part = export.part_of(row)
        ranks = None if export.history_rank is None else export.history_rank[span]
        weight, disliked = export.history_weight[span], export.disliked_of(row)
        return history, self._pooling.query(export.source[history], weight, part, ranks, history, disliked)

    def _of_items(self, history: np.ndarray) -> Query:
        """The query of a new user's history, oldest first."""
        ranks = np.arange(len(history) - 1, -1, -1, dtype=np.float32)
        decay = self.export.manifest.history_decay
        times = np.ones(len(history), np.float32) if decay is None else np.exp(-ranks / np.float32(decay))
        return self._pooling.query(self.export.source[history], times, None, ranks, history)


def load(
    path: str | Path,
    *,
    data_path: str | Path | None = None,
    texts: bool = True,
    encoder: str | None = None,
    item_features_file: str | Path | None = None,
    item_modalities: str | Mapping[str, Any] | None = None,
    feature_cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Open a trained model.

    Args:
        path: a checkpoint that ``recbole-llm run`` saved, a folder of checkpoints, of which the newest counts, or the folder
            that ``recbole-llm export`` wrote. No code in the file is run.
        data_path: for a checkpoint, the folder that holds the dataset's folder; ``None`` where the training was given none.
        texts: for a checkpoint, whether texts are to be asked about; without them it opens sooner.
        encoder: folder, name on the hub or ``module:function`` of the text encoder; needed for an export that does not hold its
            own, and for a checkpoint that was trained with a folder or a function.
        item_features_file: for a checkpoint that was trained with one.
        item_modalities: for a checkpoint whose pictures were encoded by a folder, a file or a function.
        feature_cache_dir: for a checkpoint, where vectors of texts are kept.

    Returns:
        The model.

    Raises:
        ValueError: if there is nothing at ``path``, it cannot be read, or a path must be given again.

    Example:
        >>> ids, vectors = load(folder).item_vectors()
        >>> len(ids) == len(vectors), vectors.dtype
        (True, dtype('float32'))
    """
    return LoadedModel(
        open_model(
            path,
            data_path=data_path,
            texts=texts,
            encoder=encoder,
            item_features_file=item_features_file,
            item_modalities=item_modalities,
            feature_cache_dir=feature_cache_dir,
        )
    )


def write_vectors(found: Vectors, path: str | Path) -> None:
    """Write vectors with their ids; the file appears whole or not at all.

    Args:
        found: what to write.
        path: its ending tells the format. ``.npz`` holds the arrays ``ids`` and ``vectors``, ``.parquet`` the columns ``id`` and
            ``vector`` (a list of D float32), ``.csv`` a column for each dimension, with digits enough for every float32.

    Raises:
        ValueError: on another ending.
        ModuleNotFoundError: for Parquet without pyarrow.
    """
    path = check_output(path, FORMATS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez(file, ids=np.array(found.ids, dtype=str), vectors=found.vectors)
        elif path.suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as lines:
                writer = csv.writer(lines)
                writer.writerow(["id", *(f"v{d}" for d in range(found.vectors.shape[1]))])
                for id_, vector in zip(found.ids, found.vectors, strict=True):
                    writer.writerow([id_, *(f"{value:.9g}" for value in vector.tolist())])
        else:
            _write_parquet(found, temporary)


def _write_parquet(found: Vectors, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    D = found.vectors.shape[1]
    schema = pyarrow.schema([("id", pyarrow.string()), ("vector", pyarrow.list_(pyarrow.float32(), D))])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for at in range(0, len(found.ids), ROWS_AT_ONCE):
            flat = pyarrow.array(found.vectors[at : at + ROWS_AT_ONCE].reshape(-1))
            ids = pyarrow.array(found.ids[at : at + ROWS_AT_ONCE], pyarrow.string())
            vectors = pyarrow.FixedSizeListArray.from_arrays(flat, D)
            writer.write_table(pyarrow.Table.from_arrays([ids, vectors], schema=schema))


def _found(argument: str, ids: Sequence[str], rows: dict[str, int], kind: str) -> list[int]:
    if unknown := [id_ for id_ in ids if id_ not in rows]:
        raise ValueError(f"{argument}: no {kind} of the training data has the id {names(unknown)}.")
    return [rows[id_] for id_ in ids]


def _unknown(argument: str, error: LookupError, way_out: str = "") -> ValueError:
    kind = "user" if argument == "users" else "item"
    skip = "" if argument == "item" else " skip_unknown=True leaves them out."
    return ValueError(f"{argument}: no {kind} of the training data has the id {error}.{skip} {way_out}".strip())


def _frame(rows: Iterable[Row]) -> "pandas.DataFrame":
    from recbole_llm.answer_frame import AnswerFrame

    columns = list(Row.__annotations__)
    frame = AnswerFrame([tuple(vars(row).values()) for row in rows], columns=columns)
    numbers = {"rank": "int64", "score": "float64", "probability": "float64", "cold": "bool"}
    return frame.astype(numbers)
