"""The HTML files that commands write: nothing of the data is markup, and a browser shows them to everybody."""

import dataclasses
import zipfile
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from browsers import SCHEMES, WIDTHS, keep, launched, needs_chromium, violations
from made_record import made_record

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("matplotlib", reason="extra 'report'")
from recbole_llm import cli
from recbole_llm.bridge.evaluation.popularity import BucketQuality
from recbole_llm.bridge.experiments.comparison import as_rows, compare
from recbole_llm.bridge.experiments.experiment import Outcome, Training
from recbole_llm.bridge.experiments.tuning import Trial
from recbole_llm.commands import compare as compare_command
from recbole_llm.commands import pages
from recbole_llm.commands import tune as tune_command
from recbole_llm.reporting import comparison_page, leaderboard_page, tuning_page
from recbole_llm.reporting.customers import Customer, Shown
from recbole_llm.reporting.document import pairs, shown_settings
from recbole_llm.reporting.leaderboard import SHOWN, as_latex, as_markdown
from recbole_llm.reporting.page import page
from recbole_llm.reporting.plots import pictures
from recbole_llm.reporting.published import Published
from recbole_llm.reporting.record import checked

HOSTILE = (
    "</title><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\"'`{{7*7}}&amp;$\\frac{1}{2}$"
)


def made_report(word="shop"):
    """A report; ``word`` stands where the data name something."""
    record = made_record(dataset=word)
    if word == HOSTILE:
        record["model"] = word
        record["models"] = {
            word: record["models"]["LLMTwoTower"],
            "bestsellers": record["models"]["bestsellers"],
            "ItemKNN": record["models"]["ItemKNN"],
        }
        record["history"]["search"][0]["setting"] = record["history"]["stages"][0]["stage"] = word
        record["metrics"] = {word: {word: 0.5}}
    customer = Customer((word,) * 3, 2, 4, (Shown(word, 0.1, True, (word,)),))
    record = checked(record)
    return page(record, pictures(record), [customer], {word: word}, {"recbole": word})


USERS = np.arange(1, 201)


def made_comparison(word="shop", seeds=2, **changed):
    """A comparison of five models, one of which fails and one of which is ours and best."""
    rng = np.random.default_rng(0)
    base = rng.random(200) * 0.4
    levels = {"LLMTwoTower": 0.08, "EASE": 0.05, "ItemKNN": 0.03, word if word == HOSTILE else "BPR": -0.02}

    def run(experiment):
        if experiment.model not in levels:
            return Outcome(experiment, error=f"ValueError: {word}")
        trainings = []
        for seed in experiment.seeds:
            values = base + levels[experiment.model] + 0.01 * rng.standard_normal(200)
            test = {"ndcg@10": float(values.mean()), "hit@10": 0.5}
            buckets = {
                name: BucketQuality(10, 30, 20, {"ndcg@10": float(values.mean()) * share})
                for name, share in (("head", 1.4), ("middle", 1.0), ("tail", 0.5))
            }
            trainings.append(
                Training(seed, values.mean(), test, test, 2.5, 0.1, USERS, {"ndcg@10": values}, 2.0, buckets)
            )
        return Outcome(experiment, tuple(trainings), split="80/10/10 split of each user's interactions by time")

    return dataclasses.replace(compare([*levels, "Absent"], word, seeds=seeds, reference="EASE", run=run), **changed)


def comparison_file(word="shop"):
    given = {"learning_rate": word, "encoder": "/home/somebody/secret/mini", "data_path": "/home/somebody/data"}
    return comparison_page.comparison_page(made_comparison(word), given, {"recbole": word}, "2026-11-30")


def made_trials(word="a"):
    """Ten settings, one of which failed, and one tried twice."""
    trials = []
    for n in range(9):
        params = {"learning_rate": 10.0 ** -(n % 3 + 1), "loss": (word, "bce")[n % 2], "layers": n // 3, "fixed": 1}
        value = 0.3 - abs(n % 3 - 1) / 20 + (n % 2) / 100
        trials.append(Trial(params, value, {"ndcg@10": value}, {"ndcg@10": -value}, 1.5, True, ""))
    trials.insert(4, Trial({"learning_rate": 9.0, "loss": word}, None, {}, {}, 0.0, True, f"RuntimeError: {word}"))
    return [*trials, trials[0]]


def tuning_file(word="shop"):
    return tuning_page.tuning_page(
        word, word, made_trials(word), "random", {"epochs": word}, {"recbole": word}, "today"
    )


def made_leaderboard(word="beauty"):
    """A table of three rows measured, the second with three seeds, and three published."""
    measured = []
    for name, value, seeds in (("EASE", 0.03, 1), ("LLMTwoTower", 0.05, 3), (word, 0.02, 1)):
        figures = {rule: {m: v for m in SHOWN} for rule, v in (("masked", value), ("unmasked", value * 0.8))}
        row = {"name": name, "chosen_by": "masked", "setting": word, "seeds": seeds, "figures": figures}
        row |= {"standard_error": dict.fromkeys(figures, 0.001), "cpu_seconds": 40 * value, "seconds": 1.0}
        row |= {"groups": {rule: {"rare": 0.9 * value, "short": 0.03} for rule in figures}, "peak_bytes": 3 * 2**29}
        row["group_users"] = {"rare": 70, "short": 90}
        best = 0.03 if name == "LLMTwoTower" else 0.05
        ahead = {"mean": value - best, "low": value - best - 0.005, "high": value - best + 0.005, "p": 0.0, "of": word}
        row["ahead"] = {"masked": ahead}
        if name != "LLMTwoTower":
            row["difference"] = {
                "masked": {"mean": 0.05 - value, "low": 0.045 - value, "high": 0.055 - value, "p": 0.0}
            }
        measured.append(row)
    published = [
        Published(word, {word: 0.052}, {word: 0.09}, True, word),
        Published("B", {word: 0.039}, {}, False, word),
        Published("C", {word: 0.01}, {}, None, word),
    ]
    cited = [dataclasses.asdict(row) for row in published]
    made = {"table": word, "dataset": word, "measured": measured, "published": cited, "versions": {"recbole": word}}
    return made | {"left_out": {"L3AE": f"no content in {word}"}}


def leaderboard_file(word="beauty"):
    return leaderboard_page.leaderboard_page(word, made_leaderboard(word), {"epochs": word}, "2026-11-30")


FILES = {"report": made_report, "comparison": comparison_file, "tuning": tuning_file, "leaderboard": leaderboard_file}
PICTURES = {"report": 7, "comparison": 4, "tuning": 4, "leaderboard": 3}


# ---------------------------------------------------------------- what they hold


class Parsed(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("kind", FILES)
def test_nothing_that_comes_from_data_becomes_markup_or_a_request(kind):
    content = FILES[kind](HOSTILE)
    found = Parsed(content)
    assert not set(found.elements) & {"script", "img", "iframe", "link", "object", "embed", "form", "a"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    wanted = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert {value for name, value in found.attributes if name.startswith("xmlns")} <= wanted
    for name, value in found.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#"), (name, value)
    assert HOSTILE in "".join(found.text)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert found.elements.count("svg") == PICTURES[kind]
    assert len(content) < 2_000_000


def test_the_words_and_figures_of_a_comparison():
    made = made_comparison()
    rows = {row.model: row for row in made.rows}
    ours, ease = rows["LLMTwoTower"], rows["EASE"]
    assert made.rows[0] is ours
    assert comparison_page.headline(made) == (
        f"LLMTwoTower is first with NDCG@10 {ours.mean['ndcg@10']:.4f}; {made.rows[1].model} reaches "
        f"{made.rows[1].mean['ndcg@10']:.4f}."
    )
    assert comparison_page.verdict(made).startswith(
        f"LLMTwoTower is better than EASE ({ours.difference.mean:+.4f}, 95% interval {ours.difference.low:+.4f} to "
    )
    near = dataclasses.replace(made, rows=(dataclasses.replace(ours, p=0.2), ease))
    assert comparison_page.verdict(near).startswith("No clear difference between LLMTwoTower and EASE")
    alone = dataclasses.replace(made, rows=(dataclasses.replace(ours, difference=None, p=None),))
    assert comparison_page.verdict(alone) == ""
    content = comparison_file()
    for row in made.rows:
        if row.error:
            assert f"{row.model} failed: ValueError: shop" in content
            continue
        assert f"{row.mean['ndcg@10']:.4f} ± {row.spread['ndcg@10']:.4f}" in content
    for said in (
        "80/10/10 split of each user&#x27;s interactions by time",
        "2 trainings of each model",
        "LLMTwoTower is proven better than EASE",
        "LLMTwoTower finds most of the least popular third",
        "Absent failed",
    ):
        assert said in content, said
    # no path of this machine, as the file is passed on
    assert "somebody" not in content and "<td>encoder</td><td>mini</td>" in content
    nothing = made_comparison(rows=tuple(row for row in made.rows if row.error))
    assert "No model finished." in comparison_page.comparison_page(nothing, {}, {}, "today")
    once = comparison_page.comparison_page(made_comparison(seeds=1), {}, {}, "today")
    assert "One training of each model." in once


def test_the_words_and_figures_of_a_search():
    content = tuning_file()
    best = max((trial for trial in made_trials("shop") if trial.score is not None), key=lambda trial: trial.score)
    assert f"The best of 10 settings reaches ndcg@10 {best.score:.4f} on validation: learning_rate 0.01" in content
    assert f"On the test split the best setting has ndcg@10 {-best.score:.4f}." in content
    assert "failed: RuntimeError: shop" in content
    assert "The best is number 2 of the 9 settings that finished" in content
    assert ">0.001</text>" in content and "mathdefault" not in content  # marks of a logarithmic axis
    assert "learning_rate: the best setting has 0.01" in content and "fixed: the best" not in content
    failed = [trial for trial in made_trials() if trial.score is None]
    assert "No setting finished." in tuning_page.tuning_page("m", "d", failed, "random", {}, {}, "today")
    smaller = [dataclasses.replace(trial, larger_is_better=False) for trial in made_trials() if trial.score]
    assert "reaches ndcg@10 0.2500" in tuning_page.tuning_page("m", "d", smaller, "random", {}, {}, "today")
    many = [dataclasses.replace(made_trials()[0], params={"n": n}) for n in range(250)]
    content = tuning_page.tuning_page("m", "d", many, "random", {}, {}, "today")
    assert "50 more are in tuning.json." in content and len(content) < 2_000_000


def test_the_words_and_figures_of_a_leaderboard():
    made = made_leaderboard()
    assert leaderboard_page.headline(made["measured"]) == (
        "LLMTwoTower is first of the rows measured here with NDCG@10 0.0500; EASE reaches 0.0300."
    )
    assert leaderboard_page.verdict(made["measured"]) == (
        "LLMTwoTower is better than EASE, the best other row (+0.0200, 95% interval +0.0150 to +0.0250)."
    )
    content = leaderboard_file()
    # .05 is not above .052 under its rule, .04 is above .039 under the other; the third does not tell its rule
    assert "Ours is above 1 of 2 published figures that state their rule" in content
    assert '<tr class="own"><td>LLMTwoTower, 3 seeds</td><td>masked</td><td>0.0500</td>' in content
    assert "<td>B</td><td>0.0390</td><td></td><td>ranked too</td>" in content
    assert "<td>0.0400</td><td>+0.0200 [+0.0150, +0.0250]</td></tr>" in content
    assert '<th scope="col">rare (70)</th>' in content and '<th scope="col">untrained</th>' in content
    cells = "<td></td><td>0.0270</td><td></td><td>0.0300</td><td></td><td>1</td><td>1.50</td><td>beauty</td>"
    assert f"<td>EASE (masked)</td>{cells}" in content
    assert "Amazon 2014 Beauty: leave one out by time" in content
    assert "<p>Left out: L3AE. no content in beauty</p>" in content
    assert "\nLeft out: L3AE. no content in beauty\n" in as_markdown("beauty", made)
    latex = as_latex("beauty", made)
    assert (
        r"LLMTwoTower, 3 seeds & \textbf{0.0500} & \textbf{0.0500}$^{\dagger}$ & \textbf{0.0400} & \textbf{0.0400} \\"
        in latex
    )
    assert r"EASE & \underline{0.0300} & \underline{0.0300} & \underline{0.0240}" in latex
    assert r"beauty & 0.0900 & 0.0520 & -- & -- \\" in latex and r"B & -- & -- & -- & 0.0390 \\" in latex
    assert r"C & -- & \textit{0.0100} & -- & \textit{0.0100} \\" in latex
    assert latex.count("\\midrule") == 2 and r"\label{tab:leaderboard-beauty}" in latex and "95\\% interval" in latex
    alone = {**made, "measured": [row for row in made["measured"] if row["name"] == "EASE"], "published": []}
    content = leaderboard_page.leaderboard_page("shop", alone, {}, "today")
    assert "EASE is first of the rows measured here with NDCG@10 0.0300." in content and "Published" not in content


def test_a_long_value_is_cut_as_text_and_says_so():
    first, second = (line for line in pairs("Given", {"a": "&" * 2003, "b": "&" * 2000}) if "<td>" in line)
    assert first.count("&amp;") == 2000 and "… and 3 more characters" in first
    assert second.count("&amp;") == 2000 and "more characters" not in second


def test_settings_are_shown_without_paths():
    given = {"encoder": "~/x/mini", "data_path": "/home/x", "epochs": 3, "checkpoint_dir": "/home/x"}
    assert shown_settings(given) == {"encoder": "mini", "epochs": "3"}
    assert shown_settings({"encoder": "org/mini"}) == {"encoder": "org/mini"}
    assert shown_settings({"field_separator": "\t"}) == {"field_separator": "'\\t'"}


# ---------------------------------------------------------------- the commands


def cells(file):
    """The worksheet's cells."""
    with zipfile.ZipFile(file) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        assert 'name="comparison"' in archive.read("xl/workbook.xml").decode()
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    rows = sheet.iter(f"{{{space['m']}}}row")
    return [["".join(cell.itertext()) for cell in row.findall("m:c", space)] for row in rows]


def test_compare_writes_its_files(tmp_path, monkeypatch, capsys):
    made = made_comparison()
    monkeypatch.setattr(compare_command, "compare", lambda *models, **options: made)
    settings = tmp_path / "a.yaml"
    settings.write_text("epochs: 7\ndata_path: /home/somebody\n")
    folder = tmp_path / "out"
    arguments = ["compare", "-m", "EASE,BPR", "-d", "shop", "--config-files", str(settings), "--learning-rate=0.5"]
    assert cli.main([*arguments, "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert comparison_page.headline(made) in out and comparison_page.verdict(made) in out
    names = {f"comparison.{suffix}" for suffix in ("html", "xlsx", "tex", "md", "json", "png")}
    assert {path.name for path in folder.iterdir()} == names
    content = (folder / "comparison.html").read_text()
    assert "<td>epochs</td><td>7</td>" in content and "<td>learning_rate</td><td>0.5</td>" in content
    assert "somebody" not in content and len(content) < 2_000_000
    header, first, *rest = cells(folder / "comparison.xlsx")
    assert header[:4] == ["model", "ndcg@10", "ndcg@10 standard deviation", "hit@10"] and header[-1] == "failed"
    assert first[0] == "LLMTwoTower" and float(first[1]) == made.rows[0].mean["ndcg@10"]
    assert float(first[header.index("ndcg@10 against EASE")]) == made.rows[0].difference.mean
    assert float(first[2]) == made.rows[0].spread["ndcg@10"]
    assert as_rows(made_comparison(seeds=1))[1][0][2] is None  # one training has no spread
    assert rest[-1][0] == "Absent" and rest[-1][-1] == "ValueError: shop" and rest[-1][1] == ""
    # without matplotlib the rest is there, and what is not is said first
    monkeypatch.setattr(compare_command, "can_draw", lambda: False)
    monkeypatch.setattr(pages, "can_draw", lambda: False)
    assert cli.main([*arguments, "--output", str(tmp_path / "bare")]) == 0
    assert "comparison.html and .png will not be written" in capsys.readouterr().out.splitlines()[0]
    assert {path.name for path in (tmp_path / "bare").iterdir()} == names - {"comparison.html", "comparison.png"}


def test_tune_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune_command, "tune", lambda *given, output, **options: (output.mkdir(), made_trials())[1])
    folder = tmp_path / "out"
    assert cli.main(["tune", "-m", "BPR", "--params-file", "x", "--output", str(folder), "--epochs=3"]) == 0
    assert {path.name for path in folder.iterdir()} == {"tuning.html", "tuning.json", "tuning.md"}
    content = (folder / "tuning.html").read_text()
    assert "BPR on ml-100k, tuned" in content and "<td>epochs</td><td>3</td>" in content
    assert "Exhaustive search." in content and len(content) < 2_000_000


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    with launched() as started:
        yield started


@needs_chromium
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_read_it_at_every_width(browser, tmp_path, kind, width):
    file = tmp_path / f"{kind}.html"
    file.write_text(FILES[kind](), encoding="utf-8")
    colours = []
    for scheme in SCHEMES:
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        asked = []
        view.on("request", lambda request, asked=asked: asked.append(request.url))
        view.goto(file.as_uri())
        assert asked == [file.as_uri()]
        assert violations(view) == []
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        sizes = view.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
        assert len(sizes) == PICTURES[kind] and min(sizes) > 250
        colours.append(view.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        keep(view, tmp_path, f"{kind}-{width}-{scheme}")
        view.close()
    assert colours[0] != colours[1]


@needs_chromium
@pytest.mark.parametrize("kind", FILES)
def test_hostile_names_do_nothing_in_a_browser(browser, tmp_path, kind):
    file = tmp_path / "report.html"
    file.write_text(FILES[kind](HOSTILE), encoding="utf-8")
    view = browser.new_page(viewport={"width": 390, "height": 800})
    asked, said = [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    view.goto(file.as_uri())
    assert asked == [file.as_uri()] and not said
    assert violations(view) == []
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.close()
