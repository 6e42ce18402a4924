"""Is P(i|u) a probability, and how many dimensions does it need?

    python benchmarks/calibration.py --dataset ml-100k

1. Calibration: LLMTwoTower with its defaults; on the test split, for every (user, trained item outside the user's training and
   validation history), P(i|u) against whether the test holds the pair. Expected calibration error over 15 equally wide bins, the
   same over bins of equally many pairs (most pairs are improbable, and share the first wide bin), and over each user's ten best.
   The same of sigmoid(score), Platt's two parameters alone, beside it.
2. The worked case of the article that gave the model its formula: one user, one liked item, trained by gradient descent on the
   catalogue's binary cross-entropy until P(liked) is 0.9; the other items' probabilities beside it.
3. Dimension: the learned block alone with d = 8 ... 1024, and the closed form alone at rank d: test NDCG@10, seconds (on the
   wall's clock and of the processor), peak memory of the process.

Pieces are kept in ``--work``, so that a stopped run goes on; the summary is one JSON file in benchmarks/results/.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from model_quality import COMMON, OutOfTimeError, Pieces
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.experiment import Experiment
from recbole_llm.fitting.calibration import expected_calibration_error
from recbole_llm.scoring.rows import rows_from_pairs
from recbole_llm_kernels import catalog_bce, pair_sigmoid

DIMS = (8, 16, 32, 64, 128, 256, 512, 1024)
BINS = 15


def reliability(probability: torch.Tensor, label: torch.Tensor, equal_mass: bool) -> dict[str, Any]:
    """Error and, by bin, number of pairs, mean probability and share of positives."""
    if equal_mass:
        order = torch.argsort(probability)
        bins = torch.empty(len(order), dtype=torch.int64)
        bins[order] = torch.arange(len(order)) * BINS // len(order)
    else:
        bins = (probability * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(bins, minlength=BINS).double()
    mean = torch.bincount(bins, probability.double(), minlength=BINS) / count.clamp(min=1)
    share = torch.bincount(bins, label.double(), minlength=BINS) / count.clamp(min=1)
    error = float(((mean - share).abs() * count).sum() / count.sum())
    return {"ece": error, "pairs": count.long().tolist(), "probability": mean.tolist(), "positives": share.tolist()}


def calibration(dataset: str, data_path: str | None, folder: Path) -> dict[str, Any]:
    """Part 1."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    values = {"show_progress": False, "state": "ERROR", "checkpoint_dir": str(folder / "saved")}
    config = Config(
        model="LLMTwoTower", dataset=dataset, config_dict=values | ({"data_path": data_path} if data_path else {})
    )
    init_seed(config["seed"], True)
    parts = data_preparation(config, create_dataset(config))
    model = get_model("LLMTwoTower")(config, parts[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(parts[0], parts[1], saved=True, show_progress=False)
    model.eval()
    rows = [
        rows_from_pairs(
            part._dataset.inter_feat["user_id"].long(), part._dataset.inter_feat["item_id"].long(), model.n_users
        )
        for part in parts
    ]
    users = torch.nonzero(rows[2].sizes).squeeze(1)
    trained = ~model.cold
    trained[0] = False
    found: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("p", "plain", "label", "top", "top_plain", "top_label")
    }
    with torch.no_grad():
        for few in users.split(256):
            probability, plain = model.probabilities(few), torch.sigmoid(model.scores(few))
            label, counts = torch.zeros(plain.shape, dtype=torch.bool), trained.expand(len(few), -1).clone()
            for part, mask, value in ((rows[2], label, True), (rows[0], counts, False), (rows[1], counts, False)):
                own = part.select(few)
                mask[own.row_of_entry(), own.ids] = value
            top, items = plain.masked_fill(~counts, -1.0).topk(10, dim=1)
            best = (probability.gather(1, items), top, (label & counts).gather(1, items))
            values = (probability[counts], plain[counts], label[counts], *best)
            for kept, value in zip(found.values(), values, strict=True):
                kept.append(value.flatten())
    p, plain, label, top, top_plain, top_label = (torch.cat(v) for v in found.values())
    measured = {
        "pairs": len(label),
        "positives": int(label.sum()),
        "slope_and_offset": [model.score.slope, model.score.intercept],
        "probability_map": vars(model.score.probability),
        **errors(p, label, top, top_label),
        "sigmoid_of_the_score": errors(plain, label, top_plain, top_label),
    }
    assert abs(measured["equally_wide_bins"]["ece"] - expected_calibration_error(p, label, BINS)) < 1e-6
    return measured


def errors(p: torch.Tensor, label: torch.Tensor, top: torch.Tensor, top_label: torch.Tensor) -> dict[str, Any]:
    """Reliability of all pairs, by two kinds of bins, and of each user's ten best."""
    return {
        "equally_wide_bins": reliability(p, label, equal_mass=False),
        "equally_filled_bins": reliability(p, label, equal_mass=True),
        "ten_best_of_each_user": reliability(top, top_label, equal_mass=False),
    }


def worked_case(dim: int = 8, n_items: int = 6, rate: float = 0.5, goal: float = 0.9) -> dict[str, Any]:
    """Part 2: dL/dw_i = (P(i|u) - y_i) x_u raises the liked item's probability and lowers the others'."""
    generator = torch.Generator().manual_seed(0)
    user = (0.1 * torch.randn(1, dim, generator=generator)).requires_grad_()
    items = (0.1 * torch.randn(n_items, dim, generator=generator)).requires_grad_()
    offsets, liked = torch.tensor([0, 1]), torch.tensor([2])
    everyone = torch.zeros(n_items, dtype=torch.int64), torch.arange(n_items)
    course = []
    for step in range(10_000):
        with torch.no_grad():
            probability = pair_sigmoid(user, items, *everyone)
        if step % 10 == 0 or probability[2] >= goal:
            course.append({"step": step, "probability": [round(float(p), 4) for p in probability]})
        if probability[2] >= goal:
            break
        loss = catalog_bce(user, items, offsets, liked)
        gradients = torch.autograd.grad(loss, (user, items))
        with torch.no_grad():
            for parameter, gradient in zip((user, items), gradients, strict=True):
                parameter -= rate * gradient
    return {"dim": dim, "items": n_items, "liked": 2, "learning_rate": rate, "course": course}


def sweep(dataset: str, dims: list[int], overrides: list[str], pieces: Pieces) -> list[dict[str, Any]]:
    """Part 3."""
    found = []
    for dim in dims:
        for block, changes in (
            ("learned", {"blocks": "learned", "embedding_size": dim}),
            ("closed_form", {"blocks": "closed_form", "closed_form_dim": dim}),
        ):
            outcome = pieces.of(Experiment("LLMTwoTower", dataset, (), changes, tuple(overrides)))
            training = outcome.trainings[0]
            point = {
                "block": block,
                "d": dim,
                "valid": training.best_valid_score,
                "test": training.test["ndcg@10"],
                "seconds": round(training.seconds, 1),
                "cpu_seconds": round(training.cpu_seconds, 1),
                "peak_mib": round(outcome.peak_bytes / 2**20),
            }
            found.append(point)
            print(point, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--dims", default=",".join(map(str, DIMS)), help="dimensions of part 3; empty for none")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", default="calibration")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/calibration-<dataset>.json")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    pieces = Pieces(work / arguments.dataset, arguments.minutes)
    kept = work / f"{arguments.dataset}-reliability.json"
    if not kept.is_file():
        kept.write_text(json.dumps(calibration(arguments.dataset, arguments.data_path, work)))
    measured = json.loads(kept.read_text())
    for name in ("equally_wide_bins", "equally_filled_bins", "ten_best_of_each_user"):
        print(
            f"expected calibration error, {name.replace('_', ' ')}: {measured[name]['ece']:.4f}, of sigmoid(score) "
            f"{measured['sigmoid_of_the_score'][name]['ece']:.4f}",
            flush=True,
        )
    case = worked_case()
    print("worked case:", case["course"][-1], flush=True)
    overrides = [*COMMON, *([f"--data_path={arguments.data_path}"] if arguments.data_path else [])]
    try:
        dimensions = sweep(arguments.dataset, [int(d) for d in arguments.dims.split(",") if d], overrides, pieces)
    except OutOfTimeError:
        print("out of time: run the same command again to go on")
        return 3
    result = {
        "benchmark": "calibration",
        "dataset": arguments.dataset,
        "calibration": measured,
        "worked_case": case,
        "dimensions": dimensions,
        "machine": machine("cpu"),
    }
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"calibration-{arguments.dataset}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
