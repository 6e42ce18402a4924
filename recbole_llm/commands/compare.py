"""``recbole-llm compare``: several models on one split."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recbole_llm.atomic import atomic_path, write_atomically
from recbole_llm.bridge.environment import versions
from recbole_llm.bridge.experiments.comparison import about_tests, as_json, as_markdown, as_rows, compare, draw
from recbole_llm.bridge.experiments.latex import as_latex
from recbole_llm.commands.pages import can_draw, say_if_not_drawn, settings_given, today
from recbole_llm.reporting.comparison_page import comparison_page, headline, verdict
from recbole_llm.reporting.document import write
from recbole_llm.spreadsheet import Workbook


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm compare``."""
    parser.add_argument("--models", "-m", required=True, help="names separated by commas: EASE,LightGCN,LLMTwoTower")
    parser.add_argument(
        "--dataset", "-d", default="ml-100k", help="ml-100k, or a folder of atomic files in --data-path"
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings per model on the same split")
    parser.add_argument("--metric", default=None, help="test metric to order and test by, such as ndcg@10")
    parser.add_argument(
        "--reference",
        default=None,
        help="the model the others are tested against; default: the best stock model by validation",
    )
    parser.add_argument("--config-files", default=None, help='YAML files, separated by spaces: "a.yaml b.yaml"')
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="write comparison.html, .xlsx, .tex, .md, .json and .png"
    )


def run_compare(options: argparse.Namespace, config_files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the command; 1 if no model finished."""
    models = [name.strip() for name in options.models.split(",") if name.strip()]
    if options.output:
        say_if_not_drawn("comparison.html and .png")
    quiet = [value for value in ("--show_progress=False", "--state=WARNING") if _key(value) not in map(_key, overrides)]
    found = compare(
        models,
        options.dataset,
        seeds=options.seeds,
        metric=options.metric,
        reference=options.reference,
        config_files=config_files,
        overrides=[*overrides, *quiet],
        progress=lambda text: print(text, flush=True),
    )
    said = "\n".join(filter(None, [headline(found), verdict(found)]))
    print(f"\n{said}\n\n{as_markdown(found)}\n\n{about_tests(found)}")
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "comparison.json", json.dumps(as_json(found), indent=2) + "\n")
        text = f"{as_markdown(found)}\n\n{about_tests(found)}\n"
        write_atomically(folder / "comparison.md", text)
        write_atomically(folder / "comparison.tex", as_latex(found) + "\n")
        header, rows = as_rows(found)
        with atomic_path(folder / "comparison.xlsx") as temporary, Workbook(temporary, header, "comparison") as book:
            for row in rows:
                book.append(row)
        if can_draw():
            draw(found, folder / "comparison.png")
            page = comparison_page(found, settings_given(config_files, overrides), versions(), today())
            write(page, folder / "comparison.html")
        print(f"written: {folder}")
    return 0 if any(not row.error for row in found.rows) else 1


def _key(override: str) -> str:
    return override.partition("=")[0]
