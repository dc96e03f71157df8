"""Lists that come in pages, as OpenAI's do: the next page begins `after` the last id of the one before. Knows no
torch."""

from collections.abc import Callable, Sequence
from typing import Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field

from serving.http.problems import ApiError

Item = TypeVar("Item")
T = TypeVar("T")


class Listed(BaseModel, Generic[Item]):
    """A whole list."""

    object: Literal["list"] = "list"
    data: list[Item]


class Page(Listed[Item], Generic[Item]):
    """A page of a list."""

    first_id: str | None = None
    last_id: str | None = Field(None, description="what the next page begins after")
    has_more: bool = False

    @classmethod
    def of(cls, data: Sequence[Item], more: bool, id_of: Callable[[Item], str]) -> Self:
        """The page that holds `data`; `more` follow it."""
        ids = [id_of(one) for one in (*data[:1], *data[-1:])]
        return cls(data=list(data), first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=more)


def following(found: Sequence[T], after: str | None, id_of: Callable[[T], str], what: str) -> Sequence[T]:
    """What follows the item `after`; all without one. Raises ApiError 404 for an id that is no `what` of the list."""
    if after is None:
        return found
    for index, one in enumerate(found):
        if id_of(one) == after:
            return found[index + 1 :]
    raise ApiError(404, f"No {what} '{after[:80]}'.", param="after", code=f"{what}_not_found")
