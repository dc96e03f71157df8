"""Photos of another person among a subject's are named; things that cannot be compared say why."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training.evaluation.judges.faces import DlibFace
from training.evaluation.one_person import NOT_INSTALLED, PersonCheck, strangers
from training.photos.photos import Photo

ANN, BOB = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])


class Hues:
    """A face model for plain pictures: who it is is their colour, a grey one shows nobody."""

    name = "hues"
    same_person = 0.9

    def embed_faces(self, images: Sequence[Image.Image]) -> list[Tensor | None]:
        """Rows of length 1."""
        rows = [torch.tensor(np.asarray(image, np.float32).mean((0, 1))) for image in images]
        return [functional.normalize(row, dim=0) if float(row.std()) > 1 else None for row in rows]


def shown(*colours: str) -> list[Photo]:
    return [Photo(f"{i}.png", Image.new("RGB", (8, 8), colour), str(i), (8, 8)) for i, colour in enumerate(colours)]


def test_a_stranger_among_a_persons_photos_is_named() -> None:
    (found,) = PersonCheck(Hues()).findings(shown("red", "#e01010", "blue", "#f00808", "grey"))
    assert (found.kind, found.names) == ("faces", ("2.png",)) and "2.png" in found.message


@pytest.mark.parametrize("colours", [("red", "#e01010", "#f00000"), ("red", "grey", "grey"), ("red",), ()])
def test_one_person_few_faces_or_one_photo_are_no_finding(colours: tuple[str, ...]) -> None:
    assert PersonCheck(Hues()).findings(shown(*colours)) == ()


def test_a_chain_of_faces_is_one_person() -> None:
    turned = functional.normalize(torch.stack([ANN, 0.9 * ANN + 0.4 * BOB, 0.7 * ANN + 0.7 * BOB]))
    assert float(turned[0] @ turned[2]) < 0.9  # the first and the last are not alike, the middle one is like both
    assert strangers(turned, 0.9) == [False, False, False]
    assert strangers(torch.stack([BOB, ANN, ANN]), 0.9) == [True, False, False]


@pytest.mark.skipif(DlibFace.is_installed(), reason="the extra `faces` is installed")
def test_without_a_model_it_says_so() -> None:
    check = PersonCheck()
    assert check.missing == NOT_INSTALLED and check.findings(shown("red", "blue", "red")) == ()
