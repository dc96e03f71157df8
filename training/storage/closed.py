"""The base class of everything that is read from outside or crosses a process' border."""

from pydantic import BaseModel, ConfigDict


class Closed(BaseModel):
    """Unknown keys are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
