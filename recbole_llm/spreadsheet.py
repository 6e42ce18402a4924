"""A worksheet for Excel, written row by row: ids keep their zeros, texts are texts in every language's settings.

CSV opened by a double click loses leading zeros, reads ``;`` or ``,`` by the country it is in, and runs a cell that begins with
``=``. A workbook has none of that. The format is that of ECMA-376, with texts inline.
"""

import math
import re
import zipfile
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.sax.saxutils import escape

MOST_ROWS = 1_048_576  # of a worksheet, the header included
MOST_CHARACTERS = 32_767  # of a cell
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPE}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_RELATION}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_RELATION}"><sheets>'
    '<sheet name="{name}" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_RELATION}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


class Workbook:
    """A workbook of one worksheet; to be closed, or used in a ``with``.

    Args:
        path: the file, overwritten.
        header: names of the columns.
        name: of the worksheet, letters alone.
    """

    def __init__(self, path: Path, header: Sequence[str], name: str = "recommendations") -> None:
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
        for part, content in _PARTS.items():
            self._archive.writestr(part, _HEAD + content.replace("{name}", name))
        self._sheet = self._archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True)
        self._write(f'{_HEAD}<worksheet xmlns="{_MAIN}"><sheetData>')
        self._rows = 0
        self.append(header)

    def append(self, cells: Sequence[Any]) -> None:
        """Add a row of texts, numbers, truths and ``None``.

        Raises:
            ValueError: if the worksheet is full or a text too long for a cell.
        """
        if self._rows == MOST_ROWS:
            raise ValueError(f"a worksheet holds {MOST_ROWS - 1:,} rows, and there are more: write .csv or .parquet.")
        self._rows += 1
        self._write(f"<row>{''.join(map(_cell, cells))}</row>")

    def write(self, row: Any) -> None:
        """Add the values of an object's fields as a row."""
        self.append(list(vars(row).values()))

    def close(self) -> None:
        """End the worksheet and the file."""
        self._write("</sheetData></worksheet>")
        self._sheet.close()
        self._archive.close()

    def __enter__(self) -> "Workbook":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, text: str) -> None:
        self._sheet.write(text.encode())


def _cell(value: Any) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, bool):
        return f'<c t="b"><v>{int(value)}</v></c>'
    if isinstance(value, Real):
        number = int(value) if isinstance(value, int) else float(value)
        return f"<c><v>{number!r}</v></c>" if math.isfinite(number) else "<c/>"
    text = str(value)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"a cell of a worksheet holds {MOST_CHARACTERS:,} characters, and {text[:40]!r}... has {len(text):,}: write .csv."
        )
    return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(_NOT_IN_XML.sub("�", text))}</t></is></c>'
