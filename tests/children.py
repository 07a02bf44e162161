"""Processes that tests start and kill. The one file of the tests that forks.

A fork has in memory what its body takes, whatever that is, and starts at once, where a new process first imports torch
for seconds. Python warns of forks beside threads, whose locks nobody gives back in the child: pytest's and torch's are
of no use to a body, and what it does use is seen to here. So pyproject.toml lets that warning pass for this file.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiment.processes import free_port


def fork(body: Callable[[], Any], output: Path | str = os.devnull) -> int:
    """Start `body` in a process of its own, which has what it takes in memory already; its number.

    It ends without cleaning up. What it prints goes to `output`; its exit status is the number that the body returns,
    0 for None, or 99 after an exception, which is printed where pytest shows it.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks: a killed one would hold it for ever
        with open(output, "w") as file, redirect_stdout(file), redirect_stderr(file):
            status = body() or 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    finally:
        os._exit(status)


def fork_company(size: int, body: Callable[[int], Any], folder: Path) -> list[int]:
    """Start processes that find each other as torchrun's do, each with `body` of its rank; their numbers.

    What they print goes to rank-0.txt, rank-1.txt, ... in `folder`, which are all there (empty) when this returns.
    """
    port = free_port()

    def member(rank: int) -> Any:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        return body(rank)

    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
    for output in outputs:
        output.write_text("")
    return [fork(lambda rank=rank: member(rank), output) for rank, output in enumerate(outputs)]


def exit_status(pid: int) -> int:
    """Wait for a forked process: its exit status, or minus the number of the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    """Kill a forked process that is still at it."""
    os.kill(pid, signal.SIGKILL)
    assert exit_status(pid) == -signal.SIGKILL
