"""From scores and warnings to what a person should do, in plain words. Pure; knows no model and no picture."""

from collections.abc import Mapping, Sequence

from training.evaluation.choose import TIE, Candidate, Choice, overfits_after
from training.manifest.axes import AXES
from training.photos.warning import PhotoWarning

# of the way from the plain class to a real photo, and from any prompt to the base's own picture
LOW_LIKENESS, LOW_FIDELITY = 0.3, 0.6
NOTABLE_DRIFT = 0.25
# of what lies between the plain class and the same picture twice: photos nearer than this show one view
ALIKE_PHOTOS = 0.25
# of the span from the plain class to the photos
LEARNED_BY_HEART = 0.4
MIN_SPAN = 0.05


def advice(
    candidates: Sequence[Candidate],
    choice: Choice,
    scores: Mapping[str, float],
    warnings: Sequence[PhotoWarning] = (),
) -> tuple[str, ...]:
    """What to do, the most useful first. `scores`: those of the chosen step, and the landmarks."""
    return (*_about_steps(candidates, choice), *_about_scores(candidates, choice, scores), *_about_photos(warnings))


def _about_steps(candidates: Sequence[Candidate], choice: Choice) -> list[str]:
    ordered = sorted(candidates, key=lambda candidate: candidate.step)
    found = []
    after = overfits_after(ordered)
    if after is not None:
        found.append(f"Likely overfitting after step {after}: `max_steps: {after}` would do, and take less time.")
    last, before = ordered[-1], ordered[-2:-1]
    if choice.step == last.step and before and after is None and last.balance > before[0].balance + 2 * TIE:
        found.append(f"Still getting better at step {last.step}: try `max_steps: {round(1.5 * last.step)}`.")
    return found


def _about_scores(candidates: Sequence[Candidate], choice: Choice, scores: Mapping[str, float]) -> list[str]:
    chosen = next(candidate for candidate in candidates if candidate.step == choice.step)
    found = []
    if chosen.likeness < LOW_LIKENESS:
        found.append(f"Not yet like the subject ({chosen.likeness:.2f} of the way): {AXES['likeness'].advice}.")
    if chosen.fidelity < LOW_FIDELITY:
        found.append(f"It follows prompts poorly ({chosen.fidelity:.2f} of the way): {AXES['fidelity'].advice}.")
    if chosen.drift > NOTABLE_DRIFT:
        found.append(f"The plain class leans towards the subject ({chosen.drift:.2f}): {AXES['class_drift'].advice}.")
    if chosen.copying_limit is not None and chosen.copying > chosen.copying_limit:
        found.append(f"It repeats training photos: {AXES['copying'].advice}.")
    floor, ceiling = scores.get("likeness_of_the_base", 0.0), scores.get("likeness_of_photos", 0.0)
    gap = scores.get("likeness_training", 0.0) - scores.get("likeness", 0.0)
    if gap > LEARNED_BY_HEART * max(ceiling - floor, MIN_SPAN):
        found.append("It knows its training photos better than a new one: add photos from other sides and places.")
    if 1 - ceiling < ALIKE_PHOTOS * (1 - floor):
        found.append("The photos are much alike: add side views, other distances and other places.")
    return found


def _about_photos(warnings: Sequence[PhotoWarning]) -> list[str]:
    return list(dict.fromkeys(f"{warning.message} {warning.advice}" for warning in warnings))
