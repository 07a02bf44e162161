"""Signals that ask a run to stop: it does after the step under way. For train.py."""

import signal
from typing import Any


class Interrupted(Exception):
    """A signal has asked the run to stop; args[0] is its number."""


class Signals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into Interrupted at the next `check`; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number_, self._receive)

    def _receive(self, number_: int, frame: Any) -> None:
        self.received = number_
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)
