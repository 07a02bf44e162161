"""Several processes train one run: the same run as one process, whatever their number, however they end.

Real processes over gloo on this machine. With DYART_LARGE_TESTS=1: every method, number and precision, and 50 kills.
"""

import contextlib
import copy
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import exit_status, fork, fork_company, kill
from company import SmallNet, largest_difference, said, small, train_script, train_together
from evaluations import ShortAutoAttack
from runs import contents, differences, files, refusal, run_training, tiny, write_generated
from torch.distributed import run as torchrun

import eval as eval_script
import models
import train
from data import Split, load_data, loader
from dyart.losses import LOSSES
from evaluation import attack
from experiment import build, processes, state, validation
from experiment import folder as folder_module
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from experiment.processes import Processes, free_port
from experiment.settings import resolve
from experiment.signals import Interrupted, Signals

ROOT = Path(__file__).parents[1]
LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
KILLS = 50 if LARGE else 5

METHODS = {
    "clean": ["--method", "clean"],
    "dyart": ["--method", "dyart"],
    "dyart L2": ["--method", "dyart", "--norm", "L2"],
    "dyart shared": ["--method", "dyart", "--search", "shared"],
    "dyart fab": ["--method", "dyart", "--search", "fab", "--search-steps", "3"],
    "at": ["--method", "at", "--attack-iter", "2"],
    "trades": ["--method", "trades", "--attack-iter", "2"],
    "mart": ["--method", "mart", "--attack-iter", "2"],
    "n-fgsm": ["--method", "n-fgsm"],
    "fgsm-rs L2": ["--method", "fgsm-rs", "--norm", "L2"],
    "burn-in": ["--burn-in-epochs", "1", "--epochs", "1", "--track-dynamics", "1"],
    "generated data": ["--aux-data-filename", "GENERATED", "--unsup-fraction", "0.7"],
}


def flags_of(method: str, folder: Path) -> list[str]:
    """Of `METHODS`, with generated data in `folder`."""
    if "GENERATED" in METHODS[method]:
        write_generated(folder / "generated.npz")
    generated = str(folder / "generated.npz")
    return ["--group-norm", *(generated if flag == "GENERATED" else flag for flag in METHODS[method])]


@pytest.fixture(scope="module", autouse=True)
def loaded_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes are forked, and need not load again what this one has: images, and modules at their first use."""
    digits = load_data("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_data", lambda name, data_dir: digits)
        patch.setitem(models.MODELS, "small", SmallNet)
        patch.setattr(processes, "SEARCH", 0.5)
        assert run_training(*small(tmp_path_factory.mktemp("first"), "--track-dynamics", "1")) == 0
        yield


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loader, "to_input", lambda images, convert=loader.to_input: convert(images).double())
    monkeypatch.setattr(validation, "to_input", loader.to_input)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- The same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_processes_trains_the_same_run(method: str, tmp_path: Path, in_float64: None) -> None:
    flags = flags_of(method, tmp_path)
    sizes = (1, 2, 3, 4) if LARGE or method == "dyart" else (1, 3)
    for size in sizes:
        assert train_together(size, small(tmp_path / str(size), *flags), tmp_path / str(size)) == [0] * size
    one = Experiment.open(tmp_path / "1" / "run").read_metrics()
    assert one[-1]["grad_norm"] > 0 and (not method.startswith("dyart") or one[-1]["found"] > 0)
    for size in sizes[1:]:
        assert largest_difference(tmp_path / str(size) / "run", tmp_path / "1" / "run") < 1e-9
        for row, ours in zip(one, Experiment.open(tmp_path / str(size) / "run").read_metrics(), strict=True):
            for name in row.keys() - {"seconds", "peak_memory_mib", "stage"}:
                assert ours[name] == (row[name] and pytest.approx(row[name], rel=1e-6, abs=1e-9)), name


@pytest.mark.parametrize("method", METHODS if LARGE else ["dyart", "trades"])
def test_in_float32_the_order_of_sums_is_all_that_differs(method: str, tmp_path: Path) -> None:
    """Where a run does not hang on the last bit of its weights, as one of seed 0 does (AT's; docs/clusters.md)."""
    flags = [*flags_of(method, tmp_path), "--seed", "1"]
    for size in (1, 2, 3, 4) if LARGE else (1, 4):
        assert train_together(size, small(tmp_path / str(size), *flags), tmp_path / str(size)) == [0] * size
        assert largest_difference(tmp_path / str(size) / "run", tmp_path / "1" / "run") < 1e-3


@pytest.mark.skipif(not LARGE, reason="a minute of training for a figure of docs/clusters.md")
def test_in_float32_processes_are_no_further_apart_than_the_last_bit_of_the_weights(tmp_path: Path) -> None:
    """AT takes signs of gradients, which the last bit of a sum can turn; that tells in some runs, however they sum."""

    def change_last_bit(rank: int) -> None:
        def changed(settings: dict[str, Any], build_model: Callable = train.build_model) -> torch.nn.Module:
            model = build_model(settings)
            for parameter in model.parameters():
                parameter.data = torch.nextafter(parameter.data, torch.tensor(torch.inf))
            return model

        train.build_model = changed

    apart: dict[str, list[float]] = {"two processes": [], "the last bit": []}
    for seed in map(str, range(5)):
        flags = [*flags_of("at", tmp_path), "--seed", seed]
        for name, size, before in (("one", 1, None), ("two processes", 2, None), ("the last bit", 1, change_last_bit)):
            root = tmp_path / seed / name
            assert train_together(size, small(root, *flags), tmp_path / "said", before) == [0] * size
            if name in apart:
                apart[name].append(largest_difference(root / "run", tmp_path / seed / "one" / "run"))
    print(apart)
    assert statistics.median(apart["two processes"]) <= statistics.median(apart["the last bit"])


def test_the_sum_of_a_step_is_one(tmp_path: Path) -> None:
    """Gradients, statistics, loss, metrics and wishes go in it, whatever the method searches before."""

    def count(rank: int) -> None:
        def counted(run: Any, *args: Any, train_step: Callable = train.train_step) -> None:
            before = run.processes._sums
            train_step(run, *args)
            sums.append(run.processes._sums - before)
            (tmp_path / f"{rank}.txt").write_text(str(sums))

        sums: list[int] = []
        train.train_step = counted

    assert train_together(2, small(tmp_path), tmp_path / "said", count) == [0, 0]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [str([1] * 6)] * 2


def test_the_log_is_that_of_one_process(tmp_path: Path) -> None:
    """But for times, and for what the last digits do to figures that are rounded; the others say nothing."""
    logs, figures = [], []
    for size in (1, 2):
        assert train_together(size, small(tmp_path, "--group-norm"), tmp_path / str(size)) == [0] * size
        assert said(tmp_path / str(size))[1:] == [""] * (size - 1)
        text = (tmp_path / "run" / "train.log").read_text()
        text = re.sub(r"\d+ s$", "", re.sub(r"^\S+ \S+ ", "", text, flags=re.M), flags=re.M)
        logs.append(re.sub(r"\d+\.\d+", "x", text))
        figures.append(re.findall(r"\d+\.\d+", text))
        shutil.rmtree(tmp_path / "run")
    assert logs[0] == logs[1] and "finished: " in logs[0]
    assert len(figures[0]) > 8
    for one, two in zip(*figures, strict=True):
        last_digit = 10.0 ** -len(one.partition(".")[2])
        assert float(one) == pytest.approx(float(two), abs=1.01 * last_digit)


def test_each_process_has_statistics_of_its_own_whose_average_all_hold(tmp_path: Path) -> None:
    """A step of two processes, against what the halves of the batch give: gradients, BatchNorm, metrics, signals."""
    torch.manual_seed(0)
    model = SmallNet().train()
    x, y = torch.rand(7, 3, 32, 32), torch.randint(10, (7,))

    def step(rank: int) -> None:
        with Processes.of_environment() as together:
            together.connect(1)
            signals = Signals(in_company=True)
            if rank:
                os.kill(os.getpid(), signal.SIGUSR1)
            before = [buffer.clone() for buffer in model.buffers()]
            mine = together.rows(7)
            loss, metrics = LOSSES["clean"](model, x[mine], y[mine])
            metrics["margins"] = x[mine].mean((1, 2, 3))
            loss.backward()
            loss, metrics = together.add_up(model, before, loss, metrics, 7, signals)
            with pytest.raises(Interrupted, match=str(int(signal.SIGUSR1))):
                signals.check()
            grads = [parameter.grad for parameter in model.parameters()]
            torch.save([grads, list(model.buffers()), loss, metrics], tmp_path / f"{rank}.pt")

    assert [exit_status(pid) for pid in fork_company(2, step, tmp_path)] == [0, 0]
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not differences(ours, theirs)
    buffers, loss = [torch.zeros_like(buffer, dtype=torch.float32) for buffer in model.buffers()], 0
    for rows, share in ((slice(0, None, 2), 4 / 7), (slice(1, None, 2), 3 / 7)):
        half = copy.deepcopy(model)
        part = torch.nn.functional.cross_entropy(half(x[rows]), y[rows])
        loss = loss + share * part.detach()
        buffers = [total + share * buffer for total, buffer in zip(buffers, half.buffers(), strict=True)]
        (share * part).backward()
        for parameter, own in zip(model.parameters(), half.parameters(), strict=True):
            parameter.grad = own.grad if parameter.grad is None else parameter.grad + own.grad
    for got, wanted in zip(ours[0], model.parameters(), strict=True):
        assert torch.allclose(got, wanted.grad, atol=1e-6)
    for got, wanted in zip(ours[1], buffers, strict=True):
        assert torch.allclose(got.float(), wanted, atol=1e-6)
    assert torch.allclose(ours[2], loss) and torch.allclose(ours[3]["loss"], loss)
    assert torch.allclose(ours[3]["margins"], x.mean((1, 2, 3)))


def test_validation_counts_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    """Also where fewer images are right than there are processes, after which the noise goes on as with one."""
    torch.manual_seed(1)
    model = SmallNet().eval()
    split = load_data("digits")[0]
    split = Split(split.images[:50], split.labels[:50])
    settings = resolve({"dataset": "digits", "validation_batch_size": 9, "validation_attack_iter": 2})
    settings["attack_eps"] = 0.02

    def body(rank: int) -> None:
        with Processes.of_environment() as together:
            together.connect(1)
            scores = validation.validate(model, split, settings, Signals(in_company=together.connected), together)
            (tmp_path / f"{together.size}-{rank}").write_text(str(scores))

    found = []
    for size in (1, 2, 4):
        assert [exit_status(pid) for pid in fork_company(size, body, tmp_path)] == [0] * size
        found += [(tmp_path / f"{size}-{rank}").read_text() for rank in range(size)]
    assert len(set(found)) == 1 and "'val_clean': 0.0" not in found[0] and "'val_robust': 0.0," not in found[0]


def test_with_one_process_nothing_of_torch_distributed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "dist", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_training(*small(tmp_path, "--epochs", "1", "--track-dynamics", "1")) == 0


def test_an_environment_that_makes_no_company_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE 2 and RANK do not go together" in refusal(capsys, "--dataset", "digits")


def test_a_process_that_does_not_find_the_others_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 finds where they meet, and then rank 0 is gone."""

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("Connection was likely closed")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes.dist, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(Processes, "_name_of_this_start", lambda *_: "name")
    monkeypatch.setattr(processes.dist, "init_process_group", gone)
    assert exit_status(fork(lambda: train_script(small(tmp_path)), tmp_path / "said.txt")) == 2
    (line,) = (tmp_path / "said.txt").read_text().splitlines()
    assert line.endswith("error: rank 1 does not find the 2 processes of the run: Connection was likely closed")


# --- One voice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "none"], "argument --epochs: 'none' is not a whole number"),
        (["--resume", "nowhere"], "nowhere: no such experiment folder"),
        (["--train-subset", "100000"], "--train-subset 100000: there are"),
        (["--device", "cuda:0"], "--device cuda:0: 2 processes take a GPU each"),
        (["--sync-batch-norm"], "--sync-batch-norm: only on GPUs, not with --device cpu"),
    ],
)
def test_bad_input_is_refused_in_one_line_by_all(flags: list[str], words: str, tmp_path: Path) -> None:
    assert train_together(2, small(tmp_path / "out", *flags), tmp_path / "said") == [2, 2]
    (line,) = "".join(said(tmp_path / "said")).strip().splitlines()
    assert words in line and "rank" not in line
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_one_is_said_with_its_rank_and_ends_all(tmp_path: Path) -> None:
    """Also where one of them is late to ask: rank 0, who has the answer, waits for it."""

    def damage(rank: int) -> None:
        def no_data(*_: object) -> None:
            raise ValueError("the disk of this machine is empty")

        def late(*args: Any, what_happened: Callable = Processes._what_happened) -> Exception:
            time.sleep(0.5)
            return what_happened(*args)

        if rank == 2:
            build.load_data = no_data
        if rank == 1:
            Processes._what_happened = late

    assert train_together(3, small(tmp_path / "out"), tmp_path / "said", damage) == [2, 2, 2]
    (line,) = "".join(said(tmp_path / "said")).strip().splitlines()
    assert line.endswith("error: rank 2: the disk of this machine is empty")
    assert not (tmp_path / "out").exists()


def test_processes_with_other_data_do_not_train_together(tmp_path: Path) -> None:
    def change(rank: int) -> None:
        train_split, test = load_data("digits")
        if rank:
            build.load_data = lambda name, data_dir: (Split(train_split.images, train_split.labels.flip(0)), test)

    assert train_together(2, small(tmp_path / "out"), tmp_path / "said", change) == [2, 2]
    assert "rank 1 has other weights or images than rank 0" in said(tmp_path / "said")[0]


def test_two_runs_of_several_processes_never_share_a_folder(tmp_path: Path) -> None:
    assert train_together(1, small(tmp_path, "--epochs", "1", "--scheduler", "constant"), tmp_path / "first") == [0]
    with Experiment.open(tmp_path / "run", lock="train"):
        before = files(tmp_path / "run")
        for flags in (["--resume", str(tmp_path / "run")], small(tmp_path, "--epochs", "1", "--if-exists", "resume")):
            assert train_together(2, [*flags, "--scheduler", "constant"], tmp_path / "second") == [2, 2]
            (line,) = "".join(said(tmp_path / "second")).strip().splitlines()
            assert f"{tmp_path / 'run'} is in use: process {os.getpid()}" in line
        assert files(tmp_path / "run") == before


@contextlib.contextmanager
def held_on_another_machine(folder: Path) -> Iterator[int]:
    """The folder's lock, held by a process (its number) that says it is on node7; until it is killed."""

    def hold() -> None:
        socket.gethostname = lambda: "node7"
        with Experiment.open(folder, lock="train"):
            (folder.parent / "held").touch()
            signal.pause()

    pid = fork(hold)
    while not (folder.parent / "held").exists():
        time.sleep(0.01)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            kill(pid)


def test_if_exists_resume_waits_for_the_lock_of_a_machine_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes it when that has ended, not before; started by hand, or where it does not end, it is refused."""
    monkeypatch.setattr(folder_module, "POLL", 0.02)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    argv = small(tmp_path, "--method", "clean", "--epochs", "1", "--scheduler", "constant", "--if-exists", "resume")
    assert train_together(1, argv, tmp_path / "said") == [0]
    with held_on_another_machine(tmp_path / "run") as pid:
        before = files(tmp_path / "run")
        refused = f"{tmp_path / 'run'} is in use: process {pid} on node7 has it for train"
        waiting = f"{refused}; waiting {{}} minutes at most, in case that machine is lost"
        by_hand = ["--resume", str(tmp_path / "run"), "--epochs", "2"]
        monkeypatch.setattr(state, "LEASE", 0.06)
        for flags, expected in ((by_hand, []), (argv, [waiting.format(0.001)])):
            assert train_together(2, flags, tmp_path / "said") == [2, 2]
            *lines, last = "".join(said(tmp_path / "said")).strip().splitlines()
            assert last.endswith(f"error: {refused}, or that machine is lost and its lock has not ended yet")
            assert lines == expected and files(tmp_path / "run") == before

        monkeypatch.setattr(state, "LEASE", 60.0)
        outputs = tmp_path / "waiting"
        company = fork_company(2, lambda rank: train_script(argv), outputs)
        while not said(outputs)[0]:
            time.sleep(0.01)
        assert said(outputs)[0].strip() == waiting.format(1) and files(tmp_path / "run") == before
        kill(pid)
        assert statuses_within(30, company) == [0, 0]
    assert "nothing left to do, all 1 epochs are finished" in said(outputs)[0]


# --- A run that survives ----------------------------------------------------------------------------------------------

KILLED = ["--burn-in-epochs", "1", "--epochs", "1", "--checkpoint-minutes", "1e-9", "--group-norm"]
KILLED += ["--if-exists", "resume"]


def statuses_within(seconds: float, pids: list[int]) -> list[int]:
    """The exit statuses of forked processes, which have so long to end."""
    until = time.monotonic() + seconds
    found = dict.fromkeys(pids)
    while None in found.values():
        assert time.monotonic() < until, f"still running: {[pid for pid in pids if found[pid] is None]}"
        for pid in (pid for pid in pids if found[pid] is None):
            ended, status = os.waitpid(pid, os.WNOHANG)
            found[pid] = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.01)
    return list(found.values())


def test_kill_9_of_any_process_at_any_moment_ends_all_and_the_folder_goes_on(tmp_path: Path) -> None:
    """With two processes bit for bit as one that was not killed; with another number, up to the order of sums."""
    seed = random.SystemRandom().randrange(1000)
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    started = time.monotonic()
    assert train_together(2, small(tmp_path / "whole", *KILLED), tmp_path / "said") == [0, 0]
    duration = time.monotonic() - started
    whole = contents(tmp_path / "whole" / "run")

    kills = runs = 0
    while kills < KILLS:
        root, sizes = tmp_path / str(runs), [2] if runs % 2 == 0 else [1, 3, 2]
        argv = small(root, *KILLED)
        while kills < KILLS:
            size = moments.choice(sizes)
            pids = fork_company(size, lambda rank, argv=argv: train_script(argv), tmp_path / "said")
            time.sleep(moments.uniform(0, 0.7 * duration))
            victim = moments.choice(pids)
            os.kill(victim, signal.SIGKILL)
            # As torchrun does, before or after they notice by themselves; who has not found the others yet does not.
            time.sleep(moments.choice([0, 1]))
            for pid in pids:
                os.kill(pid, signal.SIGTERM)  # one that has ended is there until it is waited for
            statuses = statuses_within(30, pids)
            if statuses == [0] * size:
                break
            kills += 1
            assert statuses.pop(pids.index(victim)) in (-signal.SIGKILL, 0)
            # One that has not begun to train ends as with bad input, or of the signal; one that was through, well.
            assert set(statuses) <= {0, 1, 2, -signal.SIGTERM}, said(tmp_path / "said")
        assert train_together(2, argv, tmp_path / "said") == [0, 0]
        if sizes == [2]:
            assert not differences(contents(root / "run"), whole)
        else:
            assert largest_difference(root / "run", tmp_path / "whole" / "run") < 1e-3
        runs += 1


def at_step(step: int, action: Callable[[int], None]) -> Callable[[int], None]:
    """For `train_together`: in each process, `action` of its rank in the midst of step number `step`."""

    def prepare(rank: int) -> None:
        original, steps = train.LOSSES["clean"], []

        def loss(*args: Any, **kwargs: Any) -> Any:
            steps.append(None)
            if len(steps) == step:
                action(rank)
            return original(*args, **kwargs)

        train.LOSSES["clean"] = loss

    return prepare


def test_a_killed_process_is_named_by_the_others_which_end_by_themselves(tmp_path: Path) -> None:
    prepare = at_step(3, lambda rank: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)
    argv = small(tmp_path, "--method", "clean")
    pids = fork_company(3, lambda rank: prepare(rank) or train_script(argv), tmp_path / "said")
    assert statuses_within(30, pids) == [1, -signal.SIGKILL, 1]
    assert "stopped: rank 1 of 3 processes is gone" in (tmp_path / "run" / "train.log").read_text()
    assert said(tmp_path / "said")[2] == ""


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_process_that_hangs_is_named_and_ends_the_run(hanging: int, tmp_path: Path) -> None:
    prepare = at_step(2, lambda rank: os.kill(os.getpid(), signal.SIGSTOP) if rank == hanging else None)
    argv = small(tmp_path, "--method", "clean", "--process-timeout-minutes", "0.03")

    pids = fork_company(3, lambda rank: prepare(rank) or train_script(argv), tmp_path / "said")
    stopped = pids.pop(hanging)
    try:
        assert statuses_within(30, pids) == [1, 1]
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert exit_status(stopped) == -signal.SIGKILL
    text = "\n".join(said(tmp_path / "said"))
    line = f"stopped: waited 0.03 minutes for rank {hanging} of 3 processes (--process-timeout-minutes)"
    assert text.count("stopped: ") == text.count(line) == 1
    if hanging:
        assert line in (tmp_path / "run" / "train.log").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a clean run of three processes that nothing disturbs ends with."""
    root = tmp_path_factory.mktemp("whole")
    assert train_together(3, small(root, "--method", "clean"), root) == [0] * 3
    return contents(root / "run")


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, [1]), (signal.SIGUSR1, [0]), (signal.SIGTERM, [0, 1, 2])])
def test_a_signal_to_any_or_all_stops_all_after_the_same_step(
    number: int, to: list[int], tmp_path: Path, whole: dict[str, Any]
) -> None:
    action = at_step(2, lambda rank: os.kill(os.getpid(), number) if rank in to else None)
    argv = small(tmp_path, "--method", "clean")
    assert train_together(3, argv, tmp_path / "said", action) == [128 + number] * 3
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["progress"]["step"] == 2
    assert f"stopped by {signal.Signals(number).name}; go on with" in (tmp_path / "run" / "train.log").read_text()
    assert train_together(3, ["--resume", str(tmp_path / "run")], tmp_path / "said") == [0] * 3
    assert not differences(contents(tmp_path / "run"), whole)


def test_generated_data_that_changes_while_several_train_ends_all_in_one_line(tmp_path: Path) -> None:
    """And with the file as it was the run goes on, bit for bit."""
    write_generated(path := tmp_path / "x.npz")
    content = path.read_bytes()
    flags = ["--method", "clean", "--aux-data-filename", str(path), "--checkpoint-minutes", "1e-9"]
    assert train_together(2, small(tmp_path / "whole", *flags), tmp_path / "said") == [0, 0]
    truncate = at_step(2, lambda rank: os.truncate(path, 20_000) if rank else None)
    assert train_together(2, small(tmp_path, *flags), tmp_path / "said", truncate) == [2, 2]
    (line,) = (line for line in "".join(said(tmp_path / "said")).splitlines() if "error" in line)
    assert re.search(f"error: (rank 1: )?{path}.* (no longer holds image|was replaced or changed)", line)
    path.write_bytes(content)
    assert train_together(2, ["--resume", str(tmp_path / "run")], tmp_path / "said") == [0, 0]
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole" / "run"))


def test_a_step_is_skipped_by_all_where_it_is_bad_for_one(tmp_path: Path) -> None:
    def bad(rank: int) -> None:
        original, steps = train.LOSSES["clean"], []

        def loss(*args: Any, **kwargs: Any) -> Any:
            steps.append(None)
            loss, metrics = original(*args, **kwargs)
            return (loss * math.nan if len(steps) == 2 and rank else loss), metrics

        train.LOSSES["clean"] = loss

    assert train_together(2, small(tmp_path, "--method", "clean"), tmp_path / "said", bad) == [0, 0]
    assert [row["bad_steps"] for row in Experiment.open(tmp_path / "run").read_metrics()] == [1, 1]


# --- torchrun ---------------------------------------------------------------------------------------------------------


def test_a_restart_does_not_hear_what_was_said_before(tmp_path: Path) -> None:
    """torchrun keeps one store for all its restarts; here rank 1 of the second start looks there before rank 0 does."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    argv = small(tmp_path, "--method", "clean", "--if-exists", "resume", "--checkpoint-minutes", "1e-9")

    def member(rank: int, prepare: Callable[[int], Any]) -> int:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
        prepare(rank)
        return train_script(argv)

    def start(prepare: Callable[[int], Any]) -> list[int]:
        return fork_company(2, lambda rank: member(rank, prepare), tmp_path / "said")

    killed = at_step(2, lambda rank: os.kill(os.getpid(), signal.SIGKILL) if rank else None)
    assert statuses_within(30, start(killed)) == [1, -signal.SIGKILL]
    assert statuses_within(30, start(lambda rank: time.sleep(0.5 * (rank == 0)))) == [0, 0]
    assert "resume: from" in (tmp_path / "run" / "train.log").read_text()


def workers(agent: int) -> dict[int, int]:
    """The processes that a torchrun has started, by rank."""
    found = {}
    for task in Path(f"/proc/{agent}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
                found |= {int(rank[1]): int(child)} if rank else {}
    return found


@pytest.mark.parametrize("nodes", [1, 2] if LARGE else [2])
def test_under_torchrun_a_run_whose_worker_is_killed_finishes_by_itself(
    nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two agents as two machines. Bit for bit as a run that was not disturbed."""
    flags = ["--group-norm", "--method", "at", "--attack-iter", "1", "--checkpoint-minutes", "1e-9"]
    flags += ["--epochs", "3", "--if-exists", "resume"]
    assert train_together(2, tiny(tmp_path / "whole", *flags), tmp_path / "said") == [0, 0]
    port = free_port()
    command = ["--max-restarts", "3", "--monitor-interval", "0.1", "--nnodes", str(nodes)]
    command += ["--nproc-per-node", str(2 // nodes), "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", str(ROOT / "train.py"), *tiny(tmp_path, *flags)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Forked, the agents need not import PyTorch again; their workers do.
    agents = [fork(lambda: torchrun.main(command), tmp_path / f"agent-{node}.txt") for node in range(nodes)]
    try:
        until = time.monotonic() + 300
        while not (tmp_path / "run" / "latest.pt").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        victims = {rank: pid for agent in agents for rank, pid in workers(agent).items()}
        os.kill(victims[1], signal.SIGKILL)
        assert statuses_within(300, agents) == [0] * nodes
    except BaseException:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                kill(agent)
        raise
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("resume: from") == 1 and text.count("finished: ") == 1
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole" / "run"))


def under_torchrun(size: int, argv: list[str]) -> list[int]:
    """Train in so many processes that torchrun starts; its exit status for each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.run([*command, str(ROOT / "train.py"), *argv], env=environment).returncode] * size


@pytest.mark.parametrize("by_torchrun", [False, True] if LARGE else [False], ids=str)
def test_generated_data_from_training_through_another_number_of_processes_to_evaluation(
    by_torchrun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes begin, three go on: the run of one process, up to the order of sums, and the weights evaluated."""
    write_generated(tmp_path / "x.npz")
    flags = ["--group-norm", "--aux-data-filename", str(tmp_path / "x.npz"), "--unsup-fraction", "0.7", "--seed", "1"]
    flags += ["--scheduler", "constant"]
    argv_of = tiny if by_torchrun else small

    def start(size: int, argv: list[str]) -> list[int]:
        return under_torchrun(size, argv) if by_torchrun else train_together(size, argv, tmp_path / "said")

    assert train_together(1, argv_of(tmp_path / "one", *flags, "--epochs", "2"), tmp_path / "said") == [0]
    assert start(2, argv_of(tmp_path, *flags, "--epochs", "1")) == [0, 0]
    assert start(3, ["--resume", str(tmp_path / "run"), "--epochs", "2"]) == [0, 0, 0]
    assert largest_difference(tmp_path / "run", tmp_path / "one" / "run") < 1e-3
    assert "resume: from" in (tmp_path / "run" / "train.log").read_text()

    monkeypatch.setattr(attack, "AutoAttack", ShortAutoAttack)
    evaluation = [str(tmp_path / "run"), "--eps", "8", "--n", "12", "--batch-size", "6", "-v", "custom"]
    assert eval_script.main([*evaluation, "--device", "cpu", "--checkpoint", "best"]) == 0
    (record,) = json.loads((tmp_path / "run" / "autoattack.json").read_text())
    model = build.build_model(Experiment.open(tmp_path / "run").settings).eval()
    model.load_state_dict(load_checkpoint(tmp_path / "run" / "best.pt")["average"])
    x, y = (part[:12] for part in load_data("digits")[1])
    right = (model(loader.to_input(x)).argmax(1) == y).double().mean().item()
    assert record["clean_accuracy"] == right >= record["robust_accuracy"]


@pytest.mark.skipif(not LARGE, reason="another quarter of a minute of starting processes")
def test_sigterm_to_torchrun_itself_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Which is how a cluster ends a job: torchrun hands it on to its workers, and does not start them again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", str(ROOT / "train.py"), *tiny(tmp_path, "--epochs", "100", "--method", "clean")]
    agent = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "latest.pt").exists():
            assert time.monotonic() < until and agent.poll() is None
            time.sleep(0.02)
        agent.terminate()
        assert agent.wait(60) != 0
    finally:
        agent.kill()
        agent.wait()
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("stopped by SIGTERM; go on with") == 1 and "finished: " not in text


# --- --if-exists resume -----------------------------------------------------------------------------------------------


def test_if_exists_resume_makes_a_folder_goes_on_with_it_and_refuses_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = small(tmp_path, "--method", "clean", "--if-exists", "resume")
    assert run_training(*argv) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert run_training(*argv, "--save-every", "7") == 0  # a setting that may change
    assert "nothing left to do, all 2 epochs are finished" in capsys.readouterr().out
    error = refusal(capsys, *argv, "--lr", "0.3", "--seed", "4")
    assert f"--if-exists resume: {tmp_path / 'run'} is a run with other settings, --lr 0.1, --seed 0" in error
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_if_exists_resume_takes_over_a_folder_that_was_not_begun_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = small(tmp_path, "--method", "clean", "--if-exists", "resume", "--epochs", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".args.yaml.0123.tmp").write_text("half")
    assert run_training(*argv) == 0
    assert (tmp_path / "run" / "best.pt").exists() and not list((tmp_path / "run").glob("*.tmp"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "mine exists and is not overwritten" in refusal(capsys, *argv, "--name", "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_free_port_is_one_that_nobody_has_and_that_is_given_to_nobody_else() -> None:
    port = free_port()
    assert 15000 <= port < 32000
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random.SystemRandom, "sample", lambda *_: [port, port])
            with pytest.raises(OSError, match="none of 2 ports"):
                free_port()
            patch.setattr(random.SystemRandom, "sample", lambda *_: [port, port + 1, port + 2])
            assert free_port() in (port + 1, port + 2)
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    assert not given.exists() or int(given.read_text().split()[0]) >= 32000
