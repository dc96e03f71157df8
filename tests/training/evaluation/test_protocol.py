"""The protocol as data, its run on the tiny base, its Parquet and its table; adapters side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_images
from training.adapters.adapter import Adapter, LowRank
from training.adapters.layout import find_sites
from training.base.base import Base
from training.base.stream import stream
from training.errors import UserError
from training.evaluation.compare import ComparedAdapter, compare, contact_sheet, standard_error
from training.evaluation.judges.box import Judges
from training.evaluation.judges.features import BaseFeatures
from training.evaluation.protocol import (
    JudgedImage,
    JudgedSubject,
    ProtocolSubject,
    distances,
    load_protocol,
    run_protocol,
    table,
    write_parquet,
)
from training.evaluation.scores import frechet_distance
from training.sampling.render import Look
from training.storage.card import Card

DREAMBOOTH = load_protocol("dreambooth")


def adapter(base: Base, seed: int = 0) -> Adapter:
    modules = {}
    for site in find_sites("unet", base.denoiser, ("to_q",)):
        generator = stream(seed, site.key)
        down, up = torch.randn(2, *site.down, generator=generator), torch.randn(site.out, 2, generator=generator)
        modules[site.key] = LowRank(down, up)
    return Adapter(modules=modules)


def pictures(folder: Path, count: int = 3) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(tiny_images(folder, count).iterdir())]


def judged_by(base: Base) -> Judges:
    model = BaseFeatures(base)
    return Judges(model, model, model)


def card(**changes: object) -> Card:
    held: dict[str, object] = {
        "sha256": "0" * 64, "size": 1, "created": "2026-01-01T00:00:00+00:00", "fingerprint": "0" * 64,
        "base": "tiny", "base_hash": "0", "rank": 2, "alpha": 2, "targets": ("to_q",),
        "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog", "class": "dog",
    }  # fmt: skip
    return Card.model_validate(held | changes)


def test_the_dreambooth_protocol_is_the_papers() -> None:
    assert len(DREAMBOOTH.subjects) == 30 and len(DREAMBOOTH.live) == 9 and len(DREAMBOOTH.objects) == 21
    prompts = {subject: DREAMBOOTH.prompts_of(subject, "sks") for subject in DREAMBOOTH.subjects}
    assert all(len(set(found)) == 25 for found in prompts.values())
    assert sum(map(len, prompts.values())) * DREAMBOOTH.images == 3000
    assert "a sks dog wearing a santa hat" in prompts["dog"] and "a sks dog on top of a mirror" not in prompts["dog"]
    assert "a sks stuffed animal on top of a mirror" in prompts["bear_plushie"]
    assert DREAMBOOTH.prompts_of("cat", "")[0] == "a cat in the jungle"
    by_method = {row.method: row for row in DREAMBOOTH.paper}
    assert by_method["DreamBooth, Stable Diffusion"].dino == 0.668


def test_an_unknown_protocol_names_the_known() -> None:
    with pytest.raises(UserError, match="Unknown protocol 'dreambench'. Known: dreambooth"):
        load_protocol("dreambench")


@pytest.fixture(scope="module")
def judged(tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> JudgedSubject:
    photos = pictures(tmp_path_factory.mktemp("photos"))
    sitting = ProtocolSubject("dog", adapter(tiny), "sks", photos)
    look = Look(1, 1.0, None)
    (one,) = run_protocol(tiny, DREAMBOOTH, [sitting], judged_by(tiny), look=look, images=2)
    return one


def test_every_picture_is_a_row(judged: JudgedSubject) -> None:
    assert len(judged.rows) == 50
    first = judged.rows[0]
    assert (first.subject, first.class_name, first.kind, first.seed) == ("dog", "dog", "live", 0)
    assert first.prompt == "a sks dog in the jungle"
    assert {row.likeness_model for row in judged.rows} == {"base"}


def test_the_contact_sheet_shows_all_prompts(judged: JudgedSubject) -> None:
    sheet = Image.open(io.BytesIO(judged.sheet))
    assert sheet.size == (2 * 128, 25 * 148)


def test_rows_survive_parquet(judged: JudgedSubject, tmp_path: Path) -> None:
    write_parquet(judged.rows, tmp_path / "rows.parquet")
    held = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [JudgedImage(**row) for row in held] == list(judged.rows)


def test_the_table_keeps_our_models_and_the_papers_apart(judged: JudgedSubject) -> None:
    lines = table(DREAMBOOTH, [judged])
    mean = sum(row.likeness for row in judged.rows) / 50
    assert lines[1]["method"] == "this base, 1 of 30 subjects"
    assert lines[1]["likeness (base)"] == f"{mean:.3f} ± 0.000"
    assert all("DINO" not in line for line in lines[:2])
    paper = next(line for line in lines if line["method"] == "paper: DreamBooth, Stable Diffusion")
    assert paper["DINO"] == "0.668" and paper["CLIP-T"] == "0.305"
    assert table(DREAMBOOTH, []) == []


class _Inception:
    """The mean colour stands for Inception's features."""

    name = "inception-2015-12-05"

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.array(image.resize((1, 1)))).float().flatten() for image in images])


def test_fid_and_kid_come_with_their_model_and_a_warning(tiny: Base, tmp_path: Path) -> None:
    photos = pictures(tmp_path / "p")
    sitting, look = ProtocolSubject("dog", adapter(tiny), "sks", photos), Look(1, 1.0, None)
    model: Any = _Inception()
    (one,) = run_protocol(tiny, DREAMBOOTH, [sitting], judged_by(tiny), look=look, images=1, inception=model)
    fid, kid = distances([one], model.name)
    assert one.drawn_NE is not None and one.photos_NE is not None
    expected = frechet_distance(one.drawn_NE, model.features(photos)).value
    assert fid.startswith(f"FID (inception-2015-12-05) {expected:.2f} (only 3 pictures, 2048 are needed")
    assert kid.startswith("KID (inception-2015-12-05) ")


def test_nothing_is_called_fid_that_is_not(judged: JudgedSubject) -> None:
    assert distances([judged], "inception-2015-12-05") == []


def test_standard_error_is_over_subjects() -> None:
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert standard_error([2.0]) == 0.0


def test_adapters_are_compared_by_the_same_prompts_and_seeds(tiny: Base, tmp_path: Path) -> None:
    same = ComparedAdapter("a", adapter(tiny), card(), pictures(tmp_path / "a"))
    entries = [same, ComparedAdapter("b", adapter(tiny), card()), ComparedAdapter("c", adapter(tiny, seed=1), card())]
    made = compare(tiny, entries, judged_by(tiny), steps=1)
    assert made.names == ("a", "b", "c")
    with_photos, without, _ = ({score.name: score.value for score in found} for found in made.scores)
    assert set(with_photos) - set(without) == {"likeness", "copying"}
    shared = set(without)
    assert {n: with_photos[n] for n in shared} == pytest.approx({n: without[n] for n in shared}, abs=2e-3)
    assert made.pictures[1][0].tobytes() != made.pictures[2][0].tobytes()


def test_an_entry_knows_the_words_that_call_it() -> None:
    assert ComparedAdapter("x", Adapter(modules={}), card()).rare == "sks"
    asked, bare = ComparedAdapter("x", Adapter(modules={}), card()).prompts()[1]
    assert asked == "a photo of sks dog in the snow" and bare == "a photo of dog in the snow"
    imported = card(class_prompt=None, **{"class": "dog"})
    assert ComparedAdapter("x", Adapter(modules={}), imported).prompts()[0][0] == "a photo of sks dog"


def test_a_contact_sheet_without_pictures_is_a_picture() -> None:
    assert Image.open(io.BytesIO(contact_sheet([]))).width > 0
    labelled = contact_sheet([("a", [Image.new("RGB", (8, 8))])], columns=["a very long prompt that does not fit in"])
    assert Image.open(io.BytesIO(labelled)).size == (128, 168)
