"""The model and its tokenizer as transformers reads them."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from safetensors import SafetensorError

from fasttrain.checkpoint.finite import refuse_nonfinite
from fasttrain.config.schema.checkpoint import HuggingFaceCheckpointConfig
from fasttrain.core.checkpoint_interface import Checkpoint
from fasttrain.core.run import Run
from fasttrain.runtime.files import remove_temporaries, replace_directory, sync_tree

_DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class HuggingFaceCheckpoint(Checkpoint):
    """Writes `model/` of the run directory. It can't be resumed from: it holds no optimizer."""

    Config = HuggingFaceCheckpointConfig

    def save(self, run: Run) -> Path:
        """Write the model; an export that is there already stays until the new one is whole."""
        with run.engine.evaluation_weights():
            return self._save(run)

    def _save(self, run: Run) -> Path:
        refuse_nonfinite(piece for piece in run.engine.state_slices() if piece.kind == "model")
        target = run.directory / "model"

        def write(directory: Path) -> None:
            try:
                run.model.save_pretrained(directory, dtype=_DTYPES[self.config.dtype])
            except SafetensorError as error:  # how its writer reports a full disk
                raise OSError(errno.EIO, str(error)) from error
            run.tokenizer.save_pretrained(directory)
            sync_tree(directory)

        remove_temporaries(run.directory)
        replace_directory(target, write)
        return target
