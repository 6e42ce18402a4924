"""``made_data`` and ``golden_runs`` beside this file are importable from the tests here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
