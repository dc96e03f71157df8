"""Driving a fleet again and again: by whoever has the lead, whatever goes wrong meanwhile."""

import logging
import threading
from collections.abc import Callable

from training.run.lead import Lead, Lost
from training.storage.interface import StorageError

LEAD_S = 2.0  # between two tries to take the lead
log = logging.getLogger(__name__)


def drive(claim: Lead, lead: Callable[[], None], closing: threading.Event) -> None:
    """Calls `lead` whenever this process has the lead, until `closing`; an error in it ends that turn only."""
    while not closing.is_set():
        try:
            if claim.acquire() is None:
                lead()
        except Lost:
            log.warning("another process drives the fleet")
        except StorageError as error:
            log.error("the fleet's driver starts again: %s", error)
        except Exception:
            log.exception("the fleet's driver starts again")
        closing.wait(LEAD_S)
