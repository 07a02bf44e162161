"""Several evaluations at a time: what they find, whose deaths they survive, and how they share the work.

These run AutoAttack at its full length, as other processes do not see a short one; at such radii it is soon done.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
from evaluations import CPU, digits, figures, two_checkpoints
from torch import nn

import eval as eval_script
from data import Split
from evaluation import jobs
from evaluation.environment import versions
from evaluation.results import IDENTITY

ROOT = Path(__file__).parent.parent
SEVERAL = ["--eps", "128", "255", "--n", "16", "--batch-size", "1", "--checkpoint", "burn_in", "best", "-v", "custom"]
SEVERAL += ["--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_checkpoints(tmp_path)


def records_by_identity(folder: Path) -> list[dict[str, Any]]:
    records = json.loads((folder / "autoattack.json").read_text())
    return sorted(map(figures, records), key=lambda record: (record["checkpoint"], record["eps"]))


def test_jobs_find_what_one_process_finds_also_after_their_death(folder, monkeypatch):
    """Two jobs, cut by the death of the process that writes, then of one that attacks; against one job in one go."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, ROOT / "eval.py", folder, *SEVERAL, "--jobs", "2"]
    unfinished = folder / "autoattack.unfinished.json"

    def start() -> tuple[subprocess.Popen, list[int]]:
        """The command under way, and its workers."""
        before = unfinished.read_bytes() if unfinished.exists() else b""
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not unfinished.exists() or unfinished.read_bytes() == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return process, list(map(int, workers))

    def ends(pid: int) -> bool:
        for _ in range(1000):
            path = Path(f"/proc/{pid}/stat")
            if not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            time.sleep(0.01)
        return False

    process, workers = start()
    process.kill()
    process.communicate()
    assert len(workers) == 2
    assert all(map(ends, workers))

    process, workers = start()
    os.kill(workers[0], signal.SIGKILL)
    assert process.communicate()[1].endswith("eval.py: error: the process of an evaluation ended with -9\n")
    assert process.returncode == 2
    assert all(map(ends, workers))

    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "interrupted before, going on after " in finished.stdout
    assert not unfinished.exists()
    several = records_by_identity(folder)
    assert eval_script.main([str(folder), *SEVERAL, "--again"]) == 0
    assert several == records_by_identity(folder)
    assert len(several) == 4


def answer_at_once(channel: Any, *rest: Any) -> None:
    """A worker that finds out nothing, and quickly."""
    with contextlib.suppress(EOFError):
        while True:
            task, *_ = channel.recv()
            channel.send(("finish", pickle.loads(task).identity))


def test_jobs_that_finish_at_the_same_moment_share_what_is_left(monkeypatch):
    class Kept:
        unfinished_path = None
        records: list[dict[str, Any]] = []

        def unfinished(self, identity: dict[str, Any]) -> None:
            return None

        def finish(self, record: dict[str, Any]) -> None:
            self.records.append(record)

        save = finish

    def wait_for_all(channels: list[Any]) -> list[Any]:
        assert all(channel.poll(60) for channel in channels)
        return wait(channels)

    monkeypatch.setattr(jobs, "_work", answer_at_once)
    monkeypatch.setattr(jobs, "wait", wait_for_all)
    tasks = [jobs.Task(nn.Identity(), digits(), {"number": number}) for number in range(3)]
    found = list(jobs.evaluate_all(tasks, 2, Kept(), CPU, print))
    assert sorted(record["number"] for record in found) == [0, 1, 2]
    assert Kept.records == found


def test_jobs_refuse_damaged_progress_in_one_line(folder, monkeypatch):
    record = dict.fromkeys(IDENTITY) | {"date": ""}
    identities = []

    def note(model: nn.Module, test: Split, identity: dict[str, Any], *rest: Any) -> dict[str, Any]:
        identities.append(identity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "evaluate", note)
        assert eval_script.main([str(folder), *SEVERAL]) == 130
    path = folder / "autoattack.unfinished.json"
    kind = {"device": "cpu", "versions": versions()}
    path.write_text(json.dumps([record | identities[0] | kind | {"robust": "2"}]))
    with pytest.raises(ValueError, match=r"autoattack\.unfinished\.json: damaged; remove it[^\n]+$"):
        eval_script.main([str(folder), *SEVERAL, "--jobs", "2"])
