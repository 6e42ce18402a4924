"""Exports whose sums and id are right and whose contents are wrong: they load, or they are refused with an ``ExportError``."""

import json
import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_export import make_contents
from made_painted import make_painted

from recbole_llm.export.errors import ExportError
from recbole_llm.export.writer import write_artifact
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.serving.load_and_swap import build
from tests.fuzz import exports

FOLDER = Path(__file__).parents[1] / "compatibility" / "0.1.0"
SOURCES = [FOLDER / f"export-{name}" for name in ("both", "cold", "time")]
WITH_ALL = {
    "user_part": True,
    "probability": ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5), (0.5,)),
    "content": {"text": np.ones((40, 3), np.float32)},
}


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


@pytest.fixture
def sources(tmp_path):
    """Those of version 0.1.0, one that has what they lack, and one with pictures."""
    write_artifact(tmp_path / "made", make_contents(**WITH_ALL))
    painted, _, _ = make_painted(tmp_path / "painting")
    write_artifact(tmp_path / "painted", painted)
    return [*SOURCES, tmp_path / "made", tmp_path / "painted"]


def outcomes(seeds, sources, folder):
    seen = Counter()
    for seed in seeds:
        draw = random.Random(seed)
        exports.mutate(sources[seed % len(sources)], folder, draw)
        try:
            seen[exports.outcome(folder)] += 1
        except Exception as error:
            raise AssertionError(f"export {seed} of the fuzzer ended in {error!r}") from error
    return seen


def test_some_resigned_exports(sources, tmp_path):
    seen = outcomes(range(150), sources, tmp_path / "export")
    assert seen["refused"] > 75 and seen["loaded"] > 5


@pytest.mark.slow
def test_five_thousand_resigned_exports(sources, tmp_path):
    seen = outcomes(range(1000, 6000), sources, tmp_path / "export")
    assert seen.total() == 5000 and seen["loaded"] > 100


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_an_export_that_is_only_signed_again_is_the_same(source, tmp_path):
    """The signature of the fuzzer is right: what refuses its exports is what is wrong in them."""

    target = tmp_path / "export"
    shutil.copytree(source, target)
    exports.sign(target, json.loads((target / "manifest.json").read_text()))
    assert exports.outcome(target) == "loaded"


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_field_of_the_manifest_replaced_by_every_value(source, tmp_path):
    manifest = json.loads((source / "manifest.json").read_text())
    target, seen = tmp_path / "export", Counter()
    shutil.copytree(source, target)
    for number in range(len(list(exports.places(manifest)))):
        for value in exports.VALUES:
            changed = json.loads(json.dumps(manifest))
            container, key = list(exports.places(changed))[number]
            container[key] = value
            exports.sign(target, changed)
            try:
                seen[exports.outcome(target)] += 1
            except Exception as error:
                raise AssertionError(f"{key} = {value!r:.40} ended in {error!r}") from error
    assert seen["refused"] > 1000 and seen["loaded"] > 100


@pytest.mark.parametrize("shape", exports.SHAPES, ids=str)
def test_shapes_that_hold_nothing_or_more_than_there_is(shape, tmp_path):
    target = tmp_path / "export"
    shutil.copytree(SOURCES[0], target)
    path = target / "vectors.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    end = len(content) - 8 - size
    header["user.part"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    exports.sign(target, json.loads((target / "manifest.json").read_text()))
    with pytest.raises(ExportError):
        build(target, [], None)


def test_the_same_seed_is_the_same_export(tmp_path):
    contents = []
    for name in ("a", "b"):
        exports.mutate(SOURCES[0], tmp_path / name, random.Random(7))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()})
    assert contents[0] == contents[1]
