"""What a training step costs where several processes share it out, against one process. For bench.py."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from analysis.cost import Workload, load_workload, spread, synchronize, training_step
from experiment.processes import ALONE, Processes, free_port

# The steps that are shared out: the one in which the sum weighs most, and ours.
SHARED_OUT = ("clean step", "DyART step")
# What a step is made of: passes through the network, the sum over processes, and clipping, optimizer and average.
PARTS = ("passes", "sum", "rest")


def measure_processes(target: str | None, workload: Workload, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each step the seconds in one process, this one, and shared out over processes with a share of its threads.

    `throughput` is that of the processes as a share of the one's, round by round; of the processes there are the
    seconds of each part as well (of the first of them). Raises ChildProcessError where one of them ends.
    """
    size = options["processes"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    context = multiprocessing.get_context("spawn")
    workers, channels = [], []
    for rank in range(size):
        channel, remote = context.Pipe()
        member = place | {"RANK": str(rank), "DYART_DISTRIBUTED": "1"}
        workers.append(context.Process(target=_work, args=(remote, member, target, options), daemon=True))
        workers[-1].start()
        remote.close()
        channels.append(channel)

    def run(name: str) -> dict[str, float]:
        for channel in channels:
            channel.send(name)
        return [channel.recv() for channel in channels][0]

    alone = _steps(workload, options, ALONE)
    taken: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in SHARED_OUT}
    try:
        for number in tqdm(range(-1, options["rounds"]), desc="rounds", leave=False):
            for name in SHARED_OUT:
                times = alone[name](), run(name)
                if number >= 0:
                    taken[name].append(times)
    except (EOFError, ConnectionError):
        raise ChildProcessError("--processes: one of the processes has ended; what it printed stands above") from None
    finally:
        for worker in workers:
            worker.kill()
    figures: dict[str, dict[str, Any]] = {}
    for name, rounds in taken.items():
        figures[name] = {"alone": spread([sum(one.values()) for one, _ in rounds])}
        figures[name]["together"] = spread([sum(all_.values()) for _, all_ in rounds])
        figures[name]["throughput"] = spread([sum(one.values()) / sum(all_.values()) for one, all_ in rounds])
        figures[name] |= {part: spread([all_[part] for _, all_ in rounds]) for part in PARTS}
    return figures


def _steps(
    workload: Workload, options: dict[str, Any], processes: Processes
) -> dict[str, Callable[[], dict[str, float]]]:
    """Of each step, what takes it: the seconds of its parts."""
    device = workload.x.device

    def timed(name: str) -> Callable[[], dict[str, float]]:
        laps: dict[str, float] = {}

        def lap(part: str) -> None:
            synchronize(device)
            laps[part] = time.perf_counter()

        step = training_step(workload, name, options, processes, lap)

        def take() -> dict[str, float]:
            lap("")
            step()
            ends = [laps[part] for part in ("", *PARTS)]
            return {part: ends[i + 1] - ends[i] for i, part in enumerate(PARTS)}

        return take

    return {name: timed(name) for name in SHARED_OUT}


def _work(channel: Connection, place: dict[str, str], target: str | None, options: dict[str, Any]) -> None:
    """Take the steps that the channel names, one after another; the seconds of their parts go back."""
    os.environ.update(place)
    torch.set_num_threads(max(1, options["threads"] // options["processes"]))
    with Processes.of_environment() as processes:
        processes.connect(10.0)
        workload = load_workload(target, options | {"device": processes.device(options["device"])})
        steps = _steps(workload, options, processes)
        while True:
            channel.send(steps[channel.recv()]())
