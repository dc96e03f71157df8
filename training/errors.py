"""What can go wrong because of a user, and how a subject fails.

    UserError                 bad input or usage: exit status 2, or HTTP 4xx; its message is the whole story
    SubjectFailed             one subject cannot be trained; its reason is a result, never a crash of its pack
    TooLarge                  one device cannot hold one subject; a gang of several may
    GangBroken                a process of a gang failed in the middle of what all do: the gang has to start again

Messages say what, the value, what is allowed and what to do. All errors carry only their message, so they pickle.
"""


class UserError(Exception):
    """Something a user can cause and can mend; shown without a traceback."""


class SubjectFailed(Exception):
    """One subject ends as `failed`; `str(error)` is the reason a person reads."""


class TooLarge(Exception):
    """One subject does not fit on one device; `str(error)` says by how much."""


class GangBroken(Exception):
    """A process of the gang failed in the middle of what all do together: the gang has to be started again."""
