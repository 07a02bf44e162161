"""kill -9 of training at random moments, again and again: it ends as if nothing had happened (eval.py: test_eval.py).

20 kills; 200 with DYART_LARGE_TESTS=1. The moments come from a seed that is printed where the test fails, but what a
process is doing at a moment is up to the machine.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import exit_status, fork
from runs import contents, differences, tiny

import train
from experiment.folder import Experiment

KILLS = 200 if os.environ.get("DYART_LARGE_TESTS") == "1" else 20


def timed(body: Callable[[], Any]) -> float:
    """Let a forked process run to its end; how long it took, in seconds."""
    started = time.monotonic()
    assert exit_status(fork(body)) == 0
    return time.monotonic() - started


def killed(body: Callable[[], Any], after: float) -> bool:
    """Start a process and kill it after some seconds; False where it has ended, well, before that."""
    pid = fork(body)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    status = exit_status(pid)
    assert status in (-signal.SIGKILL, 0)
    return status != 0


@pytest.fixture
def moments() -> random.Random:
    seed = random.SystemRandom().randrange(1000)
    print(f"seed of the moments: {seed}")
    return random.Random(seed)


def test_training_survives_kill_9_at_any_moment(tmp_path: Path, moments: random.Random) -> None:
    flags = ["--burn-in-epochs", "1", "--epochs", "1", "--train-subset", "32", "--checkpoint-minutes", "1e-9"]
    duration = timed(lambda: train.main(tiny(tmp_path / "whole", *flags)))
    whole = contents(tmp_path / "whole" / "run")

    kills = runs = 0
    while kills < KILLS:
        root = tmp_path / str(runs)
        folder = root / "run"

        def go_on(root: Path = root, folder: Path = folder) -> int:
            if (folder / "args.yaml").exists():
                return train.main(["--resume", str(folder)])
            if folder.exists():  # killed before its settings were written, and so before anything else
                for path in folder.iterdir():
                    assert path.name == ".lock" or path.name.startswith(".args.yaml.")
                    path.unlink()
                folder.rmdir()
            return train.main(tiny(root, *flags))

        # The last run is let to its end after the last kill.
        while kills < KILLS and killed(go_on, moments.uniform(0, duration / 2)):
            kills += 1
            if (folder / "args.yaml").exists():
                Experiment.open(folder).load_latest()
        timed(go_on)
        assert not differences(contents(folder), whole)
        runs += 1
