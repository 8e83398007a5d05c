"""Signals during streaming: the current sample is finished and the state saved before the process exits."""

from __future__ import annotations

import signal
import threading
from typing import Any

from modality_integration.app.errors import Interrupted


class DeferredSignals:
    """Inside, the first SIGINT or SIGTERM is only recorded in `signal`; a second one stops immediately."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise Interrupted(
                "stopped immediately; the same command resumes from the last checkpoint, if there is one", 128 + number
            )
        self.signal = number
