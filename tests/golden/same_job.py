"""Two source trees in one job: the same short trainings in both, and every number that differs.

    python tests/golden/same_job.py OLD NEW [--repeats 3] [--output same_job.json]
    python tests/golden/same_job.py OLD NEW --runs amazon-office --data_path FOLDER --epochs 120

OLD and NEW hold ``recbole_llm/`` and ``kernels/``, such as two working trees of git. Every training is a process of its own with
one thread; trees take turns in going first, so that seconds are pairs. Where nothing was reordered all differences are 0.
A run is one of the golden ones, ``ml-100k`` (with the default encoder) or a data set in ``--data_path``. Not part of the tests.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SAMPLED = 200  # users whose scores of all items are compared
STEPS = ("training", "reading the checkpoint", "evaluation", "export", "recommending")
EVALUATIONS = 5  # timed together
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# ------------------------------------------------------------------ one training, in a process of its own


def child(run, epochs, data_path, features):
    """Train, evaluate, export and recommend in the working directory; leaves ``found.json``, ``scores.npy`` and the files."""
    sys.path.insert(0, str(HERE))
    import golden_runs

    seconds = {}
    given = {"data_path": data_path, "feature_cache_dir": features}
    own = [f"--{key}={value}" for key, value in given.items() if value]
    paths = golden_runs.paths_of(run) if run in golden_runs.RUNS else own
    if importlib.util.find_spec("recbole_llm.bridge.checkpoint_settings") is None:
        paths = []  # an earlier tree takes paths from the checkpoint, and knows no such options
    if run in golden_runs.RUNS and golden_runs.RUNS[run].processes > 1:
        metrics, config, model, dataset = _in_processes(run, seconds)
    else:
        metrics, config, model, dataset = _in_this_process(run, epochs, data_path, features, seconds)
    rng = np.random.RandomState(0)
    users = np.sort(1 + rng.permutation(dataset.user_num - 1)[:SAMPLED])
    _save_scores(model, config, dataset, users)
    for timed, export in ({}, "export"), (seconds, "export-again"):  # the first time modules are imported too
        with _timed(timed, "export"):
            golden_runs.call("export", "saved", "--output", export, *paths)
        with _timed(timed, "recommending"):
            golden_runs.call("recommend", export, "--k", 10, "--output", "recommended.jsonl")
    Path("found.json").write_text(json.dumps({"metrics": metrics, "seconds": seconds}))


class _timed:  # noqa: N801
    """Seconds of processor and wall into a dictionary."""

    def __init__(self, seconds, name):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.began = time.process_time(), time.perf_counter()

    def __exit__(self, *error):
        cpu, wall = time.process_time() - self.began[0], time.perf_counter() - self.began[1]
        self.seconds[self.name] = {"cpu": cpu, "wall": wall}


def _in_this_process(run, epochs, data_path, features, seconds):
    import golden_runs

    import recbole_llm  # noqa: F401

    if run in golden_runs.RUNS:
        golden_runs.write_data(run)
        dataset_name, settings = "shop", golden_runs.COMMON | golden_runs.RUNS[run].settings
    else:
        dataset_name = run
        settings = {
            "epochs": epochs,
            "checkpoint_dir": "saved",
            "gpu_id": "",
            "show_progress": False,
            "state": "WARNING",
        }
        settings |= {"feature_cache_dir": features} | ({"data_path": data_path} if data_path else {})
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    sys.argv = sys.argv[:1]
    config = Config("LLMTwoTower", dataset_name, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    model = get_model(config["model"])(config, train._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    with _timed(seconds, "training"):
        _, valid_result = trainer.fit(train, valid, saved=True, show_progress=False)
    test_result = trainer.evaluate(test, load_best_model=True, show_progress=False)
    with _timed(seconds, "reading the checkpoint"):
        trainer.evaluate(test, load_best_model=True, show_progress=False)
    with _timed(seconds, "evaluation"):
        for _ in range(EVALUATIONS):
            trainer.evaluate(test, load_best_model=False, show_progress=False)
    for clock, whole in seconds["reading the checkpoint"].items():  # an evaluation is in it
        seconds["reading the checkpoint"][clock] = max(whole - seconds["evaluation"][clock] / EVALUATIONS, 0.0)
    metrics = {f"valid {k}": float(v) for k, v in valid_result.items()}
    return metrics | {f"test {k}": float(v) for k, v in test_result.items()}, config, model, dataset


def _in_processes(run, seconds):
    import golden_runs

    golden_runs.write_data(run)
    golden_runs.torchrun(golden_runs.RUNS[run].processes, golden_runs.command_of_run(run))
    result = json.loads(Path("result.json").read_text())
    seconds["training"] = {"cpu": float("nan"), "wall": result["seconds"]}  # with the evaluation
    from recbole.quick_start import load_data_and_model

    (path,) = (path for path in Path("saved").glob("LLMTwoTower-*.pth") if not path.stem.endswith("-last"))
    config, model, dataset, *_ = load_data_and_model(str(path))
    return golden_runs.metrics(), config, model, dataset


def _save_scores(model, config, dataset, users):
    import torch

    scores = [
        model.eval().full_sort_predict({dataset.uid_field: few.to(config["device"])}).view(len(few), -1).cpu()
        for few in torch.from_numpy(users).split(50)
    ]
    np.save("scores.npy", torch.cat(scores).numpy())


# ------------------------------------------------------------------ two trees


def tree_environment(tree):
    """The environment of a child that imports a tree."""
    paths = os.pathsep.join([str(tree), str(tree / "kernels")])
    one = dict.fromkeys(ONE_THREAD, "1")
    return {**os.environ, **one, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def execute(tree, folder, arguments):
    """A process in ``folder`` with the tree's code."""
    folder.mkdir(parents=True)
    command = [sys.executable, *arguments]
    out = subprocess.run(command, cwd=folder, env=tree_environment(tree), capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{tree}, {' '.join(arguments)}:\n{out.stdout[-1000:]}\n{out.stderr[-5000:]}")
    return out.stdout


def compare(run, trees, folder, options):
    """One run in both trees, ``options.repeats`` times; differences of the first and seconds of all."""
    sys.path.insert(0, str(HERE))
    import golden_runs

    features = {name: str(folder / f"features-{name}") for name in trees}
    more = ["--data_path", options.data_path] if options.data_path else []
    if run not in golden_runs.RUNS:  # each tree encodes for itself, before anything is timed
        for name, tree in trees.items():
            given = [f"--feature_cache_dir={features[name]}", "--gpu_id="]
            given += [f"--data_path={options.data_path}"] if options.data_path else []
            execute(tree, folder / f"encoding-{name}", ["-m", "recbole_llm", "encode", "-d", run, *given])
    seconds = {step: {name: {"cpu": [], "wall": []} for name in trees} for step in STEPS}
    for repeat in range(options.repeats):
        for name in list(trees)[:: -1 if repeat % 2 else 1]:
            arguments = [str(Path(__file__).resolve()), "--child", run, "--epochs", str(options.epochs)]
            arguments += ["--features", features[name], *more]
            execute(trees[name], folder / f"{name}-{repeat}", arguments)
            found = json.loads((folder / f"{name}-{repeat}" / "found.json").read_text())["seconds"]
            for step, clocks in found.items():
                for clock, value in clocks.items():
                    seconds[step][name][clock].append(value)
    sizes = {name: export_bytes(folder / f"{name}-0") for name in trees}
    return differences(*(folder / f"{name}-0" for name in trees)) | {"seconds": paired(seconds), "export bytes": sizes}


def paired(seconds):
    """Medians of each tree, and of the ratio of each pair."""
    found = {}
    for step, by_tree in seconds.items():
        for clock in ("cpu", "wall"):
            old, new = (values[clock] for values in by_tree.values())
            if old and not np.isnan(old).any():
                ratios = [b / max(a, 1e-9) for a, b in zip(old, new, strict=True)]
                medians = {"old": statistics.median(old), "new": statistics.median(new)}
                found[f"{step} {clock}"] = medians | {"ratio": statistics.median(ratios), "ratios": ratios}
    return found


# ------------------------------------------------------------------ what differs


def differences(old, new):
    """Of two folders that :func:`child` has left."""
    metrics = [json.loads((folder / "found.json").read_text())["metrics"] for folder in (old, new)]
    found = {"metrics": {key: metrics[1].get(key, np.nan) - value for key, value in metrics[0].items()}}
    found["test metrics"] = {key: value for key, value in metrics[0].items() if key.startswith("test")}
    scores = [np.load(folder / "scores.npy") for folder in (old, new)]
    found["scores"] = largest(*scores)
    ranks = [np.argsort(-score, axis=1, kind="stable")[:, :10] for score in scores]
    found["top 10 places that differ"] = int((ranks[0] != ranks[1]).sum()) if ranks[0].shape == ranks[1].shape else -1
    found["checkpoint"] = of_tables(*map(checkpoint_tables, (old, new)))
    found["export"] = of_tables(*map(export_tables, (old, new)))
    lines = [(folder / "recommended.jsonl").read_text().splitlines() for folder in (old, new)]
    found["recommended lines that differ"] = sum(a != b for a, b in zip(*lines, strict=False)) + abs(
        len(lines[0]) - len(lines[1])
    )
    return found


def largest(first, second):
    """The largest absolute difference of two arrays; infinite where shapes or places of non-numbers differ."""
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.dtype.kind not in "fiub":
        return 0.0 if first.shape == second.shape and (first == second).all() else float("inf")
    first, second = first.astype(np.float64), second.astype(np.float64)
    finite = np.isfinite(first) & np.isfinite(second)
    if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(first[finite] - second[finite]).max(initial=0.0))


def of_tables(old, new):
    """Largest difference by name, where there is one, and the names that one side alone has."""
    differ = {name: largest(old[name], new[name]) for name in old.keys() & new.keys()}
    return {
        "compared": len(differ),
        "largest": max(differ.values(), default=0.0),
        "differ": {name: value for name, value in sorted(differ.items()) if value},
        "old alone": sorted(old.keys() - new.keys()),
        "new alone": sorted(new.keys() - old.keys()),
    }


def checkpoint_tables(folder):
    """Every tensor, number and word of a checkpoint by its path in it, without settings, streams and times."""
    import torch

    import recbole_llm  # noqa: F401

    (path,) = (path for path in (folder / "saved").glob("LLMTwoTower-*.pth") if not path.stem.endswith("-last"))
    content = torch.load(path, weights_only=False, map_location="cpu")
    beside = ("config", "settings", "random_states", "optimizer", "format", "version")
    return _leaves({key: value for key, value in content.items() if key not in beside})


def export_bytes(folder):
    """Bytes of each file of an export."""
    export = folder / "export"
    return {
        path.relative_to(export).as_posix(): path.stat().st_size for path in sorted(export.rglob("*")) if path.is_file()
    }


def _leaves(value, path=""):
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _leaves(inner, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {name: leaf for n, inner in enumerate(value) for name, leaf in _leaves(inner, f"{path}/{n}").items()}
    return {path: np.asarray(str(value) if value is None or isinstance(value, str) else value)}


def export_tables(folder):
    """Tensors, lines and the manifest of an export by name."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted((folder / "export").rglob("*")):
        name = path.relative_to(folder / "export").as_posix()
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": value for key, value in load_file(path).items()}
        elif path.name in ("item_ids.txt", "user_ids.txt", "items.jsonl"):
            found[name] = np.asarray(path.read_text())
    manifest = json.loads((folder / "export" / "manifest.json").read_text())
    for key in ("export_id", "created_at", "producer", "files"):
        del manifest[key]
    return found | _leaves(manifest, "manifest")


# ------------------------------------------------------------------ command


def of_job(trees):
    """The machine, and the commit of each tree."""
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    from timing import machine

    described = machine("cpu")
    del described["commit"]
    return {"machine": described, "commits": {name: commit_of(tree) for name, tree in trees.items()}}


def commit_of(tree):
    """The commit of a working tree, marked where files of the product differ from it."""
    git = ["git", "-C", str(tree)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--short", "recbole_llm", "kernels"], capture_output=True, text=True
    ).stdout
    return commit + ("+changes" if changed.strip() else "")


def report(run, found):
    """What a person reads of one run."""
    seconds = found["seconds"]
    lines = [f"{run}: " + ", ".join(f"{key} {value:.4f}" for key, value in found["test metrics"].items())]
    lines.append(f"  metrics differ by {max(map(abs, found['metrics'].values())):.4g}, scores by {found['scores']:.4g}")
    lines.append(f"  {found['top 10 places that differ']} places of the ten best of up to {SAMPLED} users, "
                 f"{found['recommended lines that differ']} recommended lines differ")  # fmt: skip
    for what in ("checkpoint", "export"):
        part = found[what]
        lines.append(f"  {what}: {part['compared']} values compared, largest difference {part['largest']:.4g}")
        lines += [f"    {name}: {value:.4g}" for name, value in list(part["differ"].items())[:12]]
        lines += [f"    {side}: {', '.join(part[side])}" for side in ("old alone", "new alone") if part[side]]
    old, new = found["export bytes"].values()
    grown = {name: new.get(name, 0) - old.get(name, 0) for name in sorted(old.keys() | new.keys())}
    lines.append(f"  export: {sum(old.values())} bytes, {sum(new.values())} bytes")
    lines += [f"    {name}: {difference:+}" for name, difference in grown.items() if difference]
    for step, values in seconds.items():
        lines.append(f"  {step}: {values['old']:.2f} s, {values['new']:.2f} s, ratio {values['ratio']:.3f}")
    return "\n".join(lines)


def main():
    sys.path.insert(0, str(HERE))
    import golden_runs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", type=Path, help="a source tree")
    parser.add_argument("new", nargs="?", type=Path, help="another")
    parser.add_argument(
        "--runs", nargs="+", default=[*golden_runs.RUNS, "ml-100k"], help="default: golden runs, ml-100k"
    )
    parser.add_argument("--data_path", default="", help="holds the folders of other data sets")
    parser.add_argument("--epochs", type=int, default=5, help="of the runs on data sets (default: 5)")
    parser.add_argument("--repeats", type=int, default=1, help="pairs of trainings (default: 1)")
    parser.add_argument("--output", type=Path, help="a JSON file with everything")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--features", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.epochs, options.data_path, options.features)
    trees = {"old": options.old, "new": options.new}
    for name, tree in trees.items():
        if tree is None or not (tree / "recbole_llm" / "__init__.py").is_file() or not (tree / "kernels").is_dir():
            parser.error(f"{name}: {tree} holds no recbole_llm/ and kernels/")
        trees[name] = tree.resolve()
    if options.data_path:
        options.data_path = str(Path(options.data_path).resolve())
    found = {}
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            found[run] = compare(run, trees, Path(folder), options)
        print(report(run, found[run]), flush=True)
    if options.output:
        content = {"benchmark": "same_job", "repeats": options.repeats, "epochs": options.epochs} | of_job(trees)
        options.output.write_text(json.dumps(content | {"runs": found}, indent=1) + "\n")
    worst = max(max(f["scores"], f["checkpoint"]["largest"], f["export"]["largest"]) for f in found.values())
    print("bitwise equal" if worst == 0 else f"largest difference {worst:.4g}")
    return None


if __name__ == "__main__":
    main()
