"""Small text files of the user's, and values with commas."""

import pytest

from recbole_llm.text_files import lines_of, read_text, separated, wide_encoding


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_told_by_their_bytes(encoding, tmp_path):
    assert wide_encoding("epochs: 5\n".encode(encoding)) == encoding
    (tmp_path / "a.yaml").write_bytes("epochs: 5\n".encode(encoding))
    with pytest.raises(ValueError, match=f"config_files: '.*a.yaml' is {encoding.upper()}, and UTF-8 is expected"):
        read_text(tmp_path / "a.yaml", "config_files:")


@pytest.mark.parametrize("content", [b"", b"a", b"abc\0", b"\0\0\0\0", b"ab\0cd\0", b"\xef\xbb\xbfa\n"])
def test_other_bytes_are_not(content):
    assert wide_encoding(content) is None


def test_a_mark_is_dropped_and_ids_keep_what_they_hold(tmp_path):
    (tmp_path / "ids.txt").write_bytes("\ufeffu1\r\n\r\n u2 \nu,3\na\u2028b\x85\n".encode())
    assert lines_of(tmp_path / "ids.txt", "--users-file") == ["u1", " u2 ", "u,3", "a\u2028b\x85"]
    assert read_text(tmp_path / "ids.txt", "x").startswith("u1")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="--users-file '.*nowhere' cannot be read: No such file"):
        lines_of(tmp_path / "nowhere", "--users-file")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        lines_of(tmp_path, "--users-file")
    (tmp_path / "a").write_bytes(b"a\nb\ncaf\xe9\n")
    with pytest.raises(ValueError, match="line 3: byte 0xe9 is not UTF-8. Save the file as UTF-8"):
        read_text(tmp_path / "a", "x")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (["a,b", "c"], ["a", "b", "c"]),
        (["a, b"], ["a", "b"]),
        (['"a,b",c'], ["a,b", "c"]),
        (['"a,b"', "c"], ["a,b", "c"]),
        (['"say ""hi"""'], ['say "hi"']),
        (["u1,x"], ["u1,x"]),  # known as a whole
        (["u1,x,u2"], ["u1", "x", "u2"]),
        (["", ",", ",a,,"], ["a"]),
        (['5"'], ['5"']),
        (['" a"'], [" a"]),
        (["é,日本"], ["é", "日本"]),
    ],
)
def test_commas_separate_unless_quoted_or_known(values, parts):
    assert separated(values, {"u1,x"}) == parts


@pytest.mark.parametrize("value", ['"a', '"a"b', "a\nb,c"])
def test_a_quote_that_does_not_close_is_an_error(value):
    with pytest.raises(ValueError, match="cannot be split at its commas"):
        separated([value])
