"""Where a run lives, whether it goes on or starts anew, and that nobody else is at it.

    runs/sft/
        run.json                whose directory it is, and whether that run is finished
        config.resolved.yaml    what was trained, every value with its origin
        .lock                   held while a process trains here

A directory is decided upon by reading alone; it is written to when it is certain to be ours.
"""

from __future__ import annotations

import json
import logging
import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.load import LoadedConfig
from fasttrain.config.resolve import differing_keys, resolved_yaml
from fasttrain.core import metrics_file
from fasttrain.core.checkpoint_interface import Checkpoint, Found, ResumableCheckpoint
from fasttrain.core.metrics_file import cut_metrics
from fasttrain.runtime.files import TEMPORARY, remove_temporaries, write_atomically
from fasttrain.runtime.lock import LockHeldError, exclusive_lock

RUN_FILE = "run.json"
CONFIG_FILE = "config.resolved.yaml"
LOCK_FILE = ".lock"
FORMAT = 1
_BEFORE_TRAINING = -1  # even an evaluation at step 0 comes after it

log = logging.getLogger("fasttrain")


@dataclass(frozen=True)
class RunDirectory:
    """The directory that a run was given."""

    path: Path
    run_id: str
    resolved_config: str
    message: str  # what is going to happen, for the user
    resume_from: Path | None = None
    skipped: tuple[str, ...] = ()  # checkpoints that were passed over, each with its reason

    def mark_finished(self) -> None:
        """Write down that the run has reached its end, so that no later start goes on with it."""
        record = _read_record(self.path)
        assert record is not None, f"{self.path} was never opened for writing"
        try:
            _write_record(self.path, RunRecord(record.run_id, True, record.resumed_from))
        except OSError as error:
            log.warning("%s could not be marked as finished: %s", self.path, error)


@dataclass(frozen=True)
class RunRecord:
    """The contents of run.json."""

    run_id: str
    finished: bool
    resumed_from: str | None  # the `resume:` path that a run of another directory was taken from


class _OccupiedError(Exception):
    """The directory holds a run that this one can't go on with; the text says which."""


@contextmanager
def open_run_directory(
    loaded: LoadedConfig, checkpoints: Sequence[Checkpoint], *, dry_run: bool = False
) -> Iterator[RunDirectory]:
    """Find or make the run's directory by the rules of `output_dir` and `resume`, and lock it.

    UserError where it holds something else, is locked, or can't be written. With `dry_run` the same
    is decided and nothing is written.
    """
    opener = _Opener(loaded, checkpoints)
    path = opener.base
    with ExitStack() as stack:
        try:
            path, passed = opener.choose()
            if not dry_run:
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(path / LOCK_FILE))
            directory = opener.decide(path, passed)
            if not dry_run:
                opener.write(directory)
        except (OSError, LockHeldError, _OccupiedError) as error:
            raise _not_ours(path, error) from error
        yield directory


def _not_ours(path: Path, error: Exception) -> UserError:
    hint = "Give another output_dir."
    if isinstance(error, LockHeldError):
        what, hint = f"{error} is training in it.", f"Wait for it, or stop it. {hint}"
    elif isinstance(error, OSError):
        what = f"can't be used ({error.strerror})."
    else:
        what = f"it {error}."
    return UserError(Problem(where=str(path), key="output_dir", what=what, hint=hint))


class _Opener:
    """The rules, for one config."""

    def __init__(self, loaded: LoadedConfig, checkpoints: Sequence[Checkpoint]) -> None:
        self.config = loaded.config
        self.text = resolved_yaml(loaded)
        self.command = f"fasttrain run {shlex.quote(str(loaded.path or 'FILE'))}"
        self.is_default = self.config.output_dir is None
        self.base = Path(self.config.output_dir or f"runs/{loaded.name}")
        self.reader = next((c for c in checkpoints if isinstance(c, ResumableCheckpoint)), None)
        self.source: Path | None = None
        if self.config.resume not in ("auto", "never"):
            self.source = Path(self.config.resume)

    # --- which directory -------------------------------------------------------------------------

    def choose(self) -> tuple[Path, str]:
        """The configured directory; by default the first of `name`, `name-2`, … that is free.

        With it comes a note on the one before it. Writes nothing.
        """
        if self.source is not None:
            self._taken_from  # noqa: B018  (a wrong path is told before anything is made)
        if not self.is_default:
            try:
                self._refuse_occupied(self.base)
            except _OccupiedError as occupied:
                raise self._refused(occupied) from occupied
            return self.base, ""
        passed = ""
        for path in _numbered(self.base):
            try:
                self._refuse_occupied(path)
            except _OccupiedError as occupied:
                passed = f" ({path} {occupied})"
                continue
            return path, passed
        raise AssertionError("numbers never end")

    def _refuse_occupied(self, path: Path) -> RunRecord | None:
        """The unfinished run in `path` that this start may go on with; None where there is none."""
        record = _read_record(path)
        if record is None:
            _refuse_other_files(path)
            return None
        if record.finished:
            raise _OccupiedError("holds a finished run")
        if self.config.resume == "never":
            raise _OccupiedError("holds a run")
        if self.source is not None and record.resumed_from != str(self.source.absolute()):
            newest, wanted = self._find(path, record.run_id).path, self._taken_from.path
            if newest is None or wanted is None or not newest.samefile(wanted):
                raise _OccupiedError("holds another run")
        return record

    # --- what happens there ----------------------------------------------------------------------

    def decide(self, path: Path, passed: str) -> RunDirectory:
        """What to do in `path`, from what it holds. Writes nothing."""
        record = self._refuse_occupied(path)
        if record is not None:
            return self._unfinished(path, record)
        run_id, message = secrets.token_hex(8), f"new, in {path}{passed}"
        if self.source is None:
            return RunDirectory(path, run_id, self.text, message)
        found = self._taken_from
        message += f", from {found.path}"
        assert found.path is not None
        if changes := _changes(found.path / CONFIG_FILE, self.text):
            message += f", changed: {'; '.join(changes)}"
        return RunDirectory(path, run_id, self.text, message, found.path, found.skipped)

    def _unfinished(self, path: Path, record: RunRecord) -> RunDirectory:
        found = self._find(path, record.run_id)
        if found.path is None and record.resumed_from is not None and self.source is not None:
            found = self._taken_from
        if found.path is not None or _was_training(path):
            self._refuse_other_config(path)
        if found.path is None:
            message = f"starts over in {path}: no complete checkpoint is there yet"
            if found.skipped:
                message += f" ({'; '.join(found.skipped)})"
        else:
            message = f"goes on in {path}, from {found.path.name}"
        return RunDirectory(path, record.run_id, self.text, message, found.path, found.skipped)

    def _find(self, path: Path, run_id: str) -> Found:
        return self.reader.find(path, run_id=run_id) if self.reader else Found(None)

    @cached_property
    def _taken_from(self) -> Found:
        """The checkpoint that `resume:` names. UserError where there is none."""
        assert self.source is not None, "resume names no checkpoint"
        hint = "Give a checkpoint or a run directory."
        if self.reader is None:
            what = "no checkpoint that can be resumed from is configured."
            hint = "Add one: checkpoint: [{type: sharded}]."
        elif not self.source.exists():
            what = f"{self.source} is not there."
        else:
            found = self.reader.find(self.source)
            if found.path is not None:
                return found
            why = f": {'; '.join(found.skipped)}" if found.skipped else ""
            what = f"{self.source} holds no complete checkpoint{why}."
        raise UserError(Problem(key="resume", what=what, hint=hint))

    # --- refusals --------------------------------------------------------------------------------

    def _refuse_other_config(self, path: Path) -> None:
        changes = _changes(path / CONFIG_FILE, self.text)
        if not changes:
            return
        anew = f"{self.command} resume=never"
        if not self.is_default:
            anew = f"{self.command} output_dir={_next_free(self.base)}"
        raise UserError(
            Problem(
                where=str(path),
                key="output_dir",
                what=f"an unfinished run of another config is there; {'; '.join(changes)}.",
                hint=f"Put these back to go on with it, or start anew: {anew}",
            )
        )

    def _refused(self, occupied: _OccupiedError) -> UserError:
        free = _next_free(self.base)
        return UserError(
            Problem(
                where=str(self.base),
                key="output_dir",
                what=f"it {occupied}, which is not overwritten.",
                hint=f"Start anew: {self.command} output_dir={free} resume=never, or train on from "
                f"it: {self.command} output_dir={free} resume={self.base} max_steps=N",
            )
        )

    # --- writing ---------------------------------------------------------------------------------

    def write(self, directory: RunDirectory) -> None:
        """Make the directory this run's. Shows at once whether it can be written at all."""
        path = directory.path
        remove_temporaries(path)
        write_atomically(path / CONFIG_FILE, self.text.encode())
        if directory.resume_from is None:
            cut_metrics(path / metrics_file.FILE_NAME, _BEFORE_TRAINING)
        if _read_record(path) is None:
            source = str(self.source.absolute()) if self.source else None
            _write_record(path, RunRecord(directory.run_id, False, source))


# --- what is in a directory ---------------------------------------------------------------------


def _read_record(path: Path) -> RunRecord | None:
    file = path / RUN_FILE
    try:
        fields = json.loads(file.read_bytes())
        known = fields.pop("format") == FORMAT
        if known:
            return RunRecord(**fields)
        what = "was written by another version of fasttrain."
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        what = f"can't be read ({error.strerror})."
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "is damaged."
    raise UserError(Problem(where=str(file), what=what, hint="Give another output_dir."))


def _write_record(path: Path, record: RunRecord) -> None:
    text = json.dumps({"format": FORMAT, **asdict(record)}, indent=1) + "\n"
    write_atomically(path / RUN_FILE, text.encode())


def _refuse_other_files(path: Path) -> None:
    """A directory with somebody's files is no run directory; one that a start left behind is."""
    problem = None
    if path.is_dir():
        ours = (LOCK_FILE, CONFIG_FILE)
        names = [entry.name for entry in path.iterdir() if not entry.name.startswith(TEMPORARY)]
        others = sorted(name for name in names if name not in ours)
        if others:
            problem = f"it holds other files ({', '.join(others[:3])}) and no run of fasttrain."
    elif path.exists():
        problem = "it is a file."
    if problem:
        hint = "Give a directory that is empty or not there yet."
        raise UserError(Problem(where=str(path), key="output_dir", what=problem, hint=hint))


def _was_training(path: Path) -> bool:
    """Whether there is anything that a start over would set aside."""
    metrics = path / metrics_file.FILE_NAME
    checkpoints = path / "checkpoints"
    return (metrics.exists() and metrics.stat().st_size > 0) or checkpoints.exists()


def _changes(saved: Path, text: str) -> list[str]:
    if not saved.exists():
        return []
    return [str(difference) for difference in differing_keys(saved.read_text(), text)]


def _numbered(base: Path) -> Iterator[Path]:
    yield base
    for number in count(2):
        yield base.with_name(f"{base.name}-{number}")


def _next_free(base: Path) -> Path:
    return next(path for path in _numbered(base) if not path.exists())
