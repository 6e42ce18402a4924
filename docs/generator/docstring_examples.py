"""Show the examples of docstrings as code. griffe knows the section as ``Examples:``, and takes ``Example:`` for a box of prose."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section while the sources are read; the docstrings themselves stay."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one module, class or function."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
