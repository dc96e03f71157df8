"""Captions that a model proposes for uploaded photos: the model is opened when it is first asked, and asked by one
caller at a time."""

from collections.abc import Sequence
from threading import Lock

from fleet.http.bodies import CaptionsBody
from serving.http.access.tenants import Meter
from serving.http.problems import ApiError
from training.captioning.captioner import Captioner, NoCaptioner, open_captioner
from training.captioning.proposals import Proposal, propose
from training.captioning.settings import CaptionSpec
from training.manifest.manifest import parse_subject
from training.photos.photos import Photo


class CaptionDesk:
    """Proposes captions by the configured model. Blocking; threads may share it. `asked` counts calls by tenant."""

    def __init__(self, spec: CaptionSpec) -> None:
        self._spec = spec
        self._lock = Lock()
        self.asked = Meter("calls for captions", at_once=1, per_minute=30)
        self._open: Captioner | None = None

    def model(self) -> Captioner:
        """The configured model. Raises ApiError 409 without one, UserError for one that cannot be loaded."""
        with self._lock:
            try:
                self._open = self._open or open_captioner(self._spec)
            except NoCaptioner as error:
                raise ApiError(409, f"This server proposes no captions. {error}", code="no_captioner") from None
            return self._open

    def propose(self, body: CaptionsBody, photos: Sequence[Photo]) -> list[Proposal]:
        """A proposal for each photo. Raises UserError for a class or prompt that no subject can have, as `model`."""
        settings = {"class": body.class_, "instance_prompt": body.instance_prompt}
        subject, model = parse_subject({**settings, "id": "subject", "images": "photos"}), self.model()
        with self._lock:
            return list(propose(model, subject, photos))
