"""Reading ahead: threads that read what the next steps need while a step runs. For the loader."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")


class Readers:
    """Threads that call what they are handed, the first handed over first; a context, at whose end they are let go.

    They wait for a disk most of the time, several of them for several answers at once. Nobody waits for them: what is
    not begun at the end of the context never is, and a read that does not return holds up neither that end nor that of
    the process (concurrent.futures' own threads are joined when Python ends).
    """

    def __init__(self, number: int):
        self._handed_over: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self._given_up = threading.Event()
        self._number = number

    def __enter__(self) -> "Readers":
        for _ in range(self._number):
            threading.Thread(target=self._work, name="reading ahead", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._given_up.set()
        for _ in range(self._number):
            self._handed_over.put(None)

    def submit(self, read: Callable[[], Item]) -> "Future[Item]":
        """Have `read` called; what it returns or raises is its future's result."""
        future: Future[Item] = Future()
        self._handed_over.put((future, read))
        return future

    def _work(self) -> None:
        while (handed_over := self._handed_over.get()) is not None:
            future, read = handed_over
            if self._given_up.is_set():
                future.cancel()
                continue
            try:
                future.set_result(read())
            except BaseException as error:
                future.set_exception(error)


def ahead(items: Iterable[Item], number: int) -> Iterator[Item]:
    """The same items in the same order, of which the next `number` are made before each is handed out."""
    coming: deque[Item] = deque()
    for item in items:
        coming.append(item)
        if len(coming) > number:
            yield coming.popleft()
    yield from coming
