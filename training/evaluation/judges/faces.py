"""Faces: finding the one face of a picture and saying whose it is.

`dlib` finds and, by default, embeds (optional extra `faces`); ArcFace's weights are configured. A verdict of "same
person" belongs to a model: each carries its own threshold. Shapes: N faces, E features.
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from training.errors import UserError

# dlib's detector also fires on things; its score tells, the size of the box does not
MIN_FACE_SCORE = 0.5
ENLARGED_PX = 512
MODELS_VARIABLE = "DREAMFLEET_MODELS"


class FaceModel(Protocol):
    """Embeds the one face of each picture. `same_person`: the cosine from which two faces are one person's."""

    name: str
    same_person: float

    def embed_faces(self, images: Sequence[Image.Image]) -> list[Tensor | None]:
        """Rows [E] of length 1; None where there is no face, or more than one."""


class _Dlib:
    """dlib's detector and landmarks, and the weights of the package `face-recognition-models`."""

    @staticmethod
    def is_installed() -> bool:
        return all(importlib.util.find_spec(name) is not None for name in ("dlib", "face_recognition_models"))

    def __init__(self) -> None:
        if not self.is_installed():
            raise UserError("Faces need dlib and its weights. Run `pip install 'dreamfleet[faces]'`.")
        self.dlib: Any = importlib.import_module("dlib")
        # only its files: importing the package needs setuptools' pkg_resources
        spec = importlib.util.find_spec("face_recognition_models")
        assert spec is not None and spec.origin is not None
        self.folder = Path(spec.origin).parent / "models"

    @cached_property
    def _detector(self) -> Any:
        return self.dlib.get_frontal_face_detector()

    @cached_property
    def _landmarks(self) -> Any:
        return self.dlib.shape_predictor(str(self.folder / "shape_predictor_5_face_landmarks.dat"))

    def find(self, image: Image.Image) -> tuple[np.ndarray, Any] | None:
        """The picture as an array and the landmarks of its one face."""
        scale = max(1.0, ENLARGED_PX / min(image.size))
        sized = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
        held = np.array(sized)
        boxes, scores, _ = self._detector.run(held, 0, 0.0)
        sure = [box for box, score in zip(boxes, scores, strict=True) if score > MIN_FACE_SCORE]
        return (held, self._landmarks(held, sure[0])) if len(sure) == 1 else None


class DlibFace:
    """dlib's 128 features. Two faces are one person's from a cosine of 0.93 (its Euclidean 0.6 says the same)."""

    name = "dlib-resnet"
    same_person = 0.93

    def __init__(self) -> None:
        self._dlib = _Dlib()
        self._model = self._dlib.dlib.face_recognition_model_v1(
            str(self._dlib.folder / "dlib_face_recognition_resnet_model_v1.dat")
        )

    @staticmethod
    def is_installed() -> bool:
        """Whether the extra `faces` is installed."""
        return _Dlib.is_installed()

    def embed_faces(self, images: Sequence[Image.Image]) -> list[Tensor | None]:
        """Of each picture its face's features, fp32 [E] of length 1; None where no face is found."""
        found: list[Tensor | None] = []
        for image in images:
            face = self._dlib.find(image)
            row = None if face is None else torch.tensor(list(self._model.compute_face_descriptor(*face)))
            found.append(None if row is None else functional.normalize(row, dim=0))
        return found


class ArcFace:
    """ArcFace on faces cut out by dlib, 112 px. Two faces are one person's from a cosine of 0.32."""

    name = "arcface"
    same_person = 0.32

    def __init__(self, file: Path) -> None:
        if not file.exists():
            raise UserError(f"Model '{file.name}' is not in the folder of models. Put its weights there.")
        self._dlib = _Dlib()
        self._model = load_arcface(file)

    @torch.inference_mode()
    def embed_faces(self, images: Sequence[Image.Image]) -> list[Tensor | None]:
        """Of each picture its face's features, fp32 [E] of length 1; None where no face is found."""
        found: list[Tensor | None] = []
        for image in images:
            face = self._dlib.find(image)
            chip = None if face is None else self._dlib.dlib.get_face_chip(*face, size=112, padding=0.25)
            found.append(None if chip is None else embed_chips(self._model, [chip])[0])
        return found


def open_face_model(models: Path | None = None) -> FaceModel | None:
    """ArcFace where its weights are in the folder `models` (else the environment's DREAMFLEET_MODELS), or dlib's model;
    None without the extra `faces`."""
    if not DlibFace.is_installed():
        return None
    said = os.environ.get(MODELS_VARIABLE)
    folder = models or (Path(said) if said else None)
    file = folder / "arcface.safetensors" if folder is not None else None
    return ArcFace(file) if file is not None and file.exists() else DlibFace()


def embed_chips(model: nn.Module, chips: Sequence[np.ndarray]) -> Tensor:
    """Features [N, 512] of length 1 from faces of 112 px, uint8 RGB."""
    batch = torch.from_numpy(np.stack(chips)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return functional.normalize(model(batch))


class _Block(nn.Module):
    """One block of IResNet (Duta et al. 2020); names as in arcface_torch, so that its weights load."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv1(self.bn1(x)))
        return self.bn3(self.conv2(self.prelu(inner))) + self.downsample(x)


class IResNet(nn.Module):
    """ArcFace's backbone: `blocks` a stage, (3, 4, 14, 3) is r50. Input [N, 3, 112, 112] in -1..1, output [N, 512]."""

    def __init__(self, blocks: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        inputs = width
        for stage, count in enumerate(blocks, 1):
            outputs = width * 2 ** (stage - 1)
            made = [_Block(inputs if turn == 0 else outputs, outputs, 2 if turn == 0 else 1) for turn in range(count)]
            self.add_module(f"layer{stage}", nn.Sequential(*made))
            inputs = outputs
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * 7 * 7, 512)
        self.features = nn.BatchNorm1d(512)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, E] of aligned faces [N, 3, 112, 112] in [-1, 1]."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.features(self.fc(self.bn2(x).flatten(1)))


def load_arcface(file: Path) -> IResNet:
    """The backbone in a safetensors file; depth and width are read off the names. Raises UserError for others."""
    weights = load_file(file)
    blocks = [len({n.split(".")[1] for n in weights if n.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)]
    if min(blocks) == 0 or "conv1.weight" not in weights:
        raise UserError(f"'{file.name}' is no IResNet of arcface_torch: it has no layer1 to layer4.")
    model = IResNet(blocks, weights["conv1.weight"].shape[0])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"'{file.name}' is no IResNet of arcface_torch: {error}") from None
    return model.requires_grad_(False).eval()
