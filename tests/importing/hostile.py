"""Files made to break an import, one for each number: what an import of it did, and how much memory it took.

Run as a script (on Linux), it imports the files of the numbers ``FIRST`` to ``LAST`` in one process and prints a line of
JSON: what became of them, and the most memory that the import of a file of each kind took beyond what was resident before.
"""

import gzip
import io
import json
import random
import sys
import tempfile
import time
import zlib
from pathlib import Path

GOOD = b"user_id,item_id,rating,timestamp\n" + b"".join(
    b"u%d,i%d,%d,%d\n" % (n % 50, n % 37, 1 + n % 5, 1_700_000_000 + n) for n in range(500)
)
ITEMS = b"item_id,title\n" + b"".join(b"i%d,a title of number %d\n" % (n, n) for n in range(37))
MIB = 1 << 20


def packed(parts, level=6):
    """gzip of many parts, without all of them in memory."""
    stream = zlib.compressobj(level, zlib.DEFLATED, 31)
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])


def endless_line(rng):
    size = rng.choice([5, 9, 30])
    name, cell = rng.choice([("a.csv", b"a"), ("a.tsv", b"a"), ("a.jsonl", b"["), ("a.inter", b"x"), ("a.csv", b'"a')])
    return name, b"user_id,item_id\n" * (name != "a.jsonl") + cell * (size * MIB // len(cell)), {}


def endless_line_packed(rng):
    cell = rng.choice([b"0", b" ", b"\n", b"\r", b"a,", b'"', b'"\n', b"\0", b"{"]) * MIB
    name = rng.choice(["a.csv.gz", "a.jsonl.gz", "a.tsv.gz"])
    return name, packed([b"user_id,item_id\nu1,i1\n", *[cell] * rng.choice([64, 300])], 9), {}


def rows_packed(rng):
    line = rng.choice([b"u1,i1,1,1\n", b'"u1","i1","1","1"\n', b",,,\n", b"u1\n"])
    options = {"bad_rows": rng.choice(["drop", "error"])}
    return "a.csv.gz", packed([b"user_id,item_id,rating,timestamp\n", *[line * (MIB // len(line))] * 300], 9), options


def many_columns(rng):
    n = rng.choice([5_000, 30_000, 200_000])
    if rng.random() < 0.5:
        row = json.dumps({"item_id": "i1", **{f"c{k}": 1 for k in range(n)}}).encode()
        return "items.jsonl", b'{"item_id": "i0"}\n' * rng.choice([0, 2000]) + row + b"\n", {}
    header = b"item_id,title," + b",".join(b"c%d" % k for k in range(n))
    return "items.csv", header + b"\n" + b"i1,t," + b",".join([b"1"] * n) + b"\n", {}


def long_names(rng):
    name = b"n" * rng.choice([600, 3 * MIB])
    if rng.random() < 0.5:
        return "items.csv", b"item_id," + name + b"\ni1,2\n", {}
    return "items.jsonl", b'{"item_id": 1, "' + name + b'": 2}\n', {}


def open_quote(rng):
    body = b'item_id,title\ni1,"unclosed ' + rng.choice([b"x\n", b"x,\n", b"\n", b'x""\n']) * (
        rng.choice([1, 20]) * MIB
    )
    return "items.csv", body, {}


def crowded_json(rng):
    size = rng.choice([1, 3, 6]) * MIB
    cell = rng.choice([b"1,", b"[],", b"{},", b'"",', b"[" * 50, b'{"a":', b"1e9,", b"null,"])
    value = rng.choice([b"[%s1]", b'{"a": [%s1]}', b"%s"]) % (cell * (size // len(cell)))
    return "items.jsonl", b'{"item_id": "i1", "title": %s}\n' % value, {"bad_rows": rng.choice(["drop", "error"])}


def long_numbers(rng):
    number = rng.choice(
        [b"9" * 5000, b"1e400", b"-1e400", b"nan", b"0x1F", b"1_0", b"9" * 400_000, b"0." + b"3" * 9999]
    )
    name, head, form = "a.csv", b"user_id,item_id,rating,timestamp\nu0,i0,3,5\n", b"u1,i1,%s,%s\n"
    if rng.random() < 0.5:
        name, head, form = "a.jsonl", b"", b'{"user_id": 1, "item_id": 2, "rating": %s, "timestamp": "%s"}\n'
    return name, head + form % (number, rng.choice([number, b"5"])), {"bad_rows": rng.choice(["drop", "error"])}


def bad_values(rng):
    value = rng.choice([b"x", b"4,5", b"31/12/2024", b"2024-02-30", b"", b"NA", b"1.2.3", b"12/31/99", b"\xd9\xa3"])
    rows = b"".join(b'u%d,i%d,"%s","%s"\n' % (n, n, value, value) for n in range(20_000))
    return "a.csv", b"user_id,item_id,rating,timestamp\nu0,i0,3,5\n" + rows, {"bad_rows": rng.choice(["drop", "error"])}


def text_bombs(rng):
    size = rng.choice([1, 3]) * MIB
    piece = rng.choice(
        ["<!--", "<script>", "<style", "&#9", "&amp;", "<a ", "<b><i>", "&", "</script ", "\u0315\u0300", "\u1100\u1161",
         "e\u0301", "\u202e", "\ufdfa", "\u0130", "<!-- -->", "<br>", " "]
    )  # fmt: skip
    text = (piece * (size // len(piece.encode()))).encode()
    tail = rng.choice([b"", b"-->", b"9;", b">"])
    return "items.csv", b"item_id,title\ni1," + text + tail + b"\n", {"keep_html": rng.random() < 0.2}


def odd_ids(rng):
    pool = [
        b"i" * 257, "é".encode() * 256, "é".encode() * 257, b"i" * MIB, b"a/similar", b"", b" ", b"NA", b"[PAD]", b"a\tb"
    ]  # fmt: skip
    rows = [b'u1,"%s"\n' % rng.choice(pool) for _ in range(5)]
    return "a.csv", b"user_id,item_id\nu0,i0\n" + b"".join(rows), {"bad_rows": rng.choice(["drop", "error"])}


def encodings(rng):
    encoding = rng.choice(
        ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "shift_jis", "utf-7", "cp037"]
    )
    given = rng.choice(
        ["utf-8", encoding, "utf-16", "base64", "idna", "undefined", "unicode_escape", "punycode", "rot13"]
    )
    content = ("user_id,item_id\n" + "u1,i1\nü2,ö2\n" * 50).encode(encoding, "replace")
    name, content = rng.choice([("a.csv", content), ("a.csv.gz", gzip.compress(content)), ("a.jsonl", content)])
    return name, content, {"encoding": given}


def options(rng):
    pool = {
        "separator": [",", "\n", '"', "§", "\0", "\r", " ", "x", "::", ""],
        "time_format": ["%d/%m/%Y", "%Y", "%%", "%Q", "(%d)+%m.*%Y", "%d" * 3, "", "%d\0%m%Y"],
        "decimal": [".", ",", ";"],
        "time_unit": ["s", "iso", "weeks"],
        "quoting": ["csv", "none", "some"],
        "time_column": ["timestamp", "rating", "", "nowhere"],
        "rating_column": ["rating", "item_id", ""],
        "label_column": ["rating", "", "user_id"],
        "threshold": [3.0, float("nan"), float("inf"), -1e308],
        "order": ["time", "file", "best"],
        "duplicates": ["first", "keep", "all"],
    }
    chosen = rng.sample(sorted(pool), rng.randint(1, 3))
    return "a.csv", GOOD, {name: rng.choice(pool[name]) for name in chosen}


def damaged(rng):
    name, content = rng.choice(
        [("a.csv", GOOD), ("a.csv.gz", gzip.compress(GOOD)), ("items.csv", ITEMS), ("a.parquet", parquet())]
    )
    content = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(content)), rng.randint(0, 8)
        content[at : at + length] = rng.randbytes(rng.randint(0, 8))
    return name, bytes(content[: rng.choice([None, len(content) // 2])]), {"bad_rows": rng.choice(["drop", "error"])}


def noise(rng):
    name = rng.choice(["a.csv", "a.jsonl", "a.parquet", "a.csv.gz", "items.csv", "a.inter", "a"])
    head = rng.choice([b"", b"user_id,item_id\n", b"PAR1", b"\x1f\x8b\x08\0", b"\xef\xbb\xbf", b"\xff\xfe", b"{"])
    return name, head + rng.randbytes(rng.choice([0, 1, 100, 100_000])), {"bad_rows": rng.choice(["drop", "error"])}


def parquet(table=None, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if table is None:
        ids = {"user_id": [f"u{n % 9}" for n in range(1000)], "item_id": [f"i{n % 7}" for n in range(1000)]}
        table = pa.table(ids)
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def parquet_bombs(rng):
    import pyarrow as pa

    def repeated(value, rows):
        return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))

    rows = rng.choice([2_000, 100_000, 3_000_000])
    name = rng.choice(["a.parquet", "items.parquet"])
    other = "user_id" if name == "a.parquet" else "title"
    kind = rng.choice(["rows", "text", "list", "columns", "index", "types", "names"])
    if kind == "rows":
        return name, parquet(pa.table({"item_id": repeated("i1", rows), other: repeated("u1", rows)})), {}
    if kind == "text":
        long = "word " * rng.choice([1_000, 50_000, 900_000])
        return name, parquet(pa.table({"item_id": repeated("i1", rows // 50), other: repeated(long, rows // 50)})), {}
    if kind == "list":
        flat = repeated(rng.choice(["word", 1.5, None]), rows)
        lists = pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), flat.dictionary.take(flat.indices))
        return name, parquet(pa.table({"item_id": ["i1"], "user_id": ["u1"], "title": lists})), {}
    if kind == "columns":
        return name, parquet(pa.table({"item_id": ["i1"], **{f"c{k}": [k] for k in range(6_000)}})), {}
    if kind == "index":
        return name, parquet(pa.table({"__index_level_0__": ["i1"], "user_id": ["u1"]})), {}
    if kind == "names":
        return (
            name,
            parquet(
                pa.table(
                    [["i1"], ["u1"], ["x"]], names=["item_id", "user_id", rng.choice(["", "\n\t", "a.b", "n" * 9999])]
                )
            ),
            {},
        )
    struct = pa.array([{"a": [1]}])
    return (
        name,
        parquet(pa.table({"item_id": [b"\xff\xfe"], "user_id": [7.5], "rating": struct, "timestamp": [2**62]})),
        {},
    )


KINDS = [
    endless_line, endless_line_packed, rows_packed, many_columns, long_names, open_quote, crowded_json, long_numbers, bad_values,
    text_bombs, odd_ids, encodings, options, damaged, noise, parquet_bombs, damaged, parquet_bombs, text_bombs, options,
]  # fmt: skip


def made(number, folder):
    """Write file ``number``; gives the arguments of its import."""
    rng = random.Random(number)
    name, content, options = KINDS[number % len(KINDS)](rng)
    (folder / name).write_bytes(content)
    files = {"interactions": folder / name}
    if name.startswith("items"):
        (folder / "good.csv").write_bytes(GOOD)
        files = {"interactions": folder / "good.csv", "items": folder / name}
    return files | options


def outcome(folder, interactions, **options):
    """``good``, ``refused``, or what else became of an import."""
    from recbole_llm.importer import import_dataset

    try:
        report = import_dataset(interactions, "x", data_path=folder / "out", overwrite=True, **options)
    except ValueError as error:
        if type(error) is not ValueError or "\n" in str(error) or not 10 < len(str(error)) < 4000:
            return f"{type(error).__name__}: {str(error)[:300]!r}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    for table, suffix in ((report.interactions, "inter"), (report.items, "item")):
        if table is not None:
            lines = (folder / "out" / "x" / f"x.{suffix}").read_bytes().count(b"\n") - 1
            if lines != table.rows_kept + getattr(table, "added", 0) or any("\n" in line for line in report.lines()):
                return f"{lines} lines of {table.rows_kept} rows"
            if table.rows_read != table.rows_kept + sum(table.dropped.values()):
                return f"{table.rows_read} rows read, {table.rows_kept} kept, {table.dropped} dropped"
    return "good"


def resident(name):
    """MiB of memory of this process: ``VmRSS`` now, ``VmHWM`` at most since it began or :func:`forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0


def forget_peak():
    """Let VmHWM begin at what is resident now, so that it tells of the next import alone."""
    Path("/proc/self/clear_refs").write_text("5")


def main(first, last):
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401

    import recbole_llm.importer  # noqa: F401

    odd, counts, by_kind, most, whole = {}, {"good": 0, "refused": 0}, {}, {}, 0.0
    for number in range(first, last):
        kind = KINDS[number % len(KINDS)].__name__
        with tempfile.TemporaryDirectory() as folder:
            arguments = made(number, Path(folder))
            size = sum(path.stat().st_size for path in Path(folder).iterdir()) / MIB
            forget_peak()
            before, started = resident("VmRSS"), time.process_time()
            found = outcome(Path(folder), **arguments)
            peak, seconds = resident("VmHWM"), time.process_time() - started
        took, whole = peak - before, max(whole, peak)
        if found in counts:
            counts[found] += 1
            by_kind.setdefault(kind, {"good": 0, "refused": 0})[found] += 1
        else:
            odd[f"{number} {kind}"] = found
        worst = {"number": number, "peak_mib": round(took, 1), "file_mib": round(size, 2), "seconds": round(seconds, 2)}
        if took > most.get(kind, {"peak_mib": -1.0})["peak_mib"]:
            most[kind] = worst
    found = {"counts": counts, "odd": odd, "by_kind": by_kind, "most_memory": most, "process_peak_mib": round(whole, 1)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
