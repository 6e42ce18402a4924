"""The service under attack: how long /health takes, whether honest requests are answered, whether memory is given back.

    python benchmarks/attacks.py --output benchmarks/results/attacks.json

A server of its own process, started as ``recbole-llm serve`` starts it, with its default limits, serves a made catalogue.
Honest clients run alone first and last, and beside each attack in turn; attackers are a third process. Health is asked by
a fresh connection each time, and its time includes the connecting. Memory is the server's resident set: before, at the
worst, and ten seconds after. With ``--against`` the processor time of honest requests is compared with another checkout's.
Files and requests of the fuzzer are counted by what became of them, and commands are killed at random moments
(``attack_kills.py``). Each part is written into the report as it ends; parts may be measured at different times.
"""

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from attack_clients import CLIENTS
from serving import facts, measure, median_of, ratio
from serving_servers import ROOT, SLOWS_NUMPY, cpu_seconds_of, write_catalogue

sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
from attack_kills import kills

Result = dict[str, Any]
CLIENT = Path(__file__).with_name("attack_clients.py")
VERSIONS = ROOT / "tests" / "compatibility" / "0.1.0"
SETTLE_SECONDS = 10.0
# /health: at most this many times as long as beside honest load, and never longer than a second
MAX_RATIO, MAX_HEALTH_MS = 5.0, 1000.0
COMMAND = "import sys; from recbole_llm.cli import main; sys.exit(main())"  # of whichever checkout


class Server:
    """``recbole-llm serve`` on a free port."""

    kind = "POST"  # as clients of ``serving.py`` ask

    def __init__(self, folder: Path, source: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(source / "kernels")])}
        for name in SLOWS_NUMPY:
            environment.pop(name, None)
        command = [sys.executable, "-c", COMMAND, "serve", str(folder), "--port", str(self.port)]
        command += ["--no-encoder", "--no-access-log", *options]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/ready", timeout=5).read()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start: {self.output()}") from None
                time.sleep(0.05)

    def output(self) -> str:
        """What it has written."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def cpu_seconds(self) -> float:
        """User and system time."""
        return cpu_seconds_of(self.process.pid)

    def rss_mib(self) -> float:
        """Resident set."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(status.partition("VmRSS:")[2].split()[0]) / 1024, 1)

    def stop(self) -> int:
        """End it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def client(kind: str, server: Server, seconds: float) -> "subprocess.Popen[str]":
    """A process of clients."""
    command = [sys.executable, str(CLIENT), kind, str(server.port), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def honest(server: Server, seconds: float) -> Result:
    """What honest clients see now."""
    output, _ = client("honest", server, seconds).communicate()
    result: Result = json.loads(output)
    return result


def under(attack: str, server: Server, seconds: float) -> Result:
    """What honest clients see beside an attack, and the server's memory."""
    before, peak, over = server.rss_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], server.rss_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    attacker = client(attack, server, seconds + 4)
    time.sleep(2)  # it is in full swing when the honest come
    seen = honest(server, seconds)
    output, _ = attacker.communicate()
    over.set()
    watcher.join()
    time.sleep(SETTLE_SECONDS)
    return {
        **seen,
        "attacker": json.loads(output),
        "rss_before_mib": before,
        "rss_peak_mib": peak[0],
        "rss_after_mib": server.rss_mib(),
    }


def judge(result: Result, base: Result) -> Result:
    """Add what the figures mean."""
    answers = result["answers"]
    good = answers.get("200", 0)
    result["answered_share"] = round(good / max(sum(answers.values()), 1), 4)
    result["health_p99_ratio"] = round(result["health_p99_ms"] / base["health_p99_ms"], 2)
    result["health_holds"] = (
        result["health_p99_ratio"] <= MAX_RATIO
        and result["health_max_ms"] <= MAX_HEALTH_MS
        and not result["probes_refused"]
    )
    return result


def commit_of(checkout: Path) -> str:
    """Its commit."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def speed(folder: Path, options: argparse.Namespace) -> Result:
    """Requests per CPU second of honest load beside those of another checkout's service, in turn, round after round."""
    servers = {"ours": Server(folder, Path(options.source)), "against": Server(folder, Path(options.against))}
    results: dict[str, list[Result]] = {name: [] for name in servers}
    try:
        for server in servers.values():
            measure(server, options.clients, 0.5)
        for number in range(options.rounds):
            for name in sorted(servers, reverse=bool(number % 2)):
                results[name].append(measure(servers[name], options.clients, options.round_seconds))
    finally:
        for server in servers.values():
            server.stop()
    return {
        **facts(),
        "against_commit": commit_of(Path(options.against)),
        "clients": options.clients,
        "rounds": options.rounds,
        **{name: median_of(rounds) for name, rounds in results.items()},
        "requests_per_cpu_s_ratio": ratio(results["ours"], results["against"], "requests_per_cpu_s"),
        "p99_ratio": ratio(results["ours"], results["against"], "p99_ms"),
    }


def load(folder: Path, options: argparse.Namespace) -> Result:
    """Every attack in turn, honest load before and after."""
    report: Result = {**facts(), "items": options.items, "dim": options.dim, "seconds": options.seconds, "attacks": {}}
    server = Server(folder, Path(options.source))
    honest(server, 2.0)
    report["honest"] = honest(server, options.seconds)
    print("honest", json.dumps(report["honest"]), flush=True)
    for attack in options.only.split(","):
        report["attacks"][attack] = judge(under(attack, server, options.seconds), report["honest"])
        print(attack, json.dumps(report["attacks"][attack]), flush=True)
        if server.process.poll() is not None:
            raise SystemExit(f"the server ended: {server.output()}")
    report["honest_again"] = honest(server, options.seconds)
    print("honest again", json.dumps(report["honest_again"]), flush=True)
    report["exit_code"] = server.stop()
    report["tracebacks"] = server.output().count("Traceback")
    return report


def fuzz(folder: Path, options: argparse.Namespace) -> Result:
    """What became of exports that are wrong and signed, of damaged checkpoints, and of requests that are none."""
    from fuzz import checkpoints, exports, requests

    logging.disable(logging.CRITICAL)  # of files that are not ours, thousands of times
    seen: dict[str, Counter[str]] = {"exports": Counter(), "checkpoints": Counter(), "requests": Counter()}
    faults: list[str] = []
    file = folder.parent / "fuzzed"

    def note(kind: str, number: int, outcome: Callable[[], str]) -> None:
        try:
            seen[kind][outcome()] += 1
        except Exception as error:
            faults.append(f"{kind} {number}: {error!r}"[:300])

    sources = sorted(VERSIONS.glob("export-*"))
    for number in range(options.exports):
        exports.mutate(sources[number % len(sources)], file, Random(number))
        note("exports", number, partial(exports.outcome, file))
    contents = [path.read_bytes() for path in sorted(VERSIONS.glob("*.pth"))]
    path = folder.parent / "fuzzed.pth"
    for number in range(options.checkpoints):
        path.write_bytes(checkpoints.mutate(contents[number % len(contents)], Random(number)))
        note("checkpoints", number, partial(checkpoints.outcome, path))
    server, draw = Server(folder, Path(options.source)), Random(0)
    sent = [requests.mutated(draw) for _ in range(options.requests)]
    answers = requests.attack(server.port, sent)
    for status, count in sorted(answers.items()):
        seen["requests"]["no answer" if status == 0 else str(status)] += count
    report = {**facts(), **{kind: dict(counts) for kind, counts in seen.items()}, "other": faults}
    return report | {"exit_code": server.stop(), "tracebacks": server.output().count("Traceback")}


def main() -> None:
    """Run the parts that were asked for and write them into the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="load,fuzz,kills", metavar="A,B", help="of load, fuzz, kills, speed")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--only", default=",".join(name for name in CLIENTS if name != "honest"), metavar="A,B")
    parser.add_argument("--source", default=str(ROOT), metavar="DIR", help="checkout whose service is attacked")
    parser.add_argument("--against", default=None, metavar="DIR", help="checkout whose speed is compared with, in turn")
    parser.add_argument("--clients", type=int, default=32, help="of that comparison")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--round-seconds", type=float, default=2.5)
    parser.add_argument("--exports", type=int, default=5000)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=8, help="of each command")
    parser.add_argument("--output", default=None, metavar="FILE", help="a report that is there keeps its other parts")
    options = parser.parse_args()
    if "speed" in options.parts and not options.against:
        parser.error("the part speed needs --against DIR, the checkout to compare with.")
    parts = {"load": load, "fuzz": fuzz, "kills": kills, "speed": speed}
    output = Path(options.output) if options.output else None
    report: Result = json.loads(output.read_text()) if output is not None and output.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "export"
        write_catalogue(folder, options.items, options.dim)
        for part in options.parts.split(","):
            report[part] = parts[part](folder, options)
            print(part, json.dumps(report[part]), flush=True)
            if output is not None:
                output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
