"""``recbole-llm tune``: a search of hyper-parameters on validation, resumable."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recbole_llm.atomic import write_atomically
from recbole_llm.bridge.environment import versions
from recbole_llm.bridge.experiments.tuning import ALGORITHMS, line_of, name_of, ranked, tune
from recbole_llm.commands.pages import can_draw, say_if_not_drawn, settings_given, today


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm tune``."""
    parser.add_argument("--model", "-m", default="LLMTwoTower", help="LLMTwoTower or any model of RecBole")
    parser.add_argument(
        "--dataset", "-d", default="ml-100k", help="ml-100k, or a folder of atomic files in --data-path"
    )
    parser.add_argument("--params-file", required=True, help="the space, such as configs/ml-100k/LLMTwoTower.hyper")
    parser.add_argument("--algo", default="exhaustive", choices=ALGORITHMS, help="how the space is searched")
    parser.add_argument("--max-evals", type=int, default=20, help="trials of random and bayes")
    parser.add_argument("--early-stop", type=int, default=10, help="trials without progress that end the search")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time (random, exhaustive)")
    parser.add_argument("--search-seed", type=int, default=0, help="of the search")
    parser.add_argument("--config-files", default=None, help='YAML files, separated by spaces: "a.yaml b.yaml"')
    parser.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="gets the trials and tuning.html, .json and .md; started again, the search goes on there",
    )


def run_tune(options: argparse.Namespace, config_files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the command; 1 if no trial finished."""
    output = Path(options.output or f"tuning/{options.dataset}-{options.model}-{options.algo}")
    say_if_not_drawn("tuning.html")
    quiet = [v for v in ("--show_progress=False", "--state=WARNING") if not any(o.startswith(v[:8]) for o in overrides)]
    trials = tune(
        options.model,
        options.dataset,
        options.params_file,
        algorithm=options.algo,
        max_evals=options.max_evals,
        early_stop=options.early_stop,
        workers=options.workers,
        output=output,
        config_files=config_files,
        overrides=[*overrides, *quiet],
        seed=options.search_seed,
        progress=lambda text: print(text, flush=True),
    )
    table = ranked(list({name_of(t.params): t for t in trials}.values()))
    lines = [f"| {'valid':>8} | setting |", "|---:|---|"]
    lines += [
        f"| {'failed' if t.score is None else f'{t.score:.4f}'} | {line_of(t).rsplit(': ', 1)[0]} |" for t in table
    ]
    print("\n" + "\n".join(lines))
    best = table[0]
    if best.score is not None:
        print(f"\nbest by validation: {line_of(best)}\nits test metrics: {best.test}")
    report = {"trials": [vars(t) for t in table], "versions": versions()}
    write_atomically(output / "tuning.json", json.dumps(report, indent=2) + "\n")
    write_atomically(output / "tuning.md", "\n".join(lines) + "\n")
    if can_draw():
        from recbole_llm.reporting.document import write
        from recbole_llm.reporting.tuning_page import tuning_page

        given = settings_given(config_files, overrides)
        page = tuning_page(options.model, options.dataset, trials, options.algo, given, versions(), today())
        write(page, output / "tuning.html")
    print(f"written: {output}")
    return 0 if best.score is not None else 1
