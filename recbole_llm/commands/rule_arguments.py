"""Rules of a recommendation as command-line options."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recbole_llm.retrieval.rules import NO_RULES, Boost, Diversity, Exploration, Rules

_CONDITION = re.compile(r"(?s)(?P<name>.+?)(?P<sign>>=|<=|=|>|<)(?P<value>.*)")
_BOUNDS = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
_STEP = re.compile(r"(?P<sign>[+-]|x)(?P<number>.+)")
RULE_OPTIONS = (
    "filter",
    "exclude",
    "exclude_file",
    "only",
    "only_file",
    "boost",
    "cap",
    "diversity",
    "explore",
    "seed",
)


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    rules = parser.add_argument_group(
        "rules", "which items may appear, and what moves them; docs/recommending.md says how"
    )
    rules.add_argument(
        "--filter",
        action="append",
        metavar="CONDITION",
        help="on an attribute: genre=Drama,Comedy (any of them), 'year>=1990', or JSON; every --filter must hold",
    )
    rules.add_argument(
        "--exclude", nargs="+", action="extend", metavar="ID", help="items without a place; commas separate too"
    )
    rules.add_argument("--exclude-file", metavar="FILE", help="the same, an id a line")
    rules.add_argument(
        "--only", nargs="+", action="extend", metavar="ID", help="the only items with a place; commas separate too"
    )
    rules.add_argument("--only-file", metavar="FILE", help="the same, an id a line")
    rules.add_argument(
        "--boost",
        action="append",
        metavar="CONDITION:STEP",
        help="genre=Drama:+0.5 adds to the score, genre=Drama:x2 doubles the odds",
    )
    rules.add_argument("--cap", action="append", metavar="ATTRIBUTE=N", help="at most N items with the same value")
    rules.add_argument(
        "--diversity",
        metavar="LAMBDA",
        help="0.3: items unlike each other by content; genre=0.3: the genres in the shares of the history; 0 to 1",
    )
    rules.add_argument("--explore", type=float, metavar="SHARE", help="share of the places for items drawn at random")
    rules.add_argument("--seed", type=int, help="of --explore (default: 0)")


def rules_of(
    options: argparse.Namespace,
    kinds: Mapping[str, str],
    ids_of: Callable[[Sequence[str] | None, str | None], list[str] | None],
) -> Rules:
    """Collect the rules that the options name.

    Args:
        options: parsed.
        kinds: attributes of the model's items with their kinds.
        ids_of: ids of an option and of a file.

    Raises:
        ValueError: naming the option, what was given and what is expected.
    """
    if options.seed is not None and options.explore is None:
        raise ValueError("--seed belongs to --explore SHARE.")
    for name in ("exclude", "only"):
        if getattr(options, name) is not None and getattr(options, f"{name}_file") is not None:
            raise ValueError(f"give --{name} or --{name}-file, not both.")
    exclude, only = ids_of(options.exclude, options.exclude_file), ids_of(options.only, options.only_file)
    given = Rules(
        filter=_conditions(options.filter or (), kinds, "--filter"),
        exclude=exclude or (),
        only=only,
        boosts=[_boost(text, kinds) for text in options.boost or ()],
        caps=_caps(options.cap or ()),
        diversity=None if options.diversity is None else _diversity(options.diversity),
        explore=None if options.explore is None else Exploration(options.explore, options.seed or 0),
    )
    given.check(kinds)
    return NO_RULES if given == Rules() else given


def _conditions(texts: Sequence[str], kinds: Mapping[str, str], option: str) -> dict[str, Any]:
    """Conditions as the filters take them; bounds of one attribute are joined."""
    found: dict[str, Any] = {}
    for text in texts:
        for name, wanted in _condition(text, kinds, option).items():
            before = found.get(name)
            if before is None:
                found[name] = wanted
            elif isinstance(before, dict) and isinstance(wanted, dict) and not before.keys() & wanted.keys():
                found[name] = {**before, **wanted}
            else:
                raise ValueError(f"{option} names {name!r} twice; commas separate values of which any will do.")
    return found


def _condition(text: str, kinds: Mapping[str, str], option: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{option} {text!r} is not JSON: {error}.") from None
    parts = _CONDITION.fullmatch(text)
    if parts is None:
        raise ValueError(f"{option} is {text!r}; expected ATTRIBUTE=VALUE[,VALUE], ATTRIBUTE>=NUMBER, or JSON.")
    name, sign = parts["name"].strip(), parts["sign"]
    values = [value.strip() for value in parts["value"].split(",")]
    kind = kinds.get(name)
    if kind is None:
        known = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
        raise ValueError(f"{option} {text!r}: unknown attribute {name!r}; the model's items have: {known}.")
    if kind != "number":
        if sign != "=":
            raise ValueError(f"{option} {text!r}: {name} is no number; compare it with = and a value.")
        return {name: values}
    numbers = [_number(value, f"{option} {text!r}: {name} is a number, and") for value in values]
    if sign == "=":
        return {name: numbers}
    if len(numbers) != 1:
        raise ValueError(f"{option} {text!r}: a bound is one number.")
    return {name: {_BOUNDS[sign]: numbers[0]}}


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where} {text!r} is none.") from None


def _boost(text: str, kinds: Mapping[str, str]) -> Boost:
    condition, colon, step = text.rpartition(":")
    parts = _STEP.fullmatch(step.strip())
    if not colon or parts is None:
        raise ValueError(
            f"--boost is {text!r}; expected CONDITION:STEP with a step such as +0.5 or -1 (score) or x2 (odds)."
        )
    number = _number(parts["number"], f"--boost {text!r}: the step is a number after +, - or x, and")
    wanted = _condition(condition, kinds, "--boost")
    if parts["sign"] == "x":
        return Boost(wanted, odds=number)
    return Boost(wanted, add=-number if parts["sign"] == "-" else number)


def _caps(texts: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        name, most = _cap(text)
        if found.setdefault(name, most) != most:
            raise ValueError(f"--cap gives {name!r} {found[name]} and {most} places; give it once.")
    return found


def _cap(text: str) -> tuple[str, int]:
    name, sign, most = text.rpartition("=")
    if not sign or not name or not most.strip().isdecimal() or int(most) < 1:
        raise ValueError(f"--cap is {text!r}; expected ATTRIBUTE=N with N at least 1.")
    return name, int(most)


def _diversity(text: str) -> Diversity:
    name, sign, weight = text.rpartition("=")
    where = f"--diversity is {text!r}; expected a number from 0 to 1, or ATTRIBUTE=NUMBER, and"
    return Diversity(_number(weight, where), name if sign else None)
