"""Models that are configured: their weights lie in one folder of the operator's, none is ever downloaded.

    <models>/clip/            a transformers CLIPModel folder (with tokenizer), e.g. of openai/clip-vit-base-patch32
    <models>/dino/            a transformers ViTModel folder, e.g. of facebook/dino-vits16
    <models>/dinov2/          a transformers Dinov2Model folder
    <models>/arcface.safetensors   an IResNet in the names of insightface's arcface_torch (`faces.py`)
    <models>/inception.pt     the TorchScript Inception of StyleGAN's metrics (inception-2015-12-05.pt), for FID and KID

Shapes: N pictures, E features, H and W cells of a map.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ViTModel

from training.errors import UserError
from training.evaluation.judges.features import BATCH, IMAGENET_MEAN, IMAGENET_STD, Images, pixels

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """CLIP: image features are CLIP-I, the cosine to the prompt's is CLIP-T. `name` says which weights."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.name = _named("clip", folder)
        self._model = CLIPModel.from_pretrained(_there(folder), local_files_only=True)
        self._model.requires_grad_(False).eval().to(device)
        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self._device = device

    @torch.inference_mode()
    def embed(self, images: Images) -> Tensor:
        """CLIP-I features, fp32 [N, E], rows of length 1."""
        config = self._model.config.vision_config
        parts = []
        for start in range(0, len(images), BATCH):
            batch = pixels(images[start : start + BATCH], config.image_size, CLIP_MEAN, CLIP_STD).to(self._device)
            pooled = self._model.vision_model(pixel_values=batch).pooler_output
            parts.append(functional.normalize(self._model.visual_projection(pooled).float()).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def agree(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """CLIP-T: the cosine of each picture to its prompt, fp32 [N]."""
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self._device)
        pooled = self._model.text_model(**tokens).pooler_output
        texts = functional.normalize(self._model.text_projection(pooled).float()).cpu()
        return (self.embed(images) * texts).sum(1)


class Vit:
    """DINO (ViTModel) or DINOv2 (Dinov2Model): the class token is the feature, the patches are the map."""

    def __init__(self, kind: str, folder: Path, device: torch.device | str = "cpu") -> None:
        self.name = _named(kind, folder)
        loader: Any = Dinov2Model if kind == "dinov2" else ViTModel
        extra = {} if kind == "dinov2" else {"add_pooling_layer": False}
        self._model = loader.from_pretrained(_there(folder), local_files_only=True, **extra)
        self._model.requires_grad_(False).eval().to(device)
        self._device = device
        # DINOv2's config names the size of its position table; everyone feeds it 224 px
        self._side = min(224, self._model.config.image_size)

    @torch.inference_mode()
    def embed(self, images: Images) -> Tensor:
        """The class token, fp32 [N, E], rows of length 1."""
        return functional.normalize(self._tokens(images)[:, 0])

    @torch.inference_mode()
    def maps(self, images: Images) -> Tensor:
        """The patch tokens, fp32 [N, E, H, W]."""
        patches = self._tokens(images)[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        return patches.transpose(1, 2).reshape(len(patches), -1, side, side)

    def _tokens(self, images: Images) -> Tensor:
        resize = round(self._side * 256 / 224)
        parts = []
        for start in range(0, len(images), BATCH):
            batch = pixels(images[start : start + BATCH], self._side, IMAGENET_MEAN, IMAGENET_STD, resize)
            parts.append(self._model(pixel_values=batch.to(self._device)).last_hidden_state.float().cpu())
        return torch.cat(parts)


class Inception:
    """The Inception of FID and KID, as TorchScript: its 2048 features, not normalised."""

    name = "inception-2015-12-05"

    def __init__(self, file: Path, device: torch.device | str = "cpu") -> None:
        self._model: Any = torch.jit.load(str(_there(file)), map_location=device).eval()
        self._device = device

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """fp32 [N, 2048] on the CPU; the network resizes them, so give pictures of one size."""
        parts = []
        for start in range(0, len(images), BATCH):
            held = np.stack([np.asarray(image.convert("RGB")) for image in images[start : start + BATCH]])
            batch = torch.from_numpy(held).permute(0, 3, 1, 2).to(self._device)
            parts.append(self._model(batch, return_features=True).float().cpu())
        return torch.cat(parts)


def _there(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"Model '{path.name}' is not in the folder of models. Put it there, or choose another.")
    return path


def _named(kind: str, folder: Path) -> str:
    """`clip:openai/clip-vit-base-patch32` where the weights say so, else `clip`: never a path of this machine."""
    config = folder / "config.json"
    if not config.exists():
        return kind
    said = str(json.loads(config.read_text()).get("_name_or_path", ""))
    return f"{kind}:{said}" if said and not Path(said).is_absolute() and not said.startswith(".") else kind
