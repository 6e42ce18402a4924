"""How the files of a version are made, with that version importable: ``python tests/compatibility/make.py FOLDER``.

``0.1.0`` was made so at 97b2c22, with Python 3.11, torch 2.6.0, NumPy 1.26.4, pandas 2.0.3, RecBole 1.2.1: the oldest libraries
that are supported, since those of today read what older ones have pickled, and not the other way round. Nothing is made anew by
a test, and a folder that is committed is never made again: it stands for what people of that version have on their disks.

(At 97b2c22 commands took the paths of a training out of its checkpoint; since then they are given again, here too.)

All is made data: 30 users and 36 items that ``tests/golden/made_data.py`` draws, and its encoder of random weights. Paths are
relative, so that the files hold no machine's.
"""

import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "golden")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import made_data  # noqa: E402
import what_is_read  # noqa: E402

COMMON = {
    "data_path": "data",
    "feature_cache_dir": "features",
    "gpu_id": "",
    "state": "WARNING",
    "show_progress": False,
    "embedding_size": 8,
    "train_batch_size": 16,
    "learning_rate": 0.01,
    "metrics": ["Recall", "NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "epochs": 30,
    "stopping_step": 100,
    "closed_form_dim": 12,
}
RUNS = {
    # both blocks, texts by an encoder; beside it RecBole's saved dataset and data loaders
    "both": {"encoder": "encoder", "save_dataset": True, "save_dataloaders": True},
    # split by time: fading histories, a next-item block, a full closed form
    "time": {
        "encoder": "",
        "item_features_file": "data/shop/vectors.npy",
        "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"},
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "closed_form_dim": "full",
    },
    # items that training does not hold, placed by their texts; towers with everything that they may have
    "cold": {
        "encoder": "encoder",
        "benchmark_filename": ["train", "valid", "test"],
        "cold_boost": 0.8,
        "user_tower": "history+id",
        "tower_features": True,
        "adapter_hidden_size": 6,
        "scoring": "cosine",
        "scale_init": 4.0,
    },
}
SMALL_GAP = 0.001  # answers whose scores are nearer to each other are not recorded: their order is anybody's


def make(folder):
    """Everything, in an empty folder."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    made_data.write_dataset("data", "shop", n_users=30, n_items=36, n_cold=5, sizes=(5, 12), chain=0.2, seed=15)
    made_data.write_encoder("encoder")
    expected = {"metrics": {}, "answers": {}}
    for name, settings in RUNS.items():
        given = COMMON | settings | {"checkpoint_dir": f"saved-{name}"}
        command = [
            "run",
            "-d",
            "shop",
            "--output",
            f"{name}.json",
            *(f"--{key}={value}" for key, value in given.items()),
        ]
        what_is_read.call(*command)
        best, last = sorted(
            Path(f"saved-{name}").glob("LLMTwoTower-*.pth"), key=lambda path: path.stem.endswith("-last")
        )
        best.rename(f"{name}.pth")
        last.rename(f"{name}-last.pth")
        bundle = ["--bundle-encoder"] if name == "both" else []
        bundle += [f"--{key}={value}" for key, value in what_is_read.paths_of(name).items()]
        what_is_read.call("export", f"{name}.pth", "--output", f"export-{name}", "--metrics", f"{name}.json", *bundle)
        result = json.loads(Path(f"{name}.json").read_text())
        expected["metrics"][name] = {key: float(value) for key, value in result["test_result"].items()}
        expected["answers"][name] = _with_gaps(what_is_read.answers(f"{name}.pth", name))
    expected["explained"] = {name: what_is_read.explained(f"export-{name}") for name in RUNS}
    expected["resumed"] = what_is_read.resume("both-last.pth")
    with what_is_read.service("export-both", "state") as ask:
        _change(ask)
        before = what_is_read.service_answers(ask)
    with what_is_read.service("export-both", "state") as ask:
        expected["service"] = what_is_read.service_answers(ask)
    assert what_is_read.differences(expected["service"], before) == []
    for name in ("features", "log", "log_tensorboard", "resumed", "saved-time", "saved-cold"):
        shutil.rmtree(name)
    for name in ("both.json", "time.json", "cold.json", "time-last.pth", "cold-last.pth"):
        Path(name).unlink()
    made_data.write_lines(Path("expected.json"), [json.dumps(_rounded(expected), indent=None, separators=(",", ":"))])


def _with_gaps(answers):
    """Those whose scores all differ by enough."""
    kept = {}
    for who, rows in answers.items():
        scores = [row[1] for row in rows]
        if all(first - second > SMALL_GAP for first, second in pairwise(scores)):
            kept[who] = rows
    assert len(kept) > 0.8 * len(answers), f"{len(kept)} of {len(answers)} answers are told apart; take another seed"
    return kept


def _change(ask):
    """Items put, changed and deleted, so that the log of changes holds every kind of row."""
    put = lambda item, **body: ask("PUT", f"/v1/items/{item}", body)  # noqa: E731
    put("new1", title="A new star", text="a space story of star star comet moon", attributes={"year": 2024.0})
    put("new2", fields={"title": "A farm story of cow barn hay"}, attributes={"genre": "farm", "year": 2001.0})
    put("i5", title="Another name")
    put("i7", text="a winter story of snow sledge frost", refit=True)
    ask("DELETE", "/v1/items/i3")
    put("new3", text="a sea story of whale pirate")
    ask("DELETE", "/v1/items/new3")
    put("new4", text="a crime story of alibi prison")
    ask("DELETE", "/v1/items/new4")
    put("new4", text="a music story of piano drum band", title="Back again")


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
