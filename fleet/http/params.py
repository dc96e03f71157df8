"""Parameters that several calls of the fleet have."""

from typing import Annotated

from fastapi import Path, Query

JobId = Annotated[str, Path(max_length=100)]
RunId = Annotated[str, Path(max_length=200)]
SubjectId = Annotated[str, Path(max_length=63)]
After = Annotated[str | None, Query(max_length=100, description="the last of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]
