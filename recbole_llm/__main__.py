"""``python -m recbole_llm X``: a command of ours, or a script that runs unchanged on today's stack."""

import os
import sys

if __name__ == "__main__":
    from recbole_llm.cli import COMMANDS, main

    target = sys.argv[1] if len(sys.argv) > 1 else None
    if target is not None and target not in COMMANDS and not target.startswith("-"):
        if not os.path.isfile(target):
            raise SystemExit(
                f"python -m recbole_llm: {target!r} is neither a command nor an existing file.\n"
                f"Commands: {', '.join(COMMANDS)}.\n"
                "A file is run as a script: python -m recbole_llm run_recbole.py --model=BPR"
            )
        from recbole_llm.commands.script import run_script

        run_script(target, sys.argv[1:])
    else:
        sys.exit(main())
