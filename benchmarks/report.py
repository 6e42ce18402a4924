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
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import report_quality
from report_parts import Json, Section, facts, number, records, table
from report_plots import Dot, Dots, Panel, Plot, Row, draw, short, span
from report_quality import (
    calibration,
    cold,
    gains,
    gains_by_time,
    large_catalogue,
    quality,
    robustness,
    sharing,
    stages,
    subsets,
    svd_form,
    temporal,
    temporal_pair,
)

RESULTS = Path(__file__).parent / "results"


def shape_of(entry: Json) -> str:
    """An entry's shape in a line."""
    shape = " ".join(f"{k}={number(v)}" for k, v in entry["shape"].items())
    return shape if entry["dtype"] == "float32" else f"{shape} {entry['dtype']}"


def kernel_speed(data: Json) -> Section:
    """How many times as fast, and how many times less memory, ours is than each other way to compute the same."""
    lines = []
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
    return Section(lines, [_speed(data["device"], entries), *([_memory(data["device"], measured)] if measured else [])])


def _share(of_roofline: float | None) -> str:
    return "in cache" if of_roofline is None else f"{of_roofline:.0%}"


def _ratios(entries: list[Json], names: list[str], value: Callable[[Json], float], named: bool = True) -> list[Row]:
    """A row for each name: a dot for every other way to compute the same."""
    found = {f"{entry['operator']} {shape_of(entry)}": entry for entry in entries}
    rows = []
    for name in names:
        others = found[name]["variants"].items() if name in found else ()
        dots = [Dot(value(variant), series=other) for other, variant in others if other != "ours"]
        rows.append(Row(name if named else "", dots))
    return rows


def _names(entries: list[Json]) -> list[str]:
    return list(dict.fromkeys(f"{entry['operator']} {shape_of(entry)}" for entry in entries))


def _speed(device: str, entries: list[Json]) -> Dots:
    threads = sorted({e["threads"] for e in entries})
    panels = []
    for n in threads:
        chosen = [e for e in entries if e["threads"] == n]
        rows = _ratios(chosen, _names(entries), lambda v: v["ours_is_faster_by"], named=not panels)
        panels.append(Panel(f"{n} thread{'s' * (n > 1)}", rows, log=True, line=1.0))
    faster = [v["ours_is_faster_by"] for e in entries for name, v in e["variants"].items() if name != "ours"]
    slower = sum(ratio < 1 for ratio in faster)
    eager = [e["variants"]["eager"]["ours_is_faster_by"] for e in entries if "eager" in e["variants"]]
    where = device.upper() if device == "cpu" else device
    told = f"; {slower} of {len(faster)} comparisons {'is' if slower == 1 else 'are'} lost" if slower else ""
    finding = f"{where}: ours is {span(eager)} times as fast as eager PyTorch{told}" if eager else f"Speed on {where}"
    note = "time of the other over ours, medians of paired rounds; 1: as fast as ours"
    return Dots(f"kernel_speed_{device}", finding, note, panels)


def _memory(device: str, entries: list[Json]) -> Dots:
    rows = _ratios(entries, _names(entries), lambda v: v["ours_takes_less_memory_by"]["allocated"])
    eager = [
        e["variants"]["eager"]["ours_takes_less_memory_by"]["allocated"] for e in entries if "eager" in e["variants"]
    ]
    finding = f"Eager PyTorch allocates {span(eager)} times as much in a step" if eager else f"Memory on {device}"
    note = "peak memory allocated in a step, the other over ours; 1: as much as ours"
    return Dots(f"kernel_memory_{device}", finding, note, [Panel("", rows, log=True, line=1.0)])


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
    imports = {r["name"]: r["seconds"] for r in rows if r["name"].startswith("import csv, ")}
    ours = imports.get("import csv, ours")
    others = [seconds for name, seconds in imports.items() if name != "import csv, ours"]
    finding = (
        f"From CSV to RecBole's files in {short(ours)} s; the same written with other libraries takes {span(others)} s"
        if ours and others
        else "Reading and importing"
    )
    plot = Dots(
        "import_speed",
        finding,
        f"seconds for {number(data['rows'])} rows",
        [Panel("", [Row(r["name"], [Dot(r["seconds"], ours=r["name"].endswith("ours"))]) for r in rows])],
    )
    return Section(lines, [plot])


def import_paired(data: Json) -> Section:
    """Processor time of an import beside an earlier version's."""
    head = ["", "rows", "rounds", "seconds", "then", "ratio, median of the rounds", "quartiles", "peak MiB", "then"]
    rows = [
        [name, r["rows"], r["rounds"], r["ours"]["cpu_s"], r["against"]["cpu_s"], r["cpu_ratio"],
         span(r["cpu_ratio_quartiles"]), r["ours"]["peak_mib"], r["against"]["peak_mib"]]
        for name, r in data.items()
    ]  # fmt: skip
    commits = sorted({r["against_commit"][:7] for r in data.values()})
    return Section([f"Processor time, in turn with {', '.join(commits)}:", "", *table(head, rows)], [])


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
    plots = [_alone(field, title, alone) for field, title in ALONE] if alone else []
    return Section(lines, plots)


ALONE = (("epoch_s", "seconds an epoch"), ("process_peak_mib", "MiB of the process at its largest"))


def _alone(field: str, title: str, cells: dict[str, Json]) -> Dots:
    """Every system alone, a panel for each size of catalogue."""
    panels = []
    least: dict[int, tuple[str, float]] = {}
    systems: dict[str, dict[int, float]] = {}
    for name, cell in cells.items():
        system = re.sub(r", (ml-|syn)[^,]*(, all users)?$", "", name)
        systems.setdefault(system, {}).setdefault(cell["items"], cell[field])
    sizes = sorted({cell["items"] for cell in cells.values()})
    order = sorted(systems, key=lambda system: ("LLMTwoTower" not in system, min(systems[system].values())))
    for size in sizes:
        found = {system: systems[system].get(size) for system in order}
        least[size] = min(((n, v) for n, v in found.items() if v is not None), key=lambda entry: entry[1])
        rows = [
            Row(name.replace("LLMTwoTower", "ours") if size == sizes[0] else "",
                [] if value is None else [Dot(value, ours="LLMTwoTower" in name)])
            for name, value in found.items()
        ]  # fmt: skip
        panels.append(Panel(f"{size:,} items", rows, log=True))
    first = sum("LLMTwoTower" in name for name, _ in least.values())
    finding = f"Ours takes the least at {first} of {len(least)} sizes of catalogue: {title}"
    return Dots(
        f"end_to_end_{field}",
        finding,
        f"{title}, one run each; systems that are missing at a size were not run there",
        panels,
    )


def attacks(data: Json) -> Section:
    """What honest clients see beside attacks, and what became of wrong files and of killed commands; each part as measured."""
    lines: list[str] = []
    if load := data.get("load"):
        sides = {"honest load": load["honest"], **load["attacks"], "honest load again": load["honest_again"]}
        fields = ["answered_share", "p99_ms", "health_p50_ms", "health_p99_ms", "health_max_ms"]
        fields += ["rss_before_mib", "rss_peak_mib", "rss_after_mib"]
        cells = [[name.replace("_", " "), *(row.get(f) for f in fields)] for name, row in sides.items()]
        lines += [*facts(load), *table(["", *(f.replace("_", " ") for f in fields)], cells)]
    if speed := data.get("speed"):
        fields = ["requests_per_cpu_s", "rps", "p50_ms", "p99_ms", "health_p99_ms", "failed"]
        cells = [[name, *(speed[name][f] for f in fields)] for name in ("ours", "against")]
        said = f"In turn with {speed['against_commit'][:7]}, {speed['clients']} clients, {speed['rounds']} rounds: ratio of "
        said += (
            f"requests per processor second {speed['requests_per_cpu_s_ratio']}, of p99 {speed['p99_ratio']}, medians."
        )
        lines += [*facts(speed), said, "", *table(["", *(f.replace("_", " ") for f in fields)], cells)]
    if fuzz := data.get("fuzz"):
        kinds = {kind: fuzz[kind] for kind in ("exports", "checkpoints", "requests")}
        told = [f"{kind}: {', '.join(f'{what} {n:,}' for what, n in counts.items())}" for kind, counts in kinds.items()]
        lines += [*facts(fuzz), f"{'; '.join(told)}. Anything else: {len(fuzz['other'])}.", ""]
    if kills := data.get("kills"):
        commands = {name: row for name, row in kills.items() if isinstance(row, dict) and "kills" in row}
        cells = [[name, row["kills"], len(row["lost"]), len(row["half"])] for name, row in commands.items()]
        lines += [*facts(kills), *table(["killed with -9", "kills", "lost", "half"], cells)]
    return Section(lines, [])


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
        temporal_pair,
        calibration,
        sharing,
        robustness,
        svd_form,
        large_catalogue,
        stages,
        import_speed,
        import_paired,
        hostile_imports,
        import_time,
        sequential_speed,
        stock_models,
        encode_speed,
        recommend_speed,
        serving,
        attacks,
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
        tables = report_quality.records_of(data) if isinstance(data, dict) else []
        return Section([*found, *(tables or [f"No renderer for this kind of file. It holds: {fields}.", ""])], [])
    if kind == "quality" and not data.get("part"):  # models of the same dataset in files of their own
        data["parts"] = [
            json.loads(other.read_text(encoding="utf-8")) for other in file.parent.glob(f"{file.stem}-*.json")
        ]
    try:
        return RENDERERS[kind](data)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        return Section([f"Not rendered: {kind} files have changed ({type(error).__name__}: {error}).", ""], [])


# what a reader looks for first; kinds that are not named stand between the two
FIRST_KINDS = ("quality", "temporal", "cold", "subsets", "robustness", "calibration", "stages", "svd_form", "large_catalogue",
               "end_to_end",
               "kernel_speed", "serving")  # fmt: skip
LAST_KINDS = ("stock_models", "gpu_acceptance", "emulator", "aot_report")


def place_of(file: Path) -> tuple[int, str]:
    """Where a file's section stands: quality first, lists of registers and models last."""
    kind = kind_of(file.stem)
    if kind in FIRST_KINDS:
        return FIRST_KINDS.index(kind), file.name
    after = len(FIRST_KINDS)
    return (after + 1 + LAST_KINDS.index(kind) if kind in LAST_KINDS else after), file.name


def render(results: Path, output: Path, plots: bool) -> list[str]:
    """The report's lines; plots go to the folder "plots" beside ``output``."""
    lines = ["# Results", "", "Written by `python benchmarks/report.py` from the JSON files in this folder.", ""]
    files = sorted(results.glob("*.json"), key=place_of)
    drawn: set[str] = set()
    parts = [(file, section(file)) for file in files]
    findings = first_findings(results)
    if findings:
        lines += ["## Five findings", ""] if len(findings) == 5 else ["## Findings", ""]
    for plot, told in findings:
        lines += [f"**{plot.finding if plot else told}.**" + (f" {told}" if plot else ""), ""]
        lines += _pictures([plot] if plot else [], output, plots, drawn)
        if not plot and plots:
            lines += ["![requests a second and latency](../figures/serving.svg)", ""]
    for file, part in parts:
        lines += [f"## {file.name}", "", *part.lines, *_pictures(part.plots, output, plots, drawn)]
    return lines if files else [*lines, "There is no result file.", ""]


def _pictures(found: list[Plot], output: Path, plots: bool, drawn: set[str]) -> list[str]:
    """Draw plots and show them; one that stands further up already is not shown again."""
    lines = []
    for plot in found if plots else []:
        if plot.name not in drawn:
            drawn.add(plot.name)
            path = draw(plot, output.parent / "plots")
            lines += [f"![{plot.finding}](plots/{path.name})", ""]
    return lines


def first_findings(results: Path) -> list[tuple[Plot | None, str]]:
    """What the whole comes to: a plot and a sentence each, or a sentence alone; of files that are there."""
    found: list[tuple[Plot | None, str]] = []
    read = lambda name: json.loads(file.read_text()) if (file := results / name).is_file() else None  # noqa: E731
    random_splits = [
        {**data, "parts": [json.loads(part.read_text()) for part in results.glob(f"quality-{name}-*.json")]}
        for name in DATASETS
        if (data := read(f"quality-{name}.json"))
    ]
    by_time = [data for name in DATASETS if (data := read(f"temporal-{name}.json"))]
    cold, kernels, served = read("cold-ml-100k.json"), read("kernel_speed.json"), read("serving.json")
    if random_splits:
        found.append(
            (
                gains(random_splits),
                "Random splits, the first of three; every model at its best of a budget of settings.",
            )
        )
    if by_time:
        found.append((gains_by_time(by_time), "The last item of each user, a leave-one-out split."))
    if cold:
        found.append((report_quality.cold_plot(cold), "Items without a training interaction, ranked by their text."))
    if kernels:
        found.append((section_of_kernels(kernels), "No figure of a GPU has been measured."))
    if served:
        small = served["small"]
        ours, others = small["servers"]["ours"], {n: s for n, s in small["servers"].items() if n != "ours"}
        best = max(others, key=lambda name: others[name]["rps"])
        found.append((None, f"The service answers {short(ours['rps'])} requests a second at {small['items']:,} items, "
                            f"{short(small['ours_over'][best]['rps'])} times the next, a {NAMES.get(best, best)}"))  # fmt: skip
    return found


NAMES = {"naive": "plain FastAPI service"}
DATASETS = ("ml-100k", "amazon-office", "ml-1m-text")


def section_of_kernels(data: Json) -> Plot:
    """The plot of the operators' speed."""
    return _speed(data["device"], data["entries"])


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
        print(f"plots need matplotlib ({error}): pip install -e '.[bench]' in the checkout, or add --no-plots")
        return 1
    output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
