"""Bodies of requests, strictly read; those of answers are in ``answer_schemas.py``."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from recbole_llm.identifiers import MAX_ID_CHARACTERS

MAX_K = 1000
MAX_KEYS = 64  # of an object
MAX_EXPLAIN = 100
MAX_REASONS = 2000  # k x explain of a request
MAX_BATCH_ENTRIES = 25_600  # items and reasons of a batch: 256 answers of 100 items
MAX_BOOSTS = 16
MAX_CAPS = 8
MAX_CANDIDATES = 1000  # of diversity
MAX_COMPARED = 50_000  # k x candidates of a request, 20 ms
MAX_BATCH_COMPARED = 500_000
MAX_ITEMS = 1000
MAX_EXCLUDE = 10_000
MAX_TEXT_CHARACTERS = 8192
MAX_IMAGE_CHARACTERS = 8 << 20  # what a body may hold; the picture is measured when it is decoded
MAX_BATCH_REQUESTS = 256
MAX_BATCH_ITEMS = 1000


def _whole(value: Any) -> Any:
    """Accept 10.0 as the integer 10: JSON knows one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
Word = Annotated[str, StringConstraints(max_length=MAX_ID_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_whole)]


def _at_most(n: int) -> BeforeValidator:
    """Refuse a larger object before its entries are looked at, each of which may be an error or several."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > n:
            raise PydanticCustomError("too_many_keys", "An object of at most {n} keys is expected.", {"n": n})
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    """No conversion, no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid")
    few_keys = model_validator(mode="before")(_at_most(MAX_KEYS).func)


class Bounds(Strict):
    """Bounds of a number; all that are given must hold."""

    gt: Number | None = None
    gte: Number | None = None
    lt: Number | None = None
    lte: Number | None = None


# every list stops at its first error: a body of a million wrong entries would have a million errors
FilterValue = (
    Word
    | Number
    | Bounds
    | Annotated[list[Word], Field(max_length=1000, fail_fast=True)]
    | Annotated[list[Number], Field(max_length=1000, fail_fast=True)]
)
Filter = Annotated[dict[Word, FilterValue], Field(max_length=16), _at_most(16)]
AttributeValue = Word | Number | Annotated[list[Word], Field(max_length=256, fail_fast=True)]
Attributes = Annotated[dict[Word, AttributeValue], Field(max_length=MAX_KEYS), _at_most(MAX_KEYS)]


Weights = Annotated[list[Annotated[Number, Field(ge=0, le=1e6)]], Field(max_length=MAX_ITEMS, fail_fast=True)]


class BoostBody(Strict):
    """Lifts the items that meet all conditions; exactly one of ``add`` and ``odds``."""

    filter: Annotated[dict[Word, FilterValue], Field(min_length=1, max_length=16), _at_most(16)]
    add: Annotated[float | None, Field(ge=-1e6, le=1e6, allow_inf_nan=False, description="To the score.")] = None
    odds: Annotated[float | None, Field(ge=1e-6, le=1e6, allow_inf_nan=False, description="Factor of P / (1 - P).")] = (
        None
    )


class DiversityBody(Strict):
    """Items unlike each other by content, or the shares of an attribute's values as in the history."""

    weight: Annotated[float, Field(ge=0, le=1, description="Lambda; 0: the list as it is, 1: nothing but diversity.")]
    attribute: Annotated[Word | None, Field(description="What to calibrate by; none: content vectors.")] = None
    candidates: Annotated[
        Count | None, Field(ge=1, le=MAX_CANDIDATES, description="How many of the best the list is chosen from.")
    ] = None


class ExploreBody(Strict):
    """Places for items drawn at random."""

    share: Annotated[float, Field(ge=0, le=1, description="Of the places.")]
    seed: Annotated[Count, Field(ge=0, le=2**63 - 1, description="The same seed gives the same answer.")] = 0


class _Asked(Strict):
    k: Annotated[Count, Field(ge=1, le=MAX_K, description="How many items; fewer come where fewer are allowed.")] = 10
    exclude: Annotated[list[Id], Field(max_length=MAX_EXCLUDE, fail_fast=True)] = []
    exclude_seen: Annotated[bool, Field(description="Leave out what the history holds.")] = True
    filter: Annotated[Filter, Field(description="Conditions on attributes, all of which must hold.")] = {}
    explain: Annotated[
        Count, Field(ge=0, le=MAX_EXPLAIN, description=f"Reasons per item; k times explain is at most {MAX_REASONS}.")
    ] = 0
    fallback: Annotated[Literal["none", "popular"], Field(description="For unknown users and items.")] = "none"
    only: Annotated[list[Id] | None, Field(min_length=1, max_length=MAX_EXCLUDE, fail_fast=True)] = None
    boosts: Annotated[list[BoostBody], Field(max_length=MAX_BOOSTS, fail_fast=True)] = []
    caps: Annotated[
        dict[Word, Annotated[Count, Field(ge=1, le=MAX_K)]],
        Field(max_length=MAX_CAPS, description="Attribute to the most items with the same value of it."),
        _at_most(MAX_CAPS),
    ] = {}
    diversity: Annotated[
        DiversityBody | None, Field(description=f"k times the candidates is at most {MAX_COMPARED}.")
    ] = None
    explore: ExploreBody | None = None


class UserRequest(_Asked):
    """For a user of the training data."""

    user: Id


class ItemsRequest(_Asked):
    """For anyone who likes these items; oldest first, where the model weighs by recency."""

    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    weights: Weights | None = None


By = Annotated[
    Literal["both", "likeness", "chance"],
    Field(description="likeness alone, chance (what buyers of the likest items bought) alone, or likeness first."),
]


class ProfileRequest(_Asked):
    """For somebody of whom only a profile is known."""

    profile: Annotated[
        Text | Annotated[dict[Word, Text | Number], Field(max_length=MAX_KEYS), _at_most(MAX_KEYS)],
        Field(description="A text, or values of columns of the training data's users."),
    ]


class TextRequest(_Asked):
    """For a description in words."""

    text: Text
    by: By = "both"


class SimilarRequest(_Asked):
    """For what is like an item."""

    item: Id
    by: By = "both"


SUBJECTS = ("user", "items", "profile", "text", "item")


def _kind(body: Any) -> str | None:
    """Return which of the five a body is, by the key that is there, so that an error names one model and not all."""
    given = [key for key in SUBJECTS if (key in body if isinstance(body, dict) else hasattr(body, key))]
    return given[0] if given else None


RecommendBody = Annotated[
    Annotated[UserRequest, Tag("user")]
    | Annotated[ItemsRequest, Tag("items")]
    | Annotated[ProfileRequest, Tag("profile")]
    | Annotated[TextRequest, Tag("text")]
    | Annotated[SimilarRequest, Tag("item")],
    Discriminator(
        _kind,
        custom_error_type="no_subject",
        custom_error_message="Give exactly one of user, items, profile, text and item.",
    ),
]


class BatchBody(Strict):
    """Several requests; each has its own answer or error."""

    requests: Annotated[
        list[RecommendBody],
        Field(
            min_length=1,
            max_length=MAX_BATCH_REQUESTS,
            description=f"The sum of k times (1 + explain) is at most {MAX_BATCH_ENTRIES}.",
            fail_fast=True,
        ),
    ]


class ItemBody(Strict):
    """An item to add or change; what is left out stays as it was."""

    title: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS)] | None = None
    text: Annotated[Text | None, Field(description="What the encoder reads.")] = None
    fields: Annotated[
        dict[Word, Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS)]] | None,
        Field(max_length=MAX_KEYS, description="Columns of the training data, instead of text."),
        _at_most(MAX_KEYS),
    ] = None
    attributes: Attributes | None = None
    image: Annotated[
        str | None, Field(min_length=1, max_length=MAX_IMAGE_CHARACTERS, description="A picture's file, as base64.")
    ] = None
    refit: Annotated[bool, Field(description="Give a trained item the vectors of its text and picture.")] = False


class PutEntry(ItemBody):
    """An item of a batch of changes."""

    id: Id
    op: Literal["put"] = "put"


class DeleteEntry(Strict):
    """An item of a batch to take out."""

    id: Id
    op: Literal["delete"]


def _operation(entry: Any) -> str:
    op = entry.get("op", "put") if isinstance(entry, dict) else getattr(entry, "op", "put")
    return "delete" if op == "delete" else "put"


class ItemsBatchBody(Strict):
    """Changes in one transaction: all or none."""

    items: Annotated[
        list[
            Annotated[
                Annotated[PutEntry, Tag("put")] | Annotated[DeleteEntry, Tag("delete")], Discriminator(_operation)
            ]
        ],
        Field(min_length=1, max_length=MAX_BATCH_ITEMS, fail_fast=True),
    ]


class ReloadBody(Strict):
    """Which export to load."""

    export: Annotated[Id | None, Field(description="Name of a folder among the exports; none: the newest.")] = None
