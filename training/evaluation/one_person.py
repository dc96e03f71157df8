"""Whether the faces on a subject's photos are one person's: photos that got among them by mistake are named.

Shapes: F photos with exactly one face, E features.
"""

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from training.evaluation.judges.faces import FaceModel, open_face_model
from training.photos.photos import Photo
from training.photos.warning import PhotoWarning, listed

NOT_INSTALLED = (
    "Whether all faces are one person's is not checked: that needs the extra `faces`. Run `pip install "
    "'dreamfleet[faces]'` on the server."
)


class PersonCheck:
    """Compares faces with the model that is installed, opened when it is first needed. Threads may share it."""

    def __init__(self, model: FaceModel | None = None) -> None:
        self._model = model
        self._lock = Lock()

    @property
    def missing(self) -> str | None:
        """Why nothing is checked, in words; None where a model is installed."""
        with self._lock:
            self._model = self._model or open_face_model()
        return NOT_INSTALLED if self._model is None else None

    def findings(self, photos: Sequence[Photo]) -> tuple[PhotoWarning, ...]:
        """A warning that names the photos of another person than most; none without a model, or if fewer than half of
        the photos show exactly one face."""
        if self.missing is not None or self._model is None or len(photos) < 2:
            return ()
        with self._lock:  # dlib's models are not made for two threads at once
            rows = self._model.embed_faces([photo.image for photo in photos])
        seen = {photo.name: row for photo, row in zip(photos, rows, strict=True) if row is not None}
        if 2 * len(seen) < len(photos) or len(seen) < 2:
            return ()
        others = strangers(torch.stack(list(seen.values())), self._model.same_person)
        names = [name for name, other in zip(seen, others, strict=True) if other]
        if not names:
            return ()
        message = f"The face is another person's than on the other photos, or hard to see: {listed(names)}."
        advice = "Take them out if they show somebody else: the adapter would learn a mixture of both."
        return (PhotoWarning("faces", tuple(names), message, advice),)


def strangers(rows_FE: Tensor, same_person: float) -> list[bool]:
    """For each face whether it is of none of the people of the largest group; faces are of one group if a chain of
    cosines of at least `same_person` joins them. `rows_FE` are of length 1."""
    alike_FF = rows_FE @ rows_FE.T >= same_person
    groups: list[set[int]] = []
    for index in range(len(rows_FE)):
        near = {other for other in range(index) if alike_FF[index, other]}
        joined = [group for group in groups if group & near]
        groups = [group for group in groups if not group & near] + [{index}.union(*joined)]
    largest = max(groups, key=lambda group: (len(group), -min(group)))
    return [index not in largest for index in range(len(rows_FE))]
