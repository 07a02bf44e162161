"""What a training step costs where several processes share it out, against one process. For bench.py."""

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from analysis.cost import load_workload, spread, synchronize, training_step
from experiment.processes import Processes

# The steps that are shared out: the one in which the sum weighs most, and ours.
SHARED_OUT = ("clean step", "DyART step")
# What a step is made of: passes through the network, the sum over processes, and clipping, optimizer and average.
PARTS = ("passes", "sum", "rest")


def measure_processes(target: str | None, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each step the seconds in one process with all threads, and shared out over processes with a share of them.

    `throughput` is that of the processes as a share of the one's, round by round; of the processes there are the
    seconds of each part as well (of the first of them). Raises ChildProcessError where one of them ends.
    """
    size, threads = options["processes"], options["threads"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    context = multiprocessing.get_context("spawn")
    workers, channels = [], []
    # The last one is the process that has no others.
    for rank in range(size + 1):
        alone = rank == size
        member = {"WORLD_SIZE": "1"} if alone else place | {"RANK": str(rank), "DYART_DISTRIBUTED": "1"}
        channel, remote = context.Pipe()
        share = threads if alone else max(1, threads // size)
        workers.append(context.Process(target=_work, args=(remote, member, share, target, options), daemon=True))
        workers[-1].start()
        remote.close()
        channels.append(channel)

    def run(members: list[Connection], name: str) -> list[dict[str, float]]:
        for member in members:
            member.send(name)
        return [member.recv() for member in members]

    taken: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {name: [] for name in SHARED_OUT}
    try:
        for number in tqdm(range(-1, options["rounds"]), desc="rounds", leave=False):
            for name in SHARED_OUT:
                (alone,) = run(channels[-1:], name)
                together = run(channels[:-1], name)[0]
                if number >= 0:
                    taken[name].append((alone, together))
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


def _work(
    channel: Connection, place: dict[str, str], threads: int, target: str | None, options: dict[str, Any]
) -> None:
    """Take the steps that the channel names, one after another; the seconds of each part go back."""
    os.environ.update(place)
    torch.set_num_threads(threads)
    with Processes.of_environment() as processes:
        processes.connect(10.0)
        options = options | {"device": processes.device(options["device"]), "examples": 0}
        workload = load_workload(target, options)
        device, laps = workload.x.device, {}

        def lap(part: str) -> None:
            synchronize(device)
            laps[part] = time.perf_counter()

        steps = {name: training_step(workload, name, options, processes, lap) for name in SHARED_OUT}
        while True:
            name = channel.recv()
            synchronize(device)
            before = time.perf_counter()
            steps[name]()
            times = [before, *(laps[part] for part in PARTS)]
            channel.send({part: times[i + 1] - times[i] for i, part in enumerate(PARTS)})
