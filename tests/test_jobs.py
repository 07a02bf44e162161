"""Evaluations by several processes: what they find, whose deaths they survive, and how they share the work.

Those with real processes run AutoAttack at its full length, as other processes do not see a short one; at such radii it
is soon done. With DYART_LARGE_TESTS=1: also a single evaluation, killed in the same way.
"""

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import (
    CPU,
    Rough,
    ShortAutoAttack,
    digits,
    evaluate,
    figures,
    identity,
    learn_digits,
    two_checkpoints,
)
from torch import nn

import eval as eval_script
from data import Split
from evaluation import attack
from evaluation import jobs as jobs_module
from evaluation.environment import device_name, versions
from evaluation.results import IDENTITY, Results

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
ROOT = Path(__file__).parent.parent
SEVERAL = ["--eps", "128", "255", "--n", "40", "--batch-size", "1", "--checkpoint", "burn_in", "best", "-v", "custom"]
SEVERAL += ["--device", "cpu"]
SINGLE = ["--eps", "128", "--n", "60", "--batch-size", "1", "-v", "custom", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_checkpoints(tmp_path)


def records_by_identity(folder: Path) -> list[dict[str, Any]]:
    records = json.loads((folder / "autoattack.json").read_text())
    return sorted(map(figures, records), key=lambda record: (record["checkpoint"], record["eps"]))


@pytest.mark.parametrize("which", [SEVERAL, SINGLE] if LARGE else [SEVERAL], ids=len)
def test_jobs_find_what_one_process_finds_also_after_their_death(folder, monkeypatch, which):
    """Two jobs, cut by the death of the process that writes, then of one that attacks; against one job in one go."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, ROOT / "eval.py", folder, *which, "--jobs", "2"]
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
    assert eval_script.main([str(folder), *which, "--again"]) == 0
    assert several == records_by_identity(folder)
    assert len(several) == (1 if which is SINGLE else 4)


def answer_at_once(channel: Any, device: torch.device, threads: int, own_models: list[str]) -> None:
    """A worker that finds out on which device it is, and quickly."""
    with contextlib.suppress(EOFError):
        while True:
            task, batch = pickle.loads(channel.recv_bytes())
            channel.send((batch, str(device), task is not None))


class Numbered:
    """Stands for an evaluation: two rounds of batches, the second after all of the first are answered."""

    made: list["Numbered"] = []

    def __init__(self, test: Split, identity: dict[str, Any], *rest: Any):
        self.record, self.answers, self.handed_out = identity, [], 0
        self.bar_position, self.finished = rest[-1], False
        self.made.append(self)

    def __enter__(self) -> "Numbered":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def tick(self) -> None:
        pass

    def next_batch(self) -> tuple[int, int] | None:
        n = self.record["n"]
        if self.handed_out == 2 * n or (self.handed_out == n and len(self.answers) < n):
            return None
        self.handed_out += 1
        return self.record["number"], self.handed_out - 1

    def add(self, batch: tuple[int, int], answer: Any) -> None:
        assert answer[0] == batch
        self.answers.append(answer)
        self.finished = len(self.answers) == 2 * self.record["n"]


@pytest.mark.parametrize(("tasks", "n", "jobs"), [(1, 2, 5), (3, 3, 2)])
def test_processes_share_the_batches_of_an_evaluation_and_the_devices(monkeypatch, tasks, n, jobs):
    def wait_for_all(channels: list[Any], timeout: float | None = None) -> list[Any]:
        assert all(channel.poll(60) for channel in channels)
        return wait(channels)

    monkeypatch.setattr(Numbered, "made", [])
    monkeypatch.setattr(jobs_module, "_work", answer_at_once)
    monkeypatch.setattr(jobs_module, "wait", wait_for_all)
    monkeypatch.setattr(jobs_module, "Evaluation", Numbered)
    todo = [jobs_module.Task(nn.Identity(), digits(), {"number": i, "n": n, "batch_size": 1}) for i in range(tasks)]
    devices = [torch.device("cpu"), torch.device("cuda:3")]
    found = list(jobs_module.evaluate_all(todo, jobs, None, devices, print))
    assert [record["number"] for record in found] == list(range(tasks))
    for number, evaluation in enumerate(Numbered.made):
        assert sorted(batch for batch, _, _ in evaluation.answers) == [(number, i) for i in range(2 * n)]
        assert {device for _, device, _ in evaluation.answers} == {"cpu", "cuda:3"}
    # A model goes to a process once, and again where it has had another between.
    sent = sum(with_task for evaluation in Numbered.made for _, _, with_task in evaluation.answers)
    assert sent == min(jobs, n) if tasks == 1 else sent < 2 * tasks + 4


@pytest.mark.parametrize("seed", range(4))
def test_batches_answered_in_any_order_give_the_record_of_one_process(tmp_path, monkeypatch, seed):
    """Also where the process that writes dies again and again: what is on disk is always a beginning of that record."""
    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)
    model, what, rng = learn_digits(Rough), identity(n=40, batch_size=4), random.Random(seed)
    (tmp_path / "one").mkdir()
    whole = evaluate(model, digits(), tmp_path / "one", n=40, batch_size=4)
    assert 0 < whole["robust_accuracy"] < whole["clean_accuracy"] < 1
    attackers = [attack.Attacker(model, digits(), what, CPU) for _ in range(3)]
    lives = 0
    while True:
        results, lives = Results(tmp_path / "autoattack"), lives + 1
        lives_on, under_way = rng.randrange(3, 12), []
        with attack.Evaluation(digits(), what, results, [CPU], lambda message: None) as evaluation:
            while not evaluation.finished and lives_on:
                while len(under_way) < 3 and (batch := evaluation.next_batch()) is not None:
                    under_way.append(batch)
                batch = under_way.pop(rng.randrange(len(under_way)))
                evaluation.add(batch, attackers[lives_on % 3](batch))
                lives_on -= 1
        if evaluation.finished:
            break
    assert lives > 2
    assert figures(evaluation.record) == figures(whole)
    assert [figures(record) for record in Results(tmp_path / "autoattack").records] == [figures(whole)]


def test_jobs_refuse_damaged_progress_in_one_line(folder, monkeypatch):
    record = dict.fromkeys(IDENTITY) | {"date": ""}
    identities = []

    def note(model: nn.Module, test: Split, identity: dict[str, Any], *rest: Any) -> dict[str, Any]:
        identities.append(identity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs_module, "evaluate", note)
        assert eval_script.main([str(folder), *SEVERAL]) == 130
    path = folder / "autoattack.unfinished.json"
    kind = {"device": device_name(torch.device("cpu")), "versions": versions()}
    path.write_text(json.dumps([record | identities[0] | kind | {"robust": "2"}]))
    with pytest.raises(ValueError, match=r"autoattack\.unfinished\.json: damaged; remove it[^\n]+$"):
        eval_script.main([str(folder), *SEVERAL, "--jobs", "2"])
