"""The studio and a fleet in a real browser: photos are checked, train in one pack, and are drawn; keys are made."""

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect

from tests.browser import PHONE, open_page
from tests.fleet.house import FAST, House, photos
from tests.tiny import tiny_images
from tests.tiny_captioner import Endpoint
from training.base.base import Base
from training.captioning.settings import CaptionSpec
from training.run.run import RunStore

PAGES = ("create", "compare", "adapters", "subjects", "training", "usage")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two subjects, each a folder of photos; one has a file that is no photo, a wide photo and captions."""
    for seed, name in enumerate(("buddy", "mug")):
        tiny_images(tmp_path / "photos" / name, count=5, side=40, seed=seed)
    first = tmp_path / "photos" / "buddy"
    (first / "broken.png").write_bytes(b"no picture")
    (first / "captions.txt").write_text("0.png: a photo of sks dog on the grass\n")
    wide = io.BytesIO()
    with Image.open(first / "4.png") as photo:
        photo.resize((80, 40)).save(wide, "PNG")
    (first / "4.png").write_bytes(wide.getvalue())
    return tmp_path / "photos"


def fill(page: Page, subject: str, kind: str) -> None:
    """Says what a subject is, and that it shall train for a moment only."""
    card = page.get_by_role("form", name=f"Subject {subject}")
    card.get_by_label("Class", exact=True).fill(kind)
    card.get_by_text("Settings", exact=True).click()
    card.get_by_label("Steps").fill("6")
    card.get_by_label("Class images").fill("4")
    card.get_by_label("Checkpoint every").fill("3")


def drop(page: Page, target: str, *paths: Path) -> None:
    """Drops files or folders of this machine on an element, as a person does with the mouse."""
    box = page.locator(target).bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})


def test_photos_are_checked_train_together_and_are_drawn(browser: Browser, house: House, folders: Path) -> None:
    with open_page(browser, house.url) as page:
        page.goto("/#/training")
        expect(page.get_by_role("heading", name="Nothing has been trained yet")).to_be_visible()
        page.get_by_role("link", name="Add your photos").click()
        page.get_by_label("A folder of subjects").set_input_files(folders)
        buddy = page.get_by_role("form", name="Subject buddy")
        expect(buddy.get_by_text("5 good photos, 1 not used")).to_be_visible()
        expect(buddy.locator(".photo.bad")).to_contain_text("Not used:")
        expect(buddy.get_by_label("Caption of 0.png")).to_have_value("a photo of sks dog on the grass")
        assert buddy.locator(".crop:visible").count() == 1  # only the wide photo loses something
        expect(page.get_by_role("form", name="Subject mug").get_by_text("5 good photos")).to_be_visible()
        page.get_by_role("button", name="Train all 2").click()  # the class is missing: the browser asks for it
        expect(page).to_have_url(re.compile("#/subjects"))
        fill(page, "buddy", "dog")
        fill(page, "mug", "toy")
        page.get_by_role("button", name="Train all 2").click()
        expect(page).to_have_url(re.compile("#/training"))
        rows = page.locator(".entry")
        expect(rows).to_have_count(2)
        expect(page.locator(".entry .tag.good")).to_have_count(2, timeout=240_000)
        page.get_by_role("link", name="buddy").first.click()
        expect(page.get_by_role("region", name="Loss").locator("circle").first).to_be_visible()
        expect(page.get_by_role("region", name="What happened")).to_contain_text("published")
        before = house.registry.resolve("default/buddy").version
        for step in (3, 6):
            page.get_by_label(f"Compare step {step}").check()
        page.get_by_role("button", name="Compare the chosen steps").click()
        expect(page.get_by_role("heading", name="Compare", exact=True)).to_be_visible()
        versions = house.registry.versions("default", "buddy")
        assert {3, 6} <= {house.registry.resolve("default/buddy", one).card.steps for one in versions}
        assert house.registry.resolve("default/buddy").version == before  # only compared
        page.go_back()
        page.get_by_role("button", name="Make current").first.click()
        expect(page.get_by_text("is served now")).to_be_visible()
        assert house.registry.resolve("default/buddy").version != before
        page.get_by_role("link", name="Draw with it").click()
        expect(page.get_by_label("Prompt")).to_have_value(re.compile("a photo of a sks dog"))
        page.get_by_label("Pictures", exact=True).fill("1")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator(".batch .tile img[alt*='seed']")).to_have_count(1)
        page.goto("/#/usage")
        expect(page.get_by_role("row", name=re.compile("^buddy 1"))).to_contain_text("6")
        page.goto("/#/subjects")
        page.get_by_text("Photos that the server keeps").click()
        page.get_by_role("button", name="Delete buddy.zip").click()
        page.get_by_role("button", name="Delete them").click()
        expect(page.get_by_role("button", name="Delete mug.zip")).to_be_visible()
        expect(page.get_by_role("button", name="Delete buddy.zip")).to_have_count(0)
    assert house.registry.resolve("default/buddy").card.class_name == "dog"
    with open_page(browser, house.url, PHONE) as page:
        for path in PAGES:
            page.goto(f"/#/{path}")
            page.locator("main h1").wait_for(state="attached")
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], path


def test_a_person_is_trained_with_a_consent_and_captions_are_proposed(
    browser: Browser, own_base: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    endpoint = Endpoint()
    tiny_images(tmp_path / "photos", count=5, side=40)
    spec = CaptionSpec(caption_model="vision-1", caption_url=endpoint.url)
    house = House(own_base, tiny_folder, tmp_path / "storage", captions=spec)
    try:
        with open_page(browser, house.url) as page:
            page.goto("/#/subjects")
            drop(page, ".big-drop", tmp_path / "photos")
            card = page.get_by_role("form", name="Subject photos")
            expect(card.get_by_text("5 good photos")).to_be_visible()
            card.get_by_label("Caption of 0.png").fill("mine")
            card.get_by_label("Id", exact=True).fill("ada")
            card.get_by_label("Class", exact=True).fill("dog")
            expect(card.get_by_label("Who agreed")).to_be_hidden()
            fill(page, "photos", "woman")
            expect(card.get_by_text("Consent: needed")).to_be_visible()
            card.get_by_role("button", name="Propose captions").click()  # the browser asks for the consent first
            expect(card.get_by_label("Who agreed")).to_be_focused()
            card.get_by_label("Who agreed").fill("Ada Example")
            card.get_by_label("Evidence").fill("on paper")
            card.get_by_role("button", name="Propose captions").click()
            expect(card.get_by_text("4 captions proposed")).to_be_visible()
            expect(card.get_by_label("Caption of 0.png")).to_have_value("mine")
            expect(card.get_by_label("Caption of 1.png")).to_have_value(re.compile("a photo of a sks woman, A dog"))
            card.get_by_role("button", name="Train").click()
            expect(card.get_by_role("alert")).to_contain_text("consent.evidence")
            card.get_by_label("Document of the agreement").set_input_files(
                {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"I agree"}
            )
            expect(card.get_by_label("Evidence")).to_have_value(hashlib.sha256(b"I agree").hexdigest())
            card.get_by_role("button", name="Train").click()
            expect(page).to_have_url(re.compile("#/training"))
    finally:
        house.close()
        endpoint.close()
    (run,) = house.storage.folders("runs")
    consent = RunStore(house.storage, run).record().manifest.subjects[0].consent
    assert consent is not None and (consent.granted_by, consent.kind) == ("Ada Example", "person")
    texts = [key for key in house.storage.list("files") if key.endswith(".txt")]
    assert len(texts) == 5


def test_an_admin_makes_and_revokes_keys_and_sets_a_quota(browser: Browser, two: House) -> None:
    with open_page(browser, two.url) as page:
        page.goto("/#/keys")
        page.get_by_label("API key").fill(two.admin("ann"))
        page.keyboard.press("Enter")
        page.get_by_role("button", name="New key").click()
        page.get_by_label("Tenant").fill("carol")
        page.get_by_label("train").uncheck()
        page.get_by_role("button", name="Make the key").click()
        made = page.locator(".shown-key").inner_text()
        answer = httpx.get(f"{two.url}/v1/me", headers={"Authorization": f"Bearer {made}"}, trust_env=False).json()
        assert (answer["tenant"], answer["scopes"]) == ("carol", ["images"])
        page.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Quota of carol").click()
        page.get_by_label("Subjects waiting or in training").fill("3")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("row", name=re.compile("^carol 0"))).to_contain_text("3")
        page.get_by_role("row", name=re.compile("carol images active")).get_by_role("button", name="Revoke").click()
        page.get_by_role("button", name="Revoke it").click()
        expect(page.get_by_role("row", name=re.compile("carol images revoked"))).to_be_visible()
        refused = httpx.get(f"{two.url}/v1/me", headers={"Authorization": f"Bearer {made}"}, trust_env=False)
        assert refused.status_code == 401


def test_a_job_is_paused_resumed_cancelled_and_retried_and_photos_are_refused_in_words(
    browser: Browser, two: House
) -> None:
    with two.client("ann") as client:
        file = client.files.create(file=("rex.zip", photos()), purpose="fine-tune")
        settings = {**FAST, "train": {"max_steps": 50_000, "checkpoint_every": 10_000}}
        method: Any = {"type": "dreambooth_lora", "dreambooth_lora": settings}
        client.fine_tuning.jobs.create(model=two.base, training_file=file.id, suffix="rex", method=method)
    with open_page(browser, two.url) as page:
        page.goto("/#/subjects")
        page.get_by_label("API key").fill(two.tokens["ann"])
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="Keys")).to_have_count(0)  # for admins only
        broken: list[FilePayload] = [
            {"name": f"{i}.png", "mimeType": "image/png", "buffer": b"no picture"} for i in range(3)
        ]
        page.get_by_label("Photos of a subject").set_input_files(broken)
        expect(page.get_by_role("alert")).to_contain_text("There is no usable photo")
        page.get_by_role("link", name="Training").click()
        row = page.locator(".entry")
        for verb, tag in (("Pause", "paused"), ("Resume", "training"), ("Cancel", "cancelled"), ("Retry", "training")):
            row.get_by_role("button", name=verb).click()
            if verb == "Cancel":
                page.get_by_role("button", name="Cancel it").click()
            expect(row.locator(".tag").first).to_have_text(tag)
        row.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Cancel it").click()
        expect(row.locator(".tag").first).to_have_text("cancelled")
