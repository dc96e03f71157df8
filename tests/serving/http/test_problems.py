"""Every error of serving is told with the status that its definition names."""

import re

import pytest

from serving import errors
from serving.http.problems import describe

STATUS = {name: int(code) for name, code in re.findall(r"(\w+)  +\S.*\((\d{3})\)", errors.__doc__ or "")}


@pytest.mark.parametrize("name", STATUS)
def test_the_status_is_the_one_that_the_error_names(name: str) -> None:
    problem = describe(getattr(errors, name)("why"))
    assert problem.status == STATUS[name] and "why" in problem.message


def test_every_error_for_a_client_names_its_status() -> None:
    told = {
        "QueueFull",
        "DeadlineExceeded",
        "AdapterUnavailable",
        "NetworkUnavailable",
        "Withheld",
        "NotReady",
        "GenerationFailed",
    }
    assert set(STATUS) == told and STATUS["AdapterUnavailable"] == 422
