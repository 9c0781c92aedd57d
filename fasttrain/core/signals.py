"""SIGTERM, SIGINT and SIGUSR1 ask the run to save and leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fasttrain.core.run import Run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """Inside, a signal stops the run after the present step with exit code 128 + its number.

    The handler only sets a request, so that nothing is saved half-way through a step. A second
    SIGINT ends the process at once. Off the main thread signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if run.stop_reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop(f"signal {signal.Signals(number).name}", exit_code=128 + number)

    former = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
