"""The page of a run: self-contained, what needs a look first, and the advice behind it."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.training.subjects import spec
from training.evaluation.advice import advice
from training.evaluation.choose import Candidate, choose
from training.evaluation.curve import curve
from training.evaluation.evaluate import Evaluation
from training.evaluation.record import Record, load_record, save_record
from training.evaluation.report import needs_a_look, render_report, write_report
from training.manifest.manifest import Manifest
from training.photos.photos import Photo, Photos
from training.photos.warning import PhotoWarning
from training.run.run import RunRecord, RunStore, SubjectRecord
from training.storage.card import Score
from training.storage.storage import open_storage

STEPS = (100, 200, 300)
BACKGROUND = PhotoWarning("background", ("0.png",), "All photos look alike behind.", "Add photos in other places.")


def candidates(likeness: tuple[float, ...], fidelity: tuple[float, ...]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(step, i, t, drift=0.1, drift_limit=0.5, copying=0.3, copying_limit=0.7)
        for step, i, t in zip(STEPS, likeness, fidelity, strict=True)
    )


def evaluation(id: str, *found: Candidate) -> Evaluation:
    red = Image.new("RGB", (32, 32), "red")
    scores = [Score(name="likeness", value=c.likeness, model="palette", step=c.step) for c in found]
    landmark = Score(name="likeness_of_photos", value=0.9, model="palette")
    pictures = {c.step: (red, red) for c in found}
    prompts = ("a photo of sks dog", "a photo of sks dog <b>at night</b>")
    return Evaluation(id, (*scores, landmark), choose(found), found, prompts, pictures, (red, red))


def photo(name: str) -> Photo:
    return Photo(name, Image.new("RGB", (40, 30), "blue"), "ab" * 32, (40, 30))


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """Four subjects: one good, one poor, one failed, one that was not judged."""
    made = tuple(spec(id) for id in ("good", "poor", "failed", "plain"))
    store = RunStore(open_storage(str(tmp_path)), "test-1")
    record = RunRecord(
        run="test-1", name="test", tenant="t", base="pocket", base_hash="0", digest="0",
        manifest=Manifest(name="test", base="pocket", subjects=made),
    )  # fmt: skip
    store.create(record, "")
    held = Photos((photo("0.png"), photo("1.png")), (), ())
    save_record(store, evaluation("good", *candidates((0.3, 0.8, 0.9), (0.9, 0.9, 0.5))), held, [photo("2.png")])
    warned = replace(held, warnings=(BACKGROUND,))
    save_record(store, evaluation("poor", *candidates((0.0, 0.1, 0.2), (0.9, 0.9, 0.9))), warned, [])
    for id in ("good", "poor", "plain"):
        store.save_subject(SubjectRecord(id=id, state="published", step=300, version="cd" * 32))
    store.save_subject(SubjectRecord(id="failed", state="failed", reason="Too few photos: <2> usable."))
    return store


def record_of(run: RunStore, id: str) -> Record:
    found = load_record(run, id)
    assert found is not None
    return found


class _Checker(HTMLParser):
    """Collects what the page refers to, and that its tags are balanced."""

    VOID = {"meta", "img", "line", "circle", "rect", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.refers += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else(run: RunStore) -> None:
    page = render_report(run)
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(refers.startswith(("data:image/webp;base64,", "#")) for refers in checker.refers)
    assert "http" not in page and "url(" not in page
    assert 'name="viewport"' in page


def test_what_needs_a_look_comes_first(run: RunStore) -> None:
    order = re.findall(r'<section id="(\w+)">', render_report(run))
    assert order == ["failed", "poor", "good", "plain"] or order == ["failed", "poor", "plain", "good"]


def test_the_page_tells_the_choice_and_escapes_what_it_is_given(run: RunStore) -> None:
    page = render_report(run)
    assert "Step <strong>200</strong>: best balance" in page
    assert "step 200 ✓" in page
    assert "&lt;2&gt; usable" in page and "<b>at night" not in page
    assert "Kept out of training to judge by: 2.png" in page
    assert "likeness of photos 0.900 (palette)" in page


def test_it_is_written_beside_the_run(run: RunStore) -> None:
    assert write_report(run) == "runs/test-1/report.html"
    assert run.storage.exists("runs/test-1/report.html")


def test_a_run_without_a_judged_subject_has_a_page(run: RunStore) -> None:
    run.storage.delete_tree("runs/test-1/subjects/good/evaluation")
    run.storage.delete_tree("runs/test-1/subjects/poor/evaluation")
    assert "Not judged" in render_report(run)


def test_urgency(run: RunStore) -> None:
    published = SubjectRecord(id="x", state="published")
    assert needs_a_look(published, None) == (0, ())
    assert needs_a_look(published, record_of(run, "good"))[1] == ()
    assert needs_a_look(published, record_of(run, "poor"))[1] == ("not yet like the subject", "1 photo warning")
    assert needs_a_look(SubjectRecord(id="x", state="failed"), None)[1] == ("failed",)


def test_the_curve_marks_the_chosen_step(run: RunStore) -> None:
    drawn = str(curve(record_of(run, "good")))
    assert "step 200 was chosen" in drawn
    assert drawn.count("<polyline") == 3 and drawn.count("<circle") == 9


# -- advice --

SPAN = {"likeness_of_the_base": 0.4, "likeness_of_photos": 0.7}


def advised(likeness: tuple[float, ...], fidelity: tuple[float, ...], scores: dict[str, float]) -> str:
    found = candidates(likeness, fidelity)
    return "\n".join(advice(found, choose(found), SPAN | scores))


@pytest.mark.parametrize(
    ("likeness", "fidelity", "scores", "expected"),
    [
        ((0.5, 0.8, 0.9), (0.9, 0.9, 0.4), {}, "Likely overfitting after step 200"),
        ((0.1, 0.4, 0.8), (0.9, 0.9, 0.9), {}, "Still getting better at step 300: try `max_steps: 450`"),
        ((0.0, 0.1, 0.1), (0.9, 0.9, 0.9), {}, "Not yet like the subject"),
        ((0.8, 0.8, 0.8), (0.4, 0.4, 0.4), {}, "It follows prompts poorly"),
        ((0.8,) * 3, (0.9,) * 3, {"likeness": 0.5, "likeness_training": 0.7}, "add photos from other sides"),
        ((0.8,) * 3, (0.9,) * 3, {"likeness_of_photos": 0.95}, "add side views"),
    ],
)
def test_advice(
    likeness: tuple[float, ...], fidelity: tuple[float, ...], scores: dict[str, float], expected: str
) -> None:
    assert expected in advised(likeness, fidelity, scores)


def test_a_good_subject_needs_no_advice() -> None:
    assert advised((0.6, 0.8, 0.8), (0.9, 0.9, 0.9), {}) == ""


def test_photo_warnings_are_advice_too() -> None:
    found = candidates((0.8,) * 3, (0.9,) * 3)
    assert advice(found, choose(found), {}, [BACKGROUND]) == (
        "All photos look alike behind. Add photos in other places.",
    )
