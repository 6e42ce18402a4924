"""What the project is made of: floors that exclude known holes, actions pinned by commit, promises that have a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# the first version without holes that reach this project
FIXED = {
    "fastapi": "0.120.1",  # the first that takes that starlette
    "h11": "0.16",  # CVE-2025-43859
    "pyyaml": "5.4",  # CVE-2020-1747, CVE-2020-14343
    "starlette": "0.49.1",  # CVE-2025-62727
    "torch": "2.6",  # CVE-2025-32434
    "tqdm": "4.66.3",  # CVE-2024-34062
    "transformers": "4.53",  # CVE-2025-5197, CVE-2025-6051, CVE-2025-6638, CVE-2025-6921
}


def requirements():
    """Name and floor of every requirement, of all extras."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?>=([0-9.]+)', text)
    assert len(found) > 40
    return found


def version(text):
    return tuple(map(int, text.split(".")))


@pytest.mark.parametrize("name", FIXED)
def test_floors_exclude_known_holes(name):
    floors = [floor for found, floor in requirements() if found.lower() == name]
    assert floors and all(version(floor) >= version(FIXED[name]) for floor in floors), (name, floors)


def test_the_lowest_versions_that_are_tested_are_those_that_pip_may_take():
    pins = re.findall(r'pins: "([^"]*)"', (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = [pin.split("==") for line in pins for pin in line.split() if "==" in pin]
    floors = dict(requirements())
    for name, pin in tested:
        assert version(pin) >= version(floors.get(name, "0")), (name, pin)
    for name in ("numpy", "pandas", "torch", "transformers"):
        lowest = min(version(pin) for found, pin in tested if found == name)
        assert lowest[:2] == version(floors[name])[:2], name
    assert (
        f"pip takes transformers {floors['transformers']} or newer" in (ROOT / "docs/quality-and-speed.md").read_text()
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_workflows_may_only_read(path):
    text = path.read_text()
    uses = re.findall(r"uses: *(\S+)(.*)", text)
    assert uses
    for action, comment in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) and re.search(r"# v\d", comment), action
    assert re.search(r"^permissions:\n  contents: read$", text, re.M)


def test_the_workflow_runs_every_target_of_the_fuzzer():
    targets = re.search(r"target: \[(.*)\]", (ROOT / ".github/workflows/fuzz.yml").read_text())[1].split(", ")
    tree = ast.parse((ROOT / "tests" / "fuzz" / "targets.py").read_text())
    (table,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "TARGETS"]
    assert targets == [key.value for key in table.keys]


def promised():
    rows = re.findall(r"^\|(.*)\|(.*)\|$", (ROOT / "docs" / "promises.md").read_text(), re.M)
    return [
        (promise.strip(), proof) for promise, proof in rows if "---" not in promise and promise.strip() != "promise"
    ]


def test_every_promise_names_a_test_that_exists():
    """A function that pytest runs, a file that holds one, a target of the fuzzer or a workflow."""
    assert len(promised()) > 25
    for promise, proof in promised():
        named = re.findall(r"`([\w./-]+\.(?:py|yml))(?:::(\w+))?`", proof)
        assert named and proof.count("`") == 2 * len(named), promise  # all that is named, is read here
        for file, function in named:
            assert (ROOT / file).is_file(), file
            if file.startswith("tests/") and file != "tests/fuzz/targets.py":
                tests = collected_in(ROOT / file)
                assert function in tests if function else tests, (file, function)


def collected_in(path):
    """Names of the functions and methods of a file that pytest collects."""
    assert path.name.startswith("test_"), path
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test")]
    bodies = [tree.body, *(node.body for node in classes)]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name for body in bodies for node in body if isinstance(node, functions) and node.name.startswith("test")
    }


def test_holes_are_reported_privately():
    text = (ROOT / "SECURITY.md").read_text()
    assert "Security advisories" in text and "not as an issue" in text
