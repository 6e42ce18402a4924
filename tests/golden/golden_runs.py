"""Four small trainings through the commands, and what is recorded of each.

``perform`` trains, exports and recommends in a folder; ``summary`` reads what lies there then. Public commands and files alone
are used, so that code may move. ``checkpoint_summary`` is the one place that knows the inside of a checkpoint: another format
needs another reader there, which gives the same numbers.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import made_data
import numpy as np

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "expected"
K = 10
BY_TIME = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}
TIMES = {"inter": ["user_id", "item_id", "timestamp"]}
TEXT = "a space story of rocket comet moon"

COMMON = {
    "data_path": "data",
    "checkpoint_dir": "saved",
    "feature_cache_dir": "features",
    "gpu_id": "",
    "epochs": 15,
    "embedding_size": 16,
    "train_batch_size": 64,
    "learning_rate": 0.01,
    "show_progress": False,
    "state": "WARNING",
    "metrics": ["Recall", "NDCG"],
    "topk": [K],
    "valid_metric": f"NDCG@{K}",
    "seed": 2020,
}
FROM_FILE = {"item_features_file": "data/shop/vectors.npy", "encoder": ""}


@dataclass(frozen=True)
class Run:
    """Configuration keys beside ``COMMON``, data, and processes."""

    settings: dict
    data: dict = field(default_factory=dict)
    processes: int = 1


RUNS = {
    "random": Run(FROM_FILE, {"seed": 1}),
    "time": Run({**FROM_FILE, "eval_args": BY_TIME, "load_col": TIMES, "closed_form_dim": 32}, {"seed": 6}),
    "cold": Run(
        {"encoder": "encoder", "benchmark_filename": ["train", "valid", "test"], "closed_form_dim": 24},
        {"seed": 3, "n_cold": 30},
    ),
    "shards": Run(
        {**FROM_FILE, "blocks": "learned", "user_tower": "history+id", "shard_items": True}, {"seed": 1}, processes=2
    ),
}


# ------------------------------------------------------------------ performing


def write_data(name):
    """The data of a run, and the encoder, in the working directory."""
    made_data.write_dataset("data", "shop", n_users=300, n_items=200, **RUNS[name].data)
    made_data.write_encoder("encoder")


def command_of_run(name):
    """Arguments of ``recbole-llm run``."""
    settings = COMMON | RUNS[name].settings
    return ["run", "-d", "shop", "--output", "result.json", *(f"--{key}={value}" for key, value in settings.items())]


def paths_of(name):
    """The options that give a command again what no checkpoint is asked for."""
    settings = COMMON | RUNS[name].settings
    keys = ("data_path", "encoder", "item_features_file", "feature_cache_dir")
    return [f"--{key}={settings[key]}" for key in keys if settings.get(key)]


def perform(name):
    """Train, export and recommend in the working directory, which must be empty."""
    write_data(name)
    paths = paths_of(name)
    command = command_of_run(name)
    if RUNS[name].processes == 1:
        call(*command)
    else:
        torchrun(RUNS[name].processes, command)
    train = ("--history", "train")  # as they were recorded
    call("export", "saved", "--output", "export", "--bundle-encoder", "--attributes", "genre,year", *train, *paths)
    call("recommend", "saved", "--k", K, "--output", "checkpoint.jsonl", *train, *paths)
    call("recommend", "export", "--k", K, "--output", "export.jsonl")
    call("similar", "export", "--item", "i3", "--k", K, "--output", "similar.jsonl")
    call("recommend", "export", "--items", "i3", "i10", "i4", "--k", K, "--output", "items.jsonl")
    if RUNS[name].settings.get("encoder"):
        call("recommend", "export", "--text", TEXT, "--k", K, "--output", "text.jsonl")


def call(*arguments):
    """A command in this process."""
    from recbole_llm.cli import main

    code = main([str(argument) for argument in arguments])
    assert code == 0, f"recbole-llm {arguments[0]} gave {code}; the message is on standard error"


def torchrun(processes, arguments):
    """A command in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    import recbole_llm
    import recbole_llm_kernels

    paths = [str(Path(package.__file__).parents[1]) for package in (recbole_llm, recbole_llm_kernels)]  # this process's
    paths.append(os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    out = subprocess.run(
        [*command, "-m", "recbole_llm", *arguments], capture_output=True, text=True, timeout=480, env=environment
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-6000:]


# ------------------------------------------------------------------ what is recorded


def summary(name):
    """Numbers of the working directory after ``perform``, as JSON but for the arrays under ``answers``."""
    found = {
        "data": text_digest(),
        "metrics": metrics(),
        "checkpoint": checkpoint_summary(),
        "export": export_summary(),
    }
    found["answers"] = {path.stem: answers(path) for path in sorted(Path().glob("*.jsonl"))}
    return found


def text_digest():
    """Of the data set's text files: whether the generator gives what was recorded."""
    found = hashlib.sha256()
    for path in sorted(Path("data/shop").glob("shop.*")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def metrics():
    """Of validation and test, by name."""
    result = json.loads(Path("result.json").read_text())
    return {
        f"{split} {name}": float(value)
        for split in ("best_valid_result", "test_result")
        for name, value in result[split].items()
    }


def answers(path):
    """Users in order, numbers of the items ``[U, K]`` (-1 where there is none) and their scores."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    users = list(dict.fromkeys(row["user"] for row in rows))
    line = {user: n for n, user in enumerate(users)}
    items, scores = np.full((len(users), K), -1, np.int16), np.full((len(users), K), np.nan, np.float32)
    for row in rows:
        at = line[row["user"]], row["rank"] - 1
        items[at], scores[at] = int(row["item"][1:]), row["score"]
    return {"users": np.array(users), "items": items, "scores": scores}


def checkpoint_summary():
    """Shapes, norms and projections of the checkpoint's tensors, and its plain numbers.

    The sign and the order of an eigenvector are free, so that of factors only products of two tables are looked at.
    """
    import torch

    (path,) = (path for path in Path("saved").glob("LLMTwoTower-*.pth") if not path.stem.endswith("-last"))
    content = torch.load(path, weights_only=False)
    found = {name: sketch(tensor) for name, tensor in content["state_dict"].items()}
    other = as_version_1(content["other_parameter"])
    tables = {"closed_form": (other["closed_form_source"], other["closed_form_target"])}
    follow, cold = other["next_item"], other["cold"]
    if follow:
        tables["next_item"] = follow["source"], follow["target"]
    wide = []
    for block, (source, target) in tables.items():
        if source is not None:
            found[f"{block} product"] = sketch(source if target is None else source.double() @ target.double().T)
            wide.append(source if block == "closed_form" or target is not None else torch.zeros(len(source), 0))
    if cold:
        found["cold of closed form"] = sketch(torch.cat(wide, 1).double() @ cold["closed"].double().T)
        found["cold of learned block"] = sketch(cold["learned"])
        found["cold sources of learned block"] = sketch(cold["learned_source"])
        found["cold bias"] = sketch(cold["bias"])
    if other["later"]:
        found["later ids"] = sketch(other["later"]["ids"].double())
    numbers = {key: other[key] for key in ("block_scales", "calibration", "closed_decay", "probability_map")}
    numbers["cold"] = {key: cold[key] for key in ("kappa", "mu", "joint")} if cold else None
    numbers["next_item"] = {key: follow[key] for key in ("decay", "scale")} if follow else None
    numbers["setting"] = other["setting"]
    return {"tensors": found, "numbers": plain(numbers)}


def as_version_1(other):
    """What a checkpoint holds beside parameters, under the names it had in 0.1.0, in which the record is written."""
    import torch

    if "score" not in other:
        return other
    score, cold = other["score"], other["score"]["cold"]
    blocks = {block["name"]: block for block in score["blocks"]}
    closed, follow = blocks.get("closed_form", {"scale": 0.0}), blocks.get("next_item")
    later, setting = other["later"], other["setting"]

    def target(block):
        table = block.get("target")
        if table is not None and cold is not None:  # 0.1.0 kept these rows apart
            table = table.index_fill(0, cold["ids"], 0.0)
        return table

    found = {
        "closed_form_source": closed.get("source"),
        "closed_form_target": target(closed),
        "block_scales": [closed["scale"], blocks.get("learned", {"scale": 0.0})["scale"]],
        "calibration": [score["slope"], score["intercept"]],
        "closed_decay": closed.get("decay"),
        "probability_map": score["probability"],
        "later": later,
        "next_item": None,
        "cold": None,
        "setting": None,
    }
    if follow is not None:
        scale = follow["scale"] / closed["scale"]
        tables = {"source": follow["source"], "target": target(follow)}
        found["next_item"] = {**tables, "decay": follow["decay"], "scale": scale}
    if cold is not None:
        wide = [name for name, block in blocks.items() if name != "learned" and block["target"] is not None]
        wide = wide or ["closed_form"]
        found["cold"] = {
            **{key: cold[key] for key in ("kappa", "mu", "joint")},
            "closed": torch.cat([cold["target"][name] for name in wide], 1),
            "learned": cold["target"]["learned"],
            "learned_source": cold["source"]["learned"],
            "bias": cold["bias"]["learned"],
        }
    if setting is not None:
        (kernel,) = setting["kernels"] or ({"weight": 0.0, "power": 1},)
        flat = {key: value for key, value in setting.items() if key != "kernels"}
        found["setting"] = {**flat, "text_weight": kernel["weight"], "text_power": kernel["power"]}
    return found


def sketch(tensor):
    """Shape, norm and four products with fixed random vectors on both sides."""
    values = np.asarray(tensor, dtype=np.float64)
    matrix = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    rng = np.random.RandomState(len(matrix) + matrix.shape[1])
    left, right = rng.standard_normal((4, len(matrix))), rng.standard_normal((4, matrix.shape[1]))
    products = np.einsum("kn,nd,kd->k", left, matrix, right) / np.sqrt(matrix.size)
    return {"shape": list(values.shape), "norm": float(np.linalg.norm(matrix)), "products": products.tolist()}


# of the manifest: what says when and by what it was made, how it is laid out, and what is compared with a tolerance
BESIDE = ("schema", "export_id", "created_at", "producer", "files", "metrics", "blocks", "probability")


def export_summary():
    """The manifest, and sketches of what the export's tensors say together, whatever the columns of a block."""
    from recbole_llm.serving.artifact import load_export

    export = load_export("export")
    manifest = json.loads(Path("export/manifest.json").read_text())
    found = {"manifest": {key: value for key, value in manifest.items() if key not in BESIDE}}
    found["manifest"]["files"] = dict.fromkeys(sorted(manifest["files"]), "listed")
    blocks = {b["name"]: {key: b[key] for key in ("exponent", "scale", "scoring", "decay")} for b in manifest["blocks"]}
    found["numbers"] = {"blocks": blocks, "probability": manifest.get("probability")}
    tensors = {"bias": sketch(export.bias), "offset": sketch(export.offset)}
    start = 0
    for block in manifest["blocks"]:
        columns = slice(start, start := start + block["dim"])
        product = export.source[:, columns].astype(np.float64) @ export.vector[:, columns].T.astype(np.float64)
        tensors[f"{block['name']} product"] = sketch(product)
    arrays = ("trained", "listed", "history_offsets", "history_items", "history_weight", "history_rank", "user_part")
    tensors |= {name: sketch(getattr(export, name)) for name in arrays if getattr(export, name) is not None}
    if export.text_map is not None:
        vectors = np.random.RandomState(0).standard_normal((20, export.text_map.feature_dim))
        vector, source, bias = export.text_map.apply(vectors.astype(np.float32))
        tensors["mapped texts"] = sketch(export.source.astype(np.float64) @ vector.T.astype(np.float64))
        tensors["mapped sources"] = sketch(source.astype(np.float64) @ export.vector.T.astype(np.float64))
        tensors["mapped bias"] = sketch(bias)
    return found | {"tensors": tensors}


def plain(value):
    """As JSON."""
    return json.loads(json.dumps(value))


# ------------------------------------------------------------------ comparing

METRIC = 0.0005
RELATIVE = 0.001  # other processors, thread counts and library versions differ by up to 6e-5: see record.py --against
REPLACED = 0.01  # share of the recommended items that may be others, of nearly the same score


def differences(found, expected, what=""):
    """Sentences, one per difference beyond the tolerances; ``found`` may hold more than ``expected``."""
    if isinstance(expected, dict) and expected.keys() == {"shape", "norm", "products"}:
        return _of_sketches(found, expected, what)
    if isinstance(expected, dict) and isinstance(found, dict):
        missing = [f"{what}/{key} is missing" for key in expected if key not in found]
        return missing + [
            text for key in expected if key in found for text in differences(found[key], expected[key], f"{what}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            text
            for n, pair in enumerate(zip(found, expected, strict=True))
            for text in differences(*pair, f"{what}/{n}")
        ]
    if isinstance(expected, float) and isinstance(found, (int, float)):
        bound = METRIC if what.startswith("/metrics") else RELATIVE * abs(expected) + RELATIVE / 5
        return [f"{what}: {found!r}, recorded {expected!r}"] if not abs(found - expected) <= bound else []
    return [] if found == expected else [f"{what}: {found!r}, recorded {expected!r}"]


def _of_sketches(found, expected, what):
    if found["shape"] != expected["shape"]:
        return [f"{what}: shape {found['shape']}, recorded {expected['shape']}"]
    size = expected["norm"] / max(np.prod(expected["shape"]), 1) ** 0.5
    off = max(abs(np.subtract(found["products"], expected["products"]))) / max(size, 1e-12)
    norm = abs(found["norm"] / max(expected["norm"], 1e-12) - 1) if expected["norm"] else found["norm"]
    return [f"{what}: differs by {max(off, norm):.2g} of its size"] if not max(off, norm) <= RELATIVE else []


def of_answers(found, expected, what, relative=RELATIVE):
    """The same for answers: equal scores per item, and another item only where its score is nearly the last one's."""
    if found["items"].shape != expected["items"].shape or list(found["users"]) != list(expected["users"]):
        return [f"{what}: other users"]
    told, replaced = [], 0
    typical = float(np.nanmean(np.abs(expected["scores"])))
    for user, *rows in zip(
        expected["users"], found["items"], found["scores"], expected["items"], expected["scores"], strict=True
    ):
        here, there = (
            dict(zip(items.tolist(), scores.tolist(), strict=True)) for items, scores in (rows[:2], rows[2:])
        )
        here.pop(-1, None)
        there.pop(-1, None)
        if len(here) != len(there):
            told.append(f"{what} of {user}: {len(here)} items, recorded {len(there)}")
            continue
        last = min(here.values(), default=0.0)
        for item, score in there.items():
            bound = relative * max(abs(score), typical)
            replaced += item not in here
            # beyond the last place all that is known is that the score is at most the last one's
            off = abs(here[item] - score) if item in here else max(score - last, 0.0)
            if not off <= bound:
                told.append(f"{what} of {user}, i{item}: {here.get(item, f'at most {last}')}, recorded {score}")
    if replaced > REPLACED * expected["items"].size:
        told.append(f"{what}: {replaced} items are others than recorded")
    return told


# ------------------------------------------------------------------ files


def write_expected(name, found):
    """Into ``expected/``: JSON, and the answers as arrays."""
    EXPECTED.mkdir(exist_ok=True)
    rest = {key: value for key, value in found.items() if key != "answers"}
    text = json.dumps(rounded(rest), indent=1, sort_keys=True)
    made_data.write_lines(EXPECTED / f"{name}.json", [text])
    arrays = {
        f"{what}/{key}": value
        for what, answer in found["answers"].items()
        if what != "export"  # answers as the checkpoint, which a test says
        for key, value in answer.items()
    }
    np.savez_compressed(EXPECTED / f"{name}.npz", **arrays)


def rounded(value):
    """Floats to nine digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def read_expected(name):
    """What :func:`write_expected` wrote."""
    found = json.loads((EXPECTED / f"{name}.json").read_text())
    found["answers"] = {}
    with np.load(EXPECTED / f"{name}.npz") as arrays:
        for path, value in arrays.items():
            what, key = path.rsplit("/", 1)
            found["answers"].setdefault(what, {})[key] = value
    return found
