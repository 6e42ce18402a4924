"""One of three processes that torchrun starts: trains with shard_items, and looks for tables that are whole.

Argument: a JSON file of runs by name, each ``{"ranks", "port", "dataset", "settings"}``, and ``"error"`` where one is raised.
Without a port it is the command that runs, in the group that torchrun describes. Results go beside the file as
``<name>.json``.
"""

import gc
import glob
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import recbole_llm  # noqa: E402, F401
from recbole_llm.bridge import distributed  # noqa: E402


def watch():
    """At the third step of a run: look at every parameter, gradient and tensor of the optimizer, and at all that Python knows."""
    import torch

    from recbole_llm.bridge.training.trainer import LLMTwoTowerTrainer

    step = LLMTwoTowerTrainer._step
    seen = {"steps": 0}

    def watched(self, interaction, loss_func):
        loss = step(self, interaction, loss_func)
        seen["steps"] += 1
        if seen["steps"] == 3:
            model, n = self.model, self.model.n_items
            state = [x for values in self.optimizer.state.values() for x in values.values()]
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            rows = [len(x) for x in [*model.parameters(), *grads, *state] if x.dim()]
            assert n not in rows, rows
            learned = [p for name, p in model.named_parameters() if name in self._tables.names and p.requires_grad]
            assert rows.count(len(model.item_bias)) >= 4 * len(learned) > 0, (
                rows
            )  # and a gradient and two moments of each
            assert 0 <= len(model.item_bias) - n // distributed.world_size() <= 1
            gc.collect()  # the answer of the run before has read its model whole, in rank 0
            tables = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dim() == 2 and len(x) == n]
            assert not tables, [x.shape for x in tables]
            trained = bool(model.item_rows.of(model.trained.value).any())
            seen["trained"] = distributed.gather_objects(trained)
        return loss

    LLMTwoTowerTrainer._step = watched
    return seen


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    runs = json.loads(jobs.read_text())
    place = distributed.settings_of_torchrun()
    rank = place["local_rank"]
    seen = watch()
    from recbole.quick_start import run_recbole

    from recbole_llm.bridge.repairs.configuration import PROGRAM
    from recbole_llm.cli import main

    for name, run in runs.items():
        if rank >= run["ranks"]:
            continue
        seen["steps"] = 0
        if run["port"]:
            for key in [key for key in os.environ if key.startswith("TORCHELASTIC")]:
                del os.environ[key]  # where torchrun's own store would be asked
            sys.argv = [PROGRAM]
            settings = {
                key: glob.glob(value)[0] if key == "resume_from" else value for key, value in run["settings"].items()
            }
            here = place | {"port": run["port"], "world_size": run["ranks"], "nproc": run["ranks"], "ip": "127.0.0.1"}
            try:
                result = run_recbole("LLMTwoTower", run["dataset"], config_dict=settings | here)
            except ValueError as error:
                assert run.get("error", "no error") in str(error)
                continue
            assert "error" not in run
            if rank == 0:
                kept = {
                    key: {k: float(v) for k, v in result[key].items()} for key in ("best_valid_result", "test_result")
                }
                jobs.with_name(f"{name}.json").write_text(json.dumps(kept | {"trained": seen["trained"]}))
        else:
            output = jobs.with_name(f"{name}.json")
            given = [f"--{key}={value}" for key, value in run["settings"].items()]
            assert main(["run", "-d", run["dataset"], "--output", str(output), *given]) == 0
        assert seen["steps"] >= 3, seen
    print(f"rank {rank} done", flush=True)
