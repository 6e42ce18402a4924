"""Speed of encoding texts: ``encode_texts`` beside sentence-transformers' ``encode``, same model, batch size and threads.

    python benchmarks/encode_speed.py --items FOLDER/amazon-office.item --output benchmarks/results/encode_speed.json

Both encode the same slices of texts in turn, one ahead of the other by turns; a ratio is the median over the slices. Vectors are
compared on every text. The process's CPU time is given beside the wall clock: on a shared machine it is the steadier one. bfloat16
is timed on the same slices. Then a store of ``--stored`` texts is read in a fresh process, and
ten texts are added. sentence-transformers is no dependency of ours: pip install sentence-transformers.
"""

import argparse
import importlib.metadata
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
import torch.nn.functional as F
from timing import machine, ratio

from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.text import choose_text_fields, read_atomic_table, texts_of_tokens


def texts_of(file: Path, id_field: str, most: int) -> list[str]:
    """The items' texts as LLMTwoTower makes them, every n-th so that at most ``most`` are left."""
    table = read_atomic_table(file, id_field)
    texts, _ = texts_of_tokens(table, list(table.row_of), choose_text_fields(table))
    present = [text for text in texts if text is not None]
    return present[:: -(-len(present) // most)]


def compare(texts: list[str], slices: int, batch: int) -> dict[str, Any]:
    """Seconds of each library per slice, and how far their vectors are apart."""
    from sentence_transformers import SentenceTransformer

    ours, half = load_encoder(), load_encoder(dtype="bfloat16")
    theirs = SentenceTransformer(str(ours.files.folder), device="cpu")
    made: dict[str, Any] = {
        "sentence-transformers": lambda part: theirs.encode(part, batch_size=batch, convert_to_tensor=True),
        "recbole-llm": lambda part: encode_texts(part, ours, batch_size=batch).vectors,
        "recbole-llm bfloat16": lambda part: encode_texts(part, half, batch_size=batch).vectors,
    }
    for encode in made.values():
        encode(texts[:8])
    seconds: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    difference, cosine = 0.0, 1.0
    for number in range(slices):
        part, vectors = texts[number::slices], {}
        for name in list(made)[:: 1 if number % 2 else -1]:
            began, cpu_began = time.perf_counter(), time.process_time()
            vectors[name] = made[name](part)
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
        reference = vectors["sentence-transformers"]
        difference = max(difference, float((vectors["recbole-llm"] - reference).abs().max()))
        cosine = min(cosine, float(F.cosine_similarity(vectors["recbole-llm bfloat16"], reference).min()))
    base, cpu_base = seconds["sentence-transformers"], cpu["sentence-transformers"]
    tokens = sum(sample.size for sample in ours.prepare(texts))
    return {
        "texts": len(texts),
        "tokens": tokens,
        "batch_size": batch,
        "threads": torch.get_num_threads(),
        "seconds": {name: sum(times) for name, times in seconds.items()},
        "texts_per_s": {name: len(texts) / sum(times) for name, times in seconds.items()},
        "times_as_fast": {name: ratio(base, times) for name, times in seconds.items()},
        "times_as_fast_per_slice": {
            name: [b / t for b, t in zip(base, times, strict=True)] for name, times in seconds.items()
        },
        "cpu_seconds": {name: sum(times) for name, times in cpu.items()},
        "times_less_cpu": {name: ratio(cpu_base, times) for name, times in cpu.items()},
        "largest_difference_float32": difference,
        "smallest_cosine_bfloat16": cosine,
    }


# run in a process of its own: argv is the store's folder and a file of texts
READ = """
import json, sys, time
began = time.perf_counter()
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts
imported = time.perf_counter()
texts = json.load(open(sys.argv[2]))
table = encode_texts(texts, load_encoder(), FeatureStore(sys.argv[1]))
print(json.dumps({"import_s": imported - began, "read_s": time.perf_counter() - imported, "rows": int(table.present.sum())}))
"""


class Counted:
    """An encoder that counts what it encodes."""

    def __init__(self, encoder: Any) -> None:
        self._encoder, self.texts = encoder, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, batch: Any) -> torch.Tensor:  # noqa: D102 (an encoder's)
        self.texts += len(batch)
        return self._encoder.encode(batch)


def stored(count: int, repeats: int) -> dict[str, Any]:
    """Encode short texts, read them in fresh processes, add ten."""
    texts = [f"Ball point pen number {n}, medium point" for n in range(count)]
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        encode_texts(texts, load_encoder(), FeatureStore(scratch))
        first = time.perf_counter() - began
        file = Path(scratch) / "texts.json"
        file.write_text(json.dumps(texts))
        runs = []
        for _ in range(repeats):
            path = f"{ROOT}:{ROOT / 'kernels'}"
            command = [sys.executable, "-c", READ, scratch, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": path})
            runs.append(json.loads(done.stdout))
        encoder = Counted(load_encoder())
        encode_texts([*texts, *(f"Stapler number {n}" for n in range(10))], encoder, FeatureStore(scratch))
    assert all(run["rows"] == count for run in runs)
    return {
        "texts": count,
        "first_run_s": first,
        "second_run_s": statistics.median(run["read_s"] for run in runs),
        "second_run_s_with_imports": statistics.median(run["read_s"] + run["import_s"] for run in runs),
        "encoded_after_adding_10": encoder.texts,
    }


def main() -> None:
    """Measure and print; write with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, required=True, help="an atomic .item file")
    parser.add_argument("--id_field", default="item_id")
    parser.add_argument("--texts", type=int, default=1000, help="most texts to compare on")
    parser.add_argument("--slices", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--stored", type=int, default=10_000, help="texts of the store that is read again")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found = {
        "machine": machine("cpu"),
        "libraries": {
            name: importlib.metadata.version(name) for name in ("sentence-transformers", "transformers", "tokenizers")
        },
        "dataset": options.items.name,
        "compared": compare(
            texts_of(options.items, options.id_field, options.texts), options.slices, options.batch_size
        ),
        "stored": stored(options.stored, options.repeats),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
