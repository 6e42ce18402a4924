"""Markdown tables and SVG plots from every result file in a folder.

    python benchmarks/report.py                              # benchmarks/results/*.json to REPORT.md and plots/*.svg there
    python benchmarks/report.py --results FOLDER --no-plots

One small renderer per kind of file, found by the file's name up to the first "-" or "_<card>": add a function and its
line in ``RENDERERS``; those on quality stand in report_quality.py. A file of another kind is listed as such. Nothing is
measured here, and no figure is changed but for rounding. Plots need the extra "bench" (matplotlib); the same results give
the same bytes.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from report_parts import Bars, Json, Section, facts, number, records, table
from report_quality import calibration, cold, quality, robustness, sharing, subsets, svd_form, temporal

RESULTS = Path(__file__).parent / "results"


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
                         _share(v["share_of_roofline"]), v["ours_is_faster_by"]])  # fmt: skip
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


def _share(of_roofline: float | None) -> str:
    return "in cache" if of_roofline is None else f"{of_roofline:.0%}"


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


def emulator(data: Json) -> Section:
    """What executing the PTX of the kernels showed; emulator.md has every combination."""
    rows = []
    for version, result in data["triton"].items():
        mistakes = [r for r in result["rows"] if "mistake" in r]
        runs = [r for r in result["rows"] if "mistake" not in r]
        passed = [sum(r["outcome"] == "passed" for r in part) for part in (runs, mistakes)]
        instructions = sum(r.get("instructions", 0) for r in runs)
        rows.append([version, f"{passed[0]} of {len(runs)}", f"{passed[1]} of {len(mistakes)}", instructions])
    head = ["Triton", "combinations that agree with float64", "mistakes seen", "instructions executed"]
    return Section([data["limits"], "", *table(head, rows)], [])


def gpu_acceptance(data: Json) -> Section:
    """Which steps passed on the card."""
    steps = {k: v for k, v in data.items() if isinstance(v, dict) and "passed" in v}
    rows = [[k, "passed" if v["passed"] else v.get("skipped", "FAILED")] for k, v in steps.items()]
    return Section([f"{data.get('card', data.get('device'))}:", "", *table(["step", "result"], rows)], [])


def import_speed(data: Json) -> Section:
    """Seconds and peak memory of reading and importing."""
    rows = data["measurements"]
    cells = [[r["name"], r.get("library"), r.get("rows_out"), r["seconds"], r.get("peak_mib")] for r in rows]
    lines = [f"{number(data['rows'])} rows:", "", *table(["", "library", "rows out", "seconds", "peak MiB"], cells)]
    series = {"seconds": [r["seconds"] for r in rows]}
    return Section(lines, [Bars("import_speed", "Reading and importing", "seconds", [r["name"] for r in rows], series)])


def hostile_imports(data: Json) -> Section:
    """What became of hostile files, and the most memory that an import of each kind took."""
    parts = data["parts"]
    good, refused = (sum(part["counts"][name] for part in parts) for name in ("good", "refused"))
    odd = [f"{name}: {what}" for part in parts for name, what in part["odd"].items()]
    kinds: Json = {}
    for part in parts:
        for kind, counts in part["by_kind"].items():
            row = kinds.setdefault(kind, {"good": 0, "refused": 0, "peak_mib": 0.0, "file_mib": 0.0})
            row |= {name: row[name] + counts[name] for name in ("good", "refused")}
            most = part["most_memory"][kind]
            if most["peak_mib"] > row["peak_mib"]:
                row |= {name: most[name] for name in ("peak_mib", "file_mib")}
    head = ["kind", "good", "refused", "most MiB beyond what was resident", "MiB of that file"]
    rows = [[kind, *row.values()] for kind, row in sorted(kinds.items())]
    said = (
        f"{good + refused + len(odd)} files: {good} good imports, {refused} clean refusals, {len(odd)} anything else."
    )
    return Section([*facts(data), said, *odd, "", *table(head, rows)], [])


def import_time(data: Json) -> Section:
    """What importing the plugin costs, beside RecBole's own import."""
    lines = facts({**data, "machine": data.get("cpu")})
    for run in data["runs"]:
        told = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines += [f"Seconds, {run['rounds']} rounds, {told}:", "", *records(run["seconds"])]
        lines += [f"Added to RecBole's import: {number(run['added_to_recbole']['wall'])} s.", ""]
    return Section(lines, [])


def sequential_speed(data: Json) -> Section:
    """Training steps of RecBole's sequential models with and without PyTorch's anomaly mode."""
    names, rows = ("anomaly mode", "repaired"), []
    for model, m in data["models"].items():
        rows.append([model, m["rounds"], *(m[name]["ms"] for name in names), *m["repaired_is_faster"].values()])
    heads = ["model", "rounds", *(f"{name}, ms a step" for name in names), "times as fast", "by CPU time"]
    about = (
        f"{data['dataset']}, batches of {data['train_batch_size']}, histories of {data['MAX_ITEM_LIST_LENGTH']} items:"
    )
    return Section([*facts(data), about, "", *table(heads, rows)], [])


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
    rows = [
        [name, c["epoch_s"], c["positives_per_s"], c["epoch_peak_mib"], c["eval_users"], best[name][1]["s"],
         best[name][1]["peak_mib"], best[name][0]] for name, c in alone.items()
    ]  # fmt: skip
    lines += table(head, rows) if alone else []
    sizes = list(dict.fromkeys(f"{c['items']:,} items" for c in sorted(alone.values(), key=lambda c: c["items"])))
    systems = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in alone))
    plots = []
    drawn = (("epoch_s", "seconds per epoch"), ("process_peak_mib", "MiB of the process at its largest"))
    for field, title in drawn if alone else ():
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
        emulator,
        gpu_acceptance,
        quality,
        subsets,
        cold,
        temporal,
        calibration,
        sharing,
        robustness,
        svd_form,
        import_speed,
        hostile_imports,
        import_time,
        sequential_speed,
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
