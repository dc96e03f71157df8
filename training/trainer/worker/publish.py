"""From a trained subject to a published version: weights, card, samples, loss curve, events."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from PIL import Image

from training.adapters.adapter import Adapter, LowRank, load_adapter, save_adapter, version_of
from training.base.base import Base
from training.base.files.folder import public_name
from training.errors import UserError
from training.evaluation.evaluate import Evaluation
from training.manifest.subject import SubjectSpec
from training.photos.photos import Photo, Photos
from training.run.home import Home
from training.run.personal import forget_photos
from training.run.run import RunStore
from training.storage.card import Card, Chosen
from training.storage.consents import consent_id
from training.storage.picture_hash import picture_hash
from training.storage.registry import Registry
from training.trainer.checkpoint import HISTORY, SubjectState, read_states
from training.trainer.worker.events import NAME as EVENTS, event_file
from training.trainer.worker.loss_plot import plot_losses

# no settings of the training, or paths of one machine
_NOT_SETTINGS = {"id", "images", "public", "min_images", "consent", "keep_photos"}


@dataclass(frozen=True)
class Finished:
    """A subject after its last step, under its `key`. `state` is as trained; its last step is the state's.

    `photos` are those it was trained on, `held_out` those kept out of training. `rates` are images/s by step, `samples`
    the pictures that were drawn while it trained, by step.
    """

    key: str
    spec: SubjectSpec
    home: Home
    fingerprint: str
    state: SubjectState
    photos: Photos
    held_out: tuple[Photo, ...] = ()
    rates: Mapping[int, float] = field(default_factory=dict)
    samples: Mapping[int, Sequence[Image.Image]] = field(default_factory=dict)


@dataclass(frozen=True)
class Publication:
    """What is published of a finished subject: the chosen step's adapter, its scale folded in, and its pictures."""

    finished: Finished
    adapter: Adapter
    evaluation: Evaluation | None = None
    pictures: Sequence[Image.Image] = ()

    @property
    def chosen(self) -> Chosen:
        """The step that was chosen, and why."""
        if self.evaluation is None:
            return Chosen(step=self.finished.state.step, reason="the last step")
        return Chosen(step=self.evaluation.choice.step, reason=self.evaluation.choice.reason)


def publish_subject(run: RunStore, tenant: str, base: Base, publication: Publication) -> str:
    """Publishes a subject in the registry of the run's storage. Returns its version."""
    finished = publication.finished
    spec, history = finished.spec, finished.state.history
    widths = base.facts.word_widths
    named = Adapter(
        modules=publication.adapter.modules,
        embeddings=publication.adapter.embeddings,
        metadata={
            "base": public_name(base.name),
            "base_hash": base.hash,
            "class": spec.class_ or "",
            "trigger": spec.trigger,
            "word_widths": ",".join(map(str, widths)) if publication.adapter.embeddings and len(widths) > 1 else "",
        },
    )
    weights = save_adapter(named)
    extras = {f"samples/{index}.png": png_bytes(image) for index, image in enumerate(publication.pictures)}
    extras["loss.png"] = plot_losses(history, spec.id)
    extras[f"events/{EVENTS}"] = event_file(history, finished.rates, finished.samples)
    card = make_card(run.run, base, publication, weights)
    version = Registry(run.storage).publish(tenant, spec.id, weights, card, extras).version
    if not spec.keep_photos:
        forget_photos(run, spec.id)
    return version


def publish_checkpoint(home: Home, spec: SubjectSpec, version: str, step: int, *, aside: bool = False) -> str:
    """Makes an earlier step of a published subject current; returns its version.

    `version` is the subject's published one. With `aside` the step only becomes a version, beside the one that is
    current. Raises UserError if the step's checkpoint is not kept.
    """
    registry, name = Registry(home.run.storage), f"{home.tenant}/{spec.id}"
    published = registry.resolve(name, version)
    state = next((state for found, state in read_states(home.run, spec.id) if found == step), None)
    if state is None:
        there = ", ".join(map(str, home.run.checkpoints(spec.id))) or "none"
        raise UserError(
            f"The weights of step {step} of '{spec.id}' are not kept: checkpoints but the last "
            f"{spec.train.keep_checkpoints} (`train.keep_checkpoints`) and those that are judged are removed. "
            f"Kept are: {there}."
        )
    scaled = {key: LowRank(one.down, one.up * spec.lora.scale) for key, one in state.learned.modules.items()}
    about = load_adapter(registry.weights(published)).metadata
    weights = save_adapter(Adapter(modules=scaled, embeddings=state.learned.embeddings, metadata=about))
    if version_of(weights) in registry.versions(home.tenant, spec.id):
        if not aside:
            registry.set_current(home.tenant, spec.id, version_of(weights))
        return version_of(weights)
    news = {
        "sha256": version_of(weights),
        "size": len(weights),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": hashlib.sha256(f"{published.card.fingerprint} step {step}".encode()).hexdigest(),
        "steps": step,
        "chosen": Chosen(step=step, reason="made a version by hand"),
    }
    card = published.card.model_copy(update=news)
    return registry.publish(home.tenant, spec.id, weights, card, aside=aside).version


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def make_card(run: str, base: Base, publication: Publication, weights: bytes) -> Card:
    """The card of an adapter file. Its loss is the mean over the last tenth of the steps."""
    finished = publication.finished
    spec, state = finished.spec, finished.state
    loss = state.history[-max(1, state.step // 10) :, HISTORY.index("loss")].mean().item() if state.step else None
    return Card.model_validate(
        {
            "sha256": version_of(weights),
            "size": len(weights),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": finished.fingerprint,
            "base": public_name(base.name),
            "base_hash": base.hash,
            "family": base.facts.title,
            "rank": spec.lora.rank,
            "alpha": spec.lora.alpha or spec.lora.rank,
            "targets": spec.lora.targets,
            "text_encoder_targets": spec.lora.text_encoder_targets if spec.lora.text_encoder else (),
            "instance_prompt": spec.filled_instance_prompt,
            "class_prompt": spec.filled_class_prompt,
            "class": spec.class_,
            "trigger": spec.trigger,
            "image_hashes": tuple(photo.sha256 for photo in finished.photos.good),
            "image_looks": tuple(picture_hash(photo.image) for photo in finished.photos.good),
            "consent": spec.consent,
            "consent_id": consent_id(spec.id, spec.consent) if spec.consent is not None else None,
            "run": run,
            "settings": spec.model_dump(mode="json", by_alias=True, exclude=_NOT_SETTINGS),
            "steps": publication.chosen.step,
            "loss": loss,
            "chosen": publication.chosen,
            "scores": publication.evaluation.scores if publication.evaluation is not None else (),
            "public": spec.public,
        }
    )
