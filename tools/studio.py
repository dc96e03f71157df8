"""Photographs the studio for the docs: `python -m tools.studio --url http://127.0.0.1:8000 --out docs/studio`.

The server should be training the demo's subjects, or have done so: `dreamfleet up`, and one click in the studio. Each
page is taken at 1280 and 390 px, light and dark.
"""

import io
from collections.abc import Callable
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page

from tests.browser import DESKTOP, PHONE, chromium, open_page

QUALITY = 82
PHOTOS = Path(__file__).parents[1] / "manifests" / "demo" / "images"


def draw(page: Page) -> None:
    """Create, with two batches in its history."""
    for id, places in (("tabby", "in the desert"), ("rusty", "on the beach")):
        page.goto(f"/#/create?adapter=default/{id}")
        page.locator(".mix-row").wait_for()
        prompt = page.get_by_label("Prompt")
        prompt.fill(prompt.input_value().replace("on the beach", places))
        page.get_by_label("Seed", exact=True).fill("7")
        done = page.get_by_role("button", name="Use again").count()
        page.get_by_role("button", name="Draw", exact=True).click()
        page.get_by_role("button", name="Use again").nth(done).wait_for()
    page.evaluate("scrollTo(0, 0)")


def compare(page: Page) -> None:
    """A sheet of three adapters."""
    page.goto("/#/compare?adapters=default/rusty,default/dash,default/clover")
    page.get_by_label("Prompts, one a line").fill("a photo of a sks dog in the snow\na photo of a sks car at night")
    page.get_by_role("button", name="Draw the sheet").click()
    page.get_by_role("button", name="Download the sheet").wait_for()
    if page.viewport_size and page.viewport_size["width"] == PHONE[0]:
        page.locator(".sheet").scroll_into_view_if_needed()
        page.evaluate("document.querySelector('.sheet').scrollIntoView()")
        page.evaluate("scrollBy(0, -70)")


def visit(path: str, ready: str) -> Callable[[Page], None]:
    """A page that needs nothing done."""

    def go(page: Page) -> None:
        page.goto(f"/#/{path}")
        page.locator(ready).first.wait_for()

    return go


def bring(page: Page) -> None:
    """Subjects, with the photos of one that is not trained yet, of which some could be better."""
    found = sorted((PHOTOS / "pogo").glob("*.png"))[:5]
    with Image.open(found[0]) as first, Image.open(found[1]) as second:
        wide = first.convert("RGB").resize((160, 64)).crop((20, 0, 140, 64))
        tiny = second.convert("RGB").resize((24, 24))
        photos = [picture(file.name, Image.open(file)) for file in found]
        photos += [picture("wide.png", wide), picture("far.png", tiny)]
    photos.append({"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"not a photo"})
    page.goto("/#/subjects")
    page.get_by_label("Photos of a subject").set_input_files(photos)
    page.get_by_label("Id", exact=True).fill("pogo")
    page.get_by_label("Class", exact=True).fill("frog")
    page.get_by_label("Trigger word").focus()
    page.get_by_text("good photos").wait_for()


def picture(name: str, image: Image.Image) -> FilePayload:
    """A PNG file to upload."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": data.getvalue()}


def follow(page: Page) -> None:
    """The latest subject in training."""
    page.goto("/#/training")
    page.locator(".entry-name", has_text="rusty").first.click()
    page.locator(".sample-row img").first.wait_for()


PAGES: dict[str, Callable[[Page], None]] = {
    "create": draw,
    "compare": compare,
    "adapters": visit("adapters", ".gallery .shown"),
    "adapter": visit("adapters/default/rusty", ".samples img"),
    "subjects": bring,
    "training": visit("training", ".entry .shown"),
    "subject": follow,
    "usage": visit("usage", ".totals"),
}


def photograph(browser: Browser, url: str, out: Path, only: tuple[str, ...]) -> None:
    """Writes `<page>-<width>-<theme>.webp` of each page."""
    for size in (DESKTOP, PHONE):
        for theme in ("light", "dark"):
            for name, prepare in PAGES.items():
                if only and name not in only:
                    continue
                with open_page(browser, url, size, theme) as page:
                    prepare(page)
                    page.wait_for_timeout(800)  # pictures that are still being loaded
                    with Image.open(io.BytesIO(page.screenshot())) as taken:
                        taken.convert("RGB").save(out / f"{name}-{size[0]}-{theme}.webp", quality=QUALITY, method=6)


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/studio"), show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(PAGES)), help="Only this page; repeatable.")
def main(url: str, out: Path, only: tuple[str, ...]) -> None:
    """Photographs the studio of a running server."""
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        photograph(browser, url, out, only)


if __name__ == "__main__":
    main()
