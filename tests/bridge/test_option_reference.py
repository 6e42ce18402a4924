"""The YAML file of defaults and the key reference are what the table of keys says."""

from pathlib import Path

import pytest

import recbole_llm

reference = pytest.importorskip("recbole_llm.bridge.option_reference")
options = pytest.importorskip("recbole_llm.bridge.options")


def test_the_yaml_file_is_the_one_written_from_the_table():
    file = Path(recbole_llm.__file__).parent / "properties" / "LLMTwoTower.yaml"
    assert file.read_text(encoding="utf-8") == reference.yaml_text()


def test_every_default_passes_its_own_check():
    for name, key in options.KEYS.items():
        key.read(name, key.default)


def test_the_key_reference_names_every_key_once():
    table = reference.markdown_table()
    assert [table.count(f"| `{name}` |") for name in options.KEYS] == [1] * len(options.KEYS)
