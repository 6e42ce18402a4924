"""The table of a paper: what is bold, underlined and daggered, and what its caption says."""

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge.experiments.comparison import Comparison, Row
from recbole_llm.bridge.experiments.experiment import Experiment, Outcome, split_in_words
from recbole_llm.bridge.experiments.latex import as_latex
from recbole_llm.bridge.experiments.significance import Difference


def row(model, ndcg, recall, p=None, mean=0.02, seeds=3, error=""):
    figures = {} if error else {"ndcg@10": ndcg, "recall@10": recall, "averagepopularity@10": 12.0}
    difference = None if p is None else Difference(mean, 0.01, 0.03, p)
    spread = dict.fromkeys(figures, 0.0012)
    return Row(model, figures, spread, seeds, 1.0, 0.1, 0, 1.0, {}, difference, p, error)


def table(*rows, reference="EASE", dataset="my_shop 100%"):
    outcome = Outcome(Experiment("EASE", dataset), split="80/10/10 split of each user's interactions by time")
    return as_latex(Comparison(dataset, "ndcg@10", reference, "the best stock model", rows, (outcome,)))


def line_of(text, model):
    (line,) = [line for line in text.splitlines() if line.startswith(f"{model} &")]
    return line


def test_a_table_of_a_paper():
    text = table(
        row("LLMTwoTower", 0.12345, 0.3, p=0.01), row("EASE", 0.11, 0.31), row("Pop_2", 0.05, 0.2, p=0.9, seeds=1)
    )
    rules = (r"\toprule", r"\midrule", r"\bottomrule")
    assert [line for line in text.splitlines() if line in rules] == [rules[0], rules[1], rules[1], rules[2]]
    assert r"\hline" not in text and r"\begin{tabular}{lccc}" in text
    assert "Model & NDCG@10 & Recall@10 & Averagepopularity@10 \\\\" in text
    assert line_of(text, "LLMTwoTower") == (
        r"LLMTwoTower & \textbf{0.1235}$^{\dagger}$ $\pm$ 0.0012 & \underline{0.3000} $\pm$ 0.0012 & 12.0000 $\pm$ 0.0012 \\"
    )
    assert line_of(text, "EASE").startswith(r"EASE & \underline{0.1100} $\pm$ 0.0012 & \textbf{0.3100}")
    assert line_of(text, r"Pop\_2") == r"Pop\_2 & 0.0500 & 0.2000 & 12.0000 \\"
    # ours below the stock models, with a rule between
    lines = text.splitlines()
    assert lines.index(line_of(text, r"Pop\_2")) + 2 == lines.index(line_of(text, "LLMTwoTower"))
    caption = next(line for line in lines if line.startswith(r"\caption"))
    assert r"my\_shop 100\%" in caption and "80/10/10 split of each user's interactions by time" in caption
    assert "over 3 seeds" in caption and r"$\dagger$: better than the best baseline, EASE, in NDCG@10" in caption


@pytest.mark.parametrize(("p", "mean"), [(0.2, 0.02), (0.01, -0.02), (None, 0.0)])
def test_no_dagger_without_proof(p, mean):
    text = table(row("LLMTwoTower", 0.12, 0.3, p=p, mean=mean), row("EASE", 0.11, 0.31))
    assert "dagger" not in text.partition(r"\begin{table}")[2]


def test_equal_figures_are_best_together_and_failures_are_named():
    text = table(row("LLMTwoTower", 0.12, 0.3), row("EASE", 0.12, 0.1), row("BPR", 0, 0, error="no\nmemory"))
    assert text.count(r"\textbf{0.1200}") == 2
    assert "% BPR failed: no memory" in text and "BPR &" not in text


def test_the_split_in_words():
    def words(**given):
        config = {"benchmark_filename": given.pop("files", None), "eval_args": given}
        return split_in_words(config)

    assert words(split={"RS": [0.8, 0.1, 0.1]}, order="RO", group_by="user") == (
        "80/10/10 split of each user's interactions at random"
    )
    assert words(split={"RS": [8, 1, 1]}, order="TO", group_by="none") == "80/10/10 split of all interactions by time"
    assert words(split={"LS": "valid_and_test"}, order="TO", group_by="user") == (
        "leave one out of each user's interactions, by time"
    )
    assert words(files=["train", "test"]) == "the data set's own split"
