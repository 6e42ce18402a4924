"""Damaged checkpoints: bytes of the file, and of its members with sums that fit."""

import io
import warnings
import zipfile
from pathlib import Path
from random import Random

from recbole_llm.bridge.checkpoint import MODEL_PARTS, read_checkpoint

# of the pickle protocol: what a mutation is likely to turn into something else that can be read
OPCODES = b"(.0NKMJIFGXUVcqhrj}]sutbRio\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94\x95Q"


def change_bytes(content: bytes, draw: Random) -> bytes:
    """Cut, flip, blank, repeat or swap bytes."""
    raw = bytearray(content)
    at, kind = draw.randrange(len(raw)), draw.randrange(6)
    if kind == 0:
        del raw[at:]
    elif kind == 1:
        for _ in range(draw.randint(1, 20)):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        size = min(len(raw) - at, draw.choice([1, 16, 4096]))
        raw[at : at + size] = bytes(size)
    elif kind == 3:  # among the names and sums at the end
        raw[-draw.randint(1, min(3000, len(raw)))] = draw.randrange(256)
    elif kind == 4:
        raw[at:at] = raw[at : at + draw.choice([1, 8, 512])]
    else:
        del raw[at : at + draw.choice([1, 8, 512])]
    return bytes(raw)


def change_pickle(content: bytes, draw: Random) -> bytes:
    """Change a few bytes of a pickle, its opcodes for others more often than not."""
    raw = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(raw))
        if draw.random() < 0.6:
            raw[at] = draw.choice(OPCODES)
        elif draw.random() < 0.5:
            raw[at:at] = bytes([draw.choice(OPCODES)])
        else:
            raw[at] = draw.randrange(256)
    return bytes(raw)


def change_members(content: bytes, draw: Random) -> bytes:
    """Change, take out or repeat a member of the archive; the sums of all fit."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        members = old.infolist()
        chosen = draw.choice([one for one in members if one.filename.endswith("data.pkl")] + [draw.choice(members)])
        kind = draw.randrange(8)
        for member in members:
            data = old.read(member)
            if member is chosen:
                if kind == 0:
                    continue
                if kind == 1:
                    data = data[: draw.randrange(len(data) + 1)]
                elif member.filename.endswith("data.pkl"):
                    data = change_pickle(data, draw)
                elif data:
                    data = change_bytes(data, draw)
            new.writestr(member.filename, data)
    return target.getvalue()


def mutate(content: bytes, draw: Random) -> bytes:
    """Return another file: the same seed, the same file."""
    return (change_bytes if draw.random() < 0.5 else change_members)(content, draw)


def outcome(path: Path) -> str:
    """Read a checkpoint as a resumed run and ``load_trained`` do: "loaded", or "refused" by a ``ValueError``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a protocol of pickle that torch does not write
        try:
            read_checkpoint(path, parts=MODEL_PARTS)
        except ValueError:
            return "refused"
    return "loaded"
