"""Why a request gets no image.

    UserError
    └── Refused                   the request cannot be served as asked
        ├── QueueFull             too much is waiting: try again after `retry_after_s` (429)
        ├── QuotaExceeded         the tenant has stored as much as it may (429, but no later try helps)
        ├── DeadlineExceeded      it took longer than it may (504)
        ├── AdapterUnavailable    the adapter is there but cannot be loaded onto this base (422)
        ├── NetworkUnavailable    the same of a ControlNet (422)
        ├── Withheld              what it wears was taken back or taken off (410)
        └── NotReady              the server is starting or draining (503)
    GenerationFailed              an error of the server in one request; other requests are not affected (500)
    Cancelled                     the client has disconnected or cancelled

All of them can be pickled: they hold a message and numbers.
"""

from training.errors import UserError


class Refused(UserError):
    """The request cannot be served as asked; the message is for the client."""


class QueueFull(Refused):
    """Too much is waiting."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class QuotaExceeded(Refused):
    """The tenant has as many adapters or bytes as it may have."""


class DeadlineExceeded(Refused):
    """Not done within the request's time."""


class AdapterUnavailable(Refused):
    """The adapter exists, but its weights cannot be loaded onto this base."""


class NetworkUnavailable(Refused):
    """The ControlNet exists, but cannot be loaded onto this base."""


class Withheld(Refused):
    """What the request wears may not be served any more."""


class NotReady(Refused):
    """The server is starting or draining."""


class GenerationFailed(Exception):
    """An error of the server while working on one request."""


class Cancelled(Exception):
    """The client went away, or asked to stop."""
