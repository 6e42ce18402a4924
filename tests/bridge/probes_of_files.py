"""Probes of test_compat.py, run as it runs its own: whether RecBole runs code that it finds in a file."""

import contextlib
import os
from pathlib import Path


class Harmful:
    """Makes a folder where it is unpickled."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return os.mkdir, (self.name,)


def ran(name, action):
    """Whether an action, whatever becomes of it, unpickled ``Harmful(name)``."""
    with contextlib.suppress(Exception):
        action()
    return f"ran: {os.path.isdir(name)}"


def probes(run, settings, context):
    """By the name of the repair.

    Args:
        run: trains a model, by its name and more settings.
        settings: of a quick run, and more.
        context: settings of a context-aware model.
    """

    def search_space():
        from recbole.trainer import HyperTuning

        Path("a.hyper").write_text("epochs choice [__import__('os').getpid()]\n")
        return f"space: {len(HyperTuning(None, params_file='a.hyper').space)}"

    def plain_yaml():
        from recbole.config import Config

        Path("a.yaml").write_text("note: !!python/name:os.mkdir\n")
        return f"note: {Config('BPR', 'toy', ['a.yaml'], settings())['note']}"

    def teacher():
        columns = {"inter": ["user_id", "item_id", "rating"], "user": ["user_id", "city"]}
        return run("KD_DAGFM", teacher="(lambda: CrossNet)()", load_col=columns, **context)

    def item_embeddings():
        import numpy as np

        cells = np.empty(1, object)
        cells[0] = Harmful("ran-embeddings")
        np.save("toy/item_emb.npy", cells, allow_pickle=True)
        return ran("ran-embeddings", lambda: run("LDiffRec", n_cate=2))

    def unnamed_pickles():
        import pickle

        Path("beside").mkdir()
        for number, name in enumerate(("toy-Dataset.pth", "toy-for-BPR-dataloader.pth")):
            Path("beside", name).write_bytes(pickle.dumps(Harmful(f"ran-beside-{number}")))
        plain = ran("ran-beside-0", lambda: run("BPR", checkpoint_dir="beside"))
        Path("beside/toy-Dataset.pth").unlink()
        return f"{plain}, {ran('ran-beside-1', lambda: run('BPR', checkpoint_dir='beside'))}"

    def unpickled_config():
        import copy
        import pickle

        from recbole.config import Config

        config = Config("BPR", "toy", config_dict=settings(dataset_save_path="x.pth", epochs=7))
        twins = [config, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))]
        return f"{[twin['dataset_save_path'] for twin in twins]} {[twin['epochs'] for twin in twins]}"

    def data_and_model():
        from recbole.quick_start import load_data_and_model, run_recbole

        run_recbole("BPR", "toy", config_dict=settings(checkpoint_dir="kept", save_dataset=True))
        (file,) = Path("kept").glob("BPR*.pth")
        data = load_data_and_model(file, dataset_save_path="kept/toy-Dataset.pth")[2]
        return f"saved by: {data.config['save_dataset']}, read: {data.config['dataset_save_path']}"

    return {name: function for name, function in locals().items() if name not in ("run", "settings", "context")}
