"""``recbole-llm quickstart``: two tables in, a report out, everything said."""

import csv
import random
import re
import shlex

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
from recbole_llm import cli


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Orders of 40 customers with times, and 20 products, one whose title is hostile (the import leaves its markup out)."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    with open("my orders.csv", "w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Order Date", "Customer ID", "SKU"])
        for customer in range(40):
            for day, item in enumerate(rng.sample(range(customer % 2 * 10, customer % 2 * 10 + 10), 8)):
                rows.writerow([f"2024-01-{day + 1:02d}T10:00:00", f"{customer:06d}", f"{item:05d}"])
    with open("products.csv", "w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["SKU", "Product Name"])
        for item in range(20):
            rows.writerow(
                [
                    f"{item:05d}",
                    'Pots & "pans" <script>alert(1)</script>' if item == 3 else f"product of kind {item % 2}",
                ]
            )
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_from_two_tables_to_a_report_in_one_command(shop, tiny_encoder, capfd):
    quick = [
        "--epochs=2",
        "--embedding-size=8",
        f"--encoder={tiny_encoder}",
        f"--feature-cache-dir={shop / 'features'}",
    ]
    assert cli.main(["quickstart", "my orders.csv", "products.csv", "--output", "out/r.html", "--gpu_id=", *quick]) == 0
    out, _ = capfd.readouterr()
    assert "320 rows read, 320 kept" in out and "Of 100 held-out purchases" in out
    assert "held out: 10% of each customer's purchases, the latest" in out
    assert "bestsellers reach" in out and "ItemKNN" in out
    text = (shop / "out" / "r.html").read_text()
    assert text.count('class="customer"') == 10 and "product of kind 1" in text
    assert "<script" not in text and "Pots &amp; &quot;pans&quot;" in text
    assert not re.search(r"\b0000\d\d\b", text), "ids of customers"
    # the commands that stand for it parse, and the import among them runs
    steps = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  recbole-llm ")]
    assert [step[0] for step in steps] == ["import", "run", "report"]
    assert cli.main(steps[0]) == 0
    # once more, without customers: the earlier import is made anew, and that is said
    capfd.readouterr()
    again = ["quickstart", "my orders.csv", "products.csv", "--no-customers", "--gpu_id=", *quick]
    (shop / "mine.yaml").write_text(
        "eval_args: {split: {RS: [0.6, 0.2, 0.2]}, order: RO, group_by: user, mode: full}\n"
    )
    assert cli.main([*again, "--config-files", "mine.yaml"]) == 0
    out, _ = capfd.readouterr()
    assert "made anew" in out
    assert "held out: 20% of each customer's purchases, chosen at random" in out, "the file's split counts"
    (by_hand,) = [shlex.split(line) for line in out.splitlines() if line.startswith("  recbole-llm run")]
    files = shlex.split(by_hand[by_hand.index("--config-files") + 1])
    assert files == ["dataset/my-orders/my-orders.yaml", "mine.yaml"]
    assert 'class="customer"' not in (shop / "report.html").read_text()


def test_names_of_files_become_names_of_datasets():
    from recbole_llm.commands.quickstart import _name_of

    assert _name_of("a/my orders.csv") == "my-orders"
    assert _name_of("orders.csv.gz") == "orders"
    assert _name_of("2024.orders.jsonl.gz") == "2024.orders"
    assert _name_of("---.csv") == "data"
