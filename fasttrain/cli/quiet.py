"""Keeps other libraries from talking over the run, in the processes that our commands start."""

from __future__ import annotations

import os
import sys
import warnings

# Read by the libraries when they are imported. What the user has set stands.
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else it warns whenever a process is forked
}
# Whose warnings are for their own developers. PyTorch's others can matter to the user.
TALKATIVE = r"(transformers|datasets|tokenizers|huggingface_hub|peft|accelerate)(\.|$)"
DEPRECATIONS = (FutureWarning, DeprecationWarning)


def quiet_third_parties() -> None:
    """Call before torch and transformers are imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        # On a terminal the bars stay: a download of gigabytes must show that it moves.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=TALKATIVE)
        for category in DEPRECATIONS:
            warnings.filterwarnings("ignore", category=category, module=r"torch(\.|$)")
