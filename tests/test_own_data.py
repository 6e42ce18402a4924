"""README, "your own data": from two CSV files to recommendations in four commands, as somebody who has just installed it."""

import csv
import random
import re

import pytest

pytest.importorskip("pyarrow", reason="the extra 'import'")
pytest.importorskip("recbole")

from recbole_llm import cli

KINDS = {
    "coffee": ["espresso", "grinder", "filter", "beans"],
    "garden": ["shovel", "seeds", "hose", "gloves"],
    "bike": ["helmet", "pump", "tyre", "chain"],
}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """``orders.csv`` and ``products.csv`` of a shop, in the working directory; nobody has bought the last three products."""
    rng, names = random.Random(3), list(KINDS)
    products, orders = [["sku", "name", "category", "description"]], [["customer_id", "sku", "ordered_at", "quantity"]]
    for n in range(48):
        kind = names[n % 3]
        words = rng.choices(KINDS[kind], k=3)
        products.append(
            [f"P{n:02d}", f"{words[0]} no. {n}", kind, f"<p>A {words[1]} that goes with any {words[2]}.</p>"]
        )
    for customer in range(60):
        for n in rng.sample(range(15), 8):
            kind = customer % 3 if rng.random() < 0.8 else rng.randrange(3)
            when = f"2026-{rng.randint(1, 9):02d}-{rng.randint(1, 28):02d} 10:30:00"
            orders.append([f"c{customer}", f"P{3 * n + kind:02d}", when, rng.randint(1, 3)])
    for name, rows in (("orders.csv", orders), ("products.csv", products)):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_four_commands(shop, tiny_encoder, capsys):
    def command(line, *more):
        capsys.readouterr()
        assert cli.main([*line.split(), *more]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    said = command("import orders.csv --items products.csv --dataset shop")
    assert "0 ids without text" in said and "ordered_at -> timestamp:float" in said
    assert "next: recbole-llm run --dataset shop --config-files dataset/shop/shop.yaml" in said
    small = [
        f"--encoder={tiny_encoder}",
        f"--feature_cache_dir={shop / 'features'}",
        "--gpu_id=",
        "--show_progress=False",
    ]
    said = command("encode --dataset shop --config-files dataset/shop/shop.yaml", *small)
    assert "items: 48 of 48 have a text vector of 32 dimensions" in said
    quick = ["--epochs=2", "--embedding_size=8"]
    paths = small[:2]  # of a checkpoint no path is taken; with the default encoder and cache there is none to give
    said = command("run --dataset shop --config-files dataset/shop/shop.yaml", *small, *quick)
    begins = "next: recbole-llm recommend "
    (next_command,) = [line.removeprefix(begins) for line in said.splitlines() if line.startswith(begins)]
    next_command = re.sub(r"--users \S+", "--users c17", next_command)
    assert next_command.startswith("saved/LLMTwoTower-") and "c17" in next_command
    table = command("recommend saved --users c17 --k 5", *paths)
    assert table.startswith("user c17\n") and len(table.splitlines()) == 7
    assert table == command(f"recommend {next_command} --k 5")

    assert "60 users written to recs.csv" in command("recommend saved --output recs.csv", *paths)
    bought = {(row[0], row[1]) for row in csv.reader(open("orders.csv"))}
    rows = list(csv.DictReader(open("recs.csv")))
    assert {row["user"] for row in rows} == {f"c{n}" for n in range(60)} and all(row["title"] for row in rows)
    assert not [row for row in rows if (row["user"], row["item"]) in bought]  # not even what was held out
    assert len(command("recommend saved --items P03 P06 --k 4", *paths).splitlines()) == 5
    assert len(command("recommend saved --k 4 --text", "a tyre for a bike", *paths).splitlines()) == 5
    assert len(command("similar saved --item P03 --k 4", *paths).splitlines()) == 5

    # a product that nobody has bought
    assert len(command("recommend saved --items P46 --k 4", *paths).splitlines()) == 5
    assert len(command("similar saved --item P46 --k 4", *paths).splitlines()) == 5
