"""Catalogues beyond the dense limit: neighbourhoods, the SVD form and the dense form side by side.

    python benchmarks/large_catalogue.py --data_path FOLDER

``DATASET:dense`` and ``DATASET:beyond`` fit the closed form of RecBole's default split with its defaults, the second with a limit
of 1,000 items, so that validation chooses between neighbourhoods and the SVD form. ``copies:N:closed`` and ``copies:N:next`` solve
for one block of a catalogue that is made of N copies of ``--of`` with documented constants. ``-ranked`` ranks by it for 2,000
validation users, ``-exact`` by exact scores, which conjugate gradients find for these users alone, and ``-svd`` in the SVD form.

A made catalogue has the items and users of the data set N times over. Every interaction goes to the same item of another copy
with a chance of 15%. Each copy's text vectors have noise of .3 of their standard deviation. The newest interaction but one of a
user is its target.

Pieces are kept in ``--work``: the same command goes on where it stopped. The result file is written after each one.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from timing import logged, machine
from torch import Tensor

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.ease import Kernel, Setting, gram_diagonal, user_weights
from recbole_llm.fitting.factors import Incidence
from recbole_llm.fitting.large_catalogue import NEIGHBOURS_OF_FIT, SPECTRAL_DIMS
from recbole_llm.fitting.neighbourhood import KEPT, Neighbourhoods, direct_rows, solve_columns, woodbury_core
from recbole_llm.fitting.next_item import directions_of
from recbole_llm.fitting.next_item_local import LocalNextItem
from recbole_llm.fitting.next_item_rows import NextItemSetting, prefixes, ridge_of
from recbole_llm.fitting.validation import TopKMetric, evenly, user_metric
from recbole_llm.fitting.warm_items import WarmItems, warm_items
from recbole_llm.scoring.block import LinearBlock, Scorer
from recbole_llm.scoring.rows import Rows

PIECES = (
    "amazon-office:dense",
    "amazon-office:beyond",
    "amazon-beauty:dense",
    "amazon-beauty:beyond",
    "ml-1m-text:beyond",
    *(f"copies:{copies}:{part}" for copies in (1, 3) for part in ("closed", "closed-ranked", "next", "next-ranked")),
    *(
        f"copies:9:{part}"
        for part in ("closed", "closed-ranked", "closed-exact", "closed-svd", "next", "next-ranked", "next-exact")
    ),
)
LIMIT = 1_000
MOVED, NOISE = 0.15, 0.3
USERS = 2_000
CLOSED = Setting(ridge=8.0, kernels=(Kernel("text", 0.05, 1),))
NEXT = NextItemSetting(tau=2.0, ridge=8.0, floor=0.1, content=(("text", 0.05),))
CLOSED_DECAY, NEXT_DECAY = 3.0, 1.5
NDCG = TopKMetric("ndcg", 10)


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


class Copies:
    """A made catalogue; padding item 0 is in none of its rows.

    Args:
        dataset: what it is made of.
        data_path: where that is.
        copies: how many times.
        kept: where it is read from, or written to.
    """

    def __init__(self, dataset: str, data_path: str | None, copies: int, kept: Path) -> None:
        if not kept.is_file():
            self._make(dataset, data_path, copies)
            torch.save({"n": self.n_items, "text": self.content["text"], "history": vars(self.history),
                        "targets": vars(self.targets)}, kept)  # fmt: skip
        made = torch.load(kept)
        self.n_items, self.content = made["n"], {"text": made["text"]}
        self.history, self.targets = Rows(**made["history"]), Rows(**made["targets"])
        self.trained = torch.bincount(self.history.ids, minlength=self.n_items) > 0
        users = evenly(torch.nonzero((self.targets.sizes > 0) & (self.history.sizes > 0)).squeeze(1), USERS)
        self.rows, self.asked = self.history.select(users), self.targets.select(users)

    def _make(self, dataset: str, data_path: str | None, copies: int) -> None:
        from recbole_llm.bridge.experiments.leave_one_out import load, prepare

        values = {"data_path": data_path, "show_progress": False, "state": "WARNING"}
        rows, _, _ = prepare(load(dataset, config_dict=values))
        one, targets, n = rows.data.history, rows.validation.targets, rows.data.n_items - 1
        generator = torch.Generator().manual_seed(0)
        vectors, present = rows.data.content["text"]
        deviation = vectors[present].std(0)
        self.n_items = 1 + n * copies
        self.content = {
            "text": (torch.zeros(self.n_items, vectors.shape[1]), torch.zeros(self.n_items, dtype=torch.bool))
        }
        self.history, self.targets = (
            self._stacked(one, n, copies, generator),
            self._stacked(targets, n, copies, generator),
        )
        for copy in range(copies):
            of = slice(1 + n * copy, 1 + n * (copy + 1))
            noise = NOISE * deviation * torch.randn(n, vectors.shape[1], generator=generator) if copies > 1 else 0.0
            self.content["text"][0][of] = vectors[1:] + noise
            self.content["text"][1][of] = present[1:]
        self.content["text"][0][~self.content["text"][1]] = 0.0

    @staticmethod
    def _stacked(rows: Rows, n: int, copies: int, generator: torch.Generator) -> Rows:
        """Rows of every copy one after the other; ids ascend within a row."""
        sizes, parts, ranks = [], [], []
        for copy in range(copies):
            moved = torch.rand(len(rows.ids), generator=generator) < (MOVED if copies > 1 else 0.0)
            other = torch.randint(copies, (len(rows.ids),), generator=generator)
            ids = rows.ids + n * torch.where(moved, other, copy)
            order = torch.argsort(rows.row_of_entry() * (n * copies + 1) + ids)
            parts.append(ids[order])
            sizes.append(rows.sizes)
            ranks.append(rows.ranks[order] if rows.ranks is not None else torch.zeros(len(ids)))
        offsets = torch.nn.functional.pad(torch.cat(sizes).cumsum(0), (1, 0))
        return Rows(offsets, torch.cat(parts), ranks=torch.cat(ranks))

    def value(self, scorer: Scorer) -> float:
        """NDCG@10 of the users asked for among the trained items."""
        seen = Rows(self.rows.offsets, self.rows.ids)
        return float(user_metric(scorer, self.asked, seen, self.n_items, NDCG, excluded=~self.trained).mean())


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
}


def piece(name: str, data_path: str | None, of: str, work: Path) -> dict[str, Any]:
    """Measure one piece in this process."""
    kind, *rest = name.split(":")
    if kind != "copies":
        return quality(kind, rest[0], data_path)
    made = Copies(of, data_path, int(rest[0]), work / f"made-{rest[0]}.pt")
    before = peak()
    kept = work / f"copies-{rest[0]}-{rest[1].partition('-')[0]}.pt"  # what the exact scores take from the solution
    figures = PARTS[rest[1]](made, kept)
    about = {"of": of, "copies": int(rest[0]), "part": rest[1], "items": int(made.trained.sum()), "mib_before": before}
    about |= {"interactions": len(made.history.ids), "users_asked": len(made.rows.sizes)}
    return about | figures | {"neighbours": NEIGHBOURS_OF_FIT, "kept": KEPT}


def main() -> int:
    """Measure the pieces that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default=None, help="folder that holds the data sets' folders")
    parser.add_argument("--of", default="amazon-beauty", help="data set that catalogues are made of")
    parser.add_argument("--pieces", default=",".join(PIECES))
    parser.add_argument("--work", default="large_catalogue")
    parser.add_argument("--piece", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/large_catalogue.json")
    options = parser.parse_args()
    if options.piece:
        sys.argv = sys.argv[:1]  # RecBole's Config reads the command line
        print(json.dumps(piece(options.piece, options.data_path, options.of, Path(options.work))))
        return 0
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    path = Path(options.output or ROOT / "benchmarks" / "results" / "large_catalogue.json")
    found = []
    for name in options.pieces.split(","):
        kept = work / f"{name.replace(':', '-')}.json"
        if not kept.is_file():
            command = [sys.executable, __file__, "--piece", name, "--of", options.of, "--work", options.work]
            command += ["--data_path", options.data_path] if options.data_path else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kept.write_text(done.stdout.splitlines()[-1])
        found.append({"piece": name} | json.loads(kept.read_text()))
        print(json.dumps({key: value for key, value in found[-1].items() if key != "log"}), flush=True)
        result = {"benchmark": "large_catalogue", "pieces": found, "machine": machine("cpu")}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
