"""What a user can say about one subject: its photos, prompts, adapter, prior, training, samples and evaluation.

Closed and frozen pydantic models; know no file format, no machine and no torch. `manifest.py` reads them from YAML.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from training.manifest.gate import EvaluateSpec, GateSpec
from training.manifest.presets import Preset
from training.storage.closed import Closed
from training.storage.consent import Consent

ID_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
Id = Annotated[str, Field(pattern=rf"^{ID_PATTERN}$", description="[a-z0-9][a-z0-9._-]{0,62}")]
USUAL_SAMPLES = 4
LR_SCHEDULERS = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class LoraSpec(Closed):
    """Which low-rank deltas are trained."""

    rank: int = Field(8, ge=1, le=320)
    alpha: float | None = Field(None, gt=0, description="the scale is alpha / rank; the rank itself by default")
    targets: tuple[str, ...] = Field(
        (), description="ends of the names of the denoiser's layers; those that suit the base's family by default"
    )
    text_encoder: bool = Field(True, description="text encoders are trained, too, where the family has any that can be")
    text_encoder_targets: tuple[str, ...] = Field((), description="the same of the text encoders' layers")

    @property
    def scale(self) -> float:
        """What the product of the two low-rank matrices is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class WordSpec(Closed):
    """Textual-inversion words trained beside the low-rank deltas, one vector each."""

    tokens: tuple[Annotated[str, Field(pattern=r"^<[^\s<>/]{1,62}>$", description="<name>")], ...] = ()
    initial: str | None = Field(None, min_length=1, description="the word they start as; the class by default")
    learning_rate: float = Field(5e-4, gt=0, le=10)


class PriorSpec(Closed):
    """Prior preservation: what keeps the class from turning into the subject."""

    enabled: bool = True
    source: Literal["generate", "folder", "prediction"] = Field(
        "generate", description="class images made by the base; from `folder`; or the base's own prediction, no images"
    )
    target: Literal["image", "prediction"] = Field(
        "image",
        exclude_if=lambda value: value == "image",
        description="what class images teach: themselves, or to go on predicting of them what the base does",
    )
    folder: str | None = Field(None, description="class images, relative to the manifest (source: folder)")
    images: int = Field(200, ge=1, le=10_000)
    captions: bool = Field(
        False,
        description="of the class in the photos' captions, too, without the subject's own words (not of a folder)",
    )
    weight: float = Field(1.0, ge=0, le=100)
    steps: int = Field(25, ge=1, le=1000, description="denoising steps of a generated class image")
    guidance_scale: float = Field(4.0, ge=0, le=50)
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _folder_and_source(self) -> "PriorSpec":
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError("`folder` and `source: folder` go together")
        if self.captions and self.source == "folder":
            raise ValueError("`captions` is for class images that are made: a folder's are of the class prompt alone")
        return self


class ZeroSpec(Closed):
    """One subject over several devices, by DeepSpeed ZeRO."""

    stage: Literal[2, 3] = Field(
        2, description="2 shards gradients and moments of the adapter; 3 its weights and the denoiser's too"
    )
    offload: bool = Field(False, description="what is sharded waits in the CPU's memory")
    workers: int = Field(2, ge=2, le=64, description="devices that one subject is spread over")


class TimestepsSpec(Closed):
    """Which noise levels a flow-matching base is trained on. `mean` and `std` are of `logit_normal`."""

    density: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = Field(0.0, ge=-10, le=10)
    std: float = Field(1.0, gt=0, le=10)
    shift: Annotated[float, Field(gt=0, le=100)] | Literal["resolution"] = Field(
        1.0, description="above 1: more of noise; resolution: as much as the base samples with at the picture's size"
    )


USUAL_TIMESTEPS = TimestepsSpec.model_construct()


class TrainSpec(Closed):
    """The loop of one subject, with the usual names."""

    resolution: int | None = Field(None, ge=16, le=2048, description="pixels a side; the base's own by default")
    resolutions: tuple[Annotated[int, Field(ge=16, le=2048)], ...] = Field(
        (), max_length=4, exclude_if=lambda value: not value, description="further sizes that each photo is learned at"
    )
    crop: Literal["center", "random", "face", "bucket"] = Field(
        "center", description="bucket: no square, but the aspect bucket that crops least of each photo"
    )
    center_crop: bool | None = Field(None, description="the usual name: true is `crop: center`, false `crop: random`")
    crops: int = Field(4, ge=1, le=64, description="cached crops an image when `crop: random`")
    flip: bool = True
    color_jitter: bool = False
    backgrounds: int = Field(
        0,
        ge=0,
        le=16,
        description="further variants of each photo with transparency: its subject before another plain colour",
    )
    batch_size: int = Field(1, ge=1, le=64)
    gradient_accumulation_steps: int = Field(1, ge=1, le=1024)
    learning_rate: float = Field(1e-4, gt=0, le=10)
    text_encoder_learning_rate: float = Field(5e-6, ge=0, le=10)
    lr_scheduler: LR_SCHEDULERS = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    max_steps: int = Field(1000, ge=1, le=1_000_000, description="optimizer steps, exactly")
    checkpoint_every: int = Field(200, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    sample_every: int | None = Field(None, ge=1, description="steps between sample images; none by default")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0, le=1)
    adam_epsilon: float = Field(1e-8, gt=0, le=1)
    max_grad_norm: float | None = Field(1.0, gt=0, description="clipped per subject; null turns it off")
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    min_snr_gamma: float | None = Field(None, gt=0)
    noise_offset: float = Field(0.0, ge=0, le=1)
    background_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        exclude_if=lambda value: value is None,
        description="of what a photo's mask leaves out in the loss; a mask is its transparency or a file NAME.mask.png",
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, exclude_if=lambda value: value is None, description="the weights' moving average is published"
    )
    # left out of what identifies a training where it is the usual one, as DDPM bases have no other
    timesteps: TimestepsSpec = Field(USUAL_TIMESTEPS, exclude_if=lambda value: value == USUAL_TIMESTEPS)
    strategy: Literal["auto", "plain", "zero"] = Field(
        "auto", description="one device (plain) or several (zero); auto: several where one is measured to be too small"
    )
    zero: ZeroSpec = ZeroSpec.model_construct()
    seed: int = Field(0, ge=0, lt=2**63)

    @property
    def against_zero(self) -> str | None:
        """Why these settings cannot be spread over several devices, if so."""
        if self.batch_size < self.zero.workers:
            return (
                f"needs `batch_size` >= `zero.workers` ({self.zero.workers}): every worker takes its share of the rows"
            )
        if self.optimizer != "adamw":
            return "needs `optimizer: adamw`: the others cannot be sharded"
        if self.mixed_precision == "fp16":
            return "needs `mixed_precision: bf16` or `no`: fp16 scales its losses per device"
        if self.cropping == "bucket" or self.resolutions:
            return "needs another `crop` than bucket, and no `resolutions`: all workers take rows of one size"
        if self.ema_decay is not None:
            return "cannot keep a moving average: leave out `ema_decay`"
        return None

    @model_validator(mode="after")
    def _crop_named_twice(self) -> "TrainSpec":
        if self.center_crop is not None and self.crop != "center" and self.center_crop:
            raise ValueError(f"`center_crop: true` contradicts `crop: {self.crop}`")
        return self

    @model_validator(mode="after")
    def _buckets_have_whole_eighths(self) -> "TrainSpec":
        if self.cropping == "bucket" and self.resolution is not None and self.resolution % 64:
            raise ValueError(
                f"`crop: bucket` has sides in eighths: `resolution` is a multiple of 64, not {self.resolution}"
            )
        return self

    @property
    def cropping(self) -> Literal["center", "random", "face", "bucket"]:
        """The crop meant, whichever of its two names was used."""
        return "random" if self.center_crop is False and self.crop == "center" else self.crop


class SampleSpec(Closed):
    """The pictures that are drawn of a subject to be looked at: beside the published adapter, and while it trains."""

    images: int | None = Field(
        None, ge=0, le=64, description="how many, the sample prompts in turn; 4 by default, or one a prompt; 0: none"
    )
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps a picture; the base's own by default")
    guidance_scale: float | None = Field(None, ge=0, le=50, description="the base's own by default")


class SubjectSettings(Closed):
    """Everything `defaults` may set and a subject may override."""

    preset: Preset | None = Field(
        None, exclude_if=lambda value: value is None, description="chooses what is not said; see `presets.py`"
    )
    class_: str | None = Field(
        None, alias="class", min_length=1, max_length=80, description="the class noun: dog, person"
    )
    instance_prompt: str = Field("a photo of sks {class}", min_length=1, max_length=1000)
    class_prompt: str = Field("a photo of {class}", min_length=1, max_length=1000)
    sample_prompts: tuple[str, ...] = Field((), max_length=16, description="what sample images show")
    samples: SampleSpec = SampleSpec.model_construct()
    negative_prompt: str = Field("", max_length=1000)
    min_images: int = Field(5, ge=1, le=1000)
    public: bool = Field(False, description="other tenants may generate with the adapter")
    keep_photos: bool = Field(False, description="photos copied to the storage stay there after publication")
    lora: LoraSpec = LoraSpec.model_construct()
    words: WordSpec = WordSpec.model_construct()
    prior: PriorSpec = PriorSpec.model_construct()
    train: TrainSpec = TrainSpec.model_construct()
    evaluate: EvaluateSpec = EvaluateSpec.model_construct()
    publish_if: GateSpec = GateSpec.model_construct()


class SubjectSpec(SubjectSettings):
    """One subject, complete: what `defaults` said is merged in and `{class}` is filled."""

    id: Id
    consent: Consent | None = Field(None, description="who allowed the use of its photos; persons need one")
    images: str = Field(min_length=1, description="a folder relative to the manifest, or a URI")

    @field_validator("images")
    @classmethod
    def _no_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("give a folder of images or a URI")
        return value

    @model_validator(mode="after")
    def _prompts_can_be_filled(self) -> "SubjectSpec":
        for prompt in (self.instance_prompt, self.class_prompt, *self.sample_prompts, *self.evaluate.prompts):
            for name in re.findall(r"{(\w*)}", prompt):
                if name != "class":
                    raise ValueError(f"`{{{name}}}` in prompt {prompt!r}: only {{class}} can be filled in")
        if self.publish_if.conditions and not self.evaluate.enabled:
            raise ValueError("`publish_if` needs scores; leave `evaluate.enabled` on or take the gate away")
        for token in self.words.tokens:
            if token not in self.instance_prompt:
                raise ValueError(
                    f"word {token!r} is not in `instance_prompt` {self.instance_prompt!r}: nothing trains it"
                )
        if self.samples.images == 0 and self.train.sample_every is not None:
            raise ValueError("`samples.images: 0` contradicts `train.sample_every`: leave out one of the two")
        if self.train.strategy == "zero" and self.train.against_zero is not None:
            raise ValueError(f"`strategy: zero` {self.train.against_zero}")
        if self.class_ is None:
            raise ValueError("`class` is missing: name the class noun (dog, person, backpack), here or in `defaults`")
        return self

    def calmed(self, factor: float) -> "SubjectSpec":
        """The same subject, all of its learning rates multiplied by `factor`."""
        train, words = self.train, self.words
        rates = {name: getattr(train, name) * factor for name in ("learning_rate", "text_encoder_learning_rate")}
        slow = words.model_copy(update={"learning_rate": words.learning_rate * factor})
        return self.model_copy(update={"train": train.model_copy(update=rates), "words": slow})

    def fill(self, prompt: str) -> str:
        """The prompt with `{class}` replaced by the class noun."""
        return prompt.replace("{class}", self.class_ or "")

    @property
    def sample_seeds(self) -> range:
        """The seeds of its sample pictures: one a picture."""
        usual = max(USUAL_SAMPLES, len(self.sample_prompts))
        return range(usual if self.samples.images is None else self.samples.images)

    @property
    def filled_instance_prompt(self) -> str:
        """The prompt of the subject's photos."""
        return self.fill(self.instance_prompt)

    @property
    def filled_class_prompt(self) -> str:
        """The prompt of class images."""
        return self.fill(self.class_prompt)

    @property
    def trigger(self) -> str:
        """The words that call it: those of the instance prompt that the class prompt lacks, and the class."""
        usual = set(self.filled_class_prompt.split()) - set((self.class_ or "").split())
        return " ".join(word for word in self.filled_instance_prompt.split() if word not in usual)
