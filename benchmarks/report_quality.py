"""Sections of the report that tell how good recommendations are: one function per kind of result file."""

from statistics import mean

from report_parts import Json, Section, facts, table
from report_plots import Curve, Curves, Dot, Dots, Panel, Row, percent, short, span


def quality(data: Json) -> Section:
    """Test metrics by split and model, mean and spread over seeds."""
    counted_from = data.get("seconds", "of training, without what RecBole's closed forms do when their model is made")
    lines, plots = [*facts(data), f"{data['protocol']}. Seconds: {counted_from}.", ""], []
    for split in data["splits"]:
        rows = split["rows"]
        names = list(rows[0]["mean"])
        metric, seed = split["metric"], split["split_seed"]
        cells = [
            [r["model"], r["seeds"], *(_spread(r, n) for n in names), r.get("cpu_seconds") or r["seconds"],
             r.get("peak_bytes", 0) / 2**30, r["p"]] for r in rows
        ]  # fmt: skip
        head = ["model", "seeds", *names, "CPU seconds" if "cpu_seconds" in rows[0] else "seconds", "GiB", "p (Holm)"]
        lines += [f"Split seed {seed}:", "", *table(head, cells)]
        lines += _by_popularity(rows, metric)
    if not data.get("part"):  # a further file of the same dataset has no picture of its own
        plots.append(ranked_plot(data))
    return Section(lines, plots)


OURS = "LLMTwoTower"
LEAST_PAIRS = 100  # of a bin whose share is shown


def ranked_plot(data: Json) -> Dots:
    """Means of every model over the splits it was measured on, and what it differs from ours by, with intervals."""
    splits = data["splits"]
    metric = splits[0]["metric"]
    further = [split for part in data.get("parts", []) for split in part["splits"]]
    values: dict[str, list[float]] = {}
    for part in (splits, further):  # a model that was tuned again in a file of its own is shown at its best
        found: dict[str, list[float]] = {}
        for split in part:
            for row in split["rows"]:
                found.setdefault(row["model"], []).append(row["mean"][metric])
        values |= {m: v for m, v in found.items() if m not in values or (m != OURS and mean(v) > mean(values[m]))}
    order = sorted(values, key=lambda model: -mean(values[model]))
    first = splits[0]
    seed = first["split_seed"]
    differences: dict[str, Json] = {}
    for row in (row for split in splits + further if split["split_seed"] == seed for row in split["rows"]):
        d = row.get("difference")
        if d and (row["model"] not in differences or d["mean"] > differences[row["model"]]["mean"]):
            differences[row["model"]] = d
    best = max((model for model in values if model != OURS), key=lambda model: mean(values[model]))
    both = next(
        chosen
        for part in (splits, further)
        if (chosen := [split for split in part if {OURS, best} <= {row["model"] for row in split["rows"]}])
        and [_of(split, best, metric) for split in chosen] == values[best]
    )
    gain = mean(_of(split, OURS, metric) for split in both) / mean(values[best]) - 1
    place = order.index(OURS) + 1
    finding = f"{data['dataset']}: ours is number {place} of {len(order)}, {percent(gain)} beside the best stock model, {best}"
    seeds = ", ".join(str(split["split_seed"]) for split in splits)
    note = (
        f"test {metric.upper()}; line: range over split seeds {seeds}. "
        f"Right: other minus ours, 95% interval, seed {seed}"
    )
    left = [
        Row(model, [Dot(mean(values[model]), min(values[model]), max(values[model]), model == OURS)]) for model in order
    ]
    right = [
        Row(
            "",
            [Dot(d["mean"], d["low"], d["high"])] if (d := differences.get(model)) else [],
        )
        for model in order
    ]
    return Dots(
        f"quality_{data['dataset']}", finding, note, [Panel(metric.upper(), left), Panel("difference", right, line=0.0)]
    )


def gains(results: list[Json]) -> Dots:
    """What ours gains on the best stock model of each dataset, in percent of it, with the paired interval."""
    rows, places, means = [], [], []
    for data in results:
        split = data["splits"][0]
        metric, seed = split["metric"], split["split_seed"]
        further = [s for part in data.get("parts", []) for s in part["splits"] if s["split_seed"] == seed]
        others = [row for s in [split, *further] for row in s["rows"] if row["model"] != OURS]
        best = max(others, key=lambda row: row["mean"][metric])
        d, base = best["difference"], best["mean"][metric]
        means.append(-100 * d["mean"] / base)
        dot = Dot(means[-1], -100 * d["high"] / base, -100 * d["low"] / base, True)
        rows.append(Row(f"{data['dataset']}, against {best['model']}", [dot]))
        places.append(d["high"] < 0)
    finding = f"Significantly above the best stock model on {sum(places)} of {len(places)} datasets, by {span(means)}%"
    note = "test NDCG@10 beside the best of RecBole's models, each at its best setting; percent, 95% interval"
    return Dots("gains", finding, note, [Panel("", rows, line=0.0, unit="%")])


def gains_by_time(results: list[Json]) -> Dots:
    """The same where interactions are split by time."""
    rows, surely = [], 0
    for data in results:
        models = {name: m for name, m in data["models"].items() if m.get("difference_of_ours")}
        best = max(models, key=lambda name: models[name]["masked"]["ndcg@10"])
        d, base = models[best]["difference_of_ours"], models[best]["masked"]["ndcg@10"]
        surely += d["low"] > 0
        dot = Dot(100 * d["mean"] / base, 100 * d["low"] / base, 100 * d["high"] / base, True)
        rows.append(Row(f"{data['dataset']}, against {best}", [dot]))
    finding = f"By time ours is significantly above the best other model on {surely} of {len(rows)} datasets"
    return Dots(
        "gains_by_time", finding, "test NDCG@10, percent of the other, 95% interval", [Panel("", rows, line=0.0)]
    )


def stages(data: Json) -> Section:
    """What each stage of a fit gains."""
    return Section([*facts(data), *records_of(data)], [])


def records_of(data: Json) -> list[str]:
    """Tables of every list or mapping of records in a result."""
    lines: list[str] = []
    for name, part in data.items():
        named = (
            part.items() if isinstance(part, dict) else [("", row) for row in part] if isinstance(part, list) else []
        )
        rows = [(n, row) for n, row in named if isinstance(row, dict) and n != "versions"]
        fields = list(dict.fromkeys(f for _, row in rows for f, v in row.items() if not isinstance(v, dict | list)))
        if rows and fields and name != "machine":
            cells = [[n, *(row.get(f) for f in fields)] for n, row in rows]
            lines += [f"{name}:", "", *table(["", *fields], cells)]
    return lines


def _of(split: Json, model: str, metric: str) -> float:
    value: float = next(row for row in split["rows"] if row["model"] == model)["mean"][metric]
    return value


def _by_popularity(rows: list[Json], metric: str) -> list[str]:
    """The metric by thirds of the training interactions, most popular items first."""
    buckets = {name: b for r in rows for name, b in r.get("by_popularity", {}).items()}
    if not buckets:
        return []
    head = [f"{name}: {b['items']:,} items, {b['targets']:,} targets" for name, b in buckets.items()]
    cells = [
        [r["model"], *(f"{r['by_popularity'][name][metric]:.4f}" for name in buckets)]
        for r in rows
        if r.get("by_popularity")
    ]
    return [f"{metric} by popularity of the targets:", "", *table(["model", *head], cells)]


def subsets(data: Json) -> Section:
    """Defaults against tuned EASE on datasets of other shapes."""
    cells = []
    for name, found in data["subsets"].items():
        rows, metric = {r["model"]: r for r in found["rows"]}, found["metric"]
        d = rows["EASE"]["difference"]  # of EASE against ours
        cells.append([name, found["cut_from"], *(f"{rows[m]['mean'][metric]:.4f}" for m in ("LLMTwoTower", "EASE")),
                      f"{-d['mean']:+.4f} [{-d['high']:+.4f}, {-d['low']:+.4f}]",
                      rows["LLMTwoTower"].get("cpu_seconds")])  # fmt: skip
    head = ["", "cut from", "LLMTwoTower", "EASE", "difference [95%]", "CPU seconds"]
    found = {
        name: next(r for r in part["rows"] if r["model"] == "EASE")["difference"]
        for name, part in data["subsets"].items()
    }
    above = sum(-d["high"] > 0 for d in found.values())
    plot = Dots(
        "subsets",
        f"Defaults are significantly above tuned EASE on {above} of {len(found)} cuts of the datasets",
        "ours minus EASE, test NDCG@10, 95% interval",
        [Panel("", [Row(n, [Dot(-d["mean"], -d["high"], -d["low"], True)]) for n, d in found.items()], line=0.0)],
    )
    return Section([*facts(data), *table(head, cells)], [plot])


def _spread(row: Json, name: str) -> str:
    mean, spread = row["mean"].get(name), row.get("spread", {}).get(name)
    return "" if mean is None else f"{mean:.4g}" + (f" ± {spread:.2g}" if spread else "")


def cold(data: Json) -> Section:
    """Items without a training interaction: among themselves, and in the ranking of all."""
    rows = [
        [d["draw"], protocol, *(f"{d[protocol]['cold_only'][k]:.4f}" for k in ("ours", "content_knn", "chance")),
         f"{d[protocol]['joint']:.4f}", f"{d[protocol]['joint_gain']:+.2%}", f"{-d[protocol]['warm_cost']:+.2%}"]
        for d in data["draws"] for protocol in ("test", "launch")
    ]  # fmt: skip
    head = ["draw", "protocol", "cold only: ours", "content kNN", "chance", "all items", "against leaving out", "warm"]
    return Section(
        [*facts(data), f"{data['metric']}, {data['share_hidden']:.0%} hidden.", "", *table(head, rows)],
        [cold_plot(data)],
    )


def cold_plot(data: Json) -> Dots:
    """Cold items among themselves: ours, by neighbours in content, by chance."""
    names = {"ours": "ours, by text", "content_knn": "content kNN", "chance": "chance"}
    panels = []
    for protocol, title in (("test", "users of the test split"), ("launch", "a launch: all who chose the item")):
        found = {key: [draw[protocol]["cold_only"][key] for draw in data["draws"]] for key in names}
        rows = [Row(names[key], [Dot(mean(v), min(v), max(v), key == "ours")]) for key, v in found.items()]
        panels.append(Panel(title, rows))
    launch = {key: mean(draw["launch"]["cold_only"][key] for draw in data["draws"]) for key in names}
    cost = mean(draw["launch"]["warm_cost"] for draw in data["draws"])
    finding = (
        f"{data['dataset']}: items nobody chose yet reach {short(launch['ours'])}, content kNN {short(launch['content_knn'])}; "
        f"warm items give {cost:.1%}"
    )
    note = f"{data['metric'].upper()} among {data['share_hidden']:.0%} hidden items; line: range over {len(data['draws'])} draws"
    return Dots(f"cold_{data['dataset']}", finding, note, panels)


def temporal(data: Json) -> Section:
    """The next item, where interactions are split by time."""
    rows = []
    for name, m in data["models"].items():
        alone, d = m.get("training_history_only", {}), m.get("difference_of_ours")
        told = f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else ""
        rows.append([name, f"{m['valid']:.4f}", f"{m['masked']['ndcg@10']:.4f}", f"{m['masked']['recall@10']:.4f}",
                     f"{alone['ndcg@10']:.4f}" if alone else "", m["epochs"], m["stopped_by"], m["seconds"], told])  # fmt: skip
    head = ["model", "valid", "ndcg@10", "recall@10", "ndcg@10, training history", "epochs", "stopped by", "seconds",
            "ours minus it [95%]"]  # fmt: skip
    lines = [*facts(data), f"{data['protocol']}.", "", *table(head, rows), "Settings tried, by validation alone:", ""]
    tried = [[name, ", ".join(f"{k} {v}" for k, v in t["setting"].items()), f"{t['valid']:.4f}", t["epochs"],
              t["stopped_by"], t.get("stopping_step"), t["seconds"]] for name, found in data["trials"].items()
             for t in found if t["setting"]]  # fmt: skip
    head = ["model", "setting", "valid", "epochs", "stopped by", "patience", "seconds"]
    return Section([*lines, *table(head, tried)], [_temporal(data)])


def temporal_pair(data: Json) -> Section:
    """This code against an earlier version, where interactions are split by time."""
    rows = [[version, str(s["seed"]), f"{s['valid']:.4f}", f"{s['ndcg@10']:.4f}", f"{s['recall@10']:.4f}", s["cpu_seconds"],
             s["peak_mib"]] for version in ("before", "now") for s in data[version]["seeds"]]  # fmt: skip
    means = {version: short(data[version]["ndcg@10"]) for version in ("before", "now")}
    d = data["difference"]
    told = f"NDCG@10 {means['before']} before, {means['now']} now: {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] over users."
    head = ["version", "seed", "valid", "ndcg@10", "recall@10", "CPU-seconds", "MiB"]
    return Section([*facts(data), f"{data['protocol']}; {data['users']:,} users. {told}", "", *table(head, rows)], [])


def _temporal(data: Json) -> Dots:
    order = sorted(data["models"], key=lambda name: -data["models"][name]["masked"]["ndcg@10"])
    value = {name: data["models"][name]["masked"]["ndcg@10"] for name in order}
    difference = {name: data["models"][name].get("difference_of_ours") for name in order}
    best = next(name for name in order if name != OURS)
    surely = "significantly" if difference[best]["low"] > 0 else "not significantly"
    place = order.index(OURS) + 1
    finding = (
        f"{data['dataset']} by time: ours is number {place} of {len(order)}, {surely} apart from {best} "
        f"({short(value[OURS])}, {short(value[best])})"
    )
    left = [Row(name, [Dot(value[name], ours=name == OURS)]) for name in order]
    right = [Row("", [Dot(d["mean"], d["low"], d["high"])] if (d := difference[name]) else []) for name in order]
    note = "test NDCG@10, the last item of each user held out. Right: ours minus the other, 95% interval"
    return Dots(
        f"temporal_{data['dataset']}", finding, note, [Panel("NDCG@10", left), Panel("difference", right, line=0.0)]
    )


def calibration(data: Json) -> Section:
    """Probabilities against what happens, and quality by dimension."""
    found, dims = data["calibration"], data["dimensions"]
    kinds = ("equally_wide_bins", "equally_filled_bins", "ten_best_of_each_user")
    lines = [
        *facts(data),
        *table(
            ["expected calibration error", "P(i\\|u)", "sigmoid(score)"],
            [[k.replace("_", " "), found[k]["ece"], found.get("sigmoid_of_the_score", found)[k]["ece"]] for k in kinds],
        ),
    ]
    best = found["ten_best_of_each_user"]
    filled = [(n, p, y) for n, p, y in zip(best["pairs"], best["probability"], best["positives"], strict=True) if n]
    lines += ["Each user's ten best, by bin:", "", *table(["pairs", "probability", "share that happens"], filled)]
    step = data["worked_case"]["course"][-1]
    lines += [f"Worked case after {step['step']} steps: P = {step['probability']}.", ""]
    rows = [
        [p["block"], p["d"], f"{p['valid']:.4f}", f"{p['test']:.4f}", p["cpu_seconds"], p["peak_mib"]] for p in dims
    ]
    lines += table(["block", "d", "valid", "test", "CPU seconds", "peak MiB"], rows) if rows else []
    plots: list[Dots | Curves] = [_dimensions(data["dataset"], dims)] if dims else []
    plots.append(_reliability(data))
    return Section(lines, plots)


def _dimensions(dataset: str, dims: list[Json]) -> Dots:
    """Quality, time and memory of the blocks by their number of dimensions."""
    ds = sorted({p["d"] for p in dims})
    best = max(dims, key=lambda p: p["valid"])
    panels = []
    for key, title in (("test", "test NDCG@10"), ("cpu_seconds", "CPU seconds"), ("peak_mib", "peak MiB")):
        rows = [
            Row(f"{p['block']}, d {p['d']}", [Dot(p[key], ours=p is best)])
            for p in sorted(dims, key=lambda p: (p["block"], ds.index(p["d"])))
        ]
        panels.append(Panel(title, [row if not panels else Row("", row.dots) for row in rows], log=key != "test"))
    finding = f"{dataset}: validation is highest for the {best['block']} block with d = {best['d']}"
    return Dots(f"dimensions_{dataset}", finding, "one run each; coloured: the highest validation NDCG@10", panels)


def _reliability(data: Json) -> Curves:
    """Stated probabilities against what happens, for each user's ten best."""
    found = data["calibration"]
    plain = found.get("sigmoid_of_the_score", found)["ten_best_of_each_user"]
    best = found["ten_best_of_each_user"]
    curves = []
    for name, part, ours in (("sigmoid of the score", plain, False), ("ours", best, True)):
        points = [(p, y) for n, p, y in zip(part["pairs"], part["probability"], part["positives"], strict=True)
                  if n >= LEAST_PAIRS]  # fmt: skip
        if points:
            curves.append(Curve(name, [p for p, _ in points], [y for _, y in points], ours))
    finding = (
        f"{data['dataset']}: stated chances are off by {short(best['ece'])}, a plain sigmoid's by {short(plain['ece'])}"
    )
    note = f"each user's ten best items, in bins of at least {LEAST_PAIRS} pairs"
    name = f"reliability_{data['dataset']}"
    return Curves(name, finding, note, "stated probability", "share that happens", curves, diagonal=True)


def sharing(data: Json) -> Section:
    """Tied and separate towers, texts and IDs."""
    rows = []
    for r in data["rows"]:
        alone, both = r["learned"], r["closed_form+learned"]
        rows.append([r["item"], r["towers"], r["parameters"], f"{alone['test']:.4f}", alone["seconds"], alone["peak_mib"],
                     f"{both['test']:.4f}"])  # fmt: skip
    head = [
        "item vector",
        "towers",
        "parameters",
        "ndcg@10 alone",
        "seconds",
        "peak MiB",
        "ndcg@10 with the closed form",
    ]
    return Section([*facts(data), *table(head, rows)], [])


def robustness(data: Json) -> Section:
    """What bad texts and interactions cost."""
    rows = []
    for name, p in data["points"].items():
        d = p["difference"]
        rows.append([name, p["what"], f"{p['ours']:.4f}", f"{p['ease']:.4f}",
                     f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]", p["setting"]])  # fmt: skip
    head = ["", "what", "ours", "EASE", "difference [95%]", "setting chosen"]
    points = data["points"]
    above = sum(p["difference"]["low"] > 0 for p in points.values())
    left = [
        Row(name, [Dot(p["ease"], series="EASE"), Dot(p["ours"], ours=True, series="ours")])
        for name, p in points.items()
    ]
    right = [
        Row("", [Dot(p["difference"]["mean"], p["difference"]["low"], p["difference"]["high"], True)])
        for p in points.values()
    ]
    least = min(p["difference"]["mean"] for p in points.values())
    plot = Dots(
        f"robustness_{data['dataset']}",
        f"{data['dataset']}: under {above} of {len(points)} kinds of bad data ours stays above EASE, by {short(least)} at least",
        f"{data['metric']}. Right: ours minus EASE, 95% interval",
        [Panel("NDCG@10", left), Panel("difference", right, line=0.0)],
    )
    return Section([*facts(data), f"{data['metric']}.", "", *table(head, rows)], [plot])


def large_catalogue(data: Json) -> Section:
    """Catalogues beyond the dense limit: both forms against the dense one, and made catalogues against exact scores."""
    pieces = data["pieces"]
    fits = [p for p in pieces if "form" in p]
    lines = [*facts(data)]
    rows = [
        [p["dataset"], p["items"], p["limit"], p["form"], f"{p['valid']:.4f}", f"{p['test']:.4f}", p["cpu_seconds"]]
        for p in fits
    ]
    lines += table(["dataset", "items", "limit", "form taken", "valid", "test", "CPU seconds"], rows)
    for p in pieces:
        if "forms" in p:
            kept = [name for name in p["forms"][0] if name.startswith("kept_")]
            rows = [[f["neighbours"], *(f"{f[name]:.4f}" for name in kept), f["cpu_seconds"]] for f in p["forms"]]
            lines += [f"{p['dataset']}, validation by the entries of a row that stay; dense {p['dense']:.4f}:", ""]
            lines += table(["neighbours", *(name.removeprefix("kept_") for name in kept), "CPU seconds"], rows)
    made: dict[tuple[int, str], Json] = {}
    for p in pieces:
        if "part" in p and p["part"] != "solve":
            made.setdefault((p["copies"], p["part"].partition("-")[0]), {}).update(p)
    rows = []
    for (_, block), p in made.items():
        values = [f"{p[name]:.4f}" if name in p else "" for name in ("exact", "uncut", "cut", "svd")]
        loss = f"{1 - p['cut'] / p['exact']:.1%}" if "exact" in p and "cut" in p else ""
        rows.append([block, p["items"], p["interactions"], *values, loss, p.get("cpu_seconds", "")])
    if rows:
        head = ["block", "items", "interactions", "exact", "uncut", "cut", "SVD", "cut below exact", "CPU seconds"]
        lines += ["Made catalogues, validation NDCG@10:", "", *table(head, rows)]
    rows = [
        [p["items"], p["users"], p["interactions"], p["cpu_seconds"], p["mib_of_solution"], p["mib_of_block"],
         f"{p['entries_a_row']:.0f}"] for p in pieces if p.get("part") == "solve"
    ]  # fmt: skip
    if rows:
        lines += ["The closed form's solution by neighbourhoods, nothing else in the process measured:", ""]
        head = [
            "items",
            "users",
            "interactions",
            "CPU seconds",
            "MiB above the data",
            "MiB of the block",
            "entries a row",
        ]
        lines += table(head, rows)
        if data.get("growth"):
            exponents = data["growth"]
            lines += [
                f"Growth with the items: seconds to the power of {exponents['exponent_of_cpu_seconds']:.2f}, memory of "
                f"{exponents['exponent_of_mib_of_solution']:.2f}.",
                "",
            ]
    rows = [
        [p["dataset"], p["way"], p["epochs"], f"{p['valid']:.4f}", f"{p['test']:.4f}", p["cpu_seconds"]]
        for p in pieces if p["piece"].startswith("towers:")
    ]  # fmt: skip
    if rows:
        head = ["dataset", "learned block alone, trained by", "best epoch", "valid", "test", "CPU seconds"]
        lines += table(head, rows)
    rows = [
        [p["which"], p["items"], p["users"], p["cpu_seconds"], "yes" if p["ended"] else "stopped",
         f"{p['valid']:.4f}" if p["valid"] is not None else "", p["peak_mib"]]
        for p in pieces if p["piece"].startswith("run:")
    ]  # fmt: skip
    if rows:
        lines += table(["run", "items", "users", "CPU seconds", "ended", "valid", "peak MiB"], rows)
    return Section(lines, [])


def svd_form(data: Json) -> Section:
    """The closed form without an items x items matrix: against the dense form, and what large catalogues cost."""
    lines = [*facts(data)]
    forms = {name: form for name, form in data["quality"].items() if isinstance(form, dict)}
    if forms:
        rows = [
            [name, f["dataset"], f["items"], f["rank"], f"{f['valid']:.4f}", f"{f['test']:.4f}", f["cpu_seconds"]]
            for name, f in forms.items()
        ]
        lines += table(["form", "dataset", "items", "rank", "valid", "test", "CPU seconds"], rows)
        lines += [f"The SVD form loses {data['quality']['loss']:.2%} of the dense form's test ndcg@10.", ""]
    rows = [
        [m["items"], m["users"], m["interactions"], m["rank"], f"{m['valid']:.4f}", m["cpu_seconds"], m["peak_mib"],
         m["mib_before"]] for m in data["made"]
    ]  # fmt: skip
    head = [
        "items",
        "users",
        "interactions",
        "rank",
        "valid",
        "CPU seconds",
        "peak MiB of the process",
        "of these data",
    ]
    return Section([*lines, "Made catalogues:", "", *table(head, rows)], [])
