"""Every place in RecBole and in our packages that may run code from a string or a file, with the reason why it is no way in.

The source is parsed, not imported. A place that is new, here or in a new RecBole, fails until somebody has looked at it and has
entered its reason; a reason whose place is gone fails too.
"""

import ast
import importlib.util
import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# a name that need not be called where it is: map(eval, ...) would do
BUILTINS = {"eval", "exec", "compile", "__import__"}
# what a call is called in full, its module's alias resolved
DANGEROUS = re.compile(
    r"""(?x)
    (pickle|cPickle|_pickle|dill|cloudpickle|marshal|joblib|shelve|torch|torch\.jit|torch\.hub|torch\.package|jsonpickle)
        \.(load|loads|open|load_state_dict_from_url|Unpickler|PackageImporter)$
    | (numpy)\.load$
    | (yaml)\.(load|load_all|full_load|full_load_all|unsafe_load|unsafe_load_all)$
    | (pandas)\.(read_pickle|read_hdf|eval)$
    | (importlib)\.(import_module|reload)$ | (importlib\.util)\.(module_from_spec)$ | (runpy)\.
    | (os)\.(system|popen|exec\w+|spawn\w+|startfile)$ | (subprocess|pty|ctypes)\.\w+
    | (faiss)\.(read_\w+|deserialize_\w+)$
    | (torch\.ops)\.load_library$ | (torch\.utils\.cpp_extension)\.\w+$
    | (shutil)\.unpack_archive$
    """
)
# methods by which an object unpickles, loads code, or evaluates a string
METHODS = {
    "from_pretrained",
    "recv",
    "all_gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "exec_module",
    "load_module",
    "extractall",
    "find_class",
    "eval",  # with arguments: DataFrame.eval; without, a module's evaluation mode
}


class Places(ast.NodeVisitor):
    """Places of a file as ``function: what``."""

    def __init__(self, tree):
        self.found, self.scope, self.modules = [], [], {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    self.modules[name.asname or name.name.split(".")[0]] = (
                        name.name if name.asname else name.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self.modules |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        self.visit(tree)

    def dotted(self, node):
        """``np.load`` -> ``numpy.load``; ``None`` for what is no chain of names of a module."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return base and f"{base}.{node.attr}"
        return None

    def add(self, what):
        self.found.append(f"{'.'.join(self.scope) or '<module>'}: {what}")

    def visit_FunctionDef(self, node):
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815
    visit_ClassDef = visit_FunctionDef  # noqa: N815

    def visit_Name(self, node):
        if node.id in BUILTINS and isinstance(node.ctx, ast.Load):
            self.add(node.id)

    def visit_Attribute(self, node):
        name = self.dotted(node)
        if name and DANGEROUS.match(name):
            self.add(name)
        self.generic_visit(node)

    def visit_Call(self, node):
        function = node.func
        if isinstance(function, ast.Name):
            name = self.dotted(function)
            if name and DANGEROUS.match(name):
                self.add(name)
            if function.id == "getattr" and not isinstance(node.args[1], ast.Constant) and self.is_module(node.args[0]):
                self.add(f"getattr({ast.unparse(node.args[0])}, {ast.unparse(node.args[1])})")
        elif (
            isinstance(function, ast.Attribute)
            and function.attr in METHODS
            and (function.attr != "eval" or node.args)
            and not DANGEROUS.match(self.dotted(function) or "")
        ):
            self.add(f".{function.attr}")
        self.generic_visit(node)

    def is_module(self, node):
        """Whether an expression is, by its looks, a module: imported, made by import_module, or called so."""
        if isinstance(node, ast.Call):
            return (self.dotted(node.func) or "").endswith("import_module")
        name = node.id if isinstance(node, ast.Name) else ""
        return bool(self.dotted(node)) or name.endswith("module")


def places(folder):
    """``file, function: what`` of every place in a package; the file's name without its folders, which move."""
    return sorted(
        f"{path.name}, {place}"
        for path in folder.rglob("*.py")
        for place in Places(ast.parse(path.read_text(encoding="utf-8"))).found
    )


REPAIRED = "repaired: "
PRETRAINED = REPAIRED + "torch_load (of files that models are pretrained on, tensors alone are read)"
OF_PACKAGE = "a file of the installed package"
OF_RECBOLE = "a module of RecBole's own, by the name of a model or its type; the model's name is the caller's"
RECBOLE = {
    "configurator.py, Config._convert_config_dict: eval": REPAIRED + "literals",
    "configurator.py, Config._load_config_files: yaml.load": REPAIRED + "plain_yaml",
    "configurator.py, Config._update_internal_config_dict: yaml.load": REPAIRED + "plain_yaml",
    "dataset.py, Dataset._get_download_url: yaml.load": OF_PACKAGE,
    "hyper_tuning.py, HyperTuning._build_space_from_file: eval": REPAIRED + "search_space",
    "kd_dagfm.py, KD_DAGFM.__init__: eval": REPAIRED + "teacher",
    "ldiffrec.py, LDiffRec.__init__: numpy.load": REPAIRED + "item_embeddings",
    "convncf.py, ConvNCF.__init__: torch.load": PRETRAINED,
    "kd_dagfm.py, KD_DAGFM.__init__: torch.load": PRETRAINED,
    "nais.py, NAIS._load_pretrain: torch.load": PRETRAINED,
    "neumf.py, NeuMF.load_pretrain: torch.load": PRETRAINED,
    "ract.py, RaCT.__init__: torch.load": PRETRAINED,
    "s3rec.py, S3Rec.__init__: torch.load": PRETRAINED,
    "quick_start.py, load_data_and_model: torch.load": "its caller names the file; it holds a Config",
    "trainer.py, Trainer.resume_checkpoint: torch.load": "its caller names the file; LLMTwoTower's trainer reads in another way",
    "trainer.py, Trainer.evaluate: torch.load": "what this run wrote under a name that nobody foresees (repair checkpoint_names),"
    " or its caller names",
    "utils.py, create_dataset: pickle.load": REPAIRED + "unnamed_pickles, unpickled_config, data_and_model",
    "utils.py, load_split_dataloaders: pickle.load": REPAIRED + "unnamed_pickles, unpickled_config, data_and_model",
    "trainer.py, LightGBMTrainer.__init__: __import__": "a constant name",
    "trainer.py, XGBoostTrainer.__init__: __import__": "a constant name",
    "url.py, extract_zip: .extractall": "zipfile keeps names inside the folder; our commands never begin a download",
    "utils.py, create_dataset: getattr(dataset_module, config['model'] + 'Dataset')": OF_RECBOLE,
    "utils.py, create_dataset: getattr(dataset_module, type2class[model_type])": OF_RECBOLE,
    "utils.py, create_dataset: importlib.import_module": "a constant name",
    "utils.py, get_model: getattr(model_module, model_name)": OF_RECBOLE,
    "utils.py, get_model: importlib.import_module": OF_RECBOLE,
    "utils.py, get_trainer: getattr(importlib.import_module('recbole.trainer'), model_name + 'Trainer')": OF_RECBOLE,
    "utils.py, get_trainer: importlib.import_module": "a constant name",
    "utils.py, trunc: getattr(np, method)": "called by nothing",
}

OWN_NAME = "a module and a name that stand in our own source"
SAFELY = "read without running code: "
NAMED_FUNCTION = "the encoder that the caller names; of files none is taken (test_function_encoder.py)"
OURS = {
    "__init__.py, <module>: importlib.import_module": OWN_NAME,
    "__init__.py, __getattr__: importlib.import_module": OWN_NAME,
    "__init__.py, __getattr__: getattr(import_module(_LAZY[name]), name)": OWN_NAME,
    "cli.py, _parser: importlib.import_module": OWN_NAME,
    "cli.py, _parser: getattr(import_module(command.module), command.add)": OWN_NAME,
    "cli.py, main: importlib.import_module": OWN_NAME,
    "cli.py, main: getattr(import_module(command.module), command.run)": OWN_NAME,
    "backends.py, _load: importlib.import_module": OWN_NAME,
    "report.py, repair_report: importlib.import_module": OWN_NAME,
    "libraries.py, _numpy.make.compatibility_settings: getattr(np, name)": OWN_NAME,
    "interruption.py, Interruption.__enter__: getattr(signal, name)": OWN_NAME,
    "register.py, put_entry_points: getattr(module, own.__name__)": OWN_NAME,
    "register.py, _stock: importlib.import_module": OWN_NAME,
    "watched_run.py, _replaced: getattr(quick, name)": OWN_NAME,
    "register.py, resolve: importlib.import_module": "what the caller of register_model names",
    "register.py, resolve: getattr(importlib.import_module(module), attribute)": "what the caller of register_model names",
    "lookups.py, _reject_overwritten: yaml.load": OF_PACKAGE,
    "activation.py, _RepairingLoader.exec_module: .exec_module": "the import of a module of RecBole's",
    "script.py, _execute: compile": "the script that the command is given",
    "script.py, _execute: exec": "the script that the command is given",
    "checkpoint.py, read_checkpoint: torch.load": SAFELY + "weights_only=True",
    "checkpoint.py, unpickled: pickle.loads": "called by a full torch.load alone, whose caller names the file",
    "streaming.py, _load_best: torch.load": "of a stock model: as Trainer.evaluate",
    "files.py, _Tensors: pickle.Unpickler": SAFELY + "it finds the functions that rebuild tensors and nothing else",
    "files.py, _Tensors.find_class: getattr(torch._utils, name)": SAFELY + "from a list of three",
    "files.py, _Tensors.find_class: getattr(torch, name)": SAFELY + "used where it is a dtype",
    "files.py, _item_embeddings.load: numpy.load": SAFELY + "allow_pickle=False",
    "files.py, _plain_yaml.load: yaml.load": SAFELY + "a SafeLoader",
    "vector_files.py, _read_npy: numpy.load": SAFELY + "allow_pickle=False",
    "sentence_modules.py, read_weights_file: torch.load": SAFELY + "weights_only=True",
    "function.py, load_function: importlib.import_module": NAMED_FUNCTION,
    "function.py, load_function: getattr(module, attribute)": NAMED_FUNCTION,
    "function.py, _from_here: importlib.import_module": NAMED_FUNCTION,
    "transformer.py, TextEncoder._model: .from_pretrained": "trust_remote_code is an argument that no file and no key reaches",
    "transformer.py, TextEncoder._tokenizer: .from_pretrained": "trust_remote_code is an argument that no file and no key reaches",
    "pretrained.py, load_pretrained: .from_pretrained": "a model's own code is never asked for",
    "joint.py, TextTower._tokenizer: .from_pretrained": "a model's own code is never asked for",
    "audio.py, AudioEncoder._extractor: getattr(transformers, KINDS[self.kind])": "one of the four classes that KINDS names",
    "static.py, StaticEncoder._model: .from_pretrained": "model2vec reads safetensors, a tokenizer and JSON",
    "memory.py, _trim: ctypes.CDLL": "the C library that this process has loaded already",
    "ivf.py, read_index: faiss.deserialize_index": "faiss parses an index of numbers; nothing in its format is code",
    "distributed.py, agreed: .broadcast_object_list": "from the other processes of this run",
    "distributed.py, gather_objects: .all_gather_object": "from the other processes of this run",
    "experiment.py, in_own_process: .recv": "from a process that this one has started",
}


def test_every_place_in_recbole_is_repaired_or_has_a_reason():
    spec = importlib.util.find_spec("recbole")
    if spec is None:
        pytest.skip("RecBole is not installed")
    found = set(places(Path(spec.origin).parent))
    assert found - RECBOLE.keys() == set(), "look at these, repair them or give a reason"
    if metadata.version("recbole") == "1.2.1":  # other versions may lack some
        assert RECBOLE.keys() - found == set(), "these are gone"


def test_the_repairs_are_there():
    pytest.importorskip("recbole")
    from recbole_llm.bridge.repairs import activation  # noqa: F401  (loads every repair)
    from recbole_llm.bridge.repairs.registry import REPAIRS

    named = [r.removeprefix(REPAIRED).split(" (")[0] for r in RECBOLE.values() if r.startswith(REPAIRED)]
    names = {name for names in named for name in names.split(", ")}
    upstream = {repair.name: repair.upstream for repair in REPAIRS}
    assert names <= upstream.keys()
    for place, reason in RECBOLE.items():  # and each repair says that it is about that file
        if reason.startswith(REPAIRED):
            about = " ".join(upstream[n] for n in reason.removeprefix(REPAIRED).split(" (")[0].split(", "))
            assert place.split(",")[0] in about, place


def test_every_place_of_ours_has_a_reason():
    found = {place for package in ("recbole_llm", "kernels") for place in places(ROOT / package)}
    assert found - OURS.keys() == set(), "look at these, and give a reason"
    assert OURS.keys() - found == set(), "these are gone"


@pytest.mark.parametrize("file", ["checkpoint.py", "vector_files.py", "sentence_modules.py", "repairs/files.py"])
def test_what_is_said_to_be_read_safely_is(file):
    (path,) = (ROOT / "recbole_llm").rglob(file)
    loads = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load")
    ]
    assert loads or file == "repairs/files.py"
    for load in loads:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}
        assert given.get("weights_only") == "True" or given.get("allow_pickle") == "False"


def test_the_search_finds_what_it_is_for():
    source = """
import numpy as np, pickle, yaml, os, importlib
import subprocess as sp
from pickle import load as read
from importlib import import_module
import torch.nn as nn
a = eval("1"); b = list(map(eval, "1")); model.eval(); frame.eval("a+b")
c = pickle.load(f), read(f), np.load(f), pickle.Unpickler, yaml.safe_load(f), yaml.full_load(f)
os.system("x"); sp.run([]); os.path.exists("x")
class A:
    def b(self):
        getattr(nn, self.name)(); getattr(self, self.name); getattr(nn, "Linear"); getattr(import_module("x"), "a" + "b")
        AutoModel.from_pretrained("x"); re.compile("x"); compile("x", "y", "exec"); __import__("x")
"""
    assert sorted(Places(ast.parse(source)).found) == sorted(
        [
            *["<module>: eval"] * 2,
            "<module>: .eval",
            "<module>: pickle.load",
            "<module>: pickle.load",
            "<module>: numpy.load",
            "<module>: pickle.Unpickler",
            "<module>: yaml.full_load",
            "<module>: os.system",
            "<module>: subprocess.run",
            "A.b: getattr(nn, self.name)",
            "A.b: getattr(import_module('x'), 'a' + 'b')",
            "A.b: importlib.import_module",
            "A.b: .from_pretrained",
            "A.b: compile",
            "A.b: __import__",
        ]
    )
