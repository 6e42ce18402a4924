"""Fixtures of importing; ``made_files`` beside this file is importable from its tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_files import HEADER, ITEMS, ROWS, read, write_csv


@pytest.fixture
def files(tmp_path):
    """CSV files of the rows above."""
    inter = write_csv(tmp_path / "inter.csv", HEADER, ROWS)
    items = write_csv(tmp_path / "items.csv", list(ITEMS[0]), [list(item.values()) for item in ITEMS])
    return inter, items


@pytest.fixture
def run(tmp_path):
    """Import text as CSV with the dataset name x; gives the report and the rows written."""

    def go(text, items=None, **options):
        source = tmp_path / "given.csv"
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
        from recbole_llm.importer import import_dataset

        report = import_dataset(source, "x", items=items, data_path=tmp_path / "out", overwrite=True, **options)
        table = report.interactions
        assert table.rows_read == table.rows_kept + sum(table.dropped.values())
        assert len(read(tmp_path / "out")) == table.rows_kept + 1
        return report, read(tmp_path / "out")

    return go
