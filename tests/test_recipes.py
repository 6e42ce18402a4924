"""The recipes in configs/: the command in their second line imports files of that shape, and their settings run."""

import argparse
import csv
import json
import random
import shlex
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra 'import'")

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["space", "star", "rocket", "alien", "planet", "farm", "cow", "barn", "sea", "ship", "whale", "storm", "crime"]


def sentence(rng, words=4):
    return " ".join(rng.choices(WORDS, k=words))


def write(path, header, rows):
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **style).writerows([header, *rows])


def interactions(rng, users=24, items=18, per_user=8):
    for user in range(users):
        for n, item in enumerate(rng.sample(range(items), per_user)):
            yield f"U{user}", f"I{item}", rng.randint(1, 5), 1_573_000_000 + 1000 * user + n


def amazon_office(folder, rng):
    rows = [(item, user, float(rating), when) for user, item, rating, when in interactions(rng)]
    write(folder / "reviews.csv", ["asin", "reviewerID", "overall", "unixReviewTime"], rows)
    about = [f'11" x 17", {sentence(rng, 9)}' for _ in range(18)]
    products = [(f"I{n}", f"<b>{sentence(rng)}</b>", "Acme", "Office, Paper", about[n]) for n in range(18)]
    write(folder / "products.csv", ["asin", "title", "brand", "categories", "description"], products)


def ml_100k(folder, rng):
    write(folder / "ratings.csv", ["user_id", "item_id", "rating", "timestamp"], interactions(rng))
    movies = [(f"I{n}", sentence(rng).title(), 1980 + n, "Action Crime" if n % 2 else "Comedy") for n in range(18)]
    write(folder / "movies.csv", ["item_id", "movie_title", "release_year", "class"], movies)
    viewers = [(f"U{n}", 20 + n, "F", "writer") for n in range(24)]
    write(folder / "viewers.csv", ["user_id", "age", "gender", "occupation"], viewers)


def ml_1m_text(folder, rng):
    write(folder / "ratings.csv", ["UserID", "MovieID", "Rating", "Timestamp"], interactions(rng))
    titles = [f"{sentence(rng, 2).title()} ({1980 + n})" for n in range(18)]
    movies = [(f"I{n}", titles[n], "Drama War", f"A film about {sentence(rng)}.") for n in range(18)]
    write(folder / "movies.csv", ["MovieID", "movie_title", "genres", "summary"], movies)


def mind_style(folder, rng):
    rows = [(user, item, when, int(rating > 1)) for user, item, rating, when in interactions(rng, per_user=12)]
    write(folder / "impressions.tsv", ["user_id", "news_id", "time", "clicked"], rows)
    news = [(f"I{n}", "sports", "golf", f'"{sentence(rng)}', f'He said "{sentence(rng)}"') for n in range(18)]
    write(folder / "news.tsv", ["news_id", "category", "subcategory", "title", "abstract"], news)


def lastfm_style(folder, rng):
    rows = [(user, item, 100 * rating) for user, item, rating, _ in interactions(rng)]
    write(folder / "user_artists.tsv", ["userID", "artistID", "weight"], rows)
    artists = [(f"I{n}", f"The {sentence(rng, 1).title()}s", "http://x.y/z", "rock, indie") for n in range(18)]
    write(folder / "artists.tsv", ["id", "name", "url", "tags"], artists)


SHAPES = {
    "amazon-office": amazon_office,
    "ml-100k": ml_100k,
    "ml-1m-text": ml_1m_text,
    "mind-style": mind_style,
    "lastfm-style": lastfm_style,
}


def test_there_is_a_test_for_every_recipe():
    assert {path.parent.name for path in (ROOT / "configs").glob("*/LLMTwoTower.yaml")} == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_recipe(name, tmp_path, monkeypatch, tiny_encoder, capsys):
    from recbole_llm.commands.import_ import add_arguments, run_import

    monkeypatch.chdir(tmp_path)
    SHAPES[name](tmp_path, random.Random(0))
    recipe = ROOT / "configs" / name / "LLMTwoTower.yaml"
    command = shlex.split(recipe.read_text().split("\n")[1].removeprefix("# recbole-llm import "))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args([*command, "--quiet"])
    assert run_import(options) == 0
    report = json.loads((tmp_path / "dataset" / options.dataset / "import_report.json").read_text())
    assert report["interactions"]["rows_kept"] > 150
    assert report["items"]["rows_kept"] == 18
    assert report["items"]["without_text"] == 0

    import yaml
    from recbole.quick_start import run_recbole

    from recbole_llm.content.text import Template, read_atomic_table

    table = read_atomic_table(tmp_path / "dataset" / options.dataset / f"{options.dataset}.item", "item_id")
    settings = yaml.safe_load(recipe.read_text())
    first = {column: cells[0] for column, cells in table.columns.items()}
    text = Template(settings["item_text_template"]).render(first)
    assert all(first[field] in text for field in settings["item_text_fields"])
    files = [str(tmp_path / "dataset" / options.dataset / f"{options.dataset}.yaml"), str(recipe)]
    quick = {
        "encoder": str(tiny_encoder),
        "feature_cache_dir": str(tmp_path / "features"),
        "checkpoint_dir": str(tmp_path / "saved"),
        "gpu_id": "",
        "epochs": 2,
        "embedding_size": 8,
        "train_batch_size": 16,
        "show_progress": False,
        "state": "WARNING",
    }
    result = run_recbole("LLMTwoTower", options.dataset, config_file_list=files, config_dict=quick)
    assert 0 < result["test_result"]["recall@10"] <= 1
