"""Routes that show what there is: a user's history, the attributes that filters can ask for."""

from typing import Annotated, Any

from fastapi import FastAPI, Query, Response

from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.serving import answer_schemas, schemas
from recbole_llm.serving.problem_answers import problems_of_route
from recbole_llm.serving.responses import json_answer, state_content
from recbole_llm.serving.service import Service

MAX_HISTORY = 1000
MAX_VALUES = 100


def add_browsing(app: FastAPI, service: Service) -> None:
    """Add the routes.

    Args:
        app: what they are added to.
        service: what answers.
    """

    @app.get(
        "/v1/users",
        response_model=answer_schemas.UsersOut,
        responses=problems_of_route(504),
        summary="The user of an id, and the newest part of the history",
    )
    async def users(
        id: Annotated[str, Query(min_length=1, max_length=schemas.MAX_ID_CHARACTERS)],
        limit: Annotated[int, Query(ge=0, le=MAX_HISTORY, description="Items of the history.")] = 20,
    ) -> Response:
        def find(recommender: Recommender) -> list[dict[str, Any]]:
            state = recommender.users.find(id, limit)
            if state is None:
                return []
            items = [{"id": item_id, "title": title} for item_id, title in state.items]
            return [
                {"id": state.id, "interactions": state.interactions, "ordered": state.ordered, "items": items},
            ]

        answer = await service.reader.ask(find, limit)
        return json_answer({"users": answer.value, **state_content(answer)})

    @app.get(
        "/v1/attributes",
        response_model=answer_schemas.AttributesOut,
        responses=problems_of_route(504),
        summary="What filters can ask for",
    )
    async def attributes() -> Response:
        answer = await service.reader.ask(lambda recommender: recommender.catalog.attributes(MAX_VALUES))
        return json_answer({"attributes": answer.value, **state_content(answer)})
