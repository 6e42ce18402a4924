"""Texts from atomic files: what stands in the file is what the encoder sees, and everything left out is counted."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.content.text import (
    Template,
    choose_text_fields,
    default_template,
    read_atomic_table,
    render_texts,
    texts_of_tokens,
)


@pytest.fixture
def item_file(tmp_path):
    def write(text, name="toy.item", encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return path

    return write


def table(item_file, header, *rows):
    return read_atomic_table(item_file("\n".join([header, *rows]) + "\n"), "item_id")


class TestReading:
    def test_cells_stay_as_they_are(self, item_file):
        """RecBole's reader fails on the first, empties the second and joins the spaces of the third (RECBOLE.md C)."""
        read = table(
            item_file,
            "item_id:token\ttitle:token_seq",
            '1\t"starts with a quote',
            "2\tNA",
            "3\tThe  Big  Lebowski",
            '4\t"two" "quotes"',
        )
        assert read.columns["title"] == ['"starts with a quote', "NA", "The  Big  Lebowski", '"two" "quotes"']
        assert read.types == {"item_id": "token", "title": "token_seq"}

    def test_first_row_of_a_repeated_id_counts(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq", "a\tfirst", "b\tother", "a\tsecond", "a\tthird")
        assert read.columns["title"] == ["first", "other"]
        assert read.row_of == {"a": 0, "b": 1}
        assert read.duplicates == 2

    def test_windows_line_ends_byte_order_mark_and_blank_lines(self, item_file):
        read = read_atomic_table(item_file("\ufeffitem_id:token\ttitle:token_seq\r\n1\ta\r\n\r\n2\tb"), "item_id")
        assert read.columns["title"] == ["a", "b"]

    def test_short_line_has_empty_cells(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq\tbrand:token", "1\tpen")
        assert read.columns["brand"] == [""]

    def test_id_keeps_its_spaces_and_zeros(self, item_file):
        assert list(table(item_file, "item_id:token\ttitle:token", " 007\tBond").row_of) == [" 007"]

    def test_separator_and_encoding(self, item_file):
        path = item_file("item_id:token::title:token_seq\n1::Amélie\n", encoding="latin-1")
        read = read_atomic_table(path, "item_id", separator="::", encoding="latin-1")
        assert read.columns["title"] == ["Amélie"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is empty"),
            ("item_id\ttitle\n", "'item_id' is not name:type"),
            ("item_id:token,title:token\n", "field_separator, which is"),
            ("item_id:token\ttitle:text\n", "'title:text' is not name:type"),
            ("item_id:token\ttitle:token\ttitle:token\n", "'title' twice"),
            ("asin:token\ttitle:token\n", "no id column 'item_id'; its columns are asin, title"),
            ("item_id:token\ttitle:token\n1\ta\n2\tb\tc\n", "line 3: 3 cells where the header has 2"),
            ("item_id:token\ttitle:token\n \ta\n", "line 2: the id column 'item_id' is empty"),
        ],
    )
    def test_faults_are_named(self, item_file, content, message):
        with pytest.raises(ValueError, match=message):
            read_atomic_table(item_file(content), "item_id")

    def test_bytes_of_another_encoding(self, item_file):
        with pytest.raises(ValueError, match=r"toy.item cannot be read as utf-8.*Set encoding"):
            read_atomic_table(item_file("item_id:token\ttitle:token\n1\tAmélie\n", encoding="latin-1"), "item_id")

    def test_utf_16_is_named(self, item_file):
        with pytest.raises(ValueError, match="It is UTF-16: set encoding to utf-16"):
            read_atomic_table(item_file("item_id:token\ttitle:token\n1\tA\n", encoding="utf-16"), "item_id")
        with pytest.raises(ValueError, match="begins with zero bytes, as UTF-16 does: set encoding"):
            read_atomic_table(item_file("item_id:token\ttitle:token\n1\tA\n", encoding="utf-16-le"), "item_id")

    def test_words_of_a_sequence_stand_between_its_own_separators(self, item_file):
        rows = [f"i{n}|fine, lamp,number,n{n}|7,5|" for n in range(5)] + ["i9|,|a|"]
        path = item_file("\n".join(["item_id:token|name:token_seq|code:token|none:token_seq", *rows, ""]))
        read = read_atomic_table(path, "item_id", separator="|", seq_separator=",")
        assert read.columns["name"][0] == "fine, lamp,number,n0"  # as it stands in the file, for those who split it
        assert read.words("name")[:2] == ["fine lamp number n0", "fine lamp number n1"] and read.words("name")[-1] == ""
        assert read.words("code")[0] == "7,5"
        assert choose_text_fields(read) == ("name",)
        assert render_texts(read, ["name"])["i3"] == "Name: fine lamp number n3"
        assert render_texts(read, ["name"])["i9"] == ""

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"toy.item: no such file"):
            read_atomic_table(tmp_path / "toy.item", "item_id")

    def test_very_long_cell(self, item_file):
        """The csv module stops at 131072 characters."""
        assert (
            len(table(item_file, "item_id:token\ttitle:token_seq", "1\t" + "x" * 300_000).columns["title"][0])
            == 300_000
        )


# a column's type and values, and whether it is text
COLUMNS = {
    "title": ("token_seq", ["Toy Story", "GoldenEye", "Four Rooms"], True),
    "brand": ("token", ["VTech", "Paper Mate", "3M"], True),
    "class": ("token_seq", ["Action Crime", "Comedy", "Drama"], True),
    "release_year": ("token", ["1995", "1996", "2001"], True),
    "occupation": ("token", ["technician", "other", "writer"], True),
    "cjk": ("token", ["書", "本", "映画"], True),
    "review": ("token_seq", ["See https://a.b for more", "good 10/10", "!!! bad"], True),
    "mostly_empty": ("token", ["", "", "a word"], True),
    "age": ("token", ["24", "53", "33"], False),
    "gender": ("token", ["M", "F", "M"], False),
    "zip_code": ("token", ["85711", "94043", "V0R2M"], False),
    "code": ("token", ["B00001P4ZH", "B00000JBAT", "B0000531EM"], False),
    "asin": ("token", ["Banana", "Apple", "Cherry"], False),
    "categoryId": ("token", ["abc", "def", "ghi"], False),
    "image": ("token", ["cover art", "poster art", "still"], False),
    "cover": ("token", ["http://x.y/a.jpg", "https://x.y/b.png", "http://x.y/c"], False),
    "price_text": ("token", ["$12.99", "1,200.00 €", "7"], False),
    "released": ("token", ["01-Jan-1995", "2-February-1996", "1996-04-03T10:00:00"], False),
    "published": ("token", ["1995-01-01", "1996/04/03", "12.11.2001"], False),
    "hash": ("token", ["3fa85f64-5717-4562-b3fc", "9e107d9d372bb6826bd8", "1f3870be274f6c49b3e3"], False),
    "genre_ids": ("token_seq", ["12 7", "3", "4 5 6"], False),
    "similar": ("token_seq", ["12 7", "3", "4 5 6"], False),
    "price": ("float", ["1.5", "2", "3"], False),
    "vector": ("float_seq", ["0.1 0.2", "0.3 0.4", "0.5 0.6"], False),
    "nothing": ("token_seq", ["", "", ""], False),
}


class TestChoice:
    @pytest.mark.parametrize("name", COLUMNS)
    def test_each_kind_of_column(self, item_file, name):
        kind, values, is_text = COLUMNS[name]
        rows = [f"{i}\t{value}\twords" for i, value in enumerate(values)]
        chosen = choose_text_fields(table(item_file, f"item_id:token\t{name}:{kind}\tsure:token", *rows))
        assert chosen == ((name, "sure") if is_text else ("sure",))

    def test_id_column_with_words_is_not_text(self, item_file):
        read = table(item_file, "title:token_seq\titem_id:token", "Toy Story\tToy-Story", "Heat\tHeat")
        assert choose_text_fields(read) == ("title",)

    def test_ml_100k(self):
        """The data set inside the recbole package, found without importing it."""
        package = importlib.util.find_spec("recbole").submodule_search_locations[0]
        read = read_atomic_table(Path(package) / "dataset_example/ml-100k/ml-100k.item", "item_id")
        assert choose_text_fields(read) == ("movie_title", "release_year", "class")
        texts, report = texts_of_tokens(read, [None, "1"], choose_text_fields(read))
        assert texts == [None, "Movie title: Toy Story. Release year: 1995. Class: Animation Children's Comedy"]
        assert report.lines()[1] == "All 1 ids have a text"

    def test_nothing_looks_like_text(self, item_file):
        read = table(item_file, "item_id:token\tage:token\tprice:float", "1\t24\t3.5")
        with pytest.raises(ValueError, match=r"age:token, price:float.*item_text_fields.*item_features_file.*encoder"):
            choose_text_fields(read)

    def test_requested_columns_in_the_order_given(self, item_file):
        read = table(item_file, "item_id:token\tage:token\ttitle:token_seq", "1\t24\tx y")
        assert choose_text_fields(read, ["title", "age", "title"]) == ("title", "age")

    def test_unknown_columns(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq", "1\tx y")
        with pytest.raises(ValueError, match=r"item_text_fields.*'titel'.*item_id:token, title:token_seq"):
            choose_text_fields(read, ["title", "titel"])
        with pytest.raises(ValueError, match=r"item_text_template names 'genre'"):
            choose_text_fields(read, None, "{title}. {genre}")

    def test_template_decides(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq\tbrand:token", "1\tx y\tz")
        assert choose_text_fields(read, None, "{brand}: {title}") == ("brand", "title")
        assert choose_text_fields(read, ["title"], "{brand}: {title}") == ("brand", "title")
        with pytest.raises(ValueError, match=r"does not use 'brand' of item_text_fields"):
            choose_text_fields(read, ["brand", "title"], "{title}")


class TestTemplate:
    @pytest.mark.parametrize(
        ("template", "row", "expected"),
        [
            ("{title}. Genres: {genres}", {"title": "Heat", "genres": "Crime"}, "Heat. Genres: Crime"),
            ("{title}. Genres: {genres}", {"title": "Heat", "genres": ""}, "Heat"),
            ("{title}. Genres: {genres}", {"title": "", "genres": "Crime"}, "Genres: Crime"),
            ("{title}. Genres: {genres}.", {"title": "Heat", "genres": ""}, "Heat"),
            ("{title}. Genres: {genres}", {"title": "Airplane!", "genres": "Comedy"}, "Airplane! Genres: Comedy"),
            ("{title} ({year}), {genres}", {"title": "Heat", "year": "", "genres": "Crime"}, "Heat, Crime"),
            ("{title} ({year}), {genres}", {"title": "Heat", "year": "1995", "genres": ""}, "Heat (1995)"),
            ("{title} (from {year})", {"title": "Heat", "year": "1995"}, "Heat (from 1995)"),
            ("{title} by {brand}", {"title": "Pen", "brand": ""}, "Pen"),
            ("{title} by {brand}", {"title": "", "brand": "BIC"}, "by BIC"),
            ("Product: {title} | {brand}\n{text}", {"title": "Pen", "brand": "", "text": "Blue"}, "Product: Pen\nBlue"),
            ("{title}\n{text}", {"title": "Stop.", "text": "Go"}, "Stop.\nGo"),
            ('"{title}" - {text}', {"title": "", "text": "Go"}, "Go"),
            ("{{{title}}}", {"title": "Pen"}, "{Pen}"),
            ("A film. {title}", {"title": "Heat"}, "A film. Heat"),
            ("A film. {title}", {"title": ""}, ""),
            ("{title}", {"title": "{year} %s (x)"}, "{year} %s (x)"),
        ],
    )
    def test_an_empty_column_takes_its_part_with_it(self, template, row, expected):
        assert Template(template).render(row) == expected

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{title", "for braces that are text"),
            ("title}", "for braces that are text"),
            ("{}", "a column's name and nothing else"),
            ("{title!r}", "a column's name and nothing else"),
            ("{title:>10}", "a column's name and nothing else"),
            ("no column", "has no column"),
        ],
    )
    def test_faults_are_named(self, template, message):
        with pytest.raises(ValueError, match=message):
            Template(template)

    cells = st.dictionaries(
        st.sampled_from(["title", "year", "genres", "brand"]), st.text(st.characters(categories=["L", "N"]), max_size=5)
    )

    @given(cells)
    def test_nothing_is_lost_and_no_label_stands_alone(self, cells):
        row = {"title": "", "year": "", "genres": "", "brand": "", **cells}
        text = Template("{title} ({year}). Genres: {genres}; by [{brand}].").render(row)
        assert all(value in text for value in row.values())
        assert "()" not in text
        assert "[]" not in text
        assert ("Genres" in text) == bool(row["genres"]) or "Genres" in "".join(row.values())
        assert bool(text) == any(row.values())
        assert text == text.strip()

    def test_default_names_every_column(self):
        assert default_template(["movie_title", "class"]) == "Movie title: {movie_title}. Class: {class}"


class TestAlignment:
    def test_aligned_and_counted(self, item_file):
        read = table(
            item_file,
            "item_id:token\ttitle:token_seq\tbrand:token",
            "a\tpen\tBIC",
            "b\t\t",
            "a\tagain\t",
            "c\t \tOxford",
        )
        texts, report = texts_of_tokens(read, [None, "c", "x", "b", "a"], ["title", "brand"])
        assert texts == [None, "Brand: Oxford", None, None, "Title: pen. Brand: BIC"]
        assert (report.n, report.missing, report.empty, report.duplicates) == (4, 1, 1, 1)
        log = "\n".join(report.lines())
        assert "columns title, brand; first text: 'Brand: Oxford'" in log
        assert "1 of 4 ids have no row" in log
        assert "1 of 4 have only empty text columns" in log
        assert "1 rows repeat an earlier id" in log

    def test_render_texts_covers_the_file(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq", "a\tpen", "b\t")
        assert render_texts(read, ["title"], "It is {title}") == {"a": "It is pen", "b": ""}

    def test_ids_that_do_not_match(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq", "a\tpen")
        with pytest.raises(ValueError, match=r"the ids do not match \(there 'a'; here '1', '2'\)"):
            texts_of_tokens(read, [None, "1", "2"], ["title"])

    def test_only_empty_columns(self, item_file):
        read = table(item_file, "item_id:token\ttitle:token_seq", "a\t")
        with pytest.raises(ValueError, match="the columns title are empty for every id"):
            texts_of_tokens(read, ["a"], ["title"])
