"""Markdown tables and SVG plots from every result file in a folder.

    python benchmarks/report.py                              # benchmarks/results/*.json to REPORT.md and plots/*.svg there
    python benchmarks/report.py --results FOLDER --no-plots

One small renderer per kind of file, found by the file's name up to the first "-" or "_<card>": add a function and its
line in ``RENDERERS``. A file of another kind is listed as such. Nothing is measured here, and no figure is changed but
for rounding. Plots need the extra "bench" (matplotlib); the same results give the same bytes.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
Json = dict[str, Any]


class Bars(NamedTuple):
    """A plot of horizontal bars."""

    name: str  # of the file
    title: str
    axis: str
    groups: list[str]
    series: dict[str, list[float | None]]  # a value per group; None: no bar
    log: bool = False
    line: float | None = None  # where a value is as good as ours


class Section(NamedTuple):
    """What one file becomes."""

    lines: list[str]
    plots: list[Bars]


def number(x: object) -> str:
    """Three significant digits; what is no number as it is."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return "" if x is None else str(x)
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(number(cell).replace("|", "\\|") for cell in row) + " |")
    return [*lines, ""]


def records(rows: Json) -> list[str]:
    """A table of {name: {field: number or text}}; fields that hold more than one value are left out."""
    flat = {name: {k: v for k, v in row.items() if not isinstance(v, dict | list)} for name, row in rows.items()}
    fields = list(dict.fromkeys(field for row in flat.values() for field in row))
    return table(["", *fields], [[name, *(row.get(f) for f in fields)] for name, row in flat.items()])


def facts(data: Json) -> list[str]:
    """Machine, versions and commit, as far as a file holds them."""
    machine, found = data.get("machine"), []
    if isinstance(machine, dict):
        found += [str(machine[k]) for k in ("device", "cpu", "processor", "platform") if machine.get(k)]
        found += [f"{machine['cores']} cores"] if "cores" in machine else []
    elif machine:
        found.append(str(machine))
    versions = data.get("versions") or (machine.get("versions") if isinstance(machine, dict) else None) or {}
    found += [f"{name} {version}" for name, version in versions.items() if version]
    commit = data.get("commit") or (machine.get("commit") if isinstance(machine, dict) else None)
    found += [f"commit {commit[:10]}{'+changes' if commit.endswith('+changes') else ''}"] if commit else []
    return ["Measured on: " + ", ".join(found) + ".", ""] if found else []


def shape_of(entry: Json) -> str:
    """An entry's shape in a line."""
    shape = " ".join(f"{k}={number(v)}" for k, v in entry["shape"].items())
    return shape if entry["dtype"] == "float32" else f"{shape} {entry['dtype']}"


def kernel_speed(data: Json) -> Section:
    """How many times as fast, and how many times less memory, ours is than each other way to compute the same."""
    lines, plots = [], []
    entries = data["entries"]
    for machine in {json.dumps(e["machine"]["versions"] | {"cpu": e["machine"]["cpu"]}): e for e in entries}.values():
        lines += facts(machine)
    rows = []
    for e in entries:
        for name, v in e["variants"].items():
            rows.append([e["operator"], shape_of(e), e["threads"], name, v["ms"], v["gflop_per_s"], v["gb_per_s"],
                         f"{100 * v['share_of_roofline']:.0f}%", v["ours_is_faster_by"]])  # fmt: skip
    head = ["operator", "shape", "threads", "", "ms", "GFLOP/s", "GB/s", "roofline", "ours is faster by"]
    lines += table(head, rows)
    measured = [e for e in entries if "mib" in e["variants"]["ours"]]
    rows = []
    for e in measured:
        for name, v in e["variants"].items():
            less = v["ours_takes_less_memory_by"]
            rows.append([e["operator"], shape_of(e), name, v["mib"]["allocated"], v["mib"].get("resident"),
                         v["mib"]["result"], less["allocated"], less["allocated beyond the result"]])  # fmt: skip
    head = ["operator", "shape", "", "MiB allocated", "MiB resident", "MiB of the result", "ours takes less by",
            "beyond the result"]  # fmt: skip
    lines += ["Peak memory of one step, one thread:", "", *table(head, rows)]
    reasons = {f"{name}: {reason}" for e in entries for name, reason in e["unavailable"].items()}
    lines += [f"- not measured, {reason}" for reason in sorted(reasons)] + [""] * bool(reasons)
    for threads in sorted({e["threads"] for e in entries}):
        chosen = [e for e in entries if e["threads"] == threads]
        plots.append(_ratios(f"kernel_speed_{data['device']}_{threads}", chosen,
                             f"Speed on {data['device']}, {threads} thread{'s' * (threads > 1)}", "ours is faster by",
                             lambda v: v["ours_is_faster_by"]))  # fmt: skip
    plots.append(_ratios(f"kernel_memory_{data['device']}", measured, f"Peak memory on {data['device']}, allocated in a step",
                         "ours takes less by", lambda v: v["ours_takes_less_memory_by"]["allocated"]))  # fmt: skip
    return Section(lines, plots)


def _ratios(name: str, entries: list[Json], title: str, axis: str, value: Callable[[Json], float]) -> Bars:
    others = list(dict.fromkeys(v for e in entries for v in e["variants"] if v != "ours"))
    series = {o: [value(e["variants"][o]) if o in e["variants"] else None for e in entries] for o in others}
    return Bars(name, title, axis, [f"{e['operator']} {shape_of(e)}" for e in entries], series, log=True, line=1.0)


def aot_report(data: Json) -> Section:
    """What the compiler makes of the Triton kernels: the heaviest specialisation of each, and what is wrong."""
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    wrong = [r for r in rows if r["problems"]]
    lines = [f"{len(rows)} kernels compiled with Triton {data['triton']} (no GPU), {len(wrong)} with problems.", ""]
    worst: dict[tuple[str, ...], Json] = {}
    for r in rows:
        key = r["kernel"], r["arch"], r["dtype"], str(r["D"])
        if key not in worst or r["registers"] > worst[key]["registers"]:
            worst[key] = r
    fields = ["registers", "spills", "shared", "matrix", "wide_loads", "floor_us"]
    head = ["kernel", "architecture", "dtype", "D", *fields[:5], "predicted floor, us"]
    lines += table(head, [[*key, *(r[f] for f in fields)] for key, r in sorted(worst.items())])
    lines += [
        f"- {r['arch']} {r['dtype']} D={r['D']} {r['kernel']} {r['sizes']}: {'; '.join(r['problems'])}" for r in wrong
    ]
    return Section([*lines, ""] if wrong else lines, [])


def gpu_acceptance(data: Json) -> Section:
    """Which steps passed on the card."""
    steps = {k: v for k, v in data.items() if isinstance(v, dict) and "passed" in v}
    rows = [[k, "passed" if v["passed"] else v.get("skipped", "FAILED")] for k, v in steps.items()]
    return Section([f"{data.get('card', data.get('device'))}:", "", *table(["step", "result"], rows)], [])


def quality(data: Json) -> Section:
    """Test metrics by split and model, mean and spread over seeds."""
    lines, plots = [*facts(data), f"{data['protocol']}.", ""], []
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
        if counted := split.get("pop_by_interactions"):
            told = ", ".join(f"{n} {counted[n]:.4g}" for n in names if n in counted)
            lines += [f"RecBole's Pop counts an item once per batch; counting interactions it has {told}.", ""]
        lines += _by_popularity(rows, metric)
        series = {metric: [r["mean"].get(metric) for r in rows]}
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


def import_speed(data: Json) -> Section:
    """Seconds and peak memory of reading and importing."""
    rows = data["measurements"]
    cells = [[r["name"], r.get("library"), r.get("rows_out"), r["seconds"], r.get("peak_mib")] for r in rows]
    lines = [f"{number(data['rows'])} rows:", "", *table(["", "library", "rows out", "seconds", "peak MiB"], cells)]
    series = {"seconds": [r["seconds"] for r in rows]}
    return Section(lines, [Bars("import_speed", "Reading and importing", "seconds", [r["name"] for r in rows], series)])


def stock_models(data: Json) -> Section:
    """How many of RecBole's models run."""
    models = data["models"]
    counts = Counter((m["type"], m["result"]) for m in models)
    lines = [*facts(data), f"{data['data']}: {len(models)} models.", ""]
    lines += table(["type", "result", "models"], [[*key, n] for key, n in sorted(counts.items())])
    lines += [f"- {m['model']}: {m['result']}" for m in models if m["result"] != "ok"]
    return Section([*lines, ""], [])


def encode_speed(data: Json) -> Section:
    """Texts encoded a second."""
    compared = data["compared"]
    names = list(compared["seconds"])
    fields = [f for f in compared if isinstance(compared[f], dict) and set(names) <= set(compared[f])]
    cells = [[n, *(compared[f][n] for f in fields if not isinstance(compared[f][n], list))] for n in names]
    shown = [f for f in fields if not isinstance(compared[f][names[0]], list)]
    return Section([*facts(data), *table(["", *(f.replace("_", " ") for f in shown)], cells)], [])


def recommend_speed(data: Json) -> Section:
    """Recommending for every user: the command beside RecBole's function, and a large made catalogue."""
    same = data["agreement"]
    lines = [*facts(data), f"All users of {data['dataset']}, k = {data['k']}:", "", *records(data["checkpoint"])]
    lines += [f"Of {same['users']:,} users {same['same_order']:.1%} get the same items in the same order.", ""]
    return Section([*lines, "A made catalogue:", "", *records({"recbole-llm recommend": data["made"]})], [])


def serving(data: Json) -> Section:
    """Requests a second and latencies of the services compared."""
    lines = facts(data)
    parts = {"": data} | {name: part for name, part in data.items() if isinstance(part, dict)}
    for name, part in parts.items():
        if "servers" in part:
            lines += [*([f"{name}:", ""] if name else []), *records(part["servers"])]
    return Section(lines, [])


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
    return Section([*facts(data), f"{data['protocol']}.", "", *table(head, rows)], [])


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


def end_to_end(data: Json) -> Section:
    """Training and evaluation inside RecBole: ratios of paired runs, then every system alone, by size of catalogue."""
    lines, alone = facts(data), {}
    for name, cell in data["cells"].items():
        if "training" in cell:
            rows = [[n, c["positives_per_s"], c["times_bpr"]] for n, c in cell["training"].items()]
            lines += [f"{name}:", "", *table(["training", "positives/s", "x BPR"], rows)]
            rows = [
                [n, 1e3 * c["s"], c["times_stock_default"], c["times_stock_best"]]
                for n, c in cell["evaluation"]["variants"].items()
            ]
            head = [f"evaluation of {cell['evaluation']['users']:,} users", "ms", "x stock default", "x stock best"]
            lines += table(head, rows)
        elif "epoch_s" in cell:
            alone[name] = cell
        else:
            lines += [f"{name}: {cell.get('error') or 'stopped after ' + number(cell['stopped_after_s']) + ' s'}", ""]
    best = {name: min(c["eval"].items(), key=lambda entry: entry[1]["s"]) for name, c in alone.items()}
    head = ["", "epoch s", "positives/s", "peak MiB", "users ranked", "evaluation s", "peak MiB", "eval_batch_size"]
    lines += table(
        head,
        [
            [name, c["epoch_s"], c["positives_per_s"], c["epoch_peak_mib"], c["eval_users"], best[name][1]["s"],
             best[name][1]["peak_mib"], best[name][0]] for name, c in alone.items()
        ],
    )  # fmt: skip
    sizes = list(dict.fromkeys(f"{c['items']:,} items" for c in sorted(alone.values(), key=lambda c: c["items"])))
    systems = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in alone))
    plots = []
    for field, title in (("epoch_s", "seconds per epoch"), ("process_peak_mib", "MiB of the process at its largest")):
        series: dict[str, list[float | None]] = {system: [None] * len(sizes) for system in systems}
        for name, cell in alone.items():
            series[name.rsplit(", ", 1)[0]][sizes.index(f"{cell['items']:,} items")] = cell[field]
        plots.append(Bars(f"end_to_end_{field}", f"Catalogues by size: {title}", title, sizes, series, log=True))
    return Section(lines, plots)


RENDERERS: dict[str, Callable[[Json], Section]] = {
    f.__name__: f
    for f in (
        kernel_speed,
        aot_report,
        gpu_acceptance,
        quality,
        subsets,
        cold,
        temporal,
        calibration,
        sharing,
        robustness,
        import_speed,
        stock_models,
        encode_speed,
        recommend_speed,
        serving,
        end_to_end,
    )
}


def kind_of(stem: str) -> str | None:
    """The renderer for a file of this name; None: there is none."""
    fitting = [kind for kind in RENDERERS if stem == kind or stem.startswith((f"{kind}-", f"{kind}_"))]
    return max(fitting, key=len) if fitting else None


def section(file: Path) -> Section:
    """One file; of an unknown kind, or not as its kind was when the renderer was written: said so."""
    data, kind = json.loads(file.read_text(encoding="utf-8")), kind_of(file.stem)
    if kind is None:
        fields = ", ".join(data) if isinstance(data, dict) else f"a list of {len(data)}"
        found = facts(data) if isinstance(data, dict) else []
        return Section([*found, f"No renderer for this kind of file. It holds: {fields}.", ""], [])
    try:
        return RENDERERS[kind](data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return Section([f"Not rendered: {kind} files have changed ({type(error).__name__}: {error}).", ""], [])


def draw(bars: Bars, folder: Path) -> Path:
    """Write the plot as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "recbole-llm", "font.size": 8})
    count = len(bars.series)
    figure, axes = plt.subplots(figsize=(9, 0.8 + len(bars.groups) * (0.12 + 0.13 * count)))
    for place, (name, values) in enumerate(bars.series.items()):
        drawn = [(g + 0.8 * (place + 0.5) / count - 0.4, v) for g, v in enumerate(values) if v is not None]
        axes.barh([y for y, _ in drawn], [v for _, v in drawn], height=0.7 / count, label=name)
        for y, v in drawn:
            axes.text(v, y, f" {number(float(v))}", va="center", fontsize=6)
    axes.set_yticks(range(len(bars.groups)), bars.groups)
    axes.invert_yaxis()
    axes.set_xlabel(bars.axis)
    axes.set_title(bars.title)
    if bars.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if bars.line is not None:
        axes.axvline(bars.line, color="black", linewidth=0.8)
    if count > 1:
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bars.name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


def render(results: Path, output: Path, plots: bool) -> list[str]:
    """The report's lines; plots go to the folder "plots" beside ``output``."""
    lines = ["# Results", "", "Written by `python benchmarks/report.py` from the JSON files in this folder.", ""]
    files = sorted(results.glob("*.json"))
    for file in files:
        part = section(file)
        lines += [f"## {file.name}", "", *part.lines]
        if plots:
            drawn = [draw(bars, output.parent / "plots") for bars in part.plots]
            lines += [line for path in drawn for line in (f"![{path.stem}](plots/{path.name})", "")]
    return lines if files else [*lines, "There is no result file.", ""]


def main(arguments: list[str] | None = None) -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--output", type=Path, help="Markdown file; default: REPORT.md in that folder")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="tables only, without matplotlib")
    options = parser.parse_args(arguments)
    output = options.output or options.results / "REPORT.md"
    try:
        lines = render(options.results, output, options.plots)
    except ImportError as error:
        print(f"plots need matplotlib ({error}): pip install 'recbole-llm[bench]', or add --no-plots")
        return 1
    output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
