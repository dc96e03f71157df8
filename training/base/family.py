"""What differs between families of text-to-image models, in one place.

A family names the components that may wear low-rank deltas and how a module of such a component is called in an
adapter. Bank, pack, trainer and engine do not know which family they serve.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One family. `denoiser` and `text_encoders` are component folders of its diffusers layout."""

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Components that an adapter may change."""
        return (self.denoiser, *self.text_encoders)


STABLE_DIFFUSION = Family(name="stable-diffusion", denoiser="unet", text_encoders=("text_encoder",))
FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": STABLE_DIFFUSION}


def canonical(component: str, module: str) -> str:
    """The adapter key of a module: `unet.down_blocks…to_q`, `text_encoder.text_model.encoder.layers.0…q_proj`.

    transformers >= 5.6 has lost the `text_model.` level of CLIP; every adapter file in the world has it.
    """
    if component.startswith("text_encoder") and not module.startswith("text_model."):
        module = f"text_model.{module}"
    return f"{component}.{module}"
