"""Transforms of vectors and vectors made elsewhere."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recbole_llm.content.store.feature_table import FeatureTable, apply_transform
from recbole_llm.content.store.vector_files import AtomicForm, load_features


def made_table(n=200, dim=12, rank=None, absent=(0, 5)):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(rank or dim, dim, generator=generator)
    vectors = torch.randn(n, rank or dim, generator=generator) @ mixing + 3
    present = torch.ones(n, dtype=torch.bool)
    present[list(absent)] = False
    vectors[~present] = 0
    return FeatureTable(vectors, present, "text", "abc")


class TestTransforms:
    def test_center_uses_the_present_rows_alone(self):
        table = made_table()
        centred = apply_transform(table, "center")
        rows = table.vectors[table.present]
        torch.testing.assert_close(centred.vectors[table.present], rows - rows.mean(0), rtol=0, atol=1e-5)
        assert centred.vectors[~table.present].abs().sum() == 0
        assert centred.fingerprint == "abc:center"

    def test_none_changes_nothing(self):
        table = made_table()
        assert apply_transform(table, "none") is table

    def test_standardize_gives_equal_variances(self):
        table = made_table()
        rows = apply_transform(table, "standardize").vectors[table.present]
        variance = rows.var(0, correction=0)
        # the floor adds a thousandth of the mean variance to each
        assert variance.max() / variance.min() < 1.05
        centred = apply_transform(table, "center").vectors
        torch.testing.assert_close(rows.square().sum(), centred.square().sum(), rtol=1e-5, atol=0)

    def test_whiten_gives_a_multiple_of_the_identity(self):
        table = made_table()
        rows = apply_transform(table, "whiten").vectors[table.present].double()
        covariance = rows.T @ rows / len(rows)
        mean = covariance.diagonal().mean()
        # directions of small variance are a few per cent short, by the floor
        assert (covariance / mean - torch.eye(12)).abs().max() < 0.3
        raw = apply_transform(table, "center").vectors[table.present].double()
        raw = raw.T @ raw / len(raw)
        assert (raw / raw.diagonal().mean() - torch.eye(12)).abs().max() > 1

    @pytest.mark.parametrize("kind", ["standardize", "whiten"])
    @pytest.mark.parametrize(("n", "rank"), [(200, 3), (8, 12), (3, 12)])
    def test_rank_deficiency(self, kind, n, rank):
        """Directions without variance must stay without: dividing by their root would show rounding as content."""
        table = made_table(n=n, rank=rank, absent=(0,))
        rows = apply_transform(table, kind).vectors[table.present]
        assert rows.isfinite().all()
        spectrum = torch.linalg.svdvals(rows.double())
        assert spectrum[min(rank, n - 2) :].max() < 1e-3 * spectrum[0]

    @pytest.mark.parametrize("kind", ["center", "standardize", "whiten"])
    def test_equal_rows_and_no_rows(self, kind):
        same = FeatureTable(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), "text", "")
        assert apply_transform(same, kind).vectors.abs().max() == 0
        none = FeatureTable(torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool), "text", "")
        assert apply_transform(none, kind).vectors.abs().max() == 0

    def test_unknown(self):
        with pytest.raises(
            ValueError, match="feature_transform must be one of center, none, standardize, whiten, got 'pca'"
        ):
            apply_transform(made_table(), "pca")

    def test_table_checks_its_shapes(self):
        with pytest.raises(ValueError, match=r"vectors must be float32 \[3, dim\]"):
            FeatureTable(torch.zeros(4, 3), torch.ones(3, dtype=torch.bool), "text", "")
        with pytest.raises(ValueError, match=r"present must be bool"):
            FeatureTable(torch.zeros(4, 3), torch.ones(4), "text", "")


VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)
IDS = ["a", "b", "c", "7"]


def write_npy(folder):
    np.save(folder / "v.npy", VECTORS)
    (folder / "v.ids.txt").write_text("\n".join(IDS) + "\n")
    return folder / "v.npy"


def write_float64(folder):
    np.save(folder / "v.npy", VECTORS.astype(np.float64))
    (folder / "v.txt").write_text("\r\n".join(IDS))
    return folder / "v.npy"


def write_safetensors(folder):
    save_file({"vectors": torch.from_numpy(VECTORS)}, folder / "v.safetensors", metadata={"ids": json.dumps(IDS)})
    return folder / "v.safetensors"


def write_half(folder):
    save_file({"embedding": torch.from_numpy(VECTORS).bfloat16()}, folder / "v.safetensors")
    (folder / "v.ids.txt").write_text("\n".join(IDS))
    return folder / "v.safetensors"


def write_atomic(folder):
    rows = [f"{token}\t{' '.join(map(str, row))}" for token, row in zip(IDS, VECTORS, strict=True)]
    (folder / "toy.itememb").write_text("iid:token\tvector:float_seq\n" + "\n".join(rows) + "\n")
    return folder / "toy.itememb"


def write_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": IDS, "vector": list(VECTORS)}), folder / "v.parquet")
    return folder / "v.parquet"


def write_wide_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {f"d{i}": VECTORS[:, i] for i in range(3)}
    parquet.write_table(pyarrow.table({"id": IDS, **columns}), folder / "v.parquet")
    return folder / "v.parquet"


FORMS = [write_npy, write_float64, write_safetensors, write_half, write_atomic, write_parquet, write_wide_parquet]


class TestFiles:
    @pytest.mark.parametrize("write", FORMS)
    def test_aligned_to_the_ids(self, tmp_path, write, caplog):
        caplog.set_level(logging.INFO)
        table = load_features(write(tmp_path), [None, "7", "nowhere", "a"])
        assert table.present.tolist() == [False, True, False, True]
        assert table.vectors.dtype == torch.float32
        assert table.vectors.tolist() == [[0, 0, 0], [9, 10, 11], [0, 0, 0], [0, 1, 2]]
        assert "dimension 3; 2 of 3 ids have one; 2 of its ids are not in the data, 0 repeat" in caplog.text

    def test_integer_ids(self, tmp_path):
        save_file({"x": torch.from_numpy(VECTORS), "ids": torch.tensor([5, 6, 7, 8])}, tmp_path / "v.safetensors")
        assert load_features(tmp_path / "v.safetensors", ["7"]).vectors.tolist() == [[6, 7, 8]]

    def test_first_of_a_repeated_id_counts(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        np.save(tmp_path / "v.npy", VECTORS)
        (tmp_path / "v.txt").write_text("a\nb\na\nb\n")
        assert load_features(tmp_path / "v.npy", ["a", "b"]).vectors.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert "2 repeat an earlier one" in caplog.text

    def test_fingerprint_is_of_the_content(self, tmp_path):
        (tmp_path / "other").mkdir()
        one, same = load_features(write_npy(tmp_path), ["a"]), load_features(write_npy(tmp_path / "other"), ["a"])
        assert one.fingerprint == same.fingerprint
        np.save(tmp_path / "v.npy", VECTORS + 1)
        assert load_features(tmp_path / "v.npy", ["a"]).fingerprint != one.fingerprint

    def broken(self, folder, array=VECTORS, ids=IDS):
        np.save(folder / "v.npy", array)
        if ids is not None:
            (folder / "v.txt").write_text("\n".join(ids))
        return folder / "v.npy"

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"ids": None}, "needs its ids, one per line, in v.ids.txt or v.txt"),
            ({"ids": ["a"]}, "4 vectors and 1 ids"),
            ({"array": VECTORS[0], "ids": ["a", "b", "c"]}, r"expected numbers \[n, dim\], got float32 \(3,\)"),
            ({"array": np.array([["x"] * 3] * 4)}, r"expected numbers \[n, dim\]"),
            ({"array": np.array([[None] * 3] * 4)}, "is not a .npy array of numbers"),
            ({"ids": ["p", "q", "r", "s"]}, r"none of its 4 ids \('p', 'q', 'r', ...\) is one of the 1 wanted \('a'\)"),
            ({"array": np.full((4, 3), np.nan, np.float32)}, "1 vectors have NaN or infinite values, of ids 'a'"),
        ],
        ids=["no ids", "too few ids", "one dimension", "strings", "pickle", "other ids", "nan"],
    )
    def test_faults_are_named(self, tmp_path, fault, message):
        path = self.broken(tmp_path, **fault)
        with pytest.raises(ValueError, match=message):
            load_features(path, ["a"])

    def test_no_file_and_unknown_form(self, tmp_path):
        with pytest.raises(ValueError, match=r"item_features_file .*nowhere.npy'?: no such file"):
            load_features(tmp_path / "nowhere.npy", ["a"])
        (tmp_path / "v.csv").write_text("id,x,y\na,1,2\n")
        with pytest.raises(ValueError, match=r"known are .npy, .safetensors, .parquet and RecBole's atomic files"):
            load_features(tmp_path / "v.csv", ["a"])
        (tmp_path / "v.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="is not a safetensors file"):
            load_features(tmp_path / "v.safetensors", ["a"])

    def test_vectors_of_different_lengths(self, tmp_path):
        (tmp_path / "v.emb").write_text("iid:token\tv:float_seq\na\t1 2\nb\t1\n")
        with pytest.raises(ValueError, match="different lengths .2 at first, another for 'b'"):
            load_features(tmp_path / "v.emb", ["a"])

    def test_parquet_without_pyarrow(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        (tmp_path / "v.parquet").write_bytes(b"")
        with pytest.raises(ValueError, match="pip install pyarrow"):
            load_features(tmp_path / "v.parquet", ["a"])


class TestParquetOfPandas:
    """A data frame that was shuffled before it was saved has its index in the file: no dimension, no id."""

    @pytest.fixture
    def frame(self):
        pytest.importorskip("pyarrow")
        pd = pytest.importorskip("pandas")
        columns = {f"d{i}": VECTORS[:, i] for i in range(3)}
        return pd.DataFrame({"item_id": IDS, **columns}).sample(frac=1, random_state=1)

    def read(self, folder, frame):
        frame.to_parquet(folder / "v.parquet")
        return load_features(folder / "v.parquet", [None, *IDS]).vectors[1:].tolist()

    def test_one_column_per_dimension(self, frame, tmp_path):
        assert self.read(tmp_path, frame) == VECTORS.tolist()

    def test_a_column_of_lists(self, frame, tmp_path):
        frame["vector"] = list(frame[["d0", "d1", "d2"]].to_numpy())
        assert self.read(tmp_path, frame[["item_id", "vector"]]) == VECTORS.tolist()

    def test_ids_in_the_index(self, frame, tmp_path):
        assert self.read(tmp_path, frame.set_index("item_id")) == VECTORS.tolist()

    def test_an_index_of_an_index(self, frame, tmp_path):
        assert self.read(tmp_path, frame.rename(columns=str).set_axis(range(4)).rename_axis(None)) == VECTORS.tolist()
        named = frame.copy()
        named.insert(1, "Unnamed: 0", range(4))
        assert self.read(tmp_path, named) == VECTORS.tolist()

    def test_integer_ids_and_integer_dimensions(self, frame, tmp_path):
        whole = frame.assign(item_id=[10, 11, 12, 13]).astype("int64")
        whole.to_parquet(tmp_path / "v.parquet")
        table = load_features(tmp_path / "v.parquet", ["12"])
        expected = [whole[whole.item_id == 12][["d0", "d1", "d2"]].iloc[0].tolist()]
        assert table.vectors.tolist() == expected
        odd = whole.assign(item_id=[13, 10, 12, 11])
        odd.set_index("item_id").to_parquet(tmp_path / "v.parquet")
        expected = [odd[odd.item_id == 12][["d0", "d1", "d2"]].iloc[0].tolist()]
        assert load_features(tmp_path / "v.parquet", ["12"]).vectors.tolist() == expected

    def test_consecutive_ids_in_the_index(self, frame, tmp_path):
        """Pandas keeps where they begin and end, and no column."""
        pd = pytest.importorskip("pandas")
        whole = frame.drop(columns="item_id").set_axis(pd.RangeIndex(10, 14, name="item_id"))
        whole.to_parquet(tmp_path / "v.parquet")
        vectors = load_features(tmp_path / "v.parquet", ["12", "10"]).vectors.tolist()
        assert vectors == [whole.iloc[2].tolist(), whole.iloc[0].tolist()]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f.reset_index(), r"not so: item_id \((large_)?string\). Leave out what is no dimension"),
            (lambda f: f.assign(n=range(4)), r"not so: n \(int64\)"),
            (lambda f: f.assign(title="words"), r"not so: title"),
            (lambda f: f.assign(v=[[1.0]] * 4), r"not so: v \(list"),
            (lambda f: f[["item_id"]], "expected a column of ids"),
            (lambda f: f[["d0", "d1"]], r"no column holds ids as strings or integers; it has d0 \(float\), d1"),
            (lambda f: f.assign(d1=[1.0, None, 2.0, 3.0]), "values are missing in the columns 'd1'|NaN or infinite"),
        ],
    )
    def test_what_is_no_dimension_is_named(self, frame, tmp_path, change, message):
        change(frame).to_parquet(tmp_path / "v.parquet")
        with pytest.raises(ValueError, match=message):
            load_features(tmp_path / "v.parquet", IDS)

    def test_damaged(self, tmp_path):
        pytest.importorskip("pyarrow")
        (tmp_path / "v.parquet").write_bytes(b"PAR1 nothing PAR1")
        with pytest.raises(ValueError, match="v.parquet is not a readable Parquet file"):
            load_features(tmp_path / "v.parquet", IDS)


class TestAtomicForms:
    """Vectors in an atomic file stand between RecBole's own separators, in the columns that preload_weight names."""

    def read(self, folder, content, **form):
        (folder / "v.emb").write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_features(folder / "v.emb", ["b", "a"], form=AtomicForm(**form)).vectors.tolist()

    @pytest.mark.parametrize(
        ("field", "seq"), [(",", "|"), ("\t", ","), (";", " "), ("|", ","), ("::", "; "), (",", "  ")]
    )
    def test_both_separators(self, tmp_path, field, seq):
        rows = [["iid:token", "v:float_seq"], ["a", seq.join(["1", "2.5", "-3"])], ["b", seq.join(["4", "5", "6e1"])]]
        text = "".join(field.join(row) + "\n" for row in rows)
        assert self.read(tmp_path, text, separator=field, seq_separator=seq) == [[4, 5, 60], [1, 2.5, -3]]

    def test_empty_parts_are_left_out_as_recbole_does(self, tmp_path):
        text = "iid:token\tv:float_seq\na\t1||2|\nb\t|3|4\n"
        assert self.read(tmp_path, text, seq_separator="|") == [[3, 4], [1, 2]]

    def test_the_columns_that_are_named(self, tmp_path):
        text = "n:float\timage:float_seq\tiid:token\ttext:float_seq\n1\t7 7\ta\t1 2\n2\t8 8\tb\t3 4\n"
        assert self.read(tmp_path, text, id_field="iid", vector_field="text") == [[3, 4], [1, 2]]
        assert self.read(tmp_path, text, id_field="iid", vector_field="image") == [[8, 8], [7, 7]]
        with pytest.raises(ValueError, match="expected one float_seq column, got n:float, image:float_seq"):
            self.read(tmp_path, text, id_field="iid")
        with pytest.raises(ValueError, match="expected sound float_seq column"):
            self.read(tmp_path, text, id_field="iid", vector_field="sound")

    def test_a_byte_order_mark_and_other_encodings(self, tmp_path):
        text = "iid:token\tv:float_seq\r\na\t1 2\r\nb\t3 4\r\n"
        assert self.read(tmp_path, b"\xef\xbb\xbf" + text.encode()) == [[3, 4], [1, 2]]
        assert self.read(tmp_path, text.encode("utf-16"), encoding="utf-16") == [[3, 4], [1, 2]]
        with pytest.raises(ValueError, match="cannot be read as utf-8: .* It is UTF-16: set encoding to utf-16"):
            self.read(tmp_path, text.encode("utf-16"))

    def test_the_wrong_separator_is_named_with_the_id(self, tmp_path):
        with pytest.raises(
            ValueError,
            match=r"the vector of 'a' is '1\|2', and numbers with ' ' between them are expected .seq_separator",
        ):
            self.read(tmp_path, "iid:token\tv:float_seq\na\t1|2\nb\t3|4\n")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_ids_beside_may_hold_what_some_take_for_line_ends(tmp_path, end, last):
    ids = ["a\u2028b", "c\x85d", "é"]
    np.save(tmp_path / "v.npy", VECTORS[:3])
    (tmp_path / "v.txt").write_bytes(b"\xef\xbb\xbf" + (end.join(ids) + (end if last else "")).encode())
    assert load_features(tmp_path / "v.npy", ids).vectors.tolist() == VECTORS[:3].tolist()
    (tmp_path / "v.txt").write_bytes(end.join(ids).encode("utf-16"))
    with pytest.raises(ValueError, match="the ids' file '.*v.txt' is UTF-16, and UTF-8 is expected"):
        load_features(tmp_path / "v.npy", ids)
