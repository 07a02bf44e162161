"""AutoAttack on checkpoints: the figures, interruptions, the checkpoints of others, and bad input.

With DYART_LARGE_TESTS=1: 200 kills instead of 20, and 1,000 mutated result files instead of 50.
"""

import copy
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyautoattack import AutoAttack
from pyautoattack.state import EvaluationState
from torch import Tensor, nn
from tqdm import tqdm

import eval as evaluation
from data import DATASETS, Split, load_data, to_input
from dyart.experiment import Experiment, save_checkpoint
from models import create_model

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


class ShortAutoAttack(AutoAttack):
    """AutoAttack with so few steps that each of its attacks leaves something to the next."""

    queries = 30

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 2
        self.fab.n_iter = 2
        self.square.n_queries = self.queries


@pytest.fixture(autouse=True)
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "AutoAttack", ShortAutoAttack)


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_data("digits")[1]


class Rough(nn.Module):
    """Ripples, on which short attacks get stuck at different places."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(50 * x) / 50


class Stairs(nn.Module):
    """Steps with no gradient: only Square, which asks for none, finds its way."""

    def forward(self, x: Tensor) -> Tensor:
        return (6 * x).round() / 6


def learn_digits(first: nn.Module, digits: Split) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(first, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = to_input(digits.images), digits.labels
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def toy(digits: Split) -> nn.Module:
    return learn_digits(Rough(), digits)


def identity(**changes: Any) -> dict[str, Any]:
    radius = evaluation.parse_eps(changes.pop("text", "20"), changes.get("norm", "Linf"))
    values = {"dataset": "digits", "model": "toy", "group_norm": False, "normalize": False, "checkpoint": "best.pt"}
    values |= {"sha256": "0" * 64, "weights": "average", "norm": "Linf", "eps": radius.eps, "eps_text": radius.text}
    return values | {"version": "standard", "n": 30, "seed": 3, "batch_size": 8} | changes


def evaluate(model: nn.Module, test: Split, folder: Path, **changes: Any) -> dict[str, Any]:
    results = evaluation.Results(folder / "autoattack")
    return evaluation.evaluate(model, test, identity(**changes), results, CPU, lambda message: None)


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when and how often an evaluation was interrupted."""
    return {name: value for name, value in record.items() if name not in ("seconds", "date")}


# --- The figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "norm", "text", "effective"),
    [
        (Rough, "Linf", "20", ["apgd-ce", "apgd-t", "fab-t"]),
        (Rough, "L2", "3.5", ["apgd-ce", "apgd-t", "fab-t"]),
        (Stairs, "Linf", "16", ["square"]),
    ],
)
def test_the_figures_are_those_of_one_straight_run_of_autoattack(
    digits, tmp_path, caplog, monkeypatch, first, norm, text, effective
):
    monkeypatch.setattr(ShortAutoAttack, "queries", 200)
    model = learn_digits(first(), digits)
    record = evaluate(model, digits, tmp_path, norm=norm, text=text, n=60, batch_size=16)

    x, y = to_input(digits.images[:60]), digits.labels[:60]
    attack = ShortAutoAttack(model, norm=norm, eps=record["eps"], seed=3, version="standard")
    with caplog.at_level(logging.DEBUG, logger="auto-attack"):
        _, predicted = attack.run_standard_evaluation(x, y, batch_size=16)
    lines = re.findall(r"(?:initial|robust) accuracy(?: after (\S+))?: ([0-9.]+)%", caplog.text)
    expected = {name.lower() or "clean": percent for name, percent in lines[:5]}

    assert list(expected) == ["clean", *evaluation.VERSIONS["standard"]]
    mine = {"clean": record["clean_accuracy"], **record["robust_accuracy_after"]}
    assert {name: f"{100 * value:.2f}" for name, value in mine.items()} == expected
    assert record["robust_accuracy"] == pytest.approx((predicted == y).float().mean().item())
    # Otherwise the comparison would say little: there is something to find, and something left.
    steps = list(mine.values())
    for name in effective:
        assert mine[name] < steps[list(mine).index(name) - 1]
    assert record["robust_accuracy"] > 0


def test_the_settings_are_those_of_the_standard_version(toy):
    ours = evaluation.autoattack(toy, norm="Linf", eps=0.1, seed=0, num_classes=10, device="cpu")
    standard = AutoAttack(toy, norm="Linf", eps=0.1, seed=0, version="standard")
    for part in ("apgd", "apgd_targeted", "fab", "square"):
        mine, theirs = vars(getattr(ours, part)), vars(getattr(standard, part))
        shortened = ("n_iter", "n_queries")
        assert {k: v for k, v in mine.items() if k not in shortened} == {
            k: v for k, v in theirs.items() if k not in shortened
        }
    assert ours.attacks_to_run == standard.attacks_to_run == evaluation.VERSIONS["standard"]
    assert set(standard.attacks_to_run) - set(evaluation.VERSIONS["custom"]) == {"square"}


@pytest.mark.parametrize("classes", [4, 6])
def test_fewer_than_ten_classes_have_fewer_targets(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).requires_grad_(False)
    x = torch.rand(20, 3, 4, 4)
    y = model(x).argmax(dim=1)
    attack = evaluation.autoattack(model, norm="Linf", eps=1e-6, seed=0, num_classes=classes, device="cpu")
    for name in ("apgd-t", "fab-t"):
        attack.attacks_to_run = [name]
        _, predicted = attack.run_standard_evaluation(x, y)
        assert (predicted == y).all()
    with pytest.raises(ValueError, match="3 classes: AutoAttack's targeted attacks need at least 4"):
        evaluation.autoattack(model, norm="Linf", eps=0.1, seed=0, num_classes=3, device="cpu")


def test_a_model_that_nothing_withstands_is_evaluated_to_zero(toy, digits, tmp_path):
    record = evaluate(toy, digits, tmp_path, text="255", n=10)
    assert record["robust_accuracy"] == 0
    assert list(record["robust_accuracy_after"]) == evaluation.VERSIONS["standard"]


def test_what_autoattack_warns_of_is_kept_once(digits, tmp_path):
    class Dead(nn.Module):
        """Constant in its input: the targeted attacks find zero gradients, which AutoAttack warns of."""

        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :10] + torch.arange(10.0)

    test = Split(digits.images[:20], torch.full((20,), 9))
    messages: list[str] = []
    results = evaluation.Results(tmp_path / "autoattack")
    record = evaluation.evaluate(Dead(), test, identity(n=20), results, CPU, messages.append)
    assert [w for w in record["warnings"] if "zero gradient" in w] == [record["warnings"][0]]
    assert sum("zero gradient" in message for message in messages) == 1


# --- Interruptions ----------------------------------------------------------------------------------------------------


def test_pyautoattacks_own_state_cannot_be_restored(toy, digits, tmp_path):
    """Why evaluate keeps its own. When this fails, pyautoattack has been mended."""
    state = EvaluationState({"apgd-ce"}, path=tmp_path / "state.json")
    state.robust_flags = torch.ones(4, dtype=torch.bool)
    assert EvaluationState.from_disk(tmp_path / "state.json").attacks_to_run == "{'apgd-ce'}"
    attack = AutoAttack(toy, version="custom", attacks=["apgd-ce"], seed=0)
    with pytest.raises(ValueError, match="different set of attacks"):
        attack.run_standard_evaluation(
            to_input(digits.images[:4]), digits.labels[:4], state_path=tmp_path / "state.json"
        )


def test_an_evaluation_cut_at_any_write_goes_on_to_the_same_record(toy, digits, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = evaluate(toy, digits, tmp_path / "whole", n=20)
    write, writes = evaluation.write_json, 0

    def counted(path: Path, value: Any) -> None:
        nonlocal writes
        writes += 1
        write(path, value)
        if writes == cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_json", counted)
    for cut in range(1, 1000):
        writes = 0
        folder = tmp_path / str(cut)
        folder.mkdir()
        try:
            evaluate(toy, digits, folder, n=20)
        except KeyboardInterrupt:
            assert figures(evaluate(toy, digits, folder, n=20)) == figures(whole)
            assert not (folder / "autoattack.unfinished.json").exists()
            assert [figures(record) for record in json.loads((folder / "autoattack.json").read_text())] == [
                figures(whole)
            ]
        else:
            break
    # The clean images; three batches at first; the end of three attacks; the record.
    assert cut > 1 + 3 + 3 + 1


def test_going_on_repeats_no_batch_and_says_so(toy, digits, tmp_path, monkeypatch):
    run, calls, limit = ShortAutoAttack.run_standard_evaluation, [], [1000]

    def counted(self: AutoAttack, x: Tensor, y: Tensor, *, batch_size: int) -> Any:
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append((self.attacks_to_run[0], batch_size))
        return run(self, x, y, batch_size=batch_size)

    monkeypatch.setattr(ShortAutoAttack, "run_standard_evaluation", counted)
    (tmp_path / "straight").mkdir()
    evaluate(toy, digits, tmp_path / "straight")
    straight, calls[:] = list(calls), []

    limit[0] = 5
    with pytest.raises(KeyboardInterrupt):
        evaluate(toy, digits, tmp_path)
    limit[0] = 1000
    messages: list[str] = []
    results = evaluation.Results(tmp_path / "autoattack")
    evaluation.evaluate(toy, digits, identity(), results, CPU, messages.append)
    assert calls == straight
    assert "interrupted before, going on after batch 1 of apgd-t" in messages[0]


def test_what_another_device_or_package_began_is_begun_again(toy, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "versions", lambda: {"torch": "1.0"})
        patch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
        evaluate(toy, digits, tmp_path, n=10)
    messages: list[str] = []
    results = evaluation.Results(tmp_path / "autoattack")
    record = evaluation.evaluate(toy, digits, identity(n=10), results, CPU, messages.append)
    assert "of another device or other packages; starting again" in messages[0]
    assert record["versions"] == evaluation.versions()


def raise_interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def toy_folder(toy, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes experiment folders, whose best.pt holds the toy."""
    monkeypatch.setattr(evaluation, "build_model", lambda settings: copy.deepcopy(toy))

    def make(name: str) -> Path:
        with Experiment.create(tmp_path, name, SETTINGS, echo=lambda message: None) as experiment:
            weights = {"average": toy.state_dict(), "model": toy.state_dict()}
            experiment.save_named("best", {"settings": SETTINGS, "epoch": 1, **weights})
        return experiment.folder

    return make


def test_kills_at_random_moments_change_nothing(toy_folder):
    """SIGKILL of the command again and again, some while a file is being written; the end is an undisturbed run's."""
    argv = ["--eps", "20", "--n", "60", "--batch-size", "8", "--device", "cpu"]

    def evaluate_in(folder: Path) -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork.
        tqdm.set_lock(threading.RLock())  # The one that is shared would be killed with us.
        evaluation.main([str(folder), *argv])

    def records(folder: Path) -> list[dict[str, Any]]:
        path = folder / "autoattack.json"
        return [figures(record) for record in json.loads(path.read_text())] if path.exists() else []

    started = time.monotonic()
    evaluate_in(undisturbed := toy_folder("undisturbed"))
    duration = time.monotonic() - started
    whole = records(undisturbed)
    assert len(whole[0]["robust_accuracy_after"]) == 4
    random = torch.Generator().manual_seed(0)
    kills, rounds = 0, 0
    while kills < (200 if LARGE else 20):
        rounds += 1
        folder = toy_folder(f"round {rounds}")
        while not records(folder):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    evaluate_in(folder)
                    status = 0
                finally:
                    os._exit(status)
            time.sleep(duration * torch.rand((), generator=random).item())
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            for path in folder.glob("*.json"):
                json.loads(path.read_text())
        evaluate_in(folder)
        assert records(folder) == whole
        results = evaluation.Results(folder / "autoattack")
        assert results.unfinished(evaluation.identity_of(results.records[0])) is None


# --- Results ----------------------------------------------------------------------------------------------------------


def test_a_changed_checkpoint_gets_a_record_beside_the_old_one_and_its_progress_goes(
    toy, digits, tmp_path, monkeypatch
):
    old = evaluate(toy, digits, tmp_path, n=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
        evaluate(toy, digits, tmp_path, n=10)
    new = evaluate(toy, digits, tmp_path, n=5, sha256="1" * 64)
    assert json.loads((tmp_path / "autoattack.json").read_text()) == [old, new]
    assert not (tmp_path / "autoattack.unfinished.json").exists()


def test_progress_that_a_crash_left_beside_its_finished_record_is_void(toy, digits, tmp_path, monkeypatch):
    write = evaluation.write_json

    def crash_after_the_record(path: Path, value: Any) -> None:
        write(path, value)
        if path.name == "autoattack.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "write_json", crash_after_the_record)
        evaluate(toy, digits, tmp_path, n=10)
    assert json.loads((tmp_path / "autoattack.unfinished.json").read_text()) != []
    assert evaluation.Results(tmp_path / "autoattack").unfinished(identity(n=10)) is None


def test_what_is_unfinished_of_another_evaluation_stays(toy, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
        evaluate(toy, digits, tmp_path, n=10)
    evaluate(toy, digits, tmp_path, n=5)
    assert evaluation.Results(tmp_path / "autoattack").unfinished(identity(n=10)) is not None


@given(data=st.data())
@settings(
    max_examples=1000 if LARGE else 50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutated_progress_is_refused_or_gone_on_with_and_never_a_traceback(toy, digits, tmp_path, monkeypatch, data):
    monkeypatch.setattr(ShortAutoAttack, "run_standard_evaluation", lambda self, x, y, *, batch_size: (x, y))
    path = tmp_path / "autoattack.unfinished.json"
    progress = {"robust": "1" * 20, "batches": 1, "broken": [3], "robust_accuracy_after": {"apgd-ce": 1.0}}
    environment = {"device": "cpu", "versions": evaluation.versions()}
    record = identity(n=20) | {"test_size": 400, "clean_accuracy": 1.0, "seconds": {"apgd-ce": 1.0}, "warnings": []}
    record |= {"date": "", **environment, **progress}
    simple = st.none() | st.booleans() | st.integers(-5, 50) | st.floats() | st.text(max_size=3) | st.just("1" * 20)
    value = simple | st.lists(simple, max_size=3) | st.dictionaries(st.sampled_from(["apgd-t", "fab-t", "x"]), simple)
    name = data.draw(st.sampled_from([name for name in record if name not in environment]))
    mutated = json.dumps([record | {name: data.draw(value)}])
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(mutated)))
        mutated = mutated[:cut] + data.draw(st.sampled_from(["", "[", "}", "\x00", "7"])) + mutated[cut + 1 :]
    path.write_text(mutated)
    (tmp_path / "autoattack.json").unlink(missing_ok=True)
    try:
        evaluate(toy, digits, tmp_path, n=20)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert path.read_text() == mutated


# --- The command line -------------------------------------------------------------------------------------------------

SETTINGS = {"dataset": "digits", "model": "wrn-10-1-swish", "group_norm": False, "normalize": False}


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    info = DATASETS["digits"]
    return create_model("wrn-10-1-swish", mean=info.mean, std=info.std).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment folder with two checkpoints, whose raw weights are not their averaged ones."""
    with Experiment.create(tmp_path, "run", SETTINGS, echo=lambda message: None) as experiment:
        for seed, name in enumerate(["burn_in", "best"]):
            weights = {"average": new_model(seed).state_dict(), "model": new_model(seed + 10).state_dict()}
            experiment.save_named(name, {"settings": SETTINGS, "epoch": 1, **weights})
    return experiment.folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def parsed(*argv: str, capsys: pytest.CaptureFixture) -> dict[str, Any]:
    assert evaluation.main([*argv, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_an_experiment_folder_from_the_command_line(folder, capsys):
    argv = [str(folder), "--eps", "4", "8/255", "--n", "10", "--device", "cpu", "--checkpoint", "burn_in", "best.pt"]
    assert evaluation.main(argv) == 0
    records = json.loads((folder / "autoattack.json").read_text())
    assert [(r["checkpoint"], r["eps"], r["eps_text"]) for r in records] == [
        ("burn_in.pt", 4 / 255, "4/255"),
        ("burn_in.pt", 8 / 255, "8/255"),
        ("best.pt", 4 / 255, "4/255"),
        ("best.pt", 8 / 255, "8/255"),
    ]
    test = load_data("digits")[1]
    for seed, record in enumerate([records[0], records[2]]):
        correct = new_model(seed)(to_input(test.images[:10])).argmax(dim=1) == test.labels[:10]
        assert record["clean_accuracy"] == pytest.approx(correct.float().mean().item())
        name = folder / record["checkpoint"]
        assert record["sha256"] == subprocess.check_output(["sha256sum", name], text=True).split()[0]
        assert record.items() >= {**SETTINGS, "version": "standard", "n": 10, "test_size": 400, "device": "cpu"}.items()
        assert record["versions"]["torch"] == torch.__version__
    log = (folder / "eval.log").read_text()
    assert "best.pt (average weights), Linf 8/255, first 10 of 400 test images: clean " in log

    before = (folder / "autoattack.json").read_bytes()
    assert evaluation.main(argv) == 0
    assert (folder / "autoattack.json").read_bytes() == before
    assert capsys.readouterr().out.count("as evaluated before (--again to do it again)") == 4

    assert evaluation.main([str(folder / "best.pt"), "--eps", "8", "--n", "10", "--device", "cpu", "--again"]) == 0
    again = json.loads((folder / "autoattack.json").read_text())
    assert [figures(record) for record in again] == [figures(record) for record in records]
    assert again[3]["seconds"] != records[3]["seconds"]


def test_an_interrupt_is_logged_and_not_a_traceback(folder, monkeypatch):
    monkeypatch.setattr(ShortAutoAttack, "run_standard_evaluation", raise_interrupt)
    assert evaluation.main([str(folder), "--n", "20", "--device", "cpu"]) == 130
    assert "interrupted; the same command goes on after the last finished batch" in (folder / "eval.log").read_text()
    assert not (folder / "autoattack.json").exists()


# These run AutoAttack at its full length, as other processes do not see the short one; at such radii it is soon done.
SEVERAL = ["--eps", "128", "255", "--n", "40", "--batch-size", "1", "--checkpoint", "burn_in", "best", "-v", "custom"]
SEVERAL += ["--device", "cpu"]


def records_by_identity(folder: Path) -> list[dict[str, Any]]:
    records = json.loads((folder / "autoattack.json").read_text())
    return sorted(map(figures, records), key=lambda record: (record["checkpoint"], record["eps"]))


def test_jobs_find_what_one_process_finds_also_after_their_death(folder, monkeypatch):
    """Two jobs, cut by the death of the process that writes, then of one that attacks; against one job in one go."""
    monkeypatch.setattr(evaluation, "AutoAttack", AutoAttack)
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
    assert evaluation.main([str(folder), *SEVERAL, "--again"]) == 0
    assert several == records_by_identity(folder)
    assert len(several) == 4


def answer_at_once(channel: Any, *rest: Any) -> None:
    """A worker that finds out nothing, and quickly; a forked one sees no end of its channel, so it waits a second."""
    while channel.poll(1):
        task, *_ = channel.recv()
        channel.send(("finish", pickle.loads(task).identity))


def test_jobs_that_finish_at_the_same_moment_share_what_is_left(monkeypatch, digits):
    class Kept:
        unfinished_path = None
        records: list[dict[str, Any]] = []

        def unfinished(self, identity: dict[str, Any]) -> None:
            return None

        def finish(self, record: dict[str, Any]) -> None:
            self.records.append(record)

        save = finish

    def slow_wait(channels: list[Any]) -> list[Any]:
        time.sleep(0.3)  # All that work have answered by then.
        return wait(channels)

    monkeypatch.setattr(evaluation, "_work", answer_at_once)
    monkeypatch.setattr(evaluation, "wait", slow_wait)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(evaluation.multiprocessing, "get_context", lambda method: fork)
    tasks = [evaluation.Task(nn.Identity(), digits, {"number": number}) for number in range(3)]
    found = list(evaluation.evaluate_all(tasks, 2, Kept(), CPU, print))
    assert sorted(record["number"] for record in found) == [0, 1, 2]
    assert Kept.records == found


def test_jobs_refuse_damaged_progress_in_one_line(folder, monkeypatch):
    record = dict.fromkeys(evaluation.IDENTITY) | {"date": ""}
    identities = []

    def note(model: nn.Module, test: Split, identity: dict[str, Any], *rest: Any) -> dict[str, Any]:
        identities.append(identity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", note)
        assert evaluation.main([str(folder), *SEVERAL]) == 130
    path = folder / "autoattack.unfinished.json"
    kind = {"device": "cpu", "versions": evaluation.versions()}
    path.write_text(json.dumps([record | identities[0] | kind | {"robust": "2"}]))
    with pytest.raises(ValueError, match=r"autoattack\.unfinished\.json: damaged; remove it[^\n]+$"):
        evaluation.main([str(folder), *SEVERAL, "--jobs", "2"])


def test_raw_weights(folder):
    assert (
        evaluation.main([str(folder), "--eps", "1", "--n", "40", "--device", "cpu", "--weights", "raw", "-v", "custom"])
        == 0
    )
    (record,) = json.loads((folder / "autoattack.json").read_text())
    test = load_data("digits")[1]
    correct = new_model(11)(to_input(test.images[:40])).argmax(dim=1) == test.labels[:40]
    assert record["weights"] == "raw"
    assert record["clean_accuracy"] == pytest.approx(correct.float().mean().item())
    assert list(record["robust_accuracy_after"]) == ["apgd-ce", "apgd-t", "fab-t"]


def test_released_command_line(capsys):
    line = "--fname_input some/folder --eps_eval 8 --norm_attack Linf --batch_size_for_eval 1500 -v custom"
    settings_ = parsed(*line.split(), capsys=capsys)
    assert settings_.items() >= {"target": "some/folder", "norm": "Linf", "batch_size": 1500, "n": None}.items()
    assert settings_["eps"] == ["8/255"]
    assert settings_["attacks"] == ["apgd-ce", "apgd-t", "fab-t"]
    settings_ = parsed("f", "--eps_eval", "0.5", "--norm_attack", "L2", "--data", "cifar10s", capsys=capsys)
    assert settings_.items() >= {"eps": ["0.5"], "norm": "L2", "version": "standard", "dataset": "cifar10"}.items()


@pytest.mark.parametrize(
    ("text", "norm", "eps", "written"),
    [
        ("8", "Linf", 8 / 255, "8/255"),
        ("8/255", "Linf", 8 / 255, "8/255"),
        ("2.5", "Linf", 2.5 / 255, "2.5/255"),
        ("1/51", "Linf", 5 / 255, "5/255"),
        ("0.5", "L2", 0.5, "0.5"),
        ("128/255", "L2", 128 / 255, "0.501961"),
    ],
)
def test_eps(text, norm, eps, written):
    assert evaluation.parse_eps(text, norm) == (pytest.approx(eps, rel=1e-15), written)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eps", "0"], "--eps: '0' is not a number above 0"),
        (["--eps", "8", "-3"], "--eps: '-3' is not a number above 0"),
        (["--eps", "8/0"], "--eps: '8/0' is not a number above 0"),
        (["--eps", "nan", "--norm", "L2"], "--eps: 'nan' is not a number above 0"),
        (["--eps", "0.031"], "--eps 0.031: for Linf this means 0.031/255"),
        (["--eps", "256"], "--eps 256: for Linf at most 255"),
        (["--norm", "L1"], "--norm_attack: invalid choice: 'L1'"),
        (["-v", "plus"], "-v: invalid choice: 'plus'"),
        (["--n", "0"], "--n: '0' is not a whole number at least 1"),
        (["--n", "401"], "--n 401: the test set has 400 images"),
        (["--batch-size", "-1"], "--batch_size_for_eval: '-1' is not a whole number at least 1"),
        (["--seed", "x"], "--seed: 'x' is not a whole number at least 0"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--checkpoint", "best", "latest.pt"], "--checkpoint latest.pt: "),
        (["--checkpoint", "../run/best.pt"], "has best.pt, burn_in.pt"),
        (["--model", "wrn-10-1"], "--model wrn-10-1: "),
        (["--dataset", "svhn"], "--data: 'svhn' is not one of cifar10, "),
        (["--fname_input", "other"], "expected one FOLDER or FILE"),
    ],
)
def test_bad_flags_end_in_one_line_before_anything_is_written(folder, capsys, argv, message):
    before = contents(folder)
    with pytest.raises((ValueError, SystemExit)) as error:
        evaluation.main([str(folder), *argv])
    line = str(error.value) if error.type is not SystemExit else capsys.readouterr().err.rstrip("\n")
    assert message in line
    assert "\n" not in line
    assert error.type is not SystemExit or error.value.code == 2
    assert contents(folder) == before


def test_exit_status_and_the_one_line_of_a_process(tmp_path):
    ran = subprocess.run(
        [sys.executable, ROOT / "eval.py", tmp_path / "none", "--device", "cpu"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"eval.py: error: {tmp_path / 'none'}: no such experiment folder\n"


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "[1]", '[{"checkpoint": "best.pt"}]'])
def test_damaged_results_are_refused_and_left_alone(folder, text):
    (folder / "autoattack.json").write_text(text)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"autoattack\.json: [^\n]+$"):
        evaluation.main([str(folder), "--n", "1", "--device", "cpu"])
    assert contents(folder) == before


@pytest.mark.parametrize(
    "change", [{"model": 7}, {"dataset": "svhn"}, {"dataset": None}, {"model": "wrn-16-1-swish"}, None]
)
def test_checkpoints_whose_settings_lie(folder, change):
    weights = {"average": new_model(0).state_dict(), "model": new_model(0).state_dict()}
    lies = [] if change is None else {k: v for k, v in (SETTINGS | change).items() if v is not None}
    save_checkpoint(folder / "best.pt", {"settings": lies, **weights})
    with pytest.raises(ValueError, match=r"best\.pt: [^\n]+$"):
        evaluation.main([str(folder), "--n", "1", "--device", "cpu"])
    assert not (folder / "autoattack.json").exists()


def test_two_evaluations_of_one_folder_or_file_do_not_mix(folder, tmp_path):
    bare = tmp_path / "bare.pt"
    torch.save(new_model(0).state_dict(), bare)
    flags = ["--n", "1", "--device", "cpu", "--model", "wrn-10-1-swish", "--dataset", "digits"]
    with evaluation.open_place(folder, None), pytest.raises(ValueError, match="is in use"):
        evaluation.main([str(folder), *flags])
    with evaluation.open_place(bare, None), pytest.raises(ValueError, match="is in use"):
        evaluation.main([str(bare), *flags])
    assert evaluation.main([str(bare), *flags]) == 0


# --- The checkpoints of others ----------------------------------------------------------------------------------------

GIVEN = {"model": "wrn-10-1-swish", "dataset": "digits", "group_norm": None, "normalize": None}


@pytest.mark.parametrize(
    ("wrap", "weights", "seed"),
    [
        (lambda a, b: a, "average", 0),
        (lambda a, b: {f"module.{name}": value for name, value in a.items()}, "average", 0),
        (lambda a, b: {f"module.0.{name}": value for name, value in a.items()}, "average", 0),
        (lambda a, b: {"state_dict": a}, "average", 0),
        (lambda a, b: {"wa_model": a, "unaveraged_model": b, "epoch": 3}, "average", 0),
        (lambda a, b: {"wa_model": a, "unaveraged_model": b, "epoch": 3}, "raw", 1),
        (lambda a, b: {"model_state_dict": a, "unaveraged_model_state_dict": b}, "average", 0),
        (lambda a, b: {"model_state_dict": a, "unaveraged_model_state_dict": b}, "raw", 1),
    ],
)
def test_checkpoints_of_others_give_the_logits_of_their_weights(tmp_path, wrap, weights, seed):
    torch.save(wrap(new_model(0).state_dict(), new_model(1).state_dict()), tmp_path / "other.pt")
    candidate = evaluation.load_candidate(tmp_path / "other.pt", weights, GIVEN, print)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(candidate.model(x), new_model(seed)(x), rtol=0, atol=0)
    assert not candidate.model.training
    assert not any(parameter.requires_grad for parameter in candidate.model.parameters())


def test_a_bare_file_has_its_results_beside_it(tmp_path):
    torch.save(new_model(0).state_dict(), tmp_path / "other.pt")
    flags = ["--n", "5", "--device", "cpu", "--model", "wrn-10-1-swish", "--dataset", "digits", "--eps", "1"]
    assert evaluation.main([str(tmp_path / "other.pt"), *flags]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt", "other.pt.autoattack.json", "other.pt.eval.log"}
    (record,) = json.loads((tmp_path / "other.pt.autoattack.json").read_text())
    assert record.items() >= {"checkpoint": "other.pt", "weights": "only", **SETTINGS}.items()


class _Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/hostile-checkpoint-ran",)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", ["--model", "wrn-10-1"], "not a checkpoint"),
        (b"hello", ["--model", "wrn-10-1"], "not a checkpoint"),
        (_Hostile(), ["--model", "wrn-10-1"], "refused: it names posix.system"),
        ([1, 2], ["--model", "wrn-10-1"], "not a checkpoint"),
        ({}, ["--model", "wrn-10-1"], "the state dict is empty"),
        ({"a": torch.zeros(2)}, [], "say what it is with --model"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-11-1"], "wrn-11-1"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1"], "do not fit this WideResNet"),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1", "--weights", "raw"], "--weights raw: "),
        ({"unaveraged_model": {}}, ["--model", "wrn-10-1"], "--weights average: "),
        ({"a": torch.zeros(2)}, ["--model", "wrn-10-1", "--checkpoint", "best.pt"], "is a checkpoint itself"),
    ],
)
def test_what_is_no_checkpoint_ends_in_one_line_and_is_left_alone(tmp_path, content, flags, message):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        evaluation.main([str(path), "--device", "cpu", *flags])
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before
    assert not Path("/tmp/hostile-checkpoint-ran").exists()


def test_the_paper_script_passes_flags_on_from_any_directory(tmp_path):
    ran = subprocess.run(
        ["bash", ROOT / "scripts" / "eval.sh", "some/run", "--n", "5", "--dry-run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    settings_ = yaml.safe_load(ran.stdout)
    assert settings_.items() >= {"target": "some/run", "n": 5, "version": "standard"}.items()
    assert settings_["eps"] == ["2/255", "4/255", "8/255", "12/255", "16/255"]
