"""`loss.png`: a subject's losses over its steps."""

import io

import numpy as np
from torch import Tensor

from training.trainer.checkpoint import HISTORY


def plot_losses(history: Tensor, title: str) -> bytes:
    """PNG bytes of instance and prior loss over steps, smoothed, from a history [steps, len(HISTORY)]."""
    # takes a second to import, which no subject's first step should wait for
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {name: history[:, index].numpy() for index, name in enumerate(HISTORY)}
    figure = Figure(figsize=(6, 3.2), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, colour in (("instance_loss", "tab:blue"), ("prior_loss", "tab:orange")):
        values = columns[name]
        if not values.any():
            continue
        axes.plot(columns["step"], values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(columns["step"], _smooth(values), color=colour, label=name.replace("_", " "))
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _smooth(values: np.ndarray) -> np.ndarray:
    """An exponential mean over about a twentieth of the curve, without bias at its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    out, mean, weight = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out[index] = mean / weight
    return out
