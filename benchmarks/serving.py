"""The service under load: requests per second and per CPU second, latency, overload, swaps, restarts.

    python benchmarks/serving.py --output benchmarks/results/serving.json

Every server runs in a process of its own and answers the same request from the same made catalogue; the client is another
process. Servers take turns, round after round, and medians over rounds are compared, so that what else runs on the machine
meets all of them. CPU seconds are those of the server's process. "naive" is what a tutorial writes: ``def`` routes,
pydantic in and out, one matrix product and one partition per request. cornac's server is added where cornac is installed.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HISTORY = 50
K = 10
CLOCK = os.sysconf("SC_CLK_TCK")

Result = dict[str, Any]


# ------------------------------------------------------------------ what is served


def write_catalogue(folder: Path, n_items: int, dim: int, n_users: int = 1000, seed: int = 0) -> None:
    """A made model: every user has ``HISTORY`` items; vectors are drawn around 100 centres."""
    from recbole_llm.serving.artifact import Block, ItemRecord
    from recbole_llm.serving.artifact_writer import ExportContents, write_artifact

    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((100, dim), dtype=np.float32)
    vector = centres[rng.integers(0, 100, n_items)] + rng.standard_normal((n_items, dim), dtype=np.float32)
    history = np.concatenate([np.sort(rng.choice(n_items, HISTORY, replace=False)) for _ in range(n_users)])
    write_artifact(
        folder,
        ExportContents(
            item_ids=[str(i) for i in range(n_items)],
            user_ids=[str(u) for u in range(n_users)],
            records=[ItemRecord(f"Item number {i}", None, {}) for i in range(n_items)],
            vector=vector,
            source=rng.standard_normal((n_items, dim), dtype=np.float32),
            bias=rng.standard_normal(n_items, dtype=np.float32),
            trained=np.ones(n_items, bool),
            blocks=(Block("learned", dim, 0.5, 1.0),),
            history_offsets=np.arange(n_users + 1) * HISTORY,
            history_items=history,
        ),
    )


def naive_app() -> Any:
    """The service of a tutorial, on the same export."""
    import fastapi
    from pydantic import BaseModel

    from recbole_llm.serving.artifact import load_export

    export = load_export(os.environ["BENCHMARK_EXPORT"])
    rows = {user: row for row, user in enumerate(export.user_ids)}
    app = fastapi.FastAPI()

    class Ask(BaseModel):
        user: str
        k: int = K

    class Item(BaseModel):
        id: str
        title: str
        score: float

    class Answer(BaseModel):
        items: list[Item]

    @app.post("/v1/recommend", response_model=Answer)
    def recommend(ask: Ask) -> Answer:
        start, stop = export.history_offsets[rows[ask.user] : rows[ask.user] + 2]
        seen = export.history_items[start:stop]
        scores = export.vector @ (export.source[seen].sum(0) / np.float32(len(seen) ** 0.5)) + export.bias
        scores[seen] = -np.inf
        top = np.argpartition(-scores, ask.k)[: ask.k]
        top = top[np.argsort(-scores[top])]
        return Answer(items=[Item(id=export.item_ids[i], title=export.records[i].title, score=scores[i]) for i in top])

    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    return app


class Server:
    """A server process on a free port."""

    def __init__(self, name: str, export: Path, **limits: Any) -> None:
        self.name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")])
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **one_thread, "PYTHONPATH": path, "BENCHMARK_EXPORT": str(export)}
        for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # slow NumPy down where they are set
            environment.pop(variable, None)
        if name == "naive":
            target = "serving:naive_app"
        else:
            from recbole_llm.serving.app import SETTINGS_VARIABLE
            from recbole_llm.serving.settings import Limits, Settings

            target = "recbole_llm.serving.app:app_from_environment"
            settings = Settings(export=str(export), verify=False, limits=Limits(**limits))
            environment[SETTINGS_VARIABLE] = settings.to_json()
        command = [sys.executable, "-m", "uvicorn", "--factory", target, "--port", str(self.port)]
        self.process = subprocess.Popen([*command, "--no-access-log", "--log-level", "warning"], env=environment)
        started = time.perf_counter()
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=5).read()
                break
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - started > 120:
                    raise SystemExit(f"the server {name} did not start") from None
                time.sleep(0.01)
        self.seconds_to_ready = time.perf_counter() - started

    def cpu_seconds(self) -> float:
        """User and system time of the process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK

    def stop(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ------------------------------------------------------------------ client (a process of its own)


async def one_client(
    port: int, deadline: float, patience: float, outcomes: list[tuple[int, float]], number: int
) -> None:
    """Keep one connection busy with one request after the other; wait ``patience`` seconds after a refusal."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    user = number
    while time.perf_counter() < deadline:
        user = (user + 7) % 1000
        body = b'{"user":"%d","k":%d}' % (user, K)
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        started = time.perf_counter()
        writer.write(head % len(body) + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        status = int(answer[9:12])
        outcomes.append((status, time.perf_counter() - started))
        if status != 200:
            await asyncio.sleep(patience)
    writer.close()


async def watch_health(port: int, deadline: float, seconds: list[float]) -> None:
    """How long /health/live takes meanwhile."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0.05)
    writer.close()


async def load(port: int, clients: int, seconds: float, patience: float) -> tuple[list[tuple[int, float]], list[float]]:
    """Outcomes of ``clients`` connections during ``seconds``."""
    outcomes: list[tuple[int, float]] = []
    health: list[float] = []
    deadline = time.perf_counter() + seconds
    tasks = [one_client(port, deadline, patience, outcomes, number) for number in range(clients)]
    await asyncio.gather(*tasks, watch_health(port, deadline, health))
    return outcomes, health


def client_main(arguments: list[str]) -> None:
    """The client's process: prints what it saw as JSON."""
    port, clients, seconds, patience = (float(value) for value in arguments)
    outcomes, health = asyncio.run(load(int(port), int(clients), seconds, patience))
    good = sorted(1000 * took for status, took in outcomes if status == 200)
    counts: dict[int, int] = {}
    for status, _ in outcomes:
        counts[status] = counts.get(status, 0) + 1
    quantile = lambda values, q: values[min(len(values) - 1, int(q * len(values)))] if values else None  # noqa: E731
    health = sorted(1000 * took for took in health)
    print(
        json.dumps(
            {
                "rps": len(good) / seconds,
                "p50_ms": quantile(good, 0.5),
                "p99_ms": quantile(good, 0.99),
                "health_p50_ms": quantile(health, 0.5),
                "status": counts,
            }
        )
    )


def measure(server: Server, clients: int, seconds: float, patience: float = 0.2) -> Result:
    """One load run against a server, with the server's CPU time."""
    command = [sys.executable, __file__, "--client", str(server.port), str(clients), str(seconds), str(patience)]
    before = server.cpu_seconds()
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result["cpu_s"] = server.cpu_seconds() - before
    result["requests_per_cpu_s"] = result["rps"] * seconds / max(result["cpu_s"], 1e-9)
    return result


def median_of(results: list[Result]) -> Result:
    """Median of every number over rounds."""
    names = ("rps", "p50_ms", "p99_ms", "health_p50_ms", "requests_per_cpu_s")
    return {name: round(statistics.median(result[name] for result in results), 3) for name in names}


# ------------------------------------------------------------------ scenarios


def compare(
    export: Path, makers: dict[str, Callable[[Path], Server]], clients: int, rounds: int, seconds: float
) -> dict[str, Result]:
    """Servers in turn, round after round."""
    servers = {name: make(export) for name, make in makers.items()}
    try:
        for server in servers.values():
            measure(server, clients, 0.5)  # warm up
        results: dict[str, list[Result]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, server in servers.items():
                results[name].append(measure(server, clients, seconds))
    finally:
        for server in servers.values():
            server.stop()
    failed = {
        name: sum(sum(n for s, n in r["status"].items() if s != "200") for r in rs) for name, rs in results.items()
    }
    return {name: {**median_of(rs), "failed": failed[name]} for name, rs in results.items()}


def overload(export: Path, seconds: float) -> Result:
    """Far more clients than the queue holds, beside the rate with few."""
    server = Server("ours", export, queue=64)
    try:
        measure(server, 32, 0.5)
        few, many = measure(server, 32, seconds), measure(server, 512, seconds)
    finally:
        server.stop()
    return {"clients_32": few, "clients_512": many, "goodput_share": round(many["rps"] / few["rps"], 3)}


def restart(export: Path, times: int = 3) -> Result:
    """Seconds from start to the first answer, Python and its imports included."""
    seconds = []
    for _ in range(times):
        server = Server("ours", export)
        seconds.append(server.seconds_to_ready)
        server.stop()
    return {"median_s": round(statistics.median(seconds), 3), "min_s": round(min(seconds), 3)}


def table(report: Result) -> str:
    """The report for people."""
    lines = []
    for title in ("small", "large"):
        lines.append(
            f"\n{report[title]['items']:,} items, {report['clients']} clients; medians of {report['rounds']} rounds"
        )
        lines.append(f"{'':12}{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'req/CPU-s':>11}{'failed':>8}")
        for name, r in report[title]["servers"].items():
            cells = (
                f"{r['rps']:9.0f}{r['p50_ms']:9.1f}{r['p99_ms']:9.1f}{r['requests_per_cpu_s']:11.0f}{r['failed']:8d}"
            )
            lines.append(f"{name:12}{cells}")
    o = report["overload"]
    few, many = o["clients_32"], o["clients_512"]
    lines.append(
        f"\noverload: 512 clients {many['rps']:.0f} good req/s ({o['goodput_share']:.0%} of 32 clients' {few['rps']:.0f}), "
        f"p50 {many['p50_ms']:.0f} ms, /health p50 {many['health_p50_ms']:.0f} ms"
    )
    lines.append(f"start to ready, {report['large']['items']:,} items: {report['restart']['median_s']:.2f} s")
    return "\n".join(lines)


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000, help="items of the small catalogue")
    parser.add_argument("--large", type=int, default=100_000, help="items of the large catalogue")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", default=None, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write_catalogue(small, options.small, options.dim)
        write_catalogue(large, options.large, options.dim)
        ours = lambda export: Server("ours", export)  # noqa: E731
        unbatched = lambda export: Server("unbatched", export, max_batch=1)  # noqa: E731
        naive = lambda export: Server("naive", export)  # noqa: E731
        run = (options.clients, options.rounds, options.seconds)
        report = {
            "clients": options.clients,
            "rounds": options.rounds,
            "seconds": options.seconds,
            "dim": options.dim,
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "load_before": os.getloadavg(),
            "small": {
                "items": options.small,
                "servers": compare(small, {"naive": naive, "ours": ours}, *run),
            },
            "large": {
                "items": options.large,
                "servers": compare(large, {"naive": naive, "unbatched": unbatched, "ours": ours}, *run),
            },
            "overload": overload(large, options.seconds),
            "restart": restart(large),
            "load_after": os.getloadavg(),
        }
    print(table(report))
    if options.output:
        target = Path(options.output)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        client_main(sys.argv[2:])
    else:
        main()
