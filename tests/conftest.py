"""A made dataset whose texts and interactions agree, and a tiny encoder: end-to-end tests without a download.

Also how the suite runs: in several processes where a folder is asked for.
"""

import logging
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # waiting, ports, toy_data
from toy_data import TOPICS, write_dataset

# before torch is loaded: with contended cores, spinning OpenMP threads slow loops of small operations several times
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes of the suite share the cores
    share = max(1, cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

# a process of the suite holds PyTorch and RecBole, a gigabyte: no more than these
MOST_PROCESSES = 4
# files whose tests take longest, begun first: the last one to end must not keep the others waiting
LONGEST = (
    "test_cli",
    "test_compat",
    "test_distributed",
    "test_sharded_items",
    "test_triton_runs",
    "test_activation",
    "test_scripts",
    "test_sharded",
    "test_faults",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Spread the files over processes, unless ``-n`` says otherwise; a single file or test starts faster in this one."""
    if hasattr(config, "workerinput"):  # one of those processes
        return
    if getattr(config.option, "numprocesses", 0) is not None or config.option.dist != "no":  # given, or no pytest-xdist
        return
    if config.option.usepdb or all(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return
    if cores() > 1:
        # fixtures of a module are made once; the order is that of pytest_collection_modifyitems
        config.option.numprocesses, config.option.dist = min(cores(), MOST_PROCESSES), "loadfile"
        config.option.loadscopereorder = False
        # a process that ends ends the run: pytest-xdist would begin the file again, up to the same test, many times
        config.option.maxworkerrestart = "0"


def pytest_collection_modifyitems(items):
    """Begin the longest files first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


try:
    import hypothesis
except ModuleNotFoundError:
    pass
else:
    # an example may take as long as the machine needs
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def processor_load_read_at_once():
    """RecBole ends each run with a table whose line on the processor waits for a second, to no use in a test."""
    try:
        import psutil
    except ModuleNotFoundError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "cpu_percent", lambda interval=None, percpu=False: 0.0)
        yield


@pytest.fixture(autouse=True)
def arguments_left_as_found():
    """Commands put the keys meant for RecBole into ``sys.argv``, where every later ``Config`` would read them."""
    arguments = sys.argv
    yield
    sys.argv = arguments


@pytest.fixture(autouse=True)
def logging_left_as_found():
    """RecBole sets the root logger's level and adds handlers to it; the tests after it must not depend on that."""
    root = logging.getLogger()
    level, filters = root.level, list(root.filters)
    yield
    root.setLevel(level)
    root.filters[:] = filters
    for handler in root.handlers[:]:
        if type(handler) in (logging.StreamHandler, logging.FileHandler):  # pytest's own are of other classes
            root.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory):
    """The folder to give as ``data_path``; the dataset's name is ``toy``."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A two-layer BERT of 32 dimensions with random weights and a word-level tokenizer, saved as a local folder."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = sorted(
        {w for topic, ws in TOPICS.items() for w in (topic, *ws)} | {"a", "story", "of", "likes", "and", "title"}
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {w: i for i, w in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def run_config(toy_path, tiny_encoder, tmp_path, monkeypatch):
    """A configuration dictionary for a quick run on the made dataset; everything it writes lands in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return {
        "data_path": str(toy_path),
        "encoder": str(tiny_encoder),
        "feature_cache_dir": str(tmp_path / "features"),
        "checkpoint_dir": str(tmp_path / "saved"),
        "gpu_id": "",
        "epochs": 3,
        "embedding_size": 16,
        "train_batch_size": 32,
        "show_progress": False,
        "state": "WARNING",
        "metrics": ["Recall", "NDCG"],
        "topk": [5, 10],
        "valid_metric": "NDCG@10",
    }


@pytest.fixture
def paths(run_config):
    """The paths of ``run_config``, which whoever reads a checkpoint of such a run gives again."""
    return {key: run_config[key] for key in ("data_path", "encoder", "feature_cache_dir")}
