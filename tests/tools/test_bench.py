"""The DreamBooth bench: hues are told where no place has them, and the reference is the demo's own setting."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.pocket.drawings import path_of
from tools.pocket.dreambooth import (
    ASKS,
    BARE_CLASS,
    BASE_ALONE,
    NO_PRIOR,
    PHOTOGRAPHED,
    REFERENCE,
    SETTINGS,
    STEPS,
    UNSEEN_PLACES,
    Ask,
    run_setting,
    spec_of,
    strip_path,
    strips_folder,
    tiles,
)
from tools.pocket.likeness import can_tell, hue_share, weigh
from tools.pocket.recipe import BASE, DEMO_IMAGES
from tools.pocket.subjects import MAGENTA, MINT, SUBJECTS, VIOLET, YELLOW, Subject, picture
from training.manifest.manifest import load_manifest
from training.trainer.prior import class_prompts

needs_drawings = pytest.mark.skipif(
    any(path_of(subject.drawing) is None for subject in SUBJECTS),
    reason="needs the emoji drawings: python -m tools.pocket fetch",
)


@pytest.mark.parametrize("colour", [MAGENTA, VIOLET, YELLOW, MINT])
def test_a_hue_is_found_in_itself_alone(colour: tuple[int, int, int]) -> None:
    picture = np.full((8, 8, 3), 255, np.uint8)
    picture[:4] = colour
    assert hue_share(picture, colour) == 0.5
    assert [hue_share(picture, other) for other in (MAGENTA, VIOLET, YELLOW, MINT) if other != colour] == [0, 0, 0]


def test_sand_hides_yellow_and_nothing_else() -> None:
    asked = dict.fromkeys(ask.place for ask in ASKS)
    hidden = {(p, c) for p in asked for c in (MAGENTA, VIOLET, YELLOW, MINT) if not can_tell(p, c)}
    assert hidden == {("desert", YELLOW)}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.id)
def test_a_subject_has_both_its_hues(subject: Subject) -> None:
    photo = np.asarray(Image.open(DEMO_IMAGES / subject.id / "3.png").convert("RGB"))
    assert min(hue_share(photo, subject.colouring.first), hue_share(photo, subject.colouring.second)) > 0.05


def test_six_places_are_unseen() -> None:
    assert len(UNSEEN_PLACES) == 6
    assert not set(UNSEEN_PLACES) & set(PHOTOGRAPHED)


def test_the_reference_is_the_demo() -> None:
    for demo in load_manifest(DEMO_IMAGES.parent / "manifest.yaml").subjects:
        spec = spec_of(next(s for s in SUBJECTS if s.id == demo.id), REFERENCE)
        train = demo.train.model_copy(update={"max_steps": spec.train.max_steps})  # two of the demo's learn for longer
        assert (spec.lora, spec.prior, spec.train) == (demo.lora, demo.prior, train)
        assert demo.train.max_steps >= spec.train.max_steps
        assert spec.filled_instance_prompt == demo.filled_instance_prompt


def test_class_images_show_the_places_of_the_photos() -> None:
    captions = [Ask(place, 0, of_class=False).prompt(SUBJECTS[0].noun) for place in PHOTOGRAPHED]
    spec = spec_of(SUBJECTS[0], REFERENCE)
    assert spec.prior.captions and not spec_of(SUBJECTS[0], BARE_CLASS).prior.captions
    assert set(class_prompts(spec, captions)[1:]) == {caption.replace("sks ", "") for caption in captions}


def test_other_settings_lie_elsewhere() -> None:
    assert strips_folder("a", REFERENCE) == strips_folder("a", REFERENCE)
    assert len({strips_folder(base, setting) for base in "ab" for setting in SETTINGS}) == 2 * len(SETTINGS)


def test_every_setting_ends_alike() -> None:
    assert {setting.steps[-1] for setting in SETTINGS} == {STEPS}


@needs_drawings
def test_the_subject_itself_is_worth_most(subject: Subject = SUBJECTS[0]) -> None:
    strip = [np.asarray(picture(subject, ask.place or "white", 50 + i)) for i, ask in enumerate(ASKS)]
    plain = [np.full_like(strip[0], 200) for _ in ASKS]
    worth, nothing = weigh(subject, strip, plain), weigh(subject, plain, plain)
    assert min(worth.hues, worth.likeness, worth.class_hues, worth.class_drift, worth.unseen_places) > 0.9
    assert (nothing.hues, nothing.likeness, nothing.class_drift, nothing.errors) == (0, 0, 0, 0)
    assert worth.errors > 10


def test_a_strip_of_the_base_alone(tmp_path: Path) -> None:
    folder = tmp_path / "strips"
    run_setting(BASE, folder, BASE_ALONE, SUBJECTS[:1])
    assert len(tiles(strip_path(folder, SUBJECTS[0], 0))) == len(ASKS)


@needs_drawings
@pytest.mark.slow
def test_a_few_steps_already_change_what_is_drawn(tmp_path: Path) -> None:
    short, subjects = replace(NO_PRIOR, steps=(2, 4)), SUBJECTS[:2]
    for setting in (BASE_ALONE, short):
        run_setting(BASE, tmp_path / setting.name, setting, subjects)
    for subject in subjects:
        paths = [strip_path(tmp_path / s.name, subject, step) for s in (BASE_ALONE, short) for step in s.steps]
        assert len({path.read_bytes() for path in paths}) == 3
