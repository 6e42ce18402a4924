"""Every repair: RecBole fails without it, works with it, and it is left out where its condition does not hold.

What RecBole does is looked at in fresh interpreters, which run this file as a script: one with all repairs, one with
none but those of ``LEFT_OUT_ALONE``, and one without each of these. A probe's outcome is a string.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT_ALONE = ("ray", "numpy", "torch_load", "warnings")  # nothing runs without the first three


# ---------------------------------------------------------------- probes, run in a fresh interpreter


def write_toy(folder):
    """20 users and 30 items; u3 has no row in the .user file, i4 none in the .item file, i5 has no text."""
    target = Path(folder, "toy")
    target.mkdir()
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    inter += [f"u{u}\ti{(7 * u + 3 * k) % 30}\t{1 + k % 5}\t{100 * u + k}" for u in range(20) for k in range(9)]
    users = ["user_id:token\tcity:token\tage:float"]
    users += [f"u{u}\tc{u % 4}\t{20 + u}" for u in range(20) if u != 3]
    items = ["item_id:token\ttitle:token_seq\tprice:float"]
    items += [f"i{i}\t{'' if i == 5 else f'word{i % 6} word{i % 5}'}\t{i}" for i in range(30) if i != 4]
    for suffix, lines in (("inter", inter), ("user", users), ("item", items)):
        Path(target, f"toy.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(**more):
    base = dict(data_path=".", epochs=1, show_progress=False, state="ERROR", gpu_id="", train_batch_size=64)
    return {**base, "embedding_size": 8, **more}


def run(model, **more):
    from recbole.quick_start import run_recbole

    result = run_recbole(model, "toy", config_dict=settings(**more), saved=False)
    return f"ran: {', '.join(result['test_result'])}"


def dataset(model, **more):
    from recbole.config import Config
    from recbole.data import create_dataset

    config = Config(model, "toy", config_dict=settings(**more))
    return config, create_dataset(config)


CONTEXT = dict(metrics=["AUC"], valid_metric="AUC", threshold={"rating": 3})


def probe_warnings():
    import warnings

    columns = {"inter": ["user_id", "item_id"], "item": ["item_id", "title"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", append=True)
        run("BPR", load_col=columns)
    ours = {"ChainedAssignmentError", "FutureWarning", "UserWarning"}
    return f"warned: {', '.join(sorted({w.category.__name__ for w in caught} & ours))}."


def probe_ray():
    import recbole.quick_start

    return f"imported, ray in sys.modules: {'ray' in sys.modules}, {recbole.quick_start.run.__name__}"


def probe_numpy():
    from recbole.config import Config

    Config("BPR", "toy", config_dict=settings())
    import numpy as np

    return f"{vars(np)['float'].__name__} {np.long.__name__} {vars(np)['unicode'].__name__}"


def probe_torch_load():
    from recbole.quick_start import load_data_and_model, run_recbole

    run_recbole("BPR", "toy", config_dict=settings(checkpoint_dir="saved"))
    _, model, *_ = load_data_and_model(next(Path("saved").glob("*.pth")))
    import torch

    try:
        torch.load(next(Path("saved").glob("*.pth")))
    except Exception as error:  # here, outside RecBole, the safe default must hold
        return f"{type(model).__name__} loaded by RecBole, {type(error).__name__} elsewhere"
    return "loaded elsewhere too"


def probe_dok():
    return run("LightGCN")


def probe_agg_len():
    columns = {"inter": ["user_id", "item_id", "rating"], "item": ["item_id", "title"]}
    _, data = dataset("BPR", load_col=columns)
    return str([len(row) for row in data.item_feat["title"]][1:4] if hasattr(data.item_feat, "columns") else "tensor")


def probe_fillna():
    columns = {"inter": ["user_id", "item_id"], "user": ["user_id", "city", "age"]}
    _, data = dataset("BPR", load_col=columns, filter_inter_by_user_or_item=False)
    data._change_feat_format()
    u3 = data.token2id("user_id", "u3")
    city, age = data.user_feat["city"], data.user_feat["age"]
    return f"city {city[0].item()} {city[u3].item()} age {age[0].item():.2f} {age[u3].item():.2f}"


def probe_collector():
    return run(
        "Pop",
        metrics=["ItemCoverage", "GiniIndex", "AveragePopularity", "TailPercentage"],
        valid_metric="ItemCoverage@10",
    )


def probe_ensure_dir():
    from recbole.utils import ensure_dir

    Path("made_meanwhile").mkdir()
    exists = os.path.exists
    os.path.exists = lambda path: path != "made_meanwhile" and exists(path)  # as seen just before the other made it
    try:
        ensure_dir("made_meanwhile")
    finally:
        os.path.exists = exists
    return "there"


def probe_literals():
    from recbole.config import Config

    return repr(Config("BPR", "toy", config_dict=settings(mine="map.npy", width="[64, 32]"))["mine"])


def probe_command_line():
    from recbole.config import Config

    before, sys.argv = sys.argv, [os.path.join(sysconfig.get_path("scripts"), "pytest"), "--tb=short"]
    Path(sys.argv[0]).exists() or sys.exit("pytest is not installed as a script here")
    try:
        return str(Config("BPR", "toy", config_dict=settings())["tb"])
    finally:
        sys.argv = before


def probe_model_name():
    from recbole.utils import get_model

    return get_model("LightGCM")


def probe_hyper():
    from recbole.trainer import HyperTuning

    def objective(config_dict=None, config_file_list=None):
        score = config_dict["learning_rate"]
        return dict(model="BPR", best_valid_score=score, valid_score_bigger=True, best_valid_result={}, test_result={})

    tuning = HyperTuning(objective, params_dict={"choice": {"learning_rate": [0.1, 0.3, 0.2]}}, early_stop=9)
    tuning.run()
    return f"{len(tuning.params2result)} trials, best {tuning.best_params['learning_rate']}"


def probe_checkpoint_names():
    from recbole.trainer import trainer

    trainer.get_local_time = lambda: "noon"
    files = {trainer.DecisionTreeTrainer(dataset("BPR")[0], None).temp_best_file for _ in range(2)}
    return f"{len(files)} files of 2 runs"


def probe_time_split():
    columns = {"inter": ["user_id", "item_id", "rating"]}
    args = {"split": {"TS": [0.5, 0.1, 0.4]}, "order": "RO"}
    _, data = dataset("BPR", load_col=columns, TIME_FIELD="rating", eval_args=args)
    train, valid, test = (part.inter_feat["rating"] for part in data.build())
    return f"test is later: {bool(max(train.max(), valid.max()) < test.min())}"


def probe_saved_dataset():
    rows = []
    saved = dict(checkpoint_dir="saved_dataset", dataset_save_path="saved_dataset/toy-Dataset.pth")
    for ratios in ([0.8, 0.1, 0.1], [0.4, 0.3, 0.3]):
        args = {"split": {"RS": ratios}, "group_by": "none"}
        _, data = dataset("BPR", save_dataset=True, eval_args=args, **saved)
        rows.append(len(data.build()[0]))
    return f"training rows: {rows}"


def probe_saved_dataloaders():
    from recbole.data import data_preparation

    found = []
    saved = dict(checkpoint_dir="saved_loaders", dataloaders_save_path="saved_loaders/toy-for-BPR-dataloader.pth")
    for size in (64, 32):
        given = dict(save_dataloaders=True, train_batch_size=size, **saved)
        train = data_preparation(*dataset("BPR", **given))[0]
        found.append(f"{len(next(iter(train)))} rows, {'a' if train.generator else 'no'} generator")
    return "; ".join(found)


def probe_case_study():
    from recbole.data import data_preparation
    from recbole.utils import get_model
    from recbole.utils.case_study import full_sort_topk

    config, data = dataset("BPR", eval_args={"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "none"})
    train, _, test = data_preparation(config, data)
    model = get_model("BPR")(config, train._dataset)
    return full_sort_topk(data.token2id("user_id", [f"u{u}" for u in range(20)]), model, test, k=3)


PROBES = {name[6:]: function for name, function in list(globals().items()) if name.startswith("probe_")}


def outcomes(names):
    found = {}
    for name in names:
        try:
            found[name] = PROBES[name]()
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    import tempfile

    wanted = sys.argv.pop(1).split(",")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_toy(folder)
        import probes_of_files  # beside this script
        import probes_of_models

        import recbole_llm

        PROBES |= probes_of_files.probes(run, settings, CONTEXT)
        PROBES |= probes_of_models.probes(run, settings, dataset, CONTEXT)
        result = outcomes(wanted)
        states = {r.name: r.state for r in recbole_llm.repair_report()} if "ray" not in os.environ["SKIPPED"] else {}
    print(json.dumps({"outcomes": result, "states": states}))
    sys.exit()


# ---------------------------------------------------------------- tests

import pytest  # noqa: E402

import recbole_llm  # noqa: E402

pytest.importorskip("recbole")
from recbole_llm.bridge.repairs import configuration, defects, files, libraries, models  # noqa: E402
from recbole_llm.bridge.repairs import registry as repairs  # noqa: E402
from recbole_llm.bridge.repairs.report import repair_report  # noqa: E402

SHOWN = {
    # repair: (what RecBole does without it, what it does with it)
    "warnings": ("warned: ", "warned: ."),
    "ray": ("Error", "imported, "),
    "numpy": ("AttributeError", "float64 int64 str_"),
    "torch_load": ("UnpicklingError", "BPR loaded by RecBole, UnpicklingError elsewhere"),
    "dok": ("AttributeError", "ran: recall@10"),
    "agg_len": ("", "[2, 2, 2]"),
    "fillna": ("city -9223372036854775808 -9223372036854775808 age nan nan", "city 0 0 age 29.84 29.84"),
    "collector": ("AttributeError", "ran: itemcoverage@10, giniindex@10, averagepopularity@10, tailpercentage@10"),
    "ensure_dir": ("FileExistsError", "there"),
    "checkpoint_names": ("1 files of 2 runs", "2 files of 2 runs"),
    "bert4rec": ("an only item matters: False", "an only item matters: True"),
    "pop": ("counts interactions: False", "counts interactions: True"),
    "time_split": ("test is later: False", "test is later: True"),
    "saved_dataset": ("training rows: [144, 144]", "training rows: [144, 72]"),
    "saved_dataloaders": ("64 rows, no generator; 64 rows, a generator", "64 rows, a generator; 32 rows, a generator"),
    "search_space": ("space: 1", "ValueError: params_file: \"[__import__('os').getpid()]\" is no list of values"),
    "plain_yaml": ("note: <built-in function mkdir>", "a.yaml': A configuration file is no YAML of plain values"),
    "teacher": ("ran: auc", "ValueError: teacher must be one of DAGFM, CrossNet, CIN, got '(lambda"),
    "item_embeddings": ("ran: True", "ran: False"),
    "unnamed_pickles": ("ran: True, ran: True", "ran: False, ran: False"),
    "unpickled_config": ("['x.pth', 'x.pth', 'x.pth', 'x.pth']", "['x.pth', 'x.pth', 'x.pth', None] [7, 7, 7, 7]"),
    "data_and_model": ("TypeError", "saved by: True, read: kept/toy-Dataset.pth"),
    "case_study": ("TypeError: full_like(): argument 'input'", "users have no interaction in this split: "),
    "flops": ("AssertionError", "ran: recall@10"),
    "literals": ("AttributeError", "'map.npy'"),
    "command_line": ("short", "None"),
    "kgat": ("Error", "ran: recall@10"),
    "ksr": ("RuntimeError", "ran: recall@10"),
    "anomaly_mode": ("checks gradients: True", "checks gradients: False"),
    "dgcf": ("ValueError: Sample larger than population", "ran: recall@10"),
    "hyper": ("AttributeError", "3 trials, best 0.3"),
    "model_name": ("ModuleNotFoundError: No module named", "ValueError: `model_name` [LightGCM] is not the name"),
    "tree_defaults": ("None", "100"),  # last: it leaves stubs of two libraries behind
}


def environment(skip=()):
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return env | {repairs.SKIP_VARIABLE: ",".join(skip), "SKIPPED": ",".join(skip)}


def look(probes, skip):
    command = [sys.executable, __file__, ",".join(probes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(skip))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def repaired():
    return look(SHOWN, skip=())


@pytest.fixture(scope="module")
def unrepaired():
    bare = [name for name in SHOWN if name not in LEFT_OUT_ALONE]
    found = look(bare, skip=bare)["outcomes"]
    for name in LEFT_OUT_ALONE:
        found |= look([name], skip=[name])["outcomes"]
    return found


@pytest.mark.parametrize("name", SHOWN)
def test_recbole_fails_without_the_repair_and_works_with_it(name, repaired, unrepaired):
    if name in ("hyper", "search_space"):
        pytest.importorskip("hyperopt")
    without, with_it = SHOWN[name]
    needed = repaired["states"][name] == "applied"
    if "is not the name of an existing model. Did" in repaired["outcomes"][name] and name != "model_name":
        pytest.skip("this version of RecBole does not have the model")
    if "splitting_method [TS] has not been implemented" in repaired["outcomes"][name]:
        pytest.skip("this version of RecBole does not have the split")
    assert with_it in repaired["outcomes"][name]
    if not needed or with_it in unrepaired[name]:
        pytest.skip(f"the defect does not show with {repairs.installed()}")
    assert without in unrepaired[name]


def test_ray_is_neither_loaded_nor_left_behind(repaired):
    assert repaired["outcomes"]["ray"] == "imported, ray in sys.modules: False, run"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("set_detect_anomaly(True); import recbole_llm; from recbole.model import sequential_recommender", True),
        ("import recbole_llm; from recbole.model import sequential_recommender", False),
        ("import recbole.model.sequential_recommender.sine; import recbole_llm", False),
    ],
    ids=["a program's own mode stays", "imported after us", "imported before us"],
)
def test_sequential_models_leave_anomaly_mode_alone(lines, expected):
    code = f"from torch.autograd import set_detect_anomaly; {lines}; import torch; print(torch.is_anomaly_enabled())"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.stdout.split() == [str(expected)], done.stderr[-500:]


def test_every_repair_is_shown(repaired):
    # those of other modules are shown in their own tests
    here = {module.__name__ for module in (libraries, defects, files, models, configuration)}
    assert set(SHOWN) == {repair.name for repair in repairs.REPAIRS if repair.cure.__module__ in here}
    assert set(SHOWN) <= set(repaired["states"])


def snapshot():
    """Everything that repairs replace, as it stands in this process."""
    import numpy
    import torch
    from scipy.sparse import dok_matrix

    found = {}
    for repair in repairs.REPAIRS:
        for name in repair.modules:
            for key, value in vars(sys.modules[name]).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {(name, key, k): v for k, v in vars(value).items()}
    found |= {("numpy", k): v for k, v in vars(numpy).items()}
    return {**found, "load": torch.load, "_update": getattr(dok_matrix, "_update", None)}


def test_a_repair_is_harmless_twice(tmp_path):
    repair_report()
    before = snapshot()
    for repair in repairs.REPAIRS:
        for name in repair.modules:
            repair(sys.modules[name])
    after = snapshot()
    # these replace a module's global by an equal one; all else must be the very same object
    same_in_kind = {"tune", "len", "np", "pd", "os", "yaml", "eval", "_update"}
    same_in_kind |= {"__setstate__", "__copy__", "__deepcopy__"}
    changed = {key for key in after if after[key] is not before.get(key)}
    assert {key[-1] if isinstance(key, tuple) else key for key in changed} <= same_in_kind
    assert run_in(tmp_path, "DeepFM", **CONTEXT)["auc"] > 0


def run_in(folder, model, **more):
    from recbole.quick_start import run_recbole

    before = os.getcwd()
    os.chdir(folder)
    try:
        write_toy(folder)
        columns = {"inter": ["user_id", "item_id", "rating"], "user": ["user_id", "city"], "item": ["item_id", "title"]}
        return run_recbole(model, "toy", config_dict=settings(load_col=columns, **more), saved=False)["test_result"]
    finally:
        os.chdir(before)
