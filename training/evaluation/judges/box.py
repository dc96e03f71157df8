"""Which models judge: one per question, chosen by name or by what is there."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from training.base.base import Base
from training.errors import UserError
from training.evaluation.judges.faces import MODELS_VARIABLE, FaceModel, open_face_model
from training.evaluation.judges.features import (
    BaseFeatures,
    EfficientNetLite0,
    ImageModel,
    MapModel,
    PocketJudge,
    TextModel,
)
from training.evaluation.judges.pocket import FOLDER, load_judge
from training.manifest.gate import FidelityModel, LikenessModel

if TYPE_CHECKING:
    from training.evaluation.judges.configured import Inception

LIKENESS_MODELS: tuple[str, ...] = get_args(LikenessModel)
FIDELITY_MODELS: tuple[str, ...] = get_args(FidelityModel)


@dataclass(frozen=True)
class Judges:
    """The models of one evaluation. `face` is None where no face model is installed."""

    likeness: ImageModel
    copying: MapModel
    fidelity: TextModel
    face: FaceModel | None = None


class JudgeBox:
    """Opens models when they are first asked for, and keeps them. `models`: the folder of configured weights, else the
    environment's DREAMFLEET_MODELS."""

    def __init__(self, base: Base, models: Path | None = None) -> None:
        self.base = base
        said = os.environ.get(MODELS_VARIABLE)
        self.models = models or (Path(said) if said else None)
        self._open: dict[str, object] = {}

    def judges(self, likeness: str = "auto", fidelity: str = "auto") -> Judges:
        """Raises UserError for a name that is unknown or whose weights are not there."""
        _check("likeness_model", likeness, LIKENESS_MODELS)
        _check("fidelity_model", fidelity, FIDELITY_MODELS)
        image = self._get(self._best_likeness() if likeness == "auto" else likeness)
        text = self._get(self._best_fidelity() if fidelity == "auto" else fidelity)
        where = image if isinstance(image, MapModel) else self._get(self._best_likeness())
        assert isinstance(image, ImageModel) and isinstance(text, TextModel) and isinstance(where, MapModel)
        if likeness == "auto" and EfficientNetLite0.is_installed():
            where = self._get(EfficientNetLite0.name)  # the one whose copy detector is calibrated
            assert isinstance(where, MapModel)
        return Judges(image, where, text, self._face())

    def inception(self) -> "Inception | None":
        """The model of FID and KID, where its file is configured."""
        file = self.models / "inception.pt" if self.models is not None else None
        if file is None or not file.exists():
            return None
        from training.evaluation.judges.configured import Inception

        return Inception(file, self.base.device)

    def _best_likeness(self) -> str:
        # ImageNet's features hardly see what tells two drawings of 64 px apart; the judge's do (docs/evaluation.md)
        if (own := self._own_judge) is not None:
            return own
        return EfficientNetLite0.name if EfficientNetLite0.is_installed() else BaseFeatures.name

    def _best_fidelity(self) -> str:
        if (own := self._own_judge) is not None:
            return own
        return "clip" if self.models is not None and (self.models / "clip").is_dir() else BaseFeatures.name

    @property
    def _own_judge(self) -> str | None:
        """The model that the base names for its pictures; None without one, or where its weights are not installed."""
        name = self.base.facts.judge
        if name is None or (name == PocketJudge.name and not (FOLDER / "model.safetensors").exists()):
            return None
        known = sorted(set(LIKENESS_MODELS) & set(FIDELITY_MODELS) - {"auto"})
        _check(f"judge of base {self.base.name}", name, tuple(known))
        return name

    def _get(self, name: str) -> object:
        if name not in self._open:
            self._open[name] = self._make(name)
        return self._open[name]

    def _make(self, name: str) -> object:
        if name == EfficientNetLite0.name:
            return EfficientNetLite0(self.base.device)
        if name == PocketJudge.name:
            return PocketJudge(load_judge(FOLDER))
        if name == BaseFeatures.name:
            return BaseFeatures(self.base)
        return self._configured(name)

    def _configured(self, name: str) -> object:
        # transformers' vision models take a second to import, and few runs use them
        from training.evaluation.judges.configured import Clip, Vit

        if self.models is None:
            raise UserError(f"Model '{name}' needs weights. Set {MODELS_VARIABLE} to the folder that holds `{name}/`.")
        folder = self.models / name
        return Clip(folder, self.base.device) if name == "clip" else Vit(name, folder, self.base.device)

    def _face(self) -> FaceModel | None:
        if "face" not in self._open:
            self._open["face"] = open_face_model(self.models)
        return self._open["face"]  # type: ignore[return-value]


def _check(key: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UserError(f"`{key}` is '{name}'; known are {', '.join(known)}.")
