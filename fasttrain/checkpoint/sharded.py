"""Resumable checkpoints: complete or absent, and checked before they are believed.

    <run directory>/checkpoints/step-00000100/
        rank-0000/{model,optimizer,rng}.safetensors     that rank's slices, and its random states
        state.json                                      counters, position, schedule, callbacks
        config.resolved.yaml
        manifest.json                                   run, step, every file's size and SHA-256

All of it is written to a temporary directory beside, each file through to the disk, the manifest
last; read back and compared; and renamed. Only then are older checkpoints deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
from pathlib import Path

from fasttrain.checkpoint.finite import refuse_nonfinite
from fasttrain.checkpoint.manifest import (
    FILE_NAME,
    IncompleteError,
    Manifest,
    read_manifest,
    verify,
    write_manifest,
)
from fasttrain.checkpoint.slices import KINDS, read_whole, write_slices
from fasttrain.checkpoint.tensor_file import FileSum, TensorFile, write_tensors
from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.checkpoint import ShardedCheckpointConfig
from fasttrain.core.checkpoint_interface import Found, ResumableCheckpoint
from fasttrain.core.run import Run
from fasttrain.runtime.files import (
    opened,
    remove_directory,
    remove_temporaries,
    replace_directory,
    sync_directory,
    write_new,
)
from fasttrain.runtime.random_state import random_state, set_random_state

_STEP_NAME = re.compile(r"step-\d+")

log = logging.getLogger("fasttrain")


class ShardedCheckpoint(ResumableCheckpoint):
    """Writes, finds and restores `checkpoints/step-00000100/`."""

    Config = ShardedCheckpointConfig

    def save(self, run: Run) -> Path:
        """Write the run's present state and delete what is no longer to be kept.

        A failure (OSError, UnfitToSave) leaves the former checkpoints as they were and nothing
        half-written. The run directory's lock must be held.
        """
        assert run.engine.topology.world_size == 1, "one process writes a checkpoint"
        refuse_nonfinite(run.engine.state_slices())
        parent = run.directory / "checkpoints"
        if parent.is_symlink():
            raise FileExistsError(f"{parent} is a symbolic link; nothing is written through it")
        parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(parent)
        target = parent / f"step-{run.step:08d}"
        _clear_the_way(target, run.run_id)
        replace_directory(target, lambda temporary: _write(run, temporary))
        _rotate(parent, run, self.config.keep)
        return target

    def find(self, directory: Path, *, run_id: str | None = None) -> Found:
        """The newest complete checkpoint, by the step in its manifest, every byte checked.

        `directory` is a run directory or one checkpoint. With `run_id`, those of other runs are
        passed over.
        """
        if os.path.lexists(directory / FILE_NAME):
            candidates = [directory]
        else:
            candidates = _visible_entries(directory / "checkpoints")
        readable, skipped = _read_manifests(candidates)
        for path, manifest in readable:
            if run_id is not None and manifest.run_id != run_id:
                skipped.append(f"{path}: belongs to another run ({manifest.run_id})")
                continue
            try:
                verify(path)
            except IncompleteError as reason:
                skipped.append(f"{path}: {reason}")
                continue
            return Found(path, tuple(skipped))
        return Found(None, tuple(skipped))

    def restore(self, run: Run, path: Path) -> None:
        """Load what `find` found. UserError where it doesn't fit the run's model or optimizer."""
        ranks = sorted(path.glob("rank-*"))
        try:
            run.engine.load_slices(
                piece
                for kind in KINDS
                for piece in read_whole([rank / f"{kind}.safetensors" for rank in ranks], kind)
            )
        except ValueError as error:
            hint = "It was written for another model or optimizer: resume with those."
            raise UserError(Problem(where=str(path), what=f"{error}.", hint=hint)) from error
        with opened(path / "state.json") as file:
            run.load_state_dict(json.load(file))
        _restore_random_state(run, path)


def _write(run: Run, directory: Path) -> None:
    rank = f"rank-{run.engine.topology.rank:04d}"
    (directory / rank).mkdir()
    slices = list(run.engine.state_slices())
    files: dict[str, FileSum] = {}
    for kind in KINDS:
        name = f"{rank}/{kind}.safetensors"
        files[name] = write_slices(directory / name, (s for s in slices if s.kind == kind))
    name = f"{rank}/rng.safetensors"
    files[name] = write_tensors(directory / name, random_state(), {})
    sync_directory(directory / rank)
    state = json.dumps(run.state_dict(), indent=1) + "\n"
    files["state.json"] = _write_text(directory / "state.json", state)
    name = "config.resolved.yaml"
    files[name] = _write_text(directory / name, run.resolved_config)
    world_size = run.engine.topology.world_size
    write_manifest(directory, Manifest(run.run_id, run.step, world_size, files))
    try:
        verify(directory)
    except IncompleteError as reason:
        raise OSError(errno.EIO, f"what was written reads back otherwise: {reason}") from reason


def _write_text(path: Path, text: str) -> FileSum:
    data = text.encode()
    write_new(path, data)
    return FileSum(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _clear_the_way(target: Path, run_id: str) -> None:
    """A checkpoint of this step that is damaged steps aside; one of another run stays."""
    if target.is_symlink() or not target.exists():
        return
    try:
        owner = verify(target).run_id
    except IncompleteError as reason:
        aside = target.with_name(f".damaged-{target.name}-{secrets.token_hex(4)}")
        os.rename(target, aside)
        log.warning("%s: %s. It was moved to %s.", target, reason, aside.name)
        return
    if owner != run_id:
        raise FileExistsError(f"{target} belongs to another run ({owner})")


def _rotate(parent: Path, run: Run, keep: int) -> None:
    """Delete this run's earlier checkpoints but the newest and the best. The new one is verified.

    Later ones, which a damaged checkpoint made this run fall behind, are left alone.
    """
    readable, _ = _read_manifests(_visible_entries(parent))
    earlier = [
        (path, manifest.step)
        for path, manifest in readable
        if manifest.run_id == run.run_id and manifest.step < run.step
    ]
    for path, step in earlier[keep - 1 :]:
        if step == run.best_step:
            continue
        try:
            remove_directory(path)
        except OSError as error:
            log.warning("%s could not be deleted: %s", path, error)


def _visible_entries(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(entry for entry in parent.iterdir() if not entry.name.startswith("."))


def _read_manifests(paths: list[Path]) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """(path, manifest) with the latest step first, and a line for each that has no manifest."""
    readable, skipped = [], []
    for path in paths:
        if path.is_symlink():
            skipped.append(f"{path}: is a symbolic link")
            continue
        try:
            manifest = read_manifest(path)
        except IncompleteError as reason:
            skipped.append(f"{path}: {reason}")
            continue
        if (
            _STEP_NAME.fullmatch(path.name)
            and int(path.name.removeprefix("step-")) != manifest.step
        ):
            skipped.append(f"{path}: manifest.json is of step {manifest.step}")
            continue
        readable.append((path, manifest))
    readable.sort(key=lambda found: (-found[1].step, found[0]))
    return readable, skipped


def _restore_random_state(run: Run, path: Path) -> None:
    topology = run.engine.topology
    file = path / f"rank-{topology.rank:04d}" / "rng.safetensors"
    written_by = read_manifest(path).world_size
    if written_by != topology.world_size:
        what = f"written by {written_by} processes, read by {topology.world_size}"
        run.notes.append(("random states", f"{what}: dropout goes on from other draws"))
    if file.exists():
        tensors = TensorFile(file)
        left = set_random_state({name: tensors[name] for name in tensors.names})
        if left:
            run.notes.append(("random states", f"not carried over: {', '.join(left)}"))
