"""The pictures of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.reporting.drawing import (
    FAINT,
    GREY,
    INK,
    MARKERS,
    OURS,
    SECOND,
    THIRD,
    Picture,
    Sheet,
    short,
    style,
)
from recbole_llm.reporting.words import best_validation, counted, of_100, people, unit

Record = Mapping[str, Any]
_LARGE = 30  # users of a group that a title may name
BUCKET_NAMES = {
    "head": "most popular third",
    "middle": "middle third",
    "tail": "least popular third",
    "cold": "no interactions",
}


def pictures(record: Record) -> list[Picture]:
    """All pictures that the record has figures for."""
    with style():
        drawn = [_found(record), _by_activity(record), _by_popularity(record), _shown(record), _calibration(record)]
        drawn += [_learning(record), _search(record)]
    return [picture for picture in drawn if picture is not None]


def _colours(record: Record) -> dict[str, str]:
    """Ours coloured, the others in greys."""
    others = [name for name in record["models"] if name != record["model"]]
    greys = (SECOND, THIRD, GREY)
    return {record["model"]: OURS, **{name: greys[min(n, len(greys) - 1)] for n, name in enumerate(others)}}


def _dots(record: Record, groups: Sequence[tuple[str, Mapping[str, Any]]], label: str) -> Sheet:
    """A row a group, a dot with its interval for each model."""
    names = list(record["models"])
    sheet = Sheet(0.9 + (0.17 * len(names) + 0.22) * len(groups))
    colours, step = _colours(record), 0.22
    for row, (_, of_model) in enumerate(groups):
        for n, name in enumerate(names):
            if name not in of_model:
                continue
            found = of_model[name]
            y = row + (n - (len(names) - 1) / 2) * step
            value, low, high = (100 * found[key] for key in ("value", "low", "high"))
            sheet.axes.plot([low, high], [y, y], color=colours[name], linewidth=1.6, solid_capstyle="round")
            label_of = short(name) if row == 0 else None
            mark = MARKERS[n % 5]
            sheet.axes.plot([value], [y], mark, color=colours[name], markersize=5, label=label_of, clip_on=False)
    sheet.axes.set_yticks(range(len(groups)), [text for text, _ in groups])
    sheet.axes.set_ylim(len(groups) - 0.45, -0.55)
    sheet.axes.set_xlim(left=0)
    sheet.axes.set_xlabel(label)
    sheet.legend(len(names))
    return sheet


# ---------------------------------------------------------------- the pictures


def _found(record: Record) -> Picture:
    models = record["models"]
    sheet = Sheet(0.75 + 0.34 * len(models))
    colours = _colours(record)
    for row, (name, figures) in enumerate(models.items()):
        value, low, high = (100 * figures["found"][key] for key in ("value", "low", "high"))
        sheet.dot(row, value, low, high, colours[name], of_100(value / 100))
    sheet.rows([short(name) for name in models])
    sheet.axes.set_xlim(0, 1.15 * max(100 * figures["found"]["high"] for figures in models.values()) or 1)
    sheet.axes.set_xlabel(f"of 100 held-out {unit(record)}, in the first {record['k']}")
    own, best = (models[name]["found"]["value"] for name in (record["model"], record["best_baseline"]))
    title = f"{record['model']} finds {of_100(own)} of 100, the best baseline {of_100(best)}"
    return Picture(title, sheet.svg("found", title), f"Lines are 95% intervals over {people(record)}.")


def _by_activity(record: Record) -> Picture | None:
    own = record["models"][record["model"]]["by_activity"]
    if not own:
        return None
    starts = [int(group["from"]) for group in own]
    every = {name: {int(g["from"]): g for g in figures["by_activity"]} for name, figures in record["models"].items()}
    groups = []
    for start, group in zip(starts, own, strict=True):
        text = f"{_range(start)}\n{counted(group['users'], people(record))}"
        groups.append((text, {name: of[start] for name, of in every.items() if start in of}))
    large = [group for group in own if group["users"] >= _LARGE] or own
    known = max(large, key=lambda group: group["value"])
    title = f"It finds most for {people(record)} of whom {_range(int(known['from']))} {unit(record)} are known"
    label = f"of 100 held-out {unit(record)}"
    return Picture(
        title,
        _dots(record, groups, label).svg("activity", title),
        f"By how many {unit(record)} are known of the {people(record)}.",
    )


def _range(start: int) -> str:
    from recbole_llm.reporting.quality import ACTIVITY

    after = [low for low in ACTIVITY if low > start]
    if start == 0:
        return "0"
    return f"{start} or more" if not after else str(start) if after[0] == start + 1 else f"{start} to {after[0] - 1}"


def _by_popularity(record: Record) -> Picture | None:
    models = record["models"]
    own = models[record["model"]]["by_popularity"]
    groups = [
        (
            f"{text}\n{counted(own[bucket]['targets'], unit(record))}",
            {
                name: figures["by_popularity"][bucket]
                for name, figures in models.items()
                if bucket in figures["by_popularity"]
            },
        )
        for bucket, text in BUCKET_NAMES.items()
        if bucket in own
    ]
    if not groups:
        return None
    best = record["best_baseline"]
    tail = next((bucket for bucket in ("tail", "middle", "head") if bucket in own), None)
    title = "How well it finds popular, rare and new items"
    if tail is not None and tail in models[best]["by_popularity"]:
        ours, theirs = own[tail]["value"], models[best]["by_popularity"][tail]["value"]
        title = f"Of 100 wanted items of the {BUCKET_NAMES[tail]} it finds {of_100(ours)}, {best} {of_100(theirs)}"
    note = (
        "Each third holds a third of the training interactions: few popular items, many rare ones. Items without interactions "
        "are known by their texts or other content alone."
    )
    return Picture(title, _dots(record, groups, f"of 100 held-out {unit(record)}").svg("popularity", title), note)


def _shown(record: Record) -> Picture:
    models = record["models"]
    sheet = Sheet(0.9 + 0.42 * len(models))
    shades = {"head": OURS, "middle": SECOND, "tail": THIRD, "cold": INK}
    for row, figures in enumerate(models.values()):
        left = 0.0
        for bucket, text in BUCKET_NAMES.items():
            share = 100 * figures["shown_by_popularity"].get(bucket, 0.0)
            label = text if row == 0 else None
            sheet.axes.barh(row, share, left=left, color=shades[bucket], height=0.55, label=label)
            left += share
    labels = [f"{short(name)}\n{figures['items_shown']:,} items" for name, figures in models.items()]
    sheet.rows(labels)
    sheet.axes.set_xlim(0, 100)
    sheet.axes.set_xlabel("% of the places shown")
    handles, names = sheet.axes.get_legend_handles_labels()
    sheet.figure.legend(
        handles, names, loc="outside upper left", ncols=2, frameon=False, handletextpad=0.4, columnspacing=1.2
    )
    own = models[record["model"]]
    head = own["shown_by_popularity"].get("head", 0.0)
    title = f"{head:.0%} of what it shows is from the most popular third; {own['items_shown']:,} items are shown to somebody"
    return Picture(title, sheet.svg("shown", title), f"Of {record['data']['items']:,} items.")


def _calibration(record: Record) -> Picture | None:
    bins = record["calibration"]
    if not bins:
        return None
    sheet = Sheet(3.0)
    said, came = [100 * each["said"] for each in bins], [100 * each["came"] for each in bins]
    top = 1.05 * max(*said, *came, 0.1)
    sheet.axes.plot([0, top], [0, top], color=GREY, linewidth=1, linestyle="--")
    sheet.axes.plot(said, came, "o-", color=OURS, linewidth=1.4, markersize=5)
    sheet.axes.set_xlim(0, top)
    sheet.axes.set_ylim(0, top)
    sheet.axes.set_xlabel("chance that was said, %")
    sheet.axes.set_ylabel("how often it came, %")
    sheet.axes.grid(color=FAINT, linewidth=0.6)
    pairs = sum(each["pairs"] for each in bins)
    off = sum(abs(each["said"] - each["came"]) * each["pairs"] for each in bins) / max(pairs, 1)
    title = f"The chances that are said are off by {100 * off:.1f} percentage points on average"
    note = f"{pairs:,} places of the first {record['k']}, in ten groups of equal size; on the dashed line both agree."
    return Picture(title, sheet.svg("calibration", title), note)


def _learning(record: Record) -> Picture | None:
    history = record["history"]
    valid, loss = history.get("valid") or [], history.get("loss") or []
    if len(valid) < 2 and len(loss) < 2:
        return None
    sheet = Sheet(2.6)
    sheet.axes.grid(color=FAINT, linewidth=0.6)
    sheet.axes.set_xlabel("epoch")
    sheet.whole_numbers()
    if len(valid) < 2:
        sheet.axes.plot(range(1, len(loss) + 1), loss, color=OURS, linewidth=1.6)
        sheet.axes.set_ylabel("training loss")
        return Picture(f"The training ran for {len(loss)} epochs", sheet.svg("learning", "training loss by epoch"), "")
    epochs, values = [int(each[0]) + 1 for each in valid], [each[1] for each in valid]
    best = best_validation(history)
    sheet.axes.plot(epochs, values, color=OURS, linewidth=1.6)
    sheet.axes.plot([epochs[best]], [values[best]], "o", color=OURS, markersize=6)
    sheet.axes.set_ylabel(f"validation {history.get('valid_metric', '')}", color=OURS)
    if len(loss) > 1:
        other = sheet.axes.twinx()
        other.plot(range(1, len(loss) + 1), loss, color=SECOND, linewidth=1, linestyle="--")
        other.set_ylabel("training loss (dashed)")
        other.spines[["top", "left", "bottom"]].set_visible(False)
        other.patch.set_alpha(0)
    title = f"The learned part was best after epoch {epochs[best]} of {max(epochs[-1], len(loss))}"
    return Picture(
        title, sheet.svg("learning", title), "Of the towers alone, before they are weighed with the solved parts."
    )


def _search(record: Record) -> Picture | None:
    search = record["history"].get("search") or []
    if len(search) < 2:
        return None
    sheet = Sheet(2.2)
    values = [each["value"] for each in search]
    best = max(range(len(values)), key=values.__getitem__)
    sheet.axes.grid(color=FAINT, linewidth=0.6)
    sheet.axes.plot(range(1, len(values) + 1), values, "o", color=SECOND, markersize=5)
    sheet.axes.plot([best + 1], [values[best]], "o", color=OURS, markersize=7)
    sheet.axes.set_xlabel("setting of the closed form, in the order tried")
    sheet.axes.set_ylabel(f"validation {search[best]['metric']}")
    sheet.whole_numbers()
    title = f"{len(search)} settings of the closed form were tried on validation"
    return Picture(title, sheet.svg("search", title), f"Best: {search[best]['setting']}.")
