"""Captions are proposed by a model in a folder or behind an endpoint, in the subject's own words."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_captioner import WORDS, Endpoint, tiny_blip
from training.captioning.captioner import NoCaptioner, open_captioner, worded
from training.captioning.proposals import Proposal, propose, write_caption
from training.captioning.settings import KEY, CaptionSpec
from training.errors import UserError
from training.manifest.subject import SubjectSpec
from training.photos.photos import Photo

DOG = SubjectSpec.model_validate(
    {"id": "rusty", "images": "x", "class": "dog", "instance_prompt": "a photo of a sks {class}"}
)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


def shown(*colours: str) -> list[Photo]:
    return [Photo(f"{i}.png", Image.new("RGB", (40, 30), colour), str(i), (40, 30)) for i, colour in enumerate(colours)]


@pytest.mark.parametrize(
    "said, caption",
    [
        ("a dog on a beach.", "a sks dog on a beach"),
        ("A Dog beside a dog house", "A sks dog beside a dog house"),
        ("a sks dog on grass", "a sks dog on grass"),
        ("something\n on a  table", "a photo of a sks dog, something on a table"),
        ("hotdogs", "a photo of a sks dog, hotdogs"),
        ('"a dog at night"', "a sks dog at night"),
        ("\x00 ", "a photo of a sks dog"),
        ("a dog " + "x" * 2000, "a sks dog " + "x" * 990),
    ],
)
def test_what_a_model_says_becomes_the_subjects_caption(said: str, caption: str) -> None:
    assert worded(said, DOG) == caption


def test_a_model_of_transformers_in_a_folder(tmp_path: Path) -> None:
    spec = CaptionSpec(caption_model=str(tiny_blip(tmp_path / "blip")))
    captioner = open_captioner(spec)
    first, second = (list(propose(captioner, DOG, shown("red", "blue"))) for _ in range(2))
    assert first == second and captioner.name == "blip"
    said = captioner.describe(Image.new("RGB", (40, 30), "red"), "dog")
    assert said and set(said.split()) <= set(WORDS)
    assert [one.name for one in first] == ["0.png", "1.png"] and all("sks dog" in str(one.caption) for one in first)


def test_an_endpoint_is_shown_the_picture_and_told_the_class(endpoint: Endpoint) -> None:
    captioner = open_captioner(CaptionSpec(caption_model="vision-1", caption_url=endpoint.url))
    found = list(propose(captioner, DOG, shown("red")))
    assert found == [Proposal("0.png", "A sks dog before something of 40 px")]
    (asked,) = endpoint.asked
    assert (asked["path"], asked["model"]) == ("/v1/chat/completions", "vision-1")
    assert "'a dog'" in asked["messages"][0]["content"][0]["text"]


def test_what_goes_wrong_is_told_of_each_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Endpoint(key="secret")
    spec = CaptionSpec(caption_model="m", caption_url=locked.url)
    (refused,) = propose(open_captioner(spec), DOG, shown("red"))
    assert refused.caption is None and "401" in str(refused.problem) and KEY in str(refused.problem)
    monkeypatch.setenv(KEY, "secret")
    captioner = open_captioner(spec)
    assert next(propose(captioner, DOG, shown("red"))).caption
    locked.refuse = True
    assert "the model is loading" in str(next(propose(captioner, DOG, shown("red"))).problem)
    locked.close()
    assert "cannot be reached" in str(next(propose(captioner, DOG, shown("red"))).problem)


def test_no_model_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(NoCaptioner, match="--caption-model FOLDER"):
        open_captioner(CaptionSpec())
    with pytest.raises(UserError, match=r"no folder of a transformers model"):
        open_captioner(CaptionSpec(caption_model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="cannot be loaded as an image-to-text model"):
        open_captioner(CaptionSpec(caption_model=str(tmp_path)))
    with pytest.raises(ValueError, match="--caption-model, too"):
        CaptionSpec(caption_url="http://127.0.0.1:1/v1")


def test_a_caption_that_is_there_is_never_lost(tmp_path: Path) -> None:
    proposal = Proposal("a.png", "a sks dog")
    assert write_caption(tmp_path, proposal, overwrite=False) == tmp_path / "a.txt"
    assert write_caption(tmp_path, Proposal("a.png", "other"), overwrite=False) is None
    assert (tmp_path / "a.txt").read_text() == "a sks dog\n"
    assert write_caption(tmp_path, Proposal("a.png", "other"), overwrite=True) is not None
    assert (tmp_path / "a.txt").read_text() == "other\n" and len(list(tmp_path.iterdir())) == 1
