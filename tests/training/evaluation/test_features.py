"""Models that look at pictures: real classes with random weights, each against another way to the same number."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from tests.tiny import tiny_tokenizer
from training.base.base import Base, load_base
from training.errors import UserError
from training.evaluation.judges import faces
from training.evaluation.judges.box import JudgeBox
from training.evaluation.judges.configured import Clip, Inception, Vit
from training.evaluation.judges.features import (
    BaseFeatures,
    EfficientNetLite0,
    MapModel,
    PocketJudge,
    TextModel,
    pixels,
)
from training.evaluation.judges.pocket import JudgeConfig, JudgeNet


def pictures(count: int = 3, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side + 6, 3), dtype=np.uint8)) for _ in range(count)]


def assert_unit_rows(rows: Tensor, count: int) -> None:
    assert rows.shape[0] == count and rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(count), atol=1e-5, rtol=0)


def test_pixels_are_the_middle_square_normalised() -> None:
    (image,) = pictures(1)
    held = pixels([image], 16, (0.5,) * 3, (0.5,) * 3)
    square = image.crop((3, 0, 43, 40)).resize((16, 16), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(held[0], expected)
    cut = pixels([image], 16, (0.0,) * 3, (1.0,) * 3, resize=20)[0]
    assert torch.equal(cut, pixels([image], 20, (0.0,) * 3, (1.0,) * 3)[0][:, 2:18, 2:18])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = tiny_tokenizer(folder / "words")
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }
    vision = {"hidden_size": 20, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_agrees_with_clips_own_logits(clip: Path) -> None:
    model, images = Clip(clip), pictures()
    prompts = ["a photo of a dog", "a red cat in the snow", "water"]
    whole = CLIPModel.from_pretrained(clip)
    tokens = model._tokenizer(prompts, padding=True, return_tensors="pt")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    batch = processor([ImageOps.fit(image, (40, 40)) for image in images], return_tensors="pt")
    with torch.no_grad():
        logits = whole(**tokens, pixel_values=batch["pixel_values"]).logits_per_image
    expected = (logits / whole.logit_scale.exp()).diagonal().detach()
    torch.testing.assert_close(model.agree(images, prompts), expected, atol=2e-3, rtol=0)
    assert_unit_rows(model.embed(images), 3)
    assert model.name == "clip", "a path of this machine is no name"


def test_dino_is_the_class_token_and_the_patches_are_the_map(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    whole = ViTModel(config, add_pooling_layer=False).eval()
    whole.save_pretrained(tmp_path / "dino")
    model, images = Vit("dino", tmp_path / "dino"), pictures()
    seen = pixels(images, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=37)
    with torch.no_grad():
        expected = functional.normalize(whole(pixel_values=seen).last_hidden_state[:, 0])
    torch.testing.assert_close(model.embed(images), expected)
    assert model.maps(images).shape == (3, 24, 4, 4)


def test_dinov2_loads_and_maps(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    model = Vit("dinov2", tmp_path / "dinov2")
    assert_unit_rows(model.embed(pictures()), 3)
    assert model.maps(pictures()).shape == (3, 24, 2, 2)


class _Inception(nn.Module):
    """The signature of the TorchScript Inception."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        return img.float().mean((2, 3)) if return_features else img.float()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_inception_is_fed_bytes_and_asked_for_features(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(_Inception()), str(tmp_path / "inception.pt"))
    features = Inception(tmp_path / "inception.pt").features([Image.new("RGB", (8, 8), (10, 20, 30))] * 2)
    assert features.tolist() == [[10, 20, 30]] * 2


def test_arcface_loads_by_name_and_refuses_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = faces.IResNet((1, 2, 1, 1), width=4).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "arcface.st")
    loaded = faces.load_arcface(tmp_path / "arcface.st")
    chips = [np.asarray(image.resize((112, 112))) for image in pictures(2)]
    assert_unit_rows(faces.embed_chips(loaded, chips), 2)
    torch.testing.assert_close(faces.embed_chips(loaded, chips), faces.embed_chips(model, chips))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.st")
    with pytest.raises(UserError, match="no IResNet"):
        faces.load_arcface(tmp_path / "other.st")


def test_arcface_r50_has_the_published_size() -> None:
    with torch.device("meta"):
        model = faces.IResNet((3, 4, 14, 3))
        assert model(torch.zeros(2, 3, 112, 112)).shape == (2, 512)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 43.59


def test_faces_need_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces._Dlib, "is_installed", staticmethod(lambda: False))
    with pytest.raises(UserError, match=r"pip install 'dreamfleet\[faces\]'"):
        faces.DlibFace()


@pytest.mark.skipif(not faces.DlibFace.is_installed(), reason="needs the extra `faces`")
def test_dlib_finds_no_face_in_noise() -> None:
    assert faces.DlibFace().embed_faces(pictures(2, 128)) == [None, None]


@pytest.mark.skipif(not EfficientNetLite0.is_installed(), reason="needs the extra `evaluate`")
def test_efficientnet_sees_a_picture_in_its_copy() -> None:
    model = EfficientNetLite0()
    waves = np.sin(np.linspace(0, 12, 64))[:, None, None] * np.cos(np.linspace(0, 5, 64))[None, :, None]
    drawn = Image.fromarray((127 + 120 * waves * np.array([1, 0.5, -1])).astype(np.uint8))
    embedded = model.embed([drawn, drawn.resize((200, 200)), *pictures(1)])
    assert_unit_rows(embedded, 3)
    assert embedded[0] @ embedded[1] > 0.9 > embedded[0] @ embedded[2]
    assert model.maps([drawn]).shape == (1, 1280, 7, 7)
    torch.testing.assert_close(functional.normalize(model.maps([drawn]).mean((2, 3)))[0], embedded[0])


def judge() -> PocketJudge:
    torch.manual_seed(0)
    return PocketJudge(
        JudgeNet(JudgeConfig(classes=("dog",), places=("snow", "night"), colours=("red", "blue"), widths=(8, 8))).eval()
    )


def test_the_pocket_judge_reads_what_the_prompt_asks_for() -> None:
    model, (image,) = judge(), pictures(1)
    snow, night, both, nothing = model.agree([image] * 4, ["dog in the snow", "at night", "red, snow", "a sks dog"])
    red = model.agree([image], ["a red dog"])[0]
    assert snow + night == pytest.approx(1.0) and both == pytest.approx(float(red + snow) / 2)
    assert nothing.isnan()


def test_the_base_as_a_judge(tiny: Base) -> None:
    model, images = BaseFeatures(tiny), pictures(2, 20)
    assert_unit_rows(model.embed(images), 2)
    torch.testing.assert_close(model.embed(images)[1:], model.embed(images[1:]), atol=1e-5, rtol=1e-4)
    agreed = model.agree(images, ["a red dog", ""])
    assert agreed[1] == pytest.approx(0.0, abs=1e-5), "the empty prompt takes no error away"
    assert torch.isfinite(agreed).all()
    assert isinstance(model, MapModel) and isinstance(model, TextModel)


def test_a_base_names_the_judge_of_its_pictures(tmp_path: Path, tiny: Base, tiny_folder: Path) -> None:
    """Where its folder says so, whatever the base is called."""
    copy = tmp_path / "mine"
    shutil.copytree(tiny_folder, copy)
    assert JudgeBox(load_base(str(copy), device="cpu")).judges(fidelity="base").likeness.name != "pocket-judge"
    (copy / "dreamfleet.json").write_text('{"judge": "pocket-judge"}')
    chosen = JudgeBox(load_base(str(copy), device="cpu")).judges()
    assert chosen.likeness.name == chosen.fidelity.name == "pocket-judge"
    (copy / "dreamfleet.json").write_text('{"judge": "dino"}')  # does not say how well a picture fits a prompt
    with pytest.raises(UserError, match="is 'dino'; known are base, clip, pocket-judge"):
        JudgeBox(load_base(str(copy), device="cpu")).judges()


def test_judges_are_chosen_by_name_and_by_what_is_there(tiny: Base, clip: Path) -> None:
    plain = JudgeBox(tiny).judges("base", "base")
    assert plain.likeness.name == plain.fidelity.name == "base"
    assert JudgeBox(tiny, clip.parent).judges("base").fidelity.name == "clip"
    with pytest.raises(UserError, match="`likeness_model` is 'vgg'; known are auto"):
        JudgeBox(tiny).judges("vgg")
    with pytest.raises(UserError, match="DREAMFLEET_MODELS"):
        JudgeBox(tiny).judges("dino")
    with pytest.raises(UserError, match="Model 'dino' is not in the folder of models"):
        JudgeBox(tiny, clip.parent).judges("dino")


def test_a_base_may_name_the_judge_that_is_made_for_its_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "dreamfleet.json").write_text('{"judge": "pocket-judge"}')
    base = load_base(str(tmp_path / "base"), device="cpu")
    assert JudgeBox(base).judges("auto").likeness.name == PocketJudge.name
