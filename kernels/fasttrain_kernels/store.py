"""What is known of the kernels on this machine, kept from process to process.

One JSON file for each fingerprint (fingerprint.py), in `$FASTTRAIN_CACHE/kernels`, by default
`~/.cache/fasttrain/kernels`:

    parity      what a self-test found: error in units of what is allowed
    launched    what has run once, and did not end its process
    times       what a timing pass measured, by problem
    quarantine  backends that are not taken any more, and why

Any number of processes may use it. A write reads the file anew under a lock and replaces it in one
step, so that nothing is lost and nobody reads half of it. A file that can't be read is begun anew;
where nothing can be written, a process keeps its records to itself. Both are said once, and neither
is an error.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from fasttrain_kernels import in_flight
from fasttrain_kernels.fingerprint import digest, fingerprint, slug

VARIABLE = "FASTTRAIN_CACHE"
SECTIONS = ("parity", "launched", "times", "quarantine")
LONGEST_WAIT = 120.0  # seconds, for another process that writes or measures

Records = dict[str, dict[str, Any]]

log = logging.getLogger("fasttrain.kernels")


def directory() -> Path:
    """Where the files lie."""
    chosen = os.environ.get(VARIABLE) or "~/.cache/fasttrain"
    try:
        return Path(chosen).expanduser() / "kernels"
    except RuntimeError:  # nobody's home, as in a container under a number that has no name
        return Path(os.devnull) / "kernels"  # where nothing can be written, which is said


class Store:
    """The records of one device under one fingerprint. Keys are "op|backend|..." or "op|..."."""

    def __init__(self, path: Path, facts: dict[str, str]) -> None:
        self.path = path
        self.facts = facts
        self._flights = path.with_suffix(".in-flight")
        self._lock = threading.RLock()
        self._told: set[str] = set()
        self._records = self._read()
        for crash in in_flight.crashes(self._flights):
            reason = f"process {crash.process} ended during its {crash.what}"
            self.quarantine(crash.op, crash.backend, reason)

    def get(self, section: str, key: str) -> Any:
        """The record, or None."""
        return self._records[section].get(key)

    def put(self, section: str, key: str, value: Any) -> None:
        """Keep a record, for this process at least."""
        self._change(lambda records: records[section].update({key: value}))

    def quarantined(self, op: str, backend: str) -> str | None:
        """Why the backend is not to be taken, or None."""
        found = self.get("quarantine", f"{op}|{backend}")
        return None if found is None else str(found["reason"])

    def quarantine(self, op: str, backend: str, reason: str, traceback: str | None = None) -> None:
        """Never take the backend again under this fingerprint, and say so."""
        log.warning("%s: backend %s is in quarantine from now on: %s", op, backend, reason)
        found = {"reason": reason, "date": now(), "traceback": traceback}
        self.put("quarantine", f"{op}|{backend}", found)

    def forget(self, op: str, backend: str | None = None) -> None:
        """Drop what concerns an op, or one backend of it; its times go either way."""
        prefix = op if backend is None else f"{op}|{backend}"

        def change(records: Records) -> None:
            for section, found in records.items():
                start = op if section == "times" else prefix
                for key in [key for key in found if f"{key}|".startswith(f"{start}|")]:
                    del found[key]

        self._change(change)

    def in_flight(self, op: str, backend: str, what: str) -> AbstractContextManager[None]:
        """Around a launch that may end the process."""
        return in_flight.in_flight(self._flights, op, backend, what)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """One process at a time; the next one waits, and then finds what this one has found."""
        lock = self._open("measuring")
        try:
            if lock is not None:
                _wait_for(lock)
                self._records = _merged(self._read(), self._records)
            yield
        finally:
            if lock is not None:
                lock.close()

    def _change(self, change: Callable[[Records], None]) -> None:
        with self._lock:
            change(self._records)
            lock = self._open("lock")
            if lock is None:
                return
            with lock:
                _wait_for(lock)
                records = self._read()
                change(records)
                self._replace(records)

    def _open(self, suffix: str) -> TextIO | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path.with_suffix(f".{suffix}"), "a")
        except OSError as error:
            self._tell_unwritable(error)
            return None

    def _read(self) -> Records:
        try:
            found = json.loads(self.path.read_text())
            return {name: _whole(name, found[name]) for name in SECTIONS}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._tell(f"{self.path} can't be read ({error!r}): kernels are proven anew")
        return {name: {} for name in SECTIONS}

    def _replace(self, records: Records) -> None:
        temporary = self.path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_text(json.dumps({"environment": self.facts, **records}, indent=1))
            os.replace(temporary, self.path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._tell_unwritable(error)

    def _tell_unwritable(self, error: OSError) -> None:
        self._tell(
            f"{self.path.parent} can't be written ({error.strerror}): what is learnt of kernels "
            f"here is lost with this process; set {VARIABLE} to a folder that can be"
        )

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s", what)


def now() -> str:
    """The local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _whole(section: str, found: Any) -> dict[str, Any]:
    """A section as it was read; raises where anything in it is not what is kept there."""
    for record in dict(found).values():
        if section == "parity" and not 0 <= record < math.inf:
            raise ValueError(f"a parity of {record}")
        if section == "quarantine":
            str(record["reason"])
        for timed in record["backends"].values() if section == "times" else ():
            if "rejected" not in timed and not timed["ms"] > 0:
                raise ValueError(f"a time of {timed['ms']} ms")
    return dict(found)


def _merged(records: Records, others: Records) -> Records:
    return {name: records[name] | others[name] for name in SECTIONS}


def _wait_for(lock: TextIO) -> None:
    """Take the lock, or go on without it: its holder may hang, or the file system know none."""
    deadline = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return


_stores: dict[Path, Store] = {}
_stores_lock = threading.Lock()


def store_for(device_type: str, index: int | None = None) -> Store:
    """The records of a device, read once in a process."""
    facts = fingerprint(device_type, index)
    path = directory() / f"{slug(facts['device'])}-{digest(facts)}.json"
    with _stores_lock:
        if path not in _stores:
            _stores[path] = Store(path, facts)
        return _stores[path]


def reset(op: str | None = None, backend: str | None = None) -> list[Path]:
    """Forget everything, or what concerns an op, or one backend of it, under any fingerprint.

    Returns the files that were looked through. OSError where one can't be deleted.
    """
    with _stores_lock:
        _stores.clear()
    files = sorted(directory().glob("*.json"))
    for path in files:
        if op is None:
            path.unlink(missing_ok=True)
        else:
            Store(path, _facts(path)).forget(op, backend)
    for folder in directory().glob("*.in-flight") if op is None else ():
        in_flight.crashes(folder)  # told to nobody
    return files


def _facts(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["environment"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
