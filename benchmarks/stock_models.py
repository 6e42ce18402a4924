"""Every stock model of RecBole trains, validates and tests for an epoch: the results and the repairs each needs.

    python benchmarks/stock_models.py --output benchmarks/results/stock_models.json      # about an hour, one thread
    python benchmarks/stock_models.py --models BPR,DeepFM --update --output benchmarks/results/stock_models.json
    python benchmarks/stock_models.py --stock --python OLD/bin/python --output old.json  # RecBole alone
    python benchmarks/stock_models.py --report benchmarks/results/stock_models{,-old-stack}.json

The data is the first 150 users of ml-100k, which the RecBole wheel contains, with random vectors for its entities and
relations. A repair counts as needed if leaving it out makes the run fail or changes its metrics; those needed to import
RecBole and read a checkpoint at all (``BASE``) are common to every model, and those of configuration, search, metrics
and saved data do not depend on the model. Models run in worker processes, several in each; ``--stock`` runs the same
without this project on the libraries RecBole was made for, for the numbers that the repaired runs must reproduce.
``--update`` keeps the rows of models not run, and the repairs found before for those whose metrics are still the same.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATASET = "ml-150"
USERS = 150
BASE = ("ray", "numpy", "torch_load")
OPTIONAL = ("dok", "agg_len", "fillna", "flops", "ksr", "dgcf", "kgat", "tree_defaults", "pop", "bert4rec")
OF_MODELS = {"ksr": ("KSR",), "dgcf": ("DGCF",), "kgat": ("KGAT",), "tree_defaults": ("LightGBM", "XGBoost")}
OF_MODELS |= {"pop": ("Pop",), "bert4rec": ("BERT4Rec",)}
MODELS_PER_WORKER = 8
PACKAGES = (
    "recbole",
    "torch",
    "numpy",
    "pandas",
    "scipy",
    "ray",
    "faiss-cpu",
    "torch_scatter",
    "xgboost-cpu",
    "lightgbm",
)

INTER = ["user_id", "item_id", "rating", "timestamp"]
USER = ["user_id", "age", "gender", "occupation"]
SHARED = dict(epochs=1, show_progress=False, state="CRITICAL", gpu_id="", load_col={"inter": INTER})
# what RecBole's quick_start_config gives to the name ml-100k only
CONTEXT = dict(
    threshold={"rating": 4}, load_col={"inter": INTER, "user": USER, "item": ["item_id", "release_year", "class"]}
)
FEATURES = dict(load_col={"inter": INTER, "item": ["item_id", "release_year", "class"]})
GRAPH = {"inter": INTER, "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
ENTITIES = dict(
    load_col={**GRAPH, "ent": ["ent_id", "ent_emb"], "rel": ["rel_id", "rel_emb"]},
    additional_feat_suffix=["ent", "rel"],
    alias_of_entity_id=["ent_id"],
    alias_of_relation_id=["rel_id"],
    preload_weight={"ent_id": "ent_emb", "rel_id": "rel_emb"},
    eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
)

PRETRAINED = "saved/{model}-" + DATASET + "-1.pth"

# configuration by model; a list is a chain of runs, of which the last is reported
SPECIAL: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
    "ConvNCF": dict(eval_batch_size=40960),
    "DIN": dict(load_col={"inter": INTER, "user": USER, "item": ["item_id", "release_year"]}),
    "DIEN": dict(load_col={"inter": INTER, "user": USER, "item": ["item_id", "release_year"]}),
    "FDSA": FEATURES,
    "GRU4RecF": FEATURES,
    "GRU4RecKG": ENTITIES,
    "KSR": ENTITIES,
    "NAIS": dict(embedding_size=16, weight_size=16, train_batch_size=8192, eval_batch_size=40960),
    "NCL": dict(num_clusters=50),  # faiss needs as many users as clusters
    "RaCT": [
        dict(train_stage="actor_pretrain", pretrain_epochs=1, save_step=1),
        dict(train_stage="critic_pretrain", pretrain_epochs=1, save_step=1, pre_model_path=PRETRAINED),
        dict(train_stage="finetune", pre_model_path=PRETRAINED),
    ],
    "RippleNet": dict(embedding_size=8, n_memory=4, eval_batch_size=40960),
    "S3Rec": [
        {**FEATURES, **dict(train_stage="pretrain", pretrain_epochs=1, save_step=1)},
        {**FEATURES, **dict(train_stage="finetune", pre_model_path=PRETRAINED)},
    ],
    "SASRecF": FEATURES,
}


# what tests/bridge/test_stock_models_right.py compares with independent formulas, and how each model of our tables stands
# to its paper
ASSESSED = {
    "Pop": "wrong, repaired (pop): counted the batches that hold an item, drawn negatives included",
    "BERT4Rec": "wrong, repaired (bert4rec): ranked without the oldest item of a history that left room for the mask;"
    " known difference: each user's newest training item trains nothing, nor does a mask in the first place (1,600 users of"
    " amazon-office split by time, a layer of 32: NDCG@10 .0183, ranking repaired .0189, training too .0228)",
    "EASE": "right",
    "ItemKNN": "right; which of equally near items are kept is left open",
    "ADMMSLIM": "right; noise of 1e-5 breaks ties",
    "SLIMElastic": "right to 2% of the L1 weight, where it stops",
    "NCEPLRec": "right to a randomised SVD of few iterations (ml-100k 2020: .2751, with an exact one .2759)",
    "BPR": "right; no L2 term unless weight_decay is given",
    "LightGCN": "right; its penalty is the norm and not the square unless require_pow is set",
    "NeuMF": "right; one negative for each positive (paper: four), no pretraining",
    "DMF": "right; a dot product for the cosine, as its documentation says; one negative for each positive",
    "SimpleX": "right; RecBole's default is one negative for each positive (paper: hundreds)",
    "MultiVAE": "right but for the noise in training, a hundredth of the paper's; the KL weight takes 200,000 steps to rise",
    "RecVAE": "right but for the noise in training, a hundredth of the paper's",
    "DiffRec": "right",
    "SASRec": "right; a training row for each prefix, whose last place alone is predicted",
    "GRU4Rec": "right; a training row for each prefix, softmax over the catalogue",
}


# ---------------------------------------------------------------- data


def make_slice(folder: Path) -> None:
    """The first users of ml-100k as atomic files ``folder/ml-150``, and vectors for the entities and relations."""
    import random

    origin = Path(find_spec("recbole").submodule_search_locations[0], "dataset_example", "ml-100k")
    target = folder / DATASET
    target.mkdir()
    lines = (origin / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines[1:] if int(line.split("\t")[0]) <= USERS]
    (target / f"{DATASET}.inter").write_text("\n".join([lines[0], *kept]) + "\n", encoding="utf-8")
    for suffix in ("item", "user", "kg", "link"):
        (target / f"{DATASET}.{suffix}").write_bytes((origin / f"ml-100k.{suffix}").read_bytes())
    triples = [line.split("\t") for line in (origin / "ml-100k.kg").read_text(encoding="utf-8").splitlines()[1:]]
    draw = random.Random(0)
    for suffix, names in (("ent", {t[0] for t in triples} | {t[2] for t in triples}), ("rel", {t[1] for t in triples})):
        rows = (f"{name}\t{' '.join(f'{draw.gauss(0, 0.1):.4f}' for _ in range(64))}" for name in sorted(names))
        header = f"{suffix}_id:token\t{suffix}_emb:float_seq"
        (target / f"{DATASET}.{suffix}").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- worker


def settings(model: str, kind: str, loss_type: str | None) -> list[dict[str, Any]]:
    """The chain of configurations that ``model`` is run with."""
    common = dict(SHARED)
    if kind in ("CONTEXT", "DECISIONTREE"):
        common |= CONTEXT
    elif kind == "KNOWLEDGE":
        common["load_col"] = GRAPH
    elif kind == "SEQUENTIAL":
        common |= dict(MAX_ITEM_LIST_LENGTH=20, eval_batch_size=40960)
        if loss_type == "CE":  # RecBole asks for it where the loss is a softmax over the items
            common |= dict(train_neg_sample_args=None)
    special = SPECIAL.get(model, {})
    chain = special if isinstance(special, list) else [special]
    return [
        {**common, **{k: v.format(model=model) if k == "pre_model_path" else v for k, v in s.items()}} for s in chain
    ]


def run_model(model: str) -> dict[str, Any]:
    """Train, validate and test one model in this process."""
    import recbole
    import yaml
    from recbole.quick_start import run_recbole
    from recbole.utils import get_model

    start = time.process_time()
    kind = None
    try:
        kind = get_model(model).type.name
        defaults = Path(recbole.__file__).parent / "properties" / "model" / f"{model}.yaml"
        content = yaml.safe_load(defaults.read_text(encoding="utf-8")) if defaults.is_file() else None
        for config in settings(model, kind, (content or {}).get("loss_type")):
            done = run_recbole(model, DATASET, config_dict={**config, "data_path": os.getcwd()})
        outcome = {"result": "ok", "test": {k: float(v) for k, v in done["test_result"].items()}}
    except ModuleNotFoundError as error:
        outcome = {"result": f"needs {error.name}", "error": str(error)}
    except Exception as error:
        outcome = {"result": "failed", "error": f"{type(error).__name__}: {error}"[:300]}
    return {"model": model, "type": kind, **outcome, "cpu_seconds": round(time.process_time() - start, 1)}


def list_models() -> list[str]:
    """Names of the models that the installed RecBole brings, by its own files."""
    root = Path(find_spec("recbole").submodule_search_locations[0])
    import re

    names = []
    for file in sorted(root.glob("model/*_recommender/*.py")):
        classes = re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        names += [name for name in classes if name.lower() == file.stem]
    return names


def worker(stock: bool) -> None:
    """Answer jobs, a JSON string each line, on the real standard output; what RecBole prints is dropped."""
    answers, sys.stdout = sys.stdout, io.StringIO()
    if not stock:
        import recbole_llm  # noqa: F401
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv = sys.argv[:1]
    for line in sys.stdin:
        with contextlib.redirect_stderr(io.StringIO()):
            answer = run_model(json.loads(line))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# ---------------------------------------------------------------- driver


class Worker:
    """A process that runs models one after the other; killed and replaced when one takes too long."""

    def __init__(self, python: str, folder: Path, stock: bool, skip: tuple[str, ...] = ()) -> None:
        self.python, self.folder, self.stock, self.skip = python, folder, stock, skip
        self.process: subprocess.Popen[str] | None = None
        self.models = 0

    def run(self, model: str, timeout: float) -> dict[str, Any]:
        """The answer for one model, or a row that says that there was none."""
        if self.process is None:
            self._start()
        self.models += 1
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(model) + "\n")
        self.process.stdin.flush()
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        start = time.perf_counter()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        self.stop()
        seconds = round(time.perf_counter() - start, 1)
        reason = f"no answer in {timeout:.0f} s" if seconds >= timeout else "the process ended"
        return {"model": model, "type": None, "result": "failed", "error": reason, "cpu_seconds": seconds}

    def _start(self) -> None:
        paths = [] if self.stock else [str(ROOT), str(ROOT / "kernels")]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        }
        env |= {"RECBOLE_LLM_SKIP_REPAIRS": ",".join(self.skip), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        if self.stock:  # the newest PyTorch on old libraries: only the default of torch.load is in the way
            env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        command = [self.python, __file__, "--worker", *(["--stock"] if self.stock else [])]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
            cwd=self.folder,
        )

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.models = 0


def needed_repairs(row: dict[str, Any], workers: dict[str, Worker], timeout: float) -> list[str]:
    """The repairs without which ``row``'s run fails or comes to other metrics, found by leaving each out in turn."""
    model = row["model"]

    def changes(worker: Worker) -> bool:
        without = worker.run(model, timeout)
        return (without["result"], without.get("test")) != (row["result"], row["test"])

    if not changes(workers["all"]):
        return []
    candidates = [name for name in OPTIONAL if model in OF_MODELS.get(name, (model,))]
    return [name for name in candidates if changes(workers[name])]


def versions(python: str) -> dict[str, str]:
    """Of Python and of the packages that matter, as the interpreter ``python`` sees them."""
    code = (
        "import json, platform\nfrom importlib import metadata\nfound = {'python': platform.python_version()}\n"
        f"for name in {PACKAGES!r}:\n"
        "    try:\n        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n        pass\n"
        "print(json.dumps(found))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure(options: argparse.Namespace) -> None:
    """Run the models, and write the result file after each."""
    from timing import machine

    names = options.models.split(",") if options.models else list_models()
    here = machine("cpu")
    content = {
        "data": f"first {USERS} users of ml-100k, one epoch, one thread",
        "machine": {key: here[key] for key in ("cpu", "cores", "load_average")},
        "commit": None if options.stock else here["commit"],
        "versions": versions(options.python),
        "needed_by_all": [] if options.stock else list(BASE),
        "models": [],
    }
    output = Path(options.output) if options.output else None
    kept = {}
    if output is not None and options.update:
        before = json.loads(output.read_text(encoding="utf-8"))
        kept = {row["model"]: row for row in before["models"]}
        content["versions"] = before["versions"] | content["versions"]  # the rows that stay had what is not here
    with tempfile.TemporaryDirectory() as folder:
        make_slice(Path(folder))
        main = Worker(options.python, Path(folder), options.stock)
        workers = {}
        if not options.stock:
            workers = {"all": Worker(options.python, Path(folder), False, OPTIONAL)}
            workers |= {name: Worker(options.python, Path(folder), False, (name,)) for name in OPTIONAL}
        for name in names:
            row, before = main.run(name, options.timeout), kept.get(name, {})
            if "repairs" in before and before.get("test") == row.get("test"):
                row["repairs"] = before["repairs"]
            elif row["result"] == "ok" and workers:
                row["repairs"] = needed_repairs(row, workers, options.timeout)
            if name in SPECIAL:
                row["configuration"] = SPECIAL[name]
            kept[name] = row
            content["models"] = [kept[model] for model in list_models() if model in kept]
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(
                f"{name:12} {row['result']:22} {row['cpu_seconds']:6.1f} s  {', '.join(row.get('repairs', []))}",
                flush=True,
            )
            for worker in (main, *workers.values()):  # memory grows with every model
                if worker.models >= MODELS_PER_WORKER:
                    worker.stop()
        for worker in (main, *workers.values()):
            worker.stop()


def report(path: str, old: str | None) -> None:
    """Print a result file as Markdown, beside the numbers of the same models on the libraries RecBole was made for."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    other = {r["model"]: r for r in json.loads(Path(old).read_text(encoding="utf-8"))["models"]} if old else {}
    ok = sum(row["result"] == "ok" for row in content["models"])
    stack = ", ".join(f"{name} {number}" for name, number in content["versions"].items() if name != "ray")
    print(f"{ok} of {len(content['models'])} stock models train, validate and test: {content['data']}, with {stack}.")
    print(f"All of them need {', '.join(content['needed_by_all'])}.\n")
    print("| model | type | result | CPU s | repairs beside the common ones |" + (" old libraries |" if old else ""))
    print("|---|---|---|---|---|" + ("---|" if old else ""))
    for row in content["models"]:
        line = f"| {row['model']} | {(row['type'] or '').lower()} | {row['result']} | {row['cpu_seconds']} "
        line += f"| {', '.join(row.get('repairs', []))} |"
        if old:
            line += f" {compare(row, other.get(row['model']))} |"
        print(line)
    print(
        "\nThe models of our tables beside their papers, by tests/bridge/test_stock_models_right.py and by reading; what is"
        " not repaired is RecBole's choice and stays:\n\n| model | |\n|---|---|"
    )
    for model, verdict in ASSESSED.items():
        print(f"| {model} | {verdict} |")


def compare(row: dict[str, Any], old: dict[str, Any] | None) -> str:
    """How the metrics of ``row`` stand to those of the same model elsewhere."""
    if old is None or row["result"] != "ok" or old["result"] != "ok":
        return "not run" if old is None else old.get("error", old["result"])[:60]
    gap = max(abs(value - old["test"][name]) for name, value in row["test"].items())
    return "equal" if gap == 0 else f"largest difference {gap:.4f}"


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, separated by commas; default: all")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument(
        "--update", action="store_true", help="keep what an existing file has of models not run, see above"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a model")
    parser.add_argument("--python", default=sys.executable, help="interpreter to run the models with")
    parser.add_argument("--stock", action="store_true", help="RecBole alone, without this project")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print a result file, beside another if given")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.stock)
    elif options.report:
        report(options.report[0], options.report[1] if len(options.report) > 1 else None)
    else:
        measure(options)


if __name__ == "__main__":
    main()
