"""Search for inputs that end in an error nobody promised, guided by the branches that they reach.

    pip install -e '.[serve,fuzz]'
    python -m tests.fuzz.coverage exports CORPUS_FOLDER -max_total_time=600

The arguments after the target are libFuzzer's. The folder keeps the inputs that reached something new: the next search
begins there. An input that ends in another error is written as ``crash-...`` into the working directory, and the search
ends with an error code; ``python -m tests.fuzz.coverage exports crash-...`` runs that input alone.
"""

import sys
from pathlib import Path
from random import Random

INSTRUMENTED = ["recbole_llm", "torch._weights_only_unpickler", "torch.serialization"]
FORMED = 0.5  # share of the changes that leave an input in its form; the others are libFuzzer's, of bytes


def main() -> None:
    """Run one of the targets."""
    import atheris

    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz import targets

        if name not in targets.TARGETS:
            raise SystemExit(f"the target is {name!r}; expected one of {', '.join(targets.TARGETS)}.")
        made = targets.TARGETS[name]()  # it imports all that it runs: what comes later is not instrumented
    corpus = next((Path(one) for one in sys.argv[1:] if Path(one).is_dir()), None)
    with made as target:
        if corpus is not None and not any(corpus.iterdir()):
            for number, content in enumerate(target.seeds()):
                (corpus / f"seed-{number}").write_bytes(content)

        def mutate(content: bytes, most: int, seed: int) -> bytes:
            draw = Random(seed)
            changed = targets.mutated(target, content, most, draw) if draw.random() < FORMED else None
            return atheris.Mutate(content, most) if changed is None else changed

        # right inputs reach the same branches: all but the shortest would be left out
        atheris.Setup([*sys.argv, "-keep_seed=1"], target.run, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
