"""Damaged checkpoints, of bytes and of members with right sums: they are read, or refused with a ``ValueError``."""

import io
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("recbole")
from fuzz import checkpoints

from recbole_llm.bridge import checkpoint

FOLDER = Path(__file__).parents[1] / "compatibility" / "0.1.0"
SOURCES = [FOLDER / f"{name}.pth" for name in ("both", "cold", "time", "both-last")]


def outcomes(seeds, path):
    contents = [source.read_bytes() for source in SOURCES]
    seen = Counter()
    for seed in seeds:
        path.write_bytes(checkpoints.mutate(contents[seed % len(contents)], random.Random(seed)))
        try:
            seen[checkpoints.outcome(path)] += 1
        except Exception as error:
            raise AssertionError(f"checkpoint {seed} of the fuzzer ended in {error!r}") from error
    return seen


def test_some_damaged_checkpoints(tmp_path):
    seen = outcomes(range(150), tmp_path / "x.pth")
    assert seen["refused"] > 75 and seen["loaded"] > 5


@pytest.mark.slow
def test_two_thousand_damaged_checkpoints(tmp_path):
    seen = outcomes(range(1000, 3000), tmp_path / "x.pth")
    assert seen.total() == 2000


def with_pickle(source, content):
    """The archive with another pickle, its sum right."""
    target = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return target.getvalue()


# what torch's unpickler makes of each: struct.error, AssertionError, TypeError, AttributeError, UnpicklingError, EOFError
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02M\x01",
        b"\x80\x02K\x01Q.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02cos\nsystem\n.",
        b"",
    ],
    ids=["operand", "id", "key", "storage", "code", "empty"],
)
def test_a_pickle_that_is_none_is_refused_whatever_it_leads_to(content, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(with_pickle(SOURCES[0], content))
    with pytest.raises(ValueError, match="was not written by recbole-llm"):
        checkpoint.read_checkpoint(path)


@pytest.mark.parametrize("error", [OSError("input/output error"), MemoryError()])
def test_a_disk_that_fails_is_not_taken_for_a_foreign_file(error, monkeypatch):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        checkpoint.read_checkpoint(SOURCES[0])


def test_the_same_seed_is_the_same_file():
    content = SOURCES[0].read_bytes()
    assert checkpoints.mutate(content, random.Random(5)) == checkpoints.mutate(content, random.Random(5)) != content
