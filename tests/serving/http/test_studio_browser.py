"""The studio in a real browser, over a real server: drawing, history, comparing, adapters, keys, phones."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser import PHONE, open_page
from tests.serving.http.test_api import World
from tests.serving.http.test_clients import Site
from tests.tiny import tiny_images
from training.base.base import Base

BAD = "<img src=x onerror=alert(1)> sks dog"  # what a careless page would run


@pytest.fixture(scope="module")
def site(tiny: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(World(tiny, tiny_folder, tmp_path_factory.mktemp("storage"), keys=False))
    for id, seed in (("rusty", 1), ("rusty", 2), ("tabby", 3)):
        site.world.upload("default", id, seed)
    site.world.library.change("default", "tabby", trigger=BAD)
    yield site
    site.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with open_page(browser, site.url) as page:
        yield page


def test_a_first_picture_and_the_same_again_from_the_history(page: Page, site: Site) -> None:
    page.goto("/")
    page.get_by_role("button", name="rusty").click()
    tiles = page.locator(".batch .tile img[alt*='seed']")
    expect(tiles).to_have_count(4)
    page.reload()  # the history is the browser's
    expect(tiles).to_have_count(4)
    tiles.nth(1).click()
    facts = page.get_by_role("dialog").locator("dl").inner_text()
    seed = facts.split("Seed\n")[1].split()[0]
    page.get_by_role("button", name="Use again").last.click()
    version = site.world.registry.resolve("default/rusty").version
    expect(page.get_by_label("Seed", exact=True)).to_have_value(seed)
    expect(page.locator(".mix-row")).to_contain_text(version[:8])
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(tiles).to_have_count(5)
    same = page.locator(f"img[alt*='seed {seed}']")
    expect(same).to_have_count(2)
    kept = page.evaluate(READ_HISTORY, int(seed))
    first, second = (decoded(bytes(one)) for one in kept)
    assert abs(first - second).max() <= 1  # the very same picture, but for the rounding of another batch


def test_the_history_of_a_server_that_keeps_one(
    browser: Browser, tiny: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    """What a program drew is there in a browser that has never been there; deleting it deletes it on the server."""
    site = Site(World(tiny, tiny_folder, tmp_path, keys=False, history=True, site="https://elsewhere.example"))

    def seeds() -> list[int]:
        answer = httpx.get(f"{site.url}/v1/images/history", timeout=60, trust_env=False).json()
        return [one["seed"] for one in answer["data"]]

    try:
        site.world.upload("default", "rusty", 1)
        body = {"prompt": "drawn by a program", "model": "rusty", "n": 2, "seed": 41, "steps": 2}
        httpx.post(f"{site.url}/v1/images/generations", json=body, timeout=60, trust_env=False).raise_for_status()
        with open_page(browser, site.url) as page:
            page.goto("/")
            tiles = page.locator(".batch .tile img[alt*='seed']")
            expect(tiles).to_have_count(2)
            page.get_by_role("button", name="Use again").click()
            expect(page.get_by_label("Seed", exact=True)).to_have_value("41")
            page.get_by_role("button", name="Draw", exact=True).click()
            expect(tiles).to_have_count(3)
            page.get_by_role("button", name="Delete these pictures").first.click()
            expect(tiles).to_have_count(2)
            assert sorted(seeds()) == [41, 42]
            page.get_by_role("button", name="Clear the history").click()
            page.get_by_role("button", name="Delete them").click()
            expect(page.get_by_text("Draw your first picture")).to_be_visible()
        assert seeds() == []
    finally:
        site.close()


def decoded(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as opened:
        return numpy.asarray(opened.convert("RGB")).astype(int)


READ_HISTORY = """async (seed) => {
  const open = (request) => new Promise((done) => (request.onsuccess = () => done(request.result)));
  const database = await open(indexedDB.open("dreamfleet", 1));
  const all = await open(database.transaction("pictures").objectStore("pictures").getAll());
  const found = all.filter((one) => one.seed === seed);
  return Promise.all(found.map(async (one) => [...new Uint8Array(await one.picture.arrayBuffer())]));
}"""


def test_a_refusal_is_the_servers_sentence_beside_the_form(page: Page) -> None:
    page.goto("/#/create")
    page.get_by_label("Prompt").fill("a dog " * 40)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("'prompt' has 239 characters; at most 200 are allowed.")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_drawing_from_a_picture_with_settings(page: Page, tmp_path: Path) -> None:
    page.goto("/#/create")
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Pictures").fill("1")
    page.get_by_text("Size, sampler, start picture").click()
    page.get_by_label("Sampler").select_option("euler_a")
    page.get_by_label("Steps").fill("4")
    page.get_by_label("Picture to start from").set_input_files(sorted(tiny_images(tmp_path, count=1).iterdir())[0])
    expect(page.get_by_alt_text("The picture to start from")).to_be_visible()
    with page.expect_request("**/v1/images/generations") as sent:
        page.keyboard.press("Control+Enter")
    body = json.loads(sent.value.post_data or "")
    assert (body["scheduler"], body["steps"], body["n"], body["strength"]) == ("euler_a", 4, 1, 0.7) and body["image"]
    expect(page.locator(".batch .tile img[alt*='seed']")).to_have_count(1)


def test_a_sheet_of_adapters_and_one_of_strengths(page: Page) -> None:
    page.goto("/#/compare?adapters=default/rusty,default/tabby")
    page.get_by_label("Prompts, one a line").fill("a dog\na cat")
    page.get_by_label("Seeds").fill("1, 3-4")
    page.get_by_role("button", name="Draw the sheet").click()
    expect(page.get_by_text("18 of 18 drawn")).to_be_visible()
    pictures = page.evaluate("[...document.querySelectorAll('.sheet tbody tr:first-child img')].length")
    assert pictures == 3  # the base and two adapters
    page.get_by_role("button", name="Strength").click()
    page.get_by_label("Columns").fill("3")
    page.get_by_label("Seeds").fill("1")
    page.get_by_role("button", name="Draw the sheet").click()
    expect(page.get_by_text("6 of 6 drawn")).to_be_visible()
    assert page.locator(".sheet thead th b").all_inner_texts() == ["0.00", "0.75", "1.50"]


def test_an_adapter_is_shown_served_shared_downloaded_and_deleted(page: Page, site: Site) -> None:
    registry = site.world.registry
    site.world.upload("default", "gone", 5)
    before = site.world.upload("default", "gone", 6)
    page.goto("/#/adapters")
    expect(page.locator(".gallery li")).to_have_count(3)
    expect(page.get_by_text(BAD)).to_be_visible()  # as text
    page.get_by_role("link", name="gone", exact=False).first.click()
    page.get_by_role("button", name="Make current").click()
    expect(page.get_by_text("is served now")).to_be_visible()
    assert registry.resolve("default/gone").version != before
    page.get_by_label("Public").check()
    expect(page.get_by_text("Every tenant may generate with it now.")).to_be_visible()
    assert registry.resolve("default/gone").public
    with page.expect_download() as taken:
        page.get_by_role("button", name="Download for Kohya").click()
    assert taken.value.suggested_filename == "gone.safetensors"
    page.get_by_role("button", name="Delete this adapter").click()
    page.get_by_role("button", name="Delete it").click()
    expect(page.locator(".gallery li")).to_have_count(2)


def test_a_key_is_asked_for_and_opens_its_tenants_things(
    browser: Browser, tiny: Base, tiny_folder: Path, tmp_path: Path
) -> None:
    site = Site(World(tiny, tiny_folder, tmp_path, keys=True))
    site.world.upload("ann", "rusty", 1)
    try:
        with open_page(browser, site.url) as page:
            page.goto("/#/adapters")
            page.get_by_label("API key").fill("dfk_wrong")
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("The API key is not valid.")
            page.get_by_label("API key").fill(site.world.tokens["ann"])
            page.keyboard.press("Enter")
            expect(page.locator(".gallery li")).to_have_count(1)
            page.goto("/#/create")
            page.get_by_role("button", name="Add adapter").click()
            expect(page.locator(".picker-row")).to_have_count(1)
            page.keyboard.press("Escape")
            assert page.evaluate("localStorage.length === 0 || !JSON.stringify(localStorage).includes('dfk_')")
    finally:
        site.close()


def test_the_keyboard_reaches_everything_and_focus_follows(page: Page) -> None:
    page.goto("/#/adapters")
    expect(page.get_by_role("heading", name="Adapters")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    for _ in range(12):  # back to the first thing of the page, which leads past the header
        if page.evaluate("document.activeElement.className") == "skip":
            break
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.goto("/#/compare")
    page.get_by_role("button", name="Add adapter").click()
    expect(page.get_by_label("Search adapters")).to_be_focused()
    page.keyboard.type("tab")
    page.keyboard.press("Enter")
    expect(page.locator(".mix-row")).to_contain_text("tabby")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, a, input, select, textarea')].filter((one) => one.offsetParent"
        " && !(one.textContent.trim() || one.ariaLabel || one.labels?.length)).map((one) => one.outerHTML)"
    )
    assert unnamed == []


def test_a_phone_has_no_sideways_scroll_and_the_theme_is_kept(browser: Browser, site: Site) -> None:
    with open_page(browser, site.url, PHONE, "dark") as page:
        for path in ("create", "compare", "adapters", "adapters/default/rusty"):
            page.goto(f"/#/{path}")
            page.locator("main h1").wait_for(state="attached")
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], path
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Use the light theme").click()
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        assert page.get_by_role("navigation", name="Pages").get_by_role("link").count() >= 3
