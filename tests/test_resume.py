"""Resuming: bit for bit the run that was not cut, whatever cut it; and nothing that is found in a folder is believed.

With DYART_LARGE_TESTS=1: a cut at every event instead of a few, and 1,500 mutated args.yaml instead of 60.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from children import exit_status, fork
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import contents, differences, files, refusal, run_training, tiny
from torch import nn

import analyze
import train
from experiment.checkpoint import load_checkpoint, save_checkpoint
from experiment.folder import Experiment
from experiment.settings import LATER
from experiment.train_flags import flag_of

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"

# --- Cuts -------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9 as far as files go: nothing that comes after it is done. test_chaos.py has the real one."""


class Kill:
    """Raises Killed at one of the events of a run: between steps and around each file that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[str] = []
        self.at: Callable[[int, str], bool] = lambda number, event: False
        self._wrap(monkeypatch, train.Signals, "check")
        for name in ("append_metrics", "save_best", "save_named", "save_latest"):
            self._wrap(monkeypatch, Experiment, name)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any) -> Any:
            result = original(*args)
            self.events.append(name)
            if self.at(len(self.events), name):
                raise Killed
            return result

        monkeypatch.setattr(owner, name, wrapper)

    @contextlib.contextmanager
    def when(self, at: Callable[[int, str], bool]) -> Iterator[None]:
        """In the body a run is killed after the first event, counted from 1, for which `at` is true."""
        self.events, self.at = [], at
        yield
        self.at = lambda number, event: False


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Kill:
    return Kill(monkeypatch)


def killed(*argv: str) -> bool:
    """Whether a run is killed before its end."""
    try:
        assert run_training(*argv) == 0
    except Killed:
        return True
    return False


@pytest.fixture(scope="session")
def generated_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("generated") / "generated.npz"
    np.savez(path, image=rng.integers(256, size=(30, 32, 32, 3), dtype=np.uint8), label=rng.integers(10, size=30))
    return path


METHODS = {
    "clean": ["--method", "clean"],
    "dyart": ["--method", "dyart"],
    "dyart shared": ["--method", "dyart", "--search", "shared"],
    "dyart fab": ["--method", "dyart", "--search", "fab", "--search-steps", "3"],
    "dyart L2": ["--method", "dyart", "--norm", "L2", "--scheduler", "cyclic"],
    "at": ["--method", "at", "--attack-iter", "2"],
    "trades": ["--method", "trades", "--attack-iter", "2", "--scheduler", "step"],
    "mart": ["--method", "mart", "--attack-iter", "2", "--scheduler", "cosine"],
    "n-fgsm": ["--method", "n-fgsm", "--track-dynamics", "1"],
    "fgsm-rs": ["--method", "fgsm-rs", "--norm", "L2"],
    "burn-in": ["--method", "dyart", "--burn-in-epochs", "1", "--epochs", "1"],
    "generated": ["--method", "clean", "--unsup-fraction", "0.5", "--aux-data-filename"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cut_again_and_again_ends_as_if_it_had_not_been(
    method: str, tmp_path: Path, generated_data: Path, kill: Kill
) -> None:
    flags = METHODS[method] + ([str(generated_data)] if method == "generated" else [])
    flags += ["--checkpoint-minutes", "1e-9"]  # after every step
    assert run_training(*tiny(tmp_path / "whole", *flags)) == 0
    cuts, argv = 0, tiny(tmp_path / "cut", *flags)
    for events in (3, 2, 4, 5, 7, 3, 6):
        with kill.when(lambda number, event, last=events: number == last):
            if not killed(*argv):
                break
        cuts, argv = cuts + 1, ["--resume", str(tmp_path / "cut" / "run")]
    else:
        assert run_training(*argv) == 0
    assert cuts >= 3
    whole = contents(tmp_path / "whole" / "run")
    assert not differences(contents(tmp_path / "cut" / "run"), whole)
    assert [row["epoch"] for row in whole["metrics.csv"]] == [1, 2]
    if method.startswith("dyart"):
        assert max(row["found"] for row in whole["metrics.csv"]) > 0


BORDER = ["--burn-in-epochs", "1", "--epochs", "1", "--save-every", "2"]
EVENTS = ["check"] * 5 + ["append_metrics", "save_named", "save_latest"]  # of the burn-in: three steps, two batches
EVENTS += ["check"] * 5 + ["append_metrics", "save_named", "save_best", "save_named", "save_latest"]
CUTS = {
    "within an epoch": 2,
    "in a validation": 4,
    "between metrics.csv and burn_in.pt": 6,
    "between burn_in.pt and latest.pt": 7,
    "at the border": 8,
    "after a step of DyART": 9,
    "between metrics.csv and best.pt": 14,
    "between best.pt and epoch_0002.pt": 16,
    "between epoch_0002.pt and latest.pt": 17,
    "at the end": 18,
}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run across the border between burn-in and DyART that nothing has cut."""
    root = tmp_path_factory.mktemp("whole")
    assert run_training(*tiny(root, *BORDER)) == 0
    return root / "run"


@pytest.mark.parametrize("event", range(1, len(EVENTS) + 1) if LARGE else CUTS.values(), ids=None if LARGE else CUTS)
def test_one_cut_without_checkpoints_within_an_epoch(event: int, tmp_path: Path, whole: Path, kill: Kill) -> None:
    with kill.when(lambda number, name: number == event):
        assert killed(*tiny(tmp_path, *BORDER))
    assert kill.events == EVENTS[:event]
    assert run_training("--resume", str(tmp_path / "run")) == 0
    assert not differences(contents(tmp_path / "run"), contents(whole))


def test_a_checkpoint_within_an_epoch_costs_no_step(tmp_path: Path, kill: Kill) -> None:
    flags = ["--method", "clean", "--checkpoint-minutes", "1e-9", "--epochs", "1"]
    with kill.when(lambda number, event: event == "save_latest" and number == 4):  # check and save, twice
        assert killed(*tiny(tmp_path, *flags))
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["progress"]["step"] == 2
    with kill.when(lambda number, event: False):
        assert run_training("--resume", str(tmp_path / "run")) == 0
    assert kill.events[:2] == ["check", "save_latest"]  # the third step
    assert kill.events[2:5] == ["check", "check", "append_metrics"]  # validation


# --- Signals ----------------------------------------------------------------------------------------------------------


def send_at(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send signals to this process in the midst of step number `step`, and let the other steps be."""
    original, steps = train.LOSSES["dyart"], []

    def loss(*args: Any, **kwargs: Any) -> Any:
        steps.append(None)
        if len(steps) == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setitem(train.LOSSES, "dyart", loss)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_a_line_and_its_number(
    number: signal.Signals, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_at(monkeypatch, 2, number)
    folder = tmp_path / "run"
    assert run_training(*tiny(tmp_path, *BORDER)) == 128 + number
    assert f"stopped by {number.name}; go on with --resume {folder}" in (folder / "train.log").read_text()
    state = load_checkpoint(folder / "latest.pt")
    assert (state["progress"]["stage"], state["progress"]["epoch"], state["progress"]["step"]) == (1, 1, 2)
    assert run_training("--resume", str(folder)) == 0
    assert not differences(contents(folder), contents(whole))


def test_a_second_sigint_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_at(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    assert exit_status(fork(lambda: train.main(tiny(tmp_path)))) == -signal.SIGINT
    assert not (tmp_path / "run" / "latest.pt").exists()


# --- Going on, or not -------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_is_left_alone(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(whole)
    assert run_training("--resume", str(whole)) == 0
    assert "nothing left to do, all 2 epochs are finished" in capsys.readouterr().out
    assert files(whole) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, kill: Kill, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with kill.when(lambda number, event: event == "append_metrics"):
        assert killed(*tiny(tmp_path, *BORDER))
    assert run_training("--resume", str(tmp_path / "run")) == 0
    assert "holds no checkpoint yet; starting from the beginning" in capsys.readouterr().out
    assert not differences(contents(tmp_path / "run"), contents(whole))


def test_a_dry_run_changes_nothing(tmp_path: Path, kill: Kill, capsys: pytest.CaptureFixture[str]) -> None:
    with kill.when(lambda number, event: event == "append_metrics"):
        assert killed(*tiny(tmp_path))
    capsys.readouterr()
    before = files(tmp_path)
    assert run_training("--resume", str(tmp_path / "run"), "--dry-run", "--save-every", "3") == 0
    assert yaml.safe_load(capsys.readouterr().out)["save_every"] == 3
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "flags",
    [
        "--method clean --train-subset 16",
        "--method clean --batch-size 2",  # 20 steps an epoch: BatchNorm looks back over more steps than its least
        "--method at --attack-iter 1 --scheduler constant --burn-in-epochs 1 --batch-size 4 --burn-in-batch-size 2",
    ],
)
def test_a_constant_schedule_can_be_made_longer(flags: str, tmp_path: Path) -> None:
    """Weights and running statistics are those of a run that had all of its epochs from the start."""
    flags = [*flags.split(), "--validation-size", "1"]
    assert run_training(*tiny(tmp_path / "long", *flags, "--epochs", "3")) == 0
    assert run_training(*tiny(tmp_path / "short", *flags, "--epochs", "2")) == 0
    assert run_training("--resume", str(tmp_path / "short" / "run"), "--epochs", "3") == 0
    short, long = contents(tmp_path / "short" / "run"), contents(tmp_path / "long" / "run")
    assert [row["epoch"] for row in short["metrics.csv"]] == [row["epoch"] for row in long["metrics.csv"]]
    assert short["args.yaml"]["epochs"] == 3
    assert not differences(short["latest.pt"]["model"], long["latest.pt"]["model"])


@pytest.mark.parametrize("epochs", ["1", "3"])
def test_other_schedules_cannot_be_made_longer_or_shorter(
    epochs: str, tmp_path: Path, kill: Kill, capsys: pytest.CaptureFixture[str]
) -> None:
    with kill.when(lambda number, event: event == "save_latest"):
        assert killed(*tiny(tmp_path, "--train-subset", "16"))
    before = files(tmp_path)
    error = refusal(capsys, "--resume", str(tmp_path / "run"), "--epochs", epochs)
    assert f"--epochs {epochs}: the cosinew schedule of" in error and "was laid out for 2 epochs" in error
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--lr", "0.2"], "--lr 0.2: .* runs with 0.1, and --resume cannot change it"),
        (["--seed", "5"], "--seed 5: .* runs with 0"),
        (["--model", "resnet18"], "--model resnet18: .* runs with wrn-10-1-swish"),
        (["--device", "cuda:77"], "--device cuda:77: not to be had here"),
        (["--device", "cuda", "--cuda-graphs"], "--cuda-graphs: goes with --search fast or fab, and .* with shared"),
    ],
)
def test_what_cannot_change_is_refused(
    flags: list[str], pattern: str, whole: Path, tmp_path: Path, kill: Kill, capsys: pytest.CaptureFixture[str]
) -> None:
    with kill.when(lambda number, event: event == "check"):
        assert killed(*tiny(tmp_path, "--train-subset", "16", "--search", "shared"))
    before = files(tmp_path)
    assert re.search(pattern, refusal(capsys, "--resume", str(tmp_path / "run"), *flags))
    assert files(tmp_path) == before


@pytest.mark.parametrize("search", ["fast", "fab"])
def test_cuda_graphs_of_a_search_that_takes_them_need_a_gpu(
    search: str, tmp_path: Path, kill: Kill, capsys: pytest.CaptureFixture[str]
) -> None:
    with kill.when(lambda number, event: event == "check"):
        assert killed(*tiny(tmp_path, "--train-subset", "16", "--search", search))
    before = files(tmp_path)
    error = refusal(capsys, "--resume", str(tmp_path / "run"), "--device", "cpu", "--cuda-graphs")
    assert "--cuda-graphs: only on a GPU, not with --device cpu" in error
    assert files(tmp_path) == before
    assert run_training("--resume", str(tmp_path / "run"), "--device", "cpu", "--cuda-graphs", "--dry-run") == 0


def test_normalize_is_held_against_the_folders_model(
    tmp_path: Path, kill: Kill, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not the recipe's, a Swish one's: only those normalize whatever `--normalize false` says, with a warning."""
    for name, model in (
        ("swish", []),
        ("plain", ["--model", "wrn-10-1"]),
        ("own", ["--model", "wrn-10-1", "--normalize"]),
    ):
        with kill.when(lambda number, event: event == "check"):
            assert killed(*tiny(tmp_path, "--name", name, "--train-subset", "16", *model))
    before = files(tmp_path)
    argv = ["--normalize", "false", "--dry-run", "--resume"]
    for name, warned in (("swish", True), ("plain", False)):
        caplog.clear()
        assert run_training(*argv, str(tmp_path / name)) == 0
        assert ("Swish models normalize" in caplog.text) == warned
    caplog.clear()
    assert "--normalize False: " in refusal(capsys, *argv, str(tmp_path / "own"))
    assert "--normalize True: " in refusal(capsys, "--normalize", "--resume", str(tmp_path / "plain"))
    assert not caplog.text and files(tmp_path) == before


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path, kill: Kill) -> None:
    with kill.when(lambda number, event: event == "check"):
        assert killed(*tiny(tmp_path, "--train-subset", "16"))
    folder, stderr = tmp_path / "run", tmp_path / "stderr"

    def second() -> int:
        train.flags.run(lambda: train.main(["--resume", str(folder)]))

    with Experiment.open(folder, lock="train"):
        before = files(folder)
        assert exit_status(fork(second, stderr)) == 2
        assert f"{folder} is in use: process {os.getpid()}" in stderr.read_text()
        assert files(folder) == before


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "removed", "flipped"])
def test_where_latest_is_damaged_previous_is_taken_and_named(
    damage: str, tmp_path: Path, kill: Kill, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run_training(*tiny(tmp_path, *BORDER)) == 0
    latest = folder / "latest.pt"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "removed":
        latest.unlink()
    else:
        latest.write_bytes(content if damage == "flipped" else content[:1000])
    capsys.readouterr()
    assert run_training("--resume", str(folder)) == 0
    assert re.search(f"resume: from {folder}/previous.pt, 1 epochs finished .*latest.pt", capsys.readouterr().out)
    assert not differences(contents(folder), contents(whole))


def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of which the last epoch is still to be done."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("args.yaml", "metrics.csv", "train.log", "burn_in.pt"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "latest.pt").write_bytes((whole / "previous.pt").read_bytes())
    return folder


def test_of_two_damaged_checkpoints_both_are_named(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path)
    for name in ("latest.pt", "previous.pt"):
        (folder / name).write_bytes((whole / "latest.pt").read_bytes()[:-1000])
    before = files(folder)
    error = refusal(capsys, "--resume", str(folder))
    assert "latest.pt" in error and "previous.pt" in error
    assert files(folder) == before


def replaced(state: dict[str, Any], value: Any, *keys: Any) -> None:
    for key in keys[:-1]:
        state = state[key]
    if value is None:
        del state[keys[-1]]
    else:
        state[keys[-1]] = value


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        *((None, [key]) for key in ("settings", "model", "average", "warmup_steps", "optimizer", "scheduler")),
        *((None, [key]) for key in ("progress", "meter", "rng")),
        *((3, [key]) for key in ("settings", "model", "average", "optimizer", "scheduler", "progress", "meter", "rng")),
        (None, ["progress", "epoch"]),
        ("one", ["progress", "epoch"]),
        (77, ["progress", "epoch"]),
        (-1, ["progress", "stage"]),
        (2, ["progress", "stage"]),
        (77, ["progress", "step"]),
        (["high", "low"], ["progress", "best"]),
        (1, ["progress", "best"]),
        ("x", ["warmup_steps"]),
        (torch.zeros(3), ["model", "logits.bias"]),
        (torch.full((10,), float("nan")), ["model", "logits.bias"]),
        (torch.full((10,), float("inf")), ["average", "logits.bias"]),
        (None, ["average", "logits.bias"]),
        ([], ["optimizer", "param_groups"]),
        ([0], ["optimizer", "param_groups", 0, "params"]),
        ("fast", ["optimizer", "param_groups", 0, "lr"]),
        (None, ["optimizer", "param_groups", 0, "lr"]),
        (torch.zeros(7), ["optimizer", "state", 0, "momentum_buffer"]),
        (7, ["optimizer", "state", 0, "momentum_buffer"]),
        (7, ["optimizer", "state", 0]),
        (None, ["scheduler", "last_epoch"]),
        ("x", ["scheduler", "last_epoch"]),
        ("x", ["meter", "margins"]),
        ({"loss": "small"}, ["meter", "sums"]),
        (torch.zeros(3), ["rng", "torch"]),
        ([1, 2], ["rng", "numpy"]),
        ([3, [1], None], ["rng", "python"]),
        ("wrn-16-1-swish", ["settings", "model"]),
        (None, ["settings", "lr"]),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    value: Any, keys: list[Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path)
    state = load_checkpoint(folder / "latest.pt")
    replaced(state, value, *keys)
    save_checkpoint(folder / "latest.pt", state)
    before = files(folder)
    assert f"{folder}/latest.pt: " in refusal(capsys, "--resume", str(folder))
    assert files(folder) == before


def test_the_checkpoint_of_another_run_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path)
    text = (folder / "args.yaml").read_text()
    (folder / "args.yaml").write_text(text.replace("lr: 0.1\n", "lr: 0.2\n"))
    error = refusal(capsys, "--resume", str(folder))
    assert "latest.pt: trained with lr 0.1, args.yaml beside it says 0.2" in error or "burn_in_lr" in error


def test_a_folder_from_before_a_setting_was_added_goes_on(tmp_path: Path) -> None:
    """As it went before, whatever the default for new runs is."""
    before = [f"{flag_of(name)}={value}" for name, value in LATER.items() if value is not None]
    unknown = [*LATER, "mean", "std"]
    assert run_training(*tiny(tmp_path, *BORDER, *before)) == 0
    whole = tmp_path / "run"
    folder = copied(whole, tmp_path)
    state = load_checkpoint(folder / "latest.pt")
    for name in unknown:
        del state["settings"][name]
    state["settings"]["normalize"] = False  # which said nothing of the Swish models then
    save_checkpoint(folder / "latest.pt", state)
    values = yaml.safe_load((folder / "args.yaml").read_text())
    values = {name: value for name, value in values.items() if name not in unknown} | {"normalize": False}
    (folder / "args.yaml").write_text(yaml.safe_dump(values))
    assert run_training("--resume", str(folder)) == 0
    found, expected = contents(folder), contents(whole)
    for run in (found, expected):  # in whatever order the settings stand
        for checkpoint in [value for name, value in run.items() if name.endswith(".pt")]:
            checkpoint["settings"] = dict(sorted(checkpoint["settings"].items()))
        run["args.yaml"] = dict(sorted(run["args.yaml"].items()))
    assert not differences(found, expected)


def test_lengths_of_a_folder_from_before_they_meant_the_same_everywhere_are_not_read_again(
    tmp_path: Path, kill: Kill, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where --attack-eps 8 was 8.0, and --r0 0.5 was 0.5."""
    with kill.when(lambda number, event: event == "check"):
        assert killed(*tiny(tmp_path, "--train-subset", "16", "--r0", "1/2", "--method", "clean"))
    folder = tmp_path / "run"
    values = yaml.safe_load((folder / "args.yaml").read_text()) | {"attack_eps": 8.0, "attack_step": 2.0}
    (folder / "args.yaml").write_text(yaml.safe_dump(values))
    for flags in (["--attack-eps", "8/255"], ["--attack-step", "1"], ["--r0", "0.6"]):
        assert flags[0] in refusal(capsys, "--resume", str(folder), *flags)
    assert values["r0"] == 0.5
    for flags in ([], ["--attack-eps", "8", "--attack-step", "2", "--r0", "0.5"], ["--h_prime_r0", "127.5/255"]):
        capsys.readouterr()
        assert run_training("--resume", str(folder), *flags, "--dry-run") == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        assert [shown[name] for name in ("attack_eps", "attack_step", "r0")] == [8.0, 2.0, 0.5]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)


@st.composite
def mutated(draw: st.DrawFn, text: str) -> bytes:
    """A settings file with lines lost, doubled or changed, or bytes of it replaced."""
    values = yaml.safe_load(text)
    kind = draw(st.sampled_from(["value", "missing", "unknown", "bytes", "cut"]))
    name = draw(st.sampled_from(list(values)))
    if kind == "value":
        values[name] = draw(VALUES)
    elif kind == "missing":
        del values[name]
    elif kind == "unknown":
        values[draw(st.text(max_size=8))] = draw(VALUES)
    content = bytearray(yaml.safe_dump(values, sort_keys=False).encode())
    if kind == "cut":
        return bytes(content[: draw(st.integers(0, len(content)))])
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 4))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert (
        run_training(*tiny(root, "--method", "at", "--train-subset", "16", "--epochs", "1", "--attack-iter", "1")) == 0
    )
    return root / "run"


@settings(max_examples=1500 if LARGE else 60, deadline=None, database=None, derandomize=not LARGE)
@given(data=st.data())
def test_mutated_settings_are_refused_in_one_line_or_harmless(finished: Path, data: st.DataObject) -> None:
    original = (finished / "args.yaml").read_bytes()
    content = data.draw(mutated(original.decode()))
    (finished / "args.yaml").write_bytes(content)
    try:
        before = files(finished)
        # Anything but these two errors would be a traceback.
        try:
            assert run_training("--resume", str(finished)) == 0
        except (ValueError, OSError) as error:
            assert str(error)
        assert files(finished) == before
    finally:
        (finished / "args.yaml").write_bytes(original)


@pytest.mark.parametrize(
    "content", ["", "epoch\n1\n1,2\n", "a,b\n1,2\n", "epoch,epoch\n1,1\n", "epoch\nlast\n\n", '"epoch\n']
)
def test_metrics_that_lie_are_refused_or_rewritten(
    content: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path)
    (folder / "metrics.csv").write_text(content)
    try:
        assert run_training("--resume", str(folder)) == 0
    except ValueError as error:
        assert "metrics.csv" in str(error)
    else:
        assert [row["epoch"] for row in Experiment.open(folder).read_metrics()] == [2]


def test_epochs_as_another_program_writes_them_keep_their_rows(tmp_path: Path) -> None:
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "1")) == 0
    path = tmp_path / "run" / "metrics.csv"
    header, row = path.read_text().splitlines()
    path.write_bytes(f"\ufeff{header}\r\n1.0{row.removeprefix('1')}\r\n".encode())
    assert run_training("--resume", str(tmp_path / "run"), "--epochs", "2") == 0
    assert [row["epoch"] for row in Experiment.open(tmp_path / "run").read_metrics()] == [1, 2]


@pytest.mark.parametrize("epoch", ["one", "", "1.5", "nan"])
def test_rows_of_no_epoch_are_refused_and_kept(
    epoch: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path)
    path = folder / "metrics.csv"
    header, row, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, epoch + "," + row.partition(",")[2], *rest, ""]))
    before = files(folder)
    assert "metrics.csv: row 1 has" in refusal(capsys, "--resume", str(folder))
    assert files(folder) == before


def test_generated_data_that_lies_elsewhere_now(
    tmp_path: Path, generated_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here.npz", tmp_path / "there.npz"
    shutil.copy(generated_data, here)
    argv = ["--method", "clean", "--epochs", "1", "--unsup-fraction", "0.5", "--aux-data-filename", str(here)]
    assert run_training(*tiny(tmp_path, *argv)) == 0
    folder = tmp_path / "run"
    here.rename(there)
    longer = ["--resume", str(folder), "--epochs", "2"]
    assert f"--aux-data-filename {here}: no such file" in refusal(capsys, *longer)
    with np.load(there) as arrays:
        np.savez(tmp_path / "other.npz", image=arrays["image"] ^ 1, label=arrays["label"])
    error = refusal(capsys, *longer, "--aux-data-filename", str(tmp_path / "other.npz"))
    assert "its arrays" in error and "are not those of the run" in error
    # Whoever does not train needs no generated data.
    assert analyze.main([str(folder), "--examples", "1", "--methods", "clean", "--device", "cpu"]) == 0
    assert run_training(*longer, "--aux-data-filename", str(there)) == 0
    assert Experiment.open(folder).settings["aux_data_filename"] == str(there)
    assert run_training("--resume", str(folder), "--epochs", "3") == 0

    # Other images where the run's were, under the same name; and a flag that names a folder.
    (tmp_path / "other.npz").replace(there)
    longer = ["--resume", str(folder), "--epochs", "4"]
    before = files(folder)
    for extra in ([], ["--aux-data-filename", str(there)]):
        assert "are not those of the run" in refusal(capsys, *longer, *extra)
    assert f"--aux-data-filename {tmp_path}: no such file" in refusal(
        capsys, *longer, "--aux-data-filename", str(tmp_path)
    )
    assert files(folder) == before


def test_generated_data_of_a_run_from_before_its_content_was_kept(
    tmp_path: Path, generated_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies where it lay then is asked; where there is nothing, the file is taken with a line."""
    here, other = tmp_path / "here.npz", tmp_path / "other.npz"
    shutil.copy(generated_data, here)
    with np.load(here) as arrays:
        np.savez(other, image=arrays["image"] ^ 1, label=arrays["label"])
    argv = ["--method", "clean", "--epochs", "1", "--unsup-fraction", "0.5", "--aux-data-filename", str(here)]
    assert run_training(*tiny(tmp_path, *argv)) == 0
    folder = tmp_path / "run"
    settings = Experiment.open(folder).settings | {"aux_data_content": None}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    longer = ["--resume", str(folder), "--epochs", "2", "--aux-data-filename", str(other)]
    assert "are not those of the run" in refusal(capsys, *longer)
    here.unlink()
    assert run_training(*longer) == 0
    assert f"{other} is taken for it" in capsys.readouterr().out


def test_a_data_folder_that_vanished_is_not_made_again(tmp_path: Path, whole: Path) -> None:
    folder = copied(whole, tmp_path)
    gone = tmp_path / "scratch" / "data"
    settings = Experiment.open(folder).settings | {"data_dir": str(gone)}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings))
    assert run_training("--resume", str(folder)) == 0
    assert analyze.main([str(folder), "--examples", "1", "--methods", "clean", "--device", "cpu"]) == 0
    assert not (tmp_path / "scratch").exists()


def test_a_finished_run_needs_no_metrics(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "metrics.csv").write_text("epoch;loss\n1;0,5\n")
    before = files(folder)
    assert run_training("--resume", str(folder)) == 0
    assert files(folder) == before


# --- A full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [100, 200_000])
def test_a_full_disk_ends_in_one_line_and_a_folder_to_go_on_with(room: int, whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)

    def limited() -> None:
        os.dup2(write_end, 2)  # no file, so that the limit does not concern it
        sys.stderr = os.fdopen(2, "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        train.flags.run(lambda: train.main(["--resume", str(folder)]))

    read_end, write_end = os.pipe()
    status = exit_status(fork(limited))
    os.close(write_end)
    with open(read_end) as pipe:
        error = pipe.read()
    assert status == 2
    assert "Traceback" not in error and re.search("error: cannot write .*: File too large", error)
    assert load_checkpoint(folder / "latest.pt")["progress"]["epoch"] == 1
    assert run_training("--resume", str(folder)) == 0
    assert not differences(contents(folder), contents(whole))


# --- Numbers that go bad ----------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, steps: Any, value: float = float("nan")) -> list[dict[str, Any]]:
    """Make the loss of some steps, counted from 1, a value that is not finite; collects the weights at each step."""
    original, seen = train.LOSSES["clean"], []

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        result, metrics = original(model, x, y)
        return (result * value if len(seen) in steps else result), metrics

    monkeypatch.setitem(train.LOSSES, "clean", loss)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spoil(monkeypatch, {2, 5}, value)
    assert run_training(*tiny(tmp_path, "--method", "clean")) == 0
    assert differences(seen[0], seen[1])
    assert not differences(seen[1], seen[2])  # weights and running statistics
    assert differences(seen[2], seen[3])
    assert [row["bad_steps"] for row in Experiment.open(tmp_path / "run").read_metrics()] == [1, 2]
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"skipped a step: loss (nan|inf), gradient norm nan \(epoch 1, batch 2, lr 0.1\)", log)


def test_after_skipped_steps_the_first_real_one_sets_the_running_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spoil(monkeypatch, {1})
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "1")) == 0
    assert seen[1]["batchnorm.running_mean"].eq(0).all()
    assert seen[2]["batchnorm.running_mean"].abs().mean() > 0.05  # momentum 0.01 would leave a hundredth


def test_ten_such_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(5, 100))
    assert run_training(*tiny(tmp_path, "--method", "clean", "--epochs", "9", "--checkpoint-minutes", "1e-9")) == 1
    log, latest = (tmp_path / "run" / "train.log").read_text(), tmp_path / "run" / "latest.pt"
    assert log.count("skipped a step") == 10
    assert "not finite in 10 steps in a row, up to epoch 5, batch 2, lr 0.1; the last good checkpoint is" in log
    assert all(value.isfinite().all() for value in load_checkpoint(latest)["model"].values())


def test_weights_that_are_not_finite_never_reach_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, steps = torch.optim.SGD.step, []

    def step(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        steps.append(None)
        if len(steps) == 5:
            self.param_groups[0]["params"][0].data[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert run_training(*tiny(tmp_path, "--method", "clean")) == 1
    assert re.search(
        r"stopped: init_conv.weight is not finite \(epoch 2, .*\); the last good checkpoint is .*/run/latest.pt",
        (tmp_path / "run" / "train.log").read_text(),
    )
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "run" / "latest.pt")["progress"]["epoch"] == 1
    assert run_training("--resume", str(tmp_path / "run")) == 0
