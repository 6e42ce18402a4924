"""The benchmarks themselves: the quick grid runs and refuses wrong results; the report renders what result files hold."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_cases
import kernel_speed
import report
import report_quality

SMALL = {"P": 300, "B": 20, "K": 5, "E": 200, "n": 200, "N": 300, "D": 16}  # of every name in a shape
TINY = {name: {k: SMALL.get(k, v) for k, v in shape.items()} for name, shape in kernel_cases.QUICK}


@pytest.fixture
def real_buffers(monkeypatch):
    monkeypatch.undo()  # the profiler and the baselines fill their own


@pytest.fixture
def tiny(monkeypatch, real_buffers):
    monkeypatch.setattr(kernel_speed, "QUICK", [(name, TINY[name]) for name in kernel_cases.OPERATORS])
    monkeypatch.setattr(kernel_cases, "competitors", dict)
    slow = kernel_speed.timing.paired
    monkeypatch.setattr(kernel_speed.timing, "paired", lambda v, budget, device: slow(v, 0.01, device))
    limits = {"flop_per_s": 1e11, "mm_flop_per_s": 1e11, "bytes_per_s": 1e10}
    monkeypatch.setattr(kernel_speed.timing, "ceilings", lambda *_: limits)


def test_the_quick_grid_shows_every_operator(tiny, capsys):
    assert kernel_speed.main(["--quick", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name in kernel_cases.OPERATORS:
        assert f"{name}  " in shown
    assert shown.count("  ours  ") == len(TINY)


def test_a_wrong_result_is_not_timed(tiny, monkeypatch):
    right = kernel_cases.kernels.pair_bce
    monkeypatch.setattr(kernel_cases.kernels, "pair_bce", lambda *args: 1.001 * right(*args))
    with pytest.raises(SystemExit, match="pair_bce .*not timed, the result is wrong"):
        kernel_speed.main(["--quick", "--device", "cpu", "--only", "pair_bce"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux")
def test_memory_counts_what_is_held_at_once(real_buffers):
    """32 MiB kept beside 16 MiB that were freed before the last 16 MiB."""
    held = []

    def call():
        torch.ones(1 << 22)
        held.append(torch.ones(1 << 23))
        torch.ones(1 << 22)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = kernel_speed.timing.peak_memory(call, "cpu", held.clear)
    finally:
        torch.set_num_threads(before)
    assert found["allocated"] == pytest.approx(48, abs=1)
    assert found["resident"] >= 48


def entry(threads, **mib):
    ours = {"ms": 2.0, "gflop_per_s": 3.0, "gb_per_s": 4.0, "share_of_roofline": 0.5, "ours_is_faster_by": 1.0}
    eager = ours | {"ms": 5.0, "ours_is_faster_by": 2.5}
    for variant, memory in ((ours, 10.0), (eager, 40.0)) if mib else ():
        variant["mib"] = {"allocated": memory, "resident": memory, "result": 5.0}
        variant["ours_takes_less_memory_by"] = {"allocated": memory / 10, "allocated beyond the result": 7.0}
    return {"operator": "pair_bce", "shape": {"P": 65536}, "dtype": "float32", "threads": threads,
            "machine": {"cpu": "A processor", "versions": {"torch": "2.13"}, "commit": "abc"},
            "unavailable": {"Liger-Kernel": "not installed"}, "variants": {"eager": eager, "ours": ours}}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    files = {
        "kernel_speed": {"device": "cpu", "entries": [entry(1, mib=True), entry(2)]},
        "gpu_acceptance_a-card": {"card": "A card", "tests": {"passed": True}, "speed": {"passed": False}},
        "something-new": {"machine": {"cpu": "A processor"}, "figures": [1]},
        "stock_models": {"models": "not what it was"},
    }
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


def test_the_report_holds_every_file(results):
    assert report.main(["--results", str(results), "--no-plots"]) == 0
    text = (results / "REPORT.md").read_text()
    assert "| pair_bce | P=65,536 | 2 | eager | 5 | 3 | 4 | 50% | 2.5 |" in text
    assert "| pair_bce | P=65,536 | eager | 40 | 40 | 5 | 4 | 7 |" in text
    assert "- not measured, Liger-Kernel: not installed" in text
    assert "| tests | passed |\n| speed | FAILED |" in text
    assert (
        "## something-new.json\n\nMeasured on: A processor.\n\nNo renderer for this kind of file. It holds: machine"
        in text
    )
    assert "Not rendered: stock_models files have changed" in text


def test_plots_are_svg_and_the_same_again(results):
    pytest.importorskip("matplotlib")
    assert report.main(["--results", str(results)]) == 0
    drawn = {file.name: file.read_bytes() for file in (results / "plots").iterdir()}
    assert set(drawn) == {"kernel_speed_cpu.svg", "kernel_memory_cpu.svg"}
    assert all(x.startswith(b"<?xml") for x in drawn.values())
    assert (
        b"CPU: ours is 2.5 times as fast as eager PyTorch" in drawn["kernel_speed_cpu.svg"]
    )  # the title is the finding
    assert all(f"plots/{name}" in (results / "REPORT.md").read_text() for name in drawn)
    report.main(["--results", str(results)])
    assert drawn == {file.name: file.read_bytes() for file in (results / "plots").iterdir()}


def test_a_model_is_shown_at_its_best_setting_and_ours_is_not_first_where_it_is_not():
    def split(**means):
        d = {"mean": -0.01, "low": -0.02, "high": -0.001}
        rows = [
            {"model": m, "mean": {"ndcg@10": v}} | ({} if m == "LLMTwoTower" else {"difference": d})
            for m, v in means.items()
        ]
        return {"split_seed": 1, "metric": "ndcg@10", "rows": rows}

    data = {"dataset": "x", "splits": [split(LLMTwoTower=0.5, EASE=0.4, SLIMElastic=0.2)]}
    data["parts"] = [{"splits": [split(LLMTwoTower=0.51, SLIMElastic=0.45)]}]
    plot = report_quality.ranked_plot(data)
    assert plot.finding == "x: ours is number 1 of 3, +13% beside the best stock model, SLIMElastic"
    assert [(row.name, row.dots[0].value) for row in plot.panels[0].rows] == [
        ("LLMTwoTower", 0.5),
        ("SLIMElastic", 0.45),
        ("EASE", 0.4),
    ]
    data = {"dataset": "x", "splits": [split(LLMTwoTower=0.3, EASE=0.4)]}
    assert (
        report_quality.ranked_plot(data).finding == "x: ours is number 2 of 2, -25% beside the best stock model, EASE"
    )


def test_a_record_stands_beside_its_own_name():
    """Numbers and texts between the records, and versions, are no rows."""
    part = {"cores": 2, "versions": {"torch": "2"}, "ours": {"ms": 1}, "rounds": 3, "against": {"ms": 5, "why": {}}}
    lines = report_quality.records_of({"speed": part, "list": [1, {"ms": 7}]})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows == [["", "ms"], ["---", "---"], ["ours", "1"], ["against", "5"], ["", "ms"], ["---", "---"], ["", "7"]]


def test_the_attacks_of_the_report():
    data = json.loads((report.RESULTS / "attacks.json").read_text())
    lines = report.attacks(data).lines
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in lines if line.startswith("|"))}
    silent = data["load"]["attacks"]["silent"]
    assert float(rows["silent"][1]) == pytest.approx(silent["p99_ms"], rel=0.01)
    assert float(rows["ours"][1].replace(",", "")) == pytest.approx(data["speed"]["ours"]["rps"], rel=0.01)
    assert rows["reload"][0].strip() == str(data["kills"]["reload"]["kills"])
    assert any(str(data["speed"]["requests_per_cpu_s_ratio"]) in line for line in lines)
    assert len(report.attacks({"kills": data["kills"]}).lines) < len(lines)  # a part that was not measured is left out


def test_the_committed_report_is_of_the_committed_results():
    written = (report.RESULTS / "REPORT.md").read_text(encoding="utf-8").split("\n")
    without_plots = [line for line in written if not line.startswith("![")]
    made = report.render(report.RESULTS, report.RESULTS / "REPORT.md", plots=False)
    squeeze = lambda lines: [line for line in lines if line]  # noqa: E731
    assert squeeze(made) == squeeze(without_plots), "run python benchmarks/report.py"


def test_committed_results_of_the_kernels_are_rendered():
    for file in [*report.RESULTS.glob("kernel_speed*.json"), *report.RESULTS.glob("aot_report*.json")]:
        lines = report.section(file).lines
        assert len(lines) > 10 and not any(line.startswith("Not rendered") for line in lines)


def compiled_kernels(**asked):
    """Rows of the committed table of compiled kernels."""
    data = json.loads((kernel_speed.RESULTS / "aot_report.json").read_text())
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    return [row for row in rows if all(row[name] == value for name, value in asked.items())]


def test_the_committed_table_of_kernels_keeps_what_is_promised():
    """No spills, every tile fetched ahead, two programs at once; D = 384 leaves slopes; few instructions a logit."""
    rows = compiled_kernels()
    assert {row["arch"] for row in rows} >= {"sm_80", "sm_90", "sm_100"}
    assert not [row for row in rows if row["problems"] or row["spills"]]
    passes = [row for row in rows if row["kernel"].startswith("tile_pass") and row["dtype"] == "bfloat16"]
    assert {row["D"] for row in passes} >= {64, 384}
    for row in passes:
        assert row["pipelined"] is not False
        assert row["arch"].startswith("gfx") or 2 * 32 * row["warps"] * row["registers"] <= 65_536, row
        assert (
            row["D"] <= 128 or row["kernel"].endswith(", slopes") or row["kernel"][10:-1] in ("exp_sum", "group_max")
        ), row
    losses = compiled_kernels(arch="sm_90", dtype="bfloat16", D=64, kernel="tile_pass[bce]")
    loss, items = (
        [row for row in losses if ("value_ptr" in row["absent"].split(",")) == without] for without in (False, True)
    )
    assert loss and items
    assert max(row["per_logit"] for row in loss) <= 26 and max(row["per_logit"] for row in items) <= 21
    assert max(row["floor_us"] for row in loss) + max(row["floor_us"] for row in items) <= 2900
