"""A made dataset whose texts and interactions agree."""

import random

TOPICS = {
    "space": ["star", "rocket", "alien", "planet", "moon"],
    "farm": ["cow", "tractor", "barn", "field", "hay"],
    "sea": ["ship", "whale", "island", "storm", "harbour"],
    "crime": ["detective", "murder", "heist", "police", "alibi"],
}


def write_dataset(folder, name="toy", n_users=60, n_items=48, per_user=14, seed=0):
    """RecBole atomic files in ``folder/name``: each user likes one topic, each item's title is made of its topic's words.

    The last four items have no interaction; item i7 has no text.
    """
    rng = random.Random(seed)
    topics = list(TOPICS)
    target = folder / name
    target.mkdir(parents=True)
    kind = {i: topics[i % len(topics)] for i in range(n_items)}
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for u in range(n_users):
        liked = topics[u % len(topics)]
        pool = [i for i in range(n_items - 4) if kind[i] == liked] * 4 + list(range(n_items - 4))
        seen = []
        while len(seen) < per_user:
            i = rng.choice(pool)
            if i not in seen:
                seen.append(i)
        lines += [f"u{u}\ti{i}\t{rng.randint(1, 5)}\t{1000 * u + t}" for t, i in enumerate(seen)]
    (target / f"{name}.inter").write_text("\n".join(lines) + "\n")
    items = ["item_id:token\ttitle:token_seq\tyear:float"]
    for i in range(n_items):
        words = " ".join(rng.choices(TOPICS[kind[i]], k=4))
        items.append(f"i{i}\t{'' if i == 7 else f'A {kind[i]} story of {words}'}\t{1980 + i}")
    (target / f"{name}.item").write_text("\n".join(items) + "\n")
    users = ["user_id:token\tbio:token_seq"]
    users += [f"u{u}\tlikes {topics[u % len(topics)]} and {rng.choice(TOPICS[topics[u % 4]])}" for u in range(n_users)]
    (target / f"{name}.user").write_text("\n".join(users) + "\n")
    return folder


def config_of_media(folder, modality, encoder):
    """Keys of a short training on ``folder``/data whose items are described by one modality and by no text."""
    return {
        "data_path": str(folder / "data"),
        "encoder": "",
        "item_modalities": {modality: {"encoder": encoder}},
        "feature_cache_dir": str(folder / "features"),
        "checkpoint_dir": str(folder / "saved"),
        "gpu_id": "",
        "epochs": 1,
        "embedding_size": 8,
        "show_progress": False,
        "state": "WARNING",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
    }
