"""Signals that ask a run to stop: it does after the step under way. For train.py."""

import signal
from typing import Any

import torch
from torch import Tensor

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A signal has asked the run to stop; args[0] is its number."""


class Signals:
    """Turns SIGINT, SIGTERM and SIGUSR1 into Interrupted at the next `check`; a second SIGINT stops at once.

    in_company: the run has several processes, which stop together: what one of them has received counts when it has
    been heard by all, who tell each other what is `wished`.
    """

    def __init__(self, *, in_company: bool = False) -> None:
        self.received: int | None = None
        self._heard: int | None = None
        self._in_company = in_company
        for number_ in ASKING:
            signal.signal(number_, self._receive)

    def _receive(self, number_: int, frame: Any) -> None:
        self.received = number_
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def wished(self) -> Tensor:
        """For each of `ASKING`, 1 where this process has received it last, else 0."""
        return torch.tensor([float(number_ == self.received) for number_ in ASKING])

    def hear(self, wished: Tensor) -> None:
        """Take in the sum of what all processes have `wished`: of several signals, the first of `ASKING` counts."""
        self._heard = next(
            (int(number_) for number_, count in zip(ASKING, wished.tolist(), strict=True) if count), None
        )

    def check(self) -> None:
        number_ = self._heard if self._in_company else self.received
        if number_ is not None:
            raise Interrupted(number_)
