"""Settings beside the loop: a moving average of the adapter, a loss by the subject's mask, several resolutions."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from tests.tiny import tiny_images
from tests.training.subjects import spec, subject
from tests.training.trainer.test_pack import TIGHT, distance, run
from tests.training.trainer.test_worker import Fleet, entries
from training.adapters.adapter import load_adapter
from training.base.base import Base
from training.base.noise.ddpm import Ddpm
from training.manifest.subject import TrainSpec
from training.photos.files import PhotoFile
from training.photos.photos import Photo, photos
from training.photos.variants import framed
from training.storage.registry import Registry
from training.storage.storage import open_storage
from training.trainer.batch import Turn, make_batch
from training.trainer.checkpoint import dump_state, load_state
from training.trainer.latents import LatentSet, encode_photos, load_latents, photos_key, save_latents
from training.trainer.member import Subject
from training.trainer.pack import Pack, training_bank


def settings(**train: Any) -> TrainSpec:
    return TrainSpec.model_validate(train)


# -- a moving average


def test_the_average_is_diffusers_own(tiny: Base) -> None:
    """Step after step, of every slot by itself."""
    ones = [
        subject("a", 1, train={"ema_decay": 0.6, "max_steps": 9}),
        subject("b", 2),
        subject("c", 3, train={"ema_decay": 0.9}),
    ]
    targets = {"unet": ones[0].spec.lora.targets, "text_encoder": ones[0].spec.lora.text_encoder_targets}
    pack = Pack(tiny, training_bank(tiny, slots=3, rank=8, targets=targets))
    for one in ones:
        pack.join(one)
    theirs = {slot: nn.Parameter(pack.bank.weights_SP.detach()[slot].clone()) for slot in (0, 2)}
    models = {slot: EMAModel([row], decay=decay) for (slot, row), decay in zip(theirs.items(), (0.6, 0.9), strict=True)}
    for _ in range(4):
        pack.step()
        for slot, model in models.items():
            theirs[slot].data.copy_(pack.bank.weights_SP.detach()[slot])
            model.step([theirs[slot]])
    for id, slot in (("a", 0), ("c", 2)):
        state = pack.state(id)
        assert state.averaged is not None and distance(state.averaged, state.adapter) > 1e-4
        expected = pack.bank.unpack(pack.bank.row_of(models[slot].shadow_params[0], slot), 8)
        assert distance(state.averaged, expected) <= 1e-7 and distance(pack.adapter(id), expected) <= 1e-7
        pack.wear(id, state.averaged)
        assert distance(pack.adapter(id), expected) <= 1e-7
    assert pack.state("b").averaged is None
    pack.close()


def test_the_average_goes_on_where_it_stopped_and_changes_no_training(tiny: Base) -> None:
    ones = [subject("a", 1, train={"ema_decay": 0.9}), subject("b", 2)]
    through = run(tiny, ones, slots=2)
    stopped = run(tiny, ones, slots=2, stop=2).states
    resumed = [Subject(s.spec, s.instance, s.prior, load_state(dump_state(stopped[s.spec.id]))) for s in ones]
    again = run(tiny, resumed, slots=2).states
    assert all(dump_state(state) == dump_state(again[id]) for id, state in through.states.items())
    plain = run(tiny, [subject("a", 1), subject("b", 2)], slots=2).states
    assert distance(plain["a"].adapter, through.states["a"].adapter) == 0


def test_a_worker_publishes_the_average(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.worker.worker.BEAT_SECONDS", 0.0)
    tiny_images(tmp_path / "a", side=40)
    found = {}
    for name, train in (("plain", {}), ("average", {"ema_decay": 0.5})):
        asked = entries("a")
        asked[0]["train"] = {**asked[0].get("train", {}), **train}
        fleet = Fleet(tmp_path / name, tiny, [{**asked[0], "images": str(tmp_path / "a")}])
        (outcome,) = fleet.work().values()
        assert outcome.kind == "done", outcome.reason
        registry = Registry(fleet.storage)
        found[name] = load_adapter(registry.weights(registry.resolve("default/a")))
    assert 1e-5 < distance(found["plain"], found["average"]) < 1


# -- masks


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def half_mask(size: tuple[int, int]) -> Image.Image:
    """The left half is the subject."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_masks_come_from_files_and_transparency() -> None:
    noise = Image.effect_noise((40, 30), 60).convert("RGB")
    clear = noise.copy()
    clear.putalpha(half_mask((40, 30)))
    files = [
        PhotoFile("a.png", png(noise)), PhotoFile("a.mask.png", png(half_mask((80, 60)))),
        PhotoFile("b.png", png(clear)),
        PhotoFile("c.png", png(noise.rotate(180))), PhotoFile("d.mask.png", png(half_mask((40, 30)))),
        PhotoFile("e.png", png(noise.rotate(90))), PhotoFile("e.mask.png", png(half_mask((10, 30)))),
    ]  # fmt: skip
    found = photos(files, min_photos=1, min_side_px=16, with_report=False)
    masks = {photo.name: photo.subject_mask for photo in found.good}
    assert masks.keys() == {"a.png", "b.png", "c.png"} and masks["c.png"] is None
    for name in ("a.png", "b.png"):
        assert masks[name] is not None and masks[name].size == (40, 30)  # type: ignore[union-attr]
    rejected = {one.name: one.reason for one in found.rejected}
    assert "a mask of no photo" in rejected["d.mask.png"] and "its mask e.mask.png has 10 x 30 px" in rejected["e.png"]


def test_a_mask_is_cropped_and_mirrored_with_its_photo() -> None:
    grey = half_mask((60, 32))
    for crop in ("center", "random"):
        options: dict[str, Any] = {"crop": crop, "flip": True, "color_jitter": True}
        made = framed(grey.convert("RGB"), 32, mask=grey, **options)
        plain = framed(grey.convert("RGB"), 32, **options)
        assert all((one.pixels_HW3 == other.pixels_HW3).all() for one, other in zip(made, plain, strict=True))
        untouched = [made[i] for i in (0, len(made) // 2)]
        for one in untouched:
            assert one.mask_HW is not None and (one.mask_HW == one.pixels_HW3[..., 0]).all()


def masked_photos(count: int = 3) -> list[Photo]:
    return [
        Photo(
            f"{i}.png",
            Image.effect_noise((20, 16), 50 + i).convert("RGB"),
            str(i),
            (20, 16),
            drawn_mask=half_mask((20, 16)),
        )
        for i in range(count)
    ]


def test_the_loss_is_weighted_by_the_mask(tiny: Base) -> None:
    """Weighted cell by cell, against the same by hand; with a weight of 1 it is the usual loss, to the bit."""
    losses, shots = {}, masked_photos()
    for weight in (None, 1.0, 0.25, 0.0):
        train: dict[str, Any] = {"resolution": 16, "flip": False, "background_weight": weight}
        made = spec("a", train=train, prior={"enabled": False}, lora={"text_encoder": False})
        images = encode_photos(tiny, shots, made.train, made.filled_instance_prompt)
        one = Subject(made, images)
        (report,) = run(tiny, [one], stop=1).reports["a"]
        losses[weight] = report.instance_loss
        batch = make_batch([Turn(made, images, None, 0, 0)], tiny.process)
        if weight is None:
            assert batch.weights == [None]
            continue
        (cells,) = batch.weights
        assert cells is not None and float(cells.mean()) == pytest.approx(1.0, abs=1e-4)
        assert isinstance(tiny.process, Ddpm)
        with torch.no_grad():
            levels = tiny.process.levels(batch.places, torch.float32)
            latents, noise = torch.stack(batch.latents), torch.stack(batch.noise)
            said = tiny.predict(levels.noisy(latents, noise), levels.times_N, tiny.encode(batch.prompts), batch.rows)
            expected = ((said - noise).square() * cells).mean()
        assert report.instance_loss == pytest.approx(float(expected), rel=1e-5)
    assert losses[None] == pytest.approx(losses[1.0], rel=1e-6)
    assert abs(losses[0.0] - losses[1.0]) > 1e-3 * losses[1.0]


def test_masks_are_cached_with_their_latents(tiny: Base, tmp_path: Path) -> None:
    plain, asked = settings(resolution=16), settings(resolution=16, background_weight=0.5)
    shots = masked_photos()
    keys = {photos_key(tiny, shots, plain), photos_key(tiny, shots, asked), photos_key(tiny, shots[:2], asked)}
    others = [Photo(p.name, p.image, p.sha256, p.source_size, drawn_mask=Image.new("L", (20, 16), 9)) for p in shots]
    assert len(keys | {photos_key(tiny, others, asked)}) == 4
    storage, made = open_storage(str(tmp_path)), encode_photos(tiny, shots, asked, "x")
    save_latents(storage, "k", made.images)
    back = load_latents(storage, "k")
    assert back is not None and len(back) == len(made)
    for one, other in zip(back, made.images, strict=True):
        assert one.subject_HW is not None and other.subject_HW is not None
        assert torch.equal(one.subject_HW, other.subject_HW) and one.subject_HW.shape == (8, 8)


def test_masked_subjects_in_a_pack_are_themselves_alone(tiny64: Base) -> None:
    def masked(seed: int, **train: Any) -> Subject:
        one = subject(str(seed), seed, train=train)
        half = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1)
        images = tuple(image._replace(subject_HW=half) for image in one.instance.images)
        return Subject(one.spec, LatentSet(images, one.instance.prompts), one.prior)

    ones = [masked(1, background_weight=0.1), masked(2), masked(3, background_weight=0.0, batch_size=2)]
    packed = run(tiny64, ones, slots=3).adapters
    for one in ones:
        alone = run(tiny64, [one]).adapters[one.spec.id]
        assert distance(packed[one.spec.id], alone) <= TIGHT
    assert distance(packed["1"], run(tiny64, [masked(1)]).adapters["1"]) > 1e-3


# -- several resolutions


def test_photos_are_learned_at_every_resolution(tiny: Base) -> None:
    asked = settings(resolution=16, resolutions=(24, 32), flip=False)
    shots = [
        Photo(f"{i}.png", Image.effect_noise((40, 40), 50).convert("RGB"), str(i), (40, 40), f"caption {i}")
        for i in range(2)
    ]
    made = encode_photos(tiny, shots, asked, "x")
    assert [tuple(image.mean_CHW.shape[1:]) for image in made.images] == [(8, 8), (12, 12), (16, 16)] * 2
    assert made.prompts == ("caption 0",) * 3 + ("caption 1",) * 3
    assert photos_key(tiny, shots, asked) != photos_key(tiny, shots, settings(resolution=16, flip=False))
    one = Subject(spec("a", train={"batch_size": 4, "resolutions": [24, 32]}, prior={"enabled": False}), made)
    assert run(tiny, [one]).reasons == {"a": None}


def test_what_cannot_be_spread_over_devices_says_so() -> None:
    for train in ({"ema_decay": 0.9}, {"resolutions": (64,)}):
        told = TrainSpec.model_validate({"batch_size": 2, **train}).against_zero
        assert told is not None and next(iter(train)) in told
