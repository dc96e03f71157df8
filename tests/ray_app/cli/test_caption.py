"""`dreamfleet caption` writes what a model proposes beside photos, and leaves what a person has written."""

from tests.ray_app.conftest import Desk
from tests.tiny_captioner import Endpoint


def test_captions_are_written_beside_photos(desk: Desk) -> None:
    endpoint = Endpoint()
    manifest = desk.manifest("rusty", "tabby")
    photos = sorted((desk.folder / "images" / "rusty").glob("*.png"))
    photos[0].with_suffix(".txt").write_text("mine")
    how = ("--caption-url", endpoint.url, "--caption-model", "vision-1")
    done = desk.run("caption", manifest, *how)
    assert done.status == 0, done.err
    assert f"rusty/{photos[0].name}: has a caption already" in done.out and "Read and correct them" in done.out
    assert photos[0].with_suffix(".txt").read_text() == "mine"
    assert "sks dog" in photos[1].with_suffix(".txt").read_text()
    asked = len(endpoint.asked)
    again = desk.run("caption", manifest, *how, "--json").json
    assert len(endpoint.asked) == asked and all(one["kept"] for one in again["photos"])
    over = desk.run("caption", manifest, *how, "--overwrite", "--json").json
    assert over["model"] == "vision-1" and not any(one["kept"] for one in over["photos"])
    assert "sks dog" in photos[0].with_suffix(".txt").read_text()
    endpoint.refuse = True
    failed = desk.run("caption", manifest, *how, "--overwrite")
    assert failed.status == 1 and "the model is loading" in failed.out
    endpoint.close()


def test_without_a_model_it_says_what_to_give(desk: Desk) -> None:
    refused = desk.run("caption", desk.manifest("rusty"))
    assert refused.status == 2 and "--caption-model FOLDER" in refused.err
