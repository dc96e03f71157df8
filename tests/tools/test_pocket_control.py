"""The ControlNet that comes with the pocket base: what it draws follows edges of pictures that it never saw."""

import json

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from serving.config import EngineSpec
from serving.engine.engine import Engine
from serving.engine.job import Done
from serving.engine.pictures.canny import canny
from serving.engine.pictures.hints import NO_HINTS, Hints
from serving.engine.request import ControlUse, GenerateRequest, NetworkRef
from tests.serving.company import Shelf
from tools.pocket.control import MAX_BYTES
from tools.pocket.recipe import CONTROL_FOLDER, DEMO_IMAGES, IMAGE_PX
from training.base.base import load_base
from training.base.files.folder import EMBEDDED
from training.storage.networks import NetworkFolders
from training.storage.storage import LocalStorage

Bytes = NDArray[np.uint8]
NAME = CONTROL_FOLDER.name
SUBJECTS = ("bolt", "bruno", "mocha", "tabby")


def photos() -> list[tuple[str, Bytes]]:
    """A class and a photo of some of the demo's subjects, whose drawings no training had."""
    known = {one["id"]: one for one in json.loads((DEMO_IMAGES / "subjects.json").read_text())}
    files = [sorted((DEMO_IMAGES / name).glob("*.png"))[0] for name in SUBJECTS]
    opened = [Image.open(file).convert("RGB").resize((IMAGE_PX, IMAGE_PX)) for file in files]
    return [(known[name]["class"], np.asarray(one)) for name, one in zip(SUBJECTS, opened, strict=True)]


def met(edges: Bytes, picture: Bytes) -> float:
    """How far the edges of a picture are those given: F1, where an edge may be a pixel away."""
    given, drawn = edges[:, :, 0] > 0, canny(picture)[:, :, 0] > 0
    found, right = near(drawn)[given].mean(), near(given)[drawn].mean()
    return float(2 * found * right / (found + right))


def near(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels at most one away from an edge."""
    wide = np.pad(edges, 1)
    return np.any([wide[y : y + IMAGE_PX, x : x + IMAGE_PX] for y in range(3) for x in range(3)], axis=0)


def test_pictures_follow_the_edges() -> None:
    folders = NetworkFolders(LocalStorage(str(EMBEDDED / "none")), EMBEDDED)
    found = folders.look("control", NAME)
    assert found is not None and found.bytes < MAX_BYTES
    engine = Engine(
        load_base("pocket", device="cpu"), EngineSpec(device="cpu", slots=1), Shelf({}), open_network=folders.folder
    )
    use = ControlUse(ref=NetworkRef(kind="control", name=NAME, version=found.version), image=b"")
    jobs, shares = {}, {True: 0.0, False: 0.0}
    for noun, photo in photos():
        edges = canny(photo)
        hint = torch.from_numpy(edges).permute(2, 0, 1)
        for steered in shares:
            request = GenerateRequest(
                prompt=f"a photo of a {noun}", width=IMAGE_PX, height=IMAGE_PX, seed=1, steps=8, guidance_scale=3.0,
                controls=(use,) if steered else (),
            )  # fmt: skip
            jobs[engine.submit(request, hints=Hints((hint,)) if steered else NO_HINTS)] = steered, edges
    left = len(jobs)
    while left:
        engine.woken.wait(0.01)
        for outcome in engine.step():
            assert isinstance(outcome, Done), outcome
            steered, edges = jobs[outcome.job]
            shares[steered] += met(edges, outcome.pixels.numpy()) / len(SUBJECTS)
            left -= 1
    engine.close()
    assert shares[True] > 0.55 and shares[True] > shares[False] + 0.1, shares
