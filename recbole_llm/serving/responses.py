"""Between HTTP and the service: bodies as requests, answers and errors as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import Response
from fastapi.exceptions import RequestValidationError

from recbole_llm.export.errors import ExportError, UnknownItemError, UnknownUserError
from recbole_llm.export.manifest import Manifest
from recbole_llm.retrieval.item_catalog import ItemState
from recbole_llm.retrieval.recommender import Recommendation, Recommended, Request
from recbole_llm.retrieval.remote import SearchError
from recbole_llm.retrieval.rules import NO_RULES, Boost, Diversity, Exploration, Rules
from recbole_llm.serving import schemas
from recbole_llm.serving.batching import DeadlineExceeded, QueueFull
from recbole_llm.serving.change_log import ChangeInDoubtError, ChangeLogError
from recbole_llm.serving.changes import NotYetApplied
from recbole_llm.serving.encoding import EncoderUnavailable
from recbole_llm.serving.problem import Problem, echo
from recbole_llm.serving.profiles import text_of_profile
from recbole_llm.serving.reading import Versioned
from recbole_llm.serving.service import ReloadRunning
from recbole_llm.serving.text import EncodedText


def json_answer(content: Any, status: int = 200) -> Response:
    """Answer with plain data, or with JSON."""
    raw = content if isinstance(content, bytes) else json_bytes(content)
    return Response(raw, status, media_type="application/json")


def json_bytes(content: Any) -> bytes:
    """Convert plain data to JSON."""
    try:
        return orjson.dumps(content)
    except TypeError:  # half a surrogate pair, in a text of the export: as an escape it can be sent
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _recommended(item: Recommended) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": item.id,
        "title": item.title,
        "score": item.score,
        "probability": item.probability,
        "cold": item.cold,
    }
    if item.image:
        out["image"] = True
    if item.reasons is not None:
        out["reasons"] = [
            {
                "id": reason.id,
                "title": reason.title,
                "contribution": reason.contribution,
                **({"alike": dict(reason.alike)} if reason.alike else {}),
            }
            for reason in item.reasons
        ]
        out["rest"], out["bias"] = item.rest, item.bias
        if item.order is not None:
            out["order"] = item.order
    if item.rules:
        out["rules"] = [
            {"rule": rule.rule, "contribution": rule.contribution, "place": rule.place} for rule in item.rules
        ]
    if item.parts is not None:
        out["parts"] = {"likeness": item.parts.likeness, "words": item.parts.words, "taste": item.parts.taste}
    return out


def recommendation_content(answer: Recommendation) -> dict[str, Any]:
    """Return the fields of ``RecommendationOut`` without its state."""
    content = {
        "items": [_recommended(item) for item in answer.items],
        "source": answer.source,
        "unknown": list(answer.unknown),
    }
    if answer.note:
        content["note"] = answer.note
    return content


def rendered(answer: Recommendation) -> bytes:
    """Return the fields of ``RecommendationOut`` without its state as JSON."""
    return json_bytes(recommendation_content(answer))


def with_state(content: bytes, answer: Versioned) -> bytes:
    """Add to a JSON object the state it was made from."""
    return content[:-1] + b"," + json_bytes(state_content(answer))[1:]


def state_content(answer: Versioned) -> dict[str, Any]:
    """Return the fields of ``State``."""
    return {"model": answer.model, "overlay_seq": answer.overlay_seq}


def item_content(state: ItemState) -> dict[str, Any]:
    """Return the fields of ``ItemOut`` without its state."""
    record = state.record
    image = {"image": True} if state.image else {}
    return {
        "id": state.id,
        "title": record.title,
        "text": record.text,
        "attributes": dict(record.attributes),
        "cold": state.cold,
        "added_at": state.added_at,
        **image,
    }


_REFUSALS: tuple[tuple[type[Exception], int, str, int | None], ...] = (
    (QueueFull, 503, "The service is at its limit; try again.", 1),
    (DeadlineExceeded, 504, "The answer was not ready in time.", None),
    (NotYetApplied, 503, "This process has not seen that change yet.", 1),
    (ReloadRunning, 409, "An export is being loaded already.", None),
    (
        ChangeInDoubtError,
        503,
        "The connection to the log of changes broke; whether it was changed is not known. Send the change again: once more does "
        "no harm.",
        1,
    ),
    (ChangeLogError, 503, "The log of changes cannot be written; nothing was changed.", 10),
    (SearchError, 503, "The server that searches items did not take the export; the log says why.", 10),
)


def problem_of(error: BaseException) -> Problem | None:
    """Find the problem that an error of the service is to a caller; ``None`` for a fault of ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UnknownUserError):
        return Problem(404, f"No user {echo(str(error))}; give items, or fallback 'popular'.")
    if isinstance(error, UnknownItemError):
        return Problem(404, f"No item {echo(str(error))}.")
    for kind, status, detail, retry_after in _REFUSALS:
        if isinstance(error, kind):
            return Problem(status, detail, retry_after=retry_after)
    if isinstance(error, ExportError):
        return Problem(422, str(error))
    if isinstance(error, EncoderUnavailable):
        return Problem(503, str(error), retry_after=5) if error.retry else Problem(422, str(error))
    if isinstance(error, ValueError):
        return Problem(422, str(error))
    return None


def error_content(error: Exception) -> bytes:
    """Return an error of one entry of a batch as JSON.

    Raises:
        Exception: the error itself, for a fault of ours.
    """
    problem = problem_of(error)
    if problem is None:
        raise error
    return json_bytes({"error": problem.content()})


def invalid_problem(error: RequestValidationError) -> Problem:
    """Say what does not fit the schema, and where, in few words."""
    errors = [
        {"loc": [part if isinstance(part, int) else str(part)[:64] for part in e["loc"]], "msg": e["msg"][:200]}
        for e in error.errors()[:20]
    ]
    where = ".".join(map(str, errors[0]["loc"])) if errors else "body"
    message = errors[0]["msg"] if errors else "the request cannot be read"
    return Problem(422, f"{where[:128]}: {message}", errors)


def check_budget(bodies: Sequence[Any]) -> None:
    """Refuse a batch whose answers would be too long, before any work.

    Raises:
        Problem: 422.
    """
    entries = sum(body.k * (1 + body.explain) for body in bodies)
    if entries > schemas.MAX_BATCH_ENTRIES:
        raise Problem(
            422,
            f"requests: they ask for {entries} items and reasons (the sum of k times 1 + explain); at most "
            f"{schemas.MAX_BATCH_ENTRIES} in a batch.",
        )
    compared = sum(_comparisons(body) for body in bodies if body.diversity is not None)
    if compared > schemas.MAX_BATCH_COMPARED:
        raise Problem(
            422,
            f"requests: their diversity compares {compared} pairs (the sum of k times the candidates); at most "
            f"{schemas.MAX_BATCH_COMPARED} in a batch.",
        )


def _comparisons(body: Any) -> int:
    """The pairs that a body's diversity compares; none where its rules are refused, which its own answer tells."""
    try:
        return rules_of(body).comparisons(body.k)
    except Problem:
        return 0


def rules_of(body: Any) -> Rules:
    """Read the rules of a body.

    Raises:
        Problem: 422 for a boost without exactly one step.
    """
    if body.only is None and not (body.boosts or body.caps or body.diversity or body.explore):
        return NO_RULES
    try:
        return Rules(
            only=body.only,
            boosts=[Boost(condition_of(boost.filter), boost.add, boost.odds) for boost in body.boosts],
            caps=body.caps,
            diversity=None if body.diversity is None else Diversity(**dict(body.diversity)),
            explore=None if body.explore is None else Exploration(**dict(body.explore)),
        )
    except ValueError as error:
        raise Problem(422, str(error)) from None


def condition_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a filter that was read into plain data."""
    return {
        name: value.model_dump(exclude_none=True) if isinstance(value, schemas.Bounds) else value
        for name, value in given.items()
    }


def text_of(body: Any, manifest: Manifest) -> str | None:
    """The text of a body that has one or makes one of a profile.

    Raises:
        Problem: 422 for a profile that the model of ``manifest`` cannot read, or a blank text.
    """
    if isinstance(body, schemas.ProfileRequest):
        try:
            return text_of_profile(manifest, body.profile)
        except ValueError as error:
            raise Problem(422, str(error)) from None
    if not isinstance(body, schemas.TextRequest):
        return None
    if not body.text.strip():
        raise Problem(422, "text is empty; say what is asked for.")
    return body.text


def request_of(body: Any, texts: Mapping[str, EncodedText], manifest: Manifest) -> Request:
    """Turn a body into a request, with the vector of its text among ``texts``.

    Raises:
        Problem: 422 for more reasons than an answer holds, rules that compare too much, or as :func:`text_of`.
    """
    if body.k * body.explain > schemas.MAX_REASONS:
        raise Problem(
            422,
            f"explain: {body.k} items with {body.explain} reasons each are more than {schemas.MAX_REASONS} reasons.",
        )
    rules = rules_of(body)
    if rules.comparisons(body.k) > schemas.MAX_COMPARED:
        raise Problem(
            422,
            f"diversity: {body.k} items chosen from {rules.comparisons(body.k) // body.k} candidates compare more than "
            f"{schemas.MAX_COMPARED} pairs; ask for fewer.",
        )
    common = {
        "k": body.k,
        "exclude": body.exclude,
        "exclude_seen": body.exclude_seen,
        "filter": condition_of(body.filter),
        "rules": rules,
        "explain": body.explain,
        "fallback": body.fallback,
    }
    if isinstance(body, schemas.UserRequest):
        return Request(user=body.user, **common)
    if isinstance(body, schemas.ItemsRequest):
        return Request(items=body.items, weights=body.weights, **common)
    if isinstance(body, schemas.SimilarRequest):
        return Request(item=body.item, by=body.by, **common)
    if isinstance(body, schemas.ProfileRequest):
        return Request(profile_vector=texts[text_of(body, manifest) or ""].vector, **common)
    return Request(text_vector=texts[text_of(body, manifest) or ""].vector, text=body.text, by=body.by, **common)
