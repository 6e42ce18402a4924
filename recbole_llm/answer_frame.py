"""Answers as a DataFrame that prints whole: no column is left out, and a text that is too long ends in an ellipsis."""

from typing import Any

import pandas

from recbole_llm.terminal import columns_of, cut, printable, terminal_columns

TEXTS = ("user", "title", "rules")  # may be cut where the terminal is too narrow; ids of items never are
SHORTEST = 10  # columns that a text keeps


class AnswerFrame(pandas.DataFrame):
    """A DataFrame of answers.

    It is printed with all its columns. On a terminal the longest of ``user``, ``title`` and ``rules`` are cut until a line fits;
    where even short texts do not fit, lines are wrapped. In a file or a pipe all texts are whole. The values stay as they are.
    """

    @property
    def _constructor(self) -> Any:
        return AnswerFrame

    def __repr__(self) -> str:
        if "title" not in self.columns or not self.columns.is_unique:
            return super().__repr__()
        most, frame = terminal_columns(), self._shown()
        whole = _printed(frame, None)
        widest = max(map(columns_of, whole.split("\n")))
        if most is None or widest <= most:
            return whole
        widths = {
            name: max([columns_of(name), *map(columns_of, frame[name])]) for name in TEXTS if name in frame.columns
        }
        limits = _limits(widths, most - widest + sum(widths.values()), frame)
        for name, limit in limits.items():
            frame[name] = [cut(text, limit) for text in frame[name]]
        fits = sum(limits.values()) <= most - widest + sum(widths.values())
        return _printed(frame, None if fits else most)

    def _repr_html_(self) -> str | None:
        with pandas.option_context("display.max_columns", None, "display.max_colwidth", None):
            return super()._repr_html_()

    def _shown(self) -> pandas.DataFrame:
        """A plain copy whose texts command no terminal; empty where pandas leaves a row out."""
        most = pandas.get_option("display.max_rows")
        n, ends = len(self), len(self) if not most else most // 2 + 1
        frame = pandas.DataFrame(self, copy=True)
        for name in (*TEXTS, "item"):
            if name in frame.columns:
                texts = self[name].tolist()
                frame[name] = [
                    printable(str(text)) if at < ends or at >= n - ends else "" for at, text in enumerate(texts)
                ]
        return frame


def _limits(widths: dict[str, int], left: int, frame: pandas.DataFrame) -> dict[str, int]:
    """To how many columns each text is cut, so that together they take ``left`` where that can be.

    What is the same in all rows, as the words that were asked for, is cut first; then the longest.
    """
    limits = dict(widths)
    same = [name for name in limits if name != "title" and frame[name].nunique() == 1]
    for names in (same, list(limits)):
        while names and sum(limits.values()) > left:
            longest = max(names, key=limits.__getitem__)
            if limits[longest] <= SHORTEST:
                break
            limits[longest] -= 1
    return limits


def _printed(frame: pandas.DataFrame, columns: int | None) -> str:
    """What pandas prints of all columns, in lines of at most so many characters; ``None``: however long."""
    options: dict[str, Any] = {
        "display.max_columns": None,
        "display.max_colwidth": None,
        "display.expand_frame_repr": columns is not None,
        "display.show_dimensions": "truncate",
        "display.unicode.east_asian_width": True,
    }
    if columns is not None:
        options["display.width"] = columns
    with pandas.option_context(*(part for option in options.items() for part in option)):
        return repr(frame)
