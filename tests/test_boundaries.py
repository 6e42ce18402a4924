"""The rooms of the house: what each may import, that no imports run in a circle, what a fresh interpreter loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 450

# room -> the rooms below it that it may import, anywhere in a file; docs/architecture.md shows them as a list
ROOMS = {
    "__main__": {"cli", "commands"},
    "cli": {"commands"},
    "commands": {
        "atomic",
        "bridge",
        "checkpoints",
        "content",
        "export",
        "importer",
        "importing",
        "loaded",
        "media",
        "pictures",
        "profiles",
        "progress",
        "recommend",
        "reporting",
        "retrieval",
        "scoring",
        "serving",
        "spreadsheet",
        "terminal",
        "text_files",
    },
    "loaded": {"answer_frame", "atomic", "export", "identifiers", "profiles", "recommend", "retrieval"},
    "answer_frame": {"terminal"},
    "terminal": set(),
    "pictures": {"content", "export", "retrieval", "serving"},
    "media": {"checkpoints", "content", "export", "retrieval"},
    "profiles": {"export", "retrieval", "serving"},
    "reporting": {"atomic", "bridge", "checkpoints", "export", "fitting", "recommend", "retrieval", "scoring"},
    "recommend": {"atomic", "checkpoints", "export", "progress", "retrieval", "serving", "spreadsheet"},
    "spreadsheet": set(),
    "checkpoints": {"bridge", "model"},
    "importer": {"atomic", "importing", "progress"},
    "serving": {"atomic", "content", "export", "identifiers", "retrieval", "scoring"},
    "retrieval": {"export", "scoring"},
    "export": {"atomic", "content", "fitting", "scoring"},
    "model": {"bridge", "fitting", "scoring"},
    "bridge": {"atomic", "content", "fitting", "progress", "scoring", "text_files"},
    "fitting": {"scoring"},
    "scoring": set(),
    "importing": {"atomic", "content", "identifiers", "progress", "text_files"},
    "content": {"atomic", "progress", "text_files"},
    "progress": set(),
    "identifiers": set(),
    "text_files": set(),
    "atomic": set(),
}
# rooms that may import the kernels
WITH_KERNELS = {"bridge", "commands", "model", "recommend", "scoring"}


def modules(root, package):
    """Module name -> file."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path, known):
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found & known.keys()


def graph(root, package):
    known = modules(root, package)
    # the package itself loads nothing of ours when it is imported, and everything of ours stands below it
    return {name: imports(path, known) - {name, package} for name, path in known.items() if name != package}


def circles(arrows):
    """Groups of modules that import each other, by Tarjan's algorithm."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(name):
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in sorted(arrows.get(name, ())):
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in number:
            visit(name)
    return found


def room(module):
    return module.split(".")[1]


def test_no_import_runs_in_a_circle():
    assert circles(graph(ROOT, "recbole_llm")) == []
    assert circles(graph(ROOT / "kernels", "recbole_llm_kernels")) == []


def test_a_circle_would_be_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(arrows) == [["a", "b", "c"]]


def test_imports_run_downwards():
    arrows = graph(ROOT, "recbole_llm")
    rooms = {name: room(name) for name in arrows}
    assert set(rooms.values()) == set(ROOMS), "a room without a rule, or a rule without a room"
    upward = {
        f"{name} -> {other}"
        for name, others in arrows.items()
        for other in others
        if room(other) != rooms[name] and room(other) not in ROOMS[rooms[name]]
    }
    assert upward == set()


def test_the_rules_themselves_hold_no_circle():
    assert circles(ROOMS) == []


def test_only_some_rooms_know_the_kernels_and_by_their_public_names():
    private = set()
    for name, path in modules(ROOT, "recbole_llm").items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in named:
                parts = module.split(".")
                if parts[0] != "recbole_llm_kernels":
                    continue
                if room(name) not in WITH_KERNELS or (len(parts) > 1 and parts[1] not in ("functional", "sharded")):
                    private.add(f"{name} -> {module}")
    assert private == set()


NAME_GIVERS = ("os.replace", "os.rename", "os.renames", "os.fsync", "shutil.move")


def test_one_place_gives_files_their_names():
    """``os.replace`` without the waits of ``atomic.py`` may leave an empty file under the new name after a power cut."""
    found = set()
    for name, path in modules(ROOT, "recbole_llm").items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in NAME_GIVERS:
                found.add(name)
    # a log to which lines are appended has its name already
    assert found <= {"recbole_llm.atomic", "recbole_llm.bridge.experiments.tuning"}


def test_no_file_of_the_product_is_long():
    long = {name: lines for name, path in modules(ROOT, "recbole_llm").items() if (lines := _lines(path)) > MOST_LINES}
    assert long == {}


def _lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def run(code, **environment):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


# module -> what importing it must not load
MUST_NOT_LOAD = {
    "recbole_llm": ("torch", "recbole", "numpy"),
    "recbole_llm.cli": ("torch",),
    "recbole_llm_kernels": ("recbole", "recbole_llm", "triton"),
    "recbole_llm_kernels.functional": ("triton",),
    "recbole_llm.content.text": ("recbole", "recbole_llm_kernels", "torch"),
    "recbole_llm.content.encoders.transformer": ("recbole", "recbole_llm_kernels"),
    "recbole_llm.content.features": ("recbole", "recbole_llm_kernels"),
    "recbole_llm.scoring.towers": ("recbole",),
    "recbole_llm.scoring.probability": ("torch", "numpy"),
    "recbole_llm.fitting.pipeline": ("recbole", "transformers"),
    "recbole_llm.importer": ("torch", "recbole"),
    "recbole_llm.export.reader": ("torch", "recbole"),
    "recbole_llm.export.pooling": ("torch", "recbole"),
    "recbole_llm.retrieval.recommender": ("torch", "recbole"),
    "recbole_llm.serving": ("torch",),
    "recbole_llm.serving.recommend": ("torch", "recbole"),
    "recbole_llm.checkpoints": ("torch", "recbole"),
    "recbole_llm.recommend": ("torch", "recbole"),
    "recbole_llm.loaded": ("torch", "recbole", "pandas"),
}


@pytest.mark.parametrize("module", MUST_NOT_LOAD)
def test_import_does_not_load(module):
    loaded = (
        f"import sys, {module}; print(sorted({{m.split('.')[0] for m in sys.modules}} & {set(MUST_NOT_LOAD[module])}))"
    )
    result = run(loaded)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_python_in_the_repository_root_does_not_shadow_kernels_of_hugging_face():
    """A package `kernels` on sys.path breaks `import transformers`; ours is a source root without __init__.py."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    result = run("import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)")
    assert result.stdout.strip() == "True", result.stderr


def test_no_file_or_folder_called_kernels_in_tests_or_benchmarks():
    for folder in ("tests", "benchmarks"):
        assert not [p for p in (ROOT / folder).rglob("kernels*") if p.stem == "kernels"]


def test_top_level_is_the_agreed_layout():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"pyproject.toml", "README.md", "LICENSE", "recbole_llm", "kernels", "configs", "benchmarks", "tests"}
    agreed |= {"docs", "examples", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}
    assert {n for n in names if not n.startswith(".")} <= agreed
