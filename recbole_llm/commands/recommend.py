"""``recbole-llm recommend`` and ``recbole-llm similar``."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from recbole_llm.bridge.checkpoint_settings import add_history_argument, add_path_arguments, given_paths
from recbole_llm.commands.audience import add_audience_arguments, asks_for_users, needs_texts, run_audience
from recbole_llm.commands.model_argument import add_model_argument
from recbole_llm.commands.rule_arguments import add_rule_arguments, rules_of
from recbole_llm.export.errors import UnknownItemError, UnknownUserError
from recbole_llm.export.reader import Export
from recbole_llm.media import ASKED, MediaModel, open_media, recommend_media
from recbole_llm.pictures import recommend_picture
from recbole_llm.profiles import Profile, recommend_profile
from recbole_llm.recommend import (
    Counts,
    Row,
    check_output,
    names,
    newest_checkpoint,
    open_model,
    recommend_items,
    recommend_text,
    recommend_users,
    rows_of,
    similar_items,
    write_rows,
)
from recbole_llm.retrieval.answers import Recommendation
from recbole_llm.retrieval.near_ids import unknown_ids
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.retrieval.search import BY
from recbole_llm.terminal import columns_of, cut, filled, printable, terminal_columns
from recbole_llm.text_files import lines_of, separated

ITEMS = 10  # of an answer
SHOWN_NOTES = 5
MARGIN = 9  # columns of a line beside title, number and id: the rank and the blanks between


def _table(rows: Sequence[Row]) -> list[str]:
    """Format one user's recommendations as text lines.

    On a terminal, titles that are too long for its width end in an ellipsis; in a file or a pipe all are whole. Control
    characters are replaced.
    """
    titles = [printable(row.title) for row in rows]
    width = max([*map(columns_of, titles), 5])
    chances = all(row.probability is not None for row in rows)
    numbers = [f"{row.score:.3f}" if row.probability is None else f"{row.probability:.2%}" for row in rows]
    number = max([*map(len, numbers), 6])
    names = [
        printable(row.item) + (" (new)" if row.cold else "") + (f"  [{printable(row.rules)}]" if row.rules else "")
        for row in rows
    ]
    most = terminal_columns()
    if most is not None:
        width = max(min(width, most - number - max([*map(columns_of, names), 2]) - MARGIN), 5)
    lines = [f"{'':>3}  {'title':{width}}  {'chance' if chances else 'score':>{number}}  id"]
    for row, title, value, name in zip(rows, titles, numbers, names, strict=True):
        lines.append(f"{row.rank:>3}  {filled(cut(title, width), width)}  {value:>{number}}  {name}")
    return lines


def _ids(given: Sequence[str] | None, file: list[str] | None, known: Sequence[str]) -> list[str] | None:
    """The lines of a file, or what an option gives: a value that is an id stays whole, another is split at its commas."""
    if file is not None or given is None:
        return file
    return separated(given, set(known))


def _add_model(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_path_arguments(parser)
    add_history_argument(parser)


def _asked(options: argparse.Namespace) -> str | None:
    """The modality of the question; ``None`` where there is none."""
    return next((name for name in ASKED if getattr(options, name) is not None), None)


def _open_search(options: argparse.Namespace) -> Export | MediaModel:
    """The model that answers a question, or users and items; questions by an export's own means where these do."""
    asked = _asked(options)
    if options.within is not None and asked is None:
        raise ValueError(
            "--in belongs to --text, --image and --audio: it says what of the items they are compared with."
        )
    if asked is None or (asked != "audio" and options.within in (None, asked)):
        texts = asked == "text" or getattr(options, "profile", None) is not None
        model = _open(options, texts=texts, pictures=asked == "image")
        trained = newest_checkpoint(options.model) is not None or Path(options.model).is_file()
        if asked != "text" or "text" in model.content or "image" not in model.content or not trained:
            return model
        # a model of pictures alone may have an encoder that reads texts too
        options.within = "image"
    newest = newest_checkpoint(options.model)
    if newest is not None:
        _note(f"model: {newest}")
    found = open_media(
        newest or options.model,
        asked=str(asked),
        compared=options.within,
        history=options.history,
        **given_paths(options),
    )
    for line in (found.export.manifest.rows_known, *found.export.manifest.never_shown):
        _note(line)
    return found


def _open(options: argparse.Namespace, texts: bool, pictures: bool = False) -> Export:
    newest = newest_checkpoint(options.model)
    if newest is not None:
        _note(f"model: {newest}")
    log = logging.getLogger("recbole_llm.content.features")
    log.addFilter(_not_of_training)
    try:
        model = open_model(
            newest or options.model, texts=texts, pictures=pictures, history=options.history, **given_paths(options)
        )
    finally:
        log.removeFilter(_not_of_training)
    for line in (model.manifest.rows_known, *model.manifest.never_shown):
        _note(line)
    return model


def _not_of_training(record: logging.LogRecord) -> bool:
    """Leave out what the training's log has said of the items' texts."""
    return "encoder_max_tokens" not in record.msg


def _add_by(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument(
        "--by",
        choices=BY,
        default="both",
        help=f"{when}likeness alone, or chance: what buyers of the likest items bought, alone (default: likeness first, then "
        "chance)",
    )


def _add_in(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--in",
        dest="within",
        choices=ASKED,
        default=None,
        help="what of the items --text, --image or --audio is compared with, where one encoder holds both (CLIP, SigLIP, CLAP); of "
        "a checkpoint (default: the same)",
    )


def add_recommend_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm recommend``."""
    _add_model(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--users",
        nargs="+",
        action="extend",
        metavar="ID",
        help="users of the data set; commas separate too, unless the whole is an id or a part is in double quotes: "
        "'\"u1,x\",u2'; may be given again; without any of these: all of them",
    )
    who.add_argument("--users-file", metavar="FILE", help="the same, an id a line")
    who.add_argument(
        "--items",
        nargs="+",
        action="extend",
        metavar="ID",
        help="items that a new user likes; written as for --users",
    )
    who.add_argument("--items-file", metavar="FILE", help="the same, an id a line")
    who.add_argument("--text", help="what is asked for, in words")
    who.add_argument(
        "--profile",
        nargs="+",
        action="extend",
        metavar="COLUMN=VALUE",
        help="who a new user is, of a model with text in user_tower: columns of the .user file, or one text",
    )
    who.add_argument("--image", metavar="FILE", help="what is asked for, as a picture; of a model with pictures")
    who.add_argument("--audio", metavar="FILE", help="the same, as a sound; of a checkpoint with sounds")
    add_audience_arguments(parser, who)
    _add_in(parser)
    _add_by(parser, "with --text, --image and --audio: ")
    parser.add_argument("--k", type=int, default=None, help=f"items per user (default: {ITEMS})")
    parser.add_argument(
        "--include-new",
        type=int,
        default=0,
        metavar="N",
        help="at least N of a user's items are new ones, that nobody has had yet, in the last places if need be",
    )
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--skip-unknown", action="store_true", help="count unknown ids instead of stopping")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=".jsonl, .csv, .parquet or .xlsx (for Excel); without it a table on the terminal",
    )
    add_rule_arguments(parser)


def _rules(options: argparse.Namespace, model: Export) -> Rules:
    """The rules; ids that no item has are an error, or with ``--skip-unknown`` named."""
    rules = rules_of(
        options,
        model.manifest.attributes,
        lambda given, path: _ids(given, None if path is None else lines_of(path, "a file of items"), model.item_ids),
    )
    known = set(model.item_ids) if rules.exclude or rules.only else set()
    for name, ids in (("exclude", rules.exclude), ("only", rules.only or ())):
        strangers = [item for item in ids if item not in known]
        if strangers and not getattr(options, "skip_unknown", False):
            way_out = " --skip-unknown leaves them out." if hasattr(options, "skip_unknown") else ""
            raise ValueError(f"--{name}: no item has the id {names(strangers)}.{way_out}")
        if strangers:
            _note(f"unknown items of --{name} skipped: {len(strangers)} ({names(strangers)})")
    return rules


def run_recommend(options: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: as the functions above, on unknown ids, or where all users are asked for without an output.
    """
    audience = asks_for_users(options)
    options.k = ITEMS if options.k is None else options.k
    _check_numbers(options)
    if audience:
        return run_audience(options, _open(options, texts=needs_texts(options)))
    files = {
        name: None if path is None else lines_of(path, f"--{name}-file")
        for name, path in (("users", options.users_file), ("items", options.items_file))
    }
    given = [options.users, options.items, options.profile, _asked(options), *files.values()]
    if all(value is None for value in given) and not options.output:
        raise ValueError(
            "for all users give --output FILE; --users ID, --items ID, --profile, --text, --image or --audio prints a table."
        )
    searches = _asked(options) is not None
    if options.by != "both" and not searches:
        raise ValueError(
            f"--by {options.by} belongs to --text, --image and --audio; users and items are answered by chance."
        )
    opened = _open_search(options)
    model = opened.export if isinstance(opened, MediaModel) else opened
    users = _ids(options.users, files["users"], model.user_ids)
    items = _ids(options.items, files["items"], model.item_ids)
    for name, ids in (("users", users), ("items", items)):
        if ids is not None and not ids:
            raise ValueError(f"--{name} names no id.")
    rules = _rules(options, model)
    if items is not None or searches or options.profile is not None:
        return _answer_one(options, opened, items, rules)
    counts = Counts()
    rows = recommend_users(
        model,
        users,
        k=options.k,
        exclude_seen=not options.include_seen,
        skip_unknown=options.skip_unknown,
        counts=counts,
        include_new=options.include_new,
        rules=rules,
    )
    if options.output:
        _known(lambda: write_rows(_with_progress(rows, counts, len(users or model.user_ids)), options.output))
        print(f"{counts.rows} items for {counts.users} users written to {options.output}")
    else:
        for user, of_user in groupby(_known(lambda: list(rows)), lambda row: row.user):
            print(f"user {printable(user)}", *_table(list(of_user)), sep="\n")
    if counts.short:
        _note(f"users with fewer than {options.k} items, since no more may be recommended to them: {counts.short}")
    for note, n in counts.notes.most_common(SHOWN_NOTES):
        _note(f"{note} ({n} user{'s' if n > 1 else ''})")
    if counts.unknown:
        _note(f"unknown users skipped: {counts.unknown}")
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    if options.k < 1:
        raise ValueError(f"--k is {options.k}; expected at least 1.")
    if not 0 <= options.include_new <= options.k:
        raise ValueError(f"--include-new is {options.include_new}; expected 0 to {options.k} (--k).")
    others = (options.items, options.items_file, options.profile, _asked(options), options.for_item)
    if options.include_new and any(others):
        raise ValueError("--include-new belongs to --users: a list of items or a text is answered without it.")
    if options.output:
        check_output(options.output)


def _answer_one(
    options: argparse.Namespace, model: Export | MediaModel, items: Sequence[str] | None, rules: Rules
) -> int:
    if options.profile is not None and not isinstance(model, MediaModel):
        answer = recommend_profile(model, _profile(options.profile), k=options.k, rules=rules)
    elif items is None or isinstance(model, MediaModel):
        answer = _search(options, model, rules)
    else:
        asked = {"k": options.k, "exclude_seen": not options.include_seen, "skip_unknown": options.skip_unknown}
        answer = _known(lambda: recommend_items(model, items, rules=rules, **asked))
    rows = list(rows_of(answer, _question(options) if items is None else ",".join(items)))
    if options.output:
        write_rows(rows, options.output)
        print(f"{len(rows)} items written to {options.output}")
    else:
        print(*_table(rows), sep="\n")
    if answer.note:
        _note(answer.note)
    unknown = [item for item in answer.unknown if items is not None and item in items]  # those of rules are told above
    if unknown:
        _note(f"unknown items skipped: {len(unknown)} ({names(unknown)})")
    return 0


def _question(options: argparse.Namespace) -> str:
    profile = None if getattr(options, "profile", None) is None else " ".join(options.profile)
    return str(next(value for value in (profile, options.text, options.image, options.audio) if value is not None))


def _profile(given: Sequence[str]) -> Profile:
    """Columns with values where every part is one; else one text."""
    parts = [part.partition("=") for part in given]
    if all(equals and name.strip() for name, equals, _ in parts):
        names_given = [name.strip() for name, _, _ in parts]
        repeated = [name for name in names_given if names_given.count(name) > 1]
        if repeated:
            raise ValueError(f"--profile: {repeated[0]} is given more than once; give each column once.")
        return {name: value for name, (_, _, value) in zip(names_given, parts, strict=True)}
    if len(given) > 1:
        wrong = next(part for part, (_, equals, _) in zip(given, parts, strict=True) if not equals)
        raise ValueError(f"--profile: {wrong!r} is no COLUMN=VALUE; give columns with values, or one text in quotes.")
    return given[0]


def _search(options: argparse.Namespace, model: Export | MediaModel, rules: Rules = NO_RULES) -> Recommendation:
    """The answer to a text, a picture or a sound."""
    if isinstance(model, MediaModel):
        return recommend_media(model, _question(options), k=options.k, by=options.by, rules=rules)
    if options.image is not None:
        return recommend_picture(model, options.image, k=options.k, by=options.by, rules=rules)
    return recommend_text(model, options.text, k=options.k, by=options.by, rules=rules)


def _with_progress(rows: Iterator[Row], counts: Counts, total: int) -> Iterator[Row]:
    """The rows, with a progress bar of users on a terminal."""
    from recbole_llm.progress import progress_bar

    with progress_bar(total=total, unit="user", desc="Recommending", disable=None, dynamic_ncols=True) as bar:
        for row in rows:
            if row.rank == 1:
                bar.update(counts.users + counts.unknown - bar.n)
            yield row
        bar.update(counts.users + counts.unknown - bar.n)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _known(answer: Callable[[], Any]) -> Any:
    try:
        return answer()
    except UnknownUserError as error:
        raise ValueError(
            f"no user of the data has the id {error}. --skip-unknown leaves them out; for a new user give --items."
        ) from error
    except UnknownItemError as error:
        raise ValueError(f"no item of the data has the id {error}. --skip-unknown leaves them out.") from error


def add_similar_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm similar``."""
    _add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--item", metavar="ID", help="an item")
    what.add_argument("--text", help="a description in words; answers as 'recommend --text'")
    what.add_argument("--image", metavar="FILE", help="a picture; answers as 'recommend --image'")
    what.add_argument("--audio", metavar="FILE", help="a sound; answers as 'recommend --audio'")
    _add_in(parser)
    _add_by(parser)
    parser.add_argument("--k", type=int, default=ITEMS, help="how many (default: %(default)s)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=".jsonl, .csv, .parquet or .xlsx (for Excel); without it a table on the terminal",
    )
    add_rule_arguments(parser)


def run_similar(options: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: as :func:`open_model`, if no item has the id, or a rule does not fit the model's items.
    """
    if options.k < 1:
        raise ValueError(f"--k is {options.k}; expected at least 1.")
    if options.output:
        check_output(options.output)
    opened = _open_search(options)
    model = opened.export if isinstance(opened, MediaModel) else opened
    rules = _rules(options, model)
    if options.item is None:
        answer = _search(options, opened, rules)
    else:
        try:
            answer = similar_items(model, options.item, k=options.k, by=options.by, rules=rules)
        except UnknownItemError as error:
            asked = unknown_ids([options.item], model.item_ids)
            raise ValueError(f"--item: no item of the data has the id {asked}.") from error
    rows = list(rows_of(answer, options.item or _question(options)))
    if options.output:
        write_rows(rows, options.output)
        print(f"{len(rows)} items written to {options.output}")
    else:
        print(*_table(rows), sep="\n")
    if answer.note:
        _note(answer.note)
    return 0
