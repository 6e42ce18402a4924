"""Benchmark files with cold items: nothing lost, nothing leaked, the same for a seed."""

import pytest

from recbole_llm.importing.cold_split import split_dataset


def rows(folder, name, part):
    header, *lines = (folder / name / f"{name}.{part}.inter").read_text().splitlines()
    return header, lines


@pytest.fixture
def data(toy_path, tmp_path):
    import shutil

    shutil.copytree(toy_path / "toy", tmp_path / "toy")
    return tmp_path


def test_every_interaction_is_in_one_part_and_cold_items_in_no_training(data):
    report = split_dataset("toy", "toy-cold", cold_items=0.25, seed=3, data_path=data)
    parts = {part: rows(data, "toy-cold", part)[1] for part in ("train", "valid", "test")}
    original = (data / "toy" / "toy.inter").read_text().splitlines()[1:]
    assert sorted(line for lines in parts.values() for line in lines) == sorted(original)
    trained = {line.split("\t")[1] for line in parts["train"]}
    everything = {line.split("\t")[1] for line in original}
    assert len(everything - trained) >= report.cold_items == round(0.25 * len(everything))
    assert report.rows == {part: len(lines) for part, lines in parts.items()}
    assert min(report.cold_rows["valid"], report.cold_rows["test"]) > 0 == report.cold_rows["train"]
    assert (data / "toy-cold" / "toy-cold.item").read_text() == (data / "toy" / "toy.item").read_text()


def test_the_warm_interactions_are_split_as_recbole_does_by_default(data):
    split_dataset("toy", "toy-cold", data_path=data)
    warm = {part: rows(data, "toy-cold", part)[1] for part in ("train", "valid", "test")}
    trained = {line.split("\t")[1] for line in warm["train"]}
    counts = {part: sum(line.split("\t")[1] in trained for line in lines) for part, lines in warm.items()}
    assert counts["train"] / sum(counts.values()) == pytest.approx(0.8, abs=0.03)


def test_a_byte_order_mark_and_blanks_in_the_path(data, capsys):
    import argparse
    import shlex

    from recbole_llm.commands.split import add_arguments, run_split

    folder = data.rename(data.with_name("my data"))
    plain = (folder / "toy" / "toy.inter").read_bytes()
    (folder / "toy" / "toy.inter").write_bytes(b"\xef\xbb\xbf" + plain)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run_split(parser.parse_args(["toy", "--output", "x", "--data-path", str(folder)]))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(printed.removeprefix("next: "))[4:] == [
        f"--data-path={folder}", "--config-files", str(folder / "x" / "x.yaml")
    ]  # fmt: skip
    assert rows(folder, "x", "train")[0] == plain.decode().splitlines()[0]


def test_the_seed_decides(data):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split_dataset("toy", name, seed=seed, data_path=data)
    assert rows(data, "a", "train") == rows(data, "b", "train") != rows(data, "c", "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "nowhere", "output": "x"}, "--data-path"),
        ({"dataset": "toy", "output": "toy"}, "exists"),
        ({"dataset": "toy", "output": "x", "cold_items": 1.0}, "share in \\(0, 1\\)"),
        ({"dataset": "toy", "output": "x", "cold_items": 0.001}, "leaves none"),
        ({"dataset": "toy", "output": "x", "item_field": "movie"}, "has no column 'movie'"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(data, arguments, message):
    before = sorted(p.name for p in data.iterdir())
    with pytest.raises(ValueError, match=message):
        split_dataset(data_path=data, **arguments)
    assert sorted(p.name for p in data.iterdir()) == before
