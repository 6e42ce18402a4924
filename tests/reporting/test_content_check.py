"""The part of a report that lists items whose content and behaviour disagree."""

from pathlib import Path

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.checkpoints import load_run
from recbole_llm.fitting import disagreement
from recbole_llm.reporting.content_check import ContentCheck, check_content, section
from recbole_llm.reporting.trained import of_loaded

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_list_is_a_table_and_titles_are_no_markup():
    check = ContentCheck("text", 1200, 30, 0.71, 0.5, (("i1", "<script>x</script>", 0.12), ("i2", "i2", 0.3)))
    lines = "\n".join(section([check]))
    assert "<script>" not in lines and "&lt;script&gt;x&lt;/script&gt; (i1)" in lines
    assert "30 of 1,200 items agree no better" in lines and "(below 0.50; the item in the middle has 0.71)" in lines
    assert "<td>i2</td><td>0.30</td>" in lines
    assert section([]) == []


def test_the_report_lists_what_agrees_least(run_config, toy_path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(disagreement, "NEIGHBOURS", 6)  # eleven items of a topic
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    for file in (toy_path / "toy").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lines = (folder / "toy.item").read_text().splitlines()
    kinds = ["space", "farm", "sea", "crime"]
    lines = [lines[0] + "\tkind:token", *(f"{line}\t{kinds[at % 4]}" for at, line in enumerate(lines[1:]))]
    lines[9] = lines[9].replace("space", "farm")  # one item of a wrong kind
    (folder / "toy.item").write_text("\n".join(lines) + "\n")
    config = run_config | {"data_path": str(tmp_path / "data"), "encoder": "", "item_columns": ["kind"], "epochs": 1}
    run_recbole("LLMTwoTower", "toy", config_dict=dict(config))
    (file,) = [path for path in Path(config["checkpoint_dir"]).glob("*.pth") if "-last" not in path.name]
    (check,) = check_content(of_loaded(load_run(file, data_path=config["data_path"])))
    assert check.modality == "column_kind" and check.items == 44
    values = [value for *_, value in check.first]
    assert values == sorted(values) and 0 < len(values) <= check.suspects and max(values) < check.threshold
    assert check.median > check.threshold
    output = tmp_path / "report.html"
    options = [f"--data-path={config['data_path']}", "--output", str(output), "--customers", "1"]
    assert cli.main(["report", str(file), *options]) == 0
    page = output.read_text()
    assert "<h2>Content and behaviour</h2>" in page and f"({check.first[0][0]})" in page
