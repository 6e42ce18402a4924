"""Catalogues beyond the dense limit: neighbourhoods, the SVD form and the dense form side by side.

    python benchmarks/large_catalogue.py --data_path FOLDER [--before TREE]

``DATASET:dense`` and ``DATASET:beyond`` fit the closed form of RecBole's default split with its defaults, the second with a limit
of 1,000 items, so that validation chooses between neighbourhoods and the SVD form. ``DATASET:kept`` compares on validation how many
entries of a row stay. ``copies:N:closed`` and ``copies:N:next`` solve for one block of a catalogue that is made of N copies of
``--of`` (``made_catalogue.py``) with documented constants. ``-ranked`` ranks by it for 2,000 validation users, ``-exact`` by exact
scores, which conjugate gradients find for these users alone, and ``-svd`` in the SVD form. ``copies:N:solve`` measures seconds and
memory of the closed form's solution alone. ``towers:LOSS`` trains the learned block of ``--of`` at its default split by one loss,
everything else chosen as by default. ``run:now`` and ``run:before`` are ``recbole-llm run`` with its defaults on a data set of
17,000 items and 50,000 users, by this checkout and by that of ``--before``, which ends once it has taken ``--most`` times as long.

Pieces are kept in ``--work``: the same command goes on where it stopped. The result file is written after each one.
"""

import argparse
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from made_catalogue import SIZE, Copies, write_made_dataset
from timing import commit, logged, machine
from torch import Tensor

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.ease import Kernel, Setting, gram_diagonal, solve, user_weights, weighted_gram
from recbole_llm.fitting.factors import Incidence
from recbole_llm.fitting.large_catalogue import NEIGHBOURS_OF_FIT, SPECTRAL_DIMS, local_bytes
from recbole_llm.fitting.neighbourhood import KEPT, Neighbourhoods, direct_rows, solve_columns, woodbury_core
from recbole_llm.fitting.next_item import directions_of
from recbole_llm.fitting.next_item_local import LocalNextItem
from recbole_llm.fitting.next_item_rows import NextItemSetting, prefixes, ridge_of
from recbole_llm.fitting.warm_items import WarmItems, warm_items
from recbole_llm.scoring.block import LinearBlock, Scorer
from recbole_llm.scoring.rows import Rows

GROWTH = (1, 3, 9, 25, 83)  # copies of 12,068 items: from 10^4 to 10^6
PIECES = (
    "amazon-office:kept",
    "amazon-office:dense",
    "amazon-office:beyond",
    "amazon-beauty:dense",
    "amazon-beauty:beyond",
    "ml-1m-text:dense",
    "ml-1m-text:beyond",
    *(
        f"copies:{copies}:{part}"
        for copies in (1, 9)
        for part in ("closed", "closed-ranked", "closed-exact", "closed-svd", "next", "next-ranked", "next-exact")
    ),
    *(f"copies:{copies}:solve" for copies in GROWTH),
    "towers:catalog_ce",
    "towers:catalog_bce",
    "run:now",
    "run:before",
)
LIMIT = 1_000
CLOSED = Setting(ridge=8.0, kernels=(Kernel("text", 0.05, 1),))
NEXT = NextItemSetting(tau=2.0, ridge=8.0, floor=0.1, content=(("text", 0.05),))
CLOSED_DECAY, NEXT_DECAY = 3.0, 1.5
MADE = "made-17000"


def quality(dataset: str, form: str, data_path: str | None) -> dict[str, Any]:
    """Test quality of the closed form of one data set."""
    from splits import load, ours

    split = load(dataset, data_path)
    began, cpu = time.perf_counter(), time.process_time()
    with logged("recbole_llm.fitting") as told:
        fitted = ours(split, **({"dim": "full"} if form == "dense" else {"max_dense_items": LIMIT}))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {
        "dataset": dataset,
        "limit": "dense" if form == "dense" else LIMIT,
        "items": split.n_items - 1,
        "form": fitted.form,
        "setting": str(fitted.setting),
        "valid": fitted.value,
        "test": float(split.per_user(fitted).mean()),
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "log": [line for line in told if "on validation" in line or "SVD form of rank" in line],
    }


def entries_kept(dataset: str, data_path: str | None) -> dict[str, Any]:
    """Validation quality of neighbourhoods of several sizes by the entries of a row that stay, against the dense form."""
    from splits import load

    split = load(dataset, data_path)
    items = warm_items(split.train, {"text": (split.features, split.present)}, split.n_items)
    weights, n = user_weights(items.train, CLOSED.user_exponent), len(items.items)
    subset = split.validation().subset(split.n_items)
    dense = items.value(subset, solve(weighted_gram(items.train, weights, n), items.content, CLOSED), None)
    solver = Neighbourhoods(items.train, weights, items.content, n, NEIGHBOURS_OF_FIT)
    forms = []
    for count in (NEIGHBOURS_OF_FIT, 2 * NEIGHBOURS_OF_FIT):
        cpu, solver.count = time.process_time(), count
        found = solver.solve(CLOSED)
        figures: dict[str, Any] = {"neighbours": count, "cpu_seconds": round(time.process_time() - cpu, 1)}
        for kept in (50, 100, 150, 200, None):
            block = found.block(kept)
            assert block.direct is not None
            figures[f"kept_{kept}"] = items.value_of(subset, block.scorer)
            figures[f"entries_a_row_{kept}"] = round(len(block.direct.ids) / n, 1)
        forms.append(figures)
    return {"dataset": dataset, "items": n, "setting": str(CLOSED), "dense": dense, "forms": forms}


def exact_scorer(
    product: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    columns: Tensor,
    images: Tensor,
    history: Rows,
    answer: Callable[[Tensor], Tensor],
) -> Scorer:
    """Scores of users from A^-1 h, found to a residual of 1e-4; ``answer`` makes scores ``[n, B]`` of it."""
    core = woodbury_core(columns, images)

    def scores(rows: Tensor) -> Tensor:
        some = history.select(rows)
        wanted = torch.zeros(len(diagonal), len(rows))
        wanted[some.ids, some.row_of_entry()] = 1.0 if some.weights is None else some.weights
        solved = solve_columns(product, diagonal, wanted, 1e-4)
        return answer(solved - images @ (core @ (columns.T @ solved))).T.contiguous()

    return scores


def ridge_of_closed(popularity: Tensor) -> tuple[Tensor, float]:
    """The ridge, and the factor of the content directions."""
    scale = popularity.mean()
    ridge = CLOSED.ridge * scale * (popularity / scale) ** CLOSED.ridge_exponent
    return ridge, float(CLOSED.kernels[0].weight * CLOSED.ridge * scale) ** 0.5


def closed(made: Copies, kept: Path) -> dict[str, Any]:
    """Solve for the closed form by neighbourhoods."""
    items = warm_items(made.history, made.content, made.n_items)
    n, weights = len(items.items), user_weights(items.train, CLOSED.user_exponent)
    cpu = time.process_time()
    solver = Neighbourhoods(items.train, weights, items.content, n, NEIGHBOURS_OF_FIT)
    found = solver.solve(CLOSED)
    cut = found.block(KEPT)
    figures: dict[str, Any] = {"cpu_seconds": round(time.process_time() - cpu, 1), "gram_entries": int(solver.gram.nnz)}
    figures["peak_mib_of_fit"] = peak()
    assert cut.direct is not None
    figures["entries_a_row"] = len(cut.direct.ids) / n
    popularity = solver.popularity
    images = solver._images["text"]
    _, factor = ridge_of_closed(popularity)
    columns = factor * items.content["text"]
    inner = torch.from_numpy(solver._inverse.diagonal())
    inner -= ((factor * images @ woodbury_core(columns, factor * images)) * factor * images).sum(1)
    torch.save({"images": images, "inner": inner, "blocks": [state_of(cut)], "uncut": state_of(found.block())}, kept)
    return figures


def state_of(block: LinearBlock) -> dict[str, Any]:
    """A block as plain tensors."""
    direct = None if block.direct is None else vars(block.direct)
    return {"name": block.name, "source": block.source, "target": block.target, "direct": direct}


def block_of(state: dict[str, Any]) -> LinearBlock:
    """The inverse of :func:`state_of`."""
    direct = None if state["direct"] is None else Rows(**state["direct"])
    return LinearBlock(**state | {"direct": direct})


def ranked_closed(made: Copies, kept: Path) -> dict[str, Any]:
    """Rank by the closed form by neighbourhoods, its rows cut and whole."""
    items, local = warm_items(made.history, made.content, made.n_items), torch.load(kept)
    rows = items.compact(made.rows.decayed(CLOSED_DECAY))
    states = {"cut": local["blocks"][0], "uncut": local["uncut"]}
    return {name: made.value(in_catalogue(items, block_of(state).scorer(rows))) for name, state in states.items()}


def exact_closed(made: Copies, kept: Path) -> dict[str, Any]:
    """Exact scores of the closed form, but for the diagonal of A^-1, which is that of the local solution."""
    items = warm_items(made.history, made.content, made.n_items)
    n, weights = len(items.items), user_weights(items.train, CLOSED.user_exponent)
    local = torch.load(kept)
    cpu = time.process_time()
    incidence = Incidence(items.train, n)
    popularity = gram_diagonal(items.train, weights, n)
    ridge, factor = ridge_of_closed(popularity)
    columns, images = factor * items.content["text"], factor * local["images"]
    product = lambda t: incidence.to_items(incidence.to_rows(t) * weights[:, None]) + ridge[:, None] * t  # noqa: E731
    scales = -((popularity / popularity.mean()) ** -CLOSED.tilt / local["inner"])[:, None]
    rows = items.compact(made.rows.decayed(CLOSED_DECAY))
    scorer = exact_scorer(product, popularity + ridge, columns, images, rows, lambda solved: solved * scales)
    value = made.value(in_catalogue(items, scorer))
    return {"exact": value, "cpu_seconds_of_exact": round(time.process_time() - cpu, 1)}


def svd_closed(made: Copies, kept: Path) -> dict[str, Any]:
    """The SVD form of the closed form."""
    cpu = time.process_time()
    form = fit_closed_form(
        made.history, made.n_items, made.content, None, dim=SPECTRAL_DIMS[0], setting=CLOSED, form="svd"
    )
    seconds = round(time.process_time() - cpu, 1)
    value = made.value(form.block().scorer(made.rows.decayed(CLOSED_DECAY)))
    return {"svd": value, "rank": form.dim, "cpu_seconds_of_svd": seconds}


def in_catalogue(items: WarmItems, scorer: Scorer) -> Scorer:
    """Scores of all items from those of the trained ones."""

    def scores(rows: Tensor) -> Tensor:
        full = torch.full((len(rows), len(items.warm)), -torch.inf)
        full[:, items.items] = scorer(rows)
        return full

    return scores


def following(made: Copies, kept: Path) -> dict[str, Any]:
    """Solve for the next-item block by neighbourhoods."""
    cpu = time.process_time()
    directions = directions_of(made.content, made.trained)
    solver = LocalNextItem(made.history, made.n_items, directions)
    blocks = solver.blocks(NEXT)
    figures: dict[str, Any] = {"cpu_seconds": round(time.process_time() - cpu, 1), "peak_mib_of_fit": peak()}
    figures["gram_entries"] = int(solver._gram.nnz)
    assert blocks[0].direct is not None
    figures["entries_a_row"] = len(blocks[0].direct.ids) / made.n_items
    torch.save({"images": solver._images["text"], "blocks": [state_of(block) for block in blocks]}, kept)
    return figures


def ranked_following(made: Copies, kept: Path) -> dict[str, Any]:
    """Rank by the next-item block by neighbourhoods."""
    blocks = tuple(replace(block_of(state), decay=NEXT_DECAY) for state in torch.load(kept)["blocks"])
    return {"cut": made.value(added(blocks, made.rows))}


def exact_following(made: Copies, kept: Path) -> dict[str, Any]:
    """Exact scores of the next-item block."""
    images = torch.load(kept)["images"]
    cpu = time.process_time()
    z, y = prefixes(made.history, made.n_items, NEXT.tau, NEXT.floor, None)
    incidence, follows = Incidence(direct_rows(z), made.n_items), (z.T @ y).tocsr().T.tocsr()
    diagonal = torch.from_numpy(np.asarray(z.multiply(z).sum(0), np.float32).ravel())
    ridge, unit = ridge_of(diagonal, NEXT)
    product = lambda table: incidence.to_items(incidence.to_rows(table)) + ridge[:, None] * table  # noqa: E731
    factor = (NEXT.content[0][1] * unit) ** 0.5
    columns = factor * directions_of(made.content, made.trained)["text"]

    def answer(solved: Tensor) -> Tensor:
        return torch.from_numpy(follows @ solved.numpy()) + columns @ (columns.T @ solved)

    rows = made.rows.decayed(NEXT_DECAY)
    value = made.value(exact_scorer(product, diagonal + ridge, columns, factor * images, rows, answer))
    return {"exact": value, "cpu_seconds_of_exact": round(time.process_time() - cpu, 1)}


def added(blocks: tuple[LinearBlock, ...], history: Rows) -> Scorer:
    """Scores of several blocks together."""
    return lambda rows: torch.stack([block.scorer(history)(rows) for block in blocks]).sum(0)


def solved(made: Copies, kept: Path) -> dict[str, Any]:
    """Seconds and memory of the closed form's solution, nothing kept that only other settings would need."""
    items = warm_items(made.history, made.content, made.n_items)
    made.content.clear()
    n, weights = len(items.items), user_weights(items.train, CLOSED.user_exponent)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the process begins anew
    before = status("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    solver = Neighbourhoods(items.train, weights, items.content, n, NEIGHBOURS_OF_FIT)
    entries = int(solver.gram.nnz)
    block = solver.solve(CLOSED, last=True).block(KEPT)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    assert block.direct is not None and block.source is not None
    size = 8 * block.source.numel() + 8 * len(
        block.direct.ids
    )  # two tables of float32; an id and a value of four bytes
    return {
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "gram_entries": entries,
        "entries_a_row": len(block.direct.ids) / n,
        "mib_of_data": before,
        "mib_of_solution": status("VmHWM") - before,
        "mib_estimated": local_bytes(entries, n, NEIGHBOURS_OF_FIT, items.content["text"].shape[1]) // 2**20,
        "mib_of_block": size // 2**20,
    }


def status(field: str) -> int:
    """A line of the process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) // 1024


def towers(loss: str, dataset: str, data_path: str | None) -> dict[str, Any]:
    """The learned block by itself, trained by one loss; the way is chosen among those of this loss."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    with tempfile.TemporaryDirectory() as folder:
        values = {"blocks": ["learned"], "loss_type": loss, "show_progress": False, "state": "WARNING"}
        values |= {"checkpoint_dir": folder} | ({"data_path": data_path} if data_path else {})
        config = Config("LLMTwoTower", dataset, config_dict=values)
        init_seed(config["seed"], config["reproducibility"])
        train, valid, test = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], config["reproducibility"])
        model = get_model("LLMTwoTower")(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "LLMTwoTower")(config, model)
        began, cpu = time.perf_counter(), time.process_time()
        with logged("recbole_llm.fitting") as told:
            value, _ = trainer.fit(train, valid, verbose=False, show_progress=False)
        cpu_seconds, seconds = time.process_time() - cpu, time.perf_counter() - began
        test_value = trainer.evaluate(test, load_best_model=False)["ndcg@10"]
    return {
        "dataset": dataset,
        "loss": loss,
        "way": str(model.tower_choice),
        "epochs": model.chosen.epochs if model.chosen is not None else None,
        "valid": float(value),
        "test": float(test_value),
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "log": [line for line in told if line.startswith("learned block")],
    }


def run(which: str, data_path: str | None, tree: Path, work: Path, limit: float | None) -> dict[str, Any]:
    """Processor seconds of a run with its defaults, from the command's start; the texts' vectors are there before.

    Args:
        which: ``now`` or ``before``.
        data_path: where real data sets are.
        tree: checkout that runs.
        work: where the data set is made.
        limit: processor seconds after which it ends; ``None`` for none.
    """
    folder = work.resolve() / MADE
    if not (folder / f"{MADE}.item").is_file():
        assert data_path is not None, "run needs --data_path"
        write_made_dataset(folder, MADE, Path(data_path))
    environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"}
    words = ["-d", MADE, f"--data_path={folder.parent}", "--show_progress=False"]
    program = [sys.executable, "-m", "recbole_llm"]
    subprocess.run([*program, "encode", *words], env=environment, check=True, cwd=work, stdout=subprocess.DEVNULL)
    told, result = work / f"run-{which}.log", work.resolve() / f"run-{which}-result.json"
    command = [*program, "run", "-m", "LLMTwoTower", *words, "--checkpoint_dir=" + str(folder / which)]
    command += ["--output", str(result)]
    began = time.perf_counter()

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 5))

    with open(told, "w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command, env=environment, cwd=work, stdout=file, stderr=subprocess.STDOUT, preexec_fn=limited
        )
        _, code, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(code)
    ended = child.returncode == 0
    if not ended and (limit is None or used.ru_utime + used.ru_stime < limit):
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}: see {told}")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
    values = json.loads(result.read_text()) if ended else {}
    return {
        "which": which,
        "items": SIZE[0],
        "users": SIZE[1],
        "ended": ended,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": used.ru_maxrss // 1024,
        "valid": values.get("best_valid_score"),
        "test": {name: value for name, value in values.get("test_result", {}).items() if name.endswith("@10")},
        "epochs_begun": sum("epoch" in line and "training" in line for line in lines),
        "log": lines[-1:],
    }


def peak() -> int:
    """Largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


PARTS = {
    "closed": closed,
    "closed-ranked": ranked_closed,
    "closed-exact": exact_closed,
    "closed-svd": svd_closed,
    "next": following,
    "next-ranked": ranked_following,
    "next-exact": exact_following,
    "solve": solved,
}


def piece(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one piece in this process."""
    kind, *rest = name.split(":")
    work = Path(options.work)
    if kind == "towers":
        return towers(rest[0], options.of, options.data_path)
    if kind == "run":
        tree = ROOT if rest[0] == "now" else Path(options.before).resolve()
        kept = work / "run-now.json"
        limit = options.most * json.loads(kept.read_text())["cpu_seconds"] if rest[0] == "before" else None
        return run(rest[0], options.data_path, tree, work, limit)
    if rest == ["kept"]:
        return entries_kept(kind, options.data_path)
    if kind != "copies":
        return quality(kind, rest[0], options.data_path)
    made = Copies(options.of, options.data_path, int(rest[0]), work / f"{options.of}.pt")
    about = {"of": options.of, "copies": int(rest[0]), "part": rest[1], "items": int(made.trained.sum())}
    about |= {"interactions": len(made.history.ids), "users": len(made.history.sizes)}
    about |= {"users_asked": len(made.rows.sizes), "mib_before": peak()}
    kept = work / f"copies-{rest[0]}-{rest[1].partition('-')[0]}.pt"  # what the exact scores take from the solution
    figures = PARTS[rest[1]](made, kept)
    return about | figures | {"neighbours": NEIGHBOURS_OF_FIT, "kept": KEPT}


def growth(pieces: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of growth with the items, fitted to logarithms by least squares; nothing of fewer than three sizes."""
    solutions = [each for each in pieces if each.get("part") == "solve"]
    if len(solutions) < 3:
        return {}
    items = np.log([each["items"] for each in solutions])
    return {
        f"exponent_of_{name}": round(float(np.polyfit(items, np.log([each[name] for each in solutions]), 1)[0]), 3)
        for name in ("cpu_seconds", "mib_of_solution")
    }


def main() -> int:
    """Measure the pieces that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default=None, help="folder that holds the data sets' folders")
    parser.add_argument("--of", default="amazon-beauty", help="data set that catalogues are made of")
    parser.add_argument("--pieces", default=",".join(PIECES))
    parser.add_argument("--work", default="large_catalogue")
    parser.add_argument(
        "--before", default=None, help="checkout that run:before runs; without it that piece is left out"
    )
    parser.add_argument("--most", type=float, default=2.05, help="times run:now's seconds that run:before may take")
    parser.add_argument("--piece", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/large_catalogue.json")
    options = parser.parse_args()
    if options.piece:
        sys.argv = sys.argv[:1]  # RecBole's Config reads the command line
        about = {"commit": commit(), "load_average": round(os.getloadavg()[0], 1)}
        print(json.dumps(piece(options.piece, options) | about))
        return 0
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    path = Path(options.output or ROOT / "benchmarks" / "results" / "large_catalogue.json")
    found = []
    for name in options.pieces.split(","):
        if name == "run:before" and options.before is None:
            continue
        kept = work / f"{name.replace(':', '-')}.json"
        if not kept.is_file():
            command = [sys.executable, __file__, "--piece", name, "--of", options.of, "--work", options.work]
            command += ["--most", str(options.most)]
            for key in ("data_path", "before"):
                command += [f"--{key}", getattr(options, key)] if getattr(options, key) else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kept.write_text(done.stdout.splitlines()[-1])
        found.append({"piece": name} | json.loads(kept.read_text()))
        print(json.dumps({key: value for key, value in found[-1].items() if key != "log"}), flush=True)
        result = {"benchmark": "large_catalogue", "pieces": found, "growth": growth(found), "machine": machine("cpu")}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
