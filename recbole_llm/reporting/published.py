"""Published figures of the canonical leave-one-out tables of Amazon 2014 Beauty, Sports and Toys, each with its source.

The data are the five-core of Amazon 2014: the users, items and order of S3-Rec, which TIGER, ActionPiece, eSASRec and others share.
A user's last item is the test, the one before it the validation, and every item is ranked. The sources differ in one rule: whether
the items of the history keep a place in the ranking. ``masked`` says which rule a row follows where its source tells.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Canonical:
    """One canonical data set.

    Attributes:
        dataset: its folder of atomic files.
        title: for captions.
        users: how many it has.
        items: how many it has.
    """

    dataset: str
    title: str
    users: int
    items: int


CANONICAL = {
    "beauty": Canonical("amazon-beauty", "Amazon 2014 Beauty", 22_363, 12_101),
    "sports": Canonical("amazon-sports", "Amazon 2014 Sports and Outdoors", 35_598, 18_357),
    "toys": Canonical("amazon-toys", "Amazon 2014 Toys and Games", 19_412, 11_924),
}


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        method: its name.
        ndcg: NDCG@10 by data set.
        recall: Recall@10 by data set, where the source has it.
        masked: whether history items have no place; ``None`` where the source does not tell.
        source: where it was read.
    """

    method: str
    ndcg: dict[str, float]
    recall: dict[str, float]
    masked: bool | None
    source: str


_BENCHMARK = "README of github.com/blondered/transformer_benchmark"
_GENREC = "README of github.com/phonism/genrec"

PUBLISHED = (
    Published(
        "S3-Rec", {"beauty": 0.0327, "sports": 0.0204, "toys": 0.0376}, {"beauty": 0.0647}, True, "S3-Rec (CIKM 2020)"
    ),
    Published(
        "TIGER",
        {"beauty": 0.0384, "sports": 0.0225, "toys": 0.0432},
        {"beauty": 0.0648, "sports": 0.0400, "toys": 0.0712},
        False,
        "TIGER (NeurIPS 2023)",
    ),
    Published("HSTU, reported", {"beauty": 0.0389, "sports": 0.0215}, {}, None, f"HSTU's figures in the {_GENREC}"),
    Published(
        "HSTU, recomputed",
        {"beauty": 0.0439, "sports": 0.0243, "toys": 0.0450},
        {"beauty": 0.0788},
        None,
        f"recomputed in the {_GENREC}",
    ),
    Published(
        "ActionPiece",
        {"beauty": 0.0424, "sports": 0.0264},
        {"beauty": 0.0775, "sports": 0.0500},
        None,
        "ActionPiece (ICML 2025)",
    ),
    Published(
        "LC-Rec", {"beauty": 0.0438, "sports": 0.0226, "toys": 0.0371}, {"beauty": 0.0791}, None, f"the {_GENREC}"
    ),
    Published(
        "SASRec of RecBole", {"beauty": 0.0432}, {"beauty": 0.0848}, False, "github.com/kanishkaRandunu/pswrec2k26"
    ),
    Published(
        "LightSANs of RecBole", {"beauty": 0.0444}, {"beauty": 0.0861}, False, "github.com/kanishkaRandunu/pswrec2k26"
    ),
    Published(
        "DuoRec",
        {"beauty": 0.0443, "sports": 0.0262},
        {"beauty": 0.0845, "sports": 0.0498},
        None,
        "DuoRec (WSDM 2022), as later papers cite it",
    ),
    Published(
        "eSASRec", {"beauty": 0.0523, "sports": 0.0323, "toys": 0.0538}, {"beauty": 0.0928, "sports": 0.0560}, True, _BENCHMARK
    ),
    Published(
        "SASRec with sampled softmax",
        {"beauty": 0.0531, "sports": 0.0314, "toys": 0.0580},
        {"beauty": 0.0921, "toys": 0.0970},
        True,
        _BENCHMARK,
    ),
)  # fmt: skip


def published(name: str) -> list[Published]:
    """Return the published rows of a canonical data set, best first; an empty list for any other data set."""
    return sorted((row for row in PUBLISHED if name in row.ndcg), key=lambda row: -row.ndcg[name])
