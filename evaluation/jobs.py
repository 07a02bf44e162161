"""Several evaluations at a time, each in a process of its own; one process writes. For eval.py."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from data import Split
from evaluation.attack import evaluate
from evaluation.environment import make_reproducible
from evaluation.results import Results
from experiment import flags
from models.own import use_own, used


class Task(NamedTuple):
    """One evaluation: a model on a test set, as `identity` says."""

    model: nn.Module
    test: Split
    identity: dict[str, Any]


def evaluate_all(
    tasks: Sequence[Task], jobs: int, results: Results, device: torch.device, log: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    """The records of all tasks as they are finished, from `jobs` processes or, for one job, from this one.

    On a CPU the small batches that AutoAttack comes down to do not keep several cores busy, several evaluations do:
    each process gets its share of the threads, whose number can change how sums are rounded, and a copy of model and
    data. Only this process writes; the others send it what they found, and end when it does. Raises ChildProcessError
    where one of them ends before.
    """
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield evaluate(*task, results, device, log)
        return
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, len(tasks))
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, workers = list(tasks), {}
    # Ctrl-C reaches all processes: the workers ignore it from their start on, and are ended by this one.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for position in range(jobs):
            channel, remote = context.Pipe()
            worker = context.Process(target=_work, args=(remote, device, threads, position, used()), daemon=True)
            worker.start()
            remote.close()
            workers[channel] = worker
        signal.signal(signal.SIGINT, interrupt)
        for channel, worker in workers.items():
            with _dead_named(worker):
                _hand_over(waiting.pop(0), channel, results)
        while workers:
            for channel in wait(list(workers)):
                with _dead_named(workers[channel]):
                    kind, content = channel.recv()
                if kind == "error":
                    raise content
                {"log": log, "save": results.save, "finish": results.finish}[kind](content)
                if kind != "finish":
                    continue
                if waiting:
                    with _dead_named(workers[channel]):
                        _hand_over(waiting.pop(0), channel, results)
                else:
                    channel.close()
                    workers.pop(channel).join()
                yield content
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for worker in workers.values():
            worker.terminate()
            worker.join()


@contextlib.contextmanager
def _dead_named(worker: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """Say how a process ended that does not answer."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        worker.join()
        raise ChildProcessError(f"the process of an evaluation ended with {worker.exitcode}") from None


def _hand_over(task: Task, channel: Connection, results: Results) -> None:
    # Pickled here and not by the channel, which would put tensors into shared memory; containers have little of it.
    channel.send((pickle.dumps(task), results.unfinished(task.identity), results.unfinished_path))


class _Remote(NamedTuple):
    """The `Keeper` of an evaluation in another process than the one that writes."""

    channel: Connection
    record: dict[str, Any] | None
    unfinished_path: Path

    def unfinished(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        return self.record

    def save(self, record: dict[str, Any]) -> None:
        self.channel.send(("save", record))

    def finish(self, record: dict[str, Any]) -> None:
        self.channel.send(("finish", record))


def _work(channel: Connection, device: torch.device, threads: int, position: int, own_models: list[str]) -> None:
    """Evaluate one task after another from `channel`, until the process that sends them ends, however it ends.

    own_models: the models of one's own that its command line names, whose classes are unpickled here.
    """
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore of the system, which a process that is killed leaves.
    torch.set_num_threads(threads)
    flags.print_on()
    make_reproducible()
    for text in own_models:
        use_own(text)
    while True:
        try:
            task, record, path = channel.recv()
        except EOFError:
            return
        try:
            keeper = _Remote(channel, record, path)
            evaluate(*pickle.loads(task), keeper, device, lambda message: channel.send(("log", message)), position)
        except (ValueError, OSError) as error:
            channel.send(("error", error))
