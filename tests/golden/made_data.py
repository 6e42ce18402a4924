"""A made data set and a made encoder, the same on every machine: RecBole's atomic files, words as texts, vectors of the words.

Random numbers come from ``RandomState``, whose streams NumPy has frozen.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

TOPICS = {
    "space": ("star", "rocket", "alien", "planet", "moon", "comet"),
    "farm": ("cow", "tractor", "barn", "field", "hay", "goat"),
    "sea": ("ship", "whale", "island", "storm", "harbour", "pirate"),
    "crime": ("detective", "murder", "heist", "police", "alibi", "prison"),
    "music": ("band", "guitar", "concert", "singer", "piano", "drum"),
    "winter": ("snow", "sledge", "glacier", "skate", "frost", "cabin"),
}
DIM = 24  # of the vectors of words
PER_TITLE = 5
STRENGTH = 0.7  # of a word in a user's choice
EARLIER, LATER = (
    0.8,
    0.9,
)  # shares of a history that training, and training with validation, hold in the files of ``cold``


def _random(seed):
    return np.random.RandomState(seed)


def write_dataset(folder, name, *, n_users, n_items, n_cold=0, sizes=(5, 30), chain=0.1, seed=0):
    """Write ``NAME.inter``, ``NAME.item``, ``vectors.npy`` and ``vectors.ids.txt`` into ``folder/NAME``.

    Users like some words and popular items, and now and then go on from an item to the one that follows it in a chain, so that
    texts, co-occurrence and order all tell something. History sizes are ragged. The last item has no text.

    Args:
        folder: what RecBole calls ``data_path``.
        name: of the data set.
        n_users: users ``u0``, ``u1``...
        n_items: items ``i0``, ``i1``...
        n_cold: the last so many items but one have no row in training: then ``NAME.train.inter``, ``NAME.valid.inter`` and
            ``NAME.test.inter`` are written too, for ``benchmark_filename``.
        sizes: least and most items of a user.
        chain: how often the next item is the one that follows, as odds against all others.
        seed: of everything.
    """
    rng, topics = _random(seed), list(TOPICS)
    target = Path(folder) / name
    target.mkdir(parents=True)
    topic = np.arange(n_items) % len(topics)
    words = [[str(rng.choice(TOPICS[topics[kind]])) for _ in range(PER_TITLE)] for kind in topic]
    titles = [f"A {topics[kind]} story of {' '.join(chosen)}" for kind, chosen in zip(topic, words, strict=True)]
    titles[-1] = ""
    popularity = 1.0 / (1.0 + rng.permutation(n_items)) ** 0.6
    following = rng.permutation(n_items)
    every = [word for group in TOPICS.values() for word in group]
    holds = np.array([[chosen.count(word) for word in every] for chosen in words])
    histories = []
    for _ in range(n_users):
        taste = rng.standard_normal(len(every)) * np.repeat(
            rng.random_sample(len(topics)) < 0.5, len(every) // len(topics)
        )
        size = int(sizes[0] + (sizes[1] - sizes[0]) * rng.random_sample() ** 2)
        histories.append(_history(rng, popularity * np.exp(STRENGTH * holds @ taste), following, chain, size))

    header = "user_id:token\titem_id:token\ttimestamp:float"
    rows = [(u, i, 1000 * u + at) for u, history in enumerate(histories) for at, i in enumerate(history)]
    order = rng.permutation(len(rows))
    write_lines(target / f"{name}.inter", [header, *(_row(rows[n]) for n in order)])
    if n_cold:
        for part, numbers in _parts(rows, order, n_items - 1 - n_cold, n_items - 1).items():
            write_lines(target / f"{name}.{part}.inter", [header, *(_row(rows[n]) for n in numbers)])
    lines = [f"i{i}\t{titles[i]}\t{topics[topic[i]]}\t{1980 + i % 40}" for i in range(n_items)]
    write_lines(target / f"{name}.item", ["item_id:token\ttitle:token_seq\tgenre:token\tyear:float", *lines])

    vector_of = {word: rng.standard_normal(DIM) for word in every}
    vectors = [sum(vector_of[word] for word in chosen) / PER_TITLE for chosen in words[:-1]]
    np.save(
        target / "vectors.npy", np.round(vectors, 4).astype(np.float32)
    )  # rounded: libraries differ in the last bit
    write_lines(target / "vectors.ids.txt", [f"i{i}" for i in range(n_items - 1)])
    return target


def _history(rng, weight, following, chain, size):
    """The items of one user, oldest first."""
    seen = []
    for _ in range(size):
        chance = weight.copy()
        if seen:
            chance[following[seen[-1]]] += chain * weight.sum()
        chance[seen] = 0
        seen.append(int(np.searchsorted(np.cumsum(chance), rng.random_sample() * chance.sum(), side="right")))
    return seen


def _row(row):
    return f"u{row[0]}\ti{row[1]}\t{row[2]}"


def _parts(rows, order, first_cold, end):
    """Numbers of the rows by part: cold items alternate between validation and test, the others are split by position."""
    parts = {"train": [], "valid": [], "test": []}
    size = np.bincount([u for u, _, _ in rows])
    place = np.empty(len(rows))
    shuffled = np.argsort([rows[n][0] for n in order], kind="stable")  # a user's rows in the order of the file
    for user, numbers in enumerate(np.split(order[shuffled], np.cumsum(size)[:-1])):
        place[numbers] = np.arange(size[user]) / size[user]
    for n in order:
        _, item, time = rows[n]
        if first_cold <= item < end:
            parts[("valid", "test")[time % 2]].append(n)
        else:
            parts["train" if place[n] < EARLIER else "valid" if place[n] < LATER else "test"].append(n)
    return parts


def write_lines(path, lines):
    """Write UTF-8 lines that end in a line feed everywhere."""
    path.write_bytes(("\n".join(lines) + "\n").encode())


def digest(folder):
    """Sha256 over names and contents of a folder's files."""
    found = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


# ------------------------------------------------------------------ encoder


def write_encoder(folder, *, hidden=16, layers=1, heads=2, inner=32, positions=24, seed=7):
    """A small BERT with random weights and a tokenizer of whole words, as a local Hugging Face folder.

    Made of plain files and not by transformers, so that each version of it reads the same bytes.
    """
    from safetensors.numpy import save_file

    rng, folder = _random(seed), Path(folder)
    folder.mkdir(parents=True)
    words = sorted({word for name, group in TOPICS.items() for word in (name, *group)} | {"a", "story", "of", "title"})
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}

    def normal(*shape, scale=None):
        scale = 0.6 / np.sqrt(shape[-1]) if scale is None else scale
        return np.round(rng.normal(scale=scale, size=shape), 4).astype(np.float32)

    tensors = {"embeddings.word_embeddings.weight": normal(len(vocabulary), hidden, scale=1.0)}
    tensors |= {"embeddings.position_embeddings.weight": normal(positions, hidden, scale=0.1)}
    tensors |= {"embeddings.token_type_embeddings.weight": normal(2, hidden, scale=0.1)}
    norms = ["embeddings"]
    for layer in (f"encoder.layer.{n}" for n in range(layers)):
        shapes = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        shapes |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (inner, hidden)}
        shapes |= {"output.dense": (hidden, inner)}
        for part, shape in shapes.items():
            tensors[f"{layer}.{part}.weight"], tensors[f"{layer}.{part}.bias"] = normal(*shape), normal(shape[0])
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    for part in norms:
        tensors[f"{part}.LayerNorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"{part}.LayerNorm.bias"] = np.zeros(hidden, np.float32)
    tensors["pooler.dense.weight"], tensors["pooler.dense.bias"] = normal(hidden, hidden), normal(hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"intermediate_size": inner, "max_position_embeddings": positions, "vocab_size": len(vocabulary)}
    rest = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2}
    rest |= {"layer_norm_eps": 1e-12, "pad_token_id": 0}
    special = {"[CLS]": 2, "[SEP]": 3}
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": t, **flags} for t, n in vocabulary.items() if t.startswith("[")],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [n], "tokens": [t]} for t, n in special.items()},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions, **names}
    for name, content in (("config", shape | rest), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        write_lines(folder / f"{name}.json", [json.dumps(content, indent=1 if name != "tokenizer" else None)])
    return folder
