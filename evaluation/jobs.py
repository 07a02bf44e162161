"""Evaluations by several processes, which share out the batches of each; one process writes. For eval.py."""

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import nn

from data import Split
from evaluation.attack import Attacker, Batch, Evaluation, Found, evaluate
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
    tasks: Sequence[Task], jobs: int, results: Results, devices: Sequence[torch.device], log: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    """The records of all tasks as they are finished, from `jobs` processes or, for one job, from this one.

    The processes take the devices in turn. They work on one task together, and where its attack has no batch left to
    begin, on the next. On a CPU the small batches that AutoAttack comes down to do not keep several cores busy, several
    processes do: each gets its share of the threads, whose number can change how sums are rounded, and a copy of model
    and data. Only this process writes; the others send it what they found, and end when it does. Raises
    ChildProcessError where one of them ends before.
    """
    jobs = min(jobs, sum(math.ceil(task.identity["n"] / task.identity["batch_size"]) for task in tasks))
    if jobs <= 1:
        for task in tasks:
            yield evaluate(*task, results, devices[0], log)
        return
    with contextlib.ExitStack() as bars, _started(jobs, devices) as workers:
        waiting, going = list(tasks), []
        while True:
            for worker in workers:
                while worker.batch is None:
                    # Rather of the task whose model it has.
                    ours = sorted(going, key=lambda pair, worker=worker: pair[0] is not worker.task)
                    chosen = ((*pair, batch) for pair in ours if (batch := pair[1].next_batch()) is not None)
                    if (found := next(chosen, None)) is not None:
                        worker.begin(*found)
                    elif waiting:
                        task, taken = waiting.pop(0), {evaluation.bar_position for _, evaluation in going}
                        position = min(set(range(len(going) + 1)) - taken)
                        evaluation = Evaluation(task.test, task.identity, results, devices, log, position)
                        going.append((task, bars.enter_context(evaluation)))
                    else:
                        break
            for pair in [pair for pair in going if pair[1].finished]:
                going.remove(pair)
                yield pair[1].record
            busy = {worker.channel: worker for worker in workers if worker.batch is not None}
            if not busy:
                return
            for channel in wait(list(busy), timeout=1):
                busy[channel].end()
            for _, evaluation in going:
                evaluation.tick()


class _Worker:
    """A process that attacks batches, as the process that writes sees it."""

    def __init__(self, channel: Connection, process: BaseProcess):
        self.channel, self.process = channel, process
        self.task: Task | None = None
        self.evaluation: Evaluation | None = None
        self.batch: Batch | None = None

    def begin(self, task: Task, evaluation: Evaluation, batch: Batch) -> None:
        """Hand a batch over, with its task if that is another one than before."""
        # Pickled here and not by the channel, which would put tensors into shared memory; containers have little of it.
        content = pickle.dumps((None if task is self.task else task, batch))
        with self._death_named():
            self.channel.send_bytes(content)
        self.task, self.evaluation, self.batch = task, evaluation, batch

    def end(self) -> None:
        """Take what the batch has found to its evaluation. Raises what the worker raised."""
        with self._death_named():
            answer: Found | Exception = self.channel.recv()
        if isinstance(answer, Exception):
            raise answer
        batch, self.batch = self.batch, None
        self.evaluation.add(batch, answer)

    @contextlib.contextmanager
    def _death_named(self) -> Iterator[None]:
        """Say how a process ended that does not answer."""
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise ChildProcessError(f"the process of an evaluation ended with {self.process.exitcode}") from None


@contextlib.contextmanager
def _started(jobs: int, devices: Sequence[torch.device]) -> Iterator[list[_Worker]]:
    """So many workers, which are ended with the context."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    workers = []
    # Ctrl-C reaches all processes: the workers ignore it from their start on, and are ended by this one.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for position in range(jobs):
            channel, remote = context.Pipe()
            device = devices[position % len(devices)]
            process = context.Process(target=_work, args=(remote, device, threads, used()), daemon=True)
            process.start()
            remote.close()
            workers.append(_Worker(channel, process))
        signal.signal(signal.SIGINT, interrupt)
        yield workers
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _work(channel: Connection, device: torch.device, threads: int, own_models: list[str]) -> None:
    """Attack one batch after another from `channel`, until the process that sends them ends, however it ends.

    own_models: the models of one's own that its command line names, whose classes are unpickled here.
    """
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    flags.print_on()
    make_reproducible()
    for text in own_models:
        use_own(text)
    attacker = None
    while True:
        try:
            task, batch = pickle.loads(channel.recv_bytes())
        except EOFError:
            return
        try:
            attacker = attacker if task is None else Attacker(*task, device)
            channel.send(attacker(batch))
        except (ValueError, OSError) as error:
            channel.send(error)
