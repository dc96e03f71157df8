"""A subject's TensorBoard events, written anew from its history at each checkpoint: nothing to lose or repeat."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from training.trainer.checkpoint import HISTORY

NAME = "events.out.tfevents.0.dreamfleet"  # the usual name holds the name of the machine; these files are published


def event_file(
    history: Tensor,
    rates: Mapping[int, float] | None = None,
    samples: Mapping[int, Sequence[Image.Image]] | None = None,
) -> bytes:
    """An event file of a history [steps, len(HISTORY)], images/s by step, and sample images by step."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, as matplotlib for `loss_plot.py`

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for row in history.tolist():
            for name, value in zip(HISTORY[1:], row[1:], strict=True):
                writer.add_scalar(name, value, int(row[0]))
        for step, rate in (rates or {}).items():
            writer.add_scalar("images_per_second", rate, step)
        for step, images in (samples or {}).items():
            for index, image in enumerate(images):
                writer.add_image(f"sample/{index}", np.asarray(image), step, dataformats="HWC")
        writer.close()
        (path,) = Path(folder).iterdir()
        return path.read_bytes()
