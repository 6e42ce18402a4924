"""Names that files and programs of other people hold keep their places, wherever the code behind them moves.

Checkpoints, saved datasets and saved data loaders name classes and a function by their modules; model cards and the README print
imports; ``RECBOLE_LLM_SKIP_REPAIRS`` names repairs. Each module is imported in a process of its own, which a parent forks that has
loaded torch and nothing of ours: no path may work by the help of another.
"""

import json
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from waiting import LIMIT

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "recbole_llm": (
        "LLMTwoTower",
        "LoadedModel",
        "__version__",
        "import_dataset",
        "load",
        "objective_function",
        "register_model",
        "repair_report",
    ),
    "recbole_llm.cli": ("main",),
    # named by pickles
    "recbole_llm.model": ("LLMTwoTower",),
    "recbole_llm.bridge.dataset": ("LLMTwoTowerDataset",),
    "recbole_llm.bridge.batches": ("UserRowsDataLoader", "InteractionRowsDataLoader", "NegativeSampler"),
    "recbole_llm.bridge.checkpoint": ("unpickled",),
    # by which RecBole's processes and searches find us
    "recbole_llm.bridge.register": ("run_recboles", "objective_function", "register_model", "registered_models"),
    "recbole_llm.bridge.compat": ("repair_report",),
    # printed in every export's README.md
    "recbole_llm.serving.artifact": ("load_export", "Export"),
    "recbole_llm.serving.recommend": ("Recommender", "Request", "Recommendation", "Recommended", "Reason"),
    "recbole_llm.serving.errors": ("ExportError", "UnknownItemError", "UnknownUserError"),
    "recbole_llm.serving.app": ("create_app", "app_from_environment"),
    "recbole_llm.serving.settings": ("Settings", "Limits", "Key"),
    # for scripts
    "recbole_llm.recommend": (
        "open_model",
        "newest_checkpoint",
        "recommend_users",
        "recommend_items",
        "recommend_text",
        "similar_items",
        "rows_of",
        "write_rows",
        "Row",
        "Counts",
    ),
    "recbole_llm.importer": ("import_dataset",),
    "recbole_llm.loaded": ("LoadedModel", "Vectors", "load", "write_vectors"),
    "recbole_llm_kernels": (
        "TopK",
        "catalog_bce",
        "catalog_ce",
        "default_backend",
        "fuses_scaled_bce",
        "pair_bce",
        "pair_dot",
        "pair_sigmoid",
        "pool_rows",
        "pool_rows_without_own",
        "sampled_bce",
        "scaled_rows",
        "scaled_sampled_bce",
        "score_topk",
    ),
    "recbole_llm_kernels.sharded": ("catalog_bce", "catalog_ce", "score_topk", "sum_over_ranks"),
}
PICKLED = (
    "recbole_llm.model.LLMTwoTower",
    "recbole_llm.bridge.dataset.LLMTwoTowerDataset",
    "recbole_llm.bridge.batches.UserRowsDataLoader",
    "recbole_llm.bridge.batches.InteractionRowsDataLoader",
    "recbole_llm.bridge.batches.NegativeSampler",
    "recbole_llm.bridge.checkpoint.unpickled",
    "recbole_llm.bridge.register.run_recboles",
    "recbole_llm.bridge.register.objective_function",
)
# one name must be one object, by whichever way a program comes to it
SAME = {
    "recbole.utils.get_model('LLMTwoTower')": "recbole_llm.model.LLMTwoTower",
    "recbole.model.general_recommender.LLMTwoTower": "recbole_llm.model.LLMTwoTower",
    "recbole_llm.LLMTwoTower": "recbole_llm.model.LLMTwoTower",
    "recbole.data.dataset.LLMTwoTowerDataset": "recbole_llm.bridge.dataset.LLMTwoTowerDataset",
    "recbole.quick_start.quick_start.run_recboles": "recbole_llm.bridge.register.run_recboles",
    "recbole.quick_start.objective_function": "recbole_llm.bridge.register.objective_function",
    "recbole_llm.objective_function": "recbole_llm.bridge.register.objective_function",
    "recbole_llm.repair_report": "recbole_llm.bridge.compat.repair_report",
    "recbole_llm.recommend.load_export": "recbole_llm.serving.artifact.load_export",
    "recbole_llm.recommend.Request": "recbole_llm.serving.recommend.Request",
    "recbole_llm.load": "recbole_llm.loaded.load",
    "recbole_llm.import_dataset": "recbole_llm.importer.import_dataset",
}
REPAIRS = (
    "literals", "command_line", "model_name", "search_space", "teacher", "plain_yaml", "item_embeddings", "unnamed_pickles",
    "unpickled_config", "data_and_model", "ray", "numpy", "torch_load", "dok", "agg_len", "fillna", "warnings", "hyper",
    "collector", "ensure_dir", "checkpoint_names", "time_split", "saved_dataset", "saved_dataloaders", "case_study", "flops",
    "ksr", "pop", "anomaly_mode", "dgcf", "kgat", "tree_defaults", "gloo", "wrapper", "progress_lock",
    "label_zero", "label_zero_histories", "label_zero_seen",
)  # fmt: skip
COMMANDS = (
    "quickstart",
    "run",
    "fit",
    "compare",
    "leaderboard",
    "tune",
    "import",
    "encode",
    "split",
    "report",
    "export",
    "recommend",
    "similar",
    "vectors",
    "serve",
    "info",
)
NEEDS = {"recbole_llm.serving.app": ("fastapi", "orjson")}  # extras

# reads groups of statements, gives for each the error that it raises or nothing; a group has a fork of its own
FORKS = """
import json, os, sys, traceback
import torch, numpy, pandas, scipy.sparse
if __import__("importlib.util").util.find_spec("tensorboard"):
    import torch.utils.tensorboard
assert not [name for name in sys.modules if name.startswith("recbole")]
told = {}
for group in json.loads(sys.stdin.read()):
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        errors = {}
        for what, statement in group.items():
            try:
                exec(statement, {})
                errors[what] = ""
            except BaseException:
                errors[what] = traceback.format_exc()[-2000:]
        with os.fdopen(writes, "w") as end:
            json.dump(errors, end)
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as end:
        told |= json.loads(end.read())
    os.waitpid(child, 0)
print(json.dumps(told))
"""


def public_statements(module):
    return {f"{module}.{name}": f"from {module} import {name}" for name in PUBLIC[module]}


def pickle_statements():
    """As a file of an earlier version would name it, and as a file that is written today."""
    found = {}
    for path in PICKLED:
        module, _, name = path.rpartition(".")
        named = f"c{module}\n{name}\n.".encode()
        found[f"pickle {path}"] = (
            f"import pickle\nfound = pickle.loads({named!r})\nassert found.__name__ == {name!r}\n"
            "assert pickle.loads(pickle.dumps(found)) is found"
        )
    return found


def same_statements():
    found = {}
    for way, path in SAME.items():
        module, _, name = path.rpartition(".")
        where = way.partition("(")[0].rpartition(".")[0]
        found[f"same {way}"] = (
            f"import recbole_llm, importlib, {where}\nassert {way} is importlib.import_module({module!r}).{name}"
        )
    return found


def command_statement(command):
    return (
        "from recbole_llm.cli import main\ntry:\n"
        f"    code = main([{command!r}, '--help'])\nexcept SystemExit as end:\n    code = end.code\nassert code == 0, code"
    )


LISTED = f"import recbole_llm_kernels as k\nassert set({PUBLIC['recbole_llm_kernels']!r}) <= set(k.__all__), k.__all__"
# RecBole and our own modules; test_boundaries.py looks for torch in a fresh interpreter
OWN = f"""
import sys
before = set(sys.modules)
import recbole_llm
assert sorted(recbole_llm.__all__) == sorted({PUBLIC["recbole_llm"]!r})
assert set(recbole_llm.__all__) <= set(dir(recbole_llm))
loaded = [name for name in set(sys.modules) - before if name.startswith("recbole")]
assert loaded == ["recbole_llm"], loaded
"""
REPORTED = (
    "import recbole_llm\nnames = [record.name for record in recbole_llm.repair_report()]\n"
    f"assert set({REPAIRS!r}) <= set(names), set({REPAIRS!r}) - set(names)"
)
GROUPS = [
    *map(public_statements, PUBLIC),
    *({what: statement} for what, statement in pickle_statements().items()),
    same_statements(),
    {"all of the kernels": LISTED},
    {"all and dir of the package": OWN},
    {"repairs": REPORTED},
    {f"command {command}": command_statement(command) for command in COMMANDS},
]
ASKED = {what: statement for group in GROUPS for what, statement in group.items()}


@pytest.fixture(scope="module")
def told():
    """By name: what was raised."""
    pytest.importorskip("torch")
    pytest.importorskip("recbole")
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(GROUPS),
        capture_output=True,
        text=True,
        env=environment,
        timeout=4 * LIMIT,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ASKED)
def test_a_public_name_is_where_it_was(told, what):
    for module in NEEDS.get(what.rpartition(".")[0], ()):
        pytest.importorskip(module)
    assert told[what] == ""


def test_the_name_of_a_repair_leaves_it_out():
    code = (
        "import recbole_llm\nby_name = {record.name: record for record in recbole_llm.repair_report()}\n"
        "assert not by_name['dgcf'].applied and not by_name['kgat'].applied and by_name['anomaly_mode'].applied, by_name"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "RECBOLE_LLM_SKIP_REPAIRS": "dgcf,kgat"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr[-2000:]


# ------------------------------------------------------------------ what committed files name


def globals_of(content):
    """Full names of the objects that a pickle names."""
    texts, memo, found = [], {}, set()
    for operation, argument, _ in pickletools.genops(content):
        if "UNICODE" in operation.name:
            texts.append(argument)
        elif operation.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if operation.name == "MEMOIZE" else argument] = texts[-1] if texts else ""
        elif operation.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo.get(argument, ""))
        elif operation.name == "GLOBAL":
            found.add(argument.replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":
            found.add(".".join(texts[-2:]))
    return found


def pickles_in(path):
    """The pickles of a file: itself, or those of the archive that torch.save wrote, the configuration inside included."""
    if not zipfile.is_zipfile(path):
        return [path.read_bytes()]
    with zipfile.ZipFile(path) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    return [content for content in contents if content[:1] == b"\x80"]


def test_what_committed_files_name_is_listed():
    files = sorted((ROOT / "tests" / "compatibility").glob("*/**/*.pth"))
    named = set().union(*(globals_of(content) for path in files for content in pickles_in(path)))
    ours = {name for name in named if name.startswith("recbole_llm")}
    assert len(files) >= 6
    assert {"recbole_llm.bridge.checkpoint.unpickled", "recbole_llm.bridge.batches.UserRowsDataLoader"} <= ours
    assert ours <= set(PICKLED)


def test_a_reader_of_pickles_sees_every_name():
    """The check above, checked."""
    for protocol in range(6):
        content = pickle.dumps([pickle.Pickler, os.fspath, pickle.Pickler, Path("x")], protocol=protocol)
        assert {"_pickle.Pickler", "pathlib.PosixPath"} & globals_of(content), protocol
