"""Keeps other libraries quiet: what a user reads is what dreamfleet says. Their errors still raise."""

import logging
import os
import warnings

_QUIET = (
    "transformers",
    "diffusers",
    "huggingface_hub",
    "deepspeed",
    "accelerate",
    "peft",
    "torch",
    "torch.utils._pytree",
    "torchao",
    "ray",
    "PIL",
    "matplotlib",
    "optuna",
)


def silence() -> None:
    """Turns off warnings, progress bars and chatter of the libraries below. Imports none of them."""
    if os.environ.get("DREAMFLEET_DEBUG"):
        return
    os.environ.update(
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TRANSFORMERS_VERBOSITY="error",
        TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
        DIFFUSERS_VERBOSITY="error",
        TQDM_DISABLE="1",
        TOKENIZERS_PARALLELISM="false",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    warnings.simplefilter("ignore")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
