"""Exports with wrong contents whose sums and id are right: what somebody can make who knows the format."""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from recbole_llm.export import manifest
from recbole_llm.export.errors import ExportError
from recbole_llm.serving.load_and_swap import build

VALUES: list[Any] = [
    None, 0, -1, 1, 2, 2**31, 2**62, 2**63, -(2**63), 10**400, 0.5, 1e308, -1e308, float("inf"), float("nan"), True, False,
    "", "x", "1", "\x00", "\ud800", "ü", "/etc/passwd", "../x", "a" * 100_000, [], {}, [None], [[[]]], [0] * 65, {"a": 1},
]  # fmt: skip
SHAPES = [
    [0], [0, 2**62], [0, 2**70], [2**62, 0], [2**31, 0, 2**31], [0] * 33, [0] * 65, [0, True], [-1], [2**63], [2**40, 2**40], [],
]  # fmt: skip
RAW = [
    b"",
    b"\x00",
    b"\xff" * 64,
    b"\n",
    b"[" * 100_000,
    b"{}",
    b"[]",
    b'""',
    b"null",
    b"1e999",
    b"\xef\xbb\xbf",
    b"\x80\x04.",
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "O", "", None, [], {}]

Tree = dict[str, Any] | list[Any]


def places(tree: Any) -> Iterator[tuple[Tree, Any]]:
    """Every container of a JSON value with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def change_tree(tree: Any, draw: Random) -> None:
    """Replace, take out, rename or add something, anywhere in a JSON value."""
    found = list(places(tree))
    if not found:
        return
    container, key = draw.choice(found)
    kind = draw.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[draw.choice(["x", "", "__class__", "version", "__metadata__"])] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 2:  # what stands elsewhere is of a form that is right somewhere
        other, name = draw.choice(found)
        container[key] = copy.deepcopy(other[name])
    else:
        container[key] = copy.deepcopy(draw.choice(VALUES))


def change_header(path: Path, draw: Random) -> None:
    """Change the header of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = draw.choice(list(header))
    entry = header[name]
    kind = draw.randrange(7)
    if kind == 0:
        entry["shape"] = draw.choice(SHAPES)
        if draw.random() < 0.5:
            entry["data_offsets"] = [entry["data_offsets"][1]] * 2
    elif kind == 1:
        entry["dtype"] = draw.choice(DTYPES)
    elif kind == 2:
        entry["data_offsets"] = [draw.choice([-1, 0, 4, 2**62, 10**400, len(content)]) for _ in range(2)]
    elif kind == 3:
        header[draw.choice(list(header))] = header.pop(name)
    elif kind == 4:
        header[draw.choice(["user.part", "item.vector", "x", "", "__metadata__"])] = copy.deepcopy(entry)
    else:
        change_tree(header, draw)
    text = json.dumps(header).encode()
    length = draw.choice([0, 9, 2**20, 2**63]) if kind == 6 else len(text)
    path.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])


def change_numbers(path: Path, draw: Random) -> None:
    """Put odd numbers among those of a safetensors file."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    pattern = np.array(draw.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 0, -1]), "<f4").tobytes()
    if draw.random() < 0.3:
        pattern = draw.choice([b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(8), b"\x00" * 7 + b"\x80"])
    if len(content) > start:
        at = start + draw.randrange(0, len(content) - start, 4)
        times = draw.choice([1, 1, 16, len(content)])
        stop = min(len(content), at + times * len(pattern))
        content[at:stop] = (pattern * times)[: stop - at]
    path.write_bytes(content)


def change_lines(path: Path, draw: Random) -> None:
    """Change a line of JSON, repeat it, or take it out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[draw.randrange(len(lines))])
    elif kind == 2:
        lines[at] = draw.choice(["", "null", "NaN", "1e999", "[" * 100_000, '"\\ud800"', '{"a": 1, "a": 2}', "\x00"])
    elif lines[at]:
        value = [json.loads(lines[at])]
        for _ in range(draw.choice([1, 1, 3])):
            change_tree(value, draw)
        lines[at] = json.dumps(value[0] if value else None)
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")


def change_bytes(path: Path, draw: Random) -> None:
    """Change bytes of whatever file."""
    content = bytearray(path.read_bytes())
    at, kind = draw.randrange(len(content) + 1), draw.randrange(4)
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at : at + 1] = bytes([draw.randrange(256)])
    elif kind == 2:
        content[at:at] = draw.choice(RAW)
    else:
        content = bytearray(draw.choice(RAW))
    path.write_bytes(content)


def change_folder(folder: Path, draw: Random) -> None:
    """Take a file out, put one in another's place, or make it something else."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    path, kind = draw.choice(files), draw.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(draw.choice(files).read_bytes())
    elif kind == 2:
        path.unlink()
        path.mkdir()
    else:
        (folder / draw.choice(["x.py", "encoder.bin", "x"])).write_bytes(b"x")


def sign(folder: Path, raw: Any) -> None:
    """Write a manifest whose sums fit the files, and whose id fits the rest, where it has a form that has an id."""
    for name in list(raw["files"]) if isinstance(raw, dict) and isinstance(raw.get("files"), dict) else ():
        with suppress(OSError, ValueError):
            content = (folder / name).read_bytes()
            raw["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with suppress(ExportError, TypeError, AttributeError, ValueError):
        raw["export_id"] = manifest._manifest_of(copy.deepcopy(raw)).identity()
    (folder / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")


def mutate(source: Path, target: Path, draw: Random) -> None:
    """Write an export that is wrong in one to three places, and signed.

    Args:
        source: a right one.
        target: where; a folder that is there is replaced.
        draw: the state of randomness: the same seed, the same export.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    raw = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    tensors = sorted(path.relative_to(target) for path in target.rglob("*.safetensors"))
    lines = [Path(name) for name in ("item_ids.txt", "user_ids.txt", "items.jsonl")]
    every = sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())
    kinds: list[tuple[Callable[[Path, Random], None], list[Path]]] = [
        (change_header, tensors), (change_numbers, tensors), (change_lines, lines), (change_bytes, every),
    ]  # fmt: skip
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if draw.random() < 0.45:
            change_tree(raw, draw)
            continue
        change, files = draw.choice(kinds)
        # what an earlier change left may be nothing that can be changed in this way
        with suppress(OSError, ValueError, TypeError, AttributeError, LookupError):
            if draw.random() < 0.08:
                change_folder(target, draw)
            else:
                change(target / draw.choice(files), draw)
    sign(target, raw)


def outcome(folder: Path) -> str:
    """Load an export as the service does, one answer included: "loaded", or "refused" by an ``ExportError``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers beyond float32
        try:
            build(folder, [], None)
        except ExportError:
            return "refused"
    return "loaded"
