"""What a manifest leaves to the base: filled in once the base is known, so that a run's record says it all.

Also what a subject asks for that has no meaning on the base.
"""

from collections.abc import Iterator

from training.base.facts import Facts
from training.base.quantization import Offload, Quantization
from training.manifest.manifest import Manifest
from training.manifest.subject import USUAL_TIMESTEPS, SubjectSpec


def filled(manifest: Manifest, facts: Facts) -> Manifest:
    """The manifest with the targets of the base's family where it names none, and without text encoders to train where
    the family has none."""
    return manifest.model_copy(update={"subjects": tuple(fill_subject(one, facts) for one in manifest.subjects)})


def fill_subject(subject: SubjectSpec, facts: Facts) -> SubjectSpec:
    """One subject of `filled`."""
    asked = subject.lora
    news = {
        "targets": asked.targets or facts.targets,
        "text_encoder_targets": asked.text_encoder_targets or facts.text_targets,
        "text_encoder": asked.text_encoder and bool(facts.text_encoders),
    }
    return subject.model_copy(update={"lora": asked.model_copy(update=news)})


def meaningless(
    subject: SubjectSpec, facts: Facts, quantization: Quantization = "none", offload: Offload = "none"
) -> Iterator[str]:
    """What the subject asks for that the base cannot give, in words."""
    if offload != "none" and subject.train.strategy == "zero":
        yield f"subject '{subject.id}': `train.strategy: zero` knows no `base_offload`. Leave out one of the two."
    if quantization != "none" and subject.train.strategy != "plain" and subject.train.zero.stage == 3:
        yield (
            f"subject '{subject.id}': `train.zero.stage` 3 spreads the denoiser's own weights, which cannot be "
            f"quantised then: `base_quantization` is {quantization}. Take stage 2, or none."
        )
    train, who = subject.train, f"subject '{subject.id}'"
    if train.min_snr_gamma is not None and not facts.min_snr:
        yield (
            f"{who}: `train.min_snr_gamma` is {train.min_snr_gamma:g}, which weighs the steps of a DDPM; this base is "
            "trained by flow matching. Leave it out, or use `train.timesteps`."
        )
    if train.timesteps != USUAL_TIMESTEPS and facts.min_snr:
        yield (
            f"{who}: `train.timesteps` is for bases that are trained by flow matching; this one draws its steps "
            "uniformly. Leave it out."
        )
    if subject.negative_prompt and not facts.negative:
        yield (
            f"{who}: `negative_prompt` is {subject.negative_prompt!r}, and this base draws without one. Leave it out."
        )
    if subject.words.tokens and not facts.word_widths:
        yield (
            f"{who}: `words.tokens` names {', '.join(subject.words.tokens)}; the text encoder of this base takes no "
            "new words. Leave them out."
        )
