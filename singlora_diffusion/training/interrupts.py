"""Ctrl-C, SIGTERM and SIGHUP during a training: the first asks it to stop after the step, the second stops it."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from .events import Event, Started

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupts:
    """A listener that watches for signals from the first step on; before it, a signal ends the program at once.

    Args:
        echo: seconds in which a repeated signal counts as the same one. Launchers of several processes pass on what the
            terminal has sent to all of them already.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.echo = echo
        self.received: int | None = None
        """The signal's number."""
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether the training is to stop."""
        return self.received is not None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started) and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Hand the signals back to whoever had them."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when >= self.echo:
            self.close()
            signal.raise_signal(number)
