"""What refusals of a route mean, for the documentation of the API."""

from typing import Any

from recbole_llm.serving import answer_schemas
from recbole_llm.serving.problem import MEDIA_TYPE

_PROBLEM = {
    "model": answer_schemas.ProblemOut,
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}},
}
_MEANINGS = {
    400: "The request cannot be read.",
    401: "No valid key.",
    403: "Not allowed: key, host, origin, or a read-only service.",
    404: "Unknown user or item.",
    408: "The body came too slowly.",
    409: "A reload is running.",
    413: "The body is too large.",
    415: "The body is not application/json, or no picture where one belongs.",
    422: "The request does not fit the schema or the model.",
    429: "Too many requests.",
    503: "At the limit, or not ready; try again.",
    504: "Not done in time.",
}


def problems_of_route(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """List a route's answers other than 200: those of every route, and ``statuses``."""
    always = (400, 401, 403, 422, 429, 503)
    return {
        status: {"description": _MEANINGS[status], "content": _PROBLEM["content"]}
        for status in sorted({*always, *statuses})
    }
