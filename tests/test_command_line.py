"""The surface of the command line: help, examples, both spellings of options, ids without their zeros, files for Excel."""

import argparse
import math
import re
import shlex
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from recbole_llm import cli, spreadsheet
from recbole_llm.retrieval.near_ids import near_id, unknown_ids
from recbole_llm.spreadsheet import Workbook

COMMANDS = sorted(cli.COMMANDS)


def parser_of(name):
    """The command's own parser."""
    parser = cli._parser(name)
    (sub,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return parser, sub.choices[name]


def test_an_empty_call_shows_the_help(capsys):
    assert cli.main([]) == 0
    out, err = capsys.readouterr()
    assert "COMMAND" in out and not err
    for name in cli.COMMANDS:
        assert re.search(rf"^ +{name}\s", out, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_parse(name):
    pytest.importorskip("torch")
    parser, command = parser_of(name)
    examples = cli.COMMANDS[name].examples
    assert examples
    text = command.format_help()
    for example in examples:
        assert f"  recbole-llm {example}" in text
        options, rest = parser.parse_known_args(shlex.split(example))
        assert options.command == name
        known = cli._split_overrides(rest, name) if cli.COMMANDS[name].configures else rest
        assert cli.COMMANDS[name].configures or known == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_where_the_keys_are_explained(name):
    pytest.importorskip("torch")
    _, command = parser_of(name)
    files = re.findall(r"^  (\S+LLMTwoTower\.yaml)$", command.format_help(), re.MULTILINE)
    assert len(files) == cli.COMMANDS[name].configures
    assert all("item_text_fields" in Path(file).read_text(encoding="utf-8") for file in files)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_shown_with_hyphens_with_their_defaults_and_taken_with_underscores(name):
    pytest.importorskip("torch")
    _, command = parser_of(name)
    text = command.format_help()
    assert not re.search(r"--\w+_\w+", text.partition("examples:")[0]), name
    for action in command._actions:
        long = [option for option in action.option_strings if option.startswith("--")]
        for option in long:
            assert command._option_string_actions["--" + option[2:].replace("-", "_")] is action
        if long and action.nargs != 0 and action.default not in (None, "", [], argparse.SUPPRESS):
            assert "default" in action.help or f"default: {action.default}" in re.sub(r"\s+", " ", text), long


def test_configuration_values_may_have_hyphens_and_are_one_value_all_the_same():
    assert cli._split_overrides(["--learning-rate=0.1", "--epochs=2"], "run") == ["--learning_rate=0.1", "--epochs=2"]
    with pytest.raises(ValueError, match="given twice"):
        cli._split_overrides(["--learning-rate=0.1", "--learning_rate=0.2"], "run")
    # a value keeps its hyphens
    assert cli._split_overrides(["--encoder=a-b_c"], "run") == ["--encoder=a-b_c"]


@pytest.mark.parametrize(("option", "value"), [("--dataset", "shop"), ("--model", "BPR")])
def test_a_resumed_run_has_its_checkpoints_model_and_data(monkeypatch, capsys, option, value):
    pytest.importorskip("recbole")
    from recbole_llm.bridge import checkpoint

    monkeypatch.setattr(checkpoint, "settings_for_resume", lambda path, own: ("LLMTwoTower", "toy", {}))
    assert cli.main(["run", "--resume", "some-last.pth", option, value]) == 2
    assert f"{option} is {value!r}, and 'some-last.pth' is of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--cache", "--json"], "--json is of versions and devices"),
        (["info", "--feature-cache-dir", "x"], "--feature-cache-dir belongs to --cache and --prune"),
        (
            ["encode", "-d", "toy", "--benchmark", "a,b", "--modality", "image"],
            "--benchmark compares encoders of texts",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, arguments, message):
    pytest.importorskip("torch")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_both_spellings_reach_the_command(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 1\n")
    parser, _ = parser_of("encode")
    for spelling in ("--config-files", "--config_files"):
        options, rest = parser.parse_known_args(["encode", "-d", "x", spelling, "a.yaml"])
        assert (options.config_files, rest) == ("a.yaml", [])
        options, rest = parser.parse_known_args(["encode", "-d", "x", f"{spelling}=a.yaml"])
        assert (options.config_files, rest) == ("a.yaml", [])


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("505", "000505"),
        ("0505", "000505"),
        ("505.0", "000505"),
        (" 000505 ", "000505"),
        ("0", "000"),
        ("sku-7", "SKU-7"),
        ("12", None),  # both 012 and 0012
        ("506", None),
        ("", None),
        ("1.5", None),
    ],
)
def test_an_id_without_its_zeros_is_found(asked, meant):
    assert near_id(asked, ["000505", "012", "0012", "000", "SKU-7", "15"]) == meant


def test_the_message_names_what_was_meant_and_how_many_more():
    text = unknown_ids(["505", "x", *map(str, range(20))], ["000505"])
    assert text.startswith("'505' (did you mean '000505'?), 'x', '0'") and text.endswith(" and 12 more")


def cells(path):
    """The worksheet's cells as text and type."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    return [
        [("".join(cell.itertext()), cell.get("t", "n")) for cell in row.findall("m:c", space)]
        for row in sheet.iter(f"{{{space['m']}}}row")
    ]


def test_a_worksheet_keeps_zeros_texts_and_numbers(tmp_path):
    file = tmp_path / "a.xlsx"
    with Workbook(file, ["user", "score"]) as book:
        book.append(["000505", 0.125])
        book.append(["=HYPERLINK(1)&<b>", -3])
        book.append(["\x00ä\ud800𝄞\n", None])
        book.append([True, 1e-30])
        book.append([np.float32(0.5), math.nan])
    assert cells(file) == [
        [("user", "inlineStr"), ("score", "inlineStr")],
        [("000505", "inlineStr"), ("0.125", "n")],
        [("=HYPERLINK(1)&<b>", "inlineStr"), ("-3", "n")],
        [("�ä�𝄞\n", "inlineStr"), ("", "n")],
        [("1", "b"), ("1e-30", "n")],
        [("0.5", "n"), ("", "n")],
    ]


def test_a_worksheet_that_is_full_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(spreadsheet, "MOST_ROWS", 2)
    with Workbook(tmp_path / "a.xlsx", ["user"]) as book:
        book.append(["1"])
        with pytest.raises(ValueError, match=r"holds 1 rows, and there are more: write \.csv"):
            book.append(["2"])
    with Workbook(tmp_path / "b.xlsx", ["user"]) as book, pytest.raises(ValueError, match="has 40,000"):
        book.append(["x" * 40_000])
