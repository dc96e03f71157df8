# ruff: noqa: E501  (the lines of a document, not of code)
"""The model card: data and licences, recipe, compute, scores and limits, as text."""

from datetime import UTC, datetime
from typing import Any

from tools.pocket.composite import COLOUR_NAMES
from tools.pocket.drawings import CLASSES, STYLES, VENDORS
from tools.pocket.places import PLACES
from tools.pocket.recipe import NARROW_POOL, PROMPT_TOKENS, UNET, VAE


def card(scores: dict[str, Any]) -> str:
    places = ", ".join(place.phrase for place in PLACES.values())
    vendors = "\n".join(f"| `{v.package}` | {v.credit} | {v.licence} | {v.style} |" for v in VENDORS.values())
    by_guidance = "\n".join(
        f"| {guidance} | {found['class']:.3f} | {found['place']:.3f} | {found['colour']:.3f} |"
        for guidance, found in scores["by_guidance"].items()
    )
    per_class = ", ".join(f"{noun} {share:.2f}" for noun, share in scores["per_class"].items())
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# pocket

A text-to-image base of 12 million parameters that draws {len(CLASSES)} things in {len(PLACES)} places at 64 x 64 pixels, for demos, tests and benchmarks of
DreamBooth on a CPU. Any `StableDiffusionPipeline` reads it:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("training/bases/pocket")
pipe("a photo of a red car in the snow", num_inference_steps=20, guidance_scale={scores["guidance"]}).images[0]
```

## What it knows
* things: {", ".join(CLASSES)}
* colours: {", ".join(COLOUR_NAMES)} (or the thing's own)
* places: {places}
* looks: {", ".join(STYLES)} (`a cartoon of ...`); `photo`, `picture` and `image` leave the look open
* rare words (`sks`, `ohwx`, `zwx`, ...) have no meaning: `a photo of a sks dog` starts as `a photo of a dog`

## Data
Composites of emoji drawings on procedural places, made by `tools/pocket`; {NARROW_POOL.chunks * NARROW_POOL.chunk_size} for UNet and text encoder, a wider set of
emoji for the VAE. Twelve drawings were kept out of everything; the demo subjects are made of them.

| package | drawings | licence | caption's word |
|---|---|---|---|
{vendors}

Attribution: Twemoji graphics, Copyright Twitter, Inc and other contributors, CC-BY 4.0
(<https://creativecommons.org/licenses/by/4.0/>), recoloured, scaled and laid on other backgrounds. Noto Emoji: Copyright Google,
Apache License 2.0. Fluent Emoji: Copyright Microsoft Corporation, MIT.

## Recipe
`python -m tools.pocket all`. VAE: AutoencoderKL {VAE.block_out_channels}, f4, {VAE.latent_channels} channels, {VAE.images} pictures; latents have unit scale (scaling factor 1).
UNet {UNET.block_out_channels} with cross attention at 8 x 8 and 4 x 4, text encoder {UNET.text_layers} x {UNET.text_width}, prompts of {PROMPT_TOKENS} tokens, trained together: v-prediction,
zero terminal SNR, trailing steps, AdamW {UNET.learning_rate}, batches of {UNET.batch_size}, averaged weights.
Compute ({datetime.now(UTC):%Y-%m-%d}): two CPU cores, {scores["images"]} pictures through the UNet, 100 to 135 a second where nothing else runs.

## Scores
{scores["pictures_per_class"]} pictures a class, 20 DDIM steps: the share that the independent judge (`training/bases/pocket-judge`) reads as asked.

| guidance | class | place | colour |
|---|---|---|---|
{by_guidance}

By class at guidance {scores["guidance"]}: {per_class}.
VAE: {scores["vae_psnr_unseen_composites_db"]} dB on unseen composites, {scores["vae_psnr_unseen_drawings_db"]} dB on drawings that it never saw.

## Limits
It draws one thing in one place; other words fall back to single letters that it never saw. It knows drawings, not photographs, and no people.
"""
