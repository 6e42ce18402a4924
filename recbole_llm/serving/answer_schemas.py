"""Bodies of answers, for the documentation of the API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class ReasonOut(BaseModel):
    """What one item of the history, or one that is like the text asked for, adds to the score."""

    id: str
    title: str
    contribution: float
    alike: Annotated[
        dict[str, float],
        Field(description="Cosine with the recommended item by modality, where several modalities describe the items."),
    ] = {}


class RuleOut(BaseModel):
    """What a rule did to an item."""

    rule: str
    contribution: Annotated[float, Field(description="Of a boost to the score.")] = 0.0
    place: Annotated[int | None, Field(description="By score, where the rule changed it and it is known.")] = None


class PartsOut(BaseModel):
    """What the score of a search is made of; the three add up to it."""

    likeness: float
    words: float
    taste: float


class RecommendedOut(BaseModel):
    """An item of an answer; reasons, order, rest and bias are there when asked for and add up with the rules to the score."""

    id: str
    title: str
    score: float
    probability: Annotated[
        float | None,
        Field(description="That the item is among the user's next interactions; none where no user is asked about."),
    ] = None
    cold: bool
    reasons: list[ReasonOut] = []
    rest: float = 0.0
    bias: float = 0.0
    order: Annotated[float, Field(description="What the order of the history adds.")] = 0.0
    rules: list[RuleOut] = []
    parts: Annotated[PartsOut | None, Field(description="Of a search's score, where reasons were asked for.")] = None
    image: Annotated[bool, Field(description="Whether there is a small picture of it.")] = False


class State(BaseModel):
    """What an answer was made from."""

    model: str
    overlay_seq: int


class RecommendationOut(State):
    """An answer; ``source`` says which path made it."""

    items: list[RecommendedOut]
    source: Literal["history", "items", "profile", "text", "picture", "popular", "similar"]
    unknown: list[str]
    note: Annotated[
        str, Field(description="Why there are fewer items than asked for, or what a rule could not do.")
    ] = ""
    truncated: int = 0


class ProblemOut(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] = []


class BatchEntryOut(BaseModel):
    """An answer without its state, or an error."""

    items: list[RecommendedOut] = []
    source: str = ""
    unknown: list[str] = []
    note: str = ""
    truncated: Annotated[int, Field(description="1 where the encoder did not read all of the text asked for.")] = 0
    error: ProblemOut | None = None


class BatchOut(State):
    """Answers in the order of the requests."""

    results: list[BatchEntryOut]


class ItemOut(State):
    """An item."""

    id: str
    title: str
    text: str | None = None
    attributes: dict[str, Any]
    cold: bool
    added_at: str | None = None
    image: Annotated[bool, Field(description="Whether there is a small picture of it.")] = False


class FoundOut(State):
    """Items by title."""

    items: list[dict[str, Any]]


class NamedOut(BaseModel):
    """An item of a history."""

    id: str
    title: str


class UserOut(BaseModel):
    """A user; the newest items first where ``ordered``."""

    id: str
    interactions: int
    ordered: bool
    items: list[NamedOut]


class UsersOut(State):
    """The user of an id; none where nobody has it."""

    users: list[UserOut]


class AttributeOut(BaseModel):
    """What a filter can ask for: ``values`` with their numbers of items, or the ends of a number."""

    kind: Literal["token", "tokens", "number"]
    values: list[tuple[str, int]] = []
    least: float | None = None
    largest: float | None = None


class AttributesOut(State):
    """Attributes of items, as exported."""

    attributes: dict[str, AttributeOut]


class PutOut(State):
    """An item that is live."""

    id: str
    created: bool
    seq: int
    cold: bool
    truncated: int


class DeleteOut(State):
    """An item that is out."""

    id: str
    seq: int


class ItemsBatchOut(State):
    """Changes that are live."""

    seq: int
    count: int
    truncated: int
