"""``recbole-llm info``: versions, device, repairs and caches."""

import argparse
import json

from recbole_llm.commands.output import json_ready


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recbole-llm info``."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--cache", action="store_true", help="only the stored vectors, encoder by encoder")
    parser.add_argument("--prune", type=float, metavar="DAYS", help="remove vectors that no run used for so many days")
    parser.add_argument("--feature-cache-dir", default=None, metavar="DIR", help="another cache than the user's")


def run_info(options: argparse.Namespace) -> int:
    """Run ``recbole-llm info``; gives the exit code."""
    if options.json and (options.cache or options.prune is not None):
        raise ValueError(
            "--json is of versions and devices: leave it out with --cache and --prune, or leave these out."
        )
    if options.feature_cache_dir is not None and not options.cache and options.prune is None:
        raise ValueError("--feature-cache-dir belongs to --cache and --prune; give one of them.")
    if options.cache or options.prune is not None:
        from recbole_llm.content.store.upkeep import prune, store_info

        if options.prune is not None:
            print("\n".join(prune(options.feature_cache_dir, unused_days=options.prune).lines()))
        stored = [encoder.line() for encoder in store_info(options.feature_cache_dir)]
        print("\n".join(stored) or "no stored vectors")
        return 0
    from recbole_llm.bridge.environment import environment, render

    report = environment()
    print(json.dumps(json_ready(report), indent=2) if options.json else render(report))
    return 0
