"""A subject's TensorBoard events, built from its history when it is published: nothing to lose, nothing to flush."""

import tempfile
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training.checkpoint import HISTORY


def event_file(history: Tensor) -> tuple[str, bytes]:
    """Name and bytes of an event file that holds a history [steps, len(HISTORY)]."""
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for row in history.tolist():
            for name, value in zip(HISTORY[1:], row[1:], strict=True):
                writer.add_scalar(name, value, int(row[0]))
        writer.close()
        (path,) = Path(folder).iterdir()
        # the usual name carries the machine's; these files travel
        return "events.out.tfevents.0.dreamfleet", path.read_bytes()
