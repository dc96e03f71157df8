"""After a subject's last step: its checkpoints are judged, a step is chosen, and its adapter is published.

Subjects that finish at the same step are judged together. How each ends is a result: a version, or a failure.
"""

from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from training.base.base import Base
from training.evaluation.evaluate import Evaluation, evaluate_subjects
from training.evaluation.exam import Exam, candidate_steps
from training.evaluation.judges.box import JudgeBox, Judges
from training.evaluation.record import save_record
from training.manifest.gate import failures, gate_reason
from training.manifest.subject import SubjectSpec
from training.photos.variants import variants
from training.run.fault import Failure, apart, failure_of, together
from training.run.source import Doing, Phase, Say
from training.trainer.checkpoint import read_states
from training.trainer.pack import Pack
from training.trainer.worker.publish import Finished, Publication, publish_subject

Pictures = dict[str, list[Image.Image]]  # by the subject's key


class Finishing:
    """Finishes the subjects of one pack, each for its run and tenant. All ids here are keys.

    `pictures(ids)` draws subjects as they are in their slots; `say(ids, doing)` is told what is being done.
    """

    def __init__(
        self,
        base: Base,
        pack: Pack,
        pictures: Callable[[Sequence[str]], Pictures],
        say: Say,
    ) -> None:
        self._base = base
        self._pack = pack
        self._pictures = pictures
        self._say = say
        self._box = JudgeBox(base)

    def check(self, spec: SubjectSpec) -> None:
        """Raises UserError if the models that are to judge the subject are not there: before it trains, not after."""
        if spec.evaluate.enabled:
            self._judges(spec)

    def finish(self, finished: Sequence[Finished]) -> dict[str, str | Failure]:
        """The published version of each subject, or why there is none. They stay in their slots."""
        ends: dict[str, str | Failure] = {}

        def failed(what: str) -> Callable[[str, Exception], None]:
            return lambda id, error: ends.update({id: failure_of(error, what)})

        subjects = {one.key: one for one in finished}
        evaluations = together(
            list(subjects), lambda ids: self._judge([subjects[id] for id in ids]), failed("it could not be judged")
        )
        refused = apart(
            list(evaluations), lambda id: self._wear(subjects[id], evaluations[id]), failed("it could not be published")
        )
        ends |= {id: failure for id, failure in refused.items() if failure is not None}
        chosen = [id for id, failure in refused.items() if failure is None]
        pictures = self._pictures(chosen)
        # where it fails the last checkpoint is whole: another attempt begins there
        versions = apart(
            chosen,
            lambda id: self._publish(subjects[id], evaluations[id], pictures.get(id, [])),
            failed("it could not be published"),
        )
        return ends | versions

    # -- pieces --

    def _judge(self, finished: Sequence[Finished]) -> Mapping[str, Evaluation | None]:
        """Judges those that asked for it, together, and writes their records; None for the others."""
        asked = [one for one in finished if one.spec.evaluate.enabled]

        def alive(_drawn: int, _wanted: int) -> None:
            self._say([one.key for one in finished], Doing(Phase.EVALUATING))

        exams = [self._exam(one) for one in asked]
        found = evaluate_subjects(self._base, exams, self._judges, alive=alive) if exams else []
        for one, evaluation in zip(asked, found, strict=True):
            save_record(one.home.run, evaluation, one.photos, one.held_out)
        judged = {one.key: evaluation for one, evaluation in zip(asked, found, strict=True)}
        return {one.key: judged.get(one.key) for one in finished}

    def _judges(self, spec: SubjectSpec) -> Judges:
        return self._box.judges(spec.evaluate.likeness_model, spec.evaluate.fidelity_model)

    def _exam(self, finished: Finished) -> Exam:
        spec, last = finished.spec, finished.state
        wanted = set(candidate_steps(spec.train.max_steps, spec.evaluate.candidates))
        earlier = [(step, state) for step, state in read_states(finished.home.run, spec.id) if step in wanted]
        checkpoints = {step: state.learned for step, state in earlier if step < last.step} | {last.step: last.learned}
        side = spec.train.resolution or self._base.facts.resolution
        return Exam(
            spec=spec,
            photos=[middle(photo.image, side) for photo in finished.photos.good],
            held_out=[middle(photo.image, side) for photo in finished.held_out],
            checkpoints=dict(sorted(checkpoints.items())),
        )

    def _wear(self, finished: Finished, evaluation: Evaluation | None) -> Failure | None:
        """Puts the chosen step into the subject's slot, so that what is drawn is what is published.

        Returns why it may not be published, if so.
        """
        spec = finished.spec
        below = gate_failure(spec, evaluation)
        if below is not None:
            return Failure("bad subject", below)
        chosen = finished.state
        if evaluation is not None and evaluation.choice.step != chosen.step:
            chosen = next(s for step, s in read_states(finished.home.run, spec.id) if step == evaluation.choice.step)
        if chosen is not finished.state or chosen.averaged is not None:
            self._pack.wear(finished.key, chosen.learned)
        return None

    def _publish(self, finished: Finished, evaluation: Evaluation | None, pictures: Sequence[Image.Image]) -> str:
        self._say([finished.key], Doing(Phase.PUBLISHING))
        publication = Publication(finished, self._pack.adapter(finished.key), evaluation, pictures)
        return publish_subject(finished.home.run, finished.home.tenant, self._base, publication)


def gate_failure(spec: SubjectSpec, evaluation: Evaluation | None) -> str | None:
    """Why a subject may not be published, or None."""
    scores = evaluation.of_step(evaluation.choice.step) if evaluation is not None else ()
    found = failures(spec.publish_if, scores)
    return gate_reason(found) if found else None


def middle(image: Image.Image, side: int) -> Image.Image:
    """The middle of a photo at the size that is drawn, so that both have the same detail."""
    return Image.fromarray(variants(image, side)[0])
