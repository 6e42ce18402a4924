"""The figures of docs/pictures.md are those of the result file."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_cold_items_is_that_of_the_result_file():
    result = json.loads((ROOT / "benchmarks" / "results" / "pictures-ml-1m-posters.json").read_text())
    text = (ROOT / "docs" / "pictures.md").read_text()
    cold = result["cold"]
    for share, name in ((0, "none"), (0.5, "half"), (0.7, "seven tenths")):
        found = cold[f"texts_missing_{share:g}"]
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.M)
        cells = row.split(" | ")
        assert [float(cell) for cell in cells[:3]] == [
            round(found[kind]["ndcg@10"], 3) for kind in ("text", "image", "both")
        ]
        gain = found["both"]["ndcg@10"] / found["text"]["ndcg@10"] - 1
        assert abs(float(cells[3].split("%")[0]) / 100 - gain) < 0.001
        better = [a > b for a, b in zip(found["both"]["by_draw"], found["text"]["by_draw"], strict=True)]
        assert cells[4] == f"{sum(better)} of 3"
    encode = result["encode"]
    assert f"took {encode['image_cpu_seconds']:.0f} processor seconds" in text
    assert f"{encode['items_with_a_picture']:,} posters" in text and f"{cold['hidden_items']} of them" in text


def test_the_table_of_columns_is_that_of_the_result_files():
    text = (ROOT / "docs" / "sounds-and-columns.md").read_text()
    for name in ("ml-100k", "amazon-office"):
        result = json.loads((ROOT / "benchmarks" / "results" / f"item-columns-{name}.json").read_text())
        cold, warm = result["cold"], result["warm"]
        (row,) = re.findall(rf"^\| {name}, hidden items \| (.*) \|$", text, re.M)
        _, alone, both, difference, draws = row.split(" | ")
        assert (float(alone), float(both)) == (cold["text"]["ndcg@10"], cold["both"]["ndcg@10"])
        gain, value, error = re.fullmatch(r"([+-][\d.]+)% \(([+-][\d.]+) ± ([\d.]+)\)", difference).groups()
        assert abs(float(gain) / 100 - cold["gain"]) < 0.0006
        assert abs(float(value) - cold["both_against_text"]["difference"]) < 0.00006
        assert abs(float(error) - cold["both_against_text"]["standard_error"]) < 0.00006
        assert draws == f"{cold['draws_with_a_gain']} of 3"
        (row,) = re.findall(rf"^\| {name}, items with interactions \| (.*) \|$", text, re.M)
        assert [float(cell) for cell in row.split(" | ")[1:3]] == [warm[kind]["ndcg@10"] for kind in ("text", "both")]
        assert "column_" not in warm["both"]["setting"]


def test_what_is_said_of_swapped_texts_is_in_the_result_files():
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "sounds-and-columns.md").read_text())
    said = {}
    for name in ("ml-100k", "amazon-office"):
        said[name] = json.loads((ROOT / "benchmarks" / "results" / f"disagreement-{name}.json").read_text())
    auc = [f"{result['auc']:.3f}".removeprefix("0") for result in said.values()]
    assert f"(AUC) is {auc[0]} on ml-100k and {auc[1]} on amazon-office" in text
    first = [[draw["swapped_among_first_ten"] for draw in result["draws"]] for result in said.values()]
    listed = [f"{a}, {b} and {c}" for a, b, c in first]
    assert f"listed first {listed[0]}, and {listed[1]}, had" in text
    others = [max(draw["below_threshold"]["others"] for draw in result["draws"]) for result in said.values()]
    assert f"are {others[0]:.0%} and up to {others[1]:.0%} of the items" in text
