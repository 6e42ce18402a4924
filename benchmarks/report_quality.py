"""Sections of the report that tell how good recommendations are: one function per kind of result file."""

from report_parts import Bars, Json, Section, facts, table


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
        series = {metric: [r["mean"].get(metric) for r in rows]}
        if not data.get("part"):  # a further file of the same dataset has no picture of its own
            plots.append(Bars(f"quality_{data['dataset']}_{seed}", f"{data['dataset']}, split seed {seed}", metric,
                              [r["model"] for r in rows], series))  # fmt: skip
    return Section(lines, plots)


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
    return Section([*facts(data), *table(head, cells)], [])


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
    return Section([*facts(data), f"{data['metric']}, {data['share_hidden']:.0%} hidden.", "", *table(head, rows)], [])


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
    return Section([*lines, *table(head, tried)], [])


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
    ds, plots = list(dict.fromkeys(p["d"] for p in dims)), []
    measured = (
        ("", "test", "ndcg@10"),
        ("_seconds", "cpu_seconds", "CPU seconds"),
        ("_memory", "peak_mib", "peak MiB"),
    )
    for suffix, key, unit in measured if dims else ():
        series: dict[str, list[float | None]] = {
            b: [next((p[key] for p in dims if p["block"] == b and p["d"] == d), None) for d in ds]
            for b in dict.fromkeys(p["block"] for p in dims)
        }
        title = f"{data['dataset']}, d dimensions"
        plots.append(Bars(f"dimensions_{data['dataset']}{suffix}", title, unit, [str(d) for d in ds], series))
    reliable: dict[str, list[float | None]] = {
        "P(i|u)": [p for _, p, _ in filled], "share that happens": [y for _, _, y in filled]
    }  # fmt: skip
    plots.append(Bars(f"reliability_{data['dataset']}", f"{data['dataset']}, each user's ten best", "probability",
                      [f"{n:,} pairs" for n, _, _ in filled], reliable))  # fmt: skip
    return Section(lines, plots)


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
    series: dict[str, list[float | None]] = {k: [p[k] for p in data["points"].values()] for k in ("ours", "ease")}
    plot = Bars(f"robustness_{data['dataset']}", f"{data['dataset']}, test", "ndcg@10", list(data["points"]), series)
    return Section([*facts(data), f"{data['metric']}.", "", *table(head, rows)], [plot])


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
