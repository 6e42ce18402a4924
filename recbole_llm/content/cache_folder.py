"""Where this package keeps what it has made once."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder ``recbole_llm`` in the user's cache folder, as the platform has it."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "recbole_llm"
