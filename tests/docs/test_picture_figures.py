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
