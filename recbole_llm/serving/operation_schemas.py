"""Answers about the service itself, for the documentation."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class ReloadOut(BaseModel):
    """A swap of exports."""

    model_config = ConfigDict(populate_by_name=True)
    before: Annotated[str, Field(alias="from")]
    after: Annotated[str, Field(alias="to")]
    seconds: float


class HealthOut(BaseModel):
    """State of the service; ``status`` is ``ok``, or ``unavailable`` for the reasons among ``problems``."""

    status: str
    model: str | None = None
    encoder: str | None = None
    image_encoder: Annotated[str | None, Field(description="Of pictures; none where the export takes none.")] = None
    problems: list[str] = []
    skipped_rows: Annotated[int, Field(description="Rows of the log that cannot be used.")] = 0
    skipped: Annotated[dict[str, str], Field(description="Some of their ids, and what is wrong.")] = {}
