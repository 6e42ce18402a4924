"""Figures and pictures of the documentation are those of the committed result files; versions agree; links lead to files."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import recbole_llm

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / name for name in ("README.md", "kernels/README.md", ".github/CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def generator(name):
    path = ROOT / "docs" / "generator" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


pictures = generator("pictures")


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_drawn_from_the_result_files(name):
    assert (ROOT / name).read_text() == pictures.PICTURES[name]()


def test_the_table_of_the_kernels_is_that_of_the_result_file():
    text = (ROOT / "kernels" / "README.md").read_text()
    assert "\n".join(pictures.kernel_table()) in text
    rows = {name: factors for name, *factors in pictures.kernel_rows()}
    entries = json.loads((RESULTS / "kernel_speed.json").read_text())["entries"]
    (one,) = (e for e in entries if e["operator"] == "catalog_bce" and e["shape"]["N"] == 200_000 and e["threads"] == 1)
    assert rows["catalog_bce, 2,048 x 200,000"][0] == one["variants"]["eager"]["ours_is_faster_by"]


def test_what_is_said_of_competitors_is_in_the_result_file():
    """The sentence below the table of kernels/README.md."""
    entries = {(e["operator"], e["shape"].get("ids", ""), e["threads"], e["shape"].get("N", 0)): e["variants"]
               for e in json.loads((RESULTS / "kernel_speed.json").read_text())["entries"]
               if e["operator"] != "pair_bce" or (e["shape"]["P"] == 65536 and e["shape"]["n"] == 100_000)}  # fmt: skip
    text = re.sub(r"\s+", " ", (ROOT / "kernels" / "README.md").read_text())
    faster = entries["pair_bce", "", 1, 0]["torch.compile"]["ours_is_faster_by"]
    slower = entries["pair_bce", "zipf", 1, 0]["torch.compile"]["ours_is_faster_by"]
    assert f"{faster - 1:.0%} slower than ours on one thread, and {1 - slower:.0%} faster" in text
    ce = entries["catalog_ce", "", 1, 200_000]
    best, lean = ce["linear_cross_entropy 256 rows"], ce["linear_cross_entropy 64 rows"]
    memory = best["ours_takes_less_memory_by"]["allocated"]
    assert (
        f"takes {best['ours_is_faster_by']:.1f} times as long as `catalog_ce` in {memory:.1f} times the memory" in text
    )
    assert f"and {lean['ours_is_faster_by']:.1f} times as long in the same memory" in text


def test_the_table_of_models_is_that_of_the_result_files():
    """docs/quality-and-speed.md: every cell of the first table, to the four digits that it shows."""
    text = (ROOT / "docs" / "quality-and-speed.md").read_text()
    head, *rows = re.search(r"\| NDCG@10 \|.*\n\|[-|]+\n(?:\|.*\n)+", text)[0].splitlines()
    columns = [tuple(cell.split()) for cell in head.strip("|").split("|")[1:]]
    checked = 0
    for row in rows[1:]:
        model, *cells = (cell.strip(" *") for cell in row.strip("|").split("|"))
        for (dataset, seed), cell in zip(columns, cells, strict=True):
            if cell:
                assert float(cell) == pytest.approx(measured(dataset, int(seed), model), abs=5.1e-5), (
                    model,
                    dataset,
                    seed,
                )
                checked += 1
    assert checked > 70


def test_what_was_found_of_stock_models_stands_below_their_table(capsys):
    """benchmarks/results/stock_models.md, which docs/quality-and-speed.md and tests/bridge/test_stock_models_right.py name."""
    path = ROOT / "benchmarks" / "stock_models.py"
    specification = importlib.util.spec_from_file_location("stock_models", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.report(str(RESULTS / "stock_models.json"), str(RESULTS / "stock_models-old-stack.json"))
    assert (RESULTS / "stock_models.md").read_text() == capsys.readouterr().out
    assert module.ASSESSED


def measured(dataset, seed, model):
    files = [RESULTS / f"quality-{dataset}.json", RESULTS / f"quality-{dataset}-slim.json"]
    for file in reversed([file for file in files if file.exists()]):
        for split in json.loads(file.read_text())["splits"]:
            if split["split_seed"] != seed:
                continue
            if model == "Pop" and "pop_by_interactions" in split:
                return split["pop_by_interactions"]["ndcg@10"]
            if file.name.endswith("slim.json") and model != "SLIMElastic":
                continue
            for row in split["rows"]:
                if row["model"] == model:
                    return row["mean"]["ndcg@10"]
    raise AssertionError(f"no result of {model} on {dataset} {seed}")


def test_the_published_rows_are_those_of_the_code():
    from recbole_llm.reporting.published import PUBLISHED

    text = (ROOT / "docs" / "table.md").read_text()
    rule = {True: "no place", False: "ranked too", None: "not told"}

    def cell(row, name):
        if name not in row.ndcg:
            return ""
        recall = f" ({row.recall[name]:.4f})".replace("0.", ".") if name in row.recall else ""
        return f"{row.ndcg[name]:.4f}".removeprefix("0") + recall

    for row in PUBLISHED:
        cells = [row.method, *(cell(row, name) for name in ("beauty", "sports", "toys")), rule[row.masked], row.source]
        assert f"| {' | '.join(cells)} |" in text


def test_the_measured_rows_of_the_table_are_those_of_the_result_file():
    text = (ROOT / "docs" / "table.md").read_text()
    rows = json.loads((RESULTS / "next_item-amazon-beauty.json").read_text())["rows"]
    for row in rows:
        masked, unmasked = row["figures"]["masked"], row["figures"]["unmasked"]
        values = [*(masked[m] for m in ("recall@5", "ndcg@5", "recall@10", "ndcg@10"))]
        values += [unmasked["recall@10"], unmasked["ndcg@10"]]
        name = row["row"] + ("" if row["seed"] is None else f", seed {row['seed']}")
        cells = " | ".join([name, row["chosen_by"] or "none", *(f"{v:.4f}".removeprefix("0") for v in values)])
        assert f"| {cells} |" in text
    assert text.count("| .") >= len(rows) > 0


def test_the_rows_of_the_command_are_those_of_its_file():
    text = (ROOT / "docs" / "table.md").read_text()
    measured = json.loads((RESULTS / "leaderboard-amazon-beauty.json").read_text())["measured"]
    for row in measured:
        masked, unmasked = row["figures"]["masked"], row["figures"]["unmasked"]
        values = [*(masked[m] for m in ("recall@5", "ndcg@5", "recall@10", "ndcg@10"))]
        values += [unmasked["recall@10"], unmasked["ndcg@10"]]
        cells = [row["name"], *(f"{v:.4f}".removeprefix("0") for v in values), str(round(row["cpu_seconds"]))]
        assert f"| {' | '.join(cells)} |" in text
    assert len(measured) >= 8


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == recbole_llm.__version__
    assert f"({recbole_llm.__version__})" in (ROOT / "CHANGELOG.md").read_text()
    cited = (ROOT / "docs" / "researchers.md").read_text()
    assert f"version = {{{recbole_llm.__version__}}}" in cited
    assert f"author  = {{{{{citation['authors'][0]['name']}}}}}" in cited


def test_the_changelog_and_the_readme_name_every_command():
    from recbole_llm.cli import COMMANDS

    (line,) = (line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("- Commands:"))
    assert set(re.findall(r"`(\w+)`", line)) == set(COMMANDS)
    assert set(re.findall(r"^\| `recbole-llm (\w+)`", (ROOT / "README.md").read_text(), re.M)) == set(COMMANDS)


def test_every_extra_is_named_where_it_is_needed():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "README.md").read_text()
    missing = [
        extra
        for extra in extras
        if extra not in ("bench", "dev", "fuzz") and f"`{extra}`" not in text and f"[{extra}]" not in text
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    """In a checkout; what exists in the site alone is linked by docs/generator/hooks.py."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def headings(page):
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    words = (re.sub(r"[^\w\s-]", "", line.strip().lower()) for line in re.findall(r"^#+ (.+)$", text, re.M))
    return {re.sub(r"\s+", "-", heading) for heading in words}


def test_a_link_that_the_site_serves_better_leads_to_its_page():
    pytest.importorskip("mkdocs")
    hooks = generator_with_pages("hooks")
    page = type("Page", (), {"file": type("File", (), {"src_uri": "researchers.md"})})
    text = "[a](../README.md#commands) [b](../recbole_llm/properties/LLMTwoTower.yaml) [c](../README.md#limits)"
    told = hooks.on_page_markdown(text, page, {}, None)
    assert told == "[a](command-line.md) [b](keys.md) [c](index.md#limits)"
    told = hooks.on_page_markdown("[e](../examples/own_data.ipynb)", page, {}, None)
    assert told == "[e](examples/own_data.md)"
    page.file.src_uri = "keys.md"  # which names the file itself
    told = hooks.on_page_markdown("[d](../recbole_llm/properties/LLMTwoTower.yaml)", page, {}, None)
    assert told == "[d](repository/recbole_llm/properties/LLMTwoTower.yaml)"


def test_examples_of_docstrings_are_shown_as_code():
    """griffe takes the section's name in the singular for prose."""
    griffe = pytest.importorskip("griffe")
    extension = generator("docstring_examples").Examples()
    text = "Do it.\n\nExample:\n    >>> 1 + 1\n    2"
    function = griffe.Function("f", docstring=griffe.Docstring(text))
    extension.on_object(obj=function)
    *_, section = griffe.parse_google(function.docstring)
    assert section.kind.value == "examples" and section.value[0][1] == ">>> 1 + 1\n2"
    extension.on_object(obj=griffe.Function("g"))  # without a docstring


def generator_with_pages(name):
    """A part of docs/generator that imports its neighbours; sys.path and sys.modules are left as found."""
    path, modules = list(sys.path), set(sys.modules)
    try:
        return generator(name)
    finally:
        sys.path[:] = path
        for added in {"pages"} & (set(sys.modules) - modules):
            del sys.modules[added]


def test_examples_are_pages_of_the_site_with_what_they_say():
    pages = generator("pages")
    text = pages.PAGES["examples/own_data.md"]()
    book = json.loads((ROOT / "examples" / "own_data.ipynb").read_text())
    for cell in book["cells"]:
        assert "".join(cell["source"]) in text
        for output in cell.get("outputs", ()):
            assert "".join(output["text"]).rstrip() in text
    assert text.count("```python\n") == sum(cell["cell_type"] == "code" for cell in book["cells"])
    assert (ROOT / "examples" / "subclass.py").read_text().rstrip() in pages.PAGES["examples/subclass.md"]()
    listed = (ROOT / "docs" / "generator" / "mkdocs.yml").read_text()
    assert all(re.search(rf": {re.escape(page)}$", listed, re.M) for page in pages.OF_EXAMPLES.values())


@pytest.mark.parametrize("folder", ["docs", "docs/decisions"])
def test_every_page_is_in_the_navigation_of_the_site(folder):
    listed = (ROOT / "docs" / "generator" / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / folder).glob("*.md")]
    assert pages and not [page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", listed, re.M)]


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if "://" not in link and not link.startswith("#")
    }
    assert not [page for page in PAGES if page.name not in ("README.md", "CONTRIBUTING.md") and page not in linked]


def test_every_result_file_has_its_command():
    """docs/quality-and-speed.md: a row for each kind of result file, and a script that is there."""
    text = (ROOT / "docs" / "quality-and-speed.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| `") and ".json` |" in row]
    named = {name: row for row in rows for name in re.findall(r"`([\w-]+)\.json`", row.split("|")[1])}
    assert "stages" in named
    known = {name.partition("-NAME")[0] for name in named}
    for path in RESULTS.glob("*.json"):
        assert any(path.stem == name or path.stem.startswith(f"{name}-") for name in known), path.name
    for name, row in named.items():
        if re.search(r"\| `recbole-llm leaderboard ", row):
            continue  # a command of the package
        scripts = re.findall(r"python ((?:benchmarks|tests)/[\w/]+\.py)", row)
        assert scripts and all((ROOT / script).is_file() for script in scripts), row
        stem = name.partition("-NAME")[0]
        writes = [(ROOT / script).read_text() for script in scripts]
        assert f"{stem}.json" in row.split("|")[2] or any(stem in text for text in writes), row


def test_the_readme_is_short():
    """About 900 words of prose and tables; code is not counted."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    words = re.findall(r"[A-Za-z][\w'-]*", re.sub(r"\]\([^)]*\)", "", text))
    assert 500 < len(words) < 920
