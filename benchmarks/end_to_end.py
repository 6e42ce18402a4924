"""Seconds per epoch and per evaluation, positive interactions per second and peak memory inside RecBole.

    python benchmarks/end_to_end.py                        # every cell that benchmarks/results/end_to_end.json lacks
    python benchmarks/end_to_end.py --only paired --again  # the paired ratios once more

Each cell is a process of its own, so that its peak memory is its own, and is written down as soon as it ends. A cell that
runs into ``--limit`` seconds is recorded as such. ``paired`` cells time the systems in turn, slice after slice of an epoch, each
system in its own process (evaluation after evaluation in one), so that a slow spell of the machine meets all of them; the
ratios come from these. Both sides have the same batch size, dimension and optimizer (Adam) and one uniform negative; ours
takes the fused form of the optimizer, which RecBole does not ask for.

Catalogues of 20,000 items and more are made here: 20 interactions a user, items drawn by a power law. Evaluations of those
rank ``--users`` users, the first ones of the validation split, in stock and ours alike; the number stands in the result.
Stock evaluation is timed at RecBole's default ``eval_batch_size`` and at the best of three larger ones.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from timing import _status, machine

RESULT = ROOT / "benchmarks" / "results" / "end_to_end.json"
DIM = 64
BATCH, LARGE_BATCH = 2048, 16_384  # interactions; the second from 100,000 items on, where dense Adam is most of a step
DEFAULT_EVAL_BATCH = 4096
EVAL_BATCHES = (2**16, 2**20, 2**22)
SYNTHETIC = {"syn20k": (20_000, 20_000), "syn100k": (20_000, 100_000), "syn500k": (50_000, 500_000)}  # users, items
PER_USER = 20

UNIFORM = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
OURS: dict[str, Any] = {"blocks": "learned", "encoder": "", "loss_type": "sampled_bce"}
SHARED = OURS | {"train_neg_sample_args": UNIFORM | {"shared": 1024}}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLMTwoTower, user IDs": ("LLMTwoTower", OURS | {"user_tower": "id"}),
    "LLMTwoTower, histories": ("LLMTwoTower", OURS | {"user_tower": "history"}),
    "LLMTwoTower, histories, shared negatives": ("LLMTwoTower", SHARED | {"user_tower": "history"}),
    "LLMTwoTower, catalog_bce": ("LLMTwoTower", OURS | {"loss_type": "catalog_bce", "train_batch_size": 512}),
    "LLMTwoTower, user IDs, stock trainer": ("LLMTwoTower", OURS | {"user_tower": "id", "eval_backend": "stock"}),
    "LLMTwoTower, histories, stock trainer": ("LLMTwoTower", OURS | {"user_tower": "history", "eval_backend": "stock"}),
    "BPR": ("BPR", {}),
    "LightGCN": ("LightGCN", {}),
    "DMF": ("DMF", {"user_embedding_size": DIM, "item_embedding_size": DIM}),
    "DSSM": ("DSSM", {"threshold": {"rating": 3}}),
}
LARGE = ("LLMTwoTower, histories, shared negatives", "LLMTwoTower, user IDs", "BPR", "LightGCN")


def cells(only: str) -> list[dict[str, Any]]:
    """Every cell whose name contains ``only``."""
    found = [
        {"kind": "paired", "dataset": d, "name": f"paired, {d}"} for d in ("ml-100k", "ml-1m-text", "syn20k", "syn100k")
    ]
    for dataset in ("ml-100k", "ml-1m-text", *SYNTHETIC):
        for system in SYSTEMS if dataset not in SYNTHETIC or dataset == "syn20k" else LARGE:
            if system == "DSSM" and dataset == "ml-1m-text":  # its interactions have no rating to make labels of
                continue
            if "shared" not in system or dataset in SYNTHETIC:
                found.append({"kind": "alone", "dataset": dataset, "system": system, "name": f"{system}, {dataset}"})
    every = "LLMTwoTower, histories, shared negatives"
    found.append(
        {"kind": "alone", "dataset": "syn500k", "system": every, "all": True, "name": f"{every}, syn500k, all users"}
    )
    return [cell for cell in found if only in cell["name"]]


# ---------------------------------------------------------------- inside a cell's process


def write_catalogue(folder: Path, dataset: str) -> None:
    """Atomic file of a made catalogue: 20 interactions a user; item i in proportion to 1/(i + 10), at least once."""
    import numpy as np

    users, items = SYNTHETIC[dataset]
    rng = np.random.default_rng(0)
    share = np.cumsum(1 / (np.arange(items) + 10))
    user = np.repeat(np.arange(users), PER_USER)
    item = np.searchsorted(share, rng.random(len(user)) * share[-1])
    item[rng.permutation(len(user))[:items]] = np.arange(items)  # each item occurs
    rating = rng.integers(1, 6, len(user))
    target = folder / dataset
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f"{dataset}.inter.unfinished"
    with unfinished.open("w") as file:
        file.write("user_id:token\titem_id:token\trating:float\n")
        file.writelines(
            f"{u}\t{i}\t{r}\n" for u, i, r in zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)
        )
    unfinished.rename(target / f"{dataset}.inter")


class System:
    """A model with its loaders and trainer, as RecBole makes them."""

    def __init__(self, name: str, dataset: str, options: argparse.Namespace) -> None:
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.trainer import Trainer
        from recbole.utils import get_model, get_trainer, init_seed

        import recbole_llm  # noqa: F401

        model, changes = SYSTEMS[name]
        self.name, self.stock_trainer = name, "stock trainer" in name
        given = {
            "gpu_id": "",
            "state": "WARNING",
            "show_progress": False,
            "embedding_size": DIM,
            "train_batch_size": LARGE_BATCH if dataset in ("syn100k", "syn500k") else BATCH,
            "learner": "adam",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "train_neg_sample_args": UNIFORM,
            "load_col": {"inter": ["user_id", "item_id"]},
            "eval_batch_size": DEFAULT_EVAL_BATCH,
            "metrics": ["Recall", "NDCG", "MRR", "Hit", "Precision"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "checkpoint_dir": str(options.work / "saved"),
            "seed": 1,
        }
        if dataset != "ml-100k":
            given["data_path"] = str(options.work if dataset in SYNTHETIC else options.data_path)
        if dataset in SYNTHETIC and not (options.work / dataset / f"{dataset}.inter").is_file():
            write_catalogue(options.work, dataset)
        if model == "DSSM":  # a model of labelled pairs: RecBole gives it no negatives and no ranking of the catalogue
            given |= {"metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "train_neg_sample_args": None}
            given |= {"load_col": {"inter": ["user_id", "item_id", "rating"]}, "eval_args": {"mode": "labeled"}}
        given |= changes
        sys.argv = sys.argv[:1]  # RecBole reads settings from it
        self.config = config = Config(model, dataset, config_dict=given)
        init_seed(1, True)
        data = create_dataset(config)
        if self.stock_trainer:
            self._use_stock_batches()
        self.train, self.ranked, _ = data_preparation(config, data)
        if dataset in SYNTHETIC and model != "DSSM":
            self.ranked = self._first_users(options.users)
        self.model = get_model(model)(config, self.train._dataset)
        self.trainer = (Trainer if self.stock_trainer else get_trainer(config["MODEL_TYPE"], model))(config, self.model)
        self.trainer._saves = False
        self.interactions = len(self.train._dataset.inter_feat)
        self._batches: Iterator[Any] | None = None

    def _use_stock_batches(self) -> None:
        from recbole_llm.bridge import register

        entry = register._registrations["LLMTwoTower"]
        register._registrations["LLMTwoTower"] = type(entry)(**(vars(entry) | {"train_dataloader": None}))

    def _first_users(self, number: int) -> Any:
        import torch

        split, users = self.ranked._dataset, self.ranked.uid_list[:number]
        kept = torch.isin(split.inter_feat[split.uid_field], users)
        few = split.copy(split.inter_feat[kept.nonzero()[:, 0]])
        return type(self.ranked)(self.config, few, self.ranked._sampler, shuffle=False)

    def epoch(self, batches: Any = None) -> None:
        """Train on ``batches`` or a whole epoch."""
        self.trainer.start_epoch = 10**9  # no checkpoint before the epoch
        self.trainer._train_epoch(self.train if batches is None else batches, 5)

    def part_of_epoch(self) -> None:
        """Train on the next batches, as many as one draw of our negatives serves; the loader goes on where it stopped."""
        self.epoch(_Slice(self))

    def next_batch(self) -> Any:
        """The next batch; after the last, the first of another epoch."""
        batch = next(self._batches, None) if self._batches is not None else None
        if batch is None:
            self._batches = iter(self.train)
            batch = next(self._batches)
        return batch

    def evaluate(self) -> Any:
        """Metrics on the validation split (its first users)."""
        return self.trainer.evaluate(self.ranked, load_best_model=False)

    def set_eval_batch(self, size: int) -> None:
        """RecBole's ``eval_batch_size``, which it divides by the number of items; a loader holds what it was made with."""
        self.config["eval_batch_size"] = size
        old = self.ranked
        self.ranked = type(old)(self.config, old._dataset, old._sampler, shuffle=False)


def batches_of_a_turn(batch_size: int) -> int:
    """What a system trains in one turn of a paired cell: each turn then holds one draw of our negatives."""
    from recbole_llm.bridge.batches import STRETCH

    return STRETCH // batch_size


class _Slice:
    """What a trainer needs of a loader: its length, its batches."""

    def __init__(self, system: System) -> None:
        self.system, self.dataset = system, system.train._dataset

    def __len__(self) -> int:
        return batches_of_a_turn(self.system.config["train_batch_size"])

    def __iter__(self) -> Iterator[Any]:
        return (self.system.next_batch() for _ in range(len(self)))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak(function: Callable[[], object]) -> tuple[float, float, float]:
    """Wall and CPU seconds, and MiB above what is there before (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    seconds = timed(function)
    return *seconds, (_status("VmHWM") - before) / 2**10


def measure_alone(spec: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One system: two epochs, evaluations, peak memory of each."""
    if spec.get("all"):
        options.users = SYNTHETIC[spec["dataset"]][0]
    began = time.perf_counter()
    system = System(spec["system"], spec["dataset"], options)
    found: dict[str, Any] = {
        "load_s": time.perf_counter() - began,
        "loaded_mib": _status("VmRSS") / 2**10,
        "interactions": system.interactions,
        "items": system.train._dataset.item_num - 1,
        "users": system.train._dataset.user_num - 1,
    }
    epochs = [peak(system.epoch) for _ in range(1 if spec.get("all") else 2)]
    found["epoch_s"] = min(wall for wall, _, _ in epochs)
    found["epoch_cpu_s"] = min(cpu for _, cpu, _ in epochs)
    found["epoch_peak_mib"] = max(mib for *_, mib in epochs)
    found["positives_per_s"] = system.interactions / found["epoch_s"]
    found["eval_users"] = len(getattr(system.ranked, "uid_list", ())) or None
    found["eval"] = {}
    streamed = system.config["eval_backend"] == "streamed"
    sizes = ("streamed",) if streamed or not found["eval_users"] else (DEFAULT_EVAL_BATCH, *EVAL_BATCHES)
    for size in sizes:
        if isinstance(size, int):
            system.set_eval_batch(size)
        first = peak(system.evaluate)
        again = [timed(system.evaluate) for _ in range(2 if first[0] < 5 else 0)]
        label = "labelled pairs" if not found["eval_users"] else str(size)
        found["eval"][label] = {
            "first_s": first[0],
            "s": min([first[0], *(wall for wall, _ in again)]),
            "peak_mib": first[2],
        }
    found["process_peak_mib"] = resource_peak()
    return found


def resource_peak() -> float:
    """MiB of the process at its largest."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def take_turns(name: str, dataset: str, options: argparse.Namespace, pipe: Any) -> None:
    """Train a turn whenever the pipe says so and send its seconds, until the other end is closed."""
    system = System(name, dataset, options)
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(timed(system.part_of_epoch))


def paired_turns(names: list[str], dataset: str, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each system's turns, in turn; the first turn of each does not count.

    Each system has a process of its own, as in use: beside three others in one process, its arrays are scattered over their
    heap, which made a step of ours 15% slower and one of BPR 3%.
    """
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name in names:
        pipes[name], other = context.Pipe()
        context.Process(target=take_turns, args=(name, dataset, options, other), daemon=True).start()
        other.close()
        pipes[name].recv()  # ready: no two are built at once
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            pipes[name].send(None)
            seconds = pipes[name].recv()
            if turn:
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.close()
    return times


def measure_paired(spec: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Systems in turn: time per positive interaction against BPR, time of an evaluation against stock ones."""
    names = ["BPR", "LLMTwoTower, user IDs"]
    if spec["dataset"] in SYNTHETIC:
        names += ["LLMTwoTower, histories, shared negatives"]
    else:  # the stock one comes last: it changes which batches RecBole makes
        names += ["LLMTwoTower, histories", "LLMTwoTower, user IDs, stock trainer"]
    times = paired_turns(names, spec["dataset"], options)
    systems = {name: System(name, spec["dataset"], options) for name in names if "histories" not in name}
    for system in systems.values():
        system.part_of_epoch()  # rankings of untrained tables are no example
    batch = systems["BPR"].config["train_batch_size"]
    turn_size = batch * batches_of_a_turn(batch)
    found: dict[str, Any] = {"rounds": options.rounds, "positives_per_turn": turn_size, "training": {}}
    for name in names:
        found["training"][name] = {
            "positives_per_s": turn_size / statistics.median(wall for wall, _ in times[name]),
            "times_bpr": _ratio(times["BPR"], times[name]),
            "times_bpr_cpu": _ratio(times["BPR"], times[name], 1),
        }
    found["evaluation"] = _paired_evaluations(systems, options)
    return found


def _paired_evaluations(systems: dict[str, System], options: argparse.Namespace) -> dict[str, Any]:
    bpr, ours = systems["BPR"], systems["LLMTwoTower, user IDs"]

    loaders = {}
    for size in (*EVAL_BATCHES, DEFAULT_EVAL_BATCH):
        bpr.set_eval_batch(size)
        loaders[size] = bpr.ranked

    def stock(size: int) -> Callable[[], object]:
        def evaluate() -> None:
            bpr.config["eval_backend"], bpr.ranked = "stock", loaders[size]
            bpr.evaluate()

        return evaluate

    def streamed() -> None:
        bpr.config["eval_backend"] = "streamed"
        bpr.evaluate()

    variants: dict[str, Callable[[], object]] = {
        f"BPR, stock, eval_batch_size {size}": stock(size) for size in (DEFAULT_EVAL_BATCH, *EVAL_BATCHES)
    }
    variants["BPR, streamed"] = streamed
    variants["LLMTwoTower, streamed"] = ours.evaluate
    same = systems.get("LLMTwoTower, user IDs, stock trainer")
    if same is not None:
        variants[f"LLMTwoTower, stock, eval_batch_size {DEFAULT_EVAL_BATCH}"] = same.evaluate
    rounds = options.rounds
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, evaluate in variants.items():
            seconds = timed(evaluate)
            if turn or seconds[0] > 10:
                times[name].append(seconds)
        if sum(wall for of in times.values() for wall, _ in of) > options.limit / 3:
            break
    default = times[f"BPR, stock, eval_batch_size {DEFAULT_EVAL_BATCH}"]
    seconds = {name: statistics.median(wall for wall, _ in of) for name, of in times.items()}
    best = min((s, name) for name, s in seconds.items() if "BPR, stock" in name)[1]
    return {
        "users": len(bpr.ranked.uid_list),
        "best_stock": best,
        "variants": {
            name: {
                "s": seconds[name],
                "times_stock_default": _ratio(default, of),
                "times_stock_best": _ratio(times[best], of),
            }
            for name, of in times.items()
        },
    }


def _ratio(baseline: list[tuple[float, float]], times: list[tuple[float, float]], clock: int = 0) -> float:
    return statistics.median(b[clock] / t[clock] for b, t in zip(baseline, times, strict=False))


# ---------------------------------------------------------------- the parent


def run_cell(spec: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A cell in a process of its own; its result, or why there is none."""
    command = [sys.executable, __file__, "--cell", json.dumps(spec), "--work", str(options.work)]
    command += ["--data_path", str(options.data_path), "--users", str(options.users), "--rounds", str(options.rounds)]
    command += ["--limit", str(options.limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    try:
        out = subprocess.run(
            command, capture_output=True, text=True, timeout=options.limit, cwd=options.work, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"stopped_after_s": options.limit}
    if out.returncode:
        return {"error": (out.stderr.strip().splitlines() or ["no message"])[-1], "exit_code": out.returncode}
    return json.loads(out.stdout.strip().splitlines()[-1])


def main() -> int:
    """Run the cells that are missing; 0 if all are there afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure cells that are there once more")
    parser.add_argument("--limit", type=float, default=400, help="seconds of a cell at most")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so long")
    parser.add_argument("--users", type=int, default=1000, help="users ranked on made catalogues")
    parser.add_argument("--rounds", type=int, default=7, help="turns of a paired cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data_path", type=Path, default=Path("dataset"), help="folder of ml-1m-text")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "recbole-llm-end-to-end")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work, options.data_path = options.work.resolve(), options.data_path.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.cell:
        spec = json.loads(options.cell)
        measure = measure_paired if spec["kind"] == "paired" else measure_alone
        print(json.dumps(measure(spec, options)))
        return 0
    results = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
    end, left = time.monotonic() + 60 * options.minutes, 0
    for spec in cells(options.only):
        before = results["cells"].get(spec["name"])
        if before and before.get("stopped_after_s", options.limit) >= options.limit and not options.again:
            continue
        if time.monotonic() > end:
            left += 1
            continue
        here = machine("cpu")
        found = run_cell(spec, options) | {"commit": here["commit"], "load_average": here["load_average"]}
        print(spec["name"], json.dumps(found), flush=True)
        results |= {"machine": here, "threads": options.threads}
        results["cells"][spec["name"]] = found
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    import report

    print("\n".join(report.end_to_end(results).lines))
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
